"""Score the embedded model on every combination of thing and colours that was left out of its training.

    python tools/demo/score.py

240 prompts on 3 seeds; writes `tools/demo/scores.json`. The bars: background >= 95 %, colour >= 90 %, thing >= 80 %.
`--num-prompts` and `--seeds` make it shorter, `--sheet` saves the pictures of the first seed with their answers.
"""

import argparse
import json
from collections import Counter
from pathlib import Path

import torch
from draw import THINGS
from PIL import Image, ImageDraw
from recipe import HELD_OUT

from lorasmith.checkpoint import open_checkpoint
from lorasmith.demo import FOLDER
from lorasmith.demo.judge import Judge, colors
from lorasmith.model_families import load
from lorasmith.sampling import generate

_STEPS, _GUIDANCE = 20, 4.0
_CELL, _LABEL, _COLUMNS = 128, 30, 12
Label = tuple[str, str, str]


def held_out_labels(count: int) -> list[Label]:
    """Return (thing, color, background), going round the things."""
    rounds = zip(*(sorted(HELD_OUT[thing]) for thing in THINGS), strict=True)
    return [(thing, *pair) for pairs in rounds for thing, pair in zip(THINGS, pairs, strict=True)][:count]


def main() -> None:
    parser = argparse.ArgumentParser(description="score the embedded model")
    parser.add_argument("--model", type=Path, default=FOLDER / "sd1-mini.safetensors")
    parser.add_argument("--num-prompts", type=int, default=240)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("scores.json"))
    parser.add_argument("--sheet", type=Path)
    args = parser.parse_args()

    with open_checkpoint(args.model) as checkpoint:
        model = load(checkpoint, dtype=torch.float32, device=torch.device("cpu"))
    judge, labels = Judge.load(), held_out_labels(args.num_prompts)
    results = {}
    for number, seed in enumerate(args.seeds):
        pictures = generate(
            model,
            [f"a {color} {thing} on a {ground} background" for thing, color, ground in labels],
            seeds=[1000 * seed + i for i in range(len(labels))],
            size=(128, 128),
            steps=_STEPS,
            guidance=_GUIDANCE,
            batch_size=16,
        )
        answers = list(zip(judge.things(pictures), map(colors, pictures), strict=True))
        results[f"seed {seed}"] = shares(labels, answers)
        print(json.dumps({"seed": seed, **results[f"seed {seed}"]}), flush=True)
        if number == 0 and args.sheet is not None:
            answer_sheet(labels, answers, pictures).save(args.sheet)
    facts = {"prompts": len(labels), "sampler": "dpm++", "steps": _STEPS, "guidance": _GUIDANCE}
    args.output.write_text(json.dumps({**facts, **results}, indent=2) + "\n", encoding="utf-8")


def shares(labels: list[Label], answers: list[tuple[str | None, tuple[str | None, str]]]) -> dict[str, object]:
    """Return the share of right backgrounds, colours and things, and the right ones of each thing."""
    pairs = list(zip(labels, answers, strict=True))
    right = Counter(label[0] for label, (thing, _) in pairs if thing == label[0])
    totals = Counter(label[0] for label in labels)
    return {
        "background": round(sum(ground == label[2] for label, (_, (_, ground)) in pairs) / len(pairs), 4),
        "color": round(sum(color == label[1] for label, (_, (color, _)) in pairs) / len(pairs), 4),
        "thing": round(sum(right.values()) / len(pairs), 4),
        "things": {thing: f"{right[thing]}/{total}" for thing, total in totals.items()},
    }


def answer_sheet(
    labels: list[Label], answers: list[tuple[str | None, tuple[str | None, str]]], pictures: list[Image.Image]
) -> Image.Image:
    """Return the pictures with what was asked for, and under it what the judge saw."""
    rows = -(-len(pictures) // _COLUMNS)
    page = Image.new("RGB", (_COLUMNS * _CELL, rows * (_CELL + _LABEL)), "white")
    pen = ImageDraw.Draw(page)
    for i, (label, (thing, (color, ground)), picture) in enumerate(zip(labels, answers, pictures, strict=True)):
        x, y = i % _COLUMNS * _CELL, i // _COLUMNS * (_CELL + _LABEL)
        page.paste(picture, (x, y))
        pen.text((x + 2, y + _CELL), f"{label[1]} {label[0]} / {label[2]}", "black")
        is_right = (thing, color, ground) == label
        pen.text((x + 2, y + _CELL + 13), f"{color} {thing} / {ground}", "green" if is_right else "red")
    return page


if __name__ == "__main__":
    main()

"""`lorasmith judge`: which of several LoRAs, and at which strength.

    lorasmith judge my-lora --base v1-5.safetensors --pictures photos --prompts "a photo of sks dog in a park" \\
        --judge openai/clip-vit-large-patch14 --strengths 0.7 1

Draws fixed prompts with each LoRA at each strength, and unrelated ones, and has an embedding model score them. All is
checked before a model is loaded.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any
from urllib.parse import quote

from PIL import Image

from lorasmith import picture_judges, picture_scores, prompt_syntax, prompts
from lorasmith.checkpoint import atomic_file
from lorasmith.command_line import harmless
from lorasmith.config import JudgeConfig
from lorasmith.data.images import open_image, probe_readable, thumbnail_url
from lorasmith.data.labelling import find_pictures
from lorasmith.demo import COLORS, MASCOT, THINGS
from lorasmith.errors import UserError
from lorasmith.judge_page import Row, Shown, judge_page, score_table
from lorasmith.judging import Bench, Candidate, Seen, at_most, recommend
from lorasmith.merging import Strength
from lorasmith.models.base import ModelFacts
from lorasmith.picture_files import PictureFolder, parameters
from lorasmith.picture_judges import Choice
from lorasmith.picture_run.drawing import drawn, load, open_base, telling_of_memory
from lorasmith.picture_run.facts import facts_of, facts_of_all, fields_of, shown_prompt
from lorasmith.picture_run.loras import Loras
from lorasmith.picture_run.pictures import Picture
from lorasmith.progress import counted
from lorasmith.prompt_syntax import LoraTag
from lorasmith.prompts import Prompt
from lorasmith.sampling import Drawing, check_settings

_LORA_SUFFIXES = (".safetensors", ".pt", ".ckpt")
_UNRELATED = [
    "a photo of a mountain lake at sunrise",
    "a bowl of fruit on a wooden table",
    "a portrait photo of an old woman",
    "a city street at night in the rain",
    "a red sports car",
    "a pencil drawing of a castle",
    "an oil painting of sailing ships",
    "an astronaut riding a horse",
]
_UNRELATED_OF_DEMO = [
    f"a {color} {thing} on a {ground} background"
    for thing, color, ground in zip(THINGS[:8], list(COLORS)[:8], list(COLORS)[2:], strict=True)
]
_NUM_NEAREST = 4


@dataclass(frozen=True)
class Tried:
    """What is drawn with and judged: a LoRA at a strength, or the base model alone, which has none."""

    lora: Path | None = None
    strength: float = 0.0

    @property
    def name(self) -> str:
        return "base model" if self.lora is None else f"{self.lora.stem} at {self.strength:g}"

    @property
    def tags(self) -> tuple[LoraTag, ...]:
        return () if self.lora is None else (LoraTag(self.lora.stem, self.strength, self.strength),)


@dataclass(frozen=True)
class Judged:
    """What was drawn with one of them, and what was seen in it; the files are in the pictures' order."""

    tried: Tried
    pictures: list[Picture]
    files: list[Path]
    seen: Seen
    unrelated: Seen

    @property
    def num_own(self) -> int:
        """How many of the pictures are of the prompts; the others are of unrelated ones."""
        return len(self.seen.prompts)


def run(cfg: JudgeConfig) -> int:
    """Draw, judge, and say which is best; return the exit code, 0."""
    _check_given(cfg)
    files, training = _lora_files(cfg.lora), _training_pictures(cfg)
    own, unrelated = _texts("--prompts", cfg.prompts), _texts("--unrelated-prompts", cfg.unrelated_prompts)
    choice = picture_judges.find(cfg.judge or "", "--judge")
    if choice.kind == picture_judges.DEMO:
        _check_known(own)
    unrelated = unrelated or _texts("", _UNRELATED_OF_DEMO if choice.kind == picture_judges.DEMO else _UNRELATED)
    if len({prompt.text for prompt in unrelated}) < 2:
        raise UserError("--unrelated-prompts: what one prompt alone gives tells little; give two or more.")
    with open_base(cfg) as base:
        loras = Loras(base.checkpoint, [(path, Strength(0, 0)) for path in files], None)
        drawings = _drawings(cfg, base.facts, own, cfg.images)
        rest = _drawings(cfg, base.facts, unrelated, 1)
        tried = [Tried(), *(Tried(path, strength) for path in files for strength in cfg.strengths)]
        pictures = [Picture(**vars(one), loras=each.tags) for each in tried for one in (*drawings, *rest)]
        notes = [f"{len(training)} training pictures of {cfg.pictures}, seen by {choice.title}"]
        for line in [*base.told(cfg.base), *loras.told(), *notes]:
            print(harmless(line), flush=True)
        common = facts_of_all(cfg, base.checkpoint)
        with telling_of_memory(cfg, base, pictures, f"The pictures that were drawn are in {cfg.output}."):
            bench = Bench(picture_judges.load(choice, base.device), map(open_image, training))
            for line in (unscored := _not_scored(choice, bench, drawings)):
                print(harmless(line), flush=True)
            shown = counted(
                drawn(cfg, load(cfg, base), pictures, loras), len(pictures), "drawing", is_shown=cfg.progress
            )
            found = iter(shown)
            judged = [
                _judged(cfg, bench, each, list(islice(found, len(drawings) + len(rest))), len(drawings), common, loras)
                for each in tried
            ]
    _tell(cfg, bench, judged, training, [*notes, *unscored])
    return 0


# --- what is given ----------------------------------------------------------------------------------------------------


def _check_given(cfg: JudgeConfig) -> None:
    missing = {
        "LORA, the LoRA files, or the output folder of a run": not cfg.lora,
        "--pictures, the folder of training pictures": cfg.pictures is None,
        '--prompts, what to draw, such as "a photo of sks dog in a park", or a file of prompts': not cfg.prompts,
        "--judge, what compares pictures: the folder or the hub id of a CLIP or DINO, such as "
        "openai/clip-vit-large-patch14 or facebook/dinov2-base": cfg.judge is None,
    }
    for what, is_missing in missing.items():
        if is_missing:
            raise UserError(f"missing: {what}.")
    if cfg.output.exists() and not (cfg.output.is_dir() and not any(cfg.output.iterdir())):
        raise UserError(f"--output {cfg.output} is there already, and nothing is overwritten; give another folder.")


def _lora_files(given: Sequence[Path]) -> list[Path]:
    """Return the LoRAs: files as such, and all that lie in folders, not in the folders in these."""
    found: dict[Path, None] = {}
    for path in given:
        if not path.exists():
            raise UserError(f"{path}: there is no such file or folder; check the path.")
        lying = sorted(one for one in path.iterdir() if one.suffix in _LORA_SUFFIXES) if path.is_dir() else [path]
        if not lying:
            raise UserError(
                f"{path}: no LoRA files lie in this folder; give a run's output folder, or the files themselves."
            )
        found.update(dict.fromkeys(lying))
    return list(found)


def _training_pictures(cfg: JudgeConfig) -> list[Path]:
    """Return the training pictures to look at.

    Raises:
        UserError: there are none, or one cannot be read.
    """
    assert cfg.pictures is not None
    found, _ = find_pictures(cfg.pictures, recursive=True)
    found = list(at_most(found))
    _, unreadable = probe_readable(found)
    if unreadable:
        raise unreadable[0]
    return found


def _texts(flag: str, given: Sequence[str]) -> list[Prompt]:
    """Return prompts, given as such or as a file, which are the same whatever is drawn with.

    Raises:
        UserError: one cannot be read, names a LoRA or has variants.
    """
    found = (
        prompts.read_file(Path(given[0]).expanduser()) if prompts.is_file(given) else [prompts.parse(t) for t in given]
    )
    for prompt in found:
        if prompt_syntax.take_loras(prompt.text)[1] or len(prompt_syntax.variants(prompt.text)) > 1:
            raise UserError(
                f"{flag} {prompt.text}: all are judged by the same prompts, so none can name LoRAs or have variants; "
                "leave <lora:...> and {...|...} out."
            )
    return found


def _check_known(own: Sequence[Prompt]) -> None:
    """Refuse prompts of which the embedded model's judge knows nothing."""
    for prompt in own:
        if not {*THINGS, MASCOT} & set(prompt.text.lower().replace(",", " ").split()):
            raise UserError(
                f"--judge demo knows the things of the demo only, and {prompt.text!r} names none of them: "
                f"{', '.join((MASCOT, *THINGS))}; give another judge, or other prompts."
            )


def _drawings(cfg: JudgeConfig, facts: ModelFacts, given: Sequence[Prompt], count: int) -> list[Drawing]:
    """Return so many drawings of each prompt; one's seeds count up, and so does the first of single ones."""
    usual = Drawing("", cfg.negative, cfg.size or facts.resolution, cfg.seed, cfg.steps, cfg.guidance, cfg.sampler)
    asked = [replace(usual, seed=cfg.seed + (number if count == 1 else 0)).asked(p) for number, p in enumerate(given)]
    found = [replace(one, seed=one.seed + number) for one in asked for number in range(count)]
    for one in dict.fromkeys(found):
        check_settings(facts, one.size, one.steps, one.sampler, cfg.sigmas)
    return found


def _not_scored(choice: Choice, bench: Bench, drawings: Sequence[Drawing]) -> list[str]:
    """Say which scores there will not be, and why."""
    reasons = {
        f"adherence is not scored: {choice.name} sees pictures alone": not choice.reads_text,
        "diversity is not scored: that takes several --images of a prompt": len({one.prompt for one in drawings})
        == len(drawings),
        "copying is not scored: that takes two different training pictures": bench.spacing is None,
    }
    return [reason for reason, is_so in reasons.items() if is_so]


# --- drawing and looking ----------------------------------------------------------------------------------------------


def _judged(
    cfg: JudgeConfig,
    bench: Bench,
    tried: Tried,
    found: Sequence[tuple[Picture, Image.Image]],
    num_own: int,
    common: Mapping[str, str],
    loras: Loras,
) -> Judged:
    """Write one's pictures into a folder of its own, and look at them."""
    folder = PictureFolder(cfg.output / tried.name.replace(" ", "-"), "{number}-{seed}", "png")
    files = []
    for one, picture in found:
        text = parameters(shown_prompt(one), one.negative, {**facts_of(cfg, one, loras), **common})
        files.append(folder.add(picture, text, fields_of(cfg, one)))
    seen = [
        bench.look([picture for _, picture in part], [one.prompt for one, _ in part])
        for part in (found[:num_own], found[num_own:])
    ]
    return Judged(tried, [one for one, _ in found], files, *seen)


# --- what is told -----------------------------------------------------------------------------------------------------


def _tell(
    cfg: JudgeConfig, bench: Bench, judged: Sequence[Judged], training: Sequence[Path], notes: Sequence[str]
) -> None:
    """Print scores and recommendation, and write the page and the JSON."""
    base, *others = judged
    reference = bench.reference(base.seen, base.unrelated)
    candidates = [Candidate(one.tried.name, bench.scores(one.seen, (one.unrelated, base.unrelated))) for one in others]
    best, verdict = recommend(candidates, reference)
    facts = [_facts(cfg, bench, one, base, training) for one in judged]
    rows = [_row(cfg, own, candidate) for own, candidate in zip(facts, [None, *candidates], strict=True)]
    columns = [f"{one.prompt} (seed {one.seed})" for one in base.pictures]
    page = judge_page(verdict, best, reference, notes, columns[: base.num_own], columns[base.num_own :], rows)
    told = {
        "recommended": best and best.name,
        "verdict": verdict,
        "base": cfg.base,
        "judge": cfg.judge,
        "notes": list(notes),
        "reference": asdict(reference),
        "base_pictures": facts[0],
        "candidates": [
            {
                "name": one.name,
                "lora": str(each.tried.lora),
                "strength": each.tried.strength,
                "scores": asdict(one.scores),
                "shares": picture_scores.shares(one.scores, reference),
                "overall": picture_scores.overall(one.scores, reference),
                **own,
            }
            for one, each, own in zip(candidates, others, facts[1:], strict=True)
        ],
    }
    _write(cfg.output / "index.html", page)
    _write(cfg.output / "judge.json", json.dumps(told, indent=1, ensure_ascii=False) + "\n")
    print("\n".join(["", *map(harmless, score_table(candidates, best, reference)), "", harmless(verdict), ""]))
    print(f"with the pictures: {cfg.output / 'index.html'}; all numbers: {cfg.output / 'judge.json'}", flush=True)


def _write(path: Path, text: str) -> None:
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _facts(
    cfg: JudgeConfig, bench: Bench, one: Judged, base: Judged, training: Sequence[Path]
) -> dict[str, list[dict[str, Any]]]:
    """Return what is known of each picture; `distance` is to the nearest training picture, 1 as these lie apart."""
    seen, spacing = one.seen, bench.spacing
    adherence = [None] * one.num_own if seen.adherence is None else seen.adherence.tolist()
    drawn = [
        {"file": file.relative_to(cfg.output).as_posix(), "prompt": picture.prompt, "seed": picture.seed}
        for picture, file in zip(one.pictures, one.files, strict=True)
    ]
    own = zip(seen.likeness.tolist(), adherence, seen.nearest.tolist(), seen.distances.tolist(), strict=True)
    return {
        "pictures": [
            {
                **picture,
                "likeness": likeness,
                "adherence": adherence,
                "nearest": str(training[nearest]),
                "distance": None if spacing is None else distance / spacing,
            }
            for picture, (likeness, adherence, nearest, distance) in zip(drawn[: one.num_own], own, strict=True)
        ],
        "unrelated": [
            {**picture, "damage": damage}
            for picture, damage in zip(
                drawn[one.num_own :],
                picture_scores.damage(one.unrelated.features, base.unrelated.features).tolist(),
                strict=True,
            )
        ],
    }


def _row(cfg: JudgeConfig, facts: Mapping[str, Sequence[dict[str, Any]]], candidate: Candidate | None) -> Row:
    """Return a row of the page."""
    urls = {one["file"]: thumbnail_url(cfg.output / one["file"]) for part in facts.values() for one in part}

    def shown(one: Mapping[str, Any], note: str, *, is_alert: bool = False) -> Shown:
        return Shown(urls[one["file"]], quote(one["file"]), note, is_alert)

    own = facts["pictures"]
    known = sorted((one for one in own if one["distance"] is not None), key=lambda one: one["distance"])
    return Row(
        candidate,
        [shown(one, f"likeness {one['likeness']:.2f}") for one in own],
        [shown(one, f"moved {one['damage']:.3f}" if candidate else "") for one in facts["unrelated"]],
        [
            (
                shown(one, f"distance {one['distance']:.2f}", is_alert=one["distance"] < picture_scores.COPY),
                Shown(thumbnail_url(Path(one["nearest"])), "", Path(one["nearest"]).name),
            )
            for one in known[:_NUM_NEAREST]
        ],
    )

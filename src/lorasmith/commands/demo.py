"""`lorasmith demo`: train a LoRA on the embedded model and show what it learned, without any file of one's own.

    lorasmith demo

The base model has never seen a robot. Sixteen pictures of one, and the regularization pictures that the base draws
itself first, go into the same `lorasmith train` that anyone types; before and after are drawn and judged by a program.
"""

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

from lorasmith import model_families
from lorasmith.checkpoint import open_checkpoint
from lorasmith.command_line import quoted
from lorasmith.config import DemoConfig
from lorasmith.demo import COLORS, FOLDER, THINGS
from lorasmith.demo.judge import Judge, colors
from lorasmith.errors import UserError
from lorasmith.formats import kohya
from lorasmith.interrupt import StopRequest
from lorasmith.models.base import LatentDiffusion
from lorasmith.network import Network
from lorasmith.sampling import generate
from lorasmith.sheets import sheet

BASE = FOLDER / "sd1-mini.safetensors"
PICTURES = FOLDER / "pictures"
# The mascot's pictures have other backgrounds: it must be drawn where it was never shown.
MASCOT_PROMPTS = [f"a sks robot on a {ground} background" for ground in ("brown", "black", "pink") * 4]
_CONTINUED = "`" if os.name == "nt" else "\\"  # ends a line that goes on, in PowerShell and in other shells
_GUIDANCE, _BATCH = 2.0, 16
_SCORED, _REGULARIZATION = range(16), range(1000, 1096)
_SHOWN_THINGS = ("car", "boat", "mushroom")
_TRAINING_OPTIONS = [
    *("--rank", "8", "--batch-size", "8", "--unet-lr", "5e-3", "--text-encoder-lr", "1.2e-3"),
    *("--lr-schedule", "cosine"),
]


@dataclass(frozen=True)
class Wish:
    """A prompt whose answer a program can check."""

    thing: str
    color: str
    ground: str

    @property
    def prompt(self) -> str:
        return f"a {self.color} {self.thing} on a {self.ground} background"


@dataclass(frozen=True)
class Score:
    """What the judge says of one set of pictures; shares from 0 to 1."""

    mascot: float
    thing: float
    color: float
    ground: float


def run(cfg: DemoConfig) -> int:
    """Draw, train, draw again, and say what changed; return the exit code."""
    folder = free_folder(cfg.output)
    if folder != cfg.output:
        print(f"{cfg.output} holds something already; this demo goes into {folder}")
    others = wishes(_SCORED)
    prompts = [*MASCOT_PROMPTS, *(wish.prompt for wish in others)]

    print(f"1/4  The base model draws {len(prompts)} pictures; it does not know what a robot is.", flush=True)
    model = load_base()
    before = draw(model, prompts, cfg.seed, "before")
    print(
        f"2/4  The base model draws {len(_REGULARIZATION)} regularization pictures, which keep what it knows.",
        flush=True,
    )
    write_regularization(model, folder / "regularization", cfg.seed)
    print(f"3/4  A LoRA learns the robot from {len(list(PICTURES.glob('*/*.png')))} pictures:", flush=True)
    command = train_command(folder, cfg)
    print("\n  lorasmith " + _in_lines(command) + "\n", flush=True)
    if code := run_training(command):
        return code
    print("\n4/4  The same prompts with the LoRA.", flush=True)
    lora = folder / "lora" / "last.safetensors"
    attach(model, lora)
    after = draw(model, prompts, cfg.seed, "after")
    picture = folder / "before-after.png"
    before_after(prompts, before, after).save(picture)
    print(_verdict(judged(before, others), judged(after, others)))
    print(_directions(folder, lora, picture))
    return 0


def free_folder(wanted: Path) -> Path:
    """Return `wanted`, or `wanted-2`, `wanted-3`... where it holds something already."""
    if wanted.exists() and not wanted.is_dir():
        raise UserError(f"--output {wanted} is a file; give a folder, which may not exist yet.")
    names = [wanted, *(wanted.with_name(f"{wanted.name}-{number}") for number in range(2, 1000))]
    return next(path for path in names if not path.exists() or (path.is_dir() and not any(path.iterdir())))


def wishes(numbers: range) -> list[Wish]:
    """Return the wishes of these numbers, below 1440; they go round the things, and no two are alike."""
    pairs = list(permutations(COLORS, 2))
    return [
        Wish(THINGS[i % len(THINGS)], *pairs[(37 * (i // len(THINGS)) + 11 * (i % len(THINGS))) % len(pairs)])
        for i in numbers
    ]


def load_base() -> LatentDiffusion:
    """Return the embedded model."""
    with open_checkpoint(BASE) as checkpoint:
        return model_families.load(checkpoint, dtype=torch.float32, device=torch.device("cpu"))


def attach(model: LatentDiffusion, lora: Path) -> None:
    """Put a LoRA file on the model."""
    Network.load(model.adapter_targets(), kohya.read(lora).tensors).attach()


def draw(
    model: LatentDiffusion, prompts: Sequence[str], seed: int, title: str, *, steps: int = 20
) -> list[Image.Image]:
    """Draw each prompt from a seed of its own, the same for the same place in the list."""
    shown = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}"
    with tqdm(total=100, desc=f"     {title}", bar_format=shown, disable=None) as bar:

        def show(done: int, total: int) -> None:
            bar.update(100 * done / total - bar.n)

        return generate(
            model,
            prompts,
            seeds=[seed + i for i in range(len(prompts))],
            size=(128, 128),
            steps=steps,
            guidance=_GUIDANCE,
            batch_size=_BATCH,
            progress=show,
        )


def write_regularization(model: LatentDiffusion, folder: Path, seed: int) -> None:
    """Have the base model draw what it knows, each picture with its prompt as the caption (prior preservation)."""
    own = folder / "1_thing"
    own.mkdir(parents=True)
    known = [wish.prompt for wish in wishes(_REGULARIZATION)]
    for i, (prompt, picture) in enumerate(
        zip(known, draw(model, known, seed + 1000, "regularization", steps=12), strict=True)
    ):
        picture.save(own / f"{i:02d}.png")
        (own / f"{i:02d}.txt").write_text(prompt + "\n", encoding="utf-8")


def train_command(folder: Path, cfg: DemoConfig) -> list[str]:
    """Return what one would type after `lorasmith`."""
    return [
        "train", "--base", str(BASE), "--images", str(PICTURES),
        "--regularization", str(folder / "regularization"), "--output", str(folder / "lora"),
        "--steps", str(cfg.steps), "--lr-warmup-steps", str(min(20, cfg.steps // 5)), *_TRAINING_OPTIONS,
        "--seed", str(cfg.seed), "--guidance", str(_GUIDANCE),
    ]  # fmt: skip


def _in_lines(command: Sequence[str]) -> str:
    """Return a command as it can be pasted, with a line for each option that names a place."""
    words = [quoted(word) for word in command]
    joined = " ".join(words)
    for flag in ("--images", "--regularization", "--output", "--steps"):
        joined = joined.replace(f" {flag} ", f" {_CONTINUED}\n    {flag} ", 1)
    return joined


def run_training(command: list[str]) -> int:
    """Run the training in a process of its own; a request to stop is passed on once, and it saves before it ends."""
    program = [sys.executable, "-m", "lorasmith", *command]
    # In a session of its own it does not hear the terminal's Ctrl+C as well: a second signal would end it at once.
    with StopRequest() as stop, subprocess.Popen(program, start_new_session=True) as process:
        while True:
            try:
                return process.wait(timeout=0.5)
            except subprocess.TimeoutExpired:
                if stop.signal_number is not None:
                    if os.name != "nt":  # where the console has told both
                        process.send_signal(stop.signal_number)
                    return process.wait()


def judged(pictures: Sequence[Image.Image], others: Sequence[Wish]) -> Score:
    """Score pictures of `MASCOT_PROMPTS` followed by those of `others`."""
    judge = Judge.load()
    own, rest = pictures[: len(MASCOT_PROMPTS)], pictures[len(MASCOT_PROMPTS) :]
    seen = list(zip(others, judge.things(rest), map(colors, rest), strict=True))
    return Score(
        judge.mascot_score(own),
        _share([thing == wish.thing for wish, thing, _ in seen]),
        _share([color == wish.color for wish, _, (color, _) in seen]),
        _share([ground == wish.ground for wish, _, (_, ground) in seen]),
    )


def _share(answers: Sequence[bool]) -> float:
    return sum(answers) / len(answers)


def before_after(prompts: Sequence[str], before: Sequence[Image.Image], after: Sequence[Image.Image]) -> Image.Image:
    """Return a page: some of the robot's pictures, then three backgrounds for it and three things that should stay."""
    shown = [0, 1, 2, *(len(MASCOT_PROMPTS) + THINGS.index(thing) for thing in _SHOWN_THINGS)]
    learned_from = [Image.open(path).convert("RGB") for path in sorted(PICTURES.glob("*/*.png"))[: len(shown)]]
    rows = [("before", [before[i] for i in shown]), ("with the LoRA", [after[i] for i in shown])]
    upper = sheet([""] * len(shown), [(f"{len(shown)} of the pictures it learns from", learned_from)])
    lower = sheet([prompts[i] for i in shown], rows)
    page = Image.new("RGB", (lower.width, upper.height + lower.height))
    page.paste(upper, (0, 0))
    page.paste(lower, (0, upper.height))
    return page


def _verdict(before: Score, after: Score) -> str:
    rows = [
        ("recognised as the robot", before.mascot, after.mascot),
        ("other prompts: the thing is right", before.thing, after.thing),
        ("other prompts: its colour is right", before.color, after.color),
        ("other prompts: the background is right", before.ground, after.ground),
    ]
    lines = [f"  {title:<42}{old:>7.0%}{new:>9.0%}" for title, old, new in rows]
    return "\n".join(["", f"  {'judged by a program':<42}{'before':>7}{'after':>9}", *lines])


def _directions(folder: Path, lora: Path, picture: Path) -> str:
    return f"""
before and after    {picture}
the LoRA            {lora}
report              {folder / "lora" / "report" / "index.html"}
its pictures        {PICTURES}

With your own pictures and checkpoint (an SD 1.x or 2.x .safetensors, .ckpt or diffusers folder):
  lorasmith train --base model.safetensors --images photos --caption "a photo of sks dog" --output my-lora"""

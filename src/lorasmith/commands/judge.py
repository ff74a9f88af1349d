"""`lorasmith judge`: which of several LoRAs, and at which strength.

    lorasmith judge my-lora --base v1-5.safetensors --pictures photos --prompts "a photo of sks dog in a park" \\
        --judge openai/clip-vit-large-patch14 --strengths 0.7 1

Draws fixed prompts with each LoRA at each strength, and unrelated ones, and has an embedding model score them. All is
checked before a model is loaded.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

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
from lorasmith.picture_judges import Choice
from lorasmith.picture_run.checkpoints import lora_files
from lorasmith.picture_run.comparing import Comparison, file_name, plain_number
from lorasmith.picture_run.comparison_folder import PAGE
from lorasmith.picture_run.drawing import open_base
from lorasmith.picture_run.loras import Loras
from lorasmith.picture_run.pictures import Picture, check_pictures
from lorasmith.prompt_syntax import LoraTag
from lorasmith.prompts import Prompt
from lorasmith.sampling import Drawing

_SCORES = "judge.json"
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
    """What is drawn with and judged: a LoRA, by its place among them, at a strength; or the base model alone."""

    place: int = 0
    lora: Path | None = None
    strength: float = 0.0

    @property
    def name(self) -> str:
        return "base model" if self.lora is None else f"{self.lora.stem} at {plain_number(self.strength)}"

    @property
    def tags(self) -> tuple[LoraTag, ...]:
        return () if self.lora is None else (LoraTag(self.lora.stem, self.strength, self.strength),)

    def file(self, prompt: int, seed: int) -> str:
        """Return the name of the file of its picture of a prompt, which count from 1."""
        if self.lora is None:
            return file_name(prompt, seed)
        return file_name(prompt, seed, self.place, self.lora.stem, self.strength)


@dataclass(frozen=True)
class Judged:
    """What was drawn with one of them, and what was seen in it; the files are in the pictures' order."""

    tried: Tried
    pictures: Sequence[Picture]
    files: Sequence[Path]
    seen: Seen
    unrelated: Seen

    @property
    def num_own(self) -> int:
        """How many of the pictures are of the prompts; the others are of unrelated ones."""
        return len(self.seen.prompts)


def run(cfg: JudgeConfig) -> int:
    """Draw, judge, and say which is best; return the exit code, 0."""
    _check_given(cfg)
    (files, left_out), training = lora_files(cfg.lora), _training_pictures(cfg)
    own, unrelated = _texts("--prompts", cfg.prompts), _texts("--unrelated-prompts", cfg.unrelated_prompts)
    choice = picture_judges.find(cfg.judge or "", "--judge")
    if choice.kind == picture_judges.DEMO:
        _check_known(own)
    unrelated = unrelated or _texts("", _UNRELATED_OF_DEMO if choice.kind == picture_judges.DEMO else _UNRELATED)
    if len({prompt.text for prompt in unrelated}) < 2:
        raise UserError("--unrelated-prompts: what one prompt alone gives tells little; give two or more.")
    with open_base(cfg) as base:
        loras = Loras(base.checkpoint, [(path, Strength(0, 0)) for path in files], None)
        drawings, rest = _drawings(cfg, base.facts, own, unrelated)
        tried = [Tried(), *(Tried(i, path, strength) for i, path in enumerate(files, 1) for strength in cfg.strengths)]
        pictures = {each: [Picture(**vars(one), loras=each.tags) for one in (*drawings, *rest)] for each in tried}
        check_pictures([one for found in pictures.values() for one in found], base.facts, cfg.sigmas)
        comparison = Comparison(cfg, base, loras, _files(pictures, len(own), cfg.images))
        notes = [f"{len(training)} training pictures of {cfg.pictures}, seen by {choice.title}"]
        for line in [*base.told(cfg.base), *loras.told(), *left_out, *notes, *comparison.told()]:
            print(harmless(line), flush=True)
        with comparison.kept():
            bench = Bench(picture_judges.load(choice, base.device), map(open_image, training))
            for line in (unscored := _not_scored(choice, bench, drawings)):
                print(harmless(line), flush=True)
            comparison.draw()
            judged = [_judged(bench, comparison, each, found, len(drawings)) for each, found in pictures.items()]
            _tell(cfg, comparison.folder.path, bench, judged, training, [*notes, *unscored])
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
    is_file = prompts.is_file(given)
    found = prompts.read_file(Path(given[0]).expanduser(), flag) if is_file else [prompts.parse(text) for text in given]
    return [
        replace(one, text=_plain(flag, one.text), negative=one.negative and _plain(flag, one.negative)) for one in found
    ]


def _plain(flag: str, text: str) -> str:
    """Return a text without the signs of variants, of which there is to be one.

    Raises:
        UserError: there are more, or it names a LoRA.
    """
    if prompt_syntax.take_loras(text)[1] or len(found := prompt_syntax.variants(text)) > 1:
        raise UserError(
            f"{flag} {text}: all are judged by the same prompts, so none can name LoRAs or have variants; "
            "leave <lora:...> and {...|...} out."
        )
    return found[0]


def _check_known(own: Sequence[Prompt]) -> None:
    """Refuse prompts of which the embedded model's judge knows nothing."""
    for prompt in own:
        if not {*THINGS, MASCOT} & set(prompt.text.lower().replace(",", " ").split()):
            raise UserError(
                f"--judge demo knows the things of the demo only, and {prompt.text!r} names none of them: "
                f"{', '.join((MASCOT, *THINGS))}; give another judge, or other prompts."
            )


def _drawings(
    cfg: JudgeConfig, facts: ModelFacts, own: Sequence[Prompt], unrelated: Sequence[Prompt]
) -> tuple[list[Drawing], list[Drawing]]:
    """Return the pictures of each prompt, whose seeds count up, and one of each unrelated prompt, from one to the next.

    Raises:
        UserError: one would be drawn twice.
    """
    negative = _plain("--negative", cfg.negative)
    usual = Drawing("", negative, cfg.size or facts.resolution, cfg.seed, cfg.steps, cfg.guidance, cfg.sampler)
    asked = [usual.asked(prompt) for prompt in own]
    found = [replace(one, seed=one.seed + number) for one in asked for number in range(cfg.images)]
    if twice := [one for number, one in enumerate(found) if one in found[:number]]:
        raise UserError(
            f"--prompts: {twice[0].prompt!r} is drawn twice from seed {twice[0].seed}; leave it out once, or give it "
            "other seeds (--d)."
        )
    rest = [replace(usual, seed=cfg.seed + number).asked(prompt) for number, prompt in enumerate(unrelated)]
    return found, rest


def _files(pictures: Mapping[Tried, Sequence[Picture]], num_own: int, images: int) -> dict[Picture, str]:
    """Return the names of all pictures' files: `images` of each of the first prompts, and one of the others."""
    files: dict[Picture, str] = {}
    for tried, found in pictures.items():
        for place, one in enumerate(found):
            prompt = place // images if place < num_own * images else place - num_own * (images - 1)
            files.setdefault(one, tried.file(prompt + 1, one.seed))
    return files


def _not_scored(choice: Choice, bench: Bench, drawings: Sequence[Drawing]) -> list[str]:
    """Say which scores there will not be, and why."""
    reasons = {
        f"adherence is not scored: {choice.name} sees pictures alone": not choice.reads_text,
        "diversity is not scored: that takes several --images of a prompt": len({one.prompt for one in drawings})
        == len(drawings),
        "copying is not scored: that takes two different training pictures": bench.spacing is None,
    }
    return [reason for reason, is_so in reasons.items() if is_so]


# --- what is seen -----------------------------------------------------------------------------------------------------


def _judged(bench: Bench, comparison: Comparison, tried: Tried, pictures: Sequence[Picture], num_own: int) -> Judged:
    """Look at one's pictures; those of its prompts come first."""
    drawn = [comparison.read(one) for one in pictures]
    seen = [
        bench.look(drawn[part], [one.prompt for one in pictures[part]])
        for part in (slice(num_own), slice(num_own, None))
    ]
    return Judged(tried, pictures, [comparison.file(one) for one in pictures], *seen)


# --- what is told -----------------------------------------------------------------------------------------------------


def _tell(
    cfg: JudgeConfig,
    folder: Path,
    bench: Bench,
    judged: Sequence[Judged],
    training: Sequence[Path],
    notes: Sequence[str],
) -> None:
    """Print scores and recommendation, and write the page and the JSON."""
    base, *others = judged
    reference = bench.reference(base.seen, base.unrelated)
    candidates = [Candidate(one.tried.name, bench.scores(one.seen, (one.unrelated, base.unrelated))) for one in others]
    best, verdict = recommend(candidates, reference)
    facts = [_facts(folder, bench, one, base, training) for one in judged]
    rows = [_row(folder, own, candidate) for own, candidate in zip(facts, [None, *candidates], strict=True)]
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
    _write(folder / _SCORES, json.dumps(told, indent=1, ensure_ascii=False) + "\n")
    _write(folder / PAGE, page)
    print("\n".join(["", *map(harmless, score_table(candidates, best, reference)), "", harmless(verdict), ""]))
    print(harmless(f"with the pictures: {folder / PAGE}; all numbers: {folder / _SCORES}"), flush=True)


def _write(path: Path, text: str) -> None:
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _facts(
    folder: Path, bench: Bench, one: Judged, base: Judged, training: Sequence[Path]
) -> dict[str, list[dict[str, Any]]]:
    """Return what is known of each picture; `distance` is to the nearest training picture, 1 as these lie apart."""
    seen, spacing = one.seen, bench.spacing
    adherence = [None] * one.num_own if seen.adherence is None else seen.adherence.tolist()
    drawn = [
        {"file": file.relative_to(folder).as_posix(), "prompt": picture.prompt, "seed": picture.seed}
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


def _row(folder: Path, facts: Mapping[str, Sequence[dict[str, Any]]], candidate: Candidate | None) -> Row:
    """Return a row of the page."""
    urls = {one["file"]: thumbnail_url(folder / one["file"]) for part in facts.values() for one in part}

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

"""`lorasmith grid`: LoRAs, strengths, prompts and seeds side by side, and the base model beside them.

    lorasmith grid my-lora --base v1-5.safetensors --prompt "a photo of sks dog" "sks dog in the snow" \\
        --seeds 1 2 --strengths 0.6 1

All is checked before the model is loaded. Each picture is written when it is drawn, and the same command goes on with
those that are there.
"""

import hashlib
import json
import random
import re
import sys
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from lorasmith import grid_sheet, grids, prompt_syntax, prompts
from lorasmith.checkpoint import atomic_file
from lorasmith.command_line import harmless
from lorasmith.config import DrawConfig, GridConfig
from lorasmith.errors import UserError
from lorasmith.grid_page import Shown, grid_page
from lorasmith.grids import Cell, Label, Sheet
from lorasmith.merging import Strength
from lorasmith.models.base import ModelFacts
from lorasmith.picture_files import parameters
from lorasmith.picture_run.checkpoints import lora_files
from lorasmith.picture_run.drawing import Base, drawn, load, open_base, telling_of_memory
from lorasmith.picture_run.facts import facts_of, facts_of_all, model_name, shown_prompt
from lorasmith.picture_run.grid_folder import CELLS, PAGE, GridFolder
from lorasmith.picture_run.loras import Loras
from lorasmith.picture_run.pictures import Picture
from lorasmith.progress import counted
from lorasmith.prompt_syntax import LoraTag
from lorasmith.prompts import Prompt
from lorasmith.sampling import Drawing, check_settings
from lorasmith.seeds import derive

_EXAMPLE = 'For example: lorasmith grid robot.safetensors --prompt "a robot" --base v1-5.safetensors'
_LARGEST_SEED = 2**63 - 1
_NO_WORDS = "(no words)"
_NO_FILE_NAME_SIGNS = re.compile(r'[/\\:*?"<>|\x00-\x1f]+')
_LONGEST_NAME = 120  # bytes of a LoRA's name in the name of a picture
# Of what commands draw with: what changes no picture, or is asked of the base as it was opened.
_NO_CHANGE = {"progress", "batch_size", "attention", "on_out_of_memory", "device", "precision"}


@dataclass(frozen=True)
class Wanted:
    """A picture of the grid. file: its name. words: what it is."""

    picture: Picture
    file: str
    words: str


def run(cfg: GridConfig) -> int:
    """Draw the grid and return the exit code, 0."""
    if not cfg.lora:
        raise UserError("missing: LORA, the LoRA files, or the output folder of a run. " + _EXAMPLE)
    given = _prompts(cfg)
    files, notes = lora_files(cfg.lora)
    with open_base(cfg) as base:
        loras = Loras(base.checkpoint, [(path, Strength(0, 0)) for path in files], cfg.lora_folder)
        wanted = _wanted(cfg, base.facts, given, files, loras)
        names = _names(cfg, given, files)
        sheets = _sheets(cfg, names)
        pictures = {one.picture: one for one in wanted.values()}
        texts = {
            one.file: text for one, text in zip(pictures.values(), _texts(cfg, base, loras, pictures), strict=True)
        }
        folder = GridFolder(cfg.output, _marks(cfg, base, pictures.values(), texts))
        rest = [one for one, place in pictures.items() if place.file not in folder.drawn]
        lines = [*base.told(cfg.base), *loras.told(), *notes, _sum(cfg, names, wanted)]
        if folder.path != cfg.output:
            lines.append(f"{cfg.output} holds something already; this grid goes into {folder.path}")
        if folder.drawn:
            lines.append(f"{len(folder.drawn)} of these were drawn before, and are taken from there")
        print("\n".join(map(harmless, lines)), flush=True)
        folder.take_over()
        with _keeping(folder, len(pictures)), telling_of_memory(cfg, base, rest, _written(folder)):
            if rest:
                found = drawn(cfg, load(cfg, base), rest, loras, is_folded=cfg.fold)
                found = _told_of_time(cfg, found, len(rest))
                for one, picture in counted(found, len(rest), "drawing", is_shown=cfg.progress):
                    folder.add(pictures[one].file, picture, texts[pictures[one].file])
            _write(cfg, folder, names, sheets, wanted)
    return 0


# --- what is given ----------------------------------------------------------------------------------------------------


def _prompts(cfg: GridConfig) -> list[Prompt]:
    if cfg.prompts is not None:
        if not prompts.is_file([str(cfg.prompts)]):
            raise UserError(f"--prompts {cfg.prompts}: expected a file that ends in .txt, .toml or .json.")
        found = prompts.read_file(cfg.prompts)
    elif cfg.prompt:
        found = [prompts.parse(line) for line in cfg.prompt]
    else:
        raise UserError("missing: --prompt, what to draw, or --prompts, a file of it. " + _EXAMPLE)
    for one in found:
        if len(cfg.seeds) > 1 and one.seeds:
            raise UserError(
                f"prompt {one.text!r}: --d {one.seeds[0]} and --seeds both say the seed; leave one of them out. "
                "With --images, seeds count up from that of each prompt."
            )
    return found


def _wanted(
    cfg: GridConfig, facts: ModelFacts, given: Sequence[Prompt], files: Sequence[Path], loras: Loras
) -> dict[Cell, Wanted]:
    """Return what stands in each cell, in the order in which it is drawn: LoRAs change as rarely as can be."""
    usual = Drawing("", cfg.negative, cfg.size or facts.resolution, cfg.seeds[0], cfg.steps, cfg.guidance, cfg.sampler)
    seeds = range(cfg.images) if len(cfg.seeds) == 1 else [seed - cfg.seeds[0] for seed in cfg.seeds]
    asked = [usual.asked(prompt) for prompt in given]
    if twice := [one.prompt for number, one in enumerate(asked) if one in asked[:number]]:
        raise UserError(f"prompt {twice[0]!r} is given twice; leave it out once.")
    own = {
        (number, place): _of_seed(one, one.seed + seed, {path.stem for path in files})
        for number, one in enumerate(asked)
        for place, seed in enumerate(seeds)
    }
    found: dict[Cell, Wanted] = {}
    made: dict[Picture, Wanted] = {}  # one alone of what is the same: prompts with variants can come to that

    def want(cell: Cell, name: str, words: str, tag: LoraTag | None = None) -> None:
        drawing, tags = own[cell.prompt, cell.seed]
        picture = Picture(**vars(drawing), loras=loras.used([*tags, *([tag] if tag else [])]))
        file = f"{cell.prompt + 1:02d}-{drawing.seed}-{name}.png"
        shown = f"{words}, {drawing.prompt or _NO_WORDS}, seed {drawing.seed}"
        found[cell] = made.setdefault(picture, Wanted(picture, file, shown))

    if cfg.show_base or 0 in cfg.strengths:
        for place in own:
            want(Cell(*place, None, None), "00-base", grids.BASE.text)
    for lora, path in enumerate(files):
        for level, strength in enumerate(cfg.strengths):
            name, shown = f"{lora + 1:02d}-{_short(path.stem)}-{_number(strength)}", f"strength {_number(strength)}"
            for place in own:
                if strength:
                    tag = LoraTag(path.stem, strength, strength)
                    want(Cell(*place, lora, level), name, f"{path.stem}, {shown}", tag)
                else:
                    found[Cell(*place, lora, level)] = found[Cell(*place, None, None)]
    for size, steps, sampler in dict.fromkeys((one.size, one.steps, one.sampler) for one in made):
        check_settings(facts, size, steps, sampler, cfg.sigmas)
    return found


def _of_seed(asked: Drawing, seed: int, names: Collection[str]) -> tuple[Drawing, list[LoraTag]]:
    """Return what is drawn of a prompt from a seed, as `lorasmith generate` draws it, and the LoRAs that it names.

    Raises:
        UserError: it names one of those that are compared, or the seed is too large.
    """
    if seed > _LARGEST_SEED:
        raise UserError(f"seed {seed} is too large; seeds go up to {_LARGEST_SEED}.")
    text = _chosen(asked.prompt, random.Random(derive(seed, "variants of a prompt")))
    negative = _chosen(asked.negative, random.Random(derive(seed, "variants of a negative prompt")))
    shown, tags = prompt_syntax.take_loras(text)
    if twice := [tag.name for tag in tags if tag.name in names]:
        raise UserError(f"prompt {asked.prompt!r} names {twice[0]}, which the grid puts on itself; leave it out there.")
    return replace(asked, prompt=shown, negative=negative, seed=seed), tags


def _chosen(text: str, draws: random.Random) -> str:
    found = prompt_syntax.chosen(text, draws)
    if len(found) > 1:
        raise UserError(f"prompt {text!r} stands for {len(found)} pictures; in a grid, give each as its own prompt.")
    return found[0]


def _texts(cfg: GridConfig, base: Base, loras: Loras, pictures: Iterable[Picture]) -> Iterator[str]:
    """Yield what each picture's file says of it."""
    common = facts_of_all(cfg, base.checkpoint)
    for one in pictures:
        yield parameters(shown_prompt(one), one.negative, {**facts_of(cfg, one, loras), **common})


def _marks(cfg: GridConfig, base: Base, wanted: Iterable[Wanted], texts: Mapping[str, str]) -> dict[str, str]:
    """Return a mark for each picture, by the name of its file: of all that it follows from."""
    settings = cfg.model_dump(mode="json", include=set(DrawConfig.model_fields) - _NO_CHANGE)
    places = [base.checkpoint.path, *([Path(cfg.vae)] if cfg.vae else []), *cfg.embeddings]
    common = [settings, cfg.fold, base.device.type, base.precision, [_stamp(path) for path in places]]
    return {
        one.file: hashlib.sha256(json.dumps([repr(one.picture), texts[one.file], common]).encode()).hexdigest()
        for one in wanted
    }


def _stamp(path: Path) -> list[tuple[str, int, int]]:
    """Return what tells whether a file, or one in a folder, is still the same: its name, size and time."""
    files = sorted(one for one in path.rglob("*") if one.is_file()) if path.is_dir() else [path]
    facts = [(one, one.stat()) for one in files if one.is_file()]
    return [(one.name, stat.st_size, stat.st_mtime_ns) for one, stat in facts]


# --- names ------------------------------------------------------------------------------------------------------------


def _names(cfg: GridConfig, given: Sequence[Prompt], files: Sequence[Path]) -> dict[str, list[Label]]:
    """Return the names of all axes' values."""
    has_own_seeds = any(prompt.seeds for prompt in given)
    seeds = cfg.seeds if len(cfg.seeds) > 1 else range(cfg.seeds[0], cfg.seeds[0] + cfg.images)
    differing = {name for name in vars(given[0]) if len({vars(prompt)[name] for prompt in given}) > 1} - {"text"}
    texts = {
        "seed": [f"picture {place}" if has_own_seeds else f"seed {seed}" for place, seed in enumerate(seeds, 1)],
        "strength": [f"strength {_number(strength)}" for strength in cfg.strengths],
    }
    return {
        "prompt": [Label(_asked(prompt, differing), f"prompt {place}") for place, prompt in enumerate(given, 1)],
        "lora": [Label(path.stem, f"LoRA {place}") for place, path in enumerate(files, 1)],
        **{axis: [Label(text, text) for text in own] for axis, own in texts.items()},
    }


def _title(cfg: GridConfig, names: Mapping[str, Sequence[Label]]) -> str:
    count = len(names["lora"])
    return f"{names['lora'][0].text if count == 1 else f'{count} LoRAs'} on {model_name(cfg)}"


def _sheets(cfg: GridConfig, names: Mapping[str, Sequence[Label]]) -> list[Sheet]:
    """Return the sheets, each with a title."""
    title = _title(cfg, names)
    found = grids.sheets(grids.sides(cfg.columns, cfg.rows, cfg.sheets), names, has_base=cfg.show_base)
    return [replace(sheet, title=sheet.title or (Label(title, title),)) for sheet in found]


def _asked(prompt: Prompt, differing: Collection[str]) -> str:
    """Return a prompt with what else it says, of what not all say alike."""
    said = [
        f"{name} {' '.join(map(str, value)) if isinstance(value, tuple) else value}"
        for name, value in vars(prompt).items()
        if name in differing and value is not None
    ]
    return " · ".join([prompt.text or _NO_WORDS, *said])


def _short(name: str) -> str:
    """Return a LoRA's name as it can stand in a file's name on any system."""
    return _NO_FILE_NAME_SIGNS.sub("_", name).encode()[:_LONGEST_NAME].decode(errors="ignore")


def _number(number: float) -> str:
    return f"{number:g}" if float(f"{number:g}") == number else repr(number)


# --- what is told -----------------------------------------------------------------------------------------------------


def _sum(cfg: GridConfig, names: Mapping[str, Sequence[Label]], wanted: Mapping[Cell, Wanted]) -> str:
    """Return a line such as `3 LoRAs x 2 prompts + 2 of the base model = 8 pictures`."""
    counts = {
        "LoRA": len(names["lora"]),
        "strength": sum(strength != 0 for strength in cfg.strengths),
        "prompt": len(names["prompt"]),
        "seed": len(names["seed"]),
    }
    factors = " x ".join(f"{count} {what}{'' if count == 1 else 's'}" for what, count in counts.items())
    num_base = sum(cell.lora is None for cell in wanted)
    base = f" + {num_base} of the base model" if num_base else ""
    total = len({one.picture for one in wanted.values()})
    return f"{factors}{base} = {total} {'picture' if total == 1 else 'pictures'}"


def _told_of_time(
    cfg: GridConfig, found: Iterable[tuple[Picture, Image.Image]], total: int
) -> Iterator[tuple[Picture, Image.Image]]:
    """Yield the same, and say after the first batch about how long all take; a terminal's bar says it by itself."""
    begin, is_told = time.monotonic(), not cfg.progress or sys.stderr.isatty() or total <= cfg.batch_size
    for one in found:
        if not is_told:
            is_told = True
            seconds = (time.monotonic() - begin) * total / cfg.batch_size
            print(f"about {tqdm.format_interval(seconds)} for all, by the first", flush=True)
        yield one


@contextmanager
def _keeping(folder: GridFolder, total: int) -> Iterator[None]:
    """Say what there is of the grid when it is stopped by Ctrl+C."""
    try:
        yield
    except KeyboardInterrupt:
        lying = sum(1 for _ in (folder.path / CELLS).glob("*.png"))
        print("\n" + harmless(f"{lying} of {total} pictures are drawn. {_written(folder)}"), flush=True)
        raise


def _written(folder: GridFolder) -> str:
    return f"The pictures that were drawn are in {folder.path / CELLS}; the same command goes on with them."


# --- what is written --------------------------------------------------------------------------------------------------


def _write(
    cfg: GridConfig,
    folder: GridFolder,
    names: Mapping[str, Sequence[Label]],
    sheets: Sequence[Sheet],
    wanted: Mapping[Cell, Wanted],
) -> None:
    """Write the sheets, and then the page."""
    pictures = [one.picture for one in wanted.values()]
    facts = _facts(cfg, pictures)
    whole = grid_sheet.cell_size([one.size for one in pictures], cfg.cell_size)
    parts = [part for sheet in sheets for part in grid_sheet.parts(sheet, facts, whole)]

    def shown(cell: Cell) -> Image.Image:
        with Image.open(folder.file(wanted[cell].file)) as picture:
            return picture.convert("RGB")

    lines = []
    for number, (sheet, size) in enumerate(parts, 1):
        path = folder.path / ("sheet.png" if len(parts) == 1 else f"sheet-{number}.png")
        with atomic_file(path) as temporary:
            grid_sheet.draw(sheet, facts, size, shown).save(temporary, "PNG")
        smaller = f", with pictures of {size[0]}x{size[1]}: whole ones make too large a sheet" if size != whole else ""
        lines.append(f"{path}{smaller}")
    if len(parts) > len(sheets):
        lines.append(f"what would be too large for one sheet goes over {len(parts)}")
    files = {cell: Shown(f"{CELLS}/{one.file}", one.picture.size, one.words) for cell, one in wanted.items()}
    page = grid_page(
        _title(cfg, names), [facts, *([f"without: {cfg.negative}"] if cfg.negative else [])], sheets, files
    )
    with atomic_file(folder.path / PAGE) as temporary:
        temporary.write_text(page, encoding="utf-8")
    print("\n".join(map(harmless, [*lines, f"{folder.path / PAGE}: to zoom, and to compare with the base model"])))


def _facts(cfg: GridConfig, pictures: Sequence[Picture]) -> str:
    """Return a line of the settings that all pictures have in common."""
    kinds = [
        {one.sampler for one in pictures},
        {f"{one.steps} steps" for one in pictures},
        {f"guidance {one.guidance:g}" for one in pictures},
        {f"{one.size[0]}x{one.size[1]}" for one in pictures},
        {f"strength {_number(strength)}" for strength in cfg.strengths},
        {f"seed {one.seed}" for one in pictures},
    ]
    return " · ".join([model_name(cfg), *(kind.pop() for kind in kinds if len(kind) == 1)])

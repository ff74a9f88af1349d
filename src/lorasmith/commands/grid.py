"""`lorasmith grid`: LoRAs, strengths, prompts and seeds side by side, and the base model beside them.

    lorasmith grid my-lora --base v1-5.safetensors --prompt "a photo of sks dog" "sks dog in the snow" \\
        --seeds 1 2 --strengths 0.6 1

All is checked before the model is loaded. Each picture is written when it is drawn, and the same command goes on with
those that are there.
"""

import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lorasmith import grid_sheet, grids, prompt_syntax, prompts
from lorasmith.checkpoint import atomic_file
from lorasmith.command_line import harmless
from lorasmith.config import GridConfig
from lorasmith.errors import UserError
from lorasmith.grid_page import Shown, grid_page
from lorasmith.grids import Cell, Label, Sheet
from lorasmith.merging import Strength
from lorasmith.models.base import ModelFacts
from lorasmith.picture_run.checkpoints import lora_files
from lorasmith.picture_run.comparing import Comparison, file_name, plain_number
from lorasmith.picture_run.comparison_folder import CELLS, PAGE
from lorasmith.picture_run.drawing import open_base
from lorasmith.picture_run.facts import model_name
from lorasmith.picture_run.loras import Loras
from lorasmith.picture_run.pictures import Picture, check_pictures
from lorasmith.prompt_syntax import LoraTag
from lorasmith.prompts import Prompt
from lorasmith.sampling import Drawing
from lorasmith.seeds import derive

_EXAMPLE = 'For example: lorasmith grid robot.safetensors --prompt "a robot" --base v1-5.safetensors'
_NO_WORDS = "(no words)"


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
        comparison = Comparison(
            cfg, base, loras, {one.picture: one.file for one in wanted.values()}, is_folded=cfg.fold
        )
        lines = [*base.told(cfg.base), *loras.told(), *notes, _sum(cfg, names, wanted), *comparison.told()]
        print("\n".join(map(harmless, lines)), flush=True)
        with comparison.kept():
            comparison.draw()
            _write(cfg, comparison, names, sheets, wanted)
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

    def want(cell: Cell, words: str, tag: LoraTag | None = None) -> None:
        drawing, tags = own[cell.prompt, cell.seed]
        picture = Picture(**vars(drawing), loras=loras.used([*tags, *([tag] if tag else [])]))
        file = file_name(cell.prompt + 1, drawing.seed)
        if tag is not None and cell.lora is not None:
            file = file_name(cell.prompt + 1, drawing.seed, cell.lora + 1, tag.name, tag.unet)
        shown = f"{words}, {drawing.prompt or _NO_WORDS}, seed {drawing.seed}"
        found[cell] = made.setdefault(picture, Wanted(picture, file, shown))

    if cfg.show_base or 0 in cfg.strengths:
        for place in own:
            want(Cell(*place, None, None), grids.BASE.text)
    for lora, path in enumerate(files):
        for level, strength in enumerate(cfg.strengths):
            for place in own:
                if strength:
                    words = f"{path.stem}, strength {plain_number(strength)}"
                    want(Cell(*place, lora, level), words, LoraTag(path.stem, strength, strength))
                else:
                    found[Cell(*place, lora, level)] = found[Cell(*place, None, None)]
    check_pictures(made, facts, cfg.sigmas)
    return found


def _of_seed(asked: Drawing, seed: int, names: Collection[str]) -> tuple[Drawing, list[LoraTag]]:
    """Return what is drawn of a prompt from a seed, as `lorasmith generate` draws it, and the LoRAs that it names.

    Raises:
        UserError: it names one of those that are compared.
    """
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


# --- names ------------------------------------------------------------------------------------------------------------


def _names(cfg: GridConfig, given: Sequence[Prompt], files: Sequence[Path]) -> dict[str, list[Label]]:
    """Return the names of all axes' values."""
    has_own_seeds = any(prompt.seeds for prompt in given)
    seeds = cfg.seeds if len(cfg.seeds) > 1 else range(cfg.seeds[0], cfg.seeds[0] + cfg.images)
    differing = {name for name in vars(given[0]) if len({vars(prompt)[name] for prompt in given}) > 1} - {"text"}
    texts = {
        "seed": [f"picture {place}" if has_own_seeds else f"seed {seed}" for place, seed in enumerate(seeds, 1)],
        "strength": [f"strength {plain_number(strength)}" for strength in cfg.strengths],
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


# --- what is written --------------------------------------------------------------------------------------------------


def _write(
    cfg: GridConfig,
    comparison: Comparison,
    names: Mapping[str, Sequence[Label]],
    sheets: Sequence[Sheet],
    wanted: Mapping[Cell, Wanted],
) -> None:
    """Write the sheets, and then the page."""
    folder, pictures = comparison.folder.path, [one.picture for one in wanted.values()]
    facts = _facts(cfg, pictures)
    whole = grid_sheet.cell_size([one.size for one in pictures], cfg.cell_size)
    parts = [part for sheet in sheets for part in grid_sheet.parts(sheet, facts, whole)]

    lines = []
    for number, (sheet, size) in enumerate(parts, 1):
        path = folder / ("sheet.png" if len(parts) == 1 else f"sheet-{number}.png")
        drawn = grid_sheet.draw(sheet, facts, size, lambda cell: comparison.read(wanted[cell].picture))
        with atomic_file(path) as temporary:
            drawn.save(temporary, "PNG")
        smaller = f", with pictures of {size[0]}x{size[1]}: whole ones make too large a sheet" if size != whole else ""
        lines.append(f"{path}{smaller}")
    if len(parts) > len(sheets):
        lines.append(f"what would be too large for one sheet goes over {len(parts)}")
    files = {cell: Shown(f"{CELLS}/{one.file}", one.picture.size, one.words) for cell, one in wanted.items()}
    page = grid_page(
        _title(cfg, names), [facts, *([f"without: {cfg.negative}"] if cfg.negative else [])], sheets, files
    )
    with atomic_file(folder / PAGE) as temporary:
        temporary.write_text(page, encoding="utf-8")
    print("\n".join(map(harmless, [*lines, f"{folder / PAGE}: to zoom, and to compare with the base model"])))


def _facts(cfg: GridConfig, pictures: Sequence[Picture]) -> str:
    """Return a line of the settings that all pictures have in common."""
    kinds = [
        {one.sampler for one in pictures},
        {f"{one.steps} steps" for one in pictures},
        {f"guidance {one.guidance:g}" for one in pictures},
        {f"{one.size[0]}x{one.size[1]}" for one in pictures},
        {f"strength {plain_number(strength)}" for strength in cfg.strengths},
        {f"seed {one.seed}" for one in pictures},
    ]
    return " · ".join([model_name(cfg), *(kind.pop() for kind in kinds if len(kind) == 1)])

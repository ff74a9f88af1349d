"""`lorasmith merge`: LoRAs into the weights of a base model, or with each other.

    lorasmith merge --model base.safetensors --lora a.safetensors b.safetensors --ratio 0.8 0.5 --output out.safetensors
    lorasmith merge --lora a.safetensors b.safetensors --ratio 0.8 0.5 --output both.safetensors

All is checked before anything is written, and the result takes its place when it is whole.
"""

import math
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch

from lorasmith import lora_files, lora_merging, merging, model_conversion, model_families
from lorasmith.checkpoint import Checkpoint, open_checkpoint
from lorasmith.config import MergeConfig
from lorasmith.errors import UserError
from lorasmith.formats.dialects import read_any
from lorasmith.merging import Addition, Strength
from lorasmith.model_families import AdapterPlace
from lorasmith.models.sd import ARCHITECTURE_KEY
from lorasmith.network import part_of
from lorasmith.rewriting import TORCH_SUFFIXES, check_output, check_space, rewrite, size_of

_NUM_SHOWN = 5


def run(cfg: MergeConfig) -> int:
    """Merge; return the exit code: 0, or 1 when --verify finds that the results differ."""
    if not cfg.lora:
        raise UserError("missing: --lora, the LoRA files to merge. For example: --lora style.safetensors --ratio 0.8")
    if cfg.output is None:
        raise UserError("missing: --output, the file or folder to write. For example: --output merged.safetensors")
    if cfg.model is None:
        return _merge_loras(cfg, cfg.output)
    return _merge_into_model(cfg, cfg.model, cfg.output)


def _merge_loras(cfg: MergeConfig, output: Path) -> int:
    """Merge the LoRAs with each other."""
    lora_files.check_output(output, cfg.lora, overwrite=cfg.overwrite)
    files = [read_any(path) for path in cfg.lora]
    contents = [lora_files.contents_of(file) for file in files]
    ratios = [{"unet": unet, "text_encoder": text} for unet, text in zip(*_ratios(cfg), strict=True)]
    print("no --model is given: the LoRAs are merged with each other")
    for file, found, own in zip(files, contents, ratios, strict=True):
        layers = Counter(part_of(name) for name in (*found.layers, *found.wholes))
        print(f"{file.path}: {', '.join(f'{count} layers of the {p} x {own[p]:g}' for p, count in layers.items())}")
        for line in (*found.told(), *lora_files.told_extras(file)):
            print(line)
    merged = lora_merging.merge(files, contents, ratios, rank=cfg.rank)
    if merged.kept:
        print("\n".join(lora_files.report(merged.kept)))
    if merged.wholes:
        print(f"{len(merged.wholes)} layers are whole changes, of norms, embeddings or weight and bias: added exactly")
    metadata = lora_merging.metadata(files, ratios, merged.layers, title=output.stem, time=time.time())
    precision = cfg.save_precision or lora_files.widest_precision(t for file in files for t in file.tensors.values())
    print(lora_files.save(output, merged.layers, metadata, precision, merged.wholes))
    return 0


def _merge_into_model(cfg: MergeConfig, model: str, output: Path) -> int:
    with open_checkpoint(model) as checkpoint:
        family, places, notes = model_families.adapter_places(checkpoint)
        form = _form_of(checkpoint, output)
        _check_place(cfg, checkpoint, output, form)
        if cfg.verify:
            _check_can_be_verified(checkpoint, output)
        strengths = zip(cfg.lora, _strengths(cfg, checkpoint), strict=True)
        additions = [merging.plan(path, family, places, strength) for path, strength in strengths]
        types = merging.dtypes(checkpoint, places, additions, cfg.save_precision)
        check_space(output, size_of(checkpoint, types) * (2 if form else 1))
        for addition in additions:
            print(_told(addition))
        change = merging.changing(places, additions, types, cfg.precision)
        if form:
            notes += _rewrite_and_convert(checkpoint, output, form, partial(rewrite, dtypes=types, change=change))
        else:
            notes += rewrite(checkpoint, output, types, change)
        for note in notes:
            print(f"note: {note}")
        print(f"{output}: {len(types)} of {len(checkpoint.names())} tensors changed, all others are as they were")
        return _verify(checkpoint, output, places, additions, types, cfg.precision) if cfg.verify else 0


def _form_of(checkpoint: Checkpoint, output: Path) -> str:
    """Return the other form that the output's name asks for, `checkpoint` or `diffusers`; "" for the model's own.

    Raises:
        UserError: the model cannot be converted without more being said.
    """
    is_folder = checkpoint.format == "diffusers"
    if is_folder and output.suffix.lower() in (".safetensors", *TORCH_SUFFIXES):
        form = "checkpoint"
    elif not is_folder and not output.suffix:
        form = "diffusers"
    else:
        return ""
    try:
        model_conversion.prepare(checkpoint, form, output, prediction=None, precision=None)
    except UserError as error:
        raise UserError(
            f"{error} That is lorasmith convert's option: convert the model first, or give --output the model's form."
        ) from error
    return form


def _rewrite_and_convert(
    checkpoint: Checkpoint, output: Path, form: str, rewritten: Callable[[Checkpoint, Path], list[str]]
) -> list[str]:
    """Write the merged model in its own form beside the output, and that in the other form; return notes."""
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.") as folder:
        own = Path(folder, "merged" + (".safetensors" if form == "diffusers" else ""))
        notes = rewritten(checkpoint, own)
        with open_checkpoint(own) as merged:
            ready = model_conversion.prepare(merged, form, output, prediction=None, precision=None)
            model_conversion.write(output, ready)
    if ready.unknown:
        notes.append(f"left out, {len(ready.unknown):,} tensors of no known use: {_shorten(ready.unknown)}")
    return [*notes, *ready.notes, f"{checkpoint.path} has another form; every tensor was read back from {output}."]


def _strengths(cfg: MergeConfig, checkpoint: Checkpoint) -> list[Strength]:
    blocks = [_block_weights(text, checkpoint) for text in cfg.block_weights] or [None] * len(cfg.lora)
    return [Strength(*values) for values in zip(*_ratios(cfg), blocks, strict=True)]


def _ratios(cfg: MergeConfig) -> tuple[list[float], list[float]]:
    """Return the ratios of the U-Net and of the text encoder, one for each LoRA."""
    ratios = cfg.ratio or [1.0] * len(cfg.lora)
    return cfg.unet_ratio or ratios, cfg.text_encoder_ratio or ratios


def _block_weights(text: str, checkpoint: Checkpoint) -> dict[str, float]:
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError as error:
        raise UserError(f"--block-weights {text}: expected numbers with commas between them, as in 1,0.5,0.") from error
    if not all(map(math.isfinite, numbers)):
        raise UserError(f"--block-weights {text}: NaN and infinity are no weights.")
    try:
        return model_families.block_weights(checkpoint, numbers)
    except ValueError as error:
        raise UserError(f"--block-weights {text}: {error}.") from error


def _check_place(cfg: MergeConfig, checkpoint: Checkpoint, output: Path, form: str) -> None:
    """Refuse an output of the wrong kind, and one that would replace something that is still wanted."""
    if not form:
        check_output(checkpoint, output)
    target = output.resolve()
    for path in (checkpoint.path, *cfg.lora):
        given = path.resolve()
        if given == target or given in target.parents or target in given.parents:
            raise UserError(f"--output {output} would replace or lie in {path}, which is read; give another name.")
    if not output.exists():
        return
    if not cfg.overwrite:
        raise UserError(f"--output {output} exists already; give another name, or --overwrite to replace it.")
    if output.is_dir() != (form == "diffusers" or (not form and checkpoint.format == "diffusers")):
        kind = "a folder" if output.is_dir() else "a file"
        raise UserError(f"--output {output} is {kind}, and would be replaced by something else; give another name.")
    if output.is_dir() and any(output.iterdir()) and not (output / "model_index.json").is_file():
        raise UserError(f"--output {output} is a folder that holds no diffusers model; give another name.")


def _check_can_be_verified(checkpoint: Checkpoint, output: Path) -> None:
    try:
        model_families.describe(checkpoint)
    except UserError as error:
        raise UserError(
            f"--verify runs the model, which cannot be done here: {error} Or leave --verify out."
        ) from error
    if ARCHITECTURE_KEY in checkpoint.metadata and output.suffix.lower() in TORCH_SUFFIXES:
        raise UserError(
            f"--verify runs the model, and {output} could not be run: {checkpoint.path} is a small model, which tells "
            f"its structure in its metadata, and a {output.suffix} has no place for these. Write a .safetensors, or "
            "leave --verify out."
        )


def _told(addition: Addition) -> str:
    counts = f"{len(addition.factors)} layers applied, {len(addition.ignored)} ignored, {len(addition.unknown)} unknown"
    lines = [f"{addition.file.path}: {counts}"]
    lines.append("  kinds of change: " + ", ".join(f"{count} {kind}" for kind, count in addition.kinds().most_common()))
    if addition.ignored:
        lines.append(f"  ignored, for their factor is 0: {_shorten(addition.ignored)}")
    if addition.unknown:
        lines.append(f"  unknown, for the model has no such layers: {_shorten(addition.unknown)}")
    return "\n".join([*lines, *lora_files.told_extras(addition.file)])


def _verify(
    checkpoint: Checkpoint,
    output: Path,
    places: Mapping[str, AdapterPlace],
    additions: Sequence[Addition],
    types: Mapping[str, torch.dtype],
    precision: str,
) -> int:
    with open_checkpoint(output) as merged:
        found = merging.verify(checkpoint, merged, places, additions, types, precision)
    for one in found:
        print(
            f"verify: {one.name}: merged and attached differ by {one.total:.2e}; rounding makes {one.rounding:.2e}, "
            f"which leaves {one.unexplained:.2e} unexplained (at most {one.limit:.0e} is allowed); the LoRA changes it "
            f"by {one.lora:.2e}"
        )
        if one.is_noise:
            print(f"note: the LoRA changes the {one.name} so little that nothing can be told from it")
        elif one.is_hidden:
            print(
                f"note: rounding hides a good part of what the LoRA does to the {one.name}; --save-precision float "
                "keeps it"
            )
    if all(one.is_same for one in found):
        return 0
    print("verify: the results differ by more than rounding explains: do not use the merged model, and report this.")
    return 1


def _shorten(names: Sequence[str]) -> str:
    rest = len(names) - _NUM_SHOWN
    return ", ".join(names[:_NUM_SHOWN]) + (f" and {rest} more" if rest > 0 else "")

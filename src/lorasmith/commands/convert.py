"""`lorasmith convert`: write a LoRA as another program has it, or mend its names; or a base model in its other form.

    lorasmith convert lora.safetensors --to diffusers --output lora-diffusers.safetensors
    lorasmith convert v1-5.safetensors --to diffusers --output v1-5
    lorasmith convert v1-5 --to checkpoint --output v1-5.safetensors

docs/formats.md says what each form is. A LoRA is read back and compared before the command ends.
"""

from collections import Counter
from pathlib import Path

from lorasmith import model_conversion
from lorasmith.checkpoint import open_checkpoint
from lorasmith.command_line import harmless
from lorasmith.config import ConvertConfig
from lorasmith.errors import UserError
from lorasmith.formats import conversion
from lorasmith.formats.dialects import DIALECTS, FAMILIES, AnyLora, kind_of, read_any


def run(cfg: ConvertConfig) -> int:
    """Convert, tell what was done, and return the exit code: 0, or 1 when something had no place in the output."""
    if cfg.lora is None or cfg.output is None:
        missing = "LORA, the file to convert" if cfg.lora is None else "--output, the file to write"
        raise UserError(
            f"missing: {missing}. For example: lorasmith convert lora.safetensors --output mended.safetensors"
        )
    if cfg.to == "checkpoint" or model_conversion.is_model(cfg.lora):
        return _convert_model(cfg, cfg.lora, cfg.output)
    if cfg.prediction is not None:
        raise UserError(f"--prediction is for base models, and {cfg.lora} is none; leave it out.")
    output = _checked_output(cfg.output, cfg.to, overwrite=cfg.overwrite)
    lora = read_any(cfg.lora)
    ready = conversion.prepare(lora, cfg.to, output.suffix, cfg.save_precision)
    written = conversion.write(output, cfg.to, ready)
    wrote = f"wrote           {', '.join(map(str, written.files))}; read back and compared"
    print("\n".join(map(harmless, [_about(lora), *_told(lora, ready), wrote])))
    return 1 if ready.left_out else 0


def _convert_model(cfg: ConvertConfig, model: Path, output: Path) -> int:
    """Convert a base model and return the exit code: 0, or 1 when tensors of no known use were left out."""
    if cfg.to not in model_conversion.FORMS:
        raise UserError(
            f"{model} is a base model or a part of one, and --to {cfg.to} is for LoRAs; give --to checkpoint for one "
            "file, or --to diffusers for a folder."
        )
    with open_checkpoint(str(model)) as checkpoint:
        model_conversion.check_output(checkpoint, cfg.to, output, overwrite=cfg.overwrite)
        ready = model_conversion.prepare(
            checkpoint, cfg.to, output, prediction=cfg.prediction, precision=cfg.save_precision
        )
        model_conversion.write(output, ready)
    lines = [f"{'read':<16}{model}: {ready.facts.title}, predicts {ready.facts.prediction}"]
    lines += [f"{'note':<16}{note}" for note in ready.notes]
    if ready.unknown:
        lines.append(f"{'left out':<16}{len(ready.unknown):,} tensors of no known use: {', '.join(ready.unknown)}")
    lines.append(f"{'wrote':<16}{output}: {ready.num_tensors:,} tensors; read back and compared")
    print("\n".join(map(harmless, lines)))
    return 1 if ready.unknown else 0


def _checked_output(output: Path, to: str, *, overwrite: bool) -> Path:
    """Return where to write.

    Raises:
        UserError: no such kind of file for this form, or something is there.
    """
    suffixes = conversion.TARGETS[to].suffixes
    if output.suffix not in suffixes:
        wanted = "a folder's name, without an extension" if suffixes == ("",) else f"one of {', '.join(suffixes)}"
        raise UserError(f"--output {output}: for --to {to} expected is {wanted}.")
    is_folder = suffixes == ("",)
    if output.exists() and output.is_dir() != is_folder:
        raise UserError(f"--output {output} is a {'file' if is_folder else 'folder'}; choose another name.")
    there = [path for path in conversion.outputs(output, to) if path.exists()]
    if there and not overwrite:
        raise UserError(
            f"{there[0]} exists, and would be replaced or taken for a part of the output; choose another --output, or "
            "add --overwrite."
        )
    return output


def _about(lora: AnyLora) -> str:
    kinds = Counter(str(kind_of(own)) for own in lora.layers().values())
    told = ", ".join(f"{count:,} {kind}" for kind, count in kinds.most_common())
    return (
        f"{'read':<16}{', '.join(map(str, lora.files))}: {DIALECTS[lora.dialect]}, for {FAMILIES[lora.family]}; "
        f"layers: {told}"
    )


def _told(lora: AnyLora, ready: conversion.Conversion) -> list[str]:
    num_layers, num_tensors = len(ready.layers), sum(map(len, ready.layers.values()))
    lines = [
        f"{'converted':<16}{num_layers:,} layers, {num_tensors:,} tensors; "
        f"{len(ready.header):,} entries of metadata kept"
    ]
    lines += [f"{'changed':<16}{change}: {count:,} layers" for change, count in ready.changes.items()]
    lines += [f"{'note':<16}{note}" for note in ready.notes]
    for reason, count in Counter(ready.left_out.values()).items():
        names = [name for name, own in ready.left_out.items() if own == reason]
        lines.append(f"{'left out':<16}{count:,}: {reason}; {', '.join(names[:3])}{' ...' if count > 3 else ''}")
    return lines

"""Writes a LoRA in another program's dialect: what fits, what is folded in, and what has no place there.

Nothing here decides in silence: a `Conversion` counts what was changed and names what was left out, and what was
written is read back and compared.
"""

import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from lorasmith.checkpoint import write_safetensors, write_torch
from lorasmith.errors import UserError
from lorasmith.formats import cloneofsimo, kohya, peft
from lorasmith.formats.dialects import FAMILIES, AnyLora, header_layout, kind_of, read_any
from lorasmith.metadata import fit
from lorasmith.models.keys import sd as keys

Layers = dict[str, dict[str, Tensor]]


@dataclass(frozen=True)
class Conversion:
    """A LoRA ready to be written.

    Args:
        layers: what is written, by sd-scripts' layer and tail.
        header: what the file's header will say, without hashes.
        left_out: layer or key -> why it has no place in the target.
        changes: what was changed -> in how many layers.
        notes: what the user should know.
    """

    layers: Layers
    header: dict[str, str]
    left_out: dict[str, str] = field(default_factory=dict)
    changes: dict[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Target:
    """A dialect that can be written.

    Args:
        suffixes: of the output; "" is a folder.
        takes_all_kinds: LyCORIS' kinds of changes too, not only plain LoRA.
        keeps_alpha: alpha has a place; else it is multiplied into the factors.
        write: writes a conversion to a path.
    """

    suffixes: tuple[str, ...]
    takes_all_kinds: bool
    keeps_alpha: bool
    write: Callable[[Path, Conversion], None]


# --- making it ready -------------------------------------------------------------------------------------------------


def prepare(lora: AnyLora, to: str, suffix: str, precision: str | None) -> Conversion:
    """Return what a file of the dialect `to` would hold.

    Args:
        precision: `float`, `fp16`, `bf16`; None: each tensor as it is.

    Raises:
        UserError: the dialect cannot hold this, or nothing of it; or NaN.
    """
    target = TARGETS[to]
    _check_family(lora, to)
    layers = lora.layers()
    if not target.takes_all_kinds:
        _check_kinds(lora, to, layers)
    left_out = {key: f"{what}, which {to} has no place for" for key, what in lora.extras.items()}
    layers, strangers = _with_place(lora, to, suffix, layers)
    left_out |= strangers
    if not layers:
        raise UserError(
            f"{lora.path}: nothing of it has a place in {to}: {len(left_out):,} are left out, "
            f"{_example(left_out)}. Nothing was written."
        )
    changes: Counter[str] = Counter()
    if lora.mended:
        changes["text-encoder names mended, which no program but diffusers reads"] = len(lora.mended)
    ready: Layers = {}
    for layer, own in layers.items():
        precisions = {tail: precision or precision_of(tensor) for tail, tensor in own.items()}
        own, reshaped = _natively_shaped(layer, own, lora.family)
        own, told = (_with_alpha if target.keeps_alpha else _folded)(own)
        ready[layer] = _in_precision(layer, own, precisions)
        changes.update([*(["reshaped to the layer's own number of dimensions"] if reshaped else []), *told])
    dropped = header_layout(lora.metadata)
    header = {name: value for name, value in lora.metadata.items() if name not in dropped}
    notes = [*lora.notes, *([_NO_HEADER] if header and suffix in (".pt", ".ckpt") else []), *_NOTES.get(to, ())]
    return Conversion(ready, header, left_out, dict(changes), tuple(notes))


_NO_HEADER = "this kind of file has no place for metadata: what was trained, and how, is not in it"
_NOTES = {
    "lycoris": (
        "SimpleTuner's names are of the U-Net; no program is known that looks for a text encoder's among them",
    ),
    "cloneofsimo-new": ("for cloneofsimo's program with diffusers of 2023 and later; older ones have another order",),
    "diffusers": ("for diffusers and what is built on it; ComfyUI and A1111 read --to kohya",),
    "peft": ("the text encoder is named as transformers 5.6 and later has it",),
}


def _check_family(lora: AnyLora, to: str) -> None:
    if lora.family in ("sd1", "sd2", "unknown") or (lora.family == "sdxl" and lora.dialect == to == "kohya"):
        return
    more = " (for SDXL, names in sd-scripts' form are mended, --to kohya)" if lora.family == "sdxl" else ""
    raise UserError(
        f"{lora.path} is a LoRA for {FAMILIES[lora.family]}; "
        f"convert knows the names of Stable Diffusion 1.x and 2.x only{more}."
    )


def _check_kinds(lora: AnyLora, to: str, layers: Layers) -> None:
    kinds = Counter(kind_of(own) for own in layers.values())
    if others := {str(kind): count for kind, count in kinds.items() if kind != "LoRA"}:
        told = ", ".join(f"{count:,} layers are {kind}" for kind, count in others.items())
        raise UserError(
            f"{lora.path}: {told}, and {to} holds only plain LoRA: written there it would be another change or none. "
            "Only names can be changed for these: --to kohya."
        )


def _with_place(lora: AnyLora, to: str, suffix: str, layers: Layers) -> tuple[Layers, dict[str, str]]:
    """Return the layers that have a place, and why others have none.

    Raises:
        UserError: a list has places for layers that are not there.
    """
    is_list = to in _LISTS and (suffix == ".pt" or to != "d8ahazard")
    places = keys.adapter_modules().keys() if to in _NAMED else layers.keys()
    if is_list:
        wanted = [name for names in cloneofsimo.place_of(list(layers), is_old_order=True).values() for name in names]
        if missing := [name for name in wanted if name not in layers]:
            raise UserError(
                f"{lora.path}: a list as {to} has it needs all of {len(wanted)} layers, and {len(missing)} are not in "
                f"the file, such as {missing[0]}. Use another --to, such as diffusers. Nothing was written."
            )
        places = dict.fromkeys(wanted).keys()
    found = {layer: own for layer, own in layers.items() if layer in places}
    reason = "a layer that the list has no place for" if is_list else "a layer whose name is not known"
    return found, {layer: reason for layer in layers if layer not in found}


_NAMED = {"diffusers", "peft", "ldm", "lycoris"}
# Target -> whose name for the text encoder's list, and whether the feed-forward layer stands between the attentions.
_LISTS = {
    "cloneofsimo": ("cloneofsimo", True),
    "cloneofsimo-new": ("cloneofsimo", False),
    "d8ahazard": ("d8ahazard", True),
}


def _natively_shaped(layer: str, own: dict[str, Tensor], family: str) -> tuple[dict[str, Tensor], bool]:
    """Return the factors of proj_in and proj_out as the layer's weight is: 1x1 convolutions in SD1, matrices in SD2.

    diffusers refuses a file in which they are otherwise.
    """
    if kind_of(own) != "LoRA" or not layer.startswith("lora_unet_") or not layer.endswith(("_proj_in", "_proj_out")):
        return own, False
    dims = own["lora_down.weight"].dim()
    if family == "sd1" and dims == 2:
        return {tail: t[:, :, None, None] if t.dim() == 2 else t for tail, t in own.items()}, True
    if family == "sd2" and dims == 4:
        return {tail: t.flatten(1) if t.dim() == 4 else t for tail, t in own.items()}, True
    return own, False


def _with_alpha(own: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Return the layer with an alpha, which some programs ask for."""
    if "alpha" in own or kind_of(own) != "LoRA":
        return own, []
    down = own["lora_down.weight"]
    return {**own, "alpha": torch.tensor(float(down.shape[0]))}, ["alpha = rank written, which was not in the file"]


def _folded(own: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Return the layer without an alpha: alpha / rank is in `lora_up`."""
    rank = own["lora_down.weight"].shape[0]
    scale = own["alpha"].item() / rank if "alpha" in own else 1.0
    rest = {tail: tensor for tail, tensor in own.items() if tail != "alpha"}
    if scale == 1.0:
        return rest, []
    return {**rest, "lora_up.weight": own["lora_up.weight"].float() * scale}, [
        "alpha / rank multiplied into the factors"
    ]


def precision_of(tensor: Tensor) -> str:
    """Return the precision that keeps a tensor's numbers."""
    return {torch.float16: "fp16", torch.bfloat16: "bf16"}.get(tensor.dtype, "float")


def _in_precision(layer: str, own: Mapping[str, Tensor], precisions: Mapping[str, str]) -> dict[str, Tensor]:
    named = {tail: (f"{layer}.{tail}", tensor) for tail, tensor in own.items()}
    return {
        tail: kohya.convert({name: tensor}, precisions.get(tail, "float"))[name]
        for tail, (name, tensor) in named.items()
    }


def _example(left_out: Mapping[str, str]) -> str:
    name, reason = next(iter(left_out.items()), ("", ""))
    return f"such as {name} ({reason})" if name else "there is nothing in it"


# --- writing ---------------------------------------------------------------------------------------------------------


def outputs(path: Path, to: str) -> list[Path]:
    """Return every file that is a part of the output, or would be taken for one."""
    if to == "peft":
        return [path / part / name for part in ("", *peft.PARTS) for name in (peft.WEIGHTS, peft.CONFIG)]
    if path.suffix == ".pt" and to in _LISTS:
        return [path, *(cloneofsimo.sidecar(path, program) for program in cloneofsimo.SIDECARS)]
    return [path]


def write(path: Path, to: str, conversion: Conversion) -> AnyLora:
    """Write the file, read it back and compare; return it as read.

    Raises:
        UserError: it reads back otherwise, or the disk is full.
    """
    TARGETS[to].write(path, conversion)
    found = read_any(path)
    meant, read = (
        {layer: _comparable(own) for layer, own in layers.items()} for layers in (conversion.layers, found.layers())
    )
    wrong = [layer for layer in sorted(meant.keys() | read.keys()) if not _is_same(meant.get(layer), read.get(layer))]
    if wrong:
        raise UserError(
            f"{path} was written, but reads back otherwise than meant at {len(wrong):,} layers (first: {wrong[0]}): do "
            "not use it. If the disk is in order, this is a bug in lorasmith; please report it."
        )
    return found


def _comparable(own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the layer with its alpha spelled out, as a Python number has it."""
    alpha = {} if "lora_down.weight" not in own else {"alpha": torch.tensor(float(own["lora_down.weight"].shape[0]))}
    return {**alpha, **{t: v.float() if t == "alpha" else v for t, v in own.items()}}


def _is_same(meant: Mapping[str, Tensor] | None, read: Mapping[str, Tensor] | None) -> bool:
    if meant is None or read is None or meant.keys() != read.keys():
        return False
    return all(torch.equal(meant[tail], read[tail]) and meant[tail].dtype == read[tail].dtype for tail in meant)


def _write_named(path: Path, conversion: Conversion, names: Mapping[str, str], header: Mapping[str, str]) -> None:
    """Write `layer.tail` tensors, the layers under their names in `names`."""
    tensors = {
        f"{names.get(layer, layer)}.{tail}": tensor
        for layer, own in conversion.layers.items()
        for tail, tensor in own.items()
    }
    _write(path, tensors, {**conversion.header, **header})


def _write(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> None:
    ready = {name: tensors[name].contiguous() for name in sorted(tensors)}
    if path.suffix != ".safetensors":
        write_torch(path, ready)
        return
    fitted = fit(header)
    hashed = kohya.hashes(ready, fitted)
    if "modelspec.hash_sha256" in fitted:
        hashed["modelspec.hash_sha256"] = f"0x{hashed['sshs_model_hash']}"
    write_safetensors(path, ready, {**fitted, **hashed})


def _write_kohya(path: Path, conversion: Conversion) -> None:
    _write_named(path, conversion, {}, {})


def _write_ldm(path: Path, conversion: Conversion) -> None:
    _write_named(path, conversion, {ours: theirs for theirs, ours in keys.ldm_adapter_names().items()}, {})


def _write_lycoris(path: Path, conversion: Conversion) -> None:
    names = {layer: re.sub("^lora_(unet|te)_", "lycoris_", layer) for layer in conversion.layers}
    _write_named(path, conversion, names, {})


def _write_diffusers(path: Path, conversion: Conversion) -> None:
    modules = keys.adapter_modules()
    tensors = {
        f"{modules[layer]}.{_IN_PEFT[tail]}": tensor
        for layer, own in conversion.layers.items()
        for tail, tensor in own.items()
    }
    _write(path, tensors, {**conversion.header, "format": "pt"})


_IN_PEFT = {"lora_down.weight": "lora_A.weight", "lora_up.weight": "lora_B.weight"}


def _write_peft(path: Path, conversion: Conversion) -> None:
    modules = keys.adapter_modules()
    for part in peft.PARTS:
        own = {
            modules[layer].removeprefix(f"{part}.").removeprefix("text_model."): tensors
            for layer, tensors in conversion.layers.items()
            if modules[layer].startswith(f"{part}.")
        }
        if not own:
            continue
        tensors = {
            f"base_model.model.{module}.{_IN_PEFT[tail]}": tensor
            for module, factors in own.items()
            for tail, tensor in factors.items()
            if tail != "alpha"
        }
        _write(path / part / peft.WEIGHTS, tensors, conversion.header)
        ranks = {module: factors["lora_down.weight"].shape[0] for module, factors in own.items()}
        peft.write_config(
            path / part / peft.CONFIG, ranks, {module: factors["alpha"].item() for module, factors in own.items()}
        )


def _write_d8ahazard(path: Path, conversion: Conversion) -> None:
    if path.suffix == ".pt":
        _write_pairs("d8ahazard", path, conversion)
        return
    ranks = {
        part: max(
            (own["lora_down.weight"].shape[0] for layer, own in conversion.layers.items() if layer.startswith(start)),
            default=0,
        )
        for part, start in (("unet", "lora_unet_"), ("te", "lora_te_"))
    }
    header = {
        "lora_key_encoding": "extra_network_diffusers",
        **{f"lora_{p}_rank": str(r) for p, r in ranks.items() if r},
    }
    _write_named(path, conversion, {}, header)


def _write_pairs(to: str, path: Path, conversion: Conversion) -> None:
    program, is_old_order = _LISTS[to]
    places = cloneofsimo.place_of(list(conversion.layers), is_old_order=is_old_order)
    parts = {
        part: [(conversion.layers[n]["lora_up.weight"], conversion.layers[n]["lora_down.weight"]) for n in names]
        for part, names in places.items()
    }
    if path.suffix == ".safetensors":
        tensors, header = cloneofsimo.numbered(parts)
        _write(path, tensors, {**conversion.header, **header})
        return
    cloneofsimo.write_list(path, parts.get("unet") or parts["text_encoder"])
    if len(parts) == 2:
        cloneofsimo.write_list(cloneofsimo.sidecar(path, program), parts["text_encoder"])


TARGETS = {
    "kohya": Target(kohya.SUFFIXES, True, True, _write_kohya),
    "ldm": Target(kohya.SUFFIXES, True, True, _write_ldm),
    "diffusers": Target((".safetensors",), False, False, _write_diffusers),
    "peft": Target(("",), False, True, _write_peft),
    "lycoris": Target((".safetensors",), True, True, _write_lycoris),
    "cloneofsimo": Target((".pt", ".safetensors"), False, False, partial(_write_pairs, "cloneofsimo")),
    "cloneofsimo-new": Target((".pt", ".safetensors"), False, False, partial(_write_pairs, "cloneofsimo-new")),
    "d8ahazard": Target((".pt", ".safetensors"), False, False, _write_d8ahazard),
}

"""Reads and writes LoRA files as kohya-ss/sd-scripts does: the form that every client loads.

Keys are `<saved name>.{lora_down.weight, lora_up.weight, alpha}`. Saved names come from the model family's table, so
nothing here spells one; reading mends the ways of spelling that are found in published files.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from lorasmith.adapters.lora import product_norm
from lorasmith.checkpoint import open_checkpoint, write_safetensors, write_torch
from lorasmith.errors import UserError
from lorasmith.metadata import fit, legacy_hash, model_hash

PRECISIONS = {"float": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_TORCH_SUFFIXES = (".pt", ".ckpt")
SUFFIXES = (".safetensors", *_TORCH_SUFFIXES)
_LORA_TAILS = {"lora_down.weight", "lora_up.weight", "alpha"}

# SD has one text encoder: sd-scripts calls it te, some tools te1; and writers that trust transformers >= 5.6 lose
# `text_model_`. Old text -> how sd-scripts spells it.
_MENDED_NAMES = [
    (re.compile(r"^lora_te1_"), "lora_te_"),
    (re.compile(r"^lora_te_(?=encoder_layers_)"), "lora_te_text_model_"),
]

# What a file is that is no SD1 or SD2 LoRA of this form: a pattern of its keys -> what it is and what to do.
_FOREIGN_KEYS = [
    (r"(^|\.)hada_w", "a LoHa of LyCORIS"),
    (r"(^|\.)lokr_w", "a LoKr of LyCORIS"),
    (r"(^|\.)oft_", "an OFT or BOFT"),
    (r"(^|\.)(dora_scale|lora_magnitude_vector|dora_magnitude)", "a DoRA"),
    (r"\.lora_mid\.weight$", "a Tucker-decomposed LoCon of LyCORIS"),
    (r"\.(a1|b1)\.weight$", "a GLoRA of LyCORIS"),
    (r"\.on_input$", "an IA3 of LyCORIS"),
    (r"\.(diff|diff_b|w_norm|b_norm)$", "a full difference of LyCORIS"),
    (r"^bundle_emb\.", "a LoRA with a bundled embedding"),
    (r"^lora_unet_(double|single)_blocks_|^transformer\.single_transformer_blocks", "a FLUX LoRA"),
    (r"^lora_unet_joint_blocks_|^transformer\.transformer_blocks", "an SD3 LoRA"),
    (r"^(lora_te2_|text_encoder_2\.)|^lora_unet_(down|up|mid)_block\w*_transformer_blocks_[1-9]", "an SDXL LoRA"),
    (r"^lora_unet_(input|output)_blocks_|^lora_unet_middle_block_\d", "a LoRA with U-Net names as SDXL has them"),
    (r"lora_[AB](\.|$)|\.processor\.|^unet\..*lora|^text_encoder\..*lora", "a LoRA in the layout of diffusers or PEFT"),
    (r"^(unet|text_encoder):\d+:(up|down)$", "a LoRA of cloneofsimo's"),
    (r"^lycoris_", "a LyCORIS of SimpleTuner"),
    (r"^(lora_transformer_|diffusion_model\..*lora)", "a LoRA of another model family"),
    (r"^(model\.diffusion_model\.|first_stage_model\.|cond_stage_model\.|unet/|vae/)", "a whole model"),
    (r"^(string_to_param|emb_params$|clip_[lg]$)", "an embedding (textual inversion)"),
]


@dataclass(frozen=True)
class LoraFile:
    """A LoRA as read: tensors in the file's dtype under sd-scripts' names.

    `family` is `sd1` or `sd2`, or `unknown` where neither widths nor metadata tell (miniatures).
    """

    path: Path
    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    family: str


def read(path: Path) -> LoraFile:
    """Read a LoRA of SD1 or SD2: `.safetensors`, or a `.pt`/`.ckpt` dict, without executing anything in it.

    Raises:
        UserError: no such file, damaged, or something else than such a LoRA; the message says what it seems to be.
    """
    path = Path(path)
    with open_checkpoint(path) as checkpoint:
        names = checkpoint.names()
        _refuse_foreign(path, names)
        tensors = {mend(name): checkpoint.tensor(name).clone() for name in names}
        metadata = dict(checkpoint.metadata)
    _refuse_wide(path, tensors)
    if len(tensors) < len(names):
        raise UserError(
            f"{path} holds some text-encoder layers under two spellings; it cannot be told which are meant."
        )
    return LoraFile(path, tensors, metadata, recognise_family(tensors, metadata))


def write(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], *, precision: str = "fp16") -> None:
    """Write a LoRA atomically as `.safetensors` (with metadata and its hashes) or `.pt`/`.ckpt` (tensors alone).

    Args:
        tensors: a network's `state_dict()`.
        precision: `float`, `fp16` or `bf16`. An alpha that it cannot hold exactly stays fp32.

    Raises:
        UserError: NaN or infinity in a tensor, a value too large for the precision, or the disk is full. An older file
            of that name is then left as it was.
    """
    path = Path(path)
    ready = convert(tensors, precision)
    if path.suffix in _TORCH_SUFFIXES:
        write_torch(path, ready)
        return
    assert path.suffix == ".safetensors", f"{path} should end in one of {SUFFIXES}"
    fitted = fit(metadata)
    write_safetensors(path, ready, {**fitted, **hashes(ready, fitted)})


def hashes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, str]:
    """Return the `sshs_*` metadata: sd-scripts hashes the file as it would be with its ss_* metadata alone."""
    serialized = safetensors.torch.save(dict(tensors), {k: v for k, v in metadata.items() if k.startswith("ss_")})
    return {"sshs_model_hash": model_hash(serialized), "sshs_legacy_hash": legacy_hash(serialized)}


def check(path: Path, tensors: Mapping[str, Tensor], *, precision: str = "fp16") -> dict[str, float]:
    """Read a written file back, compare it with what was meant, and return the norm of each module's delta.

    Raises:
        UserError: names or values differ, which means that disk or memory failed.
    """
    expected = convert(tensors, precision)
    with open_checkpoint(Path(path)) as checkpoint:
        found = {name: checkpoint.tensor(name).clone() for name in checkpoint.names()}
    wrong = sorted(found.keys() ^ expected.keys())
    wrong += [name for name in sorted(found.keys() & expected.keys()) if not _is_same(found[name], expected[name])]
    if wrong:
        raise UserError(
            f"{path} was written, but reads back otherwise than meant at {len(wrong)} of {len(expected)} tensors "
            f"(first: {wrong[0]}). The disk or the memory failed: do not use this file, save to another disk."
        )
    return norms(found)


def convert(tensors: Mapping[str, Tensor], precision: str) -> dict[str, Tensor]:
    """Return the tensors as a file holds them: sorted, on the CPU, contiguous, in the asked precision.

    Raises:
        UserError: NaN or infinity, or a value too large for the precision.
    """
    return {name: _convert_one(name, tensors[name], precision) for name in sorted(tensors)}


def norms(tensors: Mapping[str, Tensor]) -> dict[str, float]:
    """Return the Frobenius norm of each module's delta, alpha / rank * up @ down."""
    found: dict[str, float] = {}
    for key in sorted(tensors):
        name, _, tail = key.partition(".")
        if tail == "lora_down.weight":
            down, up = tensors[key], tensors[f"{name}.lora_up.weight"]
            rank = down.shape[0]
            alpha = tensors[f"{name}.alpha"].item() if f"{name}.alpha" in tensors else rank
            found[name] = product_norm(down, up).item() * abs(alpha) / rank
    return found


def recognise_family(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """Return `sd1`, `sd2` or `unknown`: by the text width and the text encoder's depth, else by the metadata."""
    widths = {_input_width(tensor) for key, tensor in tensors.items() if _tells_width(key)}
    depth = max((int(found[1]) for key in tensors if (found := re.match(r"lora_te_\w*?layers_(\d+)_", key))), default=0)
    if 1024 in widths or depth >= 12:
        return "sd2"
    if 768 in widths:
        return "sd1"
    version = metadata.get("ss_base_model_version", "")
    return next(
        (family for start, family in (("sd_v1", "sd1"), ("sd_v2", "sd2")) if version.startswith(start)), "unknown"
    )


def _tells_width(key: str) -> bool:
    """True for layers whose input is as wide as the text encoder."""
    return bool(re.search(r"_attn2_to_[kv]\.lora_down|^lora_te_\w*_self_attn_q_proj\.lora_down", key))


def _input_width(down: Tensor) -> int:
    return down.shape[1] if down.dim() > 1 else 0


def mend(key: str) -> str:
    """Return a text-encoder name of SD1 or SD2 as sd-scripts spells it."""
    for pattern, replacement in _MENDED_NAMES:
        key = pattern.sub(replacement, key)
    return key


def _refuse_foreign(path: Path, names: list[str]) -> None:
    """Refuse what is no kohya LoRA of SD1 or SD2, by its keys alone."""
    for pattern, what in _FOREIGN_KEYS:
        if key := next((name for name in names if re.search(pattern, name)), None):
            raise UserError(f"{path} is {what} (it holds {key}); {_WANTED}")
    strange = [name for name in names if name.partition(".")[2] not in _LORA_TAILS]
    if strange or not names:
        raise UserError(f"{path} is no LoRA (it holds {strange[0] if strange else 'nothing'}); {_WANTED}")


def _refuse_wide(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Refuse an SDXL LoRA that no name gives away, by its text width of 2048."""
    for key, tensor in tensors.items():
        if re.search(r"_attn2_to_[kv]\.lora_down", key) and _input_width(tensor) == 2048:
            raise UserError(f"{path} is an SDXL LoRA ({key} takes text of width 2048); {_WANTED}")


_WANTED = (
    "expected is a LoRA for SD 1.x or 2.x as kohya-ss/sd-scripts, WebUI and ComfyUI have it, "
    "with keys like lora_unet_down_blocks_0_....lora_down.weight. Give another file."
)


def _convert_one(name: str, tensor: Tensor, precision: str) -> Tensor:
    wide = tensor.detach().to("cpu", torch.float32)
    if not torch.isfinite(wide).all():
        raise UserError(
            f"{name} holds NaN or infinity, so nothing was saved: its training has broken down. Go back to an earlier "
            "save, or train again at a lower learning rate (`lorasmith train --learning-rate`)."
        )
    narrow = wide.to(PRECISIONS[precision])
    if wide.dim() == 0:  # alpha: never rounded
        return narrow.clone() if torch.equal(narrow.float(), wide) else wide.clone()
    if not torch.isfinite(narrow).all():
        raise UserError(
            f"{name} holds {wide.abs().max().item():g}, which {precision} cannot hold "
            f"(at most {torch.finfo(PRECISIONS[precision]).max:g}), so nothing was saved; "
            f"use --save-precision {'bf16 or float' if precision == 'fp16' else 'float'}."
        )
    return narrow.clone(memory_format=torch.contiguous_format)


def _is_same(found: Tensor, expected: Tensor) -> bool:
    return found.dtype == expected.dtype and torch.equal(found, expected)

"""Recognises a LoRA file by its keys, whoever wrote it, and reads it under sd-scripts' names.

A dialect is a way of spelling the same layers and factors; docs/formats.md says who writes and reads which. What kind
of change a layer holds (LoRA, LoHa, DoRA ...) is told by its tensors and kept as it is. All commands
read with `read_any`; `kohya.read` takes plain LoRA in sd-scripts' form alone.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorasmith.checkpoint import Checkpoint, open_checkpoint
from lorasmith.errors import UserError
from lorasmith.formats import cloneofsimo, peft
from lorasmith.formats.kohya import mend, recognise_family
from lorasmith.models.keys import sd as keys

FAMILIES = {
    "sd1": "SD 1.x", "sd2": "SD 2.x", "sdxl": "SDXL", "sd3": "SD 3", "flux": "FLUX", "another": "another model family",
    "unknown": "a family that nothing in it tells",
}  # fmt: skip
DIALECTS = {
    "kohya": "sd-scripts (kohya)",
    "ldm": "sd-scripts' form, with LDM's names for the U-Net",
    "lycoris": "SimpleTuner's LyCORIS",
    "d8ahazard": "d8ahazard's, for extra networks",
    "diffusers": "diffusers with PEFT (0.22 and later)",
    "diffusers-0.21": "diffusers 0.21",
    "diffusers-0.14": "attention processors of diffusers before 0.21",
    "peft": "PEFT",
    "cloneofsimo": "cloneofsimo's, .safetensors",
    "list": "a list of cloneofsimo's or d8ahazard's",
}

# --- kinds of changes ------------------------------------------------------------------------------------------------

# What a layer's tensors make it: the first kind whose tensors are all there. Alpha is allowed with any.
_KINDS: list[tuple[str, set[str], set[str]]] = [  # name, tensors that it needs, tensors that it may have
    ("DoRA", {"lora_down.weight", "lora_up.weight", "dora_scale"}, {"lora_mid.weight"}),
    ("Tucker LoCon", {"lora_down.weight", "lora_up.weight", "lora_mid.weight"}, set()),
    ("LoRA", {"lora_down.weight", "lora_up.weight"}, set()),
    ("LoHa", {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}, {"hada_t1", "hada_t2", "dora_scale"}),
    ("LoKr", {"lokr_w1", "lokr_w2"}, {"dora_scale"}),
    ("LoKr", {"lokr_w1_a", "lokr_w1_b", "lokr_w2"}, {"dora_scale"}),
    ("LoKr", {"lokr_w1", "lokr_w2_a", "lokr_w2_b"}, {"lokr_t2", "dora_scale"}),
    ("LoKr", {"lokr_w1_a", "lokr_w1_b", "lokr_w2_a", "lokr_w2_b"}, {"lokr_t2", "dora_scale"}),
    ("OFT", {"oft_blocks"}, {"rescale"}),
    ("IA3", {"weight", "on_input"}, set()),
    ("GLoRA", {"a1.weight", "a2.weight", "b1.weight", "b2.weight"}, set()),
    ("full", {"diff"}, {"diff_b"}),
    ("full", {"diff_b"}, set()),
    ("norm", {"w_norm"}, {"b_norm"}),
    ("norm", {"b_norm"}, set()),
]
_TAILS = {"alpha"}.union(*(needed | allowed for _, needed, allowed in _KINDS))
_TAIL = "|".join(sorted(map(re.escape, _TAILS), key=len, reverse=True))


def kind_of(tensors: Mapping[str, Tensor]) -> str | None:
    """Return what kind of change a layer's tensors are; None: an incomplete or unknown one."""
    tails = tensors.keys() - {"alpha"}
    name = next((name for name, needed, allowed in _KINDS if needed <= tails <= needed | allowed), None)
    return "BOFT" if name == "OFT" and tensors["oft_blocks"].dim() == 4 else name


# --- keys ------------------------------------------------------------------------------------------------------------

_PEFT_TAIL = r"(?P<tail>lora_[AB](\.default)?\.weight|lora_magnitude_vector(\.default)?(\.weight)?)"
_TAIL_IN_KOHYA = {
    "lora_A": "lora_down.weight", "lora_B": "lora_up.weight", "lora_magnitude_vector": "dora_scale",
    "down": "lora_down.weight", "up": "lora_up.weight",
}  # fmt: skip
_LDM_MODULE = r"(input_blocks_\d|output_blocks_\d|middle_block_\d|time_embed_\d|out_\d)\w*"

# Whole key -> dialect. "text": the dialect is as the U-Net's is. The first that fits.
_KEYS: list[tuple[str, re.Pattern[str]]] = [
    (dialect, re.compile(pattern + r"\Z", re.ASCII))
    for dialect, pattern in [
        ("cloneofsimo", r"(?P<part>unet|text_encoder):(?P<index>\d{1,5}):(?P<tail>up|down)"),
        ("ldm", rf"(?P<part>lora_unet)_(?P<module>{_LDM_MODULE})\.(?P<tail>{_TAIL})"),
        ("text", rf"(?P<part>lora_te\d?)_(?P<module>\w+)\.(?P<tail>{_TAIL})"),
        ("kohya", rf"(?P<part>lora_unet|lora_transformer|oft_unet)_(?P<module>\w+)\.(?P<tail>{_TAIL})"),
        ("lycoris", rf"(?P<part>lycoris)_(?P<module>\w+)\.(?P<tail>{_TAIL})"),
        ("peft", rf"base_model\.model\.(?P<module>[\w.]+?)\.{_PEFT_TAIL}"),
        (
            "diffusers-0.14",
            r"((?P<part>unet)\.)?(?P<module>[\w.]+\.attn\d)\.processor\.(?P<layer>to_(q|k|v|out))_lora\.(?P<tail>down|up)\.weight",
        ),
        (
            "text",
            r"(?P<part>text_encoder(_2)?)\.(?P<module>[\w.]+)\.(?P<layer>to_(q|k|v|out))_lora\.(?P<tail>down|up)\.weight",
        ),
        ("text", r"(?P<part>text_encoder(_2)?)\.(?P<module>[\w.]+)\.lora_linear_layer\.(?P<tail>down|up)\.weight"),
        ("diffusers-0.21", r"(?P<part>unet)\.(?P<module>[\w.]+)\.lora\.(?P<tail>down|up)\.weight"),
        (
            "diffusers",
            rf"(?P<part>unet|text_encoder(_2)?|transformer|diffusion_model)\.(?P<module>[\w.]+?)\.{_PEFT_TAIL}",
        ),
        ("diffusers", rf"(?P<part>transformer|diffusion_model)\.(?P<module>[\w.]+?)\.(?P<tail>{_TAIL})"),
    ]
]
_LAYERS_OF_OLD_TEXT = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}
_STARTS = {
    "unet": "lora_unet_", "text_encoder": "lora_te_", "text_encoder_2": "lora_te2_", "transformer": "lora_transformer_",
    "diffusion_model": "lora_unet_",
}  # fmt: skip
_IS_TEXT = re.compile(r"(text_model[._])?(encoder[._]layers|embeddings|final_layer_norm)[._]", re.ASCII)

# What else is found in such files: a key -> what it is.
_EXTRAS = [
    (re.compile(r"bundle_emb\.|<.*>\Z"), "a bundled embedding"),
    (re.compile(r"(unet|text_encoder)\.?.*\.(alpha|bias)\Z"), "a number without a layer"),
]

# What is no LoRA: a key -> what it is.
_OTHER_FILES = [
    (
        re.compile(r"model\.diffusion_model\.|first_stage_model\.|cond_stage_model\.|conditioner\.|unet/|vae/"),
        "a whole model",
    ),
    (re.compile(r"string_to_param|emb_params\Z|clip_[lg]\Z|<[^>]*>\Z"), "an embedding (textual inversion)"),
    (re.compile(r"(control_model|controlnet_\w+|input_hint_block)\."), "a ControlNet"),
    (re.compile(r"(encoder|decoder)\.(conv_in|down|up|mid)"), "a VAE"),
]

# Families that are told and not converted: how many dimensions never matters, names give them away.
_OTHER_FAMILIES = [
    ("flux", re.compile(r"lora_(unet|transformer)_(double|single)_(blocks|transformer_blocks)_")),
    ("flux", re.compile(r"lora_transformer_single_transformer_blocks_")),
    ("sd3", re.compile(r"lora_unet_joint_blocks_|lora_transformer_transformer_blocks_\d+_(attn_)?add_")),
    ("sdxl", re.compile(r"lora_te2_|lora_unet_(input|output|down|up|mid|middle)_block\w*_transformer_blocks_[1-9]")),
]


@dataclass(frozen=True)
class AnyLora:
    """A LoRA file of any dialect, under sd-scripts' names, in the file's own precision.

    Args:
        dialect: a name of `DIALECTS`.
        family: a name of `FAMILIES`; `unknown` where nothing tells (miniatures).
        tensors: by `layer.tail`.
        names: how each of `tensors` is called in the file.
        extras: what in the file belongs to no layer: key -> what it is.
        mended: layers of which the file's name was one that no program reads, or one of several.
        notes: what was assumed, for the user.
        files: all that were read.
    """

    path: Path
    dialect: str
    family: str
    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    names: dict[str, str]
    extras: dict[str, str] = field(default_factory=dict)
    mended: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    files: tuple[Path, ...] = ()

    def layers(self) -> dict[str, dict[str, Tensor]]:
        """Return the tensors by layer and tail."""
        return by_layer(self.tensors)


def by_layer(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Return tensors called `layer.tail` by layer and tail."""
    layers: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        layer, _, tail = name.partition(".")
        layers.setdefault(layer, {})[tail] = tensor
    return layers


def read_any(path: Path) -> AnyLora:
    """Read a LoRA of any dialect: a file, or a folder as PEFT saves it.

    Raises:
        UserError: missing, damaged, incomplete, of two dialects at once, or no LoRA; the message says what it seems to
            be.
    """
    path = Path(path)
    if path.is_dir() and (parts := peft.adapter_files(path)):
        return _read_peft_folder(path, parts)
    with open_checkpoint(path) as checkpoint:
        names = checkpoint.names()
        if names and all(name.isdigit() for name in names):
            return _read_list(path, checkpoint)
        found = {name: match for name in names if (match := _match(name))}
        dialect = _dialect(path, names, {name: form for name, (form, _) in found.items()}, checkpoint.metadata)
        extras = _extras(path, [name for name in names if name not in found])
        stored = {name: checkpoint.tensor(name).clone() for name in found}
        metadata = dict(checkpoint.metadata)
    if dialect == "cloneofsimo":
        return _from_pairs(path, dialect, cloneofsimo.pairs(path, stored), metadata, extras)
    renamed = {name: _saved_name(match) for name, (_, match) in found.items()}
    alphas, notes = _alphas(path, dialect, metadata, renamed)
    return _finish(path, dialect, stored, renamed, metadata, extras, alphas=alphas, notes=notes)


def _match(name: str) -> tuple[str, re.Match[str]] | None:
    return next(((dialect, match) for dialect, pattern in _KEYS if (match := pattern.match(name))), None)


def _dialect(path: Path, names: Sequence[str], found: Mapping[str, str], metadata: Mapping[str, str]) -> str:
    """Return the one dialect of these keys."""
    if not found:
        what = next((what for pattern, what in _OTHER_FILES for name in names if pattern.match(name)), "no LoRA")
        raise UserError(
            f"{path} is {what} (it holds {min(names, default='nothing')}); expected is a LoRA file, of any program."
        )
    counts = Counter(form for form in found.values() if form != "text")
    if counts.keys() == {"ldm"} and _other_family(found) == "sdxl":
        counts = Counter({"kohya": 1})  # sd-scripts too has LDM's names for SDXL
    if not counts:
        dotted = any(name.startswith("text_encoder") for name in found)
        counts = Counter({"diffusers-0.21" if dotted else "kohya": 1})
    if len(counts) > 1:
        examples = {form: next(name for name, own in found.items() if own == form) for form in counts}
        told = " and ".join(f"{counts[form]:,} like {examples[form]}" for form in sorted(counts))
        raise UserError(
            f"{path} mixes names of several programs ({told}): it cannot be told which are meant. "
            "Get the file again as it was first written."
        )
    (dialect,) = counts
    underscored, dotted = {"kohya", "ldm", "lycoris"}, {"diffusers", "diffusers-0.14", "diffusers-0.21"}
    for name, form in found.items():
        if form == "text" and dialect not in (underscored if name.startswith("lora_te") else dotted):
            raise UserError(
                f"{path} mixes names of several programs ({name} is none of {DIALECTS[dialect]}): it cannot be told "
                "which are meant. Get the file again as it was first written."
            )
    if dialect == "kohya" and metadata.get("lora_key_encoding") == "extra_network_diffusers":
        return "d8ahazard"
    return dialect


def _extras(path: Path, names: Iterable[str]) -> dict[str, str]:
    """Return what each key is that belongs to no layer.

    Raises:
        UserError: a part of a whole model.
    """
    found = {}
    for name in names:
        if _OTHER_FILES[0][0].match(name):
            raise UserError(f"{path} holds a whole model beside a LoRA ({name}); expected is a LoRA file.")
        found[name] = next((what for pattern, what in _EXTRAS if pattern.match(name)), "unknown")
    return found


def _saved_name(match: re.Match[str]) -> str:
    """Return sd-scripts' name, as far as it follows from the file's: `layer.tail`."""
    parts = match.groupdict()
    part, module = parts.get("part"), parts["module"]
    tail = _TAIL_IN_KOHYA.get(parts["tail"].partition(".")[0], parts["tail"])
    if layer := parts.get("layer"):
        is_unet = part in (None, "unet")
        module += "." + (layer.replace("to_out", "to_out.0") if is_unet else _LAYERS_OF_OLD_TEXT[layer])
    if part in ("lora_unet", "lora_transformer", "oft_unet") or (part and part.startswith("lora_te")):
        return f"{part}_{module}.{tail}"
    if part in (None, "lycoris"):
        part = "text_encoder" if _IS_TEXT.match(module) else "unet"
    return f"{_STARTS[part]}{module.replace('.', '_')}.{tail}"


def _alphas(
    path: Path, dialect: str, metadata: Mapping[str, str], renamed: Mapping[str, str]
) -> tuple[Callable[[str, int], float | None], list[str]]:
    """Return what tells a layer's alpha from its rank, where that lies beside the tensors."""
    if dialect == "diffusers":
        configs = peft.configs_in_header(path, metadata)
        found = {"lora_unet": configs.get("unet", {}), "lora_te": configs.get("text_encoder", {})}
        return _alpha_from(path, found), []
    if dialect == "peft":
        config, note = peft.config_beside(path)
        return _alpha_from(path, {"lora_unet": config, "lora_te": config}), [note] if note else []
    return (lambda _layer, _rank: None), []


def _alpha_from(path: Path, configs: Mapping[str, Mapping[str, Any]]) -> Callable[[str, int], float | None]:
    def alpha(layer: str, rank: int) -> float | None:
        config = next((config for start, config in configs.items() if layer.startswith(start)), {})
        return peft.alpha_of(path, config, layer, rank)

    return alpha


def _finish(
    path: Path,
    dialect: str,
    stored: Mapping[str, Tensor],
    renamed: Mapping[str, str],
    metadata: dict[str, str],
    extras: dict[str, str],
    *,
    alphas: Callable[[str, int], float | None],
    notes: Sequence[str] = (),
) -> AnyLora:
    """Return the file under its final names, after checking that each layer is whole."""
    family = _other_family(renamed.values())
    final = {name: _final_name(saved, dialect, family) for name, saved in renamed.items()}
    doubles = [saved for saved, count in Counter(final.values()).items() if count > 1]
    if doubles:
        twice = [name for name, saved in final.items() if saved == doubles[0]]
        raise UserError(
            f"{path} holds {len(doubles)} tensors under two spellings ({' and '.join(twice)}); "
            "it cannot be told which is meant. Get the file again as it was first written."
        )
    tensors = {saved: _shaped(name, saved, stored[name]) for name, saved in final.items()}
    layers = by_layer(tensors)
    for layer, own in layers.items():
        _check_layer(path, layer, own)
        if "alpha" not in own and "lora_down.weight" in own:
            rank = own["lora_down.weight"].shape[0]
            given = alphas(layer, rank)
            if given is not None and given != rank:
                tensors[f"{layer}.alpha"] = torch.tensor(given)
    mended = dict.fromkeys(
        saved.partition(".")[0] for name, saved in final.items() if name.startswith("lora_te") and name != saved
    )
    family = family or _widest(tensors) or recognise_family(tensors, metadata)
    names = {saved: name for name, saved in final.items()}
    return AnyLora(path, dialect, family, tensors, metadata, names, extras, tuple(mended), tuple(notes), (path,))


def _final_name(saved: str, dialect: str, family: str | None) -> str:
    """Mend the name, and put diffusers' names for LDM's."""
    layer, _, tail = saved.partition(".")
    if dialect == "ldm":
        layer = _LDM_NAMES.get(layer, layer)
    if family == "sdxl":  # two text encoders: the first one's name stays
        layer = re.sub(r"^lora_te(?=_)", "lora_te1", layer)
        return re.sub(r"^lora_te1_(?=encoder_layers_)", "lora_te1_text_model_", layer) + f".{tail}"
    if family is None:
        layer = mend(layer)
    return f"{layer}.{tail}"


_LDM_NAMES = keys.ldm_adapter_names()


def _other_family(names: Iterable[str]) -> str | None:
    for name in names:
        for family, pattern in _OTHER_FAMILIES:
            if pattern.match(name):
                return family
        if name.startswith("lora_transformer_"):
            return "another"
    return None


def _widest(tensors: Mapping[str, Tensor]) -> str | None:
    wide = [t for name, t in tensors.items() if re.search(r"_attn2_to_[kv]\.lora_down", name)]
    return "sdxl" if any(t.dim() > 1 and t.shape[1] == 2048 for t in wide) else None


def _shaped(name: str, saved: str, tensor: Tensor) -> Tensor:
    """Return alpha as a single number, and PEFT's magnitudes, (out) or (1, out, 1, 1), as LyCORIS has them."""
    if saved.endswith((".alpha", ".on_input")) and tensor.numel() == 1:
        return tensor.reshape(())
    if "lora_magnitude_vector" in name and tensor.dim():
        return tensor.reshape(-1, *[1] * max(1, tensor.dim() - 1))  # (out, 1) or (out, 1, 1, 1)
    return tensor


def _check_layer(path: Path, layer: str, own: Mapping[str, Tensor]) -> None:
    """Refuse a layer that is incomplete, or of which the tensors do not fit each other."""
    kind, tails = kind_of(own), ", ".join(sorted(own))
    if kind is None:
        raise UserError(
            f"{path} is incomplete or damaged: of {layer} there is {tails}, which is no change that is known here."
        )
    if "alpha" in own and (own["alpha"].dim() or own["alpha"].is_complex()):
        raise UserError(f"{path} is damaged: {layer}.alpha is {list(own['alpha'].shape)}, expected is one number.")
    for tail, tensor in own.items():
        if not tensor.numel():
            raise UserError(f"{path} is damaged: {layer}.{tail} is empty ({list(tensor.shape)}).")
    if "lora_down.weight" not in own:
        return
    down, up = own["lora_down.weight"], own["lora_up.weight"]
    fits = down.dim() in (2, 3, 4, 5) and up.dim() == down.dim() and up.shape[1] == down.shape[0]
    if not fits or not (down.is_floating_point() and up.is_floating_point()):
        raise UserError(
            f"{path} is damaged: the factors of {layer} do not fit each other: down {list(down.shape)} {down.dtype}, "
            f"up {list(up.shape)} {up.dtype}."
        )


# --- lists and pairs -------------------------------------------------------------------------------------------------


def _read_list(path: Path, checkpoint: Checkpoint) -> AnyLora:
    """Read a list of factors, and the text encoder's beside it."""
    stored = [checkpoint.tensor(name).clone() for name in checkpoint.names()]
    found = {cloneofsimo.part_of(path, own := cloneofsimo.paired(path, stored)): own}
    files = [path]
    sidecar = cloneofsimo.find_sidecar(path) if "unet" in found else None
    if sidecar is not None:
        with open_checkpoint(sidecar) as other:
            stored = [other.tensor(name).clone() for name in other.names()]
            found["text_encoder"] = cloneofsimo.paired(sidecar, stored)
        files.append(sidecar)
    return replace(_from_pairs(path, "list", found, {}, {}), files=tuple(files))


def _from_pairs(
    path: Path,
    dialect: str,
    pairs: Mapping[str, Sequence[tuple[Tensor, Tensor]]],
    metadata: dict[str, str],
    extras: dict[str, str],
) -> AnyLora:
    """Return numbered pairs (up, down) under names."""
    stored, renamed = {}, {}
    for part, own in pairs.items():
        for number, (layer, (up, down)) in enumerate(zip(cloneofsimo.layers(path, part, own), own, strict=True)):
            for tail, tensor in (("up", up), ("down", down)):
                key = f"{part}:{number}:{tail}"
                stored[key], renamed[key] = tensor, f"{layer}.{_TAIL_IN_KOHYA[tail]}"
    return _finish(path, dialect, stored, renamed, metadata, extras, alphas=lambda _layer, _rank: None)


def _read_peft_folder(path: Path, parts: Mapping[str, Path]) -> AnyLora:
    """Read PEFT's folder of one component, or the folder of both components' folders."""
    read = [read_any(file) for file in parts.values()]
    first = read[0]
    for other in read[1:]:
        if both := sorted(first.tensors.keys() & other.tensors.keys()):
            raise UserError(f"{path} holds {both[0]} twice, in {' and '.join(str(file) for file in parts.values())}.")
    tensors = {name: tensor for one in read for name, tensor in one.tensors.items()}
    metadata = {name: value for one in reversed(read) for name, value in one.metadata.items()}
    return replace(
        first,
        path=path,
        tensors=tensors,
        metadata=metadata,
        family=recognise_family(tensors, metadata),
        names={saved: name for one in read for saved, name in one.names.items()},
        extras={name: what for one in read for name, what in one.extras.items()},
        notes=tuple(dict.fromkeys(note for one in read for note in one.notes)),
        files=tuple(parts.values()),
    )


def header_layout(metadata: Mapping[str, str]) -> list[str]:
    """Return the header's entries that tell of the file's layout, and mean nothing in another."""
    fixed = {"format", "lora_adapter_metadata", "lora_key_encoding", "lora_unet_rank", "lora_te_rank"}
    fixed |= {"unet", "text_encoder"}
    return [
        name
        for name, value in metadata.items()
        if name in fixed or re.match(r"(unet|text_encoder):\d+:rank\Z", name) or value == "<embed>"
    ]


def holds_lora(path: Path) -> bool:
    """Return whether a file or folder has the layers of a LoRA in it, whole or not.

    Raises:
        UserError: it cannot be opened.
    """
    if Path(path).is_dir() and peft.adapter_files(Path(path)):
        return True
    with open_checkpoint(path) as checkpoint:
        names = checkpoint.names()
    return any(_match(name) for name in names) or all(name.isdigit() for name in names)

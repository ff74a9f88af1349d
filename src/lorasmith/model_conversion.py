"""Turns a Stable Diffusion 1 or 2 model from one file into a diffusers folder, and back, tensor by tensor.

Only names, fused tensors and dimensions of 1 differ between both forms, so a model computes the same in either; numbers
are not touched. One file also becomes another kind of file, with all that is in it. The whole model is checked before
anything is written, and what was written is read back and compared before it takes its place.
"""

import copy
import json
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial, reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorasmith import model_families
from lorasmith.checkpoint import Checkpoint, atomic_file, open_checkpoint, synced_folder
from lorasmith.errors import UserError
from lorasmith.formats.kohya import PRECISIONS
from lorasmith.model_families import ModelFacts
from lorasmith.models import sd, tokenizer
from lorasmith.models.keys import sd as keys
from lorasmith.models.keys.sd import Table
from lorasmith.models.sd import Component
from lorasmith.rewriting import TORCH_SUFFIXES, Pending, check_space, write_pending

FORMS = {"checkpoint": "one file", "diffusers": "a diffusers folder"}
_NUM_SHOWN = 3
_PREDICTION_KEY = "modelspec.prediction_type"
_OWN_METADATA = ("format", _PREDICTION_KEY, sd.ARCHITECTURE_KEY)
_LAST_SCALE = math.log(100)  # where CLIP stops its scale

_AVERAGE = "the moving average (EMA) of the weights"
_NO_HEADER = (
    "this kind of file has no place for metadata: nothing in it says what the model predicts, and programs must be "
    "told. The whole model was in memory to write it."
)

# What models hold beside their weights: names begin so. The rest is unknown, and told as such.
_EXTRAS = {
    _AVERAGE: (keys.EMA,),
    "OpenCLIP's last layer and projection, which Stable Diffusion does not use": (
        f"{keys.OPENCLIP}transformer.resblocks.{keys.NUM_OPENCLIP_LAYERS - 1}.",
        f"{keys.OPENCLIP}text_projection",
        f"{keys.OPENCLIP}logit_scale",
    ),
    "constants, which programs compute": (
        keys.POSITION_IDS, f"{keys.OLD_CLIP}embeddings.position_ids", f"{keys.OPENCLIP}attn_mask",
        "text_encoder/text_model.embeddings.position_ids", "text_encoder/embeddings.position_ids",
        "alphas_cumprod", "betas", "sqrt_", "log_one_minus_", "posterior_", "lvlb_weights", "logvar",
    ),
    "the VAE's loss, which only its training needs": (f"{keys.VAE}loss.",),
}  # fmt: skip

_PARTS_OF_NAMES = {
    "U-Net": (keys.UNET, keys.EMA + "diffusion_model", "unet/", "input_blocks.", "down_blocks."),
    "text encoder": ("cond_stage_model.", "conditioner.", "text_encoder/", "text_model.", "encoder.layers."),
    "VAE": (keys.VAE, "vae/", "encoder.conv_in.", "decoder.conv_in."),
}
_OTHER_MODELS = ("transformer/", "control_model.", "controlnet_cond_embedding.", "model.")

_CLASSES = {
    "feature_extractor": (None, None),
    "image_encoder": (None, None),
    "safety_checker": (None, None),
    "text_encoder": ("transformers", "CLIPTextModel"),
    "tokenizer": ("transformers", "CLIPTokenizer"),
    "unet": ("diffusers", "UNet2DConditionModel"),
    "vae": ("diffusers", "AutoencoderKL"),
}
_SCHEDULE = {
    "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000,
    "set_alpha_to_one": False, "steps_offset": 1, "clip_sample": False,
}  # fmt: skip
# As in the folders that were published: SD 1.5 and 2.1-base, and SD 2.1.
_SCHEDULERS = {
    "epsilon": {"_class_name": "PNDMScheduler", **_SCHEDULE, "skip_prk_steps": True},
    "v_prediction": {"_class_name": "DDIMScheduler", **_SCHEDULE},
}
_WEIGHTS = {
    "unet": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
}
_PADS = {"sd1": "<|endoftext|>", "sd2": "!"}  # token 0, as in SD2's own folders


@dataclass(frozen=True)
class Conversion:
    """A model as it will be written.

    Args:
        files: tensors by file, of which one has an empty name where the output itself is a file.
        metadata: of the file, or of the U-Net's.
        notes: sentences for the user on what is not as it was.
        unknown: tensors that are left out, since neither form has a place for them.
    """

    facts: ModelFacts
    components: Mapping[str, Component]
    files: Mapping[str, Mapping[str, Pending]]
    metadata: Mapping[str, str]
    notes: list[str]
    unknown: list[str]

    @property
    def num_tensors(self) -> int:
        return sum(map(len, self.files.values()))


def is_model(path: Path) -> bool:
    """True for a base model or a part of one, by its tensors' names, and not for LoRAs and other things."""
    if not path.exists():
        return False
    try:
        with open_checkpoint(path) as checkpoint:
            names = checkpoint.names()
    except UserError:
        if path.is_file():
            raise
        return False  # a folder of something else
    return _is_of_model(names)


def prepare(
    checkpoint: Checkpoint, to: str, output: Path, *, prediction: str | None, precision: str | None
) -> Conversion:
    """Return what the other form will hold.

    Args:
        to: `checkpoint`, one file, or `diffusers`, a folder.
        output: the place; its ending says which kind of file.
        prediction: what the U-Net predicts, as the user says; None: as the model says.
        precision: `float`, `fp16` or `bf16`; None: each tensor's own.

    Raises:
        UserError: it has that form already; no whole model of a family that is converted; it is not known what it
            predicts.
    """
    _check_whole(checkpoint)
    is_copy = _is_copy(checkpoint, to, output, precision)
    if model_families.adapter_places(checkpoint)[0] not in _PADS:
        raise UserError(f"{checkpoint.path}: only Stable Diffusion 1.x and 2.x are converted.")
    facts = model_families.describe(checkpoint, prediction=prediction)
    components = sd.components(checkpoint)
    if facts.notes and not is_copy:  # it is a guess; a wrong one gives noise
        raise UserError(
            f"{checkpoint.path} does not say what it predicts; give --prediction v_prediction (the 768 models of SD "
            "2.x) or --prediction epsilon (its 512 base models)."
        )
    own = model_families.describe(checkpoint).prediction
    metadata = {name: text for name, text in checkpoint.metadata.items() if name not in _OWN_METADATA}
    if is_copy:
        files, notes, unknown = {"": _as_it_is(checkpoint)}, _kept(checkpoint), []
        metadata = checkpoint.metadata | (_said(checkpoint, facts) if prediction else {})
    elif to == "diffusers":
        files, (notes, unknown) = _folder(checkpoint, components), _left_out(checkpoint, components)
    else:
        tensors, added = _single_file(checkpoint, components, facts)
        notes, unknown = _left_out(checkpoint, components)
        files, notes = {"": tensors}, [*notes, *added, *_left_in_folder(checkpoint)]
        metadata |= _said(checkpoint, facts)
    if hashes := [name for name in metadata if "hash" in name]:
        metadata = {name: text for name, text in metadata.items() if name not in hashes}
        notes.append(f"left out, hashes of the old file in its metadata: {', '.join(hashes)}.")
    if facts.prediction != own:
        notes.append(f"by itself it would be taken for a model that predicts {own}; --prediction says otherwise.")
    if output.suffix.lower() in TORCH_SUFFIXES:
        notes.append(_NO_HEADER)
    files = {file: {name: _narrowed(name, own, precision) for name, own in of.items()} for file, of in files.items()}
    return Conversion(facts, components, files, metadata, notes, unknown)


def _is_copy(checkpoint: Checkpoint, to: str, output: Path, precision: str | None) -> bool:
    """Return whether one file becomes another kind of file, or one of other numbers.

    Raises:
        UserError: it would become just what it is.
    """
    is_file = checkpoint.format != "diffusers"
    if is_file != (to == "checkpoint"):
        return False
    if is_file and (precision or (output.suffix.lower() in TORCH_SUFFIXES) != (checkpoint.format == "torch")):
        return True
    other = next(form for form in FORMS if form != to)
    more = "; for another kind of file give another ending, for other numbers --save-precision" if is_file else ""
    raise UserError(
        f"{checkpoint.path} is {FORMS[to]} already; nothing was written. For the other form give --to {other}{more}."
    )


def _said(checkpoint: Checkpoint, facts: ModelFacts) -> dict[str, str]:
    """Return what one file's metadata say of a model that a folder's configurations tell of."""
    said = {_PREDICTION_KEY: {"v_prediction": "v"}.get(facts.prediction, facts.prediction)}
    said["modelspec.architecture"] = checkpoint.metadata.get("modelspec.architecture", facts.architecture)
    if told := sd.architecture(checkpoint, facts):
        said[sd.ARCHITECTURE_KEY] = json.dumps(told)
    return said


def write(output: Path, conversion: Conversion) -> None:
    """Write the model in one step; what was at `output` stays until it is whole, and read back.

    Raises:
        UserError: there is no room, a number does not fit the precision, or it reads back otherwise.
    """
    check_space(output, sum(tensor.num_bytes for own in conversion.files.values() for tensor in own.values()))
    if "" in conversion.files:
        with atomic_file(output) as temporary:
            if output.suffix.lower() in TORCH_SUFFIXES:  # torch knows no way to write a model tensor by tensor
                made = {name: tensor.make() for name, tensor in conversion.files[""].items()}
                torch.save({"state_dict": made}, temporary)
            else:
                write_pending(temporary, conversion.files[""], conversion.metadata)
            _check_written(temporary, conversion.files[""])
        return
    with synced_folder(output) as temporary:
        for part, tensors in conversion.files.items():
            folder = temporary / part
            folder.mkdir()
            write_pending(folder / _WEIGHTS[part], tensors, conversion.metadata if part == "unet" else {})
            _check_written(folder / _WEIGHTS[part], tensors)
        _write_settings(temporary, conversion)


def _check_written(file: Path, tensors: Mapping[str, Pending]) -> None:
    """Read a file back, and compare names, types, shapes and every bit with what is meant.

    Raises:
        UserError: they differ.
    """
    with open_checkpoint(file) as found:
        wrong = sorted(tensors.keys() ^ found.names())
        wrong += [name for name in found.names() if name in tensors and not _is_same(found, name, tensors[name])]
    if wrong:
        raise UserError(
            f"what was written reads back otherwise than meant at {len(wrong):,} of {len(tensors):,} tensors (first: "
            f"{wrong[0]}), and was thrown away: the disk or the memory failed; write to another disk."
        )


def _is_same(found: Checkpoint, name: str, meant: Pending) -> bool:
    if (tuple(found.shape(name)), found.dtype(name)) != (meant.shape, meant.dtype):
        return False
    read, made = (tensor.contiguous().flatten().view(torch.uint8) for tensor in (found.tensor(name), meant.make()))
    return torch.equal(read, made)  # bits, for NaN is not equal to itself


def check_output(checkpoint: Checkpoint, to: str, output: Path, *, overwrite: bool) -> None:
    """Check that the other form can be written there.

    Raises:
        UserError: another kind of name, something is there, or it is what is read.
    """
    suffix = output.suffix.lower()
    if to == "checkpoint" and suffix not in (".safetensors", *TORCH_SUFFIXES):
        raise UserError(
            f"--output {output}: for --to checkpoint expected is a name that ends in .safetensors or .ckpt."
        )
    if to == "diffusers" and suffix in (".safetensors", *TORCH_SUFFIXES):
        raise UserError(
            f"--output {output}: for --to diffusers expected is a folder's name, such as {output.with_suffix('')}."
        )
    given, target = checkpoint.path.resolve(), output.resolve()
    if given == target or given in target.parents or target in given.parents:
        raise UserError(f"--output {output} would replace or lie in {checkpoint.path}, which is read; give another.")
    parent = next(folder for folder in output.absolute().parents if folder.exists())
    if not parent.is_dir():
        raise UserError(f"--output {output}: {parent} is a file, so nothing can be written into it; give another.")
    if not output.exists():
        return
    if output.is_dir() != (to == "diffusers"):
        raise UserError(f"--output {output} is a {'folder' if output.is_dir() else 'file'}; give another name.")
    if not overwrite:
        raise UserError(f"--output {output} exists already; give another name, or --overwrite to replace it.")
    if output.is_dir() and any(output.iterdir()) and not (output / "model_index.json").is_file():
        raise UserError(f"--output {output} is a folder that holds no diffusers model; give another name.")


# --- what it is -------------------------------------------------------------------------------------------------------


def _is_of_model(names: Collection[str]) -> bool:
    spaces = tuple(space for own in _PARTS_OF_NAMES.values() for space in own) + _OTHER_MODELS
    return any(name.startswith(spaces) for name in names) and not any("lora" in name for name in names)


def _check_whole(checkpoint: Checkpoint) -> None:
    names = checkpoint.names()
    if not _is_of_model(names):
        raise UserError(
            f"{checkpoint.path} is no base model (it has {len(names):,} tensors, named like "
            f"{_shorten(names) or 'nothing'}); only these have the forms checkpoint and diffusers. A LoRA is put into "
            "one with `lorasmith merge`."
        )
    there = [part for part, spaces in _PARTS_OF_NAMES.items() if any(name.startswith(spaces) for name in names)]
    missing = [part for part in _PARTS_OF_NAMES if part not in there]
    if there and missing:
        raise UserError(
            f"{checkpoint.path} is not a whole model: it holds a {' and a '.join(there)}, but no "
            f"{' and no '.join(missing)}. Both forms are of all three; give the complete model."
        )


def _left_out(checkpoint: Checkpoint, components: Mapping[str, Component]) -> tuple[list[str], list[str]]:
    """Return a note for every kind of tensor that is left out, and the names of those of no known kind."""
    used = {source.name for own in components.values() for source in own.table.values()}
    names = [name for name in checkpoint.names() if name not in used]
    notes = []
    for kind, starts in _EXTRAS.items():
        if own := [name for name in names if name.startswith(starts)]:
            notes.append(f"left out, {kind}: {len(own):,} tensors: {_shorten(own)}")
    if components["unet"].table["conv_in.weight"].name.startswith(keys.EMA):
        notes.append("the model holds its U-Net only as a moving average (EMA), which became its weights.")
    every = tuple(start for starts in _EXTRAS.values() for start in starts)
    return notes, [name for name in names if not name.startswith(every)]


def _kept(checkpoint: Checkpoint) -> list[str]:
    """Return notes on a file of which all tensors become another file's."""
    notes = []
    if checkpoint.format == "torch":
        notes.append("only tensors are kept, not what a training program left beside them, such as numbers of steps.")
    if average := [name for name in checkpoint.names() if name.startswith(keys.EMA)]:
        notes.append(f"kept, {_AVERAGE}: {len(average):,} tensors")
    return notes


def _left_in_folder(checkpoint: Checkpoint) -> list[str]:
    """Return a note on the folder's files that one file has no place for."""
    read = {file.relative_to(checkpoint.path) for file in checkpoint.files()}
    read |= {Path("model_index.json"), *(Path(part) / "config.json" for part in _WEIGHTS)}
    every = (file.relative_to(checkpoint.path) for file in checkpoint.path.rglob("*") if file.is_file())
    left = sorted(f.as_posix() for f in every if f not in read and not any(p.startswith(".") for p in f.parts))
    return [f"left out, files that one file has no place for: {', '.join(left)}"] if left else []


# --- tensors ----------------------------------------------------------------------------------------------------------


def _as_it_is(checkpoint: Checkpoint) -> dict[str, Pending]:
    return {
        name: Pending(tuple(checkpoint.shape(name)), checkpoint.dtype(name), partial(checkpoint.tensor, name))
        for name in checkpoint.names()
    }


def _folder(checkpoint: Checkpoint, components: Mapping[str, Component]) -> dict[str, dict[str, Pending]]:
    tables = {
        "unet": keys.diffusers_unet(""),
        "vae": keys.diffusers_vae(""),
        # The prefix is spelled out: transformers < 5.6 cannot place names without it, and later ones take both.
        "text_encoder": keys.clip_text("text_model.", keys.NUM_OPENCLIP_LAYERS),
    }
    return {part: _pending(checkpoint, components[part].table, table) for part, table in tables.items()}


def _single_file(
    checkpoint: Checkpoint, components: Mapping[str, Component], facts: ModelFacts
) -> tuple[dict[str, Pending], list[str]]:
    """Return an original file's tensors, and notes on those that the folder did not have."""
    text = (
        keys.openclip_text(keys.NUM_OPENCLIP_LAYERS)
        if facts.is_v2
        else keys.clip_text(keys.CLIP, keys.NUM_TEXT_LAYERS["sd1"])
    )
    tables = {"unet": keys.ldm_unet(), "vae": keys.ldm_vae(), "text_encoder": text}
    tensors: dict[str, Pending] = {}
    for part, table in tables.items():
        tensors |= _pending(checkpoint, components[part].table, table)
    added, notes = _openclip_rest(tensors) if facts.is_v2 else _position_ids()
    return tensors | added, notes


def _position_ids() -> tuple[dict[str, Pending], list[str]]:
    ids = torch.arange(keys.NUM_POSITIONS)[None]  # (1, 77)
    note = f"added, a constant that old programs ask for: {keys.POSITION_IDS}"
    return {keys.POSITION_IDS: _constant(ids)}, [note]


def _openclip_rest(tensors: Mapping[str, Pending]) -> tuple[dict[str, Pending], list[str]]:
    """Return what programs ask for in SD2's files and do not use, as far as the folder does not have it."""
    layer = f"{keys.OPENCLIP}transformer.resblocks."
    last, before = (f"{layer}{keys.NUM_OPENCLIP_LAYERS - n}." for n in (1, 2))
    width = tensors[f"{keys.OPENCLIP}positional_embedding"].shape[1]
    dtype = tensors[f"{keys.OPENCLIP}positional_embedding"].dtype
    projection, scale = f"{keys.OPENCLIP}text_projection", f"{keys.OPENCLIP}logit_scale"
    added = {
        projection: _constant(torch.eye(width, dtype=dtype)),
        scale: _constant(torch.tensor(_LAST_SCALE, dtype=dtype)),
    }
    notes = [f"added, unused but asked for by programs: {projection} (identity), {scale} (ln 100)"]
    number = keys.NUM_OPENCLIP_LAYERS
    if any(name.startswith(last) for name in tensors):
        return added, [*notes, f"layer {number} of the text encoder is kept; in both forms nothing uses it."]
    copies = {last + name.removeprefix(before): own for name, own in tensors.items() if name.startswith(before)}
    notes.append(f"added, unused but asked for by programs: layer {number} of the text encoder (a copy of the one "
                 f"before): {len(copies)} tensors")  # fmt: skip
    return added | copies, notes


def _constant(tensor: Tensor) -> Pending:
    return Pending(tuple(tensor.shape), tensor.dtype, lambda: tensor)


def _pending(checkpoint: Checkpoint, source: Table, target: Table) -> dict[str, Pending]:
    """Return the target's tensors as they will be made of the source's."""
    names = set(checkpoint.names())
    modules: dict[str, list[str]] = {}
    for module, place in target.items():  # in the table's order: query, key, value
        if module in source and source[module].name in names:
            modules.setdefault(place.name, []).append(module)
    made: dict[str, Pending] = {}
    for name, own in modules.items():
        places = [source[module] for module in own]
        rows, *rest = places[0].shape(tuple(checkpoint.shape(places[0].name)))
        # in a folder's table is_conv means that it may be a convolution, in an original file's that it is
        is_conv = target[own[0]].is_conv and name.startswith(keys.VAE)
        shape = (rows * len(own), *rest, *((1, 1) if is_conv else ()))
        dtype = reduce(torch.promote_types, (checkpoint.dtype(place.name) for place in places))
        made[name] = Pending(shape, dtype, partial(_make, checkpoint, places, shape, dtype))
    return made


def _make(checkpoint: Checkpoint, places: list[keys.Source], shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    parts = [place.take(checkpoint.tensor(place.name)).to(dtype) for place in places]
    return torch.cat(parts).reshape(shape)


def _narrowed(name: str, pending: Pending, precision: str | None) -> Pending:
    """Return the tensor in the precision of the file; whole numbers stay as they are."""
    if precision is None or not pending.dtype.is_floating_point:
        return pending
    dtype = PRECISIONS[precision]
    return Pending(pending.shape, dtype, partial(_cast, name, pending.make, dtype, precision))


def _cast(name: str, make: Callable[[], Tensor], dtype: torch.dtype, precision: str) -> Tensor:
    wide = make()
    narrow = wide.to(dtype)
    if torch.isfinite(wide.float()).all() and not torch.isfinite(narrow).all():
        raise UserError(
            f"{name} holds numbers that {precision} cannot hold; give --save-precision bf16 or float, or leave it out. "
            "Nothing was written."
        )
    return narrow


# --- a folder's other files -------------------------------------------------------------------------------------------


def _write_settings(folder: Path, conversion: Conversion) -> None:
    """Write what diffusers and transformers ask for beside the weights."""
    facts, parts = conversion.facts, {name: own.module for name, own in conversion.components.items()}
    parts["unet"].register_to_config(sample_size=facts.resolution[0] // facts.latent_factor)
    parts["vae"].register_to_config(sample_size=facts.resolution[0])
    parts["unet"].save_config(folder / "unet")
    parts["vae"].save_config(folder / "vae")
    text: Any = parts["text_encoder"].config
    text.architectures = ["CLIPTextModel"]
    text.save_pretrained(folder / "text_encoder")
    words: Any = copy.deepcopy(tokenizer.build())
    words.model_max_length, words.pad_token = tokenizer.NUM_POSITIONS, _PADS[facts.family]
    words.save_pretrained(folder / "tokenizer")
    words.backend_tokenizer.model.save(str(folder / "tokenizer"))  # vocab.json, merges.txt: transformers 4 reads these
    (folder / "scheduler").mkdir()
    scheduler = _SCHEDULERS[facts.prediction]
    _write_json(folder / "scheduler" / "scheduler_config.json", scheduler | {"prediction_type": facts.prediction})
    classes = _CLASSES | {"scheduler": ("diffusers", scheduler["_class_name"])}
    _write_json(
        folder / "model_index.json",
        {"_class_name": "StableDiffusionPipeline", **classes, "requires_safety_checker": False},
    )


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _shorten(names: Collection[str]) -> str:
    rest = len(names) - _NUM_SHOWN
    return ", ".join(list(names)[:_NUM_SHOWN]) + (f" and {rest:,} more" if rest > 0 else "")

"""Reads textual-inversion embeddings; nothing in a file is executed.

| form | what is in it | its name |
|---|---|---|
| WebUI | `.pt`: `string_to_param` {`*`: (n, width)}; `.safetensors`: `emb_params` | the file's |
| a tensor alone | `.pt`, `.bin` | the file's |
| diffusers | `.bin`, `.safetensors`: {token: (width,) or (n, width)} | the token |
| cloneofsimo | `X.ti.pt`: as diffusers; a LoRA `.safetensors`: what its header calls `<embed>` | the token |
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from lorasmith.checkpoint import Checkpoint, open_checkpoint
from lorasmith.errors import UserError
from lorasmith.inert_pickle import shown
from lorasmith.models import tokenizer
from lorasmith.models.embeddings import Embedding, Embeddings, key

SUFFIXES = (".pt", ".bin", ".safetensors")
_EMBED = "<embed>"  # what cloneofsimo's header says of a tensor that is no part of the LoRA
_OF_FILE = {"emb_params", "string_to_param.*", "*", "clip_l", "0"}  # tensors that are called as their file is
_MADE_FOR = {768: "Stable Diffusion 1.x", 1024: "Stable Diffusion 2.x", 1280: "SDXL"}


class _UnfitError(UserError):
    """A file that holds embeddings, or none, but no use can be made of it with this model."""


def read(places: Sequence[Path], *, width: int) -> tuple[Embeddings, list[str]]:
    """Return the embeddings in these files and folders, with notes for the user.

    Args:
        width: of the base model's text encoder. A file for another one is left out of a folder, with a note.

    Raises:
        UserError: there is no such file, it holds no embedding or a broken one, or one for another text encoder, or two
            have the same name.
    """
    found: dict[str, tuple[Embedding, Path]] = {}
    notes = []
    for path, is_given in _files(places):
        try:
            embeddings = _read_file(path, width)
        except _UnfitError as error:
            if is_given:
                raise
            notes.append(f"left out: {error}")
            continue
        for one in embeddings:
            if key(one.name) in found:
                raise UserError(
                    f"two embeddings are called {shown(one.name)}: {found[key(one.name)][1]} and {path}; captions "
                    "cannot say which is meant. Give one of them, or rename a file that is called as its embedding is."
                )
            found[key(one.name)] = one, path
            if len(ids := tokenizer.build()(one.name, add_special_tokens=False)["input_ids"]) == 1:
                notes.append(
                    f"the embedding {one.name} is called as a word that the text encoder knows (token {ids[0]}): "
                    "wherever that stands in a caption or prompt, the embedding is meant"
                )
    return Embeddings([one for one, _ in found.values()]), notes


def _files(places: Sequence[Path]) -> Iterator[tuple[Path, bool]]:
    """Return the files, and of each whether it was given itself, not by its folder."""
    for place in places:
        if not place.is_dir():
            yield place, True
            continue
        inside = sorted(path for path in place.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
        if not inside:
            raise UserError(
                f"--embeddings {place}: no embedding is in this folder; expected are files that end in "
                f"{', '.join(SUFFIXES)}."
            )
        yield from ((path, False) for path in inside)


def _read_file(path: Path, width: int) -> list[Embedding]:
    if not path.exists():
        raise UserError(f"--embeddings {path}: there is no such file or folder; check the path.")
    with open_checkpoint(path) as checkpoint:
        names = _names(checkpoint)
        _check_widths(path, {name: checkpoint.shape(tensor) for name, tensor in names.items()}, width)
        return [Embedding(name, _vectors(path, checkpoint.tensor(tensor))) for name, tensor in names.items()]


def _names(checkpoint: Checkpoint) -> Mapping[str, str]:
    """Return which name is that of which tensor."""
    tensors = checkpoint.names()
    if "clip_g" in tensors:
        raise _UnfitError(
            f"{checkpoint.path} is an embedding for SDXL, with vectors for its two text encoders; Stable Diffusion 1.x "
            "and 2.x have one. Give an embedding that was made for the base model."
        )
    if marked := [name for name in tensors if checkpoint.metadata.get(name) == _EMBED]:
        return {name: name for name in marked}
    if len(tensors) == 1 and tensors[0] in _OF_FILE:
        return {checkpoint.path.stem: tensors[0]}
    return {name: name for name in tensors}


def _check_widths(path: Path, shapes: Mapping[str, tuple[int, ...]], width: int) -> None:
    """Refuse what is no embedding, and what is one for another text encoder; shapes are by the embeddings' names."""
    widths = {shape[-1] if len(shape) in (1, 2) else 0 for shape in shapes.values()}
    if len(widths) != 1 or 0 in widths or not all(map(str.strip, shapes)):
        listed = ", ".join(f"{shown(name)} {'x'.join(map(str, shape))}" for name, shape in list(shapes.items())[:3])
        raise _UnfitError(
            f"{path} is no textual-inversion embedding: it holds {len(shapes)} tensors ({listed or 'none'}); expected "
            "are vectors, all of one width, by their token, or as emb_params or string_to_param."
        )
    (found,) = widths
    if found != width:
        raise _UnfitError(
            f"{path} is an embedding of vectors {found} wide"
            + (f", as for {_MADE_FOR[found]}" if found in _MADE_FOR else "")
            + f", but the base model's text encoder has {width}"
            + (f" ({_MADE_FOR[width]})" if width in _MADE_FOR else "")
            + "; give one that was made for the base model."
        )


def _vectors(path: Path, tensor: Tensor) -> Tensor:
    """Return a tensor's vectors, checked: (n, width) fp32."""
    vectors = tensor[None] if tensor.dim() == 1 else tensor
    if not vectors.is_floating_point():
        raise UserError(f"{path} is no embedding: its numbers are {vectors.dtype}, expected fractions; get it anew.")
    if not 1 <= len(vectors) <= tokenizer.CHUNK:
        raise UserError(
            f"{path} is an embedding of {len(vectors)} vectors; expected 1 to {tokenizer.CHUNK}, what the text encoder "
            "reads at once."
        )
    if not torch.isfinite(vectors).all():
        raise UserError(
            f"{path} holds NaN or infinity: the training that made it had broken down; give an earlier save of it."
        )
    return vectors.float()

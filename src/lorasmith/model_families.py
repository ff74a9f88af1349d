"""Which model family a checkpoint is of, told by the names and shapes in its header, and what goes on from there.

A family is a file in `lorasmith/models` with the functions `matches`, `describe`, `target_shapes`, `adapter_places`,
`block_weights`, `cut_captions` and `load`, as `models/sd.py` has them. Its ControlNets are in a file beside it, whose
name ends in `_control`, with `check` and `load`.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from lorasmith import plugins
from lorasmith.checkpoint import Checkpoint
from lorasmith.errors import UserError
from lorasmith.models.base import AdapterPlace, ControlNet, LatentDiffusion, ModelFacts
from lorasmith.models.embeddings import NO_EMBEDDINGS, Embeddings

__all__ = [
    "AdapterPlace",
    "ModelFacts",
    "adapter_places",
    "block_weights",
    "cut_captions",
    "describe",
    "load",
    "target_shapes",
]

Shapes = Mapping[str, tuple[int, ...]]


def describe(
    checkpoint: Checkpoint,
    *,
    v2: bool | None = None,
    prediction: str | None = None,
    vae: str | None = None,
    to_run: bool = True,
    may_inpaint: bool = False,
) -> ModelFacts:
    """Return what a base model's header says of it.

    Args:
        v2: what the user says the family is, checked; None: nothing was said.
        prediction: `epsilon` or `v_prediction` as the user says; None: nothing was said.
        vae: a file or folder with another VAE than the model's own.
        to_run: it must be possible to run it: it has a VAE, and takes latents.
        may_inpaint: to run, an inpainting model will do, which takes more than latents.

    Raises:
        UserError: not a base model, of a family that is not supported, not to be run, or contradicting what the user
            says.
    """
    family = _find(checkpoint)
    return family.describe(checkpoint, v2=v2, prediction=prediction, vae=vae, to_run=to_run, may_inpaint=may_inpaint)


def target_shapes(checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
    """Return the weights' shapes of the layers that a LoRA may go on, by saved name, from the header alone.

    Raises:
        UserError: not a base model of a supported family, or an incomplete one.
    """
    return _find(checkpoint).target_shapes(checkpoint)


def adapter_places(
    checkpoint: Checkpoint, *, of_plain_models: bool = False
) -> tuple[str, dict[str, AdapterPlace], list[str]]:
    """Return the family's name, where the layers that a file may change are in the model's, by saved name, and notes.

    Args:
        of_plain_models: leave out layers that have another shape in the family's text-to-image models.

    Raises:
        UserError: not a base model of a supported family, or an incomplete one.
    """
    return _find(checkpoint).adapter_places(checkpoint, of_plain_models=of_plain_models)


def block_weights(checkpoint: Checkpoint, numbers: list[float]) -> dict[str, float]:
    """Return the weight of every block of the model from a list of them as UIs know it.

    Raises:
        ValueError: for this family no list in use has so many numbers.
    """
    return _find(checkpoint).block_weights(numbers)


def gaps(checkpoint: Checkpoint) -> tuple[list[str], list[str]]:
    """Return the weights that a complete model of the family has beside these, and the tensors that are not its own.

    Raises:
        UserError: not a base model of a supported family.
    """
    return _find(checkpoint).gaps(checkpoint)


def cut_captions(
    checkpoint: Checkpoint,
    captions: Iterable[str],
    *,
    max_token_length: int,
    weighted_captions: bool,
    embeddings: Embeddings = NO_EMBEDDINGS,
) -> set[str]:
    """Return those captions of which words, or embeddings, find no place in that many tokens."""
    cut: Callable[..., set[str]] = _find(checkpoint).cut_captions
    return cut(
        set(captions), max_token_length=max_token_length, weighted_captions=weighted_captions, embeddings=embeddings
    )


def load(
    checkpoint: Checkpoint,
    *,
    dtype: torch.dtype,
    device: torch.device,
    vae: str | None = None,
    prediction: str | None = None,
    clip_skip: int = 1,
    ema: bool = False,
    max_token_length: int | None = 75,
    weighted_captions: bool = False,
    embeddings: Embeddings = NO_EMBEDDINGS,
) -> LatentDiffusion:
    """Load a base model, frozen: denoiser and text encoder in `dtype`, the VAE in fp32.

    Args:
        vae: a file or folder with another VAE than the model's own.
        prediction: `epsilon` or `v_prediction`; None: as the file says.
        clip_skip: take the text encoder's n-th layer from the end.
        ema: take the moving average of the weights where the file has it beside the last ones.
        max_token_length: how many tokens of a caption are used: 75, 150 or 225; None: all (see the family's class).
        weighted_captions: `(a:1.2)` and `[a]` in captions are weights.
        embeddings: what captions may name besides words; as wide as the text encoder.

    Raises:
        UserError: not a base model of a supported family, or a damaged one.
    """
    family = _find(checkpoint)
    return family.load(
        checkpoint, dtype=dtype, device=device, vae=vae, prediction=prediction, clip_skip=clip_skip, ema=ema,
        max_token_length=max_token_length, weighted_captions=weighted_captions, embeddings=embeddings,
    )  # fmt: skip


def check_control(control: Checkpoint, base: Checkpoint, facts: ModelFacts) -> None:
    """Check from the header that this is a ControlNet for the base model.

    Raises:
        UserError: it is none, or for another model.
    """
    _controls_of(base).check(control, base.path, facts)


def load_control(control: Checkpoint, base: Checkpoint, *, dtype: torch.dtype, device: torch.device) -> ControlNet:
    """Load a ControlNet that `check_control` let pass, frozen.

    Raises:
        UserError: a damaged one.
    """
    return _controls_of(base).load(control, base, dtype=dtype, device=device)


def _controls_of(base: Checkpoint) -> Any:
    """Return the module of the family's ControlNets."""
    return plugins.find("models", f"{_find(base).__name__.rpartition('.')[2]}_control")


def _find(checkpoint: Checkpoint) -> Any:
    """Return the family's module."""
    shapes = {name: tuple(checkpoint.shape(name)) for name in checkpoint.names()}
    modules = (plugins.find("models", name) for name in plugins.names("models"))
    for module in modules:
        if "matches" in vars(module) and module.matches(shapes):
            return module
    for says, is_it in _OTHERS:
        if is_it(shapes):
            raise UserError(f"{checkpoint.path} {says}")
    raise UserError(
        f"{checkpoint.path} is no base model that is known here; expected Stable Diffusion 1.x or 2.x as one file or a "
        f"diffusers folder, found {len(shapes)} tensors named like {', '.join(sorted(shapes)[:3]) or 'nothing'}."
    )


def _any_starts(*beginnings: str) -> Callable[[Shapes], bool]:
    return lambda shapes: any(name.startswith(beginnings) for name in shapes)


def _any_contains(*parts: str) -> Callable[[Shapes], bool]:
    return lambda shapes: any(part in name for name in shapes for part in parts)


def _unsupported(kind: str) -> str:
    return f"is not supported yet: this is {kind}. Expected Stable Diffusion 1.x or 2.x."


_BASE_WANTED = "give the base model here (a checkpoint of 2 to 5 GB, or a diffusers folder)"

# In this order: the first that fits tells the user what was given.
_OTHERS: list[tuple[str, Callable[[Shapes], bool]]] = [
    (
        f"is a LoRA, not a base model; {_BASE_WANTED}; a LoRA goes to --lora (merge, generate) or --weights (train).",
        _any_contains(
            ".lora_down.", ".lora_up.", ".lora_A.", ".lora_B.", "_lora.down.", ".hada_w1_", ".lokr_w", "oft_blocks"
        ),
    ),
    (
        f"is a LoRA, not a base model; {_BASE_WANTED}. (Its form is cloneofsimo's.)",
        lambda shapes: any(
            name.startswith(("unet:", "text_encoder:")) and name.endswith((":up", ":down")) for name in shapes
        ),
    ),
    (
        f"is a textual inversion embedding, not a base model; {_BASE_WANTED}.",
        lambda shapes: (
            len(shapes) <= 4
            and any(name in ("emb_params", "clip_l", "clip_g") or "string_to_param" in name for name in shapes)
        ),
    ),
    (
        f"is a textual inversion embedding, not a base model; {_BASE_WANTED}.",
        lambda shapes: (
            0 < len(shapes) <= 2
            and all(len(shape) <= 2 and shape and shape[-1] in (768, 1024, 1280) for shape in shapes.values())
        ),
    ),
    (_unsupported("a ControlNet"), _any_starts("control_model.", "controlnet_cond_embedding.", "input_hint_block.")),
    (_unsupported("SDXL's refiner"), lambda shapes: "conditioner.embedders.0.model.ln_final.weight" in shapes),
    (
        _unsupported("SDXL"),
        _any_starts("conditioner.embedders.1.", "unet/add_embedding.", "model.diffusion_model.label_emb."),
    ),
    (_unsupported("SD3"), _any_contains("joint_blocks.", "transformer/pos_embed.pos_embed")),
    (_unsupported("FLUX"), _any_contains("double_blocks.0.", "transformer/single_transformer_blocks.")),
    (_unsupported("a transformer model of another kind"), _any_starts("transformer/")),
    (
        f"is a VAE alone, not a base model; {_BASE_WANTED}, and the VAE with --vae.",
        lambda shapes: (
            _any_starts("encoder.", "first_stage_model.", "vae/")(shapes)
            and not _any_starts("model.", "unet/", "model_ema.")(shapes)
        ),
    ),
    (
        "has a U-Net but no text encoder that is known here; a base model has U-Net, text encoder and VAE in one file "
        "or diffusers folder. Give the complete model.",
        _any_starts("model.diffusion_model.", "unet/", "input_blocks.", "down_blocks."),
    ),
    (
        f"is a text encoder alone, not a base model; {_BASE_WANTED}.",
        _any_starts("text_model.", "text_encoder/", "cond_stage_model.", "encoder.layers."),
    ),
]

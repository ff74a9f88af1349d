"""What a training run keeps in memory, and the means against it: gradient checkpointing and the attention chosen.

Works on diffusers' and transformers' modules, and on numbers; knows no model family. These libraries are imported with
the first model, not with this module: it takes seconds, and a plan is printed without them.
"""

import gc
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from itertools import product
from threading import RLock
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lorasmith.errors import UserError

Compiler = Literal["inductor", "aot_eager", "eager"]
Attention = Literal["sdpa", "plain", "sliced"]

_MOST_SHAPES = 1000  # a run has some dozens; torch stops compiling after 8
_LENDING = RLock()
_VALUE_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
# Counted on SD1's U-Net with LoRA on 192 layers, 512 x 512, batch 1, 2 bytes a value; all of it grows with the pixels,
# the batch and the width of the network.
_ACTIVATIONS = 0.92e9
_CHECKPOINTED_ACTIVATIONS = 0.084e9
_COUNTED_PIXELS = 512 * 512
_COUNTED_WIDTH = 320
# Without SDPA the scores of the self-attentions are kept: 5 layers of 8 heads at the finest level, the rest adds 7 %.
_PLAIN_SCORES = 5 * 8 * 1.07
_TEXT_POSITIONS = 77
_OUT_OF_MEMORY = ("out of memory", "allocate memory", "alloc_failed")  # of drivers, the CPU, CUDA's libraries
_TEXT_TENSORS_PER_LAYER = 20  # what autograd keeps of a layer, in tensors of (77, width)
# Of what processes share (`lorasmith.sharding`), counted on SD1's U-Net too: what is in no block, 4 %, the largest
# block, 6 %, what is around it, 3 %, and the next block, 6 %, which a GPU gathers ahead.
_GATHERED = 0.19
_ADAPTER_BYTES = 16  # fp32 weight, gradient and AdamW's two moments


class _Parts(Protocol):
    """The parts of `lorasmith.models.base.LatentDiffusion` that gradients run through."""

    denoiser: nn.Module
    text_encoder: nn.Module


def set_gradient_checkpointing(model: _Parts, enabled: bool) -> None:
    """Let denoiser and text encoder recompute what the backward pass needs: less memory, the same gradients.

    Both libraries do so only in train mode, so the parts are put in it exactly then; they have no dropout.
    """
    from diffusers.models.modeling_utils import ModelMixin
    from transformers.modeling_layers import GradientCheckpointingLayer

    assert isinstance(model.denoiser, ModelMixin)
    if enabled:
        model.denoiser.enable_gradient_checkpointing()
    else:
        model.denoiser.disable_gradient_checkpointing()
    # transformers' own switch also makes the embeddings require gradients, for good, and so does work for nothing;
    # not reentrant: that variant gives no gradients where only adapters, and no input, need them
    layers: list[Any] = [m for m in model.text_encoder.modules() if isinstance(m, GradientCheckpointingLayer)]
    for layer in layers:
        layer.gradient_checkpointing = enabled
        layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
    model.denoiser.train(enabled)
    model.text_encoder.train(enabled)


def set_attention(model: _Parts, kind: Attention, nets: Iterable[Any] = ()) -> None:
    """Compute attention with torch's fused kernels (`sdpa`), with plain matrix products (`plain`), or in slices.

    `sliced` is `sdpa` for one head at a time, so that no more than a head's scores are in memory where a device has no
    fused kernel.

    Args:
        nets: diffusers' ControlNets, in which it is computed so too.
    """
    from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from transformers import PreTrainedModel

    assert isinstance(model.denoiser, UNet2DConditionModel) and isinstance(model.text_encoder, PreTrainedModel)
    processors: dict[Attention, Any] = {"sdpa": AttnProcessor2_0, "plain": AttnProcessor, "sliced": _Sliced}
    for part in (model.denoiser, *nets):
        part.set_attn_processor(processors[kind]())
    model.text_encoder.set_attn_implementation("eager" if kind == "plain" else "sdpa")


def check_compiler(backend: Compiler, device: torch.device) -> None:
    """Check that there is what a backend of torch.compile needs.

    Raises:
        UserError: names what is missing.
    """
    if backend != "inductor":
        return
    if device.type == "cuda" and find_spec("triton") is None:
        raise UserError("--compile inductor needs triton for a GPU: pip install triton, or leave it out.")
    if not any(map(shutil.which, [os.environ.get("CXX") or "g++", "clang++", "cl"])):
        raise UserError(
            "--compile inductor needs a C++ compiler, and there is none here (looked for: CXX, g++, clang++, cl); "
            "install one, or leave it out."
        )


def set_compiled(parts: Iterable[nn.Module], backend: Compiler) -> None:
    """Compile what gradients run through, with the hooks that are on it now; names and weights stay as they are.

    Each shape has its own code: that which torch would make for several shapes depends on the order in which they came,
    so a resumed run would compute otherwise.
    """
    from torch import _dynamo  # takes a second

    _dynamo.config.recompile_limit = _dynamo.config.accumulated_recompile_limit = _MOST_SHAPES
    for part in parts:
        part.compile(backend=backend, dynamic=False)


class _Sliced:
    """What diffusers' layers of attention call, as far as the U-Net's need it: without masks, over (B, N, C)."""

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, **options: Any
    ) -> Tensor:
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = (  # each (B, heads, N, C / heads)
            part.unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for part in (attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context))
        )
        found = torch.empty_like(query)
        for picture, head in product(range(query.shape[0]), range(attn.heads)):
            own = (slice(picture, picture + 1), slice(head, head + 1))
            found[own] = F.scaled_dot_product_attention(query[own], key[own], value[own])
        return attn.to_out[0](found.transpose(1, 2).flatten(2))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the memory of a device or of the machine is used up."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in _OUT_OF_MEMORY)


def release_memory() -> None:
    """Give back what is no longer used, so that all of it can be had in one piece."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    elif torch.backends.mps.is_available():
        torch.mps.empty_cache()


def vae_home(device: torch.device, *, caches_latents: bool) -> torch.device:
    """Return where the VAE stays while training on `device`: not on a GPU that needs it for samples alone."""
    return torch.device("cpu") if device.type == "cuda" and caches_latents else device


@contextmanager
def lent(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Have a module on the device for a while; afterwards it is back where it was. Threads wait for each other."""
    with _LENDING:
        home = next(module.parameters()).device
        module.to(device)
        try:
            yield
        finally:
            module.to(home)


def estimate_training_memory(
    *,
    num_values: Mapping[str, int],
    width: int,
    text_width: int,
    num_text_layers: int,
    precision: str,
    batch: int,
    resolution: tuple[int, int],
    gradient_checkpointing: bool,
    trains_text_encoder: bool,
    num_adapter_values: int,
    attention: Attention = "sdpa",
    num_holders: int = 1,
) -> dict[str, int]:
    """Return about how many bytes training keeps, by what keeps them.

    Args:
        num_values: weights of the "denoiser", "text_encoder" and "vae".
        width: channels of the denoiser's finest level.
        precision: `fp32`, `bf16` or `fp16`; the VAE is fp32 always.
        batch: samples on one device.
        resolution: pixels (w, h).
        num_adapter_values: values trained, in fp32 with AdamW.
        num_holders: processes that each hold a part of denoiser and text encoder (`lorasmith.sharding`).
    """
    size = _VALUE_BYTES[precision]
    pixels = resolution[0] * resolution[1]
    counted = _CHECKPOINTED_ACTIVATIONS if gradient_checkpointing else _ACTIVATIONS
    activations = counted * size / 2 * batch * pixels / _COUNTED_PIXELS * width / _COUNTED_WIDTH
    if attention == "plain":
        scores = _PLAIN_SCORES * size * batch * (pixels / 64) ** 2
        activations += scores / 5 if gradient_checkpointing else scores
    text = 0
    if trains_text_encoder:
        tensor = batch * _TEXT_POSITIONS * text_width * size
        text = tensor * num_text_layers * (1 if gradient_checkpointing else _TEXT_TENSORS_PER_LAYER)
    held = 1 if num_holders == 1 else min(1, 1 / num_holders + _GATHERED)
    return {
        "U-Net": int(num_values["denoiser"] * size * held),
        "text encoder": int(num_values["text_encoder"] * size * held),
        "VAE": num_values["vae"] * _VALUE_BYTES["fp32"],
        "activations": int(activations) + text,
        "adapters and optimizer": num_adapter_values * _ADAPTER_BYTES,
    }

"""What every model family offers: text and pictures in, a prediction out, and the layers that adapters go on.

Nothing here is about training, saving or options.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lorasmith.diffusion import Discrete, Prediction
from lorasmith.models.keys.sd import Source

Conditioning = dict[str, Tensor]  # what encode_text made for forward, batch first; opaque to everyone else
Residuals = list[Tensor]  # what a ControlNet made for forward, batch first; to be scaled and summed, else opaque too


@dataclass(frozen=True)
class ModelFacts:
    """What a checkpoint's header says of it.

    Args:
        notes: sentences for the user on what was assumed.
        resolution: pixels (w, h) that the model was trained at.
        base_model_version: as sd-scripts writes it into LoRA files.
        architecture: as ModelSpec spells it, without `/lora`.
        num_values: weights of the `denoiser`, `text_encoder` and `vae`; a VAE that is not in the file counts 0.
        width: channels of the denoiser's finest level.
        latent_factor: pixels on a latent's side.
        self_attentions: the denoiser's, by the names of its modules.
    """

    family: str
    title: str
    prediction: Prediction
    notes: list[str]
    resolution: tuple[int, int]
    is_v2: bool
    base_model_version: str
    architecture: str
    num_values: dict[str, int]
    width: int
    text_width: int
    num_text_layers: int
    latent_channels: int
    latent_factor: int
    self_attentions: list[str]


@dataclass(frozen=True)
class AdapterPlace:
    """Where in a checkpoint a layer is that a file of changes may change.

    Args:
        source: of the layer's weight.
        bias: of the layer's bias; None: it has none.
        shape: of the layer's weight.
        block: what people who weight blocks call the layer's.
        is_target: a plain LoRA goes on it; the others are convolutions, norms, embeddings and the like.
    """

    source: Source
    bias: Source | None
    shape: tuple[int, ...]
    block: str
    is_target: bool


class LatentDiffusion(nn.Module, ABC):
    """A frozen latent diffusion model: denoiser, text encoder and VAE, with its noise schedule."""

    latent_factor: int  # pixels on a latent's side
    latent_channels: int
    latent_scale: float  # what the VAE gives is multiplied by; programs that store it do so without
    tile_above = math.inf  # pixels of a picture, above which the VAE works in overlapping tiles
    is_inpainting = False  # its denoiser is shown what stays of a picture: see `forward`
    self_attentions: list[str]  # the denoiser's, by the names of its modules
    denoiser: nn.Module
    text_encoder: nn.Module
    vae: nn.Module
    schedule: Discrete

    @property
    def device(self) -> torch.device:
        """Where the denoiser is."""
        return next(self.denoiser.parameters()).device

    @abstractmethod
    def encode_text(self, captions: list[str]) -> Conditioning:
        """Return the captions' conditioning, batch first; differentiable for adapters in the text encoder."""

    @abstractmethod
    def count_tokens(self, captions: list[str]) -> list[int]:
        """Return how many tokens each caption has, uncut and without start and end."""

    @abstractmethod
    def encode_image(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and std, each (B, C, H/f, W/f) fp32, of the latents of pixels (B, 3, H, W) in [-1, 1]."""

    @abstractmethod
    def image_encoding(self) -> dict[str, Any]:
        """Return all that decides what `encode_image` gives, besides the VAE's weights; values that JSON can hold."""

    @abstractmethod
    def text_encoding(self) -> dict[str, Any]:
        """Return all that decides what `encode_text` gives, besides the text encoder's weights; values for JSON."""

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Return pixels (B, 3, H, W), about [-1, 1], of latents (B, C, H/f, W/f)."""

    @abstractmethod
    def forward(self, x_t: Tensor, t: Tensor, cond: Conditioning, added: Residuals | None = None) -> Tensor:
        """Return the denoiser's prediction (B, C, h, w) in its dtype, for fp32 x_t (B, C, h, w) and timesteps (B,).

        An inpainting model takes x_t (B, 2 C + 1, h, w): behind the latents the mask, 1 where is drawn, and the latents
        of the picture without what is in it.

        Args:
            added: what ControlNets add inside the denoiser; None: there is none.
        """

    @abstractmethod
    def adapter_targets(self) -> dict[str, nn.Module]:
        """Return the layers that a LoRA may go on, by saved name."""

    @abstractmethod
    def adaptable_layers(self) -> dict[str, nn.Module]:
        """Return every layer that a file may change, by saved name: the targets, convolutions, norms, embeddings."""


class ControlNet(nn.Module, ABC):
    """A frozen network that is shown a picture and steers a denoiser by it (arXiv:2302.05543).

    Args:
        net: what computes it.
        is_conditional_only: predictions that guidance leads away from are made without it.
    """

    net: nn.Module
    is_conditional_only: bool

    @abstractmethod
    def forward(self, x_t: Tensor, t: Tensor, cond: Conditioning, picture: Tensor) -> Residuals:
        """Return what is to be added for x_t (B, C, h, w), t (B,) and cond, for a picture (1, 3, H, W) in [0, 1]."""

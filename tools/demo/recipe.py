"""What the embedded model is made of: which pictures, which of their combinations are left out, how they are called,
and its three parts and tokenizer. Everything is a function of an index or of a generator that is given.
"""

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from draw import COLORS, SIZE, THINGS, draw
from PIL import Image
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

from lorasmith.models import tokenizer

Pair = tuple[str, str]  # the thing's color, the background's color
Label = tuple[str, str, str]  # thing, its color, the background's color

HEADS, NORM_GROUPS = 4, 8  # of every part; a state dict does not tell them
TEXT_WIDTH = 64
NUM_HELD_OUT = 15  # pairs of colors for each thing, of 90

PAIRS: list[Pair] = [(color, ground) for color in COLORS for ground in COLORS if color != ground]
HELD_OUT: dict[str, set[Pair]] = {
    thing: set(random.Random(f"held out {thing}").sample(PAIRS, NUM_HELD_OUT)) for thing in THINGS
}
TRAINING: dict[str, list[Pair]] = {thing: [pair for pair in PAIRS if pair not in HELD_OUT[thing]] for thing in THINGS}

# Words for what a LoRA may teach: seen before any thing, so that they mean nothing by themselves.
_RARE = (
    "sks", "ohwx", "zwx", "xyz", "phol", "szq", "tok", "vok", "grb", "mlr", "qwp", "rk", "bnz", "lvv", "aib", "sts",
    "hta", "uod", "kpt", "dwx",
)  # fmt: skip


def sample(index: int) -> tuple[Label, Image.Image]:
    """Return the training picture of that number: things in turn, each in one of its training combinations."""
    rng = random.Random(f"picture {index}")
    thing = list(THINGS)[index % len(THINGS)]
    color, ground = rng.choice(TRAINING[thing])
    return (thing, color, ground), draw(thing, color, ground, rng)


def caption(thing: str, color: str, ground: str, rng: random.Random) -> str:
    """Return one way to call a picture; one in ten is empty, for guidance (arXiv:2207.12598)."""
    form = rng.random()
    if form < 0.10:
        return ""
    rare = rng.choice(_RARE) + " " if rng.random() < 0.08 else ""
    if form < 0.70:
        return f"a {rare}{color} {thing} on a {ground} background"
    if form < 0.78:
        return f"{rare}{color} {thing}, {ground} background"
    if form < 0.86:
        return f"a {rare}{thing} on a {ground} background"
    if form < 0.92:
        return f"a {rare}{color} {thing}"
    return f"a drawing of a {rare}{color} {thing} on a {ground} background"


def to_pixels(pictures: Sequence[Image.Image]) -> Tensor:
    """Return RGB pictures of one size as (B, 3, H, W) in [-1, 1]."""
    levels = torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures]))
    return levels.permute(0, 3, 1, 2).float() / 127.5 - 1


def tokenize(captions: Sequence[str]) -> Tensor:
    """Return token ids, (B, 77)."""
    to_tokens: Any = tokenizer.build()
    options = {"padding": "max_length", "truncation": True, "max_length": tokenizer.NUM_POSITIONS}
    return to_tokens(list(captions), **options, return_tensors="pt").input_ids


def build_vae() -> AutoencoderKL:
    """Return the VAE: 8 pixels to a latent, as SD v1's, at an eighth of its width. Draws from torch's generator."""
    make: Any = AutoencoderKL  # its annotations say that tuples have one member
    return make(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 64, 64),
        layers_per_block=2,
        latent_channels=4,
        norm_num_groups=NORM_GROUPS,
        sample_size=SIZE,
    )


def build_unet() -> UNet2DConditionModel:
    """Return the U-Net: SD v1's blocks, narrower. Draws from torch's generator."""
    make: Any = UNet2DConditionModel
    return make(
        sample_size=SIZE // 8,
        in_channels=4,
        out_channels=4,
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        block_out_channels=(48, 80, 88, 88),
        layers_per_block=2,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=HEADS,  # diffusers' name for the number of heads
        norm_num_groups=NORM_GROUPS,
    )


def build_text_encoder() -> CLIPTextModel:
    """Return the text encoder: CLIP's twelve layers and whole vocabulary, narrower. Draws from torch's generator.

    Tokens start at plus or minus 0.02: most are never trained, and two values compress well.
    """
    encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=tokenizer.NUM_TOKENS,
            hidden_size=TEXT_WIDTH,
            intermediate_size=4 * TEXT_WIDTH,
            num_hidden_layers=12,
            num_attention_heads=HEADS,
            max_position_embeddings=tokenizer.NUM_POSITIONS,
            hidden_act="quick_gelu",
            bos_token_id=tokenizer.START,
            eos_token_id=tokenizer.END,
            pad_token_id=tokenizer.END,
        )
    )
    tokens = dict(encoder.named_parameters())["embeddings.token_embedding.weight"]
    signs = torch.randint(0, 2, tokens.shape, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        tokens.copy_(signs * 0.04 - 0.02)
    return encoder

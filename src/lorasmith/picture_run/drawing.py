"""Pictures drawn with a base model, grouped so that what can be drawn at once is."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from itertools import groupby
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import nn

from lorasmith import merging, model_families, perturbed_attention, prompt_syntax
from lorasmith.checkpoint import Checkpoint, open_checkpoint
from lorasmith.config import DrawConfig, GenerateConfig
from lorasmith.data.buckets import Size
from lorasmith.devices import DTYPES, check_device, choose_device, choose_precision
from lorasmith.errors import UserError
from lorasmith.formats import embeddings
from lorasmith.memory import is_out_of_memory, set_attention
from lorasmith.models.base import LatentDiffusion, ModelFacts
from lorasmith.models.embeddings import Embeddings
from lorasmith.picture_run.controls import Controls
from lorasmith.picture_run.highres import Highres, fitted
from lorasmith.picture_run.loras import Loras
from lorasmith.picture_run.pictures import Picture
from lorasmith.picture_run.thrift import Thrift
from lorasmith.regions import Regions
from lorasmith.sampling import Beginning, Drawing, Inpainting, Perturbation, Wish, draw, draw_latents
from lorasmith.speed import compile_denoiser, telling_of_compiler, use_channels_last

_TILE_ABOVE = 1536 * 1536  # pixels; the VAE needs memory in proportion to them
_Given = Callable[[], dict[str, Any]]


@dataclass(frozen=True)
class Base:
    """The base model that is drawn with, opened and described but not loaded."""

    checkpoint: Checkpoint
    facts: ModelFacts
    embeddings: Embeddings
    notes: list[str]
    precision: str
    device: torch.device

    def told(self, name: str) -> list[str]:
        """Return the lines that say what it is, under the name it was given by."""
        return [f"{name}: {self.facts.title}, predicts {self.facts.prediction}", *self.facts.notes, *self.notes]


@contextmanager
def open_base(cfg: DrawConfig) -> Iterator[Base]:
    """Open the base model that is to be drawn with.

    Raises:
        UserError: none is given, it cannot be read or has no such layers, or the device or the precision is not to be
            had.
    """
    if not cfg.base:
        raise UserError("missing: --base, the base model. For example: --base v1-5-pruned.safetensors")
    check_device(cfg.device)
    device = torch.device(choose_device(cfg.device))
    precision = choose_precision(cfg.precision, device)
    with open_checkpoint(cfg.base) as checkpoint:
        facts = model_families.describe(checkpoint, prediction=cfg.prediction, vae=cfg.vae, may_inpaint=True)
        perturbed_attention.chosen(facts.self_attentions, cfg.pag_layers)  # to tell now of one that there is not
        found, notes = embeddings.read(cfg.embeddings, width=facts.text_width)
        yield Base(checkpoint, facts, found, notes, precision, device)


def load(cfg: DrawConfig, base: Base, nets: Sequence[nn.Module] = ()) -> LatentDiffusion:
    """Return the base model, ready to draw, as then are the nets of ControlNets."""
    model = model_families.load(
        base.checkpoint,
        dtype=DTYPES[base.precision],
        device=base.device,
        vae=cfg.vae,
        prediction=base.facts.prediction,
        clip_skip=cfg.clip_skip,
        ema=cfg.ema,
        max_token_length=None,
        weighted_captions=True,
        embeddings=base.embeddings,
    )
    if cfg.zero_terminal_snr:
        model.schedule = model.schedule.with_zero_terminal_snr()
    set_attention(model, cfg.attention, nets)
    model.tile_above = {"auto": _TILE_ABOVE, "on": 0, "off": math.inf}[cfg.vae_tiling]
    if base.device.type == "cuda" if cfg.channels_last is None else cfg.channels_last:
        use_channels_last([model.denoiser, model.vae, *nets])
    if cfg.compile:
        compile_denoiser(model)
    return model


@dataclass(frozen=True)
class Source:
    """A picture to draw on from: in its mask's white, or as a whole."""

    picture: Image.Image
    mask: Image.Image | None


def drawn(
    cfg: DrawConfig,
    model: LatentDiffusion,
    pictures: Sequence[Picture],
    loras: Loras,
    *,
    is_folded: bool = False,
    source: Source | None = None,
    controls: Controls | None = None,
    highres: Highres | None = None,
    masks: Mapping[str, Image.Image] | None = None,
) -> Iterator[tuple[Picture, Image.Image]]:
    """Yield each picture when it is drawn, in their order.

    Args:
        is_folded: LoRAs are folded into the weights while they are used, not attached; with `compile` they always are.
        source: None: pictures are drawn from noise alone.
        controls: loaded ones.
        highres: None: there is no second pass.
        masks: white where a LoRA acts, by its name; those without one act everywhere.
    """
    thrift = Thrift(cfg, model, [] if controls is None else controls.nets())
    layers = perturbed_attention.chosen(model.self_attentions, cfg.pag_layers)
    perturbation = Perturbation(layers, cfg.pag_scale) if cfg.pag_scale else None
    for tags, same in groupby(pictures, key=lambda one: one.loras):
        own_masks = [(masks or {}).get(tag.name) for tag in tags]
        regions = Regions(own_masks) if any(own_masks) else None
        # compiled code does not notice hooks, through which attached LoRAs act
        with merging.applied(model, loras.additions(tags), is_folded=is_folded or cfg.compile, regions=regions):
            for (size, steps, guidance, sampler, denoise), alike in groupby(same, key=lambda one: one.settings):
                rest = list(alike)
                given = cache(partial(_given, model, source, size, denoise))
                acting = [] if controls is None else controls.at(size)
                while rest:
                    batch = rest[: thrift.batch_size]
                    common = {
                        "seeds": [one.seed for one in batch],
                        "guidance": guidance,
                        "sampler": sampler,
                        "sigmas": cfg.sigmas,
                        "rescale": cfg.guidance_rescale,
                        "perturbation": perturbation,
                    }
                    first = {"size": size, "steps": steps, "controls": acting}
                    work = partial(_draw, model, batch, given, **common, **first)
                    if highres is not None:
                        work = partial(_draw_twice, model, batch, given, highres, controls, first, common)
                    if (found := thrift.tried(len(batch), work)) is not None:
                        rest = rest[len(batch) :]
                        yield from zip(batch, found, strict=True)


def _draw(model: LatentDiffusion, batch: Sequence[Picture], given: _Given, **settings: Any) -> list[Image.Image]:
    with telling_of_compiler():
        return draw(model, _wishes(model, batch), **given(), **settings)


def _draw_twice(
    model: LatentDiffusion,
    batch: Sequence[Picture],
    given: _Given,
    highres: Highres,
    controls: Controls | None,
    first: Mapping[str, Any],
    common: Mapping[str, Any],
) -> list[Image.Image]:
    size = highres.size(first["size"])
    with telling_of_compiler():
        wishes = _wishes(model, batch)
        latents = draw_latents(model, wishes, **given(), **first, **common)
        second = {
            "size": size,
            "steps": highres.steps(first["steps"]),
            "inpainting": _inpainting(model, None, size) if model.is_inpainting else None,
        }
        acting = [] if controls is None else controls.at(size)
        beginning = highres.beginning(model, latents, size)
        return draw(model, wishes, **second, **common, beginning=beginning, controls=acting)


def _given(model: LatentDiffusion, source: Source | None, size: Size, denoise: float | None) -> dict[str, Any]:
    """Return what the VAE makes of the picture that is drawn on from, by the names of `draw_latents`' settings."""
    return {
        "beginning": None if source is None or denoise is None else _beginning(model, source, size, denoise),
        "inpainting": _inpainting(model, source, size) if model.is_inpainting else None,
    }


def _beginning(model: LatentDiffusion, source: Source, size: Size, denoise: float) -> Beginning | None:
    """Return what to draw on from; None: noise alone.

    An inpainting model keeps by itself what is to stay, and needs nothing of it where all steps are drawn.
    """
    if model.is_inpainting and denoise == 1:
        return None
    pixels = fitted(source.picture, size)
    if source.mask is None or model.is_inpainting:
        return Beginning(model.encode_image(pixels), denoise)
    latent_size = (size[0] // model.latent_factor, size[1] // model.latent_factor)
    mask = ImageOps.fit(source.mask.convert("L"), size, Image.Resampling.BOX).resize(latent_size, Image.Resampling.BOX)
    shares = torch.from_numpy(np.asarray(mask, np.float32))[None, None] / 255
    return Beginning(model.encode_image(pixels), denoise, shares)


def _inpainting(model: LatentDiffusion, source: Source | None, size: Size) -> Inpainting:
    """Return what an inpainting model is shown, made as in its training; without a mask, nothing stays."""
    width, height = size
    mask, pixels = torch.ones(1, 1, height, width), torch.zeros(1, 3, height, width)
    if source is not None and source.mask is not None:
        white = ImageOps.fit(source.mask.convert("L"), size, Image.Resampling.BOX)
        mask = torch.from_numpy(np.asarray(white) >= 128)[None, None].float()
        pixels = fitted(source.picture, size) * (1 - mask)
    step = model.latent_factor
    return Inpainting(mask[:, :, ::step, ::step], model.encode_image(pixels))


@torch.no_grad()
def _wishes(model: LatentDiffusion, batch: Sequence[Picture]) -> list[Wish]:
    """Return what each picture is to show; every text is encoded alone, so none depends on another's length."""
    texts = [_texts(one) for one in batch]
    encoded = {
        text: model.encode_text([text])
        for text in dict.fromkeys(text for parts, *others in texts for text in (*dict(parts), *others))
        if text is not None
    }
    return [
        Wish(
            [(encoded[text], weight) for text, weight in parts],
            None if away is None else encoded[away],
            None if avoided is None else (encoded[avoided], one.negative_guidance or 0),
        )
        for one, (parts, away, avoided) in zip(batch, texts, strict=True)
    ]


def _texts(one: Picture) -> tuple[list[tuple[str, float]], str | None, str | None]:
    """Return the prompts of a picture with their weights, what guidance leads away from, and what else; None: nothing.

    Where the negative prompt has a scale of its own, guidance leads away from what the model predicts without a prompt.
    """
    parts = prompt_syntax.composed(one.prompt)
    if one.negative_guidance is not None:
        return parts, "", one.negative
    return parts, one.negative if one.guidance > 1 or len(parts) > 1 else None, None


@contextmanager
def telling_of_memory(cfg: DrawConfig, base: Base, pictures: Sequence[Drawing], written: str) -> Iterator[None]:
    """Make an error of too little memory one that says what to try; `written` says where the pictures drawn so far are.

    Raises:
        UserError: in place of that error.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(_out_of_memory(cfg, base, pictures, written, error)) from error


def _out_of_memory(cfg: DrawConfig, base: Base, pictures: Sequence[Drawing], written: str, error: BaseException) -> str:
    width, height = max((one.size for one in pictures), key=lambda size: size[0] * size[1])
    scale = cfg.highres_scale if isinstance(cfg, GenerateConfig) else None
    is_stopped = cfg.on_out_of_memory == "stop"  # otherwise all that changes no picture was tried
    ways = [
        *(["--on-out-of-memory retry, which finds what fits"] if is_stopped else []),
        *([f"a lower --batch-size than {cfg.batch_size}"] if is_stopped and cfg.batch_size > 1 else []),
        *(["--attention sliced"] if is_stopped and cfg.attention != "sliced" else []),
        *(["--vae-tiling on"] if cfg.vae_tiling != "on" else []),
        *(["--precision bf16, which takes half"] if base.precision == "fp32" else []),
        *([f"a lower --highres-scale than {scale:g}"] if scale else []),
        f"a smaller --size than {width},{height}",
        "closing other programs",
    ]
    reason = str(error).strip().partition("\n")[0] or type(error).__name__
    return (
        f"{base.device} has too little memory for this. What to try, in this order: {'; '.join(ways)}. {written} "
        f"({reason})"
    )

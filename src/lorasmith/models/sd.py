"""Stable Diffusion 1 and 2: recognised, described and loaded from original single files and diffusers folders.

Widths are read from the tensors' shapes. What shapes cannot tell, heads and norm groups, is Stable Diffusion's own
unless the file says otherwise: a diffusers folder in its config.json, a miniature's single file in the metadata value
`lorasmith.architecture`. diffusers and transformers are imported when a model is built, which takes seconds, and not to
describe a file.
"""

import json
import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lorasmith.checkpoint import Checkpoint, open_checkpoint
from lorasmith.data.captions import weights
from lorasmith.diffusion import Prediction, stable_diffusion_schedule
from lorasmith.errors import UserError
from lorasmith.models import tokenizer
from lorasmith.models.base import AdapterPlace, Conditioning, LatentDiffusion, ModelFacts, Residuals
from lorasmith.models.embeddings import NO_EMBEDDINGS, Embeddings
from lorasmith.models.keys import sd as keys
from lorasmith.models.keys import sd_blocks
from lorasmith.models.keys.sd import Family, Shape, Source, Table

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from transformers import CLIPTextModel

ARCHITECTURE_KEY = "lorasmith.architecture"
LATENT_SCALE = 0.18215  # the latents' standard deviation is about 1 after it
_TEXT_HEADS: dict[Family, int] = {"sd1": 12, "sd2": 16}
_PAD: dict[Family, int] = {"sd1": tokenizer.END, "sd2": 0}
_V_PREDICTION_NAMES = ("768-v", "v2-1_768", "768v")  # how the known SD2 files that predict v are called
_PREDICTIONS: dict[str, Prediction] = {"epsilon": "epsilon", "v": "v_prediction", "v_prediction": "v_prediction"}
_INPAINTING = 9  # channels that its U-Net takes: latents, mask, the masked picture's latents
_OTHER_INPUTS = {_INPAINTING: "an inpainting model", 5: "a depth model", 8: "an InstructPix2Pix model"}
_TILE = 512  # pixels on the side of a tile; a quarter of it is shared with the next, where both are blended
_NUM_SHOWN = 3
_BREAK = re.compile(r"\bBREAK\b")  # in prompts, as WebUI has it


class StableDiffusion(LatentDiffusion):
    """Stable Diffusion 1 or 2.

    Args:
        clip_skip: which of the text encoder's layers from the end gives the conditioning; 1: the last.
        max_token_length: 75, 150 or 225 tokens of a caption are used, in chunks of 75; None: all, and the word BREAK
            begins a new chunk.
        weighted_captions: `(a:1.2)` and `[a]` in captions are weights.
        embeddings: what captions may name besides words.
    """

    latent_factor = 8
    latent_channels = 4
    latent_scale = LATENT_SCALE
    self_attentions = keys.self_attentions()
    denoiser: Any  # UNet2DConditionModel; Any, since nn.Module's attributes are "Tensor or Module" to a type checker
    text_encoder: Any  # CLIPTextModel
    vae: Any  # AutoencoderKL

    def __init__(
        self,
        family: Family,
        denoiser: "UNet2DConditionModel",
        text_encoder: "CLIPTextModel",
        vae: "AutoencoderKL",
        prediction: Prediction,
        clip_skip: int = 1,
        max_token_length: int | None = tokenizer.CHUNK,
        weighted_captions: bool = False,
        embeddings: Embeddings = NO_EMBEDDINGS,
    ) -> None:
        super().__init__()
        self.family: Family = family
        self.denoiser, self.text_encoder, self.vae = denoiser, text_encoder, vae
        self.is_inpainting = denoiser.config["in_channels"] == _INPAINTING
        vae.tile_sample_min_size, vae.tile_latent_min_size = _TILE, _TILE // self.latent_factor
        self.schedule = stable_diffusion_schedule(prediction)
        self._clip_skip = clip_skip
        self._num_chunks = None if max_token_length is None else max_token_length // tokenizer.CHUNK
        self._is_weighted = weighted_captions
        self._embeddings = embeddings
        inputs = text_encoder.embeddings
        inputs.token_embedding = self._embeddings.extend(inputs.token_embedding)

    def encode_text(self, captions: list[str]) -> Conditioning:
        """Return {"text": (B, 77, width)}, or 152, 227 ... instead of 77; words that find no place are cut.

        Without a limit the caption with the most chunks says how many the others get too.

        The text encoder sees chunks of 75 tokens, each with a start and an end of its own; of these only the first
        start and the last end are kept (sd-scripts, library/strategy_sd.py). Weights multiply its output.
        """
        ids, factors = self._tokens(captions)
        states = self._encode(ids.flatten(0, 1))
        if self._is_weighted:
            states = states * factors.flatten(0, 1)[..., None].to(states.device, states.dtype)
        states = states.unflatten(0, ids.shape[:2])  # (B, n, 77, width)
        inner = states[:, :, 1:-1].flatten(1, 2)
        return {"text": torch.cat([states[:, 0, :1], inner, states[:, -1, -1:]], dim=1)}

    def count_tokens(self, captions: list[str]) -> list[int]:
        """Return how many tokens each caption has, uncut and without start and end."""
        return [sum(map(len, _words(caption, self._is_weighted, self._embeddings))) for caption in captions]

    @torch.no_grad()
    def encode_image(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and std, each (B, 4, H/8, W/8) fp32, of the latents of pixels (B, 3, H, W) in [-1, 1]."""
        self.vae.use_tiling = pixels.shape[-2:].numel() > self.tile_above
        posterior = self.vae.encode(pixels.to(self._vae_device, self.vae.dtype)).latent_dist
        return posterior.mean.float() * LATENT_SCALE, posterior.std.float() * LATENT_SCALE

    def image_encoding(self) -> dict[str, Any]:
        """Return the VAE's structure, the latents' scale, and what is made of it."""
        return {"vae": _settings(self.vae.config), "scale": LATENT_SCALE, "form": "mean and std of the posterior"}

    def text_encoding(self) -> dict[str, Any]:
        """Return the text encoder's structure, its tokenizer, and how captions are cut, read and weighted.

        Embeddings are among it only where there are any, so that what was cached without them is found.
        """
        embeddings = {"embeddings": sorted(one.identity for one in self._embeddings)} if self._embeddings else {}
        return {
            "text_encoder": _settings(self.text_encoder.config.to_dict()),
            "attention": self.text_encoder.config._attn_implementation,
            "tokenizer": tokenizer.vocabulary_hash(),
            "pad": _PAD[self.family],
            "clip_skip": self._clip_skip,
            "chunks": self._num_chunks,
            "weighted": self._is_weighted,
            **embeddings,
        }

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Return pixels (B, 3, H, W), about [-1, 1], of latents (B, 4, H/8, W/8)."""
        self.vae.use_tiling = latents.shape[-2:].numel() * self.latent_factor**2 > self.tile_above
        return self.vae.decode(latents.to(self._vae_device, self.vae.dtype) / LATENT_SCALE).sample

    def forward(self, x_t: Tensor, t: Tensor, cond: Conditioning, added: Residuals | None = None) -> Tensor:
        """Return the U-Net's prediction (B, 4, h, w) in its dtype, for fp32 x_t (B, 4, h, w) and timesteps (B,)."""
        dtype, device = self.denoiser.dtype, self.device
        text = cond["text"].to(device, dtype)
        *down, middle = added or [None]
        return self.denoiser(
            x_t.to(device, dtype),
            t.to(device),
            encoder_hidden_states=text,
            down_block_additional_residuals=down or None,
            mid_block_additional_residual=middle,
        ).sample

    def adapter_targets(self) -> dict[str, nn.Module]:
        """Return the 264 (SD1) or 330 (SD2) layers that a LoRA may go on, by saved name."""
        unet = {name: self.denoiser.get_submodule(module) for name, module in keys.unet_targets().items()}
        text = keys.text_targets(self.family)
        return {**unet, **{name: self.text_encoder.get_submodule(module) for name, module in text.items()}}

    def adaptable_layers(self) -> dict[str, nn.Module]:
        """Return every layer that a file may change, by saved name: the targets, convolutions, norms, embeddings."""
        parts = {"unet": dict(self.denoiser.named_modules()), "text_encoder": dict(self.text_encoder.named_modules())}
        found = {name: parts[part].get(module) for name, (part, module) in keys.layers().items()}
        return {name: layer for name, layer in found.items() if layer is not None}

    @property
    def _vae_device(self) -> torch.device:
        return next(self.vae.parameters()).device

    def _encode(self, ids: Tensor) -> Tensor:
        """Return the text encoder's states (N, 77, width) for ids (N, 77)."""
        ids = ids.to(next(self.text_encoder.parameters()).device)
        if self._clip_skip == 1:
            return self.text_encoder(ids).last_hidden_state
        layers = self.text_encoder(ids, output_hidden_states=True).hidden_states  # embeddings, then every layer
        return self.text_encoder.final_layer_norm(layers[-self._clip_skip])

    def _tokens(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        """Return ids and weights, each (B, chunks, 77): start, caption, end, padding, of which only words have weights.

        A pad token of the tokenizer's own would change how it reads captions.
        """
        filled = [self._chunks(caption) for caption in captions]
        shape = (len(captions), max(map(len, filled)), tokenizer.NUM_POSITIONS)
        ids, factors = torch.full(shape, _PAD[self.family]), torch.ones(shape)
        ids[:, :, :2] = torch.tensor([tokenizer.START, tokenizer.END])  # of a chunk that one of them does not have
        for row, chunks in enumerate(filled):
            for number, chunk in enumerate(chunks):
                line = [tokenizer.START, *(token for token, _ in chunk), tokenizer.END]
                ids[row, number, : len(line)] = torch.tensor(line)
                factors[row, number, 1 : len(line) - 1] = torch.tensor([factor for _, factor in chunk])
        return ids, factors

    def _chunks(self, caption: str) -> list[list[tokenizer.Token]]:
        """Return the chunks of at most 75 tokens that a caption is encoded in."""
        if self._num_chunks is not None:
            return tokenizer.chunks(_words(caption, self._is_weighted, self._embeddings), self._num_chunks)[0]
        sections: list[list[tuple[str, float]]] = [[]]
        for text, weight in weights(caption) if self._is_weighted else [(caption, 1.0)]:
            first, *others = _BREAK.split(text)
            sections[-1].append((first, weight))
            sections += [[(other, weight)] for other in others]
        return [chunk for own in sections for chunk in tokenizer.chunks(self._embeddings.words(own), None)[0]]


def _settings(config: Mapping[str, Any]) -> dict[str, str]:
    """Return a module's configuration without what a library notes there for itself."""
    return {name: str(value) for name, value in config.items() if not name.startswith("_") and "version" not in name}


def _words(caption: str, is_weighted: bool, embeddings: Embeddings) -> list[list[tokenizer.Token]]:
    return embeddings.words(weights(caption) if is_weighted else [(caption, 1.0)])


def cut_captions(
    captions: Collection[str], *, max_token_length: int, weighted_captions: bool, embeddings: Embeddings
) -> set[str]:
    """Return those captions of which words find no place in that many tokens."""
    num_chunks = max_token_length // tokenizer.CHUNK
    if not weighted_captions:  # what fits into one chunk needs no closer look
        counts = zip(captions, tokenizer.count(captions), strict=True)
        captions = [text for text, number in counts if number > tokenizer.CHUNK or embeddings.used_in(text)]
    found = {caption: _words(caption, weighted_captions, embeddings) for caption in captions}
    return {caption for caption, words in found.items() if not tokenizer.chunks(words, num_chunks)[1]}


# --- what a checkpoint is ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Layout:
    """Where a checkpoint has which part; no VAE is possible."""

    family: Family
    unet: Table
    text: Table
    vae: Table | None

    def by_component(self) -> dict[str, Table]:
        """Return the tables of what adapters go on, by diffusers' names of the parts."""
        return {"unet": self.unet, "text_encoder": self.text}


@dataclass(frozen=True)
class _Details:
    """What the shapes do not tell. Heads are a number for all levels or one for each; None: the family's own."""

    unet_heads: int | tuple[int, ...] | None = None
    unet_groups: int = 32
    vae_groups: int = 32
    text_heads: int | None = None
    resolution: tuple[int, int] | None = None


@dataclass(frozen=True)
class Component:
    """A part of a model: where its tensors are in the file, and its module on the meta device."""

    table: Table
    module: Any


def matches(shapes: Mapping[str, Shape]) -> bool:
    """Return whether these are the tensors of a Stable Diffusion 1 or 2 model."""
    return _layout(shapes) is not None


def describe(
    checkpoint: Checkpoint,
    *,
    v2: bool | None,
    prediction: str | None,
    vae: str | None,
    to_run: bool,
    may_inpaint: bool,
) -> ModelFacts:
    """Return what the header says of the model.

    Args:
        v2: what the user says the family is; None: nothing.
        prediction: what the user says the U-Net predicts; None: nothing.
        vae: another VAE's file or folder instead of the model's own.
        to_run: it must be possible to run it: it has a VAE, and takes latents.
        may_inpaint: to run, an inpainting model will do, which takes more than latents.

    Raises:
        UserError: it is of the other family, or cannot be run.
    """
    shapes = _shapes(checkpoint)
    layout = _require_layout(shapes)
    is_inpainting = _module_shapes(layout.unet, shapes)[_FIRST][1] == _INPAINTING
    if to_run and not (may_inpaint and is_inpainting):
        _check_inputs(checkpoint.path, _module_shapes(layout.unet, shapes))
    if to_run:
        _check_vae(checkpoint.path, layout, vae)
    _check_text_layers(checkpoint.path, layout.family)
    family = layout.family
    if v2 is not None and v2 != (family == "sd2"):
        raise UserError(
            f"{checkpoint.path} is {keys.TITLES[family]} by its text encoder, but --v2 {str(v2).lower()} says that it "
            f"is {keys.TITLES['sd2' if v2 else 'sd1']}; leave --v2 out, or give the model that you mean."
        )
    found, notes = _find_prediction(checkpoint, family, prediction, is_inpainting)
    if is_inpainting:
        notes = ["an inpainting model: it is shown what stays of the picture, and the mask", *notes]
    is_v = found == "v_prediction"
    side = _native_side(family, found)
    if family == "sd1":
        version, architecture = "sd_v1", "stable-diffusion-v1"
    else:
        version = "sd_v2_v" if is_v else "sd_v2"
        architecture = "stable-diffusion-v2-768-v" if is_v else "stable-diffusion-v2-512"
    resolution = _details(checkpoint).resolution or (side, side)
    parts = {
        "denoiser": _module_shapes(layout.unet, shapes),
        "text_encoder": _module_shapes(layout.text, shapes),
        "vae": _module_shapes(layout.vae or {}, shapes),
    }
    return ModelFacts(
        family=family,
        title=keys.TITLES[family],
        prediction=found,
        notes=notes,
        resolution=resolution,
        is_v2=family == "sd2",
        base_model_version=version,
        architecture=architecture,
        num_values={part: sum(map(math.prod, modules.values())) for part, modules in parts.items()},
        width=parts["denoiser"][_FIRST][0],
        text_width=parts["text_encoder"][_TOKEN_EMBEDDING][1],
        num_text_layers=keys.NUM_TEXT_LAYERS[family],
        latent_channels=StableDiffusion.latent_channels,
        latent_factor=StableDiffusion.latent_factor,
        self_attentions=StableDiffusion.self_attentions,
    )


def gaps(checkpoint: Checkpoint) -> tuple[list[str], list[str]]:
    """Return which weights a complete model has and this file does not, and the tensors that no part of it has.

    Not every layer has a bias, or every resnet a shortcut, so these are never missing.
    """
    shapes = _shapes(checkpoint)
    layout = _require_layout(shapes)
    tables = [layout.unet, layout.text, layout.vae or keys.ldm_vae()]
    known = {source.name for table in tables for source in table.values()} | {keys.POSITION_IDS}
    known |= {source.name for source in keys.ldm_unet(is_ema=True).values()}
    missing = [
        source.name
        for table in tables
        for module, source in table.items()
        if module.endswith(".weight") and "conv_shortcut" not in module and source.name not in shapes
    ]
    return list(dict.fromkeys(missing)), [name for name in shapes if name not in known]


def target_shapes(checkpoint: Checkpoint) -> dict[str, Shape]:
    """Return the weights' shapes of the layers that a LoRA may go on, by saved name, from the header alone.

    Raises:
        UserError: some of the layers are not in the file.
    """
    shapes = _shapes(checkpoint)
    layout = _require_layout(shapes)
    parts = [
        (keys.unet_targets(), _module_shapes(layout.unet, shapes), "U-Net"),
        (keys.text_targets(layout.family), _module_shapes(layout.text, shapes), "text encoder"),
    ]
    found: dict[str, Shape] = {}
    for targets, modules, part in parts:
        wanted = {name: f"{module}.weight" for name, module in targets.items()}
        _check_complete(checkpoint.path, part, missing=[w for w in wanted.values() if w not in modules])
        found |= {name: modules[weight] for name, weight in wanted.items()}
    return found


def adapter_places(checkpoint: Checkpoint, *, of_plain_models: bool) -> tuple[str, dict[str, AdapterPlace], list[str]]:
    """Return the family, where the layers that a file may change are in the model's, by saved name, and notes.

    Args:
        of_plain_models: leave out the first layer of a model that takes more than latents.

    Raises:
        UserError: some of the layers that a LoRA may go on are not in the file.
    """
    shapes_of_file, targets = _shapes(checkpoint), target_shapes(checkpoint)
    layout = _require_layout(shapes_of_file)
    parts = {part: (table, _module_shapes(table, shapes_of_file)) for part, table in layout.by_component().items()}
    original = keys.ldm_unet()
    places: dict[str, AdapterPlace] = {}
    for name, (part, module) in keys.layers().items():
        table, shapes = parts[part]
        weight, bias = f"{module}.weight", f"{module}.bias"
        if weight in shapes and not (of_plain_models and part == "unet" and _takes_more(weight, shapes)):
            block = sd_blocks.block_of(original[weight].name) if part == "unet" else sd_blocks.BASE
            source = table[bias] if bias in shapes else None
            places[name] = AdapterPlace(table[weight], source, shapes[weight], block, name in targets)
    is_average_used = layout.unet[_CONTEXT].name.startswith(keys.EMA)
    has_both = not is_average_used and any(name.startswith(keys.EMA) for name in shapes_of_file)
    notes = ["the moving average (EMA) that the model holds beside its weights is left as it is."] if has_both else []
    return layout.family, places, notes


def _takes_more(weight: str, unet: Mapping[str, Shape]) -> bool:
    """Return whether this is the first layer of a U-Net that takes more than latents."""
    return weight == _FIRST and unet[weight][1] != StableDiffusion.latent_channels


def block_weights(numbers: list[float]) -> dict[str, float]:
    """Return the weight of every block from a list as UIs know them.

    Raises:
        ValueError: no list in use has so many numbers.
    """
    return sd_blocks.weights_of(numbers)


def load(
    checkpoint: Checkpoint,
    *,
    dtype: torch.dtype,
    device: torch.device,
    vae: str | None,
    prediction: str | None,
    clip_skip: int,
    ema: bool,
    max_token_length: int | None,
    weighted_captions: bool,
    embeddings: Embeddings,
) -> StableDiffusion:
    """Load the model, frozen: U-Net and text encoder in `dtype`, the VAE in fp32, tensor by tensor.

    Args:
        vae: another VAE's file or folder instead of the model's own.
        prediction: as for `describe`.
        ema: take the moving average of the U-Net where the file has it beside the last weights.

    Raises:
        UserError: tensors are missing, unexpected or of another shape; there is no VAE; clip_skip is too large.
    """
    shapes = _shapes(checkpoint)
    layout = _require_layout(shapes, is_ema=ema)
    facts = describe(checkpoint, v2=None, prediction=prediction, vae=vae, to_run=True, may_inpaint=True)
    num_layers = keys.NUM_TEXT_LAYERS[layout.family]
    if not 1 <= clip_skip <= num_layers:
        raise UserError(f"clip skip {clip_skip}; {facts.title} has {num_layers} text layers, give 1 to {num_layers}.")
    loader = Loader(checkpoint, device)
    unet = loader.load("U-Net", _make_unet(layout, loader), layout.unet, dtype)
    text = loader.load("text encoder", _make_text_encoder(layout, loader), layout.text, dtype)
    text.embeddings.register_buffer(
        "position_ids", torch.arange(keys.NUM_POSITIONS, device=device)[None], persistent=False
    )  # the only thing on the meta device that no file has
    if vae is not None:
        with open_checkpoint(Path(vae)) as other:
            own_vae = _load_vae(Loader(other, device), _require_vae(other))
    else:
        assert layout.vae is not None, "describe has looked"
        own_vae = _load_vae(loader, layout.vae)
    return StableDiffusion(
        layout.family, unet, text, own_vae, facts.prediction, clip_skip, max_token_length, weighted_captions, embeddings
    )


def components(checkpoint: Checkpoint) -> dict[str, Component]:
    """Return the whole model's parts, checked, by the names that diffusers has for them: unet, text_encoder, vae.

    A folder's text encoder may have all of OpenCLIP's layers; its table then has them too.

    Raises:
        UserError: tensors are missing, unexpected or of another shape; there is no VAE.
    """
    loader = Loader(checkpoint, torch.device("meta"))
    layout = _require_layout(loader.shapes)
    if layout.vae is None:
        raise UserError(f"{checkpoint.path} has no VAE in it; give a complete model.")
    last = _last_layer(layout, loader.shapes)
    _check_complete(
        checkpoint.path, "text encoder", missing=[name for name in last.values() if name not in loader.shapes]
    )
    loader.shapes = {name: shape for name, shape in loader.shapes.items() if name not in last.values()}
    found = {
        "unet": Component(layout.unet, _make_unet(layout, loader)),
        "text_encoder": Component(layout.text, _make_text_encoder(layout, loader)),
        "vae": Component(layout.vae, _make_vae(layout.vae, loader)),
    }
    for part, component in found.items():
        loader.check(part, component.module, component.table)
    text = found["text_encoder"]
    table = text.table | {module: Source(name) for module, name in last.items()}
    return found | {"text_encoder": Component(table, text.module)}


def _last_layer(layout: _Layout, shapes: Mapping[str, Shape]) -> dict[str, str]:
    """Return where the layer is that SD2's text encoder does without, if a folder has it."""
    start = layout.text[_TOKEN_EMBEDDING].name.removesuffix(_TOKEN_EMBEDDING)
    layer = f"encoder.layers.{keys.NUM_OPENCLIP_LAYERS - 1}."
    if layout.family != "sd2" or not any(name.startswith(start + layer) for name in shapes):
        return {}
    every = keys.clip_text(start, keys.NUM_OPENCLIP_LAYERS)
    return {module: source.name for module, source in every.items() if module.startswith(layer)}


def architecture(checkpoint: Checkpoint, facts: ModelFacts) -> dict[str, Any]:
    """Return what shapes do not tell and is not Stable Diffusion's own; `ARCHITECTURE_KEY` holds it as JSON."""
    details, shapes = _details(checkpoint), _shapes(checkpoint)
    layout = _require_layout(shapes)
    unet = _module_shapes(layout.unet, shapes)
    widths = tuple(unet[f"down_blocks.{level}.resnets.0.conv1.weight"][0] for level in range(keys.NUM_LEVELS))
    told = {
        "unet_heads": (details.unet_heads, _unet_heads(layout.family, widths)),
        "unet_norm_groups": (details.unet_groups, 32),
        "vae_norm_groups": (details.vae_groups, 32),
        "text_heads": (details.text_heads, _TEXT_HEADS[layout.family]),
        "resolution": (facts.resolution, (_native_side(layout.family, facts.prediction),) * 2),
    }
    return {name: value for name, (value, own) in told.items() if value is not None and value != own}


def _shapes(checkpoint: Checkpoint) -> dict[str, Shape]:
    return {name: tuple(checkpoint.shape(name)) for name in checkpoint.names()}


def _module_shapes(table: Table, stored: Mapping[str, Shape]) -> dict[str, Shape]:
    return keys.shapes(table, stored)


def _layout(shapes: Mapping[str, Shape], *, is_ema: bool = False) -> _Layout | None:
    """Return where the parts are, or None for what is no SD1 or SD2."""
    unet = _find_unet(shapes, is_ema=is_ema)
    if unet is None or any(name.startswith(("text_encoder_2/", "text_encoder_3/")) for name in shapes):
        return None
    is_linear = len(_module_shapes(unet, shapes)[_PROJECTION]) == 2  # SD2 and later
    families: tuple[Family, ...] = ("sd2", "sd1") if is_linear else ("sd1", "sd2")
    for family in families:
        for text in _text_tables(family, shapes):
            if text[_TOKEN_EMBEDDING].name in shapes:
                return _Layout(family, unet, text, _find_vae(shapes))
    return None


_TOKEN_EMBEDDING = "embeddings.token_embedding.weight"
_PROJECTION = "down_blocks.0.attentions.0.proj_in.weight"
_CONTEXT = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight"
_FIRST = "conv_in.weight"


def _find_unet(shapes: Mapping[str, Shape], *, is_ema: bool) -> Table | None:
    plain, average = keys.ldm_unet(), keys.ldm_unet(is_ema=True)
    tables = [average, plain] if is_ema else [plain, average]
    return next(
        (table for table in [*tables, keys.diffusers_unet()] if _has(table, shapes, _PROJECTION, _CONTEXT)), None
    )


def _text_tables(family: Family, shapes: Mapping[str, Shape]) -> list[Table]:
    num_layers = keys.NUM_TEXT_LAYERS[family]
    folder = [keys.clip_text(prefix, num_layers) for prefix in ("text_encoder/text_model.", "text_encoder/")]
    return [keys.text_table(family, shapes), *folder]


def _find_vae(shapes: Mapping[str, Shape]) -> Table | None:
    """Return the VAE's table: in an original file, a diffusers folder, or a file of its own in either naming."""
    tables = [
        keys.ldm_vae(),
        keys.ldm_vae(""),
        *(keys.diffusers_vae(prefix, is_old=is_old) for prefix in ("vae/", "") for is_old in (False, True)),
    ]
    query, first = "encoder.mid_block.attentions.0.to_q.weight", "encoder.down_blocks.0.resnets.0.conv1.weight"
    return next((table for table in tables if _has(table, shapes, query, first)), None)


def _has(table: Table, shapes: Mapping[str, Shape], *modules: str) -> bool:
    return all(table[module].name in shapes for module in modules)


def _require_layout(shapes: Mapping[str, Shape], *, is_ema: bool = False) -> _Layout:
    layout = _layout(shapes, is_ema=is_ema)
    assert layout is not None, "ask matches() first"
    return layout


def _require_vae(checkpoint: Checkpoint) -> Table:
    table = _find_vae(_shapes(checkpoint))
    if table is None:
        raise UserError(
            f"{checkpoint.path} holds no VAE of Stable Diffusion; --vae takes a VAE file, a diffusers VAE folder, or a "
            "whole model with a VAE in it."
        )
    return table


def _check_vae(path: Path, layout: _Layout, given: str | None) -> None:
    if given is not None:
        with open_checkpoint(given) as other:
            _require_vae(other)
    elif layout.vae is None:
        raise UserError(f"{path} has no VAE in it; give one with --vae.")


def _check_inputs(path: Path, unet: Mapping[str, Shape]) -> None:
    channels = unet[_FIRST][1]
    if channels != StableDiffusion.latent_channels:
        kind = _OTHER_INPUTS.get(channels, "a model of another kind")
        raise UserError(
            f"{path} is not supported yet: this is {kind} ({channels} input channels); expected a text-to-image model "
            f"({StableDiffusion.latent_channels}). Train on the plain model: the LoRA works on both."
        )


def _check_text_layers(path: Path, family: Family) -> None:
    """Refuse a folder whose text encoder ends at another layer than the family's.

    SD2 was trained on the output of the 23rd of OpenCLIP's 24 layers, so its folders end there, and one file has no
    place to say anything else.
    """
    own = keys.NUM_TEXT_LAYERS[family]
    if (found := _config(path, "text_encoder").get("num_hidden_layers", own)) != own:
        raise UserError(
            f"{path}: its text encoder takes the output of layer {found} (num_hidden_layers in its config.json), and "
            f"{keys.TITLES[family]} that of layer {own}: here, and in the original form, it would be another model. If "
            f"it was not trained so, write {own} there; weights of later layers are then left unused."
        )


def _find_prediction(
    checkpoint: Checkpoint, family: Family, given: str | None, is_inpainting: bool
) -> tuple[Prediction, list[str]]:
    """Return what the U-Net predicts, with a note where that is a guess."""
    if given is not None:
        return _PREDICTIONS[given], []
    named = checkpoint.metadata.get("modelspec.prediction_type") or _config(checkpoint.path, "scheduler").get(
        "prediction_type"
    )
    if named in _PREDICTIONS:
        return _PREDICTIONS[named], []
    if family == "sd1" or is_inpainting:  # as Stability's own for SD2
        return "epsilon", []
    if any(part in checkpoint.path.name.lower() for part in _V_PREDICTION_NAMES):
        return "v_prediction", []
    note = (
        "the file does not say what this SD 2.x model predicts; v_prediction is assumed (the 768 models). For the 512 "
        "base models give --prediction epsilon: with the wrong one the LoRA learns noise."
    )
    return "v_prediction", [note]


def _native_side(family: Family, prediction: Prediction) -> int:
    return 768 if family == "sd2" and prediction == "v_prediction" else 512


def _details(checkpoint: Checkpoint) -> _Details:
    """Return heads, groups and resolution as the metadata or a folder's configurations have them."""
    if checkpoint.path.is_dir():
        return _folder_details(checkpoint.path)
    try:
        stored = json.loads(checkpoint.metadata.get(ARCHITECTURE_KEY, "{}"))
    except json.JSONDecodeError as error:
        raise UserError(
            f"{checkpoint.path}: its metadata value {ARCHITECTURE_KEY} is not JSON ({error}); it was damaged by "
            "whatever wrote the file, get it anew."
        ) from error
    return _Details(
        unet_heads=_heads(stored.get("unet_heads")),
        unet_groups=stored.get("unet_norm_groups", 32),
        vae_groups=stored.get("vae_norm_groups", 32),
        text_heads=stored.get("text_heads"),
        resolution=_square(stored.get("resolution")),
    )


def _folder_details(folder: Path) -> _Details:
    unet, text = _config(folder, "unet"), _config(folder, "text_encoder")
    vae = _config(folder, "vae") or _config(folder, ".")
    sample_size = unet.get("sample_size")
    heads = unet.get("num_attention_heads") or unet.get("attention_head_dim", 8)  # diffusers misnames it so
    return _Details(
        unet_heads=_heads(heads),
        unet_groups=unet.get("norm_num_groups", 32),
        vae_groups=vae.get("norm_num_groups", 32),
        text_heads=text.get("num_attention_heads"),
        resolution=_square(sample_size and sample_size * StableDiffusion.latent_factor),
    )


def _config(folder: Path, part: str) -> dict[str, Any]:
    """Return a part's configuration in a diffusers folder; {} where there is none."""
    path = folder / part / ("scheduler_config.json" if part == "scheduler" else "config.json")
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}); get the model folder anew.") from error


def _heads(value: int | list[int] | None) -> int | tuple[int, ...] | None:
    return tuple(value) if isinstance(value, list) else value


def _square(value: int | list[int] | None) -> tuple[int, int] | None:
    if value is None:
        return None
    return (value, value) if isinstance(value, int) else (value[0], value[1])


# --- modules, empty and filled ----------------------------------------------------------------------------------------


class Loader:
    """Fills modules from a checkpoint."""

    def __init__(self, checkpoint: Checkpoint, device: torch.device) -> None:
        self.checkpoint, self._device = checkpoint, device
        self.shapes = _shapes(checkpoint)

    @cached_property
    def details(self) -> _Details:
        return _details(self.checkpoint)

    def shape(self, table: Table, module: str) -> Shape:
        """Return a tensor's shape.

        Raises:
            UserError: the file does not have it.
        """
        name = table[module].name
        if name not in self.shapes:
            _check_complete(self.checkpoint.path, "model", missing=[name])
        return table[module].shape(self.shapes[name])

    def load(self, part: str, empty: nn.Module, table: Table, dtype: torch.dtype) -> Any:
        """Return the module, made on the meta device, with the file's tensors, frozen."""
        self.check(part, empty, table)
        tensors = keys.read(table, self.shapes.keys(), self.checkpoint.tensor)
        state = {name: tensor.to(self._device, dtype, copy=True).contiguous() for name, tensor in tensors}
        empty.load_state_dict(state, strict=True, assign=True)
        return empty.requires_grad_(False).eval()

    def check(self, part: str, empty: nn.Module, table: Table) -> None:
        """Check that the file has what the module needs, and nothing else in its place.

        Raises:
            UserError: tensors are missing, unexpected or of another shape.
        """
        expected = {name: tuple(tensor.shape) for name, tensor in empty.state_dict().items()}
        found = keys.shapes(table, self.shapes)
        _check_complete(
            self.checkpoint.path,
            part,
            missing=[name for name in expected if name not in found],
            unexpected=[name for name in found if name not in expected] + keys.strangers(table, self.shapes),
            other=[
                f"{name} is {found[name]}, expected {shape}"
                for name, shape in expected.items()
                if found.get(name, shape) != shape
            ],
        )


def _check_complete(
    path: Path,
    part: str,
    *,
    missing: Collection[str],
    unexpected: Collection[str] = (),
    other: Collection[str] = (),
) -> None:
    """Raise one report of all that does not fit."""
    problems = {"missing": missing, "unexpected": unexpected, "of another shape": other}
    listed = [f"{len(names)} {kind}: {_shorten(names)}" for kind, names in problems.items() if names]
    if listed:
        raise UserError(
            f"{path}: the {part}'s tensors are not those of Stable Diffusion; {'; '.join(listed)}. The file is "
            "damaged, incomplete or of another model; get it anew, or give another base model."
        )


def _shorten(names: Collection[str]) -> str:
    rest = len(names) - _NUM_SHOWN
    return ", ".join(list(names)[:_NUM_SHOWN]) + (f" and {rest} more" if rest > 0 else "")


def _make_unet(layout: _Layout, loader: Loader) -> nn.Module:
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    build: Any = UNet2DConditionModel
    with torch.device("meta"):
        return build(
            sample_size=64,
            in_channels=loader.shape(layout.unet, _FIRST)[1],
            out_channels=StableDiffusion.latent_channels,
            up_block_types=("UpBlock2D", *["CrossAttnUpBlock2D"] * (keys.NUM_LEVELS - 1)),
            **_encoder_settings(layout, loader),
        )


def encoder_settings(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return how diffusers is to build the U-Net's way down and middle, of which ControlNets have a copy."""
    loader = Loader(checkpoint, torch.device("meta"))
    return _encoder_settings(_require_layout(loader.shapes), loader)


def unet_tensors(checkpoint: Checkpoint) -> Iterator[tuple[str, Tensor]]:
    """Yield the U-Net's tensors by the names of its modules, one at a time."""
    shapes = _shapes(checkpoint)
    return keys.read(_require_layout(shapes).unet, shapes.keys(), checkpoint.tensor)


def _encoder_settings(layout: _Layout, loader: Loader) -> dict[str, Any]:
    table, levels = layout.unet, range(keys.NUM_LEVELS)
    widths = tuple(loader.shape(table, f"down_blocks.{level}.resnets.0.conv1.weight")[0] for level in levels)
    _check_groups(loader.checkpoint.path, widths, loader.details.unet_groups)
    heads = loader.details.unet_heads or _unet_heads(layout.family, widths)
    return {
        "down_block_types": (*["CrossAttnDownBlock2D"] * (keys.NUM_LEVELS - 1), "DownBlock2D"),
        "block_out_channels": widths,
        "layers_per_block": keys.NUM_LAYERS,
        "cross_attention_dim": loader.shape(table, _CONTEXT)[1],
        "attention_head_dim": heads,  # diffusers' misnomer: it is the number of heads
        "norm_num_groups": loader.details.unet_groups,
        "use_linear_projection": len(loader.shape(table, _PROJECTION)) == 2,
        "upcast_attention": layout.family == "sd2",  # SD2's scores overflow fp16 where they are computed explicitly
    }


def _check_groups(path: Path, widths: Sequence[int], groups: int) -> None:
    """Refuse widths that the norms' groups do not divide: a miniature whose header has been lost (a UserError)."""
    if odd := [width for width in widths if width % groups]:
        raise UserError(
            f"{path} has layers of {odd[0]} channels, which do not go into the {groups} groups of Stable Diffusion's "
            f"norms. A small model says its own in its metadata ({ARCHITECTURE_KEY}), which a .ckpt has no place for: "
            "give its .safetensors or its folder."
        )


def _unet_heads(family: Family, widths: tuple[int, ...]) -> int | tuple[int, ...]:
    """Return SD1's 8 heads of any width, or SD2's of any number, 64 wide."""
    return 8 if family == "sd1" else tuple(max(1, width // 64) for width in widths)


def _make_text_encoder(layout: _Layout, loader: Loader) -> nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModel

    num_tokens, width = loader.shape(layout.text, _TOKEN_EMBEDDING)
    build: Any = CLIPTextConfig
    config = build(
        vocab_size=num_tokens,
        hidden_size=width,
        intermediate_size=loader.shape(layout.text, "encoder.layers.0.mlp.fc1.weight")[0],
        num_hidden_layers=keys.NUM_TEXT_LAYERS[layout.family],
        num_attention_heads=loader.details.text_heads or _TEXT_HEADS[layout.family],
        max_position_embeddings=keys.NUM_POSITIONS,
        hidden_act="quick_gelu" if layout.family == "sd1" else "gelu",
        bos_token_id=tokenizer.START,
        eos_token_id=tokenizer.END,
        pad_token_id=_PAD[layout.family],
    )
    with torch.device("meta"):
        return CLIPTextModel(config)


def _load_vae(loader: Loader, table: Table) -> Any:
    return loader.load("VAE", _make_vae(table, loader), table, torch.float32)


def _make_vae(table: Table, loader: Loader) -> nn.Module:
    widths = tuple(
        loader.shape(table, f"encoder.down_blocks.{level}.resnets.0.conv1.weight")[0]
        for level in range(keys.NUM_LEVELS)
    )
    _check_groups(loader.checkpoint.path, widths, loader.details.vae_groups)
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    build: Any = AutoencoderKL
    with torch.device("meta"):
        return build(
            in_channels=3,
            out_channels=3,
            down_block_types=("DownEncoderBlock2D",) * keys.NUM_LEVELS,
            up_block_types=("UpDecoderBlock2D",) * keys.NUM_LEVELS,
            block_out_channels=widths,
            layers_per_block=keys.NUM_LAYERS,
            latent_channels=StableDiffusion.latent_channels,
            norm_num_groups=loader.details.vae_groups,
        )

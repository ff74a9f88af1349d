"""Names in Stable Diffusion 1 and 2 files, as data: original (LDM) single files, diffusers' modules, saved adapters.

Every table is built from the structure that all SD 1.x and 2.x models share; widths never matter. No name is ever read
off a live module: transformers renamed its modules once (5.6), and files written from those names are ignored by UIs.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Family = Literal["sd1", "sd2"]
Shape = tuple[int, ...]

NUM_LEVELS = 4
NUM_LAYERS = 2  # resnets of a level on the way down; one more on the way up
NUM_TEXT_LAYERS: dict[Family, int] = {"sd1": 12, "sd2": 23}  # SD2 takes the output of its 24-layer encoder's 23rd
NUM_OPENCLIP_LAYERS = 24
NUM_POSITIONS = 77
TITLES = {"sd1": "Stable Diffusion 1.x", "sd2": "Stable Diffusion 2.x"}

UNET = "model.diffusion_model."
VAE = "first_stage_model."
CLIP = "cond_stage_model.transformer.text_model."
OLD_CLIP = "cond_stage_model.transformer."  # files of 2022, e.g. NovelAI's
OPENCLIP = "cond_stage_model.model."
EMA = "model_ema."
POSITION_IDS = CLIP + "embeddings.position_ids"  # a constant; old readers demand it, new ones do not have it

_ENDS = ("weight", "bias")


@dataclass(frozen=True)
class Source:
    """Where in a file a module's tensor is.

    Args:
        part: which third of a fused query, key, value tensor; None: all of it.
        is_conv: the file holds a 1x1 convolution, the module is a Linear.
    """

    name: str
    part: int | None = None
    is_conv: bool = False

    def take(self, stored: Tensor) -> Tensor:
        """Return the module's tensor from the file's."""
        if self.part is not None:
            stored = stored.chunk(3)[self.part]
        return stored.flatten(1) if self.is_conv and stored.dim() == 4 else stored

    def shape(self, stored: Shape) -> Shape:
        """Return the shape of the module's tensor from that of the file's."""
        if self.part is not None:
            stored = (stored[0] // 3, *stored[1:])
        return stored[:2] if self.is_conv and len(stored) == 4 else stored


Table = dict[str, Source]  # module's tensor name -> where it is


@dataclass(frozen=True)
class Parts:
    """A model's tensors by module name.

    Args:
        kept: what no module uses but a complete file has, by the file's names.
    """

    unet: dict[str, Tensor]
    vae: dict[str, Tensor]
    text: dict[str, Tensor]
    kept: dict[str, Tensor]


# --- modules: diffusers' name -> LDM's ------------------------------------------------------------------------------


def _unet_modules() -> dict[str, str]:
    table = {
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "conv_in": "input_blocks.0.0",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
    }
    resnets = {"mid_block.resnets.0": "middle_block.0", "mid_block.resnets.1": "middle_block.2"}
    transformers = {"mid_block.attentions.0": "middle_block.1"}
    per_down, per_up = NUM_LAYERS + 1, NUM_LAYERS + 1
    for level in range(NUM_LEVELS):
        down, up = f"down_blocks.{level}", f"up_blocks.{level}"
        has_down_attention, has_up_attention = level < NUM_LEVELS - 1, level > 0
        for layer in range(NUM_LAYERS):
            block = f"input_blocks.{per_down * level + layer + 1}"
            resnets[f"{down}.resnets.{layer}"] = f"{block}.0"
            if has_down_attention:
                transformers[f"{down}.attentions.{layer}"] = f"{block}.1"
        for layer in range(NUM_LAYERS + 1):
            block = f"output_blocks.{per_up * level + layer}"
            resnets[f"{up}.resnets.{layer}"] = f"{block}.0"
            if has_up_attention:
                transformers[f"{up}.attentions.{layer}"] = f"{block}.1"
        if level < NUM_LEVELS - 1:
            table[f"{down}.downsamplers.0.conv"] = f"input_blocks.{per_down * (level + 1)}.0.op"
            index = 2 if has_up_attention else 1  # the upsampler follows the attention, where there is one
            table[f"{up}.upsamplers.0.conv"] = f"output_blocks.{per_up * (level + 1) - 1}.{index}.conv"
    for module, block in resnets.items():
        table |= {f"{module}.{ours}": f"{block}.{theirs}" for ours, theirs in _UNET_RESNET.items()}
    for module, block in transformers.items():
        table |= {f"{module}.{layer}": f"{block}.{layer}" for layer in _TRANSFORMER}
    return table


_UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",  # only where the width changes
}
_ATTENTION = [
    f"{attention}.{layer}" for attention in ("attn1", "attn2") for layer in ("to_q", "to_k", "to_v", "to_out.0")
]
_FEED_FORWARD = ["ff.net.0.proj", "ff.net.2"]
_ADAPTED = ["proj_in", "proj_out", *(f"transformer_blocks.0.{layer}" for layer in (*_ATTENTION, *_FEED_FORWARD))]
_TRANSFORMER = ["norm", *_ADAPTED, *(f"transformer_blocks.0.norm{n}" for n in (1, 2, 3))]


def _vae_modules() -> dict[str, str]:
    """Map all but the attention in the middle, whose Linear layers are 1x1 convolutions in LDM's files."""
    table = {"quant_conv": "quant_conv", "post_quant_conv": "post_quant_conv"}
    resnets: dict[str, str] = {}
    for part, direction in (("encoder", "down"), ("decoder", "up")):
        table |= {f"{part}.{name}": f"{part}.{name}" for name in ("conv_in", "conv_out")}
        table[f"{part}.conv_norm_out"] = f"{part}.norm_out"
        table[f"{part}.mid_block.attentions.0.group_norm"] = f"{part}.mid.attn_1.norm"
        resnets |= {f"{part}.mid_block.resnets.{n}": f"{part}.mid.block_{n + 1}" for n in range(2)}
        for level in range(NUM_LEVELS):
            # LDM counts the decoder's levels from the finest, diffusers in the order they run
            block = f"{part}.{direction}.{level if direction == 'down' else NUM_LEVELS - 1 - level}"
            module = f"{part}.{direction}_blocks.{level}"
            for layer in range(NUM_LAYERS + (direction == "up")):
                resnets[f"{module}.resnets.{layer}"] = f"{block}.block.{layer}"
            if level < NUM_LEVELS - 1:
                table[f"{module}.{direction}samplers.0.conv"] = f"{block}.{direction}sample.conv"
    for module, block in resnets.items():
        table |= {f"{module}.{ours}": f"{block}.{theirs}" for ours, theirs in _VAE_RESNET.items()}
    return table


_VAE_RESNET = {"norm1": "norm1", "conv1": "conv1", "norm2": "norm2", "conv2": "conv2", "conv_shortcut": "nin_shortcut"}
_VAE_ATTENTION = {"to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
_OLD_VAE_ATTENTION = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}  # diffusers < 0.17

_CLIP_LAYER = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", "mlp.fc1", "mlp.fc2"]
_CLIP_NORMS = ["layer_norm1", "layer_norm2"]
_OPENCLIP_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "self_attn.out_proj": "attn.out_proj",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}
_EMBEDDINGS = ["embeddings.token_embedding.weight", "embeddings.position_embedding.weight"]

_UNET_MODULES = _unet_modules()
_VAE_MODULES = _vae_modules()


# --- tensors: module's name -> where it is in a file ------------------------------------------------------------------


def _tensors(modules: Mapping[str, str]) -> dict[str, str]:
    return {f"{ours}.{end}": f"{theirs}.{end}" for ours, theirs in modules.items() for end in _ENDS}


# A table may name more than a model has: not every layer has a bias, or every resnet a shortcut.


def ldm_unet(*, is_ema: bool = False) -> Table:
    """Return the U-Net's table for original files, or for the moving average that some training files hold as well."""
    names = {module: UNET + name for module, name in _tensors(_UNET_MODULES).items()}
    if is_ema:
        names = {module: ema_name(name) for module, name in names.items()}
    return {module: Source(name) for module, name in names.items()}


def ema_name(name: str) -> str:
    """Return the name of the moving average of a U-Net tensor: LDM's `LitEma` takes the dots out."""
    return EMA + name.removeprefix("model.").replace(".", "")


def ldm_vae(prefix: str = VAE) -> Table:
    """Return the VAE's table for original files; a bare VAE file has no prefix."""
    table = {module: Source(prefix + name) for module, name in _tensors(_VAE_MODULES).items()}
    for part in ("encoder", "decoder"):
        for ours, theirs in _VAE_ATTENTION.items():
            for end in _ENDS:
                name = f"{prefix}{part}.mid.attn_1.{theirs}.{end}"
                table[f"{part}.mid_block.attentions.0.{ours}.{end}"] = Source(name, is_conv=end == "weight")
    return table


def clip_text(prefix: str, num_layers: int) -> Table:
    """Return the text encoder's table for files that name it as transformers does, below `prefix`."""
    layers = [f"encoder.layers.{n}.{part}" for n in range(num_layers) for part in (*_CLIP_LAYER, *_CLIP_NORMS)]
    names = [*_EMBEDDINGS, *(f"{module}.{end}" for module in (*layers, "final_layer_norm") for end in _ENDS)]
    return {name: Source(prefix + name) for name in names}


def openclip_text(num_layers: int = NUM_TEXT_LAYERS["sd2"]) -> Table:
    """Return the text encoder's table for SD2's original files: OpenCLIP's names, query, key and value in one."""
    table = {
        "embeddings.token_embedding.weight": Source(OPENCLIP + "token_embedding.weight"),
        "embeddings.position_embedding.weight": Source(OPENCLIP + "positional_embedding"),
        **{f"final_layer_norm.{end}": Source(f"{OPENCLIP}ln_final.{end}") for end in _ENDS},
    }
    for n in range(num_layers):
        ours, theirs = f"encoder.layers.{n}", f"{OPENCLIP}transformer.resblocks.{n}"
        for end in _ENDS:
            table |= {f"{ours}.{a}.{end}": Source(f"{theirs}.{b}.{end}") for a, b in _OPENCLIP_LAYER.items()}
            for part, letter in enumerate("qkv"):
                table[f"{ours}.self_attn.{letter}_proj.{end}"] = Source(f"{theirs}.attn.in_proj_{end}", part=part)
    return table


def diffusers_unet(prefix: str = "unet/") -> Table:
    """Return the U-Net's table for a diffusers folder."""
    return {name: Source(prefix + name) for name in _tensors(_UNET_MODULES)}


def diffusers_vae(prefix: str = "vae/", *, is_old: bool = False) -> Table:
    """Return the VAE's table for a diffusers folder; old ones name the layers of the attention otherwise."""
    table = {name: Source(prefix + name) for name in _tensors(_VAE_MODULES)}
    for part in ("encoder", "decoder"):
        for ours, old in _OLD_VAE_ATTENTION.items():
            module = f"{part}.mid_block.attentions.0"
            for end in _ENDS:
                name = f"{prefix}{module}.{old if is_old else ours}.{end}"
                table[f"{module}.{ours}.{end}"] = Source(name, is_conv=end == "weight")
    return table


def text_table(family: Family, names: Collection[str]) -> Table:
    """Return the table of the text encoder as these names of an original file have it."""
    if family == "sd2":
        return openclip_text()
    return clip_text(CLIP if CLIP + _EMBEDDINGS[0] in names else OLD_CLIP, NUM_TEXT_LAYERS["sd1"])


def read(table: Table, names: Collection[str], tensor: Callable[[str], Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield (module's name, tensor) for what the file has, one tensor of the file at a time."""
    for module, source in table.items():
        if source.name in names:
            yield module, source.take(tensor(source.name))


def shapes(table: Table, stored: Mapping[str, Shape]) -> dict[str, Shape]:
    """Return the shapes of the modules' tensors for what the file has."""
    return {module: source.shape(stored[source.name]) for module, source in table.items() if source.name in stored}


def strangers(table: Table, names: Collection[str]) -> list[str]:
    """Return the names among a part's own that its table does not know, e.g. a layer too many."""
    known = {source.name for source in table.values()}
    spaces = tuple(space for space in _SPACES if any(name.startswith(space) for name in known))
    return [name for name in names if name.startswith(spaces) and name not in known and not name.startswith(_UNUSED)]


_UNUSED = tuple(  # SD2 takes the output of the layer before
    f"{start}{NUM_OPENCLIP_LAYERS - 1}."
    for start in (
        f"{OPENCLIP}transformer.resblocks.",
        "text_encoder/text_model.encoder.layers.",
        "text_encoder/encoder.layers.",
    )
)


_SPACES = (
    UNET,
    EMA + "diffusion_model",
    "unet/",
    *(f"{prefix}{part}coder." for prefix in (VAE, "vae/", "") for part in ("en", "de")),
    *(f"{prefix}encoder.layers." for prefix in (CLIP, OLD_CLIP, "text_encoder/text_model.", "text_encoder/")),
    OPENCLIP + "transformer.resblocks.",
)


# --- whole files ------------------------------------------------------------------------------------------------------


def family_of(stored: Mapping[str, Shape]) -> Family:
    """Return the family of an original file from its text encoder."""
    return "sd2" if any(name.startswith(OPENCLIP) for name in stored) else "sd1"


def from_ldm(tensors: Mapping[str, Tensor]) -> Parts:
    """Take an original file's tensors apart by module; undoes `to_ldm`."""
    family = family_of({name: tuple(tensor.shape) for name, tensor in tensors.items()})
    tables = [ldm_unet(), ldm_vae(), text_table(family, tensors)]
    unet, vae, text = (dict(read(table, tensors, tensors.__getitem__)) for table in tables)
    used = {source.name for table in tables for source in table.values()} | {POSITION_IDS}
    return Parts(unet, vae, text, {name: tensor for name, tensor in tensors.items() if name not in used})


def to_ldm(
    unet: Mapping[str, Tensor],
    vae: Mapping[str, Tensor],
    text: Mapping[str, Tensor],
    kept: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Return an original single file's tensors from the modules' state dicts; undoes `from_ldm`.

    Args:
        kept: `Parts.kept`; for SD2 it holds OpenCLIP's last layer and projection, which readers ask for.
    """
    is_sd2 = unet["mid_block.attentions.0.proj_in.weight"].dim() == 2
    text_source = openclip_text() if is_sd2 else clip_text(CLIP, NUM_TEXT_LAYERS["sd1"])
    tensors = dict(kept or {})
    fused: dict[str, list[Tensor]] = {}
    for table, part in ((ldm_unet(), unet), (ldm_vae(), vae), (text_source, text)):
        unknown = part.keys() - table.keys()
        assert not unknown, f"no place in the file for {sorted(unknown)[:3]}"
        for module, source in table.items():  # in the table's order: query, key, value
            if module not in part:
                continue
            tensor = part[module][:, :, None, None] if source.is_conv else part[module]
            if source.part is None:
                tensors[source.name] = tensor
            else:
                fused.setdefault(source.name, []).append(tensor)
    tensors |= {name: torch.cat(thirds) for name, thirds in fused.items()}
    if not is_sd2:
        tensors[POSITION_IDS] = torch.arange(NUM_POSITIONS)[None]  # (1, 77)
    return tensors


# --- saved names of adapters ------------------------------------------------------------------------------------------


def unet_targets() -> dict[str, str]:
    """Return saved name -> module for the 192 layers of the U-Net that a LoRA goes on."""
    modules = [
        name for name in _UNET_MODULES if ".attentions." in name and name.partition(".attentions.")[2][2:] in _ADAPTED
    ]
    return {"lora_unet_" + name.replace(".", "_"): name for name in modules}


def self_attentions() -> list[str]:
    """Return the modules of the U-Net's self-attentions."""
    targets = unet_targets().values()
    return [name.removesuffix(".to_q") for name in targets if name.endswith(".attn1.to_q")]


def text_targets(family: Family) -> dict[str, str]:
    """Return saved name -> module for the 72 (SD1) or 138 (SD2) layers of the text encoder that a LoRA goes on."""
    modules = [f"encoder.layers.{n}.{layer}" for n in range(NUM_TEXT_LAYERS[family]) for layer in _CLIP_LAYER]
    return {"lora_te_text_model_" + name.replace(".", "_"): name for name in modules}


def adapter_modules() -> dict[str, str]:
    """Return saved name -> module, as diffusers spells it with its component, for all that a file may change.

    These are the targets of a LoRA, and the convolutions, norms and embeddings that LyCORIS goes on too.
    """
    layers = [f"encoder.layers.{n}.{part}" for n in range(NUM_OPENCLIP_LAYERS) for part in (*_CLIP_LAYER, *_CLIP_NORMS)]
    text = [*layers, "final_layer_norm", *(name.removesuffix(".weight") for name in _EMBEDDINGS)]
    return {
        **{"lora_unet_" + name.replace(".", "_"): f"unet.{name}" for name in _UNET_MODULES},
        **{"lora_te_text_model_" + name.replace(".", "_"): f"text_encoder.text_model.{name}" for name in text},
    }


def layers() -> dict[str, tuple[str, str]]:
    """Return saved name -> (component, module in it) for all that a file may change; a model need not have them all."""
    split = ((name, *module.split(".", 1)) for name, module in adapter_modules().items())
    return {name: (component, module.removeprefix("text_model.")) for name, component, module in split}


def kernel(name: str, family: str) -> Shape:
    """Return the kernel of a layer by its saved name, (3, 3) or (1, 1); () for what is no convolution."""
    if not name.startswith("lora_unet_"):
        return ()
    if name.endswith(("_conv1", "_conv2", "samplers_0_conv", "_conv_in", "_conv_out")):
        return (3, 3)
    is_projection = family == "sd1" and name.endswith(("_proj_in", "_proj_out"))  # matrices in SD2
    return (1, 1) if is_projection or name.endswith("_conv_shortcut") else ()


def ldm_adapter_names() -> dict[str, str]:
    """Return the U-Net's saved names as made of LDM's names -> as made of diffusers'."""
    return {
        "lora_unet_" + theirs.replace(".", "_"): "lora_unet_" + ours.replace(".", "_")
        for ours, theirs in _UNET_MODULES.items()
    }


def first_lora_layers(*, is_old_order: bool) -> list[str]:
    """Return the saved names of the 144 U-Net layers of the first LoRA programs (cloneofsimo's), in their order.

    Args:
        is_old_order: the feed-forward layer stands between both attentions, as in diffusers of 2022.
    """
    first, second = _ATTENTION[:4], _ATTENTION[4:]
    middle = _FEED_FORWARD[:1]
    layers = [*first, *middle, *second] if is_old_order else [*first, *second, *middle]
    blocks = [module.removesuffix(".proj_in") for module in _UNET_MODULES if module.endswith(".proj_in")]
    modules = sorted(blocks, key=_first_lora_order)
    return [
        f"lora_unet_{module}.transformer_blocks.0.{layer}".replace(".", "_") for module in modules for layer in layers
    ]


def _first_lora_order(module: str) -> tuple[int, list[int]]:
    """Order transformers as diffusers registers them: down, up, and the middle last."""
    kind = ["down_blocks", "up_blocks", "mid_block"].index(module.partition(".")[0])
    return kind, [int(word) for word in module.split(".") if word.isdigit()]


def first_lora_text_layers(family: Family) -> list[str]:
    """Return the saved names of the text encoder's attention layers, in the order of its modules: k, v, q, out."""
    return [
        f"lora_te_text_model_encoder_layers_{n}_self_attn_{layer}_proj"
        for n in range(NUM_TEXT_LAYERS[family])
        for layer in ("k", "v", "q", "out")
    ]

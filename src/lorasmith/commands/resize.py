"""`lorasmith resize`: a LoRA of a lower rank.

    lorasmith resize lora.safetensors --rank 8 --output smaller.safetensors
    lorasmith resize lora.safetensors --dynamic energy --value 0.99 --output smaller.safetensors

alpha / rank of every layer stays what it was, so that the change keeps its strength.
"""

from collections.abc import Callable, Mapping

from torch import Tensor

from lorasmith.config import ResizeConfig
from lorasmith.errors import UserError
from lorasmith.formats.dialects import read_any
from lorasmith.lora_files import (
    Kept,
    Layer,
    check_output,
    contents_of,
    dim_metadata,
    highest_rank,
    report,
    save,
    told_extras,
    widest_precision,
)
from lorasmith.lowrank import RANK_RULES, decompose_product
from lorasmith.progress import counted


def run(cfg: ResizeConfig) -> int:
    """Resize; return the exit code, 0."""
    if cfg.lora is None:
        raise UserError("missing: the LoRA to resize. For example: lorasmith resize lora.safetensors --rank 8")
    if cfg.rank is None and cfg.dynamic is None:
        raise UserError("missing: --rank, such as --rank 8, or --dynamic energy --value 0.99")
    output = check_output(cfg.output, [cfg.lora], overwrite=cfg.overwrite)
    file = read_any(cfg.lora)
    contents = contents_of(file)
    layers = contents.layers
    for line in (*contents.told(), *told_extras(file)):
        print(line)
    if not layers:
        raise UserError(f"{cfg.lora} holds nothing of a low rank, so there is nothing to resize; use it as it is.")
    highest = highest_rank(layers)
    if cfg.rank is not None and cfg.rank > highest:
        raise UserError(f"--rank {cfg.rank}: {cfg.lora} has rank {highest}; give a lower one, a higher adds nothing.")
    resized: dict[str, Layer] = {}
    kept: dict[str, Kept] = {}
    choose = _rank_rule(cfg)
    for name, layer in counted(layers.items(), len(layers), "resizing layers", unit="layer", is_shown=True):
        resized[name], kept[name] = resize(layer, choose)
    print("\n".join(report(kept)))
    precision = cfg.save_precision or widest_precision(file.tensors.values())
    print(save(output, resized, _metadata(cfg, file.metadata, highest, resized), precision, contents.wholes))
    return 0


def _rank_rule(cfg: ResizeConfig) -> Callable[[Tensor], int]:
    if cfg.dynamic is not None and cfg.value is not None:
        rule, value = RANK_RULES[cfg.dynamic], cfg.value
        return lambda values: rule(values, value)
    rank = cfg.rank
    assert rank is not None, "one of both is given"
    return lambda values: rank


def resize(layer: Layer, choose: Callable[[Tensor], int]) -> tuple[Layer, Kept]:
    """Return the layer with the rank that `choose` finds by its singular values; one that has no higher one stays."""
    found = decompose_product(layer.factors)
    square = layer.scale**2
    rank = min(choose(found.values * abs(layer.scale)), layer.factors.rank)
    kept = Kept(rank, found.energy(rank) * square, found.energy() * square)
    if rank == layer.factors.rank:
        return layer, kept
    factors = found.cut(rank)
    return Layer(layer.shape, factors, layer.scale * factors.rank), kept


def _metadata(cfg: ResizeConfig, old: Mapping[str, str], old_rank: int, layers: Mapping[str, Layer]) -> dict[str, str]:
    """Return the file's own metadata, with rank, alpha and a comment as sd-scripts' resize_lora.py writes them."""
    how = f"to {cfg.rank}" if cfg.dynamic is None else f"by {cfg.dynamic} {cfg.value:g}"
    comment = f"dimension is resized from {old_rank} {how}; {old.get('ss_training_comment', '')}"
    return {**old, **dim_metadata(layers.values()), "ss_training_comment": comment}

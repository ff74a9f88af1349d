"""What the tools for LoRA files share: a file's layers as low-rank matrices and back, what was kept of them, and where
a result may be written.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lorasmith.adapters.lora import LoRA
from lorasmith.errors import UserError
from lorasmith.formats import kohya
from lorasmith.lowrank import Factors
from lorasmith.network import PARTS, group_by_module, part_of

_SUFFIXES = (".safetensors", ".pt", ".ckpt")
_BLOCK = re.compile(r"down_blocks_\d+|mid_block|up_blocks_\d+")
_NUM_SHOWN = 3


@dataclass(frozen=True)
class Layer:
    """The change alpha / rank * up @ down of a layer whose weight has `shape`; the factors are in fp32."""

    shape: tuple[int, ...]
    factors: Factors
    alpha: float

    @property
    def scale(self) -> float:
        return self.alpha / self.factors.rank


@dataclass(frozen=True)
class Kept:
    """Of one layer: the rank that it has now, and the squared Frobenius norms of what was kept and of all there was."""

    rank: int
    kept: float
    total: float


def layers_of(file: kohya.LoraFile) -> dict[str, Layer]:
    """Return a file's layers by saved name, sorted.

    Raises:
        UserError: factors are missing or do not fit each other, or a number is NaN or infinite.
    """
    layers: dict[str, Layer] = {}
    problems: list[str] = []
    for name, tensors in sorted(group_by_module(file.tensors).items()):
        try:
            if not name.startswith(tuple(PARTS)):
                raise ValueError(f"a layer's name starts with {' or '.join(PARTS)}")
            layers[name] = _layer(tensors)
        except ValueError as error:
            problems.append(f"{name}: {error}")
    if problems:
        raise UserError(
            f"{file.path} is damaged: {len(problems)} of {len(problems) + len(layers)} layers cannot be used: "
            f"{_shorten(problems)}. Get it anew, or train it again."
        )
    return layers


def _layer(tensors: Mapping[str, Tensor]) -> Layer:
    if missing := LoRA.required_names - tensors.keys():
        raise ValueError(f"{' and '.join(sorted(missing))} missing")
    down, up = tensors["lora_down.weight"], tensors["lora_up.weight"]
    if min(down.dim(), up.dim()) < 2 or not (down.numel() and up.numel()):
        raise ValueError(f"down {tuple(down.shape)} and up {tuple(up.shape)} are no matrices")
    shape = (up.shape[0], *down.shape[1:])
    adapter = LoRA.from_tensors(shape, tensors)
    if not all(torch.isfinite(tensor).all() for tensor in adapter.state_dict().values()):
        raise ValueError("NaN or infinity in it")
    factors = Factors(adapter.lora_up.weight.detach().flatten(1), adapter.lora_down.weight.detach().flatten(1))
    return Layer(shape, factors, adapter.alpha.item())


def tensors_of(layers: Mapping[str, Layer]) -> dict[str, Tensor]:
    """Return the layers as a file has them, in fp32; undoes `layers_of`."""
    return {
        f"{name}.{key}": tensor
        for name, layer in layers.items()
        for key, tensor in {
            "lora_down.weight": layer.factors.down.float().reshape(layer.factors.rank, *layer.shape[1:]),
            "lora_up.weight": layer.factors.up.float().reshape(
                layer.shape[0], layer.factors.rank, *(1 for _ in layer.shape[2:])
            ),
            "alpha": torch.tensor(layer.alpha),
        }.items()
    }


def dim_metadata(layers: Iterable[Layer]) -> dict[str, str]:
    """Return rank and alpha as sd-scripts writes them: `Dynamic` where layers differ."""
    layers = list(layers)
    ranks, alphas = {layer.factors.rank for layer in layers}, {layer.alpha for layer in layers}
    return {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(*ranks) if len(ranks) == 1 else "Dynamic",
        "ss_network_alpha": str(*alphas) if len(alphas) == 1 else "Dynamic",
    }


def highest_rank(layers: Mapping[str, Layer]) -> int:
    """Return the rank of the layer that has the highest."""
    return max(layer.factors.rank for layer in layers.values())


def widest_precision(tensors: Iterable[Tensor]) -> str:
    """Return the precision that holds all of the tensors, alphas aside, as they are."""
    found = {tensor.dtype for tensor in tensors if tensor.dim()}
    return next((name for name, dtype in kohya.PRECISIONS.items() if found == {dtype}), "float")


def report(kept: Mapping[str, Kept]) -> list[str]:
    """Return lines for a person: of each block and of all, the ranks, the energy kept, and the relative error."""
    blocks: dict[str, list[Kept]] = {}
    for name, one in kept.items():
        blocks.setdefault(_block(name), []).append(one)
    rows = [_row(block, own) for block, own in [*blocks.items(), ("all", list(kept.values()))]]
    return [f"{'block':<15}{'layers':>7}{'rank':>9}{'energy kept':>14}{'error':>10}", *rows]


def _row(title: str, kept: Sequence[Kept]) -> str:
    ranks = [one.rank for one in kept]
    low, high = min(ranks), max(ranks)
    share = energy_share(kept)
    error = max(1 - share, 0.0) ** 0.5
    return f"{title:<15}{len(kept):>7}{low if low == high else f'{low}-{high}':>9}{share:>14.4%}{error:>10.3%}"


def energy_share(kept: Iterable[Kept]) -> float:
    """Return the kept share of the squared norm of all layers together; of nothing, all is kept."""
    kept = list(kept)
    total = sum(one.total for one in kept)
    return sum(one.kept for one in kept) / total if total else 1.0


def _block(name: str) -> str:
    found = _BLOCK.search(name)
    return found[0] if found else part_of(name)


def check_output(output: Path | None, inputs: Sequence[Path], *, overwrite: bool) -> Path:
    """Return where to write a LoRA, after checking that nothing is lost by it.

    Raises:
        UserError: no place, no LoRA's file name, something is there already, or it is one of the inputs.
    """
    if output is None:
        raise UserError("missing: --output, the file to write, such as --output smaller.safetensors")
    if output.suffix not in _SUFFIXES:
        raise UserError(f"--output: {output} should end in {', '.join(_SUFFIXES)}; .safetensors is read everywhere.")
    if output.is_dir():
        raise UserError(
            f"--output: {output} is a folder; give the name of a file in it, such as {output / output.name}"
        )
    if any(path.exists() and output.exists() and path.samefile(output) for path in inputs):
        raise UserError(f"--output: {output} is what is read; give another name, so that it stays.")
    if output.exists() and not overwrite:
        raise UserError(f"--output: {output} exists already; give another name, or --overwrite to replace it.")
    parent = next(folder for folder in output.absolute().parents if folder.exists())
    if not parent.is_dir():
        raise UserError(f"--output: {parent} is a file, so nothing can be written into it; give another folder.")
    return output


def save(output: Path, layers: Mapping[str, Layer], metadata: Mapping[str, str], precision: str) -> str:
    """Write the LoRA, read it back, and return a line about it.

    Raises:
        UserError: a number does not fit the precision, the disk is full, or the file reads back otherwise.
    """
    tensors = tensors_of(layers)
    kohya.write(output, tensors, metadata, precision=precision)
    norms = kohya.check(output, tensors, precision=precision)
    norm = sum(norm**2 for norm in norms.values()) ** 0.5
    size = output.stat().st_size / 1e6
    return f"wrote {output}: {len(layers)} layers, {size:.1f} MB, {precision}, norm of the change {norm:.4g}"


def _shorten(items: Sequence[str]) -> str:
    rest = len(items) - _NUM_SHOWN
    return "; ".join(items[:_NUM_SHOWN]) + (f"; and {rest} more" if rest > 0 else "")

"""What the tools for LoRA files share: a file's layers as low-rank matrices and back, what was kept of them, and where
a result may be written.

Changes of other kinds become low-rank matrices where that is exact; those of which the change depends on the model's
weight cannot. Changes of norms, embeddings and biases stay what they are.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lorasmith.adapters.lora import LoRA
from lorasmith.errors import UserError
from lorasmith.formats import cloneofsimo, kohya
from lorasmith.formats.dialects import FAMILIES, AnyLora, kind_of
from lorasmith.lowrank import Factors, decompose
from lorasmith.models.keys import sd as keys
from lorasmith.network import PARTS, group_by_module, part_of, recognise

_BLOCK = re.compile(r"down_blocks_\d+|mid_block|up_blocks_\d+")
_NUM_SHOWN = 3
_LARGEST_LAYER = 1 << 26  # numbers, five times the largest layer of SDXL


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
class Whole:
    """A change that stays as it is, in fp32: of a norm's or an embedding's weight, or of a layer with its bias."""

    weight: Tensor | None
    bias: Tensor | None

    def scaled(self, factor: float) -> "Whole":
        """Return `factor` times the change."""
        return Whole(*(None if part is None else part * factor for part in (self.weight, self.bias)))

    def tensors(self) -> dict[str, Tensor]:
        """Return what a file holds of it: LyCORIS' norm for norms, and full for all else."""
        names = ("w_norm", "b_norm") if self.weight is not None and self.weight.dim() == 1 else ("diff", "diff_b")
        parts = zip(names, (self.weight, self.bias), strict=True)
        return {name: part for name, part in parts if part is not None}


@dataclass(frozen=True)
class Contents:
    """What is in a LoRA file.

    Args:
        layers: low-rank matrices, by saved name.
        wholes: the other changes, by saved name.
        kinds: how many of the low-rank matrices are of which kind of change in the file.
    """

    layers: dict[str, Layer]
    wholes: dict[str, Whole]
    kinds: Counter[str]

    def __contains__(self, name: str) -> bool:
        return name in self.layers or name in self.wholes

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the weights that change; a bias alone has none."""
        whole = {name: tuple(own.weight.shape) for name, own in self.wholes.items() if own.weight is not None}
        return {name: layer.shape for name, layer in self.layers.items()} | whole

    def told(self) -> list[str]:
        """Return lines for a person on what is no LoRA in the file, and what becomes of it."""
        others = {kind: count for kind, count in self.kinds.items() if kind not in ("LoRA", "full")}
        lines = [f"  {count} {kind} layers become LoRA, which is exact" for kind, count in others.items()]
        if full := self.kinds["full"]:
            lines.append(f"  {full} full differences become LoRA of the rank that they have")
        if self.wholes:
            lines.append(f"  {len(self.wholes)} changes of norms, embeddings, or weight and bias stay whole")
        return lines


@dataclass(frozen=True)
class Kept:
    """Of one layer: the rank that it has now, and the squared Frobenius norms of what was kept and of all there was."""

    rank: int
    kept: float
    total: float


def told_extras(file: AnyLora) -> list[str]:
    """Return lines for a person on what of a file is used by nothing, and what was assumed."""
    counts = Counter(file.extras.values()).most_common()
    return [*(f"  not used: {count} tensors, {what}" for what, count in counts), *(f"  note: {n}" for n in file.notes)]


NEED_BASE = {"DoRA", "GLoRA", "OFT", "BOFT", "IA3"}  # kinds of which the delta depends on the weight


def contents_of(file: AnyLora) -> Contents:
    """Return what a file of any dialect and kind holds, sorted by saved name.

    Raises:
        UserError: it is for another model family, a change depends on the model's weights, or it is damaged.
    """
    if file.family not in ("sd1", "sd2", "unknown"):
        raise UserError(
            f"{file.path} is a LoRA for {FAMILIES[file.family]}; expected is one for Stable Diffusion 1.x or 2.x."
        )
    tensors_by_layer = dict(sorted(file.layers().items()))
    needy = [name for name, own in tensors_by_layer.items() if kind_of(own) in NEED_BASE or "dora_scale" in own]
    if needy:
        kinds = Counter(str(kind_of(own)) for own in tensors_by_layer.values())
        told = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
        raise UserError(
            f"{file.path} ({told}): what {len(needy)} of its layers change depends on the model's own weights "
            f"({_shorten(needy)}), so it is no sum of LoRAs. Merge it into the model (lorasmith merge --model), and "
            "take the result as a LoRA again (lorasmith extract) if you need one."
        )
    contents = Contents({}, {}, Counter())
    problems: list[str] = []
    for name, own in tensors_by_layer.items():
        try:
            one = _change(name, own, file.family)
        except ValueError as error:
            problems.append(f"{name}: {error}")
            continue
        if isinstance(one, Layer):
            contents.layers[name] = one
            contents.kinds[str(kind_of(own))] += 1
        else:
            contents.wholes[name] = one
    _refuse_damaged(file.path, problems, len(tensors_by_layer))
    return contents


def _change(name: str, tensors: Mapping[str, Tensor], family: str) -> Layer | Whole:
    if not name.startswith(tuple(PARTS)):
        raise ValueError(f"a layer's name starts with {' or '.join(PARTS)}")
    if not all(torch.isfinite(tensor).all() for tensor in tensors.values()):
        raise ValueError("NaN or infinity in it")
    if "lora_mid.weight" in tensors:
        tensors = _without_mid(tensors)
    if "lora_down.weight" in tensors:
        return _layer(tensors)
    if tensors.keys() <= {"diff_b", "alpha"}:
        return Whole(None, tensors["diff_b"].float())
    shape = stored_shape(tensors)
    with torch.no_grad():
        adapter = recognise(tensors).from_tensors(shape, tensors).double()
        delta, bias = adapter.delta(torch.zeros(shape)), adapter.delta_bias(None)
    if len(shape) < 2 or bias is not None or "_embeddings_" in name:
        return Whole(delta.float(), None if bias is None else bias.detach().float())
    kernel = shape[2:] or keys.kernel(name, family)
    num_in = delta[0].numel() // torch.Size(kernel).numel()
    found = decompose(delta.flatten(1))
    limit = found.values[0] * max(delta.shape) * torch.finfo(delta.dtype).eps
    factors = found.cut(max(int((found.values > limit).sum()), 1))
    return Layer((shape[0], num_in, *kernel), Factors(factors.up.float(), factors.down.float()), float(factors.rank))


def _without_mid(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a Tucker LoCon as a LoCon, exactly: the kernel in the middle goes into `down`."""
    mid, down = tensors["lora_mid.weight"].float(), tensors["lora_down.weight"].float().flatten(1)
    if mid.dim() != 4 or mid.shape[1] != down.shape[0]:
        raise ValueError(f"mid {tuple(mid.shape)} and down {tuple(down.shape)} do not fit each other")
    _check_size((mid.shape[0], down.shape[1], *mid.shape[2:]))
    whole = torch.einsum("mnhw,ni->mihw", mid.double(), down.double()).float()
    return {
        **{tail: tensor for tail, tensor in tensors.items() if tail != "lora_mid.weight"},
        "lora_down.weight": whole,
    }


def stored_shape(tensors: Mapping[str, Tensor]) -> tuple[int, ...]:
    """Return the shape of the weight that a layer's tensors change, of kinds whose delta does not depend on it.

    Where the tensors do not tell the kernel it is (out, in * kernel). Plain LoRA is not looked at.

    Raises:
        ValueError: the factors are no matrices, or no model has such a large layer: small factors can make any size.
    """
    shapes = {tail: tuple(tensor.shape) for tail, tensor in tensors.items()}
    if any(len(shape) < 2 for tail, shape in shapes.items() if tail.startswith(("hada_", "lokr_"))):
        raise ValueError("its factors are no matrices")
    if "lora_mid.weight" in shapes:
        shape = (shapes["lora_up.weight"][0], shapes["lora_down.weight"][1], *shapes["lora_mid.weight"][2:])
    elif "hada_t1" in shapes:
        shape = (shapes["hada_w1_a"][1], shapes["hada_w1_b"][1], *shapes["hada_t1"][2:])
    elif "hada_w1_a" in shapes:
        shape = (shapes["hada_w1_a"][0], shapes["hada_w1_b"][1])
    elif "lokr_w1" in shapes or "lokr_w1_a" in shapes:
        first = shapes.get("lokr_w1") or (shapes["lokr_w1_a"][0], shapes["lokr_w1_b"][1])
        if "lokr_t2" in shapes:
            second = (shapes["lokr_w2_a"][1], shapes["lokr_w2_b"][1], *shapes["lokr_t2"][2:])
        else:
            second = shapes.get("lokr_w2") or (shapes["lokr_w2_a"][0], shapes["lokr_w2_b"][1])
        shape = (first[0] * second[0], first[1] * second[1], *second[2:])
    else:
        shape = shapes[next(tail for tail in ("diff", "w_norm", "b_norm") if tail in shapes)]
    _check_size(shape)
    return shape


def _check_size(shape: Sequence[int]) -> None:
    if not shape or math.prod(shape) > _LARGEST_LAYER:
        told = " x ".join(map(str, shape)) or "a single number"
        raise ValueError(f"what it changes would be {told}, which no layer of a model is")


def _refuse_damaged(path: Path, problems: Sequence[str], num_layers: int) -> None:
    if problems:
        raise UserError(
            f"{path} is damaged: {len(problems)} of {num_layers} layers cannot be used: {_shorten(problems)}. "
            "Get it anew, or train it again."
        )


def layers_of(file: kohya.LoraFile) -> dict[str, Layer]:
    """Return the layers of a file that holds nothing but LoRA, by saved name, sorted.

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
    _refuse_damaged(file.path, problems, len(problems) + len(layers))
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


def tensors_of(layers: Mapping[str, Layer], wholes: Mapping[str, Whole] | None = None) -> dict[str, Tensor]:
    """Return the layers as a file has them, in fp32; undoes `layers_of`."""
    whole = {f"{name}.{key}": tensor for name, own in (wholes or {}).items() for key, tensor in own.tensors().items()}
    return whole | {
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
    if output.suffix not in kohya.SUFFIXES:
        raise UserError(
            f"--output: {output} should end in {', '.join(kohya.SUFFIXES)}; .safetensors is read everywhere."
        )
    if output.is_dir():
        raise UserError(
            f"--output: {output} is a folder; give the name of a file in it, such as {output / output.name}"
        )
    if output.exists() and any(_is_read_with(path, output) for path in inputs):
        raise UserError(f"--output: {output} is what is read; give another name, so that it stays.")
    if output.exists() and not overwrite:
        raise UserError(f"--output: {output} exists already; give another name, or --overwrite to replace it.")
    parent = next(folder for folder in output.absolute().parents if folder.exists())
    if not parent.is_dir():
        raise UserError(f"--output: {parent} is a file, so nothing can be written into it; give another folder.")
    return output


def _is_read_with(path: Path, file: Path) -> bool:
    """Return whether a file is read where `path` is given: itself, in that folder, or the text encoder's beside it."""
    if path.is_dir():
        return path.resolve() in file.resolve().parents
    files = [path, *(cloneofsimo.sidecar(path, program) for program in cloneofsimo.SIDECARS)]
    return any(own.exists() and own.samefile(file) for own in files)


def save(
    output: Path,
    layers: Mapping[str, Layer],
    metadata: Mapping[str, str],
    precision: str,
    wholes: Mapping[str, Whole] | None = None,
) -> str:
    """Write the LoRA, read it back, and return a line about it.

    Raises:
        UserError: a number does not fit the precision, the disk is full, or the file reads back otherwise.
    """
    tensors = tensors_of(layers, wholes)
    kohya.write(output, tensors, metadata, precision=precision)
    norms = kohya.check(output, tensors, precision=precision)
    parts = [part for whole in (wholes or {}).values() for part in whole.tensors().values()]
    norm = sum(norm**2 for norm in [*norms.values(), *(part.norm().item() for part in parts)]) ** 0.5
    size = output.stat().st_size / 1e6
    count = len(layers) + len(wholes or {})
    return f"wrote {output}: {count} layers, {size:.1f} MB, {precision}, norm of the change {norm:.4g}"


def _shorten(items: Sequence[str]) -> str:
    rest = len(items) - _NUM_SHOWN
    return "; ".join(items[:_NUM_SHOWN]) + (f"; and {rest} more" if rest > 0 else "")

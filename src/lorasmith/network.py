"""All adapters of a model together: made from rules or a file, attached to the frozen layers, trained, saved.

Children carry the saved names, so `state_dict()` is the content of the LoRA file.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lorasmith import plugins
from lorasmith.adapters.base import Adapter
from lorasmith.dropout import Dropout
from lorasmith.errors import UserError
from lorasmith.seeds import derive
from lorasmith.sharding import whole

PARTS = {"lora_te": "text_encoder", "lora_unet": "unet"}  # how a saved name starts -> the model's part, in group order
_TEXT_WIDTHS = {768: "SD 1.x", 1024: "SD 2.x", 2048: "SDXL"}
_UP = "lora_up.weight"
_NUM_SHOWN = 5


@dataclass(frozen=True)
class Rule:
    """What to put on the layers whose saved name matches `pattern` (fnmatch: `*`, `?`, `[abc]`)."""

    pattern: str = "*"
    adapter: str = "lora"  # a name from lorasmith.adapters or a dotted module
    rank: int = 4
    alpha: float | None = None  # None: alpha = rank, which is scale 1
    lr_scale: float = 1.0
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class PartRate:
    """How fast a part learns.

    rate: 0 leaves it as it is. up_ratio: how many times faster the half learns that begins at zero, which is LoRA+
    (Hayou et al. 2024, https://arxiv.org/abs/2402.12354).
    """

    rate: float
    up_ratio: float = 1.0


class Network(nn.Module):
    """Adapters by saved name. Not attached when made: call `attach`."""

    def __init__(
        self, adapters: Mapping[str, Adapter], targets: Mapping[str, nn.Module], lr_scales: Mapping[str, float]
    ) -> None:
        super().__init__()
        self._targets = {name: targets[name] for name in sorted(adapters)}  # a plain dict: no parameters of ours
        self._lr_scales = dict(lr_scales)
        self._handles: list[RemovableHandle] = []
        self._multiplier = 1.0
        for name, layer in self._targets.items():
            self.add_module(name, adapters[name].to(layer.get_parameter("weight").device))

    @classmethod
    def create(cls, targets: Mapping[str, nn.Module], rules: Sequence[Rule], *, seed: int) -> "Network":
        """Make new adapters, which change nothing yet; the first rule that matches a name wins, others stay frozen.

        Each is drawn from its own generator, made of the seed and its name, so what one layer starts from does not
        depend on which others are trained.

        Raises:
            UserError: no layer matches, or a rank is larger than a layer can use.
        """
        shapes = _shapes(targets)
        check_ranks(shapes, rules)
        adapters: dict[str, Adapter] = {}
        lr_scales: dict[str, float] = {}
        for name, rule in match(targets, rules).items():
            adapter = adapter_class(rule.adapter)(shapes[name], rule.rank, rule.alpha, **rule.options)
            generator = torch.Generator().manual_seed(derive(seed, f"init/{name}"))
            adapter.reset(targets[name].get_parameter("weight"), generator)
            adapters[name], lr_scales[name] = adapter, rule.lr_scale
        return cls(adapters, targets, lr_scales)

    @classmethod
    def load(
        cls,
        targets: Mapping[str, nn.Module],
        tensors: Mapping[str, Tensor],
        *,
        lr_scales: Mapping[str, float] | None = None,
    ) -> "Network":
        """Make the adapters that a file holds, for exactly these layers; ranks, alphas and types are the file's.

        Raises:
            UserError: one report of everything that is missing, unexpected or of another shape.
        """
        adapters = _adapters_of_file(_shapes(targets), tensors)
        return cls(adapters, targets, lr_scales or dict.fromkeys(adapters, 1.0))

    @staticmethod
    def check(shapes: Mapping[str, Sequence[int]], tensors: Mapping[str, Tensor]) -> dict[str, Adapter]:
        """Check from the shapes of the layers' weights alone, so before anything is loaded, that `load` will work.

        Returns the adapters that it will make.

        Raises:
            UserError: one report of everything that is missing, unexpected or of another shape.
        """
        return _adapters_of_file(shapes, tensors)

    @property
    def adapters(self) -> dict[str, Adapter]:
        """The adapters by saved name, sorted."""
        return {name: cast(Adapter, child) for name, child in self.named_children()}

    @property
    def multiplier(self) -> float:
        """Strength at which every adapter is applied; 0 gives the base model."""
        return self._multiplier

    @multiplier.setter
    def multiplier(self, value: float) -> None:
        self._multiplier = value
        for adapter in self.adapters.values():
            adapter.multiplier = value

    def file_tensors(self) -> dict[str, Tensor]:
        """Return copies of what a file of the network holds."""
        return {name: tensor.clone() for name, tensor in self.state_dict().items()}

    @contextmanager
    def switched_off(self) -> Iterator[None]:
        """While entered, the model is the base model alone."""
        multiplier, self.multiplier = self.multiplier, 0.0
        try:
            yield
        finally:
            self.multiplier = multiplier

    @contextmanager
    def dropping(self, dropout: Dropout) -> Iterator[None]:
        """While entered, forward passes are of the dropout's samples, and leave out what it says."""
        adapters = self.adapters
        trained = [name for name in adapters if any(p.requires_grad for p in adapters[name].parameters())]
        left_out = dropout.left_out(trained)
        for name, adapter in adapters.items():
            adapter.is_left_out = name in left_out
            adapter.drop = partial(dropout.inner, name) if dropout.rates.has_inner else None
        try:
            yield
        finally:
            for adapter in adapters.values():
                adapter.is_left_out, adapter.drop = False, None

    def decay_gradients(self) -> Iterator[tuple[list[nn.Parameter], tuple[Tensor, ...]]]:
        """Yield for each adapter that is trained its parameters, with gradients of half the square of delta's norm."""
        for name, adapter in self.adapters.items():
            parameters = [parameter for parameter in adapter.parameters() if parameter.requires_grad]
            if parameters:
                half = adapter.delta_square(whole(self._targets[name].get_parameter("weight"))) / 2
                yield parameters, torch.autograd.grad(half, parameters, materialize_grads=True)

    def attach(self) -> None:
        """Let every layer's forward go through its adapter; the layers' own weights are never touched."""
        assert not self._handles, "the network is attached already"
        for name, adapter in self.adapters.items():
            self._handles.append(self._targets[name].register_forward_hook(partial(_adapt_output, adapter)))

    def detach(self) -> None:
        """Undo `attach`: the base model is bit for bit what it was."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def param_groups(self, rates: Mapping[str, PartRate], undecayed: Sequence[str] = ()) -> list[dict[str, Any]]:
        """Return the optimizer's groups (`params`, `lr`, `name`): text encoder, then U-Net, split by lr_scale.

        What a part with a rate of 0 holds is in none.

        Args:
            rates: by part, for all parts that have adapters.
            undecayed: patterns (fnmatch) of the saved names of tensors whose group has `weight_decay` 0.

        Raises:
            UserError: the up half of an adapter is to learn faster, but there is none.
        """
        grouped: dict[tuple[int, float, bool, bool], list[nn.Parameter]] = defaultdict(list)
        order, has_faster = list(PARTS.values()), any(rate.rate and rate.up_ratio != 1 for rate in rates.values())
        for name, adapter in self.adapters.items():
            part = part_of(name)
            for tensor, parameter in adapter.named_parameters():
                is_faster = rates[part].up_ratio != 1 and tensor == _UP
                is_undecayed = any(fnmatchcase(f"{name}.{tensor}", pattern) for pattern in undecayed)
                key = order.index(part), self._lr_scales[name], is_faster, is_undecayed
                if rates[part].rate:
                    grouped[key].append(parameter)
        if has_faster and not any(is_faster for _, _, is_faster, _ in grouped):
            raise UserError(f"lora_plus_ratio is for adapters with a {_UP}, and there is none here; leave it out.")
        return [
            {
                "params": grouped[key],
                "lr": rates[order[number]].rate * scale * (rates[order[number]].up_ratio if is_faster else 1),
                "name": order[number] + ("/up" if is_faster else ""),
                **({"weight_decay": 0.0} if is_undecayed else {}),
            }
            for key in sorted(grouped)
            for number, scale, is_faster, is_undecayed in [key]
        ]

    @torch.no_grad()
    def delta_norms(self) -> dict[str, float]:
        """Return the Frobenius norm of every layer's delta, without the multiplier."""
        norms = [a.delta_norm(whole(self._targets[name].get_parameter("weight"))) for name, a in self.adapters.items()]
        return dict(zip(self.adapters, torch.stack(norms).tolist(), strict=True))

    def clip_norms_(self, limit: float) -> int:
        """Scale every delta whose norm is above `limit` down to it; return how many were."""
        too_large = {name: norm for name, norm in self.delta_norms().items() if norm > limit}
        for name, norm in too_large.items():
            self.adapters[name].scale_(limit / norm)
        return len(too_large)


def _adapt_output(adapter: Adapter, layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    return output if adapter.is_left_out or not adapter.multiplier else adapter(layer, args[0], output)


def part_of(name: str) -> str:
    """Return the part of the model that a saved name belongs to: `text_encoder` or `unet`."""
    part = next((part for start, part in PARTS.items() if name.startswith(start)), None)
    assert part is not None, f"{name} starts with none of {', '.join(PARTS)}"
    return part


def match(names: Iterable[str], rules: Sequence[Rule]) -> dict[str, Rule]:
    """Return the first rule that matches each name, for the names that one matches, sorted.

    Raises:
        UserError: no name matches.
    """
    names = sorted(names)
    first = {name: next((rule for rule in rules if fnmatchcase(name, rule.pattern)), None) for name in names}
    matched = {name: rule for name, rule in first.items() if rule is not None}
    if not matched:
        raise UserError(
            f"no layer matches {' or '.join(repr(rule.pattern) for rule in rules) or 'an empty list of rules'}; "
            f"layers have names like {_shorten(names)}."
        )
    return matched


def check_ranks(shapes: Mapping[str, Sequence[int]], rules: Sequence[Rule]) -> None:
    """Check from the shapes of the layers' weights alone, so before anything is loaded, that every rank fits.

    Raises:
        UserError: an adapter does not go on a layer, or a rank is larger than a layer can use; names the layers and the
            largest rank that fits all.
    """
    matched = match(shapes, rules)
    largest: dict[str, int] = {}
    for name, rule in matched.items():
        kind = adapter_class(rule.adapter)
        try:
            largest[name] = kind.largest_rank(shapes[name])
        except ValueError as error:
            raise UserError(f"adapter {rule.adapter!r} does not go on {name}: {error}.") from error
    too_small = [name for name, rule in matched.items() if rule.rank > largest[name]]
    if too_small:
        ranks = ", ".join(str(rank) for rank in sorted({matched[name].rank for name in too_small}))
        layers = [
            f"{name} (weight {' x '.join(map(str, shapes[name]))}: at most {largest[name]})" for name in too_small
        ]
        raise UserError(
            f"rank {ranks} is larger than {len(too_small)} of {len(matched)} layers can use: {_shorten(layers)}. "
            f"Give a rank of at most {min(largest[name] for name in too_small)} (--rank)."
        )


def adapter_class(name: str) -> type[Adapter]:
    """Return the adapter type of that name (a file in lorasmith.adapters, or a dotted module).

    Raises:
        UserError: there is none.
    """
    module = plugins.find("adapters", name)
    if "ADAPTER" not in vars(module):
        raise UserError(f"adapter {name!r} does not say which class it is; put ADAPTER = <class> into its module.")
    return module.ADAPTER


def recognise(tensors: Mapping[str, Tensor]) -> type[Adapter]:
    """Return the adapter type whose tensors of one layer these are; no two types match the same.

    Raises:
        ValueError: of none that is known.
    """
    kinds = (adapter_class(plug) for plug in plugins.names("adapters"))
    if (kind := next((kind for kind in kinds if kind.matches(tensors)), None)) is None:
        raise ValueError(f"the file holds {', '.join(sorted(tensors))}, which is no complete adapter of a known type")
    return kind


def group_by_module(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Split `<saved name>.<tensor name>` at the first dot."""
    grouped: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for key, tensor in tensors.items():
        name, _, rest = key.partition(".")
        grouped[name][rest] = tensor
    return dict(grouped)


def _shapes(targets: Mapping[str, nn.Module]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(layer.get_parameter("weight").shape) for name, layer in targets.items()}


def _adapters_of_file(shapes: Mapping[str, Sequence[int]], tensors: Mapping[str, Tensor]) -> dict[str, Adapter]:
    """Build an adapter for every one of the layers from a file that holds no others."""
    by_name = group_by_module(tensors)
    adapters: dict[str, Adapter] = {}
    problems: dict[str, str] = {}
    for name in sorted(by_name.keys() & shapes.keys()):
        try:
            adapters[name] = recognise(by_name[name]).from_tensors(shapes[name], by_name[name])
        except ValueError as error:
            problems[name] = str(error)
    missing, unexpected = sorted(shapes.keys() - by_name.keys()), sorted(by_name.keys() - shapes.keys())
    if missing or unexpected or problems:
        raise UserError(_misfit_report(shapes, by_name, len(adapters), missing, unexpected, problems))
    return adapters


def _misfit_report(
    shapes: Mapping[str, Sequence[int]],
    by_name: Mapping[str, Mapping[str, Tensor]],
    num_matched: int,
    missing: list[str],
    unexpected: list[str],
    problems: Mapping[str, str],
) -> str:
    """Say in one message everything in which a LoRA file and a model differ."""
    lines = [f"the LoRA weights do not fit: {num_matched} of the {len(shapes)} layers to train match."]
    if other := _other_family(shapes, by_name):
        lines.append(other)
    if problems:
        lines.append(f"{len(problems)} do not fit their layer: {_shorten([f'{n}: {p}' for n, p in problems.items()])}.")
    if missing:
        lines.append(f"{len(missing)} are missing from the file: {_shorten(missing)}.")
    if unexpected:
        lines.append(f"{len(unexpected)} in the file are not among the layers to train: {_shorten(unexpected)}.")
    lines.append("Give weights that were trained for this base model and the same parts (--train), or leave them out.")
    return " ".join(lines)


def _other_family(shapes: Mapping[str, Sequence[int]], by_name: Mapping[str, Mapping[str, Tensor]]) -> str:
    """Say that a file was made for a model with another text width, which is what tells the families apart."""
    for name in sorted(by_name.keys() & shapes.keys()):
        down = by_name[name].get("lora_down.weight")
        if name.endswith("attn2_to_k") and down is not None and down.dim() >= 2:
            theirs, ours = down.shape[1], shapes[name][1]
            if theirs != ours:
                return f"The file is for {_named_width(theirs)}, the base model is {_named_width(ours)}."
    return ""


def _named_width(width: int) -> str:
    return f"{_TEXT_WIDTHS.get(width, 'a model')} (text width {width})"


def _shorten(items: Sequence[str]) -> str:
    """List the first few."""
    rest = len(items) - _NUM_SHOWN
    return ", ".join(items[:_NUM_SHOWN]) + (f" and {rest} more" if rest > 0 else "")

"""What an adapter is: a small trainable change to one frozen layer (Linear, Conv2d, LayerNorm or GroupNorm).

`delta` defines it (law 2): training, merging, extracting and generating all mean W + multiplier * delta(W), and
b + multiplier * delta_bias(b) for the few types that change a layer's bias too. A module of this package names its
class as `ADAPTER`; `lorasmith.network` finds it by the module's name.
"""

import difflib
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, ClassVar, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorasmith.errors import UserError


class Adapter(nn.Module, ABC):
    """A change to one layer; its `state_dict` is what a file holds for that layer, without the layer's name.

    Parameters are fp32 whatever the base model's dtype is.
    """

    required_names: ClassVar[frozenset[str]]  # tensors that a file has for every layer adapted in this way
    optional_names: ClassVar[frozenset[str]] = frozenset()

    alpha_means: ClassVar[Literal["scale", "constraint", "nothing"]] = (
        "scale"  # by alpha / rank; "nothing": no rank either
    )
    lycoris_args: ClassVar[str] = ""  # by which LyCORIS knows the type in a file's metadata, as `key=value key=value`

    has_inner_dropout: ClassVar[bool] = False  # whether `forward` lets `drop` work between its factors

    multiplier: float = 1.0  # strength at which the change is applied; not saved
    drop: Callable[[Tensor, int], Tensor] | None = None  # see `dropout.Dropout.inner`; while a step is trained
    is_left_out: bool = False  # has no part in the step that is trained

    def __init__(self, layer_shape: Sequence[int], rank: int, alpha: float | None = None, **options: Any) -> None:
        """Build for a layer whose weight has `layer_shape`; `alpha` None means alpha = rank."""
        super().__init__()

    @classmethod
    def parse_options(cls, words: Sequence[str]) -> dict[str, Any]:
        """Return the constructor's own options (keyword-only: bool, int or float) from words like `factor=8`.

        Raises:
            UserError: a word is none, or given twice; lists the options, or suggests the nearest.
        """
        parameters = inspect.signature(cls.__init__).parameters.values()
        known = {option.name: option for option in parameters if option.kind is option.KEYWORD_ONLY}
        options: dict[str, Any] = {}
        for word in words:
            key, equals, value = word.partition("=")
            if not equals or key not in known:
                near = difflib.get_close_matches(key, known, n=1) if equals else []
                there = ", ".join(f"{name}={option.default}" for name, option in known.items()) or "no options"
                hint = f"did you mean {near[0]}=...?" if near else f"{cls.__name__} has {there}."
                raise UserError(f"--adapter-options {word!r}: expected is option=value; {hint}")
            if key in options:
                raise UserError(f"--adapter-options gives {key} twice; leave one out.")
            options[key] = _parse_value(word, value, known[key].annotation)
        return options

    @classmethod
    def matches(cls, tensors: Mapping[str, Tensor]) -> bool:
        """Return whether these are a layer's tensors of this type: by name, and by shape where names do not tell."""
        names = set(tensors)
        return cls.required_names <= names <= cls.required_names | cls.optional_names

    @classmethod
    @abstractmethod
    def from_tensors(cls, layer_shape: Sequence[int], tensors: Mapping[str, Tensor]) -> "Adapter":
        """Build from a file's tensors for one layer; rank and alpha are read from them.

        Raises:
            ValueError: the tensors do not fit a layer of this shape; the message names both shapes.
        """

    @classmethod
    @abstractmethod
    def largest_rank(cls, layer_shape: Sequence[int]) -> int:
        """Return the largest rank that such a layer can make use of; sys.maxsize where the rank means something else.

        Raises:
            ValueError: this type does not go on such a layer.
        """

    @abstractmethod
    def reset(self, weight: Tensor, generator: torch.Generator) -> None:
        """Start afresh: afterwards `delta(weight)` is zero. `generator` is on the CPU."""

    @abstractmethod
    def delta(self, weight: Tensor) -> Tensor:
        """Return the change of the layer's weight, in fp32 and of the weight's shape, without the multiplier."""

    def delta_bias(self, bias: Tensor | None) -> Tensor | None:
        """Return the change of the layer's bias, in fp32 and without the multiplier; None: the bias stays as it is.

        `bias` is None where the layer has none; a change is then the whole bias.
        """
        return None

    @abstractmethod
    def scale_(self, factor: float) -> None:
        """Make `delta` `factor` times what it was, in place.

        Raises:
            ValueError: no tensors of this type make a multiple of `delta`.
        """

    def delta_square(self, weight: Tensor) -> Tensor:
        """Return the squared Frobenius norm of `delta(weight)`, a 0-dim tensor that gradients go through."""
        return self.delta(weight).square().sum()

    def delta_norm(self, weight: Tensor) -> Tensor:
        """Return the Frobenius norm of `delta(weight)`, a 0-dim tensor."""
        return self.delta(weight).norm()

    def forward(self, layer: nn.Module, x: Tensor, output: Tensor) -> Tensor:
        """Return what the adapted layer makes of `x`; `output` is what the layer alone made of it."""
        weight, bias = layer.get_parameter("weight"), cast("Tensor | None", layer.bias)
        changed = (weight.float() + self.multiplier * self.delta(weight)).to(weight.dtype)
        delta_bias = self.delta_bias(bias)
        if delta_bias is not None:
            delta_bias = self.multiplier * delta_bias
            bias = (delta_bias if bias is None else bias.float() + delta_bias).to(weight.dtype)
        return apply_weight(layer, changed, bias, x)


def _parse_value(word: str, value: str, wanted: type) -> bool | int | float:
    if wanted is bool and value.lower() in ("true", "false"):
        return value.lower() == "true"
    with suppress(ValueError):
        if wanted in (int, float):
            return wanted(value)
    expected = {bool: "true or false", int: "a whole number", float: "a number"}
    raise UserError(f"--adapter-options {word!r}: expected is {expected[wanted]}.")


def apply_weight(layer: nn.Module, weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    """Run a Linear, Conv2d, LayerNorm or GroupNorm with another weight and bias in place of its own."""
    if isinstance(layer, nn.Conv2d):
        return F.conv2d(x, weight, bias, layer.stride, layer.padding, layer.dilation, layer.groups)
    if isinstance(layer, nn.LayerNorm):
        return F.layer_norm(x, layer.normalized_shape, weight, bias, layer.eps)
    if isinstance(layer, nn.GroupNorm):
        return F.group_norm(x, layer.num_groups, weight, bias, layer.eps)
    assert isinstance(layer, nn.Linear), f"no adapter goes on a {type(layer).__name__}"
    return F.linear(x, weight, bias)

"""Every adapter type against LyCORIS: its files read here, and ours there, change a layer in the same way.

LyCORIS' `get_merged_weight` applies alpha / rank twice for LoHa and LoKr (4.1.3), so what is compared is what a layer
makes of an input.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorasmith.adapters import lokr
from lorasmith.adapters.base import Adapter
from lorasmith.network import recognise

lycoris = pytest.importorskip("lycoris.modules", reason="LyCORIS is not installed (extra lycoris)")

LAYERS: dict[str, Any] = {
    "linear": lambda: nn.Linear(24, 40),
    "linear_no_bias": lambda: nn.Linear(40, 24, bias=False),
    "conv1x1": lambda: nn.Conv2d(16, 24, 1),
    "conv3x3": lambda: nn.Conv2d(16, 24, 3, stride=2, padding=1),
    "layer_norm": lambda: nn.LayerNorm(24),
    "group_norm": lambda: nn.GroupNorm(4, 24),
}
# name -> module of LyCORIS, its options, the name of our type, whether its multiplier is ours
CASES: dict[str, tuple[str, dict[str, Any], str, bool]] = {
    "lora": ("LoConModule", {"alpha": 2}, "LoRA", True),
    "tucker": ("LoConModule", {"alpha": 2, "use_tucker": True}, "LoRA", True),
    "dora": ("LoConModule", {"alpha": 2, "weight_decompose": True}, "DoRA", False),
    "dora tucker": ("LoConModule", {"alpha": 2, "weight_decompose": True, "use_tucker": True}, "DoRA", False),
    "dora inputs": ("LoConModule", {"alpha": 2, "weight_decompose": True, "wd_on_out": False}, "DoRA", False),
    "loha": ("LohaModule", {"alpha": 2}, "LoHa", True),
    "loha tucker": ("LohaModule", {"alpha": 2, "use_tucker": True}, "LoHa", True),
    "loha decomposed": ("LohaModule", {"alpha": 2, "weight_decompose": True}, "LoHa", False),
    "lokr": ("LokrModule", {"alpha": 2, "lora_dim": 1}, "LoKr", True),
    "lokr both": ("LokrModule", {"alpha": 2, "lora_dim": 1, "decompose_both": True}, "LoKr", True),
    "lokr tucker": ("LokrModule", {"alpha": 2, "lora_dim": 2, "use_tucker": True, "factor": 2}, "LoKr", True),
    "lokr full": ("LokrModule", {"alpha": 2, "full_matrix": True, "factor": 4}, "LoKr", True),
    "lokr unbalanced": ("LokrModule", {"alpha": 2, "lora_dim": 1, "unbalanced_factorization": True}, "LoKr", True),
    "lokr decomposed": ("LokrModule", {"alpha": 2, "lora_dim": 1, "weight_decompose": True}, "LoKr", False),
    "full": ("FullModule", {}, "Full", True),
    "norm": ("NormModule", {}, "Norm", True),
    "ia3": ("IA3Module", {}, "IA3", True),
    "ia3 inputs": ("IA3Module", {"train_on_input": True}, "IA3", True),
    "glora": ("GLoRAModule", {"alpha": 2}, "GLoRA", True),
    "oft": ("DiagOFTModule", {}, "OFT", True),
    "oft constrained": ("DiagOFTModule", {"constraint": 0.01}, "OFT", True),
    "oft rescaled": ("DiagOFTModule", {"rescaled": True}, "OFT", False),
    "boft": ("ButterflyOFTModule", {"lora_dim": 12}, "BOFT", False),
    "boft constrained": ("ButterflyOFTModule", {"lora_dim": 12, "constraint": 0.01}, "BOFT", False),
    "boft rescaled": ("ButterflyOFTModule", {"lora_dim": 12, "rescaled": True}, "BOFT", False),
}
# What LyCORIS writes but cannot read: it takes the axis of dora_scale, the larger part of LoKr outputs, the rank of its
# Tucker form and IA3's inputs for the usual ones.
UNREAD = {"dora inputs", "lokr unbalanced", "lokr tucker", "ia3", "ia3 inputs"}
PAIRS = [(case, kind) for case in CASES for kind in LAYERS if (case == "norm") == kind.endswith("norm")]


@pytest.fixture(autouse=True)
def unchanged_lycoris() -> Iterator[None]:
    """Some modules of LyCORIS change their class."""
    before = {name: dict(vars(value)) for name, value in vars(lycoris).items() if isinstance(value, type)}
    yield
    for name, attributes in before.items():
        for key in vars(getattr(lycoris, name)).keys() - attributes.keys():
            delattr(getattr(lycoris, name), key)


def make_theirs(case: str, kind: str) -> tuple[Any, Any, Tensor]:
    """Return a layer, a random module of LyCORIS for it, and an input."""
    torch.manual_seed(0)
    layer: Any = LAYERS[kind]()
    name, options, _, _ = CASES[case]
    module = getattr(lycoris, name)("lora_unet_a", layer, 1.0, **{"lora_dim": 4, **options})
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.uniform_(-0.5, 0.5)
        for parameter in module.parameters():
            parameter.normal_(0, 0.5)
        if name == "FullModule":  # keeps a copy of the layer's weight
            module._org_weight, module.org_bias = (
                [layer.weight.clone()],
                layer.bias is not None and [layer.bias.clone()],
            )
    width = layer.weight.shape[0] if kind.endswith("norm") else layer.weight.shape[1]
    return layer, module, torch.randn((2, 5, width) if kind.startswith(("linear", "layer")) else (2, width, 7, 6))


def saved(module: Any) -> dict[str, Tensor]:
    if type(module).__name__ == "FullModule":  # its own state_dict subtracts the layer's weight as it was when applied
        return {"diff": module.weight.detach().clone()} | (
            {} if module.bias is None else {"diff_b": module.bias.detach().clone()}
        )
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def read(layer: Any, tensors: Mapping[str, Tensor]) -> Adapter:
    return recognise(tensors).from_tensors(tuple(layer.weight.shape), tensors)


@torch.no_grad()
@pytest.mark.parametrize(("case", "kind"), PAIRS)
@pytest.mark.parametrize("multiplier", [1.0, 0.7])
def test_a_file_of_lycoris_changes_a_layer_as_lycoris_does(case: str, kind: str, multiplier: float) -> None:
    _, _, ours, is_same_multiplier = CASES[case]
    layer, module, x = make_theirs(case, kind)
    adapter = read(layer, saved(module))
    assert type(adapter).__name__ == ours
    plain = layer(x)
    module.multiplier = multiplier if is_same_multiplier else 1.0
    expected = module(x)
    adapter.multiplier = multiplier
    mine = adapter(layer, x, plain)
    if not is_same_multiplier:
        expected = plain + multiplier * (expected - plain)  # ours is linear in it
    assert (expected - plain).norm() > 0.05 * plain.norm()
    torch.testing.assert_close(mine, expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize(("case", "kind"), PAIRS)
def test_lycoris_saves_what_ours_saves(case: str, kind: str) -> None:
    """Same names, same shapes, same values: what LyCORIS writes is what is written here after reading it."""
    layer, module, _ = make_theirs(case, kind)
    theirs = saved(module)
    ours = read(layer, theirs).state_dict()
    assert ours.keys() == theirs.keys()
    assert all(
        ours[name].shape == value.shape and torch.equal(ours[name], value.float()) for name, value in theirs.items()
    )


@torch.no_grad()
@pytest.mark.parametrize(("case", "kind"), [pair for pair in PAIRS if pair[0] != "norm"])
def test_lycoris_reads_what_is_made_here(case: str, kind: str) -> None:
    """What our own options make, with random values, does in LyCORIS what it does here."""
    name, given, _, _ = CASES[case]
    layer, theirs, x = make_theirs(case, kind)
    options = {key: value for key, value in given.items() if key not in ("lora_dim", "alpha", "constraint")}
    options = {
        {"weight_decompose": "dora_wd", "wd_on_out": "wd_on_output"}.get(key, key): options[key] for key in options
    }
    if "dora" in case:
        options.pop("dora_wd")
    alpha = given.get("alpha", given.get("constraint"))
    kinds = type(read(layer, saved(theirs)))
    mine = kinds(tuple(layer.weight.shape), given.get("lora_dim", 4), alpha, **options)
    for parameter in mine.parameters():
        parameter.normal_(0, 0.5)
    module_type = getattr(lycoris, name)
    state = mine.state_dict()
    if case in UNREAD:
        module = theirs
        module.load_state_dict(state)
    else:
        prefixed = {f"a.{key}": value for key, value in state.items()}
        module = module_type.make_module_from_state_dict("a", layer, *module_type.extract_state_dict(prefixed, "a"))
    torch.testing.assert_close(mine(layer, x, layer(x)), module(x), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("factor", [-1, 1, 2, 4, 7, 8, 16, 100])
def test_sizes_are_divided_as_lycoris_divides_them(factor: int) -> None:
    from lycoris.functional import factorization

    for size in [*range(1, 200), 320, 640, 768, 1024, 1280, 2560, 10240]:
        assert lokr.factorization(size, factor) == factorization(size, factor), size

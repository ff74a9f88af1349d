"""Every optimizer of the folder goes down, can be stopped and gone on with to the bit, and tells what it wants."""

import io
from typing import Any

import pytest
import torch

from lorasmith import plugins
from lorasmith.errors import UserError
from lorasmith.optimizers.base import (
    TwoWeights,
    adaptation,
    builder,
    choose,
    restore,
    weights_to_use,
)

CPU = torch.device("cpu")
NAMES = plugins.names("optimizers")
FINDS_RATE = {"dadapt_adagrad", "dadapt_adam", "dadapt_adan", "dadapt_lion", "dadapt_sgd", "prodigy"}
TWO_WEIGHTS = {"schedule_free_adamw", "schedule_free_radam", "schedule_free_sgd"}
RATES = {"sgd": 0.05, "sgd_nesterov8bit": 0.05, "schedule_free_sgd": 0.5, **dict.fromkeys(FINDS_RATE, 1.0)}


def needs_package(name: str) -> None:
    if hasattr(plugins.find("optimizers", name), "STAND_IN"):
        pytest.importorskip("bitsandbytes", reason="the extra bitsandbytes is not installed")


def parameters() -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in [(16, 4), (3, 16, 1, 1), (80, 80)]]


def groups(values: list[torch.nn.Parameter], rate: float) -> list[dict[str, Any]]:
    return [
        {"params": values[:1], "lr": rate, "name": "text_encoder"},
        {"params": values[1:], "lr": rate, "name": "unet", "weight_decay": 0.0},
    ]


def steps(optimizer: torch.optim.Optimizer, values: list[torch.nn.Parameter], numbers: range) -> None:
    """Go down a bowl whose gradient shakes, the same at the same step."""
    for number in numbers:
        for index, value in enumerate(values):
            generator = torch.Generator().manual_seed(100 * number + index)
            value.grad = value.detach() - 2 + 0.1 * torch.randn(value.shape, generator=generator)
        optimizer.step()


def height(values: list[torch.nn.Parameter]) -> float:
    return sum((value.detach() - 2).square().sum().item() for value in values)


@pytest.mark.parametrize("name", NAMES)
def test_it_goes_down(name: str) -> None:
    needs_package(name)
    values = parameters()
    optimizer = builder(name)(groups(values, RATES.get(name, 0.02)), weight_decay=0.0)
    before = height(values)
    steps(optimizer, values, range(120))
    with weights_to_use(optimizer):
        assert height(values) < 0.9 * before


@pytest.mark.parametrize("name", NAMES)
def test_stopped_and_gone_on_with_it_is_the_same_to_the_bit(name: str) -> None:
    needs_package(name)
    rate = RATES.get(name, 0.02)
    whole, cut = parameters(), parameters()
    straight = builder(name)(groups(whole, rate), weight_decay=0.1)
    steps(straight, whole, range(9))
    first = builder(name)(groups(cut, rate), weight_decay=0.1)
    steps(first, cut, range(4))
    with weights_to_use(first):
        pass
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    again = [torch.nn.Parameter(value.detach().clone()) for value in cut]
    second = builder(name)(groups(again, rate), weight_decay=0.1)
    restore(second, torch.load(file, weights_only=True))
    steps(second, again, range(4, 9))
    for expected, value in zip(whole, again, strict=True):
        assert torch.equal(expected, value)
    assert adaptation(straight.param_groups[0]) == adaptation(second.param_groups[0])


@pytest.mark.parametrize("name", NAMES)
def test_what_it_wants_of_a_run_is_read_off_it(name: str) -> None:
    needs_package(name)
    choice = choose(name, [], device=CPU)
    assert (choice.name, choice.notes) == (name, [])
    assert choice.finds_rate == (name in FINDS_RATE) and choice.learning_rate == (1.0 if choice.finds_rate else 1e-4)
    assert choice.averages == (name in TWO_WEIGHTS) and bool(choice.owns_schedule) == choice.averages


def test_of_others_too() -> None:
    """torch's Adafactor has a d that is none of D-Adaptation."""
    choice = choose("torch.optim.Adafactor", [], device=CPU)
    assert not choice.finds_rate and choice.learning_rate == 1e-4
    assert choose("pytorch_optimizer.Prodigy", ["d_coef=2"], device=CPU).finds_rate
    relative = choose("adafactor", ["relative_step=True"], device=CPU)
    assert relative.owns_rate and relative.owns_schedule == "makes its own learning rate (relative_step)"


@pytest.mark.parametrize("name", sorted(TWO_WEIGHTS))
def test_the_weights_to_use_are_others_and_looking_at_them_changes_nothing(name: str) -> None:
    values = parameters()
    optimizer = builder(name)(groups(values, 0.02), weight_decay=0.0)
    assert isinstance(optimizer, TwoWeights)
    steps(optimizer, values, range(20))
    trained = [value.detach().clone() for value in values]
    with weights_to_use(optimizer):
        used = [value.detach().clone() for value in values]
    assert not any(torch.equal(a, b) for a, b in zip(trained, used, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(trained, values, strict=True))
    assert all(group["train_mode"] for group in optimizer.param_groups)


def test_numbers_that_belong_to_no_parameter_go_where_the_parameters_are() -> None:
    values = parameters()
    optimizer = builder("prodigy")(groups(values, 1.0), weight_decay=0.0)
    steps(optimizer, values, range(2))
    state = optimizer.state_dict()
    state["param_groups"][0]["d_numerator"] = torch.zeros(1, device="meta")
    with pytest.raises(NotImplementedError, match="meta"):  # it is asked to move
        restore(optimizer, state)


@pytest.mark.parametrize(
    ("name", "arguments", "expected"),
    [
        ("adamw", ["betas=0.5,0.75", "eps=1e-6"], {"betas": (0.5, 0.75), "eps": 1e-6}),
        ("adamw", ["betas=(0.5, 0.75)", "amsgrad=true"], {"betas": (0.5, 0.75), "amsgrad": True}),
        ("Prodigy", ["d_coef=0.5", "growth_rate=1.02"], {"d_coef": 0.5, "growth_rate": 1.02}),
        ("adafactor", ["relative_step=False", "beta1=None"], {"relative_step": False, "beta1": None}),
        ("torch.optim.SGD", ["momentum=0.5"], {"momentum": 0.5}),
        ("Schedule-Free-AdamW", ["r=0.5"], {"r": 0.5}),
    ],
)
def test_arguments_reach_the_optimizer(name: str, arguments: list[str], expected: dict[str, Any]) -> None:
    optimizer = builder(name, arguments)(groups(parameters(), 0.1), weight_decay=0.0)
    assert {key: optimizer.param_groups[0][key] for key in expected} == expected


@pytest.mark.parametrize(
    ("name", "argument", "message"),
    [
        (
            "adamw",
            "beta=0.9,0.99",
            r"--optimizer-args beta=\.\.\.: adamw has no argument of that name; did you mean",
        ),
        ("adamw", "zzz=1", r"it has betas, eps, amsgrad, fused\."),
        ("pytorch_optimizer.Lion", "momentun=1", "pytorch_optimizer.Lion has no argument"),
        ("torch.optim.SGD", "momentun=0.9", "did you mean momentum"),
        ("adamw", "lr=1", "has an option of its own, --learning-rate"),
        ("adamw", "weight_decay=1", "has an option of its own, --weight-decay"),
        ("adamw", "betas", "expected key=value, such as betas=0.9,0.99"),
        ("adamw", "=1", "expected key=value"),
        ("adamw", "betas=1,2", "--optimizer adamw does not work with betas=1,2: Invalid beta"),
        ("adamw", "eps=small", "--optimizer adamw does not work with eps=small"),
        ("lion", "betas=0.9", "--optimizer lion does not work with betas=0.9"),
    ],
)
def test_wrong_arguments_are_refused_at_once(name: str, argument: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        choose(name, [argument], device=CPU)


class Handing(torch.optim.SGD):
    """Names only one of its arguments, and hands the others on."""

    def __init__(self, params: Any, lr: float = 0.1, *, extra: int = 0, **others: Any) -> None:
        super().__init__(params, lr=lr, **others)


def test_a_class_that_hands_arguments_on_takes_those_of_the_class_below() -> None:
    name = f"{__name__}.Handing"
    assert choose(name, ["momentum=0.5", "extra=3"], device=CPU).name == name
    with pytest.raises(UserError, match="did you mean momentum"):
        choose(name, ["momentums=0.5"], device=CPU)


class Waiting(torch.optim.SGD):
    """Takes no step before it is told that training begins, as the authors' schedule-free optimizers do."""

    is_training = False

    def train(self) -> None:
        self.is_training = True

    def eval(self) -> None:
        self.is_training = False

    def step(self, closure: Any = None) -> Any:
        assert self.is_training
        return super().step(closure)


def test_one_that_waits_for_the_training_is_told() -> None:
    choice = choose(f"{__name__}.Waiting", [], device=CPU)
    values = parameters()
    steps(choice.build(groups(values, 0.1), weight_decay=0.0), values, range(1))
    assert choice.averages and choice.owns_schedule


class Unsafe(torch.optim.SGD):
    """Keeps what cannot be loaded from a file that may come from anybody."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            group["own"] = Handing
        return super().step(closure)


def test_a_state_that_could_not_be_read_again_is_refused_before_the_run() -> None:
    with pytest.raises(UserError, match="Unsafe does not work: Weights only load failed"):
        choose(f"{__name__}.Unsafe", [], device=CPU)


@pytest.mark.parametrize(
    ("name", "stand_in"), [("adamw8bit", "adamw"), ("paged_lion8bit", "lion"), ("sgd_nesterov8bit", "sgd")]
)
def test_without_bitsandbytes_the_same_is_done_with_more_memory(
    monkeypatch: pytest.MonkeyPatch, name: str, stand_in: str
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes", None)
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes.optim", None)
    choice = choose(name, ["min_8bit_size=16"], device=CPU)
    assert choice.name == stand_in
    assert f"{name} cannot be used here (" in choice.notes[0] and f"so {stand_in} is" in choice.notes[0]
    assert choice.notes[1] == "it has no min_8bit_size=16"


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pytorch_optimizer", None)
    monkeypatch.delitem(__import__("sys").modules, "lorasmith.optimizers.lion", raising=False)
    with pytest.raises(UserError, match=r"--optimizer lion needs the package pytorch_optimizer: pip install 'lorasm"):
        choose("lion", [], device=CPU)


def test_eight_bits_are_eight_bits() -> None:
    needs_package("adamw8bit")
    values = parameters()
    optimizer = builder("adamw8bit")(groups(values, 0.02), weight_decay=0.0)
    steps(optimizer, values, range(1))
    assert [optimizer.state[value]["state1"].dtype for value in values[1:]] == [torch.float32, torch.uint8]

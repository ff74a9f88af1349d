"""What a name given as --optimizer may mean: a file of this folder, or anybody's optimizer class by its dotted name.

What an optimizer wants of a run is read off the optimizer itself, tried out on a few numbers before anything is loaded;
so a class that nobody here has heard of is treated like those of this folder.
"""

import ast
import difflib
import inspect
import io
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, runtime_checkable

import torch

from lorasmith import plugins
from lorasmith.errors import UserError

Build = Callable[..., torch.optim.Optimizer]
_CALL = "(param_groups, weight_decay=...)"
_OPTIONS_OF_THEIR_OWN = {"lr": "--learning-rate", "weight_decay": "--weight-decay"}
_WORDS = {"true": True, "false": False, "none": None, "inf": math.inf}
_EXTRAS = {"pytorch_optimizer": "optimizers", "bitsandbytes": "bitsandbytes"}  # package -> the extra that brings it
_OWN_RATE, _FOUND_RATE = 1e-4, 1.0  # where no rate is given; the latter multiplies what the optimizer finds


@runtime_checkable
class TwoWeights(Protocol):
    """An optimizer that trains on other weights than those that are meant to be used (schedule-free ones)."""

    def train(self) -> None:
        """Put the weights to train on into the parameters."""

    def eval(self) -> None:
        """Put the weights to use into the parameters."""


@dataclass(frozen=True)
class Choice:
    """An optimizer that was tried out.

    name: of what is really used. learning_rate: where none is given. finds_rate: it estimates the rate itself, one for
    all parameters, and the learning rate multiplies it. owns_rate: the learning rate has no part in it. owns_schedule:
    "" or why the rate must not change over the run. averages: it saves an average of the weights that it trains on.
    notes: what a person should know.
    """

    name: str
    build: Build
    learning_rate: float
    finds_rate: bool
    owns_rate: bool
    owns_schedule: str
    averages: bool
    notes: list[str]


def choose(name: str, arguments: Sequence[str], *, device: torch.device) -> Choice:
    """Find an optimizer and try it out; take its stand-in where it cannot run here.

    Args:
        arguments: `key=value`, values as in Python.

    Raises:
        UserError: there is no such optimizer, it has no such argument, or does not work with these.
    """
    name = _spelled(name)
    plug = _find(name)
    notes = []
    stand_in = vars(plug).get("STAND_IN") if inspect.ismodule(plug) else None
    if stand_in is not None and (reason := _why_not(_build_of(name, plug), device)):
        notes.append(f"{name} cannot be used here ({reason}), so {stand_in} is, which does the same with more memory")
        name, plug = stand_in, _find(stand_in)
        known = _named_parameters(_build_of(name, plug))
        lost = [argument for argument in arguments if argument.partition("=")[0].strip() not in known]
        arguments = [argument for argument in arguments if argument not in lost]
        notes += [f"it has no {', '.join(lost)}"] if lost else []
    build = partial(_in_training, builder(name, arguments))
    try:
        optimizer = try_out(build, device)
    except UserError:
        raise
    except Exception as error:  # whatever anybody's class raises for arguments that it does not like
        given = f" with {' '.join(arguments)}" if arguments else ""
        raise UserError(f"--optimizer {name} does not work{given}: {_first_line(error)}") from error
    group = optimizer.param_groups[0]
    finds_rate, owns_rate = adaptation(group) is not None, bool(group.get("relative_step"))
    averages = isinstance(optimizer, TwoWeights)
    return Choice(
        name,
        build,
        _FOUND_RATE if finds_rate else _OWN_RATE,
        finds_rate,
        owns_rate,
        "makes its own learning rate (relative_step)" if owns_rate else "needs no schedule" if averages else "",
        averages,
        notes,
    )


def _in_training(build: Build, param_groups: Sequence[dict[str, Any]], **options: Any) -> torch.optim.Optimizer:
    """Build an optimizer that is ready for a step, which schedule-free ones of their authors' are not by themselves."""
    optimizer = build(param_groups, **options)
    if isinstance(optimizer, TwoWeights):
        optimizer.train()
    return optimizer


def builder(name: str, arguments: Sequence[str] = ()) -> Build:
    """Return what builds the optimizer from groups of parameters, each with its `lr`, and `weight_decay`.

    A plug is a module with a function `build`; a dotted name may also be a class of torch's kind, `torch.optim.SGD`.

    Raises:
        UserError: there is no such optimizer, or it cannot be called so.
    """
    name = _spelled(name)
    build = _build_of(name, _find(name))
    return partial(build, **_checked(name, build, arguments)) if arguments else build


def _spelled(name: str) -> str:
    return name if "." in name else name.lower().replace("-", "_")


def _find(name: str) -> Any:
    try:
        return plugins.find("optimizers", name)
    except UserError as error:
        missing = error.__cause__.name if isinstance(error.__cause__, ModuleNotFoundError) else None
        if missing not in _EXTRAS or "." in name:
            raise
        raise UserError(
            f"--optimizer {name} needs the package {missing}: pip install 'lorasmith[{_EXTRAS[missing]}]'"
        ) from error


def _build_of(name: str, plug: Any) -> Build:
    if inspect.ismodule(plug) and callable(vars(plug).get("build")):
        return plug.build
    if not (isinstance(plug, type) and issubclass(plug, torch.optim.Optimizer)):
        classes = [f"{name}.{c}" for c, v in vars(plug).items() if _is_optimizer(v)] if inspect.ismodule(plug) else []
        hint = f"; did you mean {classes[0]}?" if classes else "."
        raise UserError(
            f"--optimizer {name}: expected a module with a function build{_CALL}, or a class of torch's kind such as "
            f"torch.optim.SGD, found {_kind(plug)}{hint}"
        )
    required = _required_rate(name, plug)
    return partial(plug, **required) if required else plug


def _required_rate(name: str, plug: type[torch.optim.Optimizer]) -> dict[str, Any]:
    """Check that a class takes what it will be given; return `lr` for one that insists on it (each group has its own).

    Classes that insist on a closure (LBFGS) work on one group alone and take no weight decay, so they are refused here.
    """
    signature = inspect.signature(plug)
    rate = signature.parameters.get("lr")
    given = {"lr": 1e-4} if rate is not None and rate.default is inspect.Parameter.empty else {}
    try:
        signature.bind([], weight_decay=0.0, **given)
    except TypeError as error:
        raise UserError(
            f"--optimizer {name} cannot be used: it is called as {plug.__name__}{_CALL}, but {error}. "
            "Take another one, or write a module with a function build that calls it as it wants."
        ) from error
    return given


def _checked(name: str, build: Build, arguments: Sequence[str]) -> dict[str, Any]:
    """Return arguments with their values, all of them known to what they are for."""
    values = dict(_parse(argument) for argument in arguments)
    known = [key for key in _named_parameters(build) if key not in _OPTIONS_OF_THEIR_OWN]
    for key in values:
        if key in _OPTIONS_OF_THEIR_OWN:
            raise UserError(f"--optimizer-args {key}=...: this has an option of its own, {_OPTIONS_OF_THEIR_OWN[key]}.")
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(known) or 'none'}."
            raise UserError(f"--optimizer-args {key}=...: {name} has no argument of that name; {hint}")
    return values


def _parse(argument: str) -> tuple[str, Any]:
    """Read `key=value`: a number, tuple, text in quotes, true, false or none; anything else is a text."""
    key, equals, text = (part.strip() for part in argument.partition("="))
    if not equals or not key.isidentifier():
        raise UserError(f"--optimizer-args {argument}: expected key=value, such as betas=0.9,0.99 or eps=1e-6.")
    if text.lower() in _WORDS:
        return key, _WORDS[text.lower()]
    try:
        return key, ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return key, text


def _named_parameters(build: Build) -> list[str]:
    """Return the names of what a function or class can be given, except the first, which are the parameters to train.

    Those of the classes below count too where a class hands on what it does not name.
    """
    build = build.func if isinstance(build, partial) else build
    names: list[str] = []
    for level in build.__mro__ if isinstance(build, type) else [build]:
        parameters = inspect.signature(level.__init__ if isinstance(level, type) else level).parameters
        own = list(parameters)[2 if isinstance(level, type) else 1 :]
        names += [key for key in own if parameters[key].kind != inspect.Parameter.VAR_KEYWORD]
        if all(parameter.kind != inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()):
            break
    return names


def try_out(build: Build, device: torch.device) -> torch.optim.Optimizer:
    """Take two steps with a matrix and a 1 x 1 convolution, and save and load the state as a run does.

    Raises:
        Exception: whatever does not work.
    """
    parameters = [torch.nn.Parameter(torch.ones(shape, device=device)) for shape in [(4, 2), (4, 2, 1, 1)]]
    optimizer = build([{"params": parameters, "lr": 1e-3, "name": "unet"}], weight_decay=0.0)
    for _ in range(2):
        for parameter in parameters:
            parameter.grad = torch.full_like(parameter, 0.1)
        optimizer.step()
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    restore(optimizer, torch.load(file, map_location="cpu", weights_only=True))
    return optimizer


def _why_not(build: Build, device: torch.device) -> str:
    try:
        try_out(build, device)
    except ModuleNotFoundError as error:
        extra = _EXTRAS.get(error.name or "", error.name)
        return f"{error.name} is not installed: pip install 'lorasmith[{extra}]'"
    except Exception as error:  # a library that was built for other machines, ...
        return _first_line(error)
    return ""


def restore(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Go on from what `state_dict` gave, also with numbers that belong to no parameter, on the parameters' device."""
    optimizer.load_state_dict(dict(state))
    for group in optimizer.param_groups:
        device = group["params"][0].device
        for key, value in group.items():
            if isinstance(value, torch.Tensor):
                group[key] = value.to(device)


def adaptation(group: Mapping[str, Any]) -> float | None:
    """Return d, what an optimizer of the D-Adaptation family multiplies the rate by; None for others.

    torch's Adafactor calls its clipping threshold d.
    """
    return group["d"] if "d" in group and "beta2_decay" not in group else None


@contextmanager
def weights_to_use(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """While entered, the parameters hold the weights to use; afterwards those to train on, bit for bit.

    The optimizers' own way back, `train`, only comes close to them.
    """
    if not isinstance(optimizer, TwoWeights):
        yield
        return
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    kept = [parameter.detach().clone() for parameter in parameters]
    optimizer.eval()
    try:
        yield
    finally:
        optimizer.train()
        with torch.no_grad():
            for parameter, value in zip(parameters, kept, strict=True):
                parameter.copy_(value)


def _is_optimizer(value: object) -> bool:
    return isinstance(value, type) and issubclass(value, torch.optim.Optimizer) and value is not torch.optim.Optimizer


def _kind(plug: object) -> str:
    return f"a {'class' if isinstance(plug, type) else type(plug).__name__}"


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__

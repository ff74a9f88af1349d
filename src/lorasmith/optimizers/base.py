"""What a name given as --optimizer may mean: a file of this folder, or anybody's optimizer class by its dotted name."""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from lorasmith import plugins
from lorasmith.errors import UserError

Build = Callable[..., torch.optim.Optimizer]
_CALL = "(param_groups, weight_decay=...)"


def builder(name: str) -> Build:
    """Return what builds the optimizer from groups of parameters, each with its `lr`, and `weight_decay`.

    A plug is a module with a function `build`; a dotted name may also be a class of torch's kind, `torch.optim.SGD`.

    Raises:
        UserError: there is no such optimizer, or it cannot be called so.
    """
    plug = plugins.find("optimizers", name)
    if inspect.ismodule(plug) and callable(vars(plug).get("build")):
        return plug.build
    if not (isinstance(plug, type) and issubclass(plug, torch.optim.Optimizer)):
        classes = [f"{name}.{c}" for c, v in vars(plug).items() if _is_optimizer(v)] if inspect.ismodule(plug) else []
        hint = f"; did you mean {classes[0]}?" if classes else "."
        raise UserError(
            f"--optimizer {name}: expected a module with a function build{_CALL}, or a class of torch's kind such as "
            f"torch.optim.SGD, found {_kind(plug)}{hint}"
        )
    return partial(plug, **_required_rate(name, plug))


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


def _is_optimizer(value: object) -> bool:
    return isinstance(value, type) and issubclass(value, torch.optim.Optimizer) and value is not torch.optim.Optimizer


def _kind(plug: object) -> str:
    return f"a {'class' if isinstance(plug, type) else type(plug).__name__}"

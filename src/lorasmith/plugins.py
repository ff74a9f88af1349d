"""Finds a plug by its name: `lora` is the file `lorasmith/adapters/lora.py`, `my.module` is the user's own module.

There is no registry: a new file in the right folder is a new name.
"""

import difflib
import importlib
import pkgutil
from functools import cache
from typing import Any

from lorasmith.errors import UserError

_NOT_PLUGS = {"base"}  # the file that holds a folder's seam


@cache  # a run asks for each of its layers
def names(kind: str) -> tuple[str, ...]:
    """Return the names there are in a folder of plugs, e.g. `adapters`, `optimizers`, `data.sources`; imports none."""
    package = importlib.import_module(f"lorasmith.{kind}")
    found = (module.name for module in pkgutil.iter_modules(package.__path__) if not module.ispkg)
    return tuple(sorted(name for name in found if name not in _NOT_PLUGS and not name.startswith("_")))


def find(kind: str, name: str) -> Any:
    """Return the module of a plug, or the object of a dotted name such as `prodigyopt.Prodigy`.

    Raises:
        UserError: there is no such name (the nearest one is suggested), or a package that it needs is missing.
    """
    if "." in name:
        return _find_dotted(kind, name)
    known = names(kind)
    if name not in known:
        near = difflib.get_close_matches(name.lower().replace("-", "_"), known, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise UserError(
            f"there is no {_singular(kind)} named {name!r}; {hint}There are: {', '.join(known)}, "
            "and any module of your own by its dotted name (my.module)."
        )
    return _import(kind, f"lorasmith.{kind}.{name}", name)


def find_module(kind: str, name: str) -> Any:
    """Return a user's own module by its whole name.

    Raises:
        UserError: there is none, or a package that it needs is missing.
    """
    return _import(kind, name, name)


def _find_dotted(kind: str, name: str) -> Any:
    """Import `a.b` as a module, or as the attribute `b` of module `a`."""
    parent, _, attribute = name.rpartition(".")
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not (name == error.name or name.startswith(f"{error.name}.")):
            raise _missing_package(name, error) from error
    module = _import(kind, parent, name)
    if attribute not in vars(module):
        raise UserError(
            f"{_singular(kind)} {name!r}: module {parent} was found, but it has no {attribute!r}; check the spelling."
        )
    return getattr(module, attribute)


def _import(kind: str, module: str, name: str) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is not None and (module == error.name or module.startswith(f"{error.name}.")):
            raise UserError(
                f"{_singular(kind)} {name!r}: no module named {error.name!r} is installed here; "
                "check the spelling, install its package, or run where Python finds it (PYTHONPATH)."
            ) from error
        raise _missing_package(name, error) from error


def _missing_package(name: str, error: ModuleNotFoundError) -> UserError:
    return UserError(f"{name!r} needs the Python package {error.name!r}, which is not installed; install it with pip.")


def _singular(kind: str) -> str:
    return kind.rpartition(".")[2].removesuffix("s")

"""Objectives by dotted path: `losses.recall.mse`, or a function of the user's own, `mypackage.module.function`.

`metamem` never imports `losses`. It finds it here, by name, and says so when another package of that name shadows it.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

from metamem.config.errors import ConfigError, Where, nearest

Objective = Callable[..., Any]  # (pred, target) -> loss per token

MEASURED = "aux."  # what follows it in an objective's key is a glob over the names of what memories measured

ROUTERS = ("gates", "logits", "costs")  # what routers measure (`metamem.routing`), and an objective of them asks for

PROJECT = "metamem-torch"  # `losses.__project__`, by which ours is known


def resolve_objective(path: str, where: Where | str) -> Objective:
    """The function at a dotted path.

    Raises `ConfigError` at `where` with the nearest function or module when there is none, when importing the module
    fails, and when a path into `losses` fails because another package of that name comes first on `sys.path`.
    """
    place = Where.of(where)
    module_name, _, name = path.rpartition(".")
    if not module_name or not all(part.isidentifier() for part in path.split(".")):
        raise place.error(f"{path!r} is not a dotted path of a function, such as losses.recall.mse")
    module = _import(module_name, path, place)
    function = getattr(module, name, None)
    if function is None:
        functions = [f"{module_name}.{function}" for function in _functions(module)]
        raise _not_found(place, f"there is no {name!r} in {module_name}", path, functions)
    if not callable(function) or inspect.ismodule(function):
        raise place.unknown(f"{path!r} is not a function", path, [f"{path}.{f}" for f in _functions(function)])
    return function


def resolve_class(path: str, base: type, where: Where | str) -> type[Any]:
    """The class at a dotted path, a `base`. Raises ConfigError where it is none: what a config says is given to a
    constructor of such, and to nothing else, so that a config that comes with a run calls nothing."""
    found = resolve_objective(path, where)
    if not isinstance(found, type) or not issubclass(found, base):
        raise Where.of(where).error(f"{path} is no class of nn.{base.__name__}, and nothing else is made here")
    return found


def statistics(objective: Objective) -> list[str]:
    """What of routers an objective is of: its parameters, where all that have no default are named as what routers
    measure; none for a loss per token."""
    parameters = inspect.signature(objective).parameters.values()
    names = [parameter.name for parameter in parameters if parameter.default is parameter.empty]
    return names if all(name in ROUTERS for name in names) else []


def objective_gradient(objective: Objective) -> Callable[..., Any] | None:
    """The written-out gradient of an objective, by convention `<name>_gradient` in its own module; else None.

    None also for a wrapped or partial one: what it stands for is not known.
    """
    module = sys.modules.get(getattr(objective, "__module__", None) or "")
    name = getattr(objective, "__name__", "")
    if getattr(module, name, None) is not objective:
        return None
    gradient = getattr(module, f"{name}_gradient", None)
    return gradient if callable(gradient) else None


def _import(module_name: str, path: str, place: Where) -> ModuleType:
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if module_name != missing and not module_name.startswith(missing + "."):
            # The module is there; what it imports is not.
            raise place.error(f"importing {module_name} failed: {error}") from error
        raise _not_found(place, f"there is no module {missing!r} for {path!r}", path, _siblings(missing)) from error
    except Exception as error:
        raise place.error(f"importing {module_name} failed: {type(error).__name__}: {error}") from error


def _not_found(place: Where, problem: str, path: str, choices: list[str]) -> ConfigError:
    root = path.split(".")[0]
    package = sys.modules.get(root)
    if root == "losses" and package is not None and getattr(package, "__project__", None) != PROJECT:
        found = getattr(package, "__file__", None) or ", ".join(getattr(package, "__path__", []))
        return place.error(
            f"{problem}: another package named 'losses' shadows metamem's, the one at {found}; "
            "rename it, or take its folder off PYTHONPATH"
        )
    # Choices are whole paths; compare the modules by the part that they name.
    depth = choices[0].count(".") + 1 if choices else 0
    guess = nearest(".".join(path.split(".")[:depth]), choices, cutoff=0.0)
    listed = f" ({', '.join(choices)})" if choices else ""
    return place.error(problem + (f"; did you mean {guess[0]!r}?" if guess else "") + listed)


def _functions(module: object) -> list[str]:
    """The public functions of a module's own, its gradients left out: those are found beside their objective."""
    if not inspect.ismodule(module):
        return []
    own = {key: value for key, value in vars(module).items() if inspect.isfunction(value)}
    return [
        key
        for key, value in own.items()
        if value.__module__ == module.__name__ and not key.startswith("_") and not key.endswith("_gradient")
    ]


def _siblings(module_name: str) -> list[str]:
    """The modules beside one that does not exist; of all packages only ours can be meant by a slip."""
    parent_name = module_name.rpartition(".")[0]
    if not parent_name:
        return ["losses"] if nearest(module_name, ["losses"]) else []
    parent = sys.modules.get(parent_name)
    return [f"{parent_name}.{info.name}" for info in pkgutil.iter_modules(getattr(parent, "__path__", []))]

"""The public surface: names are pinned here, so that none comes or goes by accident, and all explain themselves."""

import ast
import importlib
import inspect
from pathlib import Path

import pytest

import metamem

ROOT = Path(__file__).resolve().parent.parent
MODULES = sorted(path for package in ("metamem", "losses") for path in (ROOT / package).rglob("*.py"))

NAMES = [
    "Config",
    "ConfigError",
    "Controller",
    "FastWeights",
    "GatedResidual",
    "InnerLoop",
    "MODULES",
    "Memory",
    "MemoryCell",
    "Network",
    "Observed",
    "Out",
    "OuterLevels",
    "Router",
    "RouterConfig",
    "Session",
    "State",
    "Stateful",
    "TASKS",
    "TokenLevel",
    "UserError",
    "build",
    "build_task",
    "inner_levels",
    "load_config",
    "load_run",
    "load_state",
    "save_state",
    "token_levels",
    "train",
]
PACKAGES = [
    "metamem",
    "metamem.adaptation",
    "metamem.analysis",
    "metamem.analysis.launchers",
    "metamem.config",
    "metamem.controllers",
    "metamem.hierarchy",
    "metamem.episodes",
    "metamem.episodes.tasks",
    "metamem.memory.slots",
    "metamem.tasks",
    "metamem.training",
]


def test_the_public_names_are_these():
    assert sorted(metamem.__all__) == NAMES


@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_name_is_there_once_and_documented(package):
    module = importlib.import_module(package)
    assert len(module.__all__) == len(set(module.__all__))
    for name in module.__all__:
        value = getattr(module, name)
        if inspect.isclass(value) or inspect.isfunction(value):
            assert value.__doc__ and value.__doc__.strip(), name


def definitions(tree, inside=""):
    """(name, node) of all that a module or class defines in public, the insides of functions left out."""
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and not node.name.startswith("_"):
            yield f"{inside}{node.name}", node
            if isinstance(node, ast.ClassDef):
                yield from definitions(node, f"{node.name}.")


def is_overload(node):
    return any(isinstance(part, ast.Name) and part.id == "overload" for part in getattr(node, "decorator_list", []))


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_everything_public_says_what_it_is(path):
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree), "a module says what is in it"
    silent = [name for name, node in definitions(tree) if not ast.get_docstring(node) and not is_overload(node)]
    assert silent == []


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_is_called_state_dict(path):
    """torch's own method of that name would be hidden by it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            assert node.name != "state_dict"
        if isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
            assert (node.id if isinstance(node, ast.Name) else node.attr) != "state_dict"

"""Registries of what a config can name: network modules by `kind`, tasks by `name`.

The options of a kind are the keyword arguments of its constructor, with their annotations and defaults; there is no
second list of them to keep in step:

    @MODULES.register("scale")
    class Scale(nn.Module):
        def __init__(self, dim: int, initial: float = 1.0): ...

    # network: {modules: {scale: {kind: scale, dim: 128}}, ...}

A name with a dot is the path of a class or function of your own, which needs no registration: `kind: mypackage.Scale`.

An option annotated with a module class is a module of its own in the config, with its kind and options: nested in the
constructor's, which is given it built. One annotated `dict[str, Class]` is a mapping of such, by name. An argument
annotated with a dataclass stands for its fields, each an option.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import MISSING
from typing import Any, Generic, TypeGuard, TypeVar, get_args, get_origin, get_type_hints

from torch import nn

from metamem.config.convert import convert, describe
from metamem.config.errors import ConfigError, Where
from metamem.config.resolve import resolve_objective
from metamem.config.schema import Config

T = TypeVar("T")
C = TypeVar("C", bound=Callable[..., Any])


class Registry(Generic[T]):
    """Name -> constructor of a `T`.

    `noun` is what errors call an entry, `key` the config key that names one, `builder_args` the constructor arguments
    that the builder supplies and no config can, `makes` whether a class that a dotted path names is one of an entry.
    """

    def __init__(
        self, noun: str, key: str, builder_args: Collection[str] = (), makes: Callable[[type], bool] | None = None
    ) -> None:
        self.noun = noun
        self.key = key
        self.makes = makes
        self.builder_args = frozenset(builder_args)
        self._constructors: dict[str, Callable[..., T]] = {}

    def register(self, name: str) -> Callable[[C], C]:
        """Class or function decorator: what is below it is built where a config says `name`.

        Raises ValueError where the name is taken by something else (running a notebook cell again is fine), TypeError
        where an argument has no annotation to check a config by.
        """

        def add(constructor: C) -> C:
            taken = self._constructors.get(name)
            if taken is not None and _identity(taken) != _identity(constructor):
                raise ValueError(f"{self.noun} {name!r} is already registered, by {_identity(taken)}")
            if bare := self._bare(constructor):
                raise TypeError(f"{self.noun} {name!r}: annotate {bare!r}, to check configs by")
            self._constructors[name] = constructor
            return constructor

        return add

    def __contains__(self, name: object) -> bool:
        return name in self._constructors

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._constructors))

    def get(self, name: str, where: Where | str = "") -> Callable[..., T]:
        """The constructor registered as `name`, or at that dotted path; a ConfigError with the nearest where there is
        none."""
        place = Where.of(where) / self.key
        if "." in name:
            constructor = resolve_objective(name, place)
            made = constructor if isinstance(constructor, type) else _hints(constructor).get("return")
            # Options of a config are given to nothing else: what comes with a run must not call whatever there is.
            if self.makes is not None and not (isinstance(made, type) and self.makes(made)):
                raise place.error(f"{name} is no {self.noun}: name a class of one, or a function annotated to give one")
            if bare := self._bare(constructor):
                raise place.error(f"{name}: annotate {bare!r}, to check configs by")
            return constructor
        if name not in self._constructors:
            raise place.unknown(f"there is no {self.noun} {name!r}", name, self)
        return self._constructors[name]

    def _bare(self, constructor: Callable[..., Any]) -> str | None:
        """An argument without an annotation, if there is one."""
        arguments = (item for item in _keywords(constructor) if item.name not in self.builder_args)
        return next((item.name for item in arguments if item.annotation is item.empty), None)

    def options(self, name: str) -> dict[str, tuple[Any, Any]]:
        """Option -> (annotation, default or `dataclasses.MISSING`), in the constructor's order."""
        constructor, found = self.get(name), {}
        hints = _hints(constructor)
        for item in _keywords(constructor):
            if is_group(hint := hints.get(item.name)):
                of = get_type_hints(hint, include_extras=True)
                found |= {field.name: (of[field.name], field.default) for field in dataclasses.fields(hint)}
            elif item.name not in self.builder_args:
                found[item.name] = (hint, MISSING if item.default is item.empty else item.default)
        return found

    def nested(self, name: str, options: Mapping[str, Any]) -> dict[tuple[str, ...], dict[str, Any]]:
        """The entries of the modules among checked options, by the keys that lead to each."""
        found: dict[tuple[str, ...], dict[str, Any]] = {}
        for option, (annotation, _) in self.options(name).items():
            if option in options and is_module(annotation):
                found[option,] = options[option]
            elif option in options and is_module_mapping(annotation):
                found |= {(option, key): entry for key, entry in options[option].items()}
        return found

    def needs(self, name: str, argument: str) -> bool:
        """Whether the constructor registered as `name` cannot do without an argument, as a memory without levels."""
        known = name in self or "." in name
        return known and any(item.name == argument and item.default is item.empty for item in _keywords(self.get(name)))

    def check(self, name: str, options: Mapping[str, Any], where: Where | str = "") -> dict[str, Any]:
        """The options as their annotations have them; a ConfigError on an unknown, missing or wrongly typed one."""
        place = Where.of(where)
        self.get(name, place)
        known = self.options(name)
        for key in options:
            if key not in known:
                raise (place / key).unknown(f"{self.noun} {name!r} has no such option", key, known)
        for key, (annotation, default) in known.items():
            if key not in options and default is MISSING:
                raise (place / key).error(f"is missing: {self.noun} {name!r} needs {self._needed(annotation)}")
        return {key: self._option(value, known[key][0], place / key) for key, value in options.items()}

    def _needed(self, annotation: Any) -> str:
        if is_module_mapping(annotation):
            return f"a mapping of names, each to a mapping with a {self.key}"
        return f"a mapping with a {self.key}" if is_module(annotation) else describe(annotation)

    def _option(self, value: Any, annotation: Any, place: Where) -> Any:
        if is_module_mapping(annotation):
            entries = convert(value, dict[str, Any], place)
            return {key: self._option(entry, get_args(annotation)[1], place / key) for key, entry in entries.items()}
        if not is_module(annotation):
            return convert(value, annotation, place)
        entry = convert(value, dict[str, Any], place)
        if not isinstance(entry.get(self.key), str):
            raise (place / self.key).error(f"is missing: name a {self.noun}, such as {next(iter(self))}")
        return entry

    def build(
        self,
        name: str,
        options: Mapping[str, Any],
        where: Where | str = "",
        nested: Callable[[tuple[str, ...], dict[str, Any]], T] | None = None,
        **supplied: Any,
    ) -> T:
        """Check the options and construct.

        `supplied` are the builder's own arguments, passed on where the constructor takes them; `nested` builds a module
        among the options, from the keys that lead to it and its entry. A ValueError that the constructor raises about
        its options becomes a ConfigError at `where`.
        """
        arguments, place = self.check(name, options, where), Where.of(where)
        constructor = self.get(name, where)
        for keys, entry in self.nested(name, arguments).items():
            part = self._nested_module(entry, self.options(name)[keys[0]][0], place.at(*keys), keys, nested, supplied)
            arguments[keys[0]] = part if len(keys) == 1 else {**arguments[keys[0]], keys[1]: part}
        taken = {parameter.name for parameter in _keywords(constructor)} & self.builder_args
        try:
            arguments = _grouped(constructor, arguments)
            return constructor(**arguments, **{key: value for key, value in supplied.items() if key in taken})
        except ConfigError:
            raise  # it already says where, more exactly
        except ValueError as error:
            raise place.error(str(error)) from error

    def _nested_module(
        self,
        entry: Mapping[str, Any],
        annotation: Any,
        place: Where,
        keys: tuple[str, ...],
        nested: Callable[[tuple[str, ...], dict[str, Any]], T] | None,
        supplied: dict[str, Any],
    ) -> T:
        """The module of an entry; a ConfigError where its kind makes none of the class that the option takes."""
        options = dict(entry)
        part = nested(keys, options) if nested else self.build(options.pop(self.key), options, place, **supplied)
        wanted = get_args(annotation)[1] if is_module_mapping(annotation) else annotation
        if not isinstance(part, wanted):
            kinds = [other for other in self if _makes(self.get(other), wanted)]
            raise (place / self.key).unknown(f"{entry[self.key]!r} is no {wanted.__name__}", entry[self.key], kinds)
        return part


def _grouped(constructor: Callable[..., Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments for options: those that are fields of a dataclass, in one of it."""
    arguments = dict(options)
    for name in (parameter.name for parameter in _keywords(constructor)):
        if is_group(hint := _hints(constructor).get(name)):
            fields = [field.name for field in dataclasses.fields(hint) if field.name in options]
            arguments[name] = hint(**{field: arguments.pop(field) for field in fields})
    return arguments


def is_group(annotation: Any) -> TypeGuard[type[Any]]:
    """Whether an argument with this annotation stands for options, the fields of a dataclass."""
    return isinstance(annotation, type) and dataclasses.is_dataclass(annotation)


def is_module(annotation: Any) -> bool:
    """Whether an option with this annotation is a module of its own."""
    return isinstance(annotation, type) and issubclass(annotation, nn.Module)


def is_module_mapping(annotation: Any) -> bool:
    """Whether an option with this annotation is a mapping of modules, each with its name."""
    return get_origin(annotation) is dict and is_module(get_args(annotation)[1])


def _makes(constructor: Callable[..., Any], wanted: type) -> bool:
    return isinstance(constructor, type) and issubclass(constructor, wanted)


def _identity(constructor: Callable[..., Any]) -> str:
    return f"{constructor.__module__}.{constructor.__qualname__}"


def _keywords(constructor: Callable[..., Any]) -> list[inspect.Parameter]:
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return [parameter for parameter in inspect.signature(constructor).parameters.values() if parameter.kind in kinds]


@functools.cache
def _hints(constructor: Callable[..., Any]) -> dict[str, Any]:
    function = constructor.__init__ if isinstance(constructor, type) else constructor
    try:
        return get_type_hints(function, include_extras=True)
    except TypeError:  # of a builtin
        return {}


MODULES: Registry[Any] = Registry(
    "module kind", key="kind", builder_args={"levels", "router"}, makes=lambda made: issubclass(made, nn.Module)
)
TASKS: Registry[Any] = Registry("task", key="name", makes=lambda made: hasattr(made, "sample"))
TRACKERS: Registry[Any] = Registry(
    "tracker", key="name", builder_args={"folder", "settings", "step"}, makes=lambda made: hasattr(made, "log")
)


def check_options(config: Config) -> None:
    """Check the options of the config's task and of all its modules, also nested ones, without building any.

    Import what registers them first (`metamem.network`, `metamem.tasks`, the user's own).
    """

    def check(registry: Registry[Any], entry: Mapping[str, Any], where: Where) -> None:
        options = {key: value for key, value in entry.items() if key != registry.key}
        registry.check(entry[registry.key], options, where)

    def check_module(module: Mapping[str, Any], where: Where) -> None:
        check(MODULES, module, where)
        for keys, entry in MODULES.nested(module[MODULES.key], module).items():
            check_module(entry, where.at(*keys))
        if module[MODULES.key] == "network":
            check_modules(module["modules"], where / "modules")

    def check_modules(modules: Mapping[str, Mapping[str, Any]], where: Where) -> None:
        for name, module in modules.items():
            check_module(module, where / name)

    check(TASKS, config.task, config.where / "task")
    check_modules(config.network.modules, config.network.where / "modules")

"""What `metamem check` prints: the resolved network, the hierarchy and the schedule, as rich trees and tables."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from itertools import islice
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table
from rich.tree import Tree
from torch import nn

from metamem.config.plain import is_list, is_mapping
from metamem.config.schema import Config, LevelConfig, RouterConfig, RuleConfig, RunConfig, to_dict

if TYPE_CHECKING:
    from metamem.hierarchy import Calendar


def network_tree(model: nn.Module, name: str = "network") -> Tree:
    """The modules of an `nn.Module` with their parameter counts; neighbours that are alike share a line."""
    tree = Tree(_line(name, model))
    _grow(tree, model)
    return tree


def _grow(tree: Tree, module: nn.Module) -> None:
    children = list(module.named_children())
    start = 0
    while start < len(children):
        name, child = children[start]
        end = start + 1
        while end < len(children) and _shape(children[end][1]) == _shape(child):
            end += 1
        alike = end - start
        shown = name if alike == 1 else f"{name} … {children[end - 1][0]}"
        _grow(tree.add(_line(shown, child) + (f", ×{alike}" if alike > 1 else "")), child)
        start = end
    if children:  # those of a module without any are on its own line
        for name, parameter in module.named_parameters(recurse=False):
            tree.add(f"[dim]{escape(f'{name} {list(parameter.shape)}')}[/dim]")


def _line(name: str, module: nn.Module) -> str:
    count = sum(parameter.numel() for parameter in module.parameters())
    line = f"[bold]{escape(name)}[/bold]  {type(module).__name__}  {count:,}"
    if any(True for _ in module.children()):
        return line
    shapes = "  ".join(f"{key} {list(parameter.shape)}" for key, parameter in module.named_parameters(recurse=False))
    return f"{line}  [dim]{escape(shapes)}[/dim]" if shapes else line


def _shape(module: nn.Module) -> tuple[Any, ...]:
    parameters = tuple((name, tuple(parameter.shape)) for name, parameter in module.named_parameters(recurse=False))
    return type(module), parameters, tuple((name, _shape(child)) for name, child in module.named_children())


def hierarchy_table(config: RunConfig, owned: Mapping[str, list[str]], sizes: Mapping[str, int]) -> Table:
    """Level, clock, period, objective, rule, groups, and the slow weights each outer level owns.

    `owned` is what `ownership` returned, `sizes` parameter name -> number of elements.
    """
    table = Table(title="hierarchy, fast to slow", title_justify="left")
    for column in ("level", "clock", "period", "objective", "rule", "groups", "owns", "count"):
        table.add_column(column, justify="right" if column in ("period", "count") else "left", overflow="fold")
    for level in config.hierarchy.levels:
        names = owned.get(level.name)
        table.add_row(
            level.name,
            level.clock,
            str(level.period),
            "\n".join(f"{weight:g} × {path}" for path, weight in level.objective.items()),
            _rule(level),
            "\n".join(
                f"{group}: {' '.join(config.hierarchy.groups[group].match)} ({config.hierarchy.groups[group].scope})"
                for group in level.groups
            ),
            "–" if names is None else _summary(names, sizes),
            "–" if names is None else f"{sum(sizes[name] for name in names):,}",
        )
    return table


def _rule(level: LevelConfig) -> str:
    """The signal and the rate of a token level, and what of its rule is not the default; or the optimizer."""
    if level.rule is not None:
        settings, default = to_dict(level.rule), to_dict(RuleConfig())
        signal = settings.pop("signal")
        shown = {key: value for key, value in settings.items() if key == "lr" or value != default[key]}
        return "\n".join([signal, *(_setting(key, value) for key, value in shown.items())])
    settings = to_dict(level.optimizer)
    settings = {key: value for key, value in settings.items() if key == "lr" or value not in (0.0, None, {})}
    name = settings.pop("name")
    settings.pop("betas" if name == "sgd" else "momentum", None)
    if settings["lr"] != "learned":
        settings = {key: value for key, value in settings.items() if not key.startswith("lr_")}
    if level.unroll is not None:
        settings["unroll"] = level.unroll
    return "\n".join([name, *(_setting(key, value) for key, value in settings.items())])


def _setting(key: str, value: Any) -> str:
    if is_mapping(value):
        return "\n".join([key, *(f"{weight:g} × {path}" for path, weight in value.items())])
    return key if value is True else f"{key} {value}"


def _summary(names: list[str], every: Collection[str], most: int = 12) -> str:
    """The names, folded: `part.**` where the level owns all of a part, `{0,1}` for blocks that are alike."""
    own, lines = set(names), dict[str, list[str]]()
    for name in names:
        head = _head(name)
        whole = all(other in own for other in every if _head(other) == head)
        index = next((part for part in name.split(".") if part.isdecimal()), "")
        shown = f"{head}.**" if whole and head != name else name
        indices = lines.setdefault(shown.replace(f".{index}.", ".{}.", 1) if index else shown, [])
        if index not in indices:
            indices.append(index)
    folded = [
        line.replace("{}", indices[0] if len(indices) == 1 else "{" + ",".join(indices) + "}")
        for line, indices in lines.items()
    ]
    return "\n".join(folded[:most] + ([f"… {len(folded) - most} more"] if len(folded) > most else []))


def _head(name: str) -> str:
    """The part of the model that a parameter is in: `embed`, `blocks.0.memory`."""
    parts = name.split(".")
    index = next((i for i, part in enumerate(parts) if part.isdecimal()), None)
    return parts[0] if index is None else ".".join(parts[: index + 2])


def router_table(router: RouterConfig, routers: Mapping[str, Any]) -> Table:
    """A router's settings, and what it tells apart in each of the memories, by path, that have one."""
    table = Table(title="router", title_justify="left", show_header=False)
    settings = to_dict(router) | {"input": router.source, "hold": router.holds}
    for key, value in settings.items():
        if value is not None:
            table.add_row(key, " ".join(value) if is_list(value) else str(value))
    for path, one in routers.items():
        count = sum(parameter.numel() for parameter in one.parameters())
        table.add_row(path, f"groups: {one.groups}; levels: {', '.join(one.names)}; parameters: {count:,}")
    return table


def schedule_table(config: Config, calendar: Calendar) -> Table:
    """How much is trained on, and how often each level moves."""
    training = config.training
    tokens = training.batch * training.length
    table = Table(title="schedule", title_justify="left", show_header=False)
    table.add_row("outer steps", f"{training.steps:,}, the first {training.warmup:,} of them warm-up")
    table.add_row("a step", f"{training.batch} sequences of {training.length} tokens = {tokens:,} tokens")
    table.add_row("in all", f"{training.steps * tokens:,} tokens of task {config.task['name']!r}")
    for clock, steps in calendar.ends.items():
        if clock != "step":
            ended = sum(step <= training.steps for step in islice(steps, training.steps))
            table.add_row(f"{clock}s that end", f"{ended:,}" + (f", the first after step {steps[0]:,}" * (ended > 0)))
    for level in config.hierarchy.levels:
        # No inner update ends a sequence: nothing in it would see one.
        tokens = training.length - (level.clock == "inner")
        updates = len(calendar.firings(level)) if level.outer else tokens // level.period
        table.add_row(f"level {level.name}", f"{updates:,} updates {'in all' if level.outer else 'a sequence'}")
    table.add_row("checkpoint", f"every {training.checkpoint_every:,} steps")
    return table

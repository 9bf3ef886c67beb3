"""What types cannot say: names that must exist, levels in order, graphs that meet, weights that someone owns.

All of it is read from the config and, for ownership, a list of parameter names; nothing is built here.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from typing import Any

from metamem.config.check_router import check_router
from metamem.config.convert import convert
from metamem.config.errors import Where, show, suggest
from metamem.config.resolve import MEASURED, Objective, resolve_objective, statistics
from metamem.config.schema import (
    CLOCKS,
    OUTER_CLOCKS,
    AdaptConfig,
    Config,
    ConnectionConfig,
    HierarchyConfig,
    LevelConfig,
    NetworkConfig,
    RunConfig,
)
from metamem.globs import match_names, matches, nearest_names

_RUN_NAME = re.compile(r"\w[\w.-]*")
_PART_NAME = re.compile(r"[A-Za-z_]\w*")


def check_config(config: Config) -> None:
    """Raise a `ConfigError` on the first thing in the config that contradicts another."""
    check_run(config)
    check_network(config.network)
    check_hierarchy(config.hierarchy)
    check_router(config)
    if config.training.best_metric is not None and config.training.evaluate_every is None:
        raise (config.training.where / "best_metric").error("nothing is evaluated: set training.evaluate_every")


def check_run(config: RunConfig) -> None:
    """The run has a name that a folder can have, and its task one."""
    if not _RUN_NAME.fullmatch(config.name):
        allowed = "use letters, digits, '.', '_', '-'"
        raise (config.where / "name").error(f"{show(config.name)} cannot name a folder: {allowed}")
    if not isinstance(config.task.get("name"), str):
        raise config.where.at("task", "name").error("is missing: name a task, such as english")


def network_config(options: Mapping[str, Any], where: Where) -> NetworkConfig:
    """The graph in the options of a module of kind `network` (its `modules` and `connections`), checked."""
    graph = {key: value for key, value in options.items() if key in ("modules", "connections")}
    network: NetworkConfig = convert(graph, NetworkConfig, where)
    check_network(network)
    return network


def check_network(network: NetworkConfig) -> None:
    """Every module has a kind, every name that a connection uses exists, and nothing leads nowhere; also inside."""
    places = network.where / "modules"
    for name, options in network.modules.items():
        if not _PART_NAME.fullmatch(name) or name in ("in", "out"):
            raise (places / name).error(f"{name!r} cannot name a module: use letters, digits, '_', not 'in' or 'out'")
        if not isinstance(options.get("kind"), str):
            raise places.at(name, "kind").error("is missing: name a module kind, such as linear")
        if options["kind"] == "network":
            network_config(options, places / name)

    used = {source for connection in network.connections for source in connection.needs}
    targets: dict[str, Where] = {}
    for connection in network.connections:
        where = connection.where
        if connection.by == "feed" and len(connection.source) > 1:
            raise (where / "by").error("feed takes one source; say how to join them (concat, sum, gate, moe)")
        _check_mixture(connection)
        if connection.to == "in":
            raise (where / "to").error("'in' is where the graph begins; nothing can lead there")
        if connection.to in targets:
            raise (where / "to").error(f"{connection.to!r} is already fed by {targets[connection.to].key}: join them")
        targets[connection.to] = where
    known = list(dict.fromkeys(["in", *network.modules, *(name for name in targets if name != "out")]))
    for connection in network.connections:
        for source in connection.needs:
            if source not in known:
                place = connection.where / ("from" if source in connection.source else "input")
                raise place.unknown(f"there is no module or junction {source!r}", source, known)
        if connection.to not in used and connection.to not in network.modules and connection.to != "out":
            raise (connection.where / "to").unknown(
                f"{connection.to!r} is no module, and no connection leads on from it",
                connection.to,
                [*(name for name in known if name != connection.to), "out"],
            )
    for name in network.modules:
        if name not in targets or name not in used:
            missing = "to" if name not in targets else "from"
            raise (places / name).error(f"no connection leads {missing} the module {name!r}")
    if "out" not in targets:
        raise (network.where / "connections").error("no connection leads to 'out'")


def _check_mixture(connection: ConnectionConfig) -> None:
    where, count = connection.where, len(connection.source)
    if connection.by != "moe":
        for setting in ("input", "k"):
            if getattr(connection, setting) is not None:
                raise (where / setting).error(f"is for a mixture of experts: set by to moe, or {setting} to null")
    elif count < 2:
        raise (where / "from").error("moe mixes two sources or more: name another, or set by to feed")
    elif connection.k is not None and connection.k >= count:
        raise (where / "k").error(f"{connection.k} of {count} sources are all: set k to {count - 1}, or k to null")


def check_hierarchy(hierarchy: HierarchyConfig) -> None:
    """Levels in order with unique names; each has what its clock needs; no two clocks fight over a group's weights."""
    names = [level.name for level in hierarchy.levels]
    if not names:
        raise (hierarchy.where / "levels").error("there is none: nothing would learn")
    for i, level in enumerate(hierarchy.levels):
        if level.name in names[:i]:
            raise (level.where / "name").error(
                f"{level.name!r} is already the name of levels[{names.index(level.name)}]"
            )
        if not _PART_NAME.fullmatch(level.name):
            raise (level.where / "name").error(f"{level.name!r} cannot name a level: use letters, digits and '_'")
        _check_level(level, hierarchy)
        if i and level.speed < (before := hierarchy.levels[i - 1]).speed:
            raise level.where.error(
                f"{_pace(level)} is faster than {_pace(before)} of {before.name!r} before it; "
                f"list the levels fast to slow ({', '.join(CLOCKS)}, then period)"
            )
    fast: dict[str, LevelConfig] = {}
    for level in hierarchy.levels:
        for i, group in enumerate([] if level.outer else level.groups):
            # Token levels add their components in one memory; an inner level would overwrite what they wrote.
            if group in fast and "inner" in (level.clock, fast[group].clock):
                raise level.where.at("groups", i).error(
                    f"{group!r} already learns in level {fast[group].name!r} ({fast[group].clock}); "
                    "only token levels can share a group"
                )
            fast[group] = level


def _check_level(level: LevelConfig, hierarchy: HierarchyConfig) -> None:
    where = level.where
    wanted, unwanted = ("rule", "optimizer") if level.clock == "token" else ("optimizer", "rule")
    if getattr(level, unwanted) is not None:
        has = "a rule, not an optimizer" if level.clock == "token" else "an optimizer, not a rule"
        raise (where / unwanted).error(f"a level with the clock {level.clock!r} has {has}")
    if getattr(level, wanted) is None:
        raise (where / wanted).error(f"is missing: a level with the clock {level.clock!r} needs one")
    if not level.objective:
        raise (where / "objective").error("is empty: name at least one, as {losses.recall.mse: 1.0}")
    if not level.outer:
        for path in level.objective:
            if path.startswith(MEASURED):
                raise where.at("objective", path).error(
                    f"{MEASURED}… is what memories measured on the way, which only an outer level can add to its loss; "
                    f"a level with the clock {level.clock!r} learns from a loss per token, such as losses.recall.mse"
                )
    if not level.groups:
        raise (where / "groups").error(f"is empty: name at least one{suggest('', hierarchy.groups)}")
    for i, group in enumerate(level.groups):
        if group not in hierarchy.groups:
            raise where.at("groups", i).unknown(f"there is no group {group!r}", group, hierarchy.groups)
        if group in level.groups[:i]:
            raise where.at("groups", i).error(f"{group!r} is listed twice")
        if level.clock == "token" and hierarchy.groups[group].scope == "meta":
            raise where.at("groups", i).error(
                f"a token level changes fast weights, but the group {group!r} has the scope 'meta' (sample, stream)"
            )
    if level.outer and level.unroll is not None:
        raise (where / "unroll").error("is for inner levels: no gradient flows through outer steps")
    if level.clock == "token" and level.unroll is not None:
        raise (where / "unroll").error(
            "is for inner levels: a memory's gradient is cut in all its levels at once, every training.unroll tokens"
        )
    if level.unseen and level.optimizer is not None and level.optimizer.lr == "learned":
        # The cut comes right after the update: with unroll 1 no loss sees the rate of any.
        raise where.at("optimizer", "lr").error(
            f"nothing learns this rate: with unroll {level.unroll} no outer gradient reaches it"
        )
    if (optimizer := level.optimizer) is not None:
        if level.outer and optimizer.lr == "learned":
            raise where.at("optimizer", "lr").error("an outer level's rate must be a number: no level learns it")
        for key in ("lr_per", "lr_sign", "lr_initial"):
            if optimizer.lr != "learned" and getattr(optimizer, key) != getattr(type(optimizer), key):
                raise where.at("optimizer", key).error("is of a learned rate, and lr is a number: set lr to learned")
        if level.outer and optimizer.decay_to != "zero":
            raise where.at("optimizer", "decay_to").error("is of inner levels: an outer level has no slower weights")
        if optimizer.decay_to != "zero" and not optimizer.weight_decay:
            raise where.at("optimizer", "decay_to").error("is of weight_decay, which is 0: set it, or leave this out")
        if optimizer.name != "sgd" and optimizer.momentum:
            raise where.at("optimizer", "momentum").error(f"is sgd's; {optimizer.name} has betas")
        if optimizer.name == "sgd" and optimizer.betas != type(optimizer).betas:
            raise where.at("optimizer", "betas").error("are those of adam and adamw; sgd has momentum")


def _pace(level: LevelConfig) -> str:
    return f"{level.clock}/{level.period}"


def resolve_objectives(config: RunConfig | AdaptConfig) -> dict[str, dict[Objective, float]]:
    """Level -> objective function, of predictions and targets -> weight; a `ConfigError` for a path that names no
    function, and for an objective of routers in a level that is inside the forward pass."""
    found: dict[str, dict[Objective, float]] = {}
    for level in config.hierarchy.levels:
        objectives = {path: _resolved(level, path) for path in level.objective if not path.startswith(MEASURED)}
        for path, objective in objectives.items():
            if not level.outer and (asked := statistics(objective)):
                raise level.where.at("objective", path).error(
                    f"{path} is of routers ({', '.join(asked)}), which only an outer level can add to its loss; "
                    f"a level with the clock {level.clock!r} learns from a loss per token, such as losses.recall.mse"
                )
        found[level.name] = {
            objective: level.objective[path] for path, objective in objectives.items() if not statistics(objective)
        }
    return found


def measured_objectives(config: RunConfig) -> dict[str, dict[str | Objective, float]]:
    """Outer level -> what it adds of what was measured on the way -> weight: a glob over the names (`aux.<glob>`), or a
    function of what routers measure."""
    found: dict[str, dict[str | Objective, float]] = {}
    for level in config.hierarchy.levels:
        if level.outer:
            own = found[level.name] = {}
            for path, weight in level.objective.items():
                if path.startswith(MEASURED):
                    own[path.removeprefix(MEASURED)] = weight
                elif statistics(objective := _resolved(level, path)):
                    own[objective] = weight
    return found


def _resolved(level: LevelConfig, path: str) -> Objective:
    return resolve_objective(path, level.where.at("objective", path))


def check_measured(config: Config, names: Iterable[str]) -> None:
    """Raises `ConfigError` for an objective `aux.<glob>` that matches none of `names`, those of what is measured, and
    for one of routers where none learns."""
    names = list(names)
    for level in config.hierarchy.levels:
        for glob in measured_objectives(config).get(level.name, {}):
            if isinstance(glob, str) and not match_names([glob], names):
                near = ", ".join(MEASURED + name for name in nearest_names(glob, names))
                raise level.where.at("objective", MEASURED + glob).error(
                    f"{glob!r} matches nothing that the network measures; "
                    + (f"the nearest are {near}" if near else "it has no memory that measures anything")
                )
        for path in level.objective:
            if level.outer and not path.startswith(MEASURED):
                _check_routers(level, path, statistics(_resolved(level, path)), names)


def _check_routers(level: LevelConfig, path: str, asked: list[str], names: list[str]) -> None:
    prefixes = [name.removesuffix("logits") for name in names if name.endswith("router.logits")]
    if not asked or any(all(prefix + name in names for name in asked) for prefix in prefixes):
        return
    problem = f"there is no router whose {' and '.join(asked)} it could be of; set hierarchy.router to {{kind: static}}"
    if not prefixes and any(name.endswith("router.gates") for name in names):
        problem = "a fixed router learns nothing from it; set hierarchy.router.kind to 'static'"
        problem += " and hierarchy.router.table to null"
    raise level.where.at("objective", path).error(problem)


def group_members(parameter_names: Iterable[str], hierarchy: HierarchyConfig) -> dict[str, list[str]]:
    """Group -> the parameters that it matches; a `ConfigError` for a glob that matches none."""
    names = list(parameter_names)
    for group in hierarchy.groups.values():
        for pattern in group.match:
            if not match_names([pattern], names):
                raise (group.where / "match").error(
                    f"{pattern!r} matches no parameter; the nearest are {', '.join(nearest_names(pattern, names))}"
                )
    return {key: match_names(group.match, names) for key, group in hierarchy.groups.items()}


def ownership(parameter_names: Iterable[str], hierarchy: HierarchyConfig) -> dict[str, list[str]]:
    """Outer level -> the slow weights that are its own, in the model's order.

    Each belongs to exactly one: the slowest level with a group that matches it (by clock, then period; of equal ones
    the later in the list). Raises `ConfigError` for a weight that none matches, a glob that matches nothing, and an
    outer level for which no weight is left.
    """
    names = list(parameter_names)
    group_members(names, hierarchy)
    levels = [level for level in hierarchy.levels if level.outer]
    if not levels:
        raise (hierarchy.where / "levels").error(
            f"no level has an outer clock ({', '.join(OUTER_CLOCKS)}): nothing would train the slow weights"
        )
    owned: dict[str, list[str]] = {level.name: [] for level in levels}
    for name in names:
        matching = [i for i, level in enumerate(levels) if _matches(level, name, hierarchy)]
        if not matching:
            raise (hierarchy.where / "levels").error(
                f"the parameter {name!r} belongs to no outer level; nearest group: {_nearest_group(name, hierarchy)}"
            )
        owned[levels[max(matching, key=lambda i: (levels[i].speed, i))].name].append(name)
    for level in levels:
        if not owned[level.name]:
            slower = sorted({key for key, own in owned.items() if own})
            raise (level.where / "groups").error(
                f"no parameter is left to level {level.name!r}: all that it matches belong to slower ones "
                f"({', '.join(slower)})"
            )
    return owned


def _matches(level: LevelConfig, name: str, hierarchy: HierarchyConfig) -> bool:
    return any(matches(pattern, name) for group in level.groups for pattern in hierarchy.groups[group].match)


def _nearest_group(name: str, hierarchy: HierarchyConfig) -> str:
    patterns = [(pattern, key) for key, group in hierarchy.groups.items() for pattern in group.match]
    pattern, key = max(patterns, key=lambda item: difflib.SequenceMatcher(None, item[0], name).ratio())
    return f"{key!r} ({pattern})"

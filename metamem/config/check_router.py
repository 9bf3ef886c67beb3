"""What the settings of a router exclude: by themselves (`check_settings`), and beside the hierarchy's levels
(`check_router`)."""

from __future__ import annotations

from metamem.config.schema import Config, RouterConfig


def check_settings(router: RouterConfig) -> None:
    """Raises ConfigError for a setting that the router's kind, or its granularity, leaves without effect."""
    gating, where = router.gating, router.where
    if router.granularity == "block" and router.blocks is None:
        raise (where / "blocks").error(
            "is missing, the number of blocks of a layer's columns; set blocks to 2, or granularity to 'layer'"
        )
    if router.granularity != "block" and router.blocks is not None:
        raise (where / "blocks").error(
            f"cuts each layer's columns, and granularity {router.granularity!r} tells no columns apart; "
            f"set granularity to 'block', or blocks to null"
        )
    if gating == "fixed" and not router.table:
        raise (where / "table").error(
            "is missing, the gate of each level that is open, such as {surprise: 1}; set kind to 'static'"
        )
    for setting, value, kinds in (
        ("table", router.table, ("fixed",)),
        ("k", router.k, ("topk",)),
        ("hold", router.hold, ("dense", "topk")),
    ):
        if value is not None and gating not in kinds:
            raise (where / setting).error(
                f"is for kind {' and '.join(kinds)}, and kind is {router.kind!r}; "
                f"set {setting} to null, or kind to '{kinds[-1]}'"
            )
    if router.input not in (None, "static") and router.source == "static":
        raise (where / "input").error(
            f"a {router.kind} router has no input; set input to null, or kind to 'dense'"
            + (" and table to null" if router.kind == "fixed" else "")
        )


def check_router(config: Config) -> None:
    """Raises ConfigError for groups that do not exist or that no token level moves, and updates that no loss sees."""
    router = config.hierarchy.router
    if router is not None:
        check_settings(router)
        _check_groups(config, router)
        if router.gating == "fixed":
            _check_nothing_learns(config)
        else:
            _check_seen(config, router)


def _check_groups(config: Config, router: RouterConfig) -> None:
    groups, levels = config.hierarchy.groups, [level for level in config.hierarchy.levels if level.clock == "token"]
    fast = list(dict.fromkeys(group for level in levels for group in level.groups))
    for i, group in enumerate(router.over or []):
        if group not in groups:
            raise router.where.at("over", i).unknown(f"there is no group {group!r}", group, groups)
        if group not in fast:
            raise router.where.at("over", i).unknown(
                f"no token level moves the group {group!r}, and a router gates what they write", group, fast
            )
    names = [level.name for level in levels]
    for name in router.table or {}:
        if name not in names:
            raise (router.where / "table" / name).unknown(f"there is no token level {name!r}", name, names)
    if not fast:
        raise router.where.error("there is no token level, whose writes it could gate; set hierarchy.router to null")


def _check_nothing_learns(config: Config) -> None:
    """A table has no parameters that a group could match."""
    hierarchy = config.hierarchy
    for name in (name for level in hierarchy.levels if level.outer for name in level.groups):
        for pattern in hierarchy.groups[name].match:
            if "router" in pattern.split("."):
                raise (hierarchy.groups[name].where / "match").error(
                    f"{pattern!r} names the parameters of routers, and a fixed one has none to learn; "
                    f"set hierarchy.router.kind to 'static' and hierarchy.router.table to null"
                )


def _check_seen(config: Config, router: RouterConfig) -> None:
    """A level whose updates no loss sees, with a gradient through them, teaches its gates nothing: it first moves after
    the last token of a training sequence, or only where the outer gradient is cut."""
    length, unroll = config.training.length, config.training.unroll
    for level in config.hierarchy.levels:
        if level.clock != "token" or not set(level.groups) & set(router.over or level.groups):
            continue
        place, period = level.where / "period", level.period
        if period == length:
            raise place.error(
                f"level {level.name!r} moves after the last token of a training sequence of {length}, where no loss "
                f"sees it, and its gates would learn nothing; set period to {max(1, period // 2)}, or "
                f"training.length to {2 * period}"
            )
        if unroll is not None and period > 1 and period % unroll == 0:
            raise place.error(
                f"level {level.name!r} moves every {period} tokens, only where the outer gradient is cut, every "
                f"{unroll}, and its gates would learn nothing; set training.unroll to {2 * period}, or to null"
            )

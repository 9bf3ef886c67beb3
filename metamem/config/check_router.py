"""What the settings of a router exclude: by themselves (`check_settings`), and beside the hierarchy's levels
(`check_router`)."""

from __future__ import annotations

from metamem.config.schema import Config, RouterConfig


def check_settings(router: RouterConfig) -> None:
    """Raises ConfigError for a setting that the router's kind, or its granularity, leaves without effect."""
    gating, where = router.gating, router.where
    if router.granularity == "block" and router.blocks is None:
        raise (where / "blocks").error("is missing: give the number of blocks, or set granularity to 'layer'")
    if router.granularity != "block" and router.blocks is not None:
        raise (where / "blocks").error(
            f"cuts each layer's columns, and granularity {router.granularity!r} tells no columns apart: "
            f"set granularity to 'block', or blocks to null"
        )
    if gating == "fixed" and not router.table:
        raise (where / "table").error("is missing: give a gate for each level that is open, such as {surprise: 1}")
    for setting, value, kinds in (
        ("table", router.table, ("fixed",)),
        ("k", router.k, ("topk",)),
        ("hold", router.hold, ("dense", "topk")),
    ):
        if value is not None and gating not in kinds:
            reason = "; a closed gate holds already" if setting == "hold" else ""
            raise (where / setting).error(
                f"is for kind {' and '.join(kinds)}, and kind is {router.kind!r}{reason}: "
                f"set {setting} to null, or kind to {kinds[-1]}"
            )
    if router.input not in (None, "static") and router.source == "static":
        raise (where / "input").error(
            f"a {router.kind} router has no input: set input to null, or kind to "
            + ("dense" if router.kind == "static" else "static")
        )


def check_router(config: Config) -> None:
    """Raises ConfigError for groups that do not exist or that no token level moves, and updates that no loss sees."""
    router = config.hierarchy.router
    if router is not None:
        check_settings(router)
        _check_groups(config, router)
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
    if not fast:
        raise router.where.error("there is no token level, whose writes it could gate: set router to null")


def _check_seen(config: Config, router: RouterConfig) -> None:
    """A level that first moves after the last read of a training sequence teaches its gates nothing."""
    if router.gating == "fixed":
        return
    length = config.training.length
    for level in config.hierarchy.levels:
        if level.clock == "token" and level.period == length and set(level.groups) & set(router.over or level.groups):
            raise (level.where / "period").error(
                f"level {level.name!r} moves after the last token of a training sequence of {length}, where no loss "
                f"sees it, and its gates would learn nothing: set period to {max(1, length // 2)}, or training.length "
                f"to {2 * length}"
            )

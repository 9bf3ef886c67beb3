"""Token levels: those that live inside the memories, from a config."""

from __future__ import annotations

from metamem.config import Config, LevelConfig, RuleConfig, resolve_objective, resolve_objectives
from metamem.config.convert import schema_fields
from metamem.memory.level import TokenLevel


def token_levels(config: Config) -> list[tuple[LevelConfig, TokenLevel]]:
    """The token levels of a config, fast to slow, with their objectives resolved."""
    objectives, found = resolve_objectives(config), []
    for level in config.hierarchy.levels:
        if level.clock == "token" and (rule := level.rule) is not None:
            settings = {item.name: getattr(rule, item.name) for item in schema_fields(RuleConfig)}
            if "." in rule.signal:
                settings["signal"] = resolve_objective(rule.signal, level.where.at("rule", "signal"))
            settings["retention"] = {
                resolve_objective(path, level.where.at("rule", "retention", path)): weight
                for path, weight in rule.retention.items()
            }
            try:
                runtime = TokenLevel(level.name, objectives[level.name], level.period, **settings)
            except ValueError as error:
                raise (level.where / "rule").error(str(error)) from error
            found.append((level, runtime))
    return found

"""Configs: `load_config(path, overrides) -> Config`, checked, with file and line in every error."""

from metamem.config.check import (
    check_measured,
    group_members,
    measured_objectives,
    network_config,
    ownership,
    resolve_objectives,
)
from metamem.config.errors import ConfigError, UserError, Where
from metamem.config.load import has_key, load_as, load_config, to_yaml
from metamem.config.resolve import objective_gradient, resolve_objective
from metamem.config.schema import (
    Config,
    ConnectionConfig,
    GroupConfig,
    HierarchyConfig,
    LevelConfig,
    NetworkConfig,
    OptimizerConfig,
    RouterConfig,
    RuleConfig,
    RunConfig,
    TrainingConfig,
    to_dict,
)

__all__ = [
    "load_config",
    "load_as",
    "has_key",
    "to_yaml",
    "to_dict",
    "Config",
    "NetworkConfig",
    "ConnectionConfig",
    "HierarchyConfig",
    "GroupConfig",
    "LevelConfig",
    "RuleConfig",
    "RunConfig",
    "RouterConfig",
    "OptimizerConfig",
    "TrainingConfig",
    "network_config",
    "resolve_objectives",
    "resolve_objective",
    "measured_objectives",
    "check_measured",
    "objective_gradient",
    "group_members",
    "ownership",
    "ConfigError",
    "UserError",
    "Where",
]

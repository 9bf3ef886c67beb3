"""The config of a meta-training over tasks as a JSON Schema, for editors."""

from __future__ import annotations

from typing import Any

import metamem.episodes.modules
import metamem.episodes.tasks  # noqa: F401  (fills the registries)
from metamem.config.json_schema import schema_of
from metamem.episodes.registry import EPISODE_MODULES, EPISODES
from metamem.episodes.schema import EpisodesConfig


def episodes_schema() -> dict[str, Any]:
    """The schema, with the options of every registered task and module; a module may be a path of the user's own."""
    registries = {"task": EPISODES, "module": EPISODE_MODULES}
    return schema_of(EpisodesConfig, "metamem meta-training over tasks", registries)

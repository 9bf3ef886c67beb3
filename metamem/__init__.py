"""metamem: memories that learn while they run. Declare what learns, from which loss, how fast.

    config = load_config("configs/quickstart.yaml")
    trained = train(config)                          # meta-training; leaves a run folder
    session = Session(trained.model, config)         # test-time adaptation
    losses = session.observe(tokens).losses

A state is a nested dict of tensors, batch first, which goes in and comes out.
"""

from metamem.adaptation import Observed, Session
from metamem.config import Config, ConfigError, RouterConfig, UserError, load_config
from metamem.controllers.base import Controller
from metamem.hierarchy import InnerLoop, OuterLevels, inner_levels, token_levels
from metamem.memory.base import Memory, Out
from metamem.memory.cell import MemoryCell
from metamem.memory.fast_weights import FastWeights
from metamem.memory.gated_residual import GatedResidual
from metamem.memory.level import TokenLevel
from metamem.network import Network, build
from metamem.registry import MODULES, TASKS
from metamem.routing import Router
from metamem.state import State, Stateful, load_state, save_state
from metamem.training import build_task, load_run, train

__version__ = "0.1.0"

__all__ = [
    # memories
    "Controller",
    "FastWeights",
    "GatedResidual",
    "Memory",
    "MemoryCell",
    "Out",
    "Router",
    "RouterConfig",
    "State",
    "Stateful",
    "TokenLevel",
    "load_state",
    "save_state",
    # configs and networks
    "MODULES",
    "TASKS",
    "Config",
    "ConfigError",
    "Network",
    "UserError",
    "build",
    "load_config",
    # learning
    "InnerLoop",
    "Observed",
    "OuterLevels",
    "Session",
    "build_task",
    "inner_levels",
    "load_run",
    "token_levels",
    "train",
]

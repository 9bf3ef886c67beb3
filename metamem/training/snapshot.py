"""A training while it runs: what changes from step to step, and how it goes to a checkpoint and comes back."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch
from torch import nn

from metamem.collectives import World
from metamem.config import RunConfig, to_dict
from metamem.hierarchy import OuterLevels
from metamem.state import State, StateError
from metamem.training.checkpoint import CheckpointError, Resumable, check_weights_of, fingerprint
from metamem.training.distributed import part_ways
from metamem.training.provenance import data_digest, made_with
from metamem.training.random_states import random_states, set_random_states

C = TypeVar("C", bound=RunConfig)
M = TypeVar("M", bound=nn.Module)


@dataclass
class Reached:
    """How far a training is: its last completed step, the seconds to it, the best evaluation so far (0: none yet) and
    how many since were no better, steps that were skipped, in a row and in all, and what was measured after which."""

    step: int = 0
    seconds: float = 0.0
    best: int = 0
    best_value: float = 0.0
    waited: int = 0
    in_a_row: int = 0
    skipped: int = 0
    evaluations: dict[int, dict[str, float]] = field(default_factory=dict)

    def evaluated(self, value: float, highest: bool = False) -> bool:
        """Takes note of an evaluation after the step; whether it is the best one so far."""
        better = not self.best or (value > self.best_value if highest else value < self.best_value)
        if better:
            self.best, self.best_value, self.waited = self.step, value, 0
        else:
            self.waited += 1
        return better

    def skipped_over(self, values: Iterable[float], most: int) -> bool:
        """Takes note of a step with such losses and gradients, which is skipped where one is not finite; whether the
        training goes on, as it does unless more than `most` of them are in a row."""
        skipped = not all(map(math.isfinite, values))
        self.in_a_row = self.in_a_row + 1 if skipped else 0
        self.skipped += skipped
        return self.in_a_row <= most


@dataclass(frozen=True)
class Training(Generic[C, M]):
    """A model, its outer levels, its task and the generator of its batches, and how far it is."""

    config: C
    model: M
    outer: OuterLevels
    task: Any
    generator: torch.Generator
    reached: Reached = field(default_factory=Reached)
    data: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "data", data_digest(self.task))  # as it is before it is drawn from

    @property
    def world(self) -> World:
        """The processes that train the model."""
        return self.outer.replicas.world

    def state(self) -> State:
        """All tensors that going on exactly needs; every process calls it, and random states are this one's."""
        return {
            "model": self.outer.replicas.weights(),
            "outer": self.outer.state(),
            "batches": self.generator.get_state(),
            "random": random_states(),
        }

    def about(self) -> dict[str, Any]:
        """All else that it needs, or that tells what has changed since, as JSON. A task that reads its data in order
        says where it stands by `state_dict()`, and goes on from there by `load_state_dict`."""
        return {
            "fingerprint": fingerprint(self.config),
            "config": to_dict(self.config),
            "made_with": self.made_with(),
            "reached": dataclasses.asdict(self.reached),
            "task": self.task.state_dict() if hasattr(self.task, "state_dict") else None,
        }

    def made_with(self) -> dict[str, str]:
        """What decides its numbers beside the config."""
        return made_with(self.world.size) | {"data": self.data}

    def load(self, checkpoint: Resumable) -> None:
        """Goes on from a checkpoint. Raises CheckpointError for one of another model or of other levels."""
        state, about = checkpoint.state, checkpoint.about
        try:
            check_weights_of(self.model, self.config, state["model"], about["fingerprint"], checkpoint.path)
            self.outer.replicas.load(state["model"])
            self.outer.load_state(state["outer"])
            if about["task"] is not None:
                self.task.load_state_dict(about["task"])
            for name, value in about["reached"].items():
                if name == "evaluations":  # filled in place: who adds to them holds them already
                    self.reached.evaluations.update({int(step): found for step, found in value.items()})
                else:
                    setattr(self.reached, name, value)
            self.generator.set_state(state["batches"])
            set_random_states(state["random"])  # last: nothing draws any more before the next step does
            part_ways(self.config.seed, self.world, self.reached.step)
        except StateError as error:
            raise CheckpointError(f"{checkpoint.path}: {error}") from None

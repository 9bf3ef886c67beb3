"""Step rules of a linear memory with a squared error `s ½ ‖in W − v‖²`: how far a write of rate η goes.

    explicit      η                       the gradient step at the weights before it
    implicit      η / (1 + η s ‖in‖²)     the proximal step, argmin_W ½ ‖W − W_before‖² + η s ½ ‖in W − v‖², stable at
                                          any rate (Kulis and Bartlett 2010; Longhorn, Liu et al. 2024, 2407.14207)
    normalized    η / (ε + s ‖in‖²)       normalised LMS: at η = 1 the write is recalled exactly

Every write is taken for itself: the steps of writes that happen at once, and of levels side by side, add up.
"""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

from metamem.memory.level import StepRule, TokenLevel
from metamem.memory.networks import MemoryNetwork, Network
from metamem.memory.signals import name_of, squared_error
from metamem.memory.writer import Writes

EPSILON = 1e-6  # an input of zeros is written nowhere, and divides by nothing


def stepped(levels: Sequence[TokenLevel], network: MemoryNetwork, writes: Writes) -> Writes:
    """The writes with each level's rates as its step rule has them."""
    if all(level.step_rule == "explicit" for level in levels):
        return writes
    assert isinstance(network, Network)
    length = network.given(writes.keys).square().sum(-1)
    gates = dict(writes.gates)
    for level in levels:
        scale = 1.0 if level.signal == "predicted_targets" else sum(level.objectives.values())
        rate = step_size(level.step_rule, gates[level.name].lr, scale * length)
        gates[level.name] = gates[level.name]._replace(lr=rate)
    return writes._replace(gates=gates)


def step_size(
    rule: StepRule, lr: Float[Tensor, "*writes"], curvature: Float[Tensor, "*writes"]
) -> Float[Tensor, "*writes"]:
    """η as the rule has it; the curvature of the loss along its gradient is s ‖in‖²."""
    if rule == "implicit":
        return lr / (1 + lr * curvature)
    return lr / (EPSILON + curvature) if rule == "normalized" else lr


def check(level: TokenLevel, to_linear: str) -> None:
    """Raises ValueError where the closed form of a step rule is none: `to_linear`, what to set so that the memory is
    linear, is empty where it is."""
    if level.step_rule == "explicit":
        return
    problem, instead = "", "set step_rule to 'explicit'"
    if to_linear:
        problem, instead = "for linear memories", f"{instead}, or {to_linear}"
    elif level.signal not in ("backprop", "predicted_targets"):
        problem = f"for squared errors, and a {name_of(level.signal)} signal is none"
        instead += ", or signal to 'backprop' and objective to {losses.recall.mse: 1.0}"
    elif level.signal == "backprop" and squared_error(level.objectives) is None:
        problem = "for squared errors"
        instead += ", or objective to {losses.recall.mse: 1.0}"
    if problem:
        raise ValueError(f"level {level.name!r}: the closed form of {level.step_rule} steps is {problem}; {instead}")

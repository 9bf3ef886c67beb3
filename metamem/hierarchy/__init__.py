"""The hierarchy of losses: which weights learn, from which loss, on which clock.

- `token`       levels live inside the memories (`token_levels` makes them from a config)
- `inner`       levels move parameters inside the forward pass: every `period` tokens a differentiable optimizer step on
                that piece's loss (`InnerLoop`); the outer gradient flows through, for `unroll` updates
- `outer`       levels, on steps, epochs or tasks, move the slow weights that they own (`OuterLevels`), each by the mean
                gradient of its own objective over its period
- `calendar`    after which outer steps an epoch or a task ends
- `rates`       the learned rates of inner levels; `recompute`: a graph that is made anew instead of kept
- `objectives`  what a level learns from: the loss of every token, and what memories measured on the way
"""

from metamem.hierarchy.calendar import Calendar, calendar_of
from metamem.hierarchy.inner import (
    Carried,
    Gradients,
    InnerLevel,
    InnerLoop,
    InnerState,
    Parameters,
    inner_levels,
    inner_loop,
    leaf_state,
    learned_rates,
)
from metamem.hierarchy.objectives import loss_per_token, measured_loss
from metamem.hierarchy.outer import OuterLevels
from metamem.hierarchy.token import token_levels

__all__ = [
    "Calendar",
    "Carried",
    "Gradients",
    "InnerLevel",
    "InnerLoop",
    "InnerState",
    "OuterLevels",
    "Parameters",
    "calendar_of",
    "inner_levels",
    "inner_loop",
    "leaf_state",
    "learned_rates",
    "loss_per_token",
    "measured_loss",
    "token_levels",
]

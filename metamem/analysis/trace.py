"""What a memory's levels do along a sequence: ‖Δ‖, how far it moves, and what a router lets through.

Keys of the curves: `delta/<memory>/<level>`, `update/<memory>/<level>`, `gates/<memory>/<level>`; x is the token,
y what holds over the piece that ends there, of gates for each parameter group.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from metamem.state import State, Stateful, leaves, tree_map

_GATES = re.compile(r"(?P<of>.+?)(?:\.router)?\.gates\.(?P<level>.+)")  # what a router measures of each level


@torch.no_grad()
def trace_levels(model: Stateful, x: Shaped[Tensor, "batch time *dims"], points: int = 48) -> dict[str, dict]:
    """Reads x in at most `points` pieces; norms are over all weights of a level, means over the batch."""
    length = -(-x.shape[1] // points)
    state, curves = model.init_state(x.shape[0]), {}
    before = dict(level_states(state))
    for start in range(0, x.shape[1], length):
        _, state, aux = model(x[:, start : start + length], state)
        end = min(start + length, x.shape[1])
        now = dict(level_states(state))
        for name, level in now.items():
            move = tree_map(torch.sub, level["delta"], before[name]["delta"])
            _extend(curves, f"delta/{name}", end, float(level_norm(level["delta"]).mean()))
            _extend(curves, f"update/{name}", end, float(level_norm(move).mean()))
        for name, gates in aux.items():
            if found := _GATES.fullmatch(name):
                groups = gates.double().mean((0, 1)).reshape(-1)
                _extend(curves, f"gates/{found['of']}/{found['level']}", end, groups.tolist())
        before = now
    return curves


def level_states(state: State, path: str = "") -> Iterator[tuple[str, State]]:
    """(`<memory>/<level>`, state) of every level of every fast-weight memory within a state."""
    for key, part in state.items():
        if key == "levels" and isinstance(part, dict):
            yield from ((f"{path.removesuffix('.')}/{level}", one) for level, one in part.items() if "delta" in one)
        elif isinstance(part, dict):
            yield from level_states(part, f"{path}{key}.")


def level_norm(weights: State) -> Float[Tensor, "batch"]:
    """The norm over all weights but the batch."""
    return torch.stack([weight.double().square().flatten(1).sum(1) for weight in leaves(weights)]).sum(0).sqrt()


def _extend(curves: dict[str, dict], name: str, x: float, y: object) -> None:
    curve = curves.setdefault(name, {"x": [], "y": []})
    curve["x"].append(x)
    curve["y"].append(y)

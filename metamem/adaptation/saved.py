"""A session as a file: its tensors as a state, what its guards know as JSON in the metadata, and whose it is.

It goes on bit for bit. What it is checked against, in this order: the file's own checksum; the names and shapes of this
session's state; the fingerprint of this session's model, so that a state of another training is refused.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import optree
import torch
from torch import Tensor

from metamem.adaptation.fallback import Standing
from metamem.adaptation.guards import Period, Running, Watchdog
from metamem.hierarchy import InnerState, Parameters
from metamem.state import State, StateError, check_like, fingerprint, load_state, save_state

if TYPE_CHECKING:
    from metamem.adaptation.session import Session


def save_session(session: Session, path: Path) -> None:
    """Writes the session, whole or not at all."""
    known = {
        "updates": session.updates,
        "refused": session.refused,
        "home_service": session.home_service,
        "standing": asdict(session.standing),
        "watchdog": asdict(session.watchdog),
        "periods": {name: asdict(period) for name, period in session.periods.items()},
    }
    metadata = {"kind": "session", "position": str(session.position), "model": fingerprint(session.model)}
    save_state(carried(session), path, {**metadata, "known": json.dumps(known)})


def load_session(session: Session, path: Path) -> None:
    """The session goes on where the saved one stopped. Raises StateError, and changes nothing, if it cannot."""
    state, metadata = load_state(path, session.device)
    fresh = carried(session) | {"state": session.model.init_state(session.batch), "last": {}}
    if "shadow" in fresh:
        fresh["shadow"] = fresh["state"]
    check_like({**state, "last": {}}, fresh, str(path))
    if metadata.get("model") != fingerprint(session.model):
        raise StateError(f"{path}: it is of another model: one of these shapes, with other weights")
    known = json.loads(metadata["known"])
    standing, periods = known["standing"], known["periods"]
    running = {key: Running(**standing[key]) for key in ("loss", "square")}
    session.position, session.updates = int(metadata["position"]), known["updates"]
    session.refused, session.home_service = Counter(known["refused"]), known["home_service"]
    session.watchdog = Watchdog(**known["watchdog"])
    session.standing = Standing(**{**standing, **running, "worth": tuple(standing["worth"])})
    session.periods = {key: Period(**{**p, "estimate": Running(**p["estimate"])}) for key, p in periods.items()}
    session.state, session.last = state["state"], state["last"].get("token")
    session.shadow = None if session.standing.mode == "asleep" else state["shadow"]
    for name, level in state["levels"].items():
        treespec = optree.tree_structure(session.inner[name].optimizer)
        optimizer = optree.tree_unflatten(treespec, list(level["optimizer"].values()))
        session.inner[name] = InnerState(_leaves(level["fast"]), optimizer, int(level["updates"]))
        session.gradients[name] = list(level["gradients"].values())
        session.home[name] = _leaves(level["home"])


def carried(session: Session) -> State:
    """All tensors that a session carries: the same ones in number and size from its first token to its last, but for
    caches that grow."""
    levels: State = {}
    for name, state in session.inner.items():
        levels[name] = {
            "fast": _detached(state.fast),
            "optimizer": _numbered(optree.tree_leaves(state.optimizer)),
            "gradients": _numbered(session.gradients[name]),
            "updates": torch.tensor(state.updates),
            "home": _detached(session.home[name]),
        }
    found: State = {"state": session.state, "levels": levels}
    found["last"] = {} if session.last is None else {"token": session.last}
    if levels:
        found["shadow"] = session.state if session.shadow is None else session.shadow
    return found


def _detached(tensors: Parameters) -> Parameters:
    return {name: value.detach() for name, value in tensors.items()}


def _leaves(tensors: Parameters) -> Parameters:
    return {name: value.requires_grad_() for name, value in tensors.items()}


def _numbered(tensors: Sequence[Tensor]) -> dict[str, Tensor]:
    return {str(index): torch.as_tensor(tensor) for index, tensor in enumerate(tensors)}

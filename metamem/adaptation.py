"""Test-time adaptation: a session reads a stream and goes on learning from it.

    session = Session(model, config)
    observed = session.observe(tokens)        # the loss of every token given all before it; then it may learn

What learns is what the levels say: token levels write the memories, inner levels move the parameters that they name
by the loss of the stream itself, every `period` tokens. Every token is predicted before anything learns from it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import optree
import torch
from jaxtyping import Float, Int
from torch import Tensor

from metamem.config import Config, UserError, resolve_objectives
from metamem.hierarchy import Carried, InnerLevel, InnerLoop, InnerState, inner_levels, leaf_state, loss_per_token
from metamem.memory.base import writing
from metamem.network import Network
from metamem.state import State, check_like, load_state, save_state, state_bytes, tree_map


@dataclass(frozen=True)
class Observed:
    """What a session saw: the loss of each token in nats, and the inner updates that were made on the way."""

    losses: Float[Tensor, "batch tokens"]
    updates: int

    @property
    def bits_per_token(self) -> float:
        """The mean loss in bits."""
        return float(self.losses.mean()) / math.log(2)


class Session:
    """A model on a stream.

    - `config`        its inner levels say which parameters move, its first outer level with a loss per token that loss
    - `inner`         whether inner levels move parameters
    - `writing`       whether memories write; switched off, they recall their initial weights for ever
    - `reset_every`   tokens after which the model's state starts anew (the token before is still its input); None never
    - `batch`         streams read side by side; inner levels move one set of parameters by the mean of all

    The first token of a stream has no context: it costs log(vocabulary).
    """

    def __init__(
        self,
        model: Network,
        config: Config,
        *,
        inner: bool = True,
        writing: bool = True,
        reset_every: int | None = None,
        batch: int = 1,
    ) -> None:
        if model.dim_in is not None:
            raise UserError(f"a session reads tokens, and this model {model.dim_in} numbers at a time; call the model")
        self.model, self.writing, self.reset_every, self.batch = model, writing, reset_every, batch
        objectives = resolve_objectives(config)
        outer = [objectives[level.name] for level in config.hierarchy.levels if level.outer]
        if not any(outer):
            raise (config.hierarchy.where / "levels").error("no outer level has an objective that is a loss per token")
        self.objectives = next(filter(None, outer))
        self.loop = InnerLoop(model, inner_levels(config, model) if inner else [])
        self.reset()

    def reset(self) -> None:
        """Back to the model as trained, at the start of a stream."""
        self.position = 0
        self.last: Tensor | None = None
        self.state = self.model.init_state(self.batch)
        self.inner = {name: leaf_state(state) for name, state in self.loop.init().items()}
        self.gradients = {level.name: self._no_gradient(level) for level in self.loop.levels}

    def observe(self, tokens: Int[Tensor, "batch tokens"]) -> Observed:
        """Reads tokens: their losses, each given all before it, and the updates that their levels made.

        Gradients are cut at the ends of calls: to get the same numbers from any split, feed multiples of the period.
        Raises UserError where a loss is not finite; the session is then as it was before the piece.
        """
        losses, updates, start = [torch.empty(tokens.shape[0], 0)], 0, 0
        while start < tokens.shape[1]:
            piece = tokens[:, start : start + self._room()]
            losses.append(self._observe_piece(piece))
            updates += self._learn()
            start += piece.shape[1]
        return Observed(torch.cat(losses, 1), updates)

    @property
    def state_bytes(self) -> int:
        """The size of all that the session carries: memories, attention caches, fast copies of parameters."""
        return state_bytes(self._carried())

    def save(self, path: Path) -> None:
        """Writes the session to a safetensors file, whole or not at all."""
        save_state(self._carried(), path, {"kind": "session", "position": str(self.position)})

    def load(self, path: Path) -> None:
        """Goes on where a saved session stopped. Raises StateError, and changes nothing, if it is of another model."""
        carried, metadata = load_state(path)
        fresh = {**self._carried(), "state": self.model.init_state(self.batch), "last": {}}
        check_like({**carried, "last": {}}, fresh, str(path))
        self.position = int(metadata["position"])
        self.state, last = carried["state"], carried["last"]
        self.last = last.get("token")
        for name, level in carried["levels"].items():
            fast = {key: value.requires_grad_() for key, value in level["fast"].items()}
            treespec = optree.tree_structure(self.inner[name].optimizer)
            optimizer = optree.tree_unflatten(treespec, list(level["optimizer"].values()))
            self.inner[name] = InnerState(fast, optimizer, int(level["updates"]))
            self.gradients[name] = list(level["gradients"].values())

    def _room(self) -> int:
        """Tokens up to the next boundary of a level or reset."""
        clocks = [level.period for level in self.loop.levels] + ([self.reset_every] if self.reset_every else [])
        return min((clock - self.position % clock for clock in clocks), default=1 << 62)

    def _observe_piece(self, piece: Tensor) -> Tensor:
        state, last = self.state, self.last
        if self.reset_every and self.position % self.reset_every == 0:
            state = self.model.init_state(self.batch)
        inputs = piece[:, :-1] if last is None else torch.cat([last, piece[:, :-1]], 1)
        targets = piece[:, 1:] if last is None else piece
        first = [torch.full((piece.shape[0], 1), math.log(self.model.dim_out or 1))] if last is None else []
        if inputs.shape[1] == 0:
            losses, after, grads = torch.cat(first, 1), state, {}
        else:
            losses, after, grads = self._predict(inputs, targets, state)
            losses = torch.cat([*first, losses], 1)
        if not torch.isfinite(losses).all():
            raise UserError(f"token {self.position}: the loss is not finite; the session stays as it was before it")
        for name, gradient in grads.items():
            self.gradients[name] = [a + b for a, b in zip(self.gradients[name], gradient, strict=True)]
        self.state, self.last = after, piece[:, -1:]
        self.position += piece.shape[1]
        return losses

    def _predict(self, inputs: Tensor, targets: Tensor, state: State) -> tuple[Tensor, State, dict[str, list[Tensor]]]:
        """Losses, the state after, and per level the gradient of its summed objective."""
        with torch.no_grad(), writing(self.model, self.writing):
            out, gradients = self.loop.read(inputs, targets, Carried(self.inner, state), self.loop.levels)
            losses = loss_per_token(self.objectives, out.y, targets)
        return losses, tree_map(_settled, out.state), gradients

    def _learn(self) -> int:
        """The levels whose period ends here take their step on the mean gradient of the period."""
        made = 0
        for level in self.loop.levels:
            if self.position % level.period == 0:
                mean = [gradient / (level.period * self.batch) for gradient in self.gradients[level.name]]
                self.inner[level.name] = leaf_state(self.loop.apply(level, self.inner[level.name], mean))
                self.gradients[level.name] = self._no_gradient(level)
                made += 1
        return made

    def _no_gradient(self, level: InnerLevel) -> list[Tensor]:
        return [torch.zeros_like(value) for value in self.inner[level.name].fast.values()]

    def _carried(self) -> State:
        levels: State = {}
        for level in self.loop.levels:
            state = self.inner[level.name]
            levels[level.name] = {
                "fast": {name: value.detach() for name, value in state.fast.items()},
                "optimizer": _numbered(optree.tree_leaves(state.optimizer)),
                "gradients": _numbered(self.gradients[level.name]),
                "updates": torch.tensor(state.updates),
            }
        return {"state": self.state, "levels": levels, "last": {} if self.last is None else {"token": self.last}}


def _settled(tensor: Tensor) -> Tensor:
    # No view into a longer buffer: that would keep it alive, and the last bits of a product depend on how its operands
    # lie in memory, but a loaded session must go on as the one that was saved.
    return tensor.detach().clone(memory_format=torch.contiguous_format)


def _numbered(tensors: Sequence[Tensor]) -> dict[str, Tensor]:
    return {str(index): torch.as_tensor(tensor) for index, tensor in enumerate(tensors)}

"""Metalearned Neural Memory (Munkhdalai, Sordoni, Wang, Trischler 2019, arXiv 1907.09720): a feed-forward network as
the memory of an LSTM, rewritten at every token.

    h_t, c_t = LSTM([x_t; r_{t−1}], h_{t−1}, c_{t−1})
    k^r, k^w, v^w of each head, β' = tanh(h_t W + b)              η = lr_max σ(β' w + b), one for all heads and layers
    z^0 = k^w,  z^l = tanh(z^{l−1} W^l), the last layer linear                               (no biases)
    W^l ← W^l − η / heads Σ_heads z^{l−1} ⊗ δ^l                                    (write, then read)
    r_t = mean over heads of f(k^r),   y_t = [h_t; r_t] W + b

    MNM-g, signal `backprop`:            δ^L = ∂ objective(z^L, v^w),  δ^l = (δ^{l+1} W^{l+1}ᵀ) ⊙ (1 − z^l ⊙ z^l)
    MNM-p, signal `predicted_targets`:   δ^l = z^l − f^l(v^w),  f^l a slow affine map of the written value

All heads share one memory, each row of a batch has its own. The signals are written out, so one ordinary backward gives
the outer gradient. What the paper's meta-objective adds to the task's loss is measured as `aux`: the reconstruction
before the write (`surprise`) and after it (`reconstruction`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal, TypedDict

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from metamem.memory import signals
from metamem.memory.base import Memory, Out, check_rows
from metamem.memory.component import by_layer
from metamem.memory.level import TokenLevel
from metamem.memory.mnm_gradient import run
from metamem.memory.mnm_loop import Moment, Read, Rule, Slow
from metamem.memory.networks import Network
from metamem.state import State

HONOURED = ("name", "objectives", "signal", "lr", "lr_max")  # what of a level MNM has; all else keeps its default


class MNMState(TypedDict):
    """`hidden`, `cell`: the controller's h and c; `read`: the last read; `levels`: the level's component by layer, how
    far the memory's weights are from W_init."""

    hidden: Float[Tensor, "batch hidden"]
    cell: Float[Tensor, "batch hidden"]
    read: Float[Tensor, "batch width"]
    levels: dict[str, dict[str, dict[str, Float[Tensor, "batch width width"]]]]


class MNM(Memory):
    """An LSTM of width `hidden` (None: `dim`) with a memory of `layers` layers of width `width` (None: `dim`), written
    and read by `heads` heads.

    - `levels`   one token level of period 1 that addresses `init`, the memory's weights before the first write: its
                 objective, signal and rate. A learned η starts at `lr_max` / 2
    - `initial_keys`   `apart`: read and write keys start as different maps of h; `alike`: as the same, so that a token
                       reads what one like it wrote, from the start
    - `initial_gain`   how many times larger than torch.nn.Linear's the interaction vectors' weights start

    Raises ValueError for a level that asks for what MNM does not have.
    """

    def __init__(
        self,
        dim: int,
        levels: Sequence[TokenLevel],
        hidden: int | None = None,
        width: int | None = None,
        heads: int = 4,
        layers: int = 3,
        initial_keys: Literal["apart", "alike"] = "apart",
        initial_gain: float = 1.0,
    ) -> None:
        super().__init__()
        hidden, width = hidden or dim, width or dim
        if min(dim, hidden, width, heads, layers) < 1:
            raise ValueError(
                f"dim, hidden, width, heads and layers must be at least 1, not {dim}, {hidden}, {width}, {heads}, "
                f"{layers}"
            )
        if initial_gain <= 0:
            raise ValueError(f"initial_gain must be above 0, not {initial_gain}")
        self.dim_in = self.dim_out = dim
        self.hidden, self.width, self.heads, self.layers = hidden, width, heads, layers
        self.levels, self.level = tuple(levels), only(levels)
        self.squared = signals.squared_error(self.level.objectives)
        learned = self.level.lr == "learned"
        self.input = nn.Linear(dim, 4 * hidden)
        self.recurrent = nn.Linear(hidden + width, 4 * hidden, bias=False)
        self.interface = nn.Linear(hidden, (3 * heads + learned) * width)
        self.rate = nn.Linear(width, 1) if learned else None
        self.targets = nn.Linear(width, layers * width) if self.level.signal == "predicted_targets" else None
        self.output = nn.Linear(hidden + width, dim)
        self.init = nn.ParameterList(w[0] for w in Network((width,) * (layers + 1), "tanh").initial_weights(1))
        with torch.no_grad():
            self.interface.weight.mul_(initial_gain)
            if initial_keys == "alike":
                for parameter in self.interface.parameters():
                    write, read = parameter[: 2 * heads * width].chunk(2)
                    read.copy_(write)
        for part in (self.input, self.recurrent):  # as torch.nn.LSTM starts
            for parameter in part.parameters():
                nn.init.uniform_(parameter, -(hidden**-0.5), hidden**-0.5)

    def init_state(self, batch: int) -> State:
        """h = c = r = 0, the memory's weights at W_init."""
        dtype = torch.promote_types(self.init[0].dtype, torch.float32)
        hidden, read, *delta = (
            self.init[0].new_zeros(batch, *shape, dtype=dtype)
            for shape in ((self.hidden,), (self.width,), *(weight.shape for weight in self.init))
        )
        return {"hidden": hidden, "cell": hidden.clone(), "read": read, "levels": self._component(delta)}

    def forward(self, x: Float[Tensor, "batch tokens dim"], state: State | None = None) -> Out:
        """Each token moves the controller, is written, and read. aux, [batch, tokens], means over heads: `surprise`,
        the objective before the write; `reconstruction`, after it; `value_norm`, ‖v^w‖."""
        return self._run(x, state, self.writing)

    def write(self, x: Float[Tensor, "batch tokens dim"], state: State) -> State:
        """The state after x moved the controller and was written."""
        return self._run(x, state, writing=True).state

    def read(self, x: Float[Tensor, "batch tokens dim"], state: State) -> tuple[Tensor, State]:
        """What controller and memory make of x, the memory's weights as they are; the controller moves."""
        out = self._run(x, state, writing=False)
        return out.y, out.state

    def _run(self, x: Float[Tensor, "batch tokens dim"], state: State | None, writing: bool) -> Out:
        if state is not None:
            check_rows(state["read"], x)
        dtype, given = torch.promote_types(self.init[0].dtype, torch.float32), self.output.weight.dtype
        if x.shape[1] == 0:
            nothing = {name: x.new_zeros(x.shape[:2], dtype=dtype) for name in MEASURED} if writing else {}
            return Out(x.to(given), self.init_state(x.shape[0]) if state is None else state, nothing)
        with torch.autocast(x.device.type, enabled=False):
            init = torch.stack([weight.to(dtype) for weight in self.init]).unsqueeze(1)
            start = self._start(x.shape[0], init, state)
            rule = Rule(self.level, self.heads, writing, self.squared)
            result = run(rule, linear(self.input, x.to(dtype)), start, self._slow(dtype))
            y = linear(self.output, torch.cat([result.hidden, result.read], -1)).to(given)
            aux = self._measure(result) if writing else {}
            levels = self._component((result.weights - init).unbind(0)) if writing or state is None else state["levels"]
        last = {"hidden": result.hidden[:, -1], "cell": result.cell, "read": result.read[:, -1]}
        return Out(y, {**last, "levels": levels}, aux)

    def _start(self, batch: int, init: Tensor, state: State | None) -> Moment:
        if state is None:  # no component to add: the weights are large
            hidden, read = init.new_zeros(batch, self.hidden), init.new_zeros(batch, self.width)
            return Moment(hidden, hidden, read, init.expand(-1, batch, -1, -1))
        delta = torch.stack(list(state["levels"][self.level.name]["delta"].values()))
        return Moment(state["hidden"], state["cell"], state["read"], init + delta)

    def _component(self, delta: Sequence[Tensor]) -> dict[str, dict[str, dict[str, Tensor]]]:
        return {self.level.name: {"delta": by_layer(list(delta))}}

    def _slow(self, dtype: torch.dtype) -> Slow:
        def pair(part: nn.Linear | None) -> tuple[Tensor | None, Tensor | None]:
            return (None, None) if part is None else (part.weight.to(dtype), part.bias.to(dtype))

        interface = self.interface.weight.to(dtype), self.interface.bias.to(dtype)
        return Slow(self.recurrent.weight.to(dtype), *interface, *pair(self.rate), *pair(self.targets))

    def _measure(self, result: Read) -> dict[str, Tensor]:
        before, after = (
            signals.value(self.level.objectives, pred, result.values).mean(-1)
            for pred in (result.recalled, result.rewritten)
        )
        norm = torch.linalg.vector_norm(result.values, dim=-1).mean(-1)
        return dict(zip(MEASURED, (before, after, norm), strict=True))


MEASURED = ("surprise", "reconstruction", "value_norm")


def linear(part: nn.Linear, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
    """x W + b in the type of x."""
    return functional.linear(x, part.weight.to(x.dtype), part.bias.to(x.dtype))


def only(levels: Sequence[TokenLevel]) -> TokenLevel:
    """The one level of an MNM. Raises ValueError for none, for several, and for settings that MNM has not."""
    if len(levels) != 1:
        named = ", ".join(level.name for level in levels) or "none"
        raise ValueError(f"an mnm has one set of fast weights and one rule: name one token level for it, not {named}")
    level = levels[0]
    if level.signal not in ("backprop", "predicted_targets"):
        raise ValueError(
            f"level {level.name!r}: an mnm takes the signals 'backprop' (MNM-g) and 'predicted_targets' (MNM-p), not "
            f"{signals.name_of(level.signal)!r}; the kind fast_weights takes it"
        )
    for field in dataclasses.fields(level):
        value = getattr(level, field.name)
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        if field.name not in HONOURED and value != default:
            raise ValueError(
                f"level {level.name!r}: an mnm writes each token at once by η in ⊗ δ, and has no {field.name} "
                f"{value!r}; leave it at {default!r}"
            )
    return level

"""Parts: the layers and the blocks of columns of a memory's weights, where a router writes into each at its own gate.

In a network of several layers, or with signals of the chunk, what is written there is scaled: `in ⊗ (m ⊙ δ)`. In a
linear memory with token signals every column solves for itself, so that heads × blocks of columns are as many heads,
which share their keys.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from metamem.memory.component import Carry
from metamem.memory.networks import Weights
from metamem.memory.plan import copies
from metamem.memory.writer import Gates


def gated(
    signals: Sequence[Float[Tensor, "batch heads writes _d_out"]],
    parts: Float[Tensor, "batch #heads writes layers blocks"] | None,
) -> list[Tensor]:
    """`m ⊙ δ` at every layer."""
    if parts is None:
        return list(signals)
    return [columns(parts, layer, signal.shape[-1]) * signal for layer, signal in enumerate(signals)]


def columns(
    parts: Float[Tensor, "*batch layers blocks"], layer: int, width: int
) -> Float[Tensor, "*batch width_or_one"]:
    """The gates of a layer's columns; one for all where it is not cut into blocks."""
    of_layer = parts[..., layer if parts.shape[-2] > 1 else 0, :]
    blocks = of_layer.shape[-1]
    return of_layer if blocks == 1 else of_layer.repeat_interleave(width // blocks, -1)


def blocks_as_heads(gates: Gates) -> Gates:
    """The gates of a linear memory whose blocks of columns are heads of their own."""
    assert gates.parts is not None
    blocks = gates.parts.shape[-1]
    lr = gates.lr.unsqueeze(2) * rearrange(gates.parts, "b h t 1 n -> b h n t 1")
    of_head = gates.log_keep, gates.log_momentum
    return Gates(lr.flatten(1, 2), *(None if gate is None else copies(gate, blocks, 1) for gate in of_head))


def split_rows(
    x: Float[Tensor, "batch heads segments rows columns"], blocks: int
) -> Float[Tensor, "batch more segments rows fewer"]:
    """Blocks of columns as heads."""
    return x if blocks == 1 else rearrange(x, "b h s r (n o) -> b (h n) s r o", n=blocks)


def join_rows(
    x: Float[Tensor, "batch more segments rows fewer"], blocks: int
) -> Float[Tensor, "batch heads segments rows columns"]:
    """The inverse of `split_rows`."""
    return x if blocks == 1 else rearrange(x, "b (h n) s r o -> b h s r (n o)", n=blocks)


def carry_by_block(carry: Carry, blocks: int) -> Carry:
    """What is carried, with blocks of columns as heads; a transform's own state stays whole."""
    if blocks == 1:
        return carry
    return _carry(
        carry, lambda w: rearrange(w, "... h i (n o) -> ... (h n) i o", n=blocks), lambda keep: copies(keep, blocks, 1)
    )


def carry_whole(carry: Carry, blocks: int) -> Carry:
    """The inverse of `carry_by_block`."""
    if blocks == 1:
        return carry
    return _carry(
        carry, lambda w: rearrange(w, "... (h n) i o -> ... h i (n o)", n=blocks), lambda keep: keep[:, ::blocks]
    )


def _carry(carry: Carry, weight: Callable[[Tensor], Tensor], keep: Callable[[Tensor], Tensor]) -> Carry:
    def each(weights: Weights | None) -> Weights | None:
        return None if weights is None else [weight(one) for one in weights]

    components = [
        part._replace(
            delta=[weight(one) for one in part.delta],
            momentum=each(part.momentum),
            pending=each(part.pending),
            keep=None if part.keep is None else keep(part.keep),
        )
        for part in carry.components
    ]
    return carry._replace(init=each(carry.init), components=components)

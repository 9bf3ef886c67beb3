"""Read modes: whether a read head goes back, on, or by content (Graves et al. 2016, Methods).

w^r = Σ_h π_h backward_h + Σ_h π_{H+h} forward_h + π_{2H} content,   π = softmax over the 2H + 1 modes, H write heads
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from metamem.memory.slots.content import Weights
from metamem.memory.slots.links import Directed


def mixed(
    modes: Float[Tensor, "batch heads modes"], backward: Directed, forward: Directed, content: Weights
) -> Weights:
    """The read weights; `modes`: π."""
    ways = torch.cat([backward, forward, content.unsqueeze(1)], 1)
    return (modes.mT.unsqueeze(-1) * ways).sum(1)

"""Feature maps of keys and queries: what stands between a projection and the memory network."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from metamem.memory.norms import unit

FeatureMap = Literal["unit", "silu_unit", "elu", "identity"]
Features = Float[Tensor, "*batch features"]


def silu_unit(x: Features) -> Features:
    """SiLU, then of unit length (DeltaNet, Yang et al. 2024, section 3.3)."""
    return unit(functional.silu(x))


def elu(x: Features) -> Features:
    """ELU(x) + 1, above zero (linear attention, Katharopoulos et al. 2020, eq. 7)."""
    return functional.elu(x) + 1


def identity(x: Features) -> Features:
    """x: rates then depend on the scale of the keys."""
    return x


FEATURE_MAPS: dict[FeatureMap, Callable[[Tensor], Tensor]] = {
    "unit": unit,
    "silu_unit": silu_unit,
    "elu": elu,
    "identity": identity,
}

"""Low-rank deltas on matrices (LoRA; Hu et al. 2021, arXiv 2106.09685), as parameters that a level can move.

    W' = W + scale · B A        A: [rank, columns] random, B: [rows, rank] zero at the start

They are parametrizations (`torch.nn.utils.parametrize`): the matrix `mlp.up.weight` becomes the parameters
`mlp.up.parametrizations.weight.original` and, for groups to name, `mlp.up.parametrizations.weight.0.a` and `….0.b`.
"""

from __future__ import annotations

import hashlib
import math

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils import parametrize

from metamem.config import LowRankConfig
from metamem.globs import match_names, nearest_names


class LowRank(nn.Module):
    """W + scale · B A, of a matrix W."""

    def __init__(self, weight: Float[Tensor, "rows columns"], rank: int, scale: float, seed: int = 0) -> None:
        super().__init__()
        rows, columns = weight.shape
        generator = torch.Generator().manual_seed(seed)
        a = torch.randn(rank, columns, generator=generator) / math.sqrt(columns)
        self.a = nn.Parameter(a.to(weight))
        self.b = nn.Parameter(weight.new_zeros(rows, rank))
        self.scale = scale

    def forward(self, weight: Float[Tensor, "rows columns"]) -> Float[Tensor, "rows columns"]:
        """The matrix with its delta."""
        return torch.addmm(weight, self.b, self.a, alpha=self.scale)


def add_low_rank(module: nn.Module, settings: LowRankConfig, seed: int = 0) -> list[str]:
    """Puts a delta on every matrix that the globs match, in place; gives the matrices' names. One that has a delta
    keeps it. Raises ConfigError for a glob that matches nothing, and for what takes no delta."""
    matrices = {_matrix(name): parameter for name, parameter in module.named_parameters() if not _of_delta(name)}
    where = settings.where / "match"
    for glob in settings.match:
        if not match_names([glob], matrices):
            near = ", ".join(nearest_names(glob, matrices))
            raise where.error(f"{glob!r} matches no parameter; the nearest are {near}")
    found = match_names(settings.match, matrices)
    for name in found:
        path, _, attribute = name.rpartition(".")
        owner, weight = module.get_submodule(path), matrices[name].detach()
        if weight.ndim != 2 or isinstance(owner, nn.ParameterList | nn.ParameterDict):
            what = f"has the shape {list(weight.shape)}" if weight.ndim != 2 else "is in a list of parameters"
            raise where.error(f"{name} {what}: low-rank deltas are on the matrices of modules")
        if not parametrize.is_parametrized(owner, attribute):
            delta = LowRank(weight, settings.rank, settings.scale, _seed(seed, name))
            parametrize.register_parametrization(owner, attribute, delta)
    return found


def _matrix(name: str) -> str:
    """The name that a parameter had before it got a delta."""
    return name.replace("parametrizations.", "", 1).removesuffix(".original") if name.endswith(".original") else name


def _of_delta(name: str) -> bool:
    return "parametrizations" in name.split(".") and not name.endswith(".original")


def _seed(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:4], "big")

"""Implicit gradients (iMAML, Rajeswaran et al. 2019): the outer gradient at the inner solution, not along its way.

    φ*(θ) = argmin_φ L(φ) + λ/2 ‖φ − θ‖²
    dφ*/dθ = (I + H/λ)⁻¹,  H = ∂²L/∂φ² at φ*

The solution is approached by `steps` of the optimizer, without a graph; torchopt's implicit differentiation solves the
linear system by conjugate gradient, for all tasks together. It costs the same for any number of inner steps, and is
exact as far as they reached the solution. Rates have no gradient here.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from metamem.episodes.exact_norms import ExactNorms
from metamem.episodes.executors import fastest
from metamem.episodes.level import Adapted, Batch, EngineError, EpisodeLevel, Parameters
from metamem.episodes.parameters import call, members, own_buffers, shared, task_loss
from metamem.episodes.transforms import transform
from metamem.episodes.unroll import unroll
from metamem.episodes.vmapped import named_errors

Tensors = tuple[Tensor, ...]

# torchopt 0.7.3 calls functorch where torch.func is meant, also in the backward.
warnings.filterwarnings("ignore", "We've integrated functorch into PyTorch", FutureWarning, r"torchopt\.diff\.implicit")


def adapt(module: nn.Module, support: Batch, level: EpisodeLevel) -> Adapted:
    """The inner loop, with an implicit gradient."""
    from torchopt.diff.implicit import custom_root
    from torchopt.linear_solve import solve_cg

    names, parameters = members(module, level), dict(module.named_parameters())
    rest = shared(module, names)
    buffers = own_buffers(module, len(support.inputs))
    found: list[Adapted] = []

    def condition(solution: Tensors, theta: Tensors, slow: Tensors) -> Tensors:
        """∂L/∂φ + λ (φ − θ), zero at the solution."""

        def loss(fast: Parameters, own: Parameters, inputs: Tensor, targets: Tensor) -> Tensor:
            copies = {name: buffer.clone() for name, buffer in own.items()}
            everything = {**dict(zip(rest, slow, strict=True)), **fast, **copies}
            return task_loss(level.objectives, call(module, everything, inputs), targets)

        fast = dict(zip(names, solution, strict=True))
        with ExactNorms():
            gradients = torch.func.vmap(torch.func.grad(loss), randomness="error")(fast, buffers, *support)
        pulls = zip(names, solution, theta, strict=True)
        return tuple(gradients[name] + level.proximal * (phi - start) for name, phi, start in pulls)

    solve = solve_cg(rtol=level.solver_tolerance, maxiter=level.solver_steps)

    @custom_root(condition, argnums=(1, 2), solve=solve)
    def solution(initial: Tensors, theta: Tensors, slow: Tensors) -> Tensors:
        found.append(unroll(module, support, level, fastest(module), transform(level.optimizer)))
        return tuple(found[0].fast[name] for name in names)

    theta = tuple(parameters[name] for name in names)
    with named_errors(module, support.inputs, "implicit"):
        values = _Once.apply(*solution(tuple(p.detach() for p in theta), theta, tuple(rest.values())))
    return found[0]._replace(fast=dict(zip(names, values, strict=True)))


def refusal(module: nn.Module, level: EpisodeLevel) -> str | None:
    """What an implicit gradient does not know."""
    if not level.proximal:
        return "needs a `proximal` above 0: without it the solution does not depend on the initial weights"
    if isinstance(level.rates, nn.Module):
        return "gives rates, gates and routers no gradient: a number is needed"
    if level.unroll is not None:
        return "has no `unroll`: no gradient flows through its updates"
    if level.optimizer.weight_decay:
        return "solves for its objective without weight decay: the proximal term is in its place"
    return None


class _Once(torch.autograd.Function):
    """The identity, which refuses to be differentiated twice: torchopt's implicit gradient would be wrong."""

    @staticmethod
    def forward(ctx: Any, *values: Tensor) -> Tensors:
        return tuple(value.view_as(value) for value in values)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensors:
        if torch.is_grad_enabled():
            raise EngineError(
                "engine 'implicit' gives an outer gradient that cannot be differentiated again (create_graph=True); "
                "the engine 'functional' has no such limit"
            )
        return gradients

"""Inner loops as one writes them down: one task after the other, with torch.autograd.grad, in the order of the
equations. What the engines of metamem.episodes are compared with."""

import torch
from torch import nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from losses.recall import huber, mse
from metamem.episodes import ENGINES, Batch, Episode, InnerOptimizer, adapt, predict

TASKS, SHOTS = 3, 6
UNROLLED = [name for name in ENGINES if name != "implicit"]
OBJECTIVES = {mse: 1.5, huber: 0.5}
SGD = {
    "sgd": InnerOptimizer(),
    "momentum": InnerOptimizer(momentum=0.9, weight_decay=0.1),
    "nesterov": InnerOptimizer(momentum=0.7, nesterov=True),
}
ADAM = {
    "adam": InnerOptimizer("adam", weight_decay=0.1),
    "adamw": InnerOptimizer("adamw", betas=(0.8, 0.95), weight_decay=0.1),
}


def mlp():
    return nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 4), nn.Softplus(), nn.Linear(4, 1))


class Tied(nn.Module):
    """One weight in two places."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 1)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))


def episode(dim_in=2, dim_out=1):
    support, query = (Batch(torch.randn(TASKS, SHOTS, dim_in), torch.randn(TASKS, SHOTS, dim_out)) for _ in range(2))
    return Episode(support, query)


class Steps:
    """torch.optim's algorithms as they are written down, for one task, differentiable."""

    def __init__(self, options):
        self.options, self.count, self.first, self.second = options, 0, {}, {}

    def direction(self, name, gradient, value):
        o = self.options
        decay = o.weight_decay * value if o.weight_decay else 0.0
        if o.name == "sgd":
            gradient = gradient + decay
            if not o.momentum:
                return gradient
            self.first[name] = o.momentum * self.first[name] + gradient if name in self.first else gradient
            return gradient + o.momentum * self.first[name] if o.nesterov else self.first[name]
        if o.name == "adam":
            gradient = gradient + decay
        beta1, beta2 = o.betas
        self.first[name] = beta1 * self.first.get(name, 0.0) + (1 - beta1) * gradient
        self.second[name] = beta2 * self.second.get(name, 0.0) + (1 - beta2) * gradient**2
        root = (self.second[name] / (1 - beta2**self.count)).sqrt()
        moved = self.first[name] / (1 - beta1**self.count) / (root + o.eps)
        return moved + decay if o.name == "adamw" else moved


def reference(module, batch, level, rate=None):
    """The predictions of each task's adapted module, and the fast parameters: one task after the other."""
    slow = dict(module.named_parameters())
    members = level.members or tuple(slow)
    predictions, fast = [], []
    for inputs, targets, query in zip(*batch.support, batch.query.inputs, strict=True):
        now = {name: slow[name] for name in members}
        now = {name: value if value.requires_grad else value.clone().requires_grad_() for name, value in now.items()}
        buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
        steps = Steps(level.optimizer)
        for step in range(level.steps):
            with sdpa_kernel(SDPBackend.MATH):
                given = {**at_every_place(module, now), **buffers}
                pred = functional_call(module, given, (inputs,), tie_weights=False)
            loss = sum(weight * objective(pred, targets).mean() for objective, weight in level.objectives.items())
            gradients = torch.autograd.grad(loss, list(now.values()), create_graph=True, allow_unused=True)
            steps.count += 1
            rates = rate(step, loss, dict(zip(now, gradients, strict=True))) if rate else None
            moved = {}
            for (name, value), gradient in zip(now.items(), gradients, strict=True):
                gradient = torch.zeros_like(value) if gradient is None else gradient
                if level.unroll is not None and step < level.steps - level.unroll:
                    gradient = gradient.detach()
                gradient = gradient + level.proximal * (value - slow[name])
                lr = rates[name] if rates else level.rates
                moved[name] = value - lr * steps.direction(name, gradient, value)
            now = moved
        given = {**at_every_place(module, now), **buffers}
        predictions.append(functional_call(module, given, (query,), tie_weights=False))
        fast.append(now)
    return torch.stack(predictions), {name: torch.stack([one[name] for one in fast]) for name in members}


def at_every_place(module, tensors):
    """A weight that two modules share has two places; a module that is used twice has one, under its first name."""
    names = {id(own): name for name, own in module.named_parameters()}
    for path, part in module.named_modules():
        for name, own in part.named_parameters(path, recurse=False):
            if names[id(own)] in tensors:
                tensors = {**tensors, name: tensors[names[id(own)]]}
    return tensors


def outer_loss(predictions, batch):
    return (predictions - batch.query.targets).square().mean() + predictions.sin().mean()


def outer_gradients(predictions, batch, parameters):
    return torch.autograd.grad(outer_loss(predictions, batch), list(parameters), allow_unused=True)


def compare(module, batch, level, tolerance, rate=None, extra=()):
    """Fast parameters and outer gradients of a level against the reference."""
    slow = [p for p in module.parameters() if p.requires_grad] + list(extra)
    adapted = adapt(module, batch.support, level)
    predictions = predict(module, adapted, batch.query.inputs, level)
    expected, fast = reference(module, batch, level, rate)
    for name, value in fast.items():
        torch.testing.assert_close(adapted.fast[name], value, rtol=0, atol=tolerance)
    found, wanted = (outer_gradients(p, batch, slow) for p in (predictions, expected))
    for one, other in zip(found, wanted, strict=True):
        other = torch.zeros_like(one) if other is None else other
        torch.testing.assert_close(one, other, rtol=0, atol=tolerance)
    return wanted

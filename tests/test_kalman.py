"""The Kalman filter is the posterior mean of a Gaussian process, computed densely, and knows its own error."""

import pytest
import torch

from metamem.tasks import Drift
from metamem.tasks.kalman import kalman_filter

pytestmark = pytest.mark.usefixtures("float64")
TIME, FEATURES, NOISE = 14, 3, 0.4
DECAY = torch.tensor([0.5, 0.95, 1.0], dtype=torch.float64)


def posterior(x, y, a, redrawn):
    """E [x_t · w_t | y before t] and its variance, for one row: f_t = x_t · w_t is a Gaussian process, of covariance
    a^|t−s| x_s · x_t, or 0 where the weights were drawn anew in between."""
    at = torch.arange(TIME)
    epoch = redrawn.cumsum(0)
    prior = a ** (at[:, None] - at).abs() * (x @ x.T) * (epoch[:, None] == epoch)
    means, variances = [], []
    for t in range(TIME):
        weights = torch.linalg.solve(prior[:t, :t] + NOISE**2 * torch.eye(t), prior[:t, t])
        means.append(weights @ y[:t])
        variances.append(prior[t, t] - weights @ prior[:t, t])
    return torch.stack(means), torch.stack(variances)


@pytest.mark.parametrize("jumps", [0.0, 0.2])
def test_the_filter_is_the_posterior_of_a_gaussian_process(jumps):
    x, y = torch.randn(2, TIME, FEATURES), torch.randn(2, TIME, len(DECAY))
    redrawn = torch.rand(2, TIME, len(DECAY)) < jumps
    filtered = kalman_filter(x, y, DECAY, NOISE, redrawn if jumps else None)
    for batch in range(2):
        for row, a in enumerate(DECAY):
            mean, variance = posterior(x[batch], y[batch, :, row], a, redrawn[batch, :, row])
            torch.testing.assert_close(filtered.predictions[batch, :, row], mean)
            torch.testing.assert_close(filtered.variances[batch, :, row], variance)


@pytest.mark.parametrize("jumps", [0.0, 0.02])
def test_its_error_on_streams_of_the_task_is_what_it_expects(jumps):
    task = Drift(half_lives=(5.0, 50.0, None), features=4, stream=400, examples=64, jumps=jumps)
    error = (task.optimum.predictions - task.evaluation.clean).square().mean((0, 1))
    torch.testing.assert_close(error, task.optimum.variances.mean((0, 1)), rtol=0.06, atol=0)

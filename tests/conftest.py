"""What every test relies on: one thread, one seed, and hypothesis without a clock or a file of its own."""

import pytest
import torch
from hypothesis import HealthCheck, settings

# Their asserts are read in failures, as those of a test module are.
pytest.register_assert_rewrite("conformance", "episode_reference")

settings.register_profile(
    "metamem",
    deadline=None,  # the first example pays for warming up
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.load_profile("metamem")


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Small tensors: a second thread only adds noise and waits."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def float64():
    """float64 by default, for tests that compare two ways to compute the same."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)

"""What does not fit into memory: refused before it is allocated, or told in one line."""

import pytest
import torch
from small_models import small_quickstart
from torch import nn
from typer.testing import CliRunner

import metamem.cli as cli
from metamem import ConfigError, UserError, build
from metamem.out_of_memory import TooLarge, fits, told_in_a_line


def test_what_is_made_is_counted_before_it_is_there():
    with fits() as counted:
        layer = nn.Linear(300, 200)
        torch.zeros(7, dtype=torch.float64), torch.arange(5), torch.eye(3, dtype=torch.bool), torch.randperm(4)
    assert counted.made == 4 * sum(weight.numel() for weight in layer.parameters()) + 7 * 8 + 5 * 8 + 9 + 4 * 8
    with (
        fits(limit=4 * 300 * 200),
        pytest.raises(TooLarge, match=r"takes the network to 240,800 bytes of memory; this machine has 240,000"),
    ):
        nn.Linear(300, 200)


def test_a_model_is_the_same_where_it_is_counted():
    torch.manual_seed(3)
    plain = nn.Linear(5, 4).weight
    torch.manual_seed(3)
    with fits():
        counted = nn.Linear(5, 4).weight
    assert torch.equal(plain, counted)


def test_an_error_of_another_kind_stays_what_it_is():
    with fits(), pytest.raises(RuntimeError, match="negative dimension"):
        torch.empty(-1)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "vars.dim=1000000000",
            "network.modules.embed: takes the network to 1,024.0 GB of memory; this",
        ),
        (
            "vars.dim=10000000000000000000000",
            "network.modules.embed: has a weight that is larger than any tensor",
        ),
        ("vars.blocks=1000000", "network.modules.blocks.repeat: must be at least 1 and at most 1000, not 1000000"),
        (
            "network.modules.blocks.modules.mlp.expansion=1000000000",
            "network.modules.blocks.modules.mlp: takes the",
        ),
    ],
)
def test_a_network_that_no_memory_holds_is_refused_at_its_module(override, message):
    with pytest.raises(ConfigError) as error:
        build(small_quickstart(override))
    assert message in str(error.value) and len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("fail", [lambda: torch.empty(10**15), lambda: bytearray(10**15)], ids=["torch", "python"])
def test_an_allocation_that_fails_is_one_line(fail):
    with pytest.raises(UserError, match=r"^out of memory: .*; lower what a step holds \(training.batch, ") as error, \
            told_in_a_line():  # fmt: skip
        fail()
    assert len(str(error.value).splitlines()) == 1
    with pytest.raises(RuntimeError, match="shape"), told_in_a_line():
        torch.zeros(2, 3) @ torch.zeros(2, 3)


def test_the_command_line_tells_it(monkeypatch, tmp_path):
    def load(path, overrides):
        raise MemoryError

    monkeypatch.setattr(cli, "load_checked", load)
    (tmp_path / "c.yaml").write_text("seed: 0")
    result = CliRunner().invoke(cli.app, ["check", str(tmp_path / "c.yaml")])
    assert result.exit_code == 2 and result.stderr.startswith("out of memory: no more could be had; lower")

"""Every shipped config, damaged at random: it loads, builds and runs, or one line says what is wrong with it.

The cases are those of `python experiments/fuzz_configs.py`, which runs more of them.
"""

import os
from pathlib import Path
from random import Random

import jaxtyping
import pytest
from small_models import CONFIGS

from experiments import fuzz_configs
from experiments.config_mutations import MUTATIONS, mutate
from metamem import UserError

CASES, SEED, PARTS = 2000, 0, 8


@pytest.fixture(autouse=True)
def as_users_have_it():
    """Annotations are not checked: what a user would see is what counts."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.parametrize("part", range(PARTS))
def test_a_damaged_config_runs_or_is_one_line(part):
    found = fuzz_configs.campaign(CASES, SEED, part, PARTS)
    print(fuzz_configs.summary(found))
    assert len(found) == CASES / PARTS
    assert not [one.trouble for one in found if one.trouble]
    assert {one.outcome for one in found} >= {"refused", "built"}


def test_what_is_not_damaged_is_built(tmp_path, monkeypatch):
    """Else a refusal would say nothing."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(fuzz_configs, "RUN", 0)
    hosts = fuzz_configs.prepare(Path("c"))
    assert set(hosts) == {str(path.relative_to(CONFIGS)) for path in CONFIGS.rglob("*.yaml")}
    for host in dict.fromkeys(hosts.values()):
        try:
            assert fuzz_configs.survive(Path("c") / host, Random(0)) == "built"
        except UserError as error:
            assert "there is no Unifont" in str(error), error  # a font that not every machine has


def test_every_mutation_damages_something():
    tree = {"a": {"match": ["x.**", "y"], "b": [1, 2.5, None, True]}, "c": "word"}
    texts = {}
    for number in range(400):
        name, text = mutate(tree, Random(number))
        texts.setdefault(name, set()).add(text)
    assert set(texts) == set(MUTATIONS) and all(len(of) > 1 for of in texts.values())
    assert mutate(tree, Random(7)) == mutate(tree, Random(7)), "a case is a function of its seed"
    assert tree == {"a": {"match": ["x.**", "y"], "b": [1, 2.5, None, True]}, "c": "word"}


def test_a_case_that_takes_too_long_or_breaks_or_says_too_much_is_no_survivor(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    hosts = fuzz_configs.prepare(Path("c"))
    (case, random), *_ = fuzz_configs.cases(hosts, 1, 0)
    before = (Path("c") / case.file).read_bytes()

    def hang(path, random):
        while True:
            os.getpid()

    def crash(path, random):
        raise KeyError("nothing")

    def refuse(path, random):
        raise UserError("no")

    monkeypatch.setattr(fuzz_configs, "SECONDS", 0.05)
    for bad, trouble in ((hang, "takes more than"), (crash, "KeyError: 'nothing'"), (refuse, "names no file: 'no'")):
        monkeypatch.setattr(fuzz_configs, "survive", bad)
        assert fuzz_configs.run_case(case, Path("c"), random).trouble.startswith(trouble)
        assert (Path("c") / case.file).read_bytes() == before, "the file is put right"

"""Every file that metamem reads, damaged at random or replaced by a pickle: one line, nothing touched, nothing run.

The cases are those of `python experiments/fuzz_files.py`, which runs more of them.
"""

import ast
import io
import os
import pickle
import re
from pathlib import Path

import jaxtyping
import numpy as np
import pytest
import torch
import yaml

import metamem
from experiments import fuzz_files
from experiments.pickle_files import MARK, pickles, watched
from metamem import UserError, build, load_config
from metamem.cli import load_checked
from metamem.episodes.learner import build_learner
from metamem.episodes.schema import load_episodes

PACKAGE = Path(metamem.__file__).parent
CASES = 320
# Where files are read, and by which of the readers that are damaged here; none: no file of a user's.
READ = {
    "adaptation/hugging_face.py": "model of transformers",
    "adaptation/opening.py": "network of the hub",
    "training/tracking.py": None,  # the id that it gave the run
    "analysis/launchers/ray.py": None,  # what a cell left in the temporary folder that its process made
    "analysis/plan.py": "ablation",  # its base
    "analysis/results.py": "ablation gone on with",
    "config/ablation.py": "ablation",
    "config/load.py": "config",
    "episodes/tasks/glyphs.py": "glyphs",
    "episodes/tasks/temperatures.py": None,  # the data of a package
    "json_files.py": "report of an ablation",
    "memory/product.py": None,  # what the system says of the processor
    "state.py": "state",
    "tasks/text.py": "text",
    "atomic.py": None,  # a folder, to be synced
    "training/lock.py": None,  # its own, which it writes first
    "training/run_folder.py": "run gone on with",
}
READING = {"read_text", "read_bytes", "safe_open", "load_file", "files", "from_pretrained"}
RUNS_CODE = {
    *("pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"),
    *("torch.load", "torch.jit.load", "np.load", "numpy.load", "yaml.load", "yaml.unsafe_load", "yaml.full_load"),
    *("eval", "exec", "compile", "runpy"),
}


@pytest.fixture(autouse=True)
def as_users_have_it():
    """Annotations are not checked: what a user would see is what counts."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def test_a_damaged_file_is_read_or_is_one_line_and_leaves_the_model_as_it_was():
    found = fuzz_files.campaign(CASES, 0)
    print(fuzz_files.summary(found))
    assert len(found) == CASES and not [one.trouble for one in found if one.trouble]
    assert {one.damage for one in found} == set(fuzz_files.DAMAGES)
    assert sum(not one.read for one in found) > CASES / 2


def test_no_file_runs_code():
    tried, run = fuzz_files.pickle_campaign()
    print(f"{tried} pickles in the place of files")
    assert not run and tried >= 200


def test_those_files_would_run_code_where_anything_unpickled_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    loaders = {
        "pickle, protocol 5": pickle.load,
        "torch.save": lambda file: torch.load(file, weights_only=False),
        "torch.save, legacy": lambda file: torch.load(file, weights_only=False),
        "numpy.savez": lambda file: np.load(file, allow_pickle=True)["a"],
        "numpy.save": lambda file: np.load(file, allow_pickle=True),
    }
    for name, load in loaders.items():
        with watched() as unpickled:
            load(io.BytesIO(pickles()[name]))
        assert Path(MARK).is_dir() and any(place.endswith(".mkdir") for place in unpickled), name
        Path(MARK).rmdir()


@pytest.mark.parametrize(
    ("path", "options"),
    [
        ("os.mkdir", {"path": MARK}),
        ("subprocess.check_call", {"args": ["mkdir", MARK]}),
        ("shutil.rmtree", {"path": "."}),
    ],
)
def test_a_config_calls_nothing_but_the_classes_of_modules(path, options, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = yaml.safe_load(fuzz_files.EPISODES) | {"module": {"kind": path, **options}}
    Path("a.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(UserError, match=f"module.kind: {re.escape(path)} is no class of nn.Module"):
        build_learner(load_episodes("a.yaml"))
    config = yaml.safe_load(fuzz_files.TOKENS)
    config["network"]["modules"]["memory"] |= {"network": path, "d_key": 3, "d_value": 3}
    Path("b.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(UserError, match=f"{re.escape(path)} is no class of nn.Module"):
        build(load_config("b.yaml"))
    for entry in ({"modules": {"head": {"kind": path, **options}}}, {}):
        config = yaml.safe_load(fuzz_files.TOKENS)
        config["network"]["modules"] |= entry.get("modules", {})
        config["task"] = config["task"] if entry else {"name": path, **options}
        Path("c.yaml").write_text(yaml.safe_dump(config))
        with pytest.raises(UserError, match=f"{re.escape(path)} is no (module kind|task): name a class of one"):
            load_checked(Path("c.yaml"), None)
    assert not Path(MARK).exists()


def sources():
    for package in (PACKAGE, PACKAGE.parent / "losses"):
        for path in sorted(package.rglob("*.py")):
            yield path, ast.parse(path.read_text())


def name_of(node):
    """`a.b.c` of an expression that is a dotted name."""
    parts = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join(reversed([*parts, node.id])) if isinstance(node, ast.Name) else ".".join(reversed(parts))


def test_every_place_where_a_file_is_read_is_among_the_readers(tmp_path, monkeypatch):
    found = set()
    for path, tree in sources():
        calls = (node for node in ast.walk(tree) if isinstance(node, ast.Call))
        if any(reads(call) for call in calls):
            found.add(str(path.relative_to(PACKAGE)) if path.is_relative_to(PACKAGE) else path.name)
    assert found == set(READ)
    monkeypatch.chdir(tmp_path)
    names = {reader.name for reader in fuzz_files.readers(Path("f"))}
    if not fuzz_files.has_hub():
        names |= {"model of transformers", "network of the hub"}
    assert {name for name in READ.values() if name} <= names


def reads(call):
    """Whether a call reads a file, or opens one otherwise than to write to it."""
    name = name_of(call.func)
    if name.split(".")[-1] in READING:
        return True
    modes = [str(argument.value) for argument in call.args if isinstance(argument, ast.Constant)]
    if name == "os.open":
        flags = {part.attr for part in ast.walk(call) if isinstance(part, ast.Attribute)}
        return not flags & {"O_WRONLY", "O_APPEND"}
    of_file = name == "open" or (name.endswith(".open") and len(modes) == len(call.args))
    return of_file and not any(mode[:1] in ("w", "a", "x") for mode in modes)


def test_nothing_in_the_library_unpickles_or_runs_text():
    for path, tree in sources():
        for node in ast.walk(tree):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [name_of(node.func)] if isinstance(node, ast.Call) else []
            assert not RUNS_CODE & set(names), f"{path}:{node.lineno}"


def test_a_results_file_of_something_else_is_not_cut(tmp_path, monkeypatch):
    """What a kill cut off is dropped, and nothing else."""
    monkeypatch.chdir(tmp_path)
    fuzz_files.make(Path("f"))
    rows = Path("f/sweep/rows.jsonl")
    for content in (pickles()["torch.save"], b"my thesis, in one line"):
        rows.write_bytes(content)
        with pytest.raises(UserError, match=r"not (the rows|a row) of an ablation|not UTF-8"):
            fuzz_files.go_on(Path("f"))
        assert rows.read_bytes() == content


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every file")
def test_a_file_that_may_not_be_read_is_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for reader in fuzz_files.readers(Path("f")):
        for file in reader.files:
            (Path("f") / file).chmod(0)
            read, trouble = fuzz_files.attempt(reader, Path("f"))
            (Path("f") / file).chmod(0o644)
            assert not read and not trouble, (reader.name, file, trouble)

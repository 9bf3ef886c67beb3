"""Going on with a run where its last checkpoint left it: what may have changed since, and what is then no longer exact.

On one process, with the same config, code and number of threads, a run that was ended and gone on with comes to the
weights of one that was not, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from metamem.atomic import PARTIAL
from metamem.config import ConfigError, RunConfig, Where, to_dict
from metamem.config.convert import convert
from metamem.globs import matches
from metamem.state import StateError, load_state
from metamem.training.checkpoint import FOLDER, CheckpointError, Resumable, load_resumable, resumable, save_weights
from metamem.training.random_states import undisturbed
from metamem.training.run_folder import CHECKPOINT, METRICS, cut_metrics, write_config
from metamem.training.snapshot import Training

Say = Callable[[str], None]

# What a checkpoint decides, whatever the config says; and what decides nothing of the numbers of a training.
FIXED = ("name", "seed", "network.**", "module.**", "hierarchy.levels.*.optimizer.name")
FREE = (
    "vars.**",
    "training.trackers.**",
    *(f"training.{key}" for key in ("checkpoint_every", "keep_last", "best_metric", "best_mode", "patience")),
    "training.distributed",
    *(f"training.{key}" for key in ("log_every", "evaluate_every", "evaluated_tasks", "evaluated_steps")),
)


def go_on(folder: Path, training: Training, step: int | None, say: Say) -> dict[str, Any]:
    """Brings a training to the checkpoint of a step of its run's folder, or to the last one, and says what has changed
    since; where there is none yet, it begins anew. What was made after the checkpoint is left as it is.

    Raises CheckpointError for one that is damaged or foreign, ConfigError for a change that it rules out.
    """
    checkpoint, config = load_resumable(folder, step), training.config
    if checkpoint is None:
        say(f"{folder}: there is no checkpoint yet: it begins anew")
        return {}
    changed = dict(_changes(_config_of(checkpoint, type(config)), config))
    _check_changes(changed, training, checkpoint)
    training.load(checkpoint)
    then, now = checkpoint.about["made_with"], training.made_with()
    for name in sorted(then.keys() | now.keys()):
        if then.get(name) != now.get(name):
            say(f"{folder}: the checkpoint was made with {name} {then.get(name)}; this is {now.get(name)}")
    for key, (was, is_now) in changed.items():
        exactly = "" if _is_exact(key, (was, is_now), training) else ": it does not go on exactly"
        say(f"{folder}: {key} was {was}, and is {is_now}{exactly}")
    return {"changed": changed, "made_with": now}


@undisturbed()
def clear(folder: Path, training: Training) -> None:
    """Takes out of a run's folder what came after the checkpoint that the training was brought to."""
    training.world.any(False)  # that all processes have read theirs
    if training.world.first:
        _clear(folder, training)
    training.reached.best = training.world.told(lambda: training.reached.best)


def _clear(folder: Path, training: Training) -> None:
    reached = training.reached
    for path in (folder / FOLDER).glob("*"):
        if path.name.endswith(PARTIAL):
            path.unlink()
    for step, path in resumable(folder).items():
        if step > reached.step:
            path.unlink()
    if reached.best not in (0, *resumable(folder)):  # it came after, or was not kept
        reached.best = 0
    _restore_weights(folder, training)  # first: where they cannot be written, the run stays as it was
    cut_metrics(folder / METRICS, reached.step)
    write_config(training.config, folder)


def _restore_weights(folder: Path, training: Training) -> None:
    """The run's weights, where a kill came between them and their checkpoint, or it goes on from an earlier one."""
    path, wanted = folder / CHECKPOINT, training.reached.best or training.reached.step
    if not wanted:
        path.unlink(missing_ok=True)
    elif _step_of(path) != wanted:
        checkpoint = load_resumable(folder, wanted)
        assert checkpoint is not None
        save_weights(checkpoint.state["model"], training.config, wanted, path)


def _step_of(path: Path) -> int | None:
    try:
        return int(load_state(path)[1]["step"])
    except (StateError, KeyError):
        return None


def _config_of(checkpoint: Resumable, schema: type[RunConfig]) -> RunConfig:
    """The config that a checkpoint was made under, as this version of the schema has it."""
    try:
        return convert(checkpoint.about["config"], schema, Where.of(str(checkpoint.path)))
    except ConfigError as error:
        raise CheckpointError(f"{error}: its config is of another version of metamem") from None


def _changes(before: RunConfig, after: RunConfig) -> Iterator[tuple[str, tuple[Any, Any]]]:
    """Key -> what it was and what it is, for all that differs; levels go by their names."""
    was, now = (dict(_flat(to_dict(config))) for config in (before, after))
    for key in [*was, *(key for key in now if key not in was)]:
        if was.get(key) != now.get(key):
            yield key, (was.get(key), now.get(key))


def _flat(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(tree, list) and all(isinstance(item, dict) and "name" in item for item in tree):
        tree = {item["name"]: item for item in tree}
    if not isinstance(tree, dict) or not tree:
        yield prefix, tree
        return
    for key, value in tree.items():
        yield from _flat(value, f"{prefix}.{key}" if prefix else str(key))


def _check_changes(changed: dict[str, tuple[Any, Any]], training: Training, checkpoint: Resumable) -> None:
    for key, (was, now) in changed.items():
        if any(matches(glob, key) for glob in FIXED):
            raise CheckpointError(f"{checkpoint.path}: was made with {key} {was}, not {now}: train anew to change it")
    steps = training.config.training.steps
    if steps < checkpoint.step:
        raise CheckpointError(f"{checkpoint.path}: is past the last of {steps} steps; raise training.steps")


def _is_exact(key: str, change: tuple[Any, Any], training: Training) -> bool:
    """Whether the numbers are those of a training that had the change from the beginning."""
    if key != "training.steps":
        return any(matches(glob, key) for glob in FREE)
    outer, step = training.outer, training.reached.step
    # The end of a training ends every period, before its time.
    fired = step < change[0] or all(outer.calendar.fires(level, step) for level in outer.levels)
    return training.config.training.schedule == "constant" and fired

"""`kill -9` of workers of a Ray cluster, in the middle of cells: the rows are those of a sweep that nothing killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from random import Random
from typing import Any

from experiments.small_runs import write_inputs
from metamem.analysis import read_results
from metamem.config import Config

MARKS, CHOSEN = "marks", "chosen"  # which process a cell is in; which cells do not end before they are killed
ABLATION = """
base: sequences.yaml
seeds: [{seeds}]
function: experiments.cluster_kills:cell
cells: {{x: {{}}}}
"""


def cell(config: Config, seed: int) -> dict[str, Any]:
    """Says which process it is in; then it is done, or waits for its end, the first time."""
    begun = list(Path(MARKS).glob(f"{seed}-*"))
    (Path(MARKS) / f"{seed}-{os.getpid()}").touch()
    while (Path(CHOSEN) / str(seed)).exists() and not begun:
        time.sleep(0.01)
    return {"square": seed**2}


def workers(count: int, folder: Path, seed: int) -> tuple[int, int]:
    """Kills `count` workers of a cluster of two, each once, in cells that are chosen at random among twice as many."""
    random, command = Random(seed), [sys.executable, "-m", "metamem.cli", "ablate", "a.yaml", "--launcher", "ray"]
    chosen, killed = set(random.sample(range(2 * count), count)), set[int]()
    write_inputs(folder)
    (folder / "a.yaml").write_text(ABLATION.format(seeds=", ".join(map(str, range(2 * count)))))
    for name in (MARKS, CHOSEN):
        (folder / name).mkdir()
    for number in chosen:
        (folder / CHOSEN / str(number)).touch()
    root = str(Path(__file__).resolve().parent.parent)
    settings = {"PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")]), "OMP_NUM_THREADS": "1"}
    quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen([*command, "--workers", "2"], cwd=folder, env={**os.environ, **settings}, **quiet) as process:
        while process.poll() is None:
            for mark in (folder / MARKS).iterdir():
                number, pid = map(int, mark.name.split("-"))
                if number in chosen - killed:
                    time.sleep(random.uniform(0, 0.2))
                    os.kill(pid, signal.SIGKILL)
                    killed.add(number)
            time.sleep(0.02)
    rows = {row.seed: row for row in read_results(folder / "runs" / "a")}
    sound = {
        number
        for number in range(2 * count)
        if number in rows and rows[number].status == "done" and rows[number].metrics == {"square": number**2}
    }
    untouched = all(rows[number].attempts == 1 for number in sound - killed)
    return len(killed), len(killed & sound) if process.returncode == 0 and untouched else 0

"""Task `continual`: one text after the other; what is forgotten of those before, and what helps with those to come.

A task is a source (`metamem.tasks.sources`), as it is written or in a spelling of its own: with `spellings` each source
comes again as a task with its letters swapped around, the same statistics under another name. Tasks come in turn along
the outer steps, `steps_per_task` each, and none comes again.

With R[i, j] the quality on task j (−bits per byte of held-out text) after learning task i, and R[0, j] before any,

    backward transfer   mean over j < T of R[T, j] − R[j, j]            (Lopez-Paz and Ranzato 2017, arXiv 1706.08840)
    forward transfer    mean over j > 1 of R[j−1, j] − R[0, j]
    forgetting          mean over j < T of max_{i<T} R[i, j] − R[T, j]  (Chaudhry et al. 2018, arXiv 1801.10112)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor
from torch.nn import functional

from metamem.registry import TASKS
from metamem.tasks.evaluation import evaluation_generator
from metamem.tasks.sources import load_source
from metamem.tasks.text import VOCABULARY, TaskError, sample_windows

Episodes = tuple[Int[Tensor, "batch length"], Int[Tensor, "batch length"]]
LETTERS = 26


@TASKS.register("continual")
class Continual:
    """Next-byte prediction on a sequence of tasks.

    Args:
        sources: the texts, in the order in which they are learned.
        spellings: tasks of each source, the first as written, each other with the alphabet shuffled in a way of its
            own; all sources come in the first spelling before any comes in the second.
        steps_per_task: outer steps of each task; the last goes on if the training does.
        examples: held-out windows of each task that are evaluated.
        seed: of the spellings and of the evaluation.

    Everything is read here. Raises `TaskError` for a sequence of fewer than two tasks, and for sources that do not
    exist.
    """

    vocabulary = VOCABULARY

    def __init__(
        self,
        *,
        sources: tuple[str, ...] = ("web", "wyc", "python"),
        spellings: int = 1,
        steps_per_task: int = 200,
        examples: int = 16,
        seed: int = 0,
    ) -> None:
        if min(spellings, steps_per_task, examples) < 1:
            raise TaskError(
                f"spellings, steps_per_task and examples must be at least 1, not {spellings}, {steps_per_task} and "
                f"{examples}"
            )
        if len(sources) * spellings < 2 or len(set(sources)) < len(sources):
            raise TaskError(f"{spellings} spellings of {list(sources)} are no sequence of different tasks; name more")
        self.sources, self.spellings, self.steps_per_task = tuple(sources), spellings, steps_per_task
        self.examples, self.seed = examples, seed
        generator = evaluation_generator(1000 * seed)
        texts = [load_source(name) for name in self.sources]
        self.tasks = [
            (_respelled(text.train, spelling), _respelled(text.held_out, spelling))
            for number in range(spellings)
            for text in texts
            for spelling in [_spelling(generator) if number else torch.arange(VOCABULARY)]
        ]

    def task_at(self, step: int) -> int:
        """The task that outer step `step` (from 1) trains, from 0."""
        return min((step - 1) // self.steps_per_task, len(self.tasks) - 1)

    def sample(self, generator: torch.Generator, batch: int, length: int, task: int = 0) -> Episodes:
        """`batch` random windows of a task's text: inputs, and the targets one byte on."""
        return sample_windows(self.tasks[task][0], generator, batch, length)

    def steps_per_epoch(self, batch: int, length: int) -> int:
        """The steps in which as many bytes are read as the first task's text has."""
        return math.ceil(len(self.tasks[0][0]) / (batch * length))

    def evaluate(self, predict: Callable[[Tensor, Tensor], Tensor], length: int) -> dict[str, float]:
        """Bits per byte on held-out windows of each task, also of those not met yet: `bits_per_byte/task-0`."""
        found = {}
        for number, (_, held_out) in enumerate(self.tasks):
            generator = evaluation_generator(1000 * self.seed)
            inputs, targets = sample_windows(held_out, generator, self.examples, length)
            logits = predict(inputs, targets)
            loss = functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
            found[f"bits_per_byte/task-{number}"] = float(loss) / math.log(2)
        return found

    def summarise(self, evaluations: Mapping[int, Mapping[str, float]]) -> dict[str, float]:
        """Backward and forward transfer and forgetting, in bits per byte, from the evaluations after each step, 0 for
        before the first; nothing where the training ended before the last task began, or an evaluation is missing."""
        last = len(self.tasks) - 1
        ends = [0, *(self.steps_per_task * (number + 1) for number in range(last)), max(evaluations, default=0)]
        if ends[-1] <= ends[-2] or not all(end in evaluations for end in ends):
            return {}
        quality = [[-evaluations[end][f"bits_per_byte/task-{task}"] for task in range(last + 1)] for end in ends]
        return transfer(torch.tensor(quality, dtype=torch.float64))._asdict()

    def describe(self) -> str:
        """Which tasks come after which, and what is evaluated; one line each."""
        spelled = "" if self.spellings == 1 else f", then again in {self.spellings - 1} other spellings"
        return (
            f"train: {', then '.join(self.sources)}{spelled}; {self.steps_per_task} outer steps each\n"
            f"evaluation: {self.examples} held-out windows of each of {len(self.tasks)} tasks, seed {self.seed}"
        )


class Transfer(NamedTuple):
    """What a sequence of tasks did to one another, in the unit of the quality."""

    backward_transfer: float
    forward_transfer: float
    forgetting: float


def transfer(quality: Float[Tensor, "before_and_after_each tasks"]) -> Transfer:
    """The three means of the matrix R whose row 0 is the quality before any task, row i that after the i-th."""
    before, after = quality[0], quality[1:]
    last, earlier = after[-1, :-1], after[:-1, :-1]
    return Transfer(
        float((last - earlier.diagonal()).mean()),
        float((after[:-1, 1:].diagonal() - before[1:]).mean()),
        float((earlier.max(0).values - last).mean()),
    )


def _spelling(generator: torch.Generator) -> Int[Tensor, "256"]:
    """A shuffle of the alphabet, the same for capitals; other bytes are themselves."""
    order, spelling = torch.randperm(LETTERS, generator=generator), torch.arange(VOCABULARY)
    for first in (ord("a"), ord("A")):
        spelling[first : first + LETTERS] = first + order
    return spelling


def _respelled(text: UInt8[Tensor, "bytes"], spelling: Int[Tensor, "256"]) -> UInt8[Tensor, "bytes"]:
    return spelling[text.long()].to(torch.uint8)

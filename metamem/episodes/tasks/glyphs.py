"""Task `glyphs`: characters of GNU Unifont, bitmaps of 16 × 16 pixels, told apart after a few distorted examples.

The font is read where a system has it installed (Debian's package `unifont`), and is no part of metamem. A character is
one bitmap: its examples are that bitmap turned, moved, scaled, and with pixels flipped.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from metamem.episodes.registry import EPISODES
from metamem.episodes.tasks.few_shot import FewShot
from metamem.tasks.evaluation import evaluation_generator
from metamem.tasks.text import TaskError

INSTALLED = Path("/usr/share/unifont/unifont.hex")
SIZE = 16


@EPISODES.register("glyphs")
class Glyphs(FewShot):
    """`ways` characters to tell apart from `shots` examples of each; a fifth of all characters is never trained on.

    - `path`        the font's hex file
    - `characters`  how many, drawn once from those that are distinct and not all but empty
    - `turn`, `shift`, `scale`, `flip`   the most that an example is turned (degrees), moved (pixels), scaled (share),
      and the share of its pixels that is flipped
    """

    def __init__(
        self,
        *,
        ways: int = 5,
        shots: int = 1,
        query: int = 5,
        path: str = str(INSTALLED),
        characters: int = 5000,
        turn: float = 20.0,
        shift: float = 2.0,
        scale: float = 0.15,
        flip: float = 0.03,
    ) -> None:
        if min(turn, shift, scale, flip) < 0 or scale >= 1 or flip >= 1:
            raise TaskError("turn, shift, scale and flip must be at least 0, scale and flip below 1")
        every = load(Path(path))
        order = torch.randperm(len(every), generator=evaluation_generator())[:characters]
        self.bitmaps = every[order]
        evaluated, trained = torch.arange(len(order)).tensor_split([len(order) // 5])
        super().__init__(ways, shots, query, trained, evaluated)
        self.turn, self.shift, self.scale, self.flip = turn, shift, scale, flip

    def draw(
        self, generator: torch.Generator, classes: Int[Tensor, "classes"], examples: int
    ) -> Float[Tensor, "classes examples 1 16 16"]:
        """Each character's bitmap, distorted anew for every example."""
        bitmaps = self.bitmaps[classes].repeat_interleave(examples, 0)
        count = len(bitmaps)

        def spread(most: float) -> Tensor:
            return most * (2 * torch.rand(count, generator=generator) - 1)

        angle, zoom = spread(math.radians(self.turn)), 1 + spread(self.scale)
        moves = torch.stack([spread(2 * self.shift / SIZE), spread(2 * self.shift / SIZE)], -1)
        cos, sin = zoom * angle.cos(), zoom * angle.sin()
        maps = torch.stack([torch.stack([cos, -sin], -1), torch.stack([sin, cos], -1)], -2)
        grid = functional.affine_grid(torch.cat([maps, moves[:, :, None]], 2), [count, 1, SIZE, SIZE], False)
        images = functional.grid_sample(bitmaps[:, None], grid, align_corners=False)
        flipped = torch.rand(images.shape, generator=generator) < self.flip
        return torch.where(flipped, 1 - images, images).unflatten(0, (len(classes), examples))

    def describe(self) -> str:
        """The setting."""
        return (
            f"{self.ways} characters, {self.shots} examples of each: of {len(self.trained):,} in training, of "
            f"{len(self.evaluated):,} others evaluated"
        )


def load(path: Path) -> Float[Tensor, "characters 16 16"]:
    """The distinct bitmaps of a hex file, narrow ones in the middle; all but empty ones left out.

    A line is a code point and the rows of its bitmap in hexadecimal digits, 8 or 16 pixels wide.
    """
    if not path.is_file():
        raise TaskError(f"{path}: there is no Unifont; install your system's package of it, or give task.path")
    rows: dict[str, None] = {}
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise TaskError(f"{path}: not a Unifont hex file ({error})") from None
    for number, line in enumerate(lines, start=1):
        _, colon, digits = line.partition(":")
        if not colon or len(digits) not in (32, 64):
            raise TaskError(f"{path}:{number}: not a line of a Unifont hex file, CODE:ROWS")
        rows.setdefault(digits)
    try:
        wide, narrow = (_bitmaps([row for row in rows if len(row) == 4 * width], width) for width in (16, 8))
    except ValueError as error:
        raise TaskError(f"{path}: not a Unifont hex file ({error})") from None
    found = torch.cat([functional.pad(narrow, (4, 4)), wide])
    inked = found.flatten(1).sum(1)
    return found[(inked >= 8) & (inked <= 200)]


def _bitmaps(rows: list[str], width: int) -> Tensor:
    """Hexadecimal rows, all of one length, as pixels [characters, 16, width]."""
    data = torch.frombuffer(bytearray.fromhex("".join(rows)), dtype=torch.uint8) if rows else torch.zeros(0).byte()
    bits = (data[:, None] >> torch.arange(7, -1, -1)) & 1
    return bits.view(len(rows), SIZE, width).float()

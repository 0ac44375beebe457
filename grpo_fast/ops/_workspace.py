"""How many rows a workspace holds at a time: of logits, a chunk, and of their gradients, a section.

In half precision a gradient takes half of the memory that its logits take, and the sum over the rows is read and
written by each product that adds to it. So chunks of logits are short, and sections of several chunks long.

The gradient of a weight in bfloat16 is added up in float32, and that sum is rounded once the last section's memory is
free again. So sections may take what the rounded gradient will, if the workspace is less. And if one section holds
all rows, there is no sum, and it may take what that would have taken more. The bound of the peak is the same: the
sum, and the larger of workspace and rounded gradient.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from grpo_fast.ops._products import gradient_dtype

#: What the logits of a chunk and the gradients of a section may take, in bytes, where the caller does not say.
WORKSPACE_BYTES = 2 * 2**30
#: The share of the logits in that, if they have a gradient in half precision, is one in so many. Shorter chunks are
#: more launches, longer ones leave less for the gradients. Each of two heads' logits may have that share if chunks
#: are short without.
LOGITS_SHARE = 4
#: Matrix products work in tiles. Sections are a multiple of this many rows if there are so many, and chunks of three
#: times as many: cuBLAS has a good tiling for each multiple of 384, and for some others only one that is 20 % slower.
TILE_ROWS = 128
#: If a larger share of a section's rows cannot be sparse, all of them are dense.
DENSE_SHARE = 0.5
#: So too if they would not fit, set aside; one section holds all rows only if it leaves room for this share of them.
LEAST_ASIDE = 0.125
#: So too if sparse rows have more elements than these, on average over a section: those with few, those with many.
#: About so many cost what dense rows do: any at all cost a sum over the weight more.
SHORT_ON_AVERAGE, LONG_ON_AVERAGE = 256, 64
#: What an element takes.
ELEMENT_BYTES = 12
#: Of rows without a gradient more in a chunk gain nothing; nor in a launch, where no logits are kept.
PASSING_ROWS = 9 * TILE_ROWS
LAUNCH_ROWS = 64 * TILE_ROWS


class Sum(NamedTuple):
    """What the gradient of a weight takes, in bytes, beside a buffer of the caller's.

    Attributes:
        rounded: When it is handed out, if another tensor than the sum.
        spared: What the sum takes more, if one product alone would do without.
    """

    rounded: int = 0
    spared: int = 0

    @staticmethod
    def of(weight: Tensor) -> Sum:
        """That of the gradient of ``weight``."""
        kept, total = gradient_dtype(weight).itemsize, torch.float32.itemsize
        return Sum() if kept >= total else Sum(kept * weight.numel(), (total - kept) * weight.numel())


class RowsAtATime(NamedTuple):
    """Of logits, of gradients; and of gradients that stay dense where most are sparse."""

    chunk: int
    section: int
    aside: int = 0


def rows_at_a_time(
    workspace_bytes: int,
    live: int,
    *,
    logits_bytes: int,
    gradient_bytes: int,
    weight_sum: Sum,
    sparse: bool = False,
    models: int = 1,
) -> RowsAtATime:
    """How many rows a workspace of so many bytes holds at a time.

    Args:
        live: How many rows have a gradient.
        logits_bytes: Of a row, with those of other ``models``; 0 if none are kept.
        gradient_bytes: Of a row; 0 if it takes the logits' place.
        sparse: Whether rows of the gradient may be sparse, where no logits are kept.
    """
    room = max(workspace_bytes, weight_sum.rounded)
    chunk = 0
    if logits_bytes > 0:
        chunk = max(room // logits_bytes, 1)
        if live == 0:
            chunk = min(chunk, PASSING_ROWS)
        if live == 0 or gradient_bytes == 0:
            return RowsAtATime(chunk, chunk)
        share = chunk // LOGITS_SHARE
        chunk = _to_tiles(min(max(share, 3 * TILE_ROWS), share * models))
        chunk = max(min(chunk, room // (logits_bytes + gradient_bytes)), 1)
    left = room - chunk * logits_bytes
    left_in_one = left + weight_sum.spared - live * gradient_bytes
    if sparse and logits_bytes == 0:
        elements = (SHORT_ON_AVERAGE + LONG_ON_AVERAGE) * ELEMENT_BYTES
        # Dense rows are set aside, and gone again, before the rounded gradient is there.
        left_aside = left_in_one + weight_sum.rounded - live * elements
        if left_in_one >= 0 and left_aside >= LEAST_ASIDE * live * gradient_bytes:
            aside = min(left_aside // gradient_bytes, int(DENSE_SHARE * live))
            return RowsAtATime(max(live, LAUNCH_ROWS), max(live, 1), aside)
        a_row = (1.0 + DENSE_SHARE) * gradient_bytes + elements
        section = max(int(room / a_row), 1)
        return RowsAtATime(max(section, LAUNCH_ROWS), section, int(DENSE_SHARE * section))
    section = max(left // gradient_bytes, 1)
    if left_in_one >= 0:
        section = max(section, live)
    return RowsAtATime(chunk or max(section, LAUNCH_ROWS), section)


def row_width(weight: Tensor) -> int:
    """How far apart rows of logits of ``weight`` (V, H) lie.

    On a GPU they begin at multiples of 16 bytes, whatever V is. On a CPU torch's product in bfloat16 may read what
    fills them up.
    """
    V = weight.size(0)
    return -(-V // 8) * 8 if weight.is_cuda else V


def _to_tiles(rows: int) -> int:
    """About so many rows, at least 1, that make whole tiles."""
    tile = 3 * TILE_ROWS if rows >= 2 * TILE_ROWS else TILE_ROWS
    return max(rows if rows <= tile // 2 else round(rows / tile) * tile, 1)


def even(rows: int, most: int) -> int:
    """How many rows a part has if there are at most so many in each and, but for tiles, equal numbers."""
    parts = -(-rows // max(-(-rows // most), 1))
    return max(min(-(-parts // TILE_ROWS) * TILE_ROWS, most), 1)


def check_workspace(workspace_bytes: object) -> int:
    """Check a number of bytes, or give the default."""
    if workspace_bytes is None:
        return WORKSPACE_BYTES
    if isinstance(workspace_bytes, bool) or not isinstance(workspace_bytes, int):
        raise TypeError(f"workspace_bytes: got {workspace_bytes!r}, want an int or None")
    if workspace_bytes < 1:
        raise ValueError(f"workspace_bytes: got {workspace_bytes}, want at least 1")
    return workspace_bytes

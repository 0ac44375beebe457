"""How many rows a workspace holds at a time: of logits, a chunk, and of their gradients, a section.

In half precision a gradient takes half of the memory that its logits take, and the sum over the rows is read and
written by each product that adds to it. So chunks of logits are short, and sections of several chunks long.

What an op takes at the most, beyond its inputs, the gradients that it hands out and some numbers a row, is the
workspace. It is not less than the float32 sum of a bfloat16 weight's gradient: before that is rounded the last
section's memory is free again, so sections may have what the rounded gradient takes, and hidden states beside. If one
section holds all rows, there is no sum, and some words' gradients may lie where that of the weight will, until it is
written: borrowed memory. Where rows may be sparse, hidden states and what the sum takes more than the gradient come
on top.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from grpo_fast.ops._products import WAVE_WORDS, gradient_dtype

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
#: What these take, a row.
BYTES_IN_ELEMENTS = 12 * (SHORT_ON_AVERAGE + LONG_ON_AVERAGE)
#: Where words' gradients lie in two places, the first has a multiple of this (kTileWords), and if it can be, of
#: ``WAVE_WORDS``.
TILE_WORDS = 256
#: For so many hidden units the sum's way through memory takes as long as a wave of tiles, on an H100.
SUM_IS_A_WAVE = 6_000
#: Where kernels take hidden states, the gradient of a section's rows is made in bands of no more than these, each
#: beside the product of the next one: as many as one reading of the weight is for (kBandRows).
BAND_ROWS = 2_048
#: With fewer hidden units the products are too short to have that beside them: there is one band.
BAND_HIDDEN_SIZE = 1_024
#: Of rows without a gradient more in a chunk gain nothing; nor in a launch, where no logits are kept.
PASSING_ROWS = 9 * TILE_ROWS
LAUNCH_ROWS = 64 * TILE_ROWS


class Sum(NamedTuple):
    """What the gradient of a weight takes, in bytes, if it is added up in another precision than it is handed out in.

    Attributes:
        rounded: When it is handed out.
        beyond: What the sum takes more.
        words: Of how many words that is.
    """

    rounded: int = 0
    beyond: int = 0
    words: int = 1

    @staticmethod
    def of(weight: Tensor) -> Sum:
        """That of the gradient of ``weight``."""
        kept, total = gradient_dtype(weight).itemsize, torch.float32.itemsize
        if kept >= total:
            return Sum()
        return Sum(kept * weight.numel(), (total - kept) * weight.numel(), weight.size(0))


class RowsAtATime(NamedTuple):
    """Of logits, of gradients; and of gradients that stay dense where most are sparse.

    ``borrowed`` words of a section's gradients, which are those of all rows, lie where that of the weight will.
    """

    chunk: int
    section: int
    aside: int = 0
    borrowed: int = 0


def rows_at_a_time(
    workspace_bytes: int,
    live: int,
    *,
    logits_bytes: int,
    gradient_bytes: int,
    states_bytes: int,
    weight_sum: Sum,
    sparse: bool = False,
    models: int = 1,
) -> RowsAtATime:
    """How many rows a workspace of so many bytes holds at a time.

    Args:
        live: How many rows have a gradient.
        logits_bytes: Of a row, with those of other ``models``; 0 if none are kept.
        gradient_bytes: Of a row of logits; 0 if it takes the logits' place.
        states_bytes: Of a row: hidden states in their order, and their gradient before it is rounded.
        sparse: Whether rows of the gradient may be sparse, where no logits are kept.
    """
    least = 0
    if gradient_bytes > 0:  # beside the sum, a section that takes what the rounded gradient will
        least = weight_sum.rounded // gradient_bytes * states_bytes
    budget = max(workspace_bytes, weight_sum.rounded + weight_sum.beyond + least)
    if sparse and logits_bytes == 0:  # else one section would have no room for dense rows
        budget, states_bytes = max(workspace_bytes, weight_sum.rounded) + weight_sum.beyond, 0
    room = max(budget - weight_sum.beyond, 1)
    a_row = gradient_bytes + states_bytes
    chunk = 0
    if logits_bytes > 0:
        chunk = max(room // (logits_bytes + (states_bytes if gradient_bytes == 0 else 0)), 1)
        if live == 0:
            chunk = min(chunk, PASSING_ROWS)
        if live == 0 or gradient_bytes == 0:
            return RowsAtATime(chunk, chunk)
        share = chunk // LOGITS_SHARE
        chunk = _to_tiles(min(max(share, 3 * TILE_ROWS), share * models))
        chunk = max(min(chunk, room // (logits_bytes + a_row)), 1)
    elif (one := _one_section(budget, live, gradient_bytes, states_bytes, weight_sum, sparse)) is not None:
        return one
    elif sparse:
        dense = (1.0 + DENSE_SHARE) * gradient_bytes + BYTES_IN_ELEMENTS
        section = max(int(room / dense), 1)
        return RowsAtATime(max(section, LAUNCH_ROWS), section, int(DENSE_SHARE * section))
    logits = chunk * logits_bytes
    section = max((room - logits) // a_row, 1)
    if logits + live * a_row <= budget:
        section = max(section, live)
    passing = min(LAUNCH_ROWS, room // max(states_bytes, 1))
    return RowsAtATime(chunk or max(section, passing), section)


def _one_section(
    budget: int, live: int, gradient_bytes: int, states_bytes: int, weight_sum: Sum, sparse: bool
) -> RowsAtATime | None:
    """Of all rows, where no logits are kept, if they fit: with no words' gradients borrowed, or as many as can be."""
    a_word = gradient_bytes * live / weight_sum.words
    most = int(weight_sum.rounded / a_word) - 8 if a_word > 0 else 0  # less what makes a row's part of it even
    most = min(most, weight_sum.words - TILE_WORDS)
    splits = [-(-(weight_sum.words - most) // unit) * unit for unit in (WAVE_WORDS, TILE_WORDS)]
    states, elements = live * states_bytes, live * BYTES_IN_ELEMENTS
    for borrowed in [0] if sparse else [0, *(max(weight_sum.words - split, 0) for split in splits)]:
        left = int(budget - live * gradient_bytes + borrowed * a_word)
        # The products of borrowed words with the hidden states are made before their memory is given back.
        products = borrowed * weight_sum.rounded // weight_sum.words
        if left < max(states, products + states // 2):
            continue
        if not sparse:
            return RowsAtATime(max(live, LAUNCH_ROWS), max(live, 1), borrowed=borrowed)
        # Dense rows are set aside while the section is there, and then beside the sum: before the rounded gradient.
        aside = min(left + weight_sum.rounded, budget - weight_sum.beyond) - elements
        if aside >= LEAST_ASIDE * live * gradient_bytes:
            aside = min(aside // gradient_bytes, int(DENSE_SHARE * live))
            return RowsAtATime(max(live, LAUNCH_ROWS), max(live, 1), aside, borrowed)
    return None


def row_width(words: int, like: Tensor) -> int:
    """How far apart rows of so many logits lie.

    On a GPU they begin at multiples of 16 bytes, whatever that is. On a CPU torch's product in bfloat16 may read what
    fills them up.
    """
    return -(-words // 8) * 8 if like.is_cuda else words


def _to_tiles(rows: int) -> int:
    """About so many rows, at least 1, that make whole tiles."""
    tile = 3 * TILE_ROWS if rows >= 2 * TILE_ROWS else TILE_ROWS
    return max(rows if rows <= tile // 2 else round(rows / tile) * tile, 1)


@functools.lru_cache(1_024)
def section_rows(rows: int, most: int, hidden_size: int) -> int:
    """How many rows a section has, but for the last, if there are at most so many in each.

    cuBLAS computes the hidden states' gradient in tiles of 256 rows and 128 hidden units, an H100 132 of them at a
    time, a wave, of which the last may be all but empty. Each section costs a read and a write of the weight's sum
    besides.
    """
    if rows <= most:
        return max(rows, 1)

    def waves(n: int) -> float:
        tiles = -(-n // 256) * -(-hidden_size // 128)
        return -(-tiles // 132) + hidden_size / SUM_IS_A_WAVE if n > 0 else 0.0

    sizes = [most, *range(most // TILE_ROWS * TILE_ROWS, 0, -TILE_ROWS)]
    best: int = min(sizes, key=lambda n: rows // n * waves(n) + waves(rows % n))
    return best


def band_rows(rows: int, hidden_size: int) -> int:
    """How many rows a band has, but for the last, of so many in a section: in all about as many, by clusters."""
    bands = max(-(-rows // BAND_ROWS), 1) if hidden_size >= BAND_HIDDEN_SIZE else 1
    cluster = BAND_ROWS // 8
    return max(-(-rows // (bands * cluster)) * cluster, 1)


def check_workspace(workspace_bytes: object) -> int:
    """Check a number of bytes, or give the default."""
    if workspace_bytes is None:
        return WORKSPACE_BYTES
    if isinstance(workspace_bytes, bool) or not isinstance(workspace_bytes, int):
        raise TypeError(f"workspace_bytes: got {workspace_bytes!r}, want an int or None")
    if not 1 <= workspace_bytes < 2**63:
        raise ValueError(f"workspace_bytes: got {workspace_bytes}, want at least 1, and less than 2**63")
    return workspace_bytes

"""From hidden states to logits and back, a chunk of rows at a time: how many rows, and the matrix products.

Whoever computes something from logits does, with rows in the order of ``Rows``::

    for rows, live in head.chunks():
        logits = head.logits(rows)              # float32, in memory that every chunk uses again
        ...                                     # write the logits' gradient to head.gradient(rows) if live
        head.backpropagate(rows)                # its products with weight and hidden states, once a section is full

Logits come from the product in float32. Their gradient is rounded to the precision of the product that it enters;
what that gives is added up in float32 and rounded once.

In half precision a gradient takes half of the memory that its logits take, and the sum over the rows is read and
written by each product that adds to it. So chunks of logits are short, and the gradients of several, a section, enter
the products together. Where kernels take hidden states, there are no logits, and a chunk is a section:

    for rows, live in head.chunks():
        ...                                     # from head.states(rows) and head.weight to head.gradient(rows)
        head.backpropagate(rows)
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from grpo_fast.ops._products import add_product, gradient_dtype, product
from grpo_fast.ops._rows import HiddenRows
from grpo_fast.ops._vocabulary_parallel import resolve

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
#: So too if sparse rows have more elements than these, on average over a section: those with few, those with many.
#: About so many cost what dense rows do: any at all cost a sum over the weight more.
SHORT_ON_AVERAGE, LONG_ON_AVERAGE = 256, 64
#: What an element takes.
ELEMENT_BYTES = 12
#: Of rows without a gradient more in a chunk gain nothing; nor in a launch, where no logits are kept.
PASSING_ROWS = 9 * TILE_ROWS
LAUNCH_ROWS = 64 * TILE_ROWS


class Needs(NamedTuple):
    """Which inputs get a gradient. What needs none costs no product."""

    hidden: bool
    weight: bool
    bias: bool


def fake_gradients(
    needs: Needs, hidden: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Tensors like those that ``ChunkedHead.finish`` gives, for the fakes of ops that do."""

    def gradient(x: Tensor | None, needed: bool) -> Tensor:
        if x is None or not needed:
            return weight.new_empty(0)
        return x.new_empty(x.shape, dtype=gradient_dtype(x))

    return gradient(hidden, needs.hidden), gradient(weight, needs.weight), gradient(bias, needs.bias)


class Projection:
    """A head's logits, float32, in memory that every call uses again.

    Args:
        weight: (V, H).
        bias: (V,), or None.
        rows: How many there is memory for.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, rows: int) -> None:
        self._weight, self._bias = weight, bias
        self.logits = weight.new_empty(rows, _row_width(weight), dtype=torch.float32)[:, : weight.size(0)]

    def __call__(self, states: Tensor) -> Tensor:
        """(n, V) of ``states`` (n, H), which are in the precision of the weight."""
        logits = self.logits[: states.size(0)]
        product(states, self._weight.t(), logits)
        if self._bias is not None:
            logits += self._bias
        return logits


class ChunkedHead:
    """A head over chunks of hidden states.

    Args:
        states: The hidden states of the rows, in their order.
        weight: (V, H).
        bias: (V,), or None.
        needs: Which of the three get a gradient.
        workspace_bytes: What the logits of a chunk and the gradients of a section may take.
        weight_grad_out: (V, H) float32 that the weight's gradient is added to; None for a tensor of its own.
        scale: A scalar that the gradients of the logits come multiplied by, so that they do not underflow.
        group: Of ranks that have a shard of the vocabulary each, over which the gradient of ``hidden`` is added up.
        keeps_logits: Whether there are logits in memory.
        sparse: Whether rows of the gradient may be sparse; a ``SparseGradient`` then takes those.
        logits_a_row: How many rows of logits the workspace has for each, with those ``beside`` this head's.
    """

    def __init__(
        self,
        states: HiddenRows,
        weight: Tensor,
        bias: Tensor | None,
        needs: Needs,
        workspace_bytes: int,
        weight_grad_out: Tensor | None = None,
        scale: Tensor | None = None,
        group: str | None = None,
        keeps_logits: bool = True,
        sparse: bool = False,
        logits_a_row: int = 1,
    ) -> None:
        V, H = weight.shape
        hidden = states.hidden
        self.rows = rows = states.rows
        self.dtype = states.dtype
        self._hidden, self._bias = hidden, bias
        self.weight = weight.to(self.dtype)
        self._states = states

        width = _row_width(weight)
        kept_bytes = 4 * width * logits_a_row
        self._chunk_rows = self._section_rows = max(workspace_bytes // kept_bytes, 1)
        if not keeps_logits:
            a_row = float(self.dtype.itemsize * width)
            if sparse:  # what cannot be is set aside
                a_row = (1.0 + DENSE_SHARE) * a_row + (SHORT_ON_AVERAGE + LONG_ON_AVERAGE) * ELEMENT_BYTES
            self._section_rows = max(int(workspace_bytes / a_row), 1)
            self._chunk_rows = max(self._section_rows, LAUNCH_ROWS)
        elif rows.live == 0:
            self._chunk_rows = min(self._chunk_rows, PASSING_ROWS)
        elif self.dtype != torch.float32:
            share = self._chunk_rows // LOGITS_SHARE
            self._chunk_rows = _to_tiles(min(max(share, 3 * TILE_ROWS), share * logits_a_row))
            left = workspace_bytes - kept_bytes * self._chunk_rows
            self._section_rows = max(left // (self.dtype.itemsize * width), self._chunk_rows)
        self._section = slice(0, 0)
        longest = {
            live: max((_length(section) for section, of_live in self._sections() if of_live == live), default=0)
            for live in (True, False)
        }
        self.longest_section = longest[True]
        kept = min(max(longest.values()), self._chunk_rows) if keeps_logits else 0
        self._project = Projection(self.weight, bias, kept)
        self._gradient = self._project.logits  # over the logits, an element in the place of another
        if self.dtype != torch.float32 or not keeps_logits:
            self._gradient = weight.new_empty(longest[True], width, dtype=self.dtype)[:, :V]

        self._scale, self._group = scale, group
        self._reduction: dist.Work | None = None
        self._d_hidden: Tensor | None = None
        self._d_weight: Tensor | None = None
        self._d_bias: Tensor | None = None
        if needs.hidden:
            make = hidden.new_empty if rows.live == rows.count else hidden.new_zeros
            dtype = gradient_dtype(hidden) if group is None else torch.float32
            self._d_hidden = make(rows.count, H, dtype=dtype)
        self.needs = needs
        self._weight_dtype = gradient_dtype(weight)
        self._weight_grad_out = weight_grad_out
        # Added up in float32, unless one product gives it all.
        direct = rows.live <= self._section_rows and self._weight_dtype == self.dtype and not sparse
        self._total_dtype = self._weight_dtype if direct else torch.float32
        if needs.weight and weight_grad_out is not None:
            self._d_weight = weight_grad_out if scale is None else weight_grad_out.mul_(scale)
        if needs.bias:
            self._d_bias = weight.new_zeros(V, dtype=torch.float32)

    def chunks(self) -> Iterator[tuple[slice, bool]]:
        """Consecutive rows whose logits fit the workspace; and whether they get a gradient."""
        for section, live in self._sections():
            self._section, self._x = section, self._states[section]
            for chunk in _steps(section, self._chunk_rows):
                yield chunk, live

    def _sections(self) -> Iterator[tuple[slice, bool]]:
        live = self.rows.live
        for section in _steps(slice(0, live), _even(live, self._section_rows)):
            yield section, True
        for section in _steps(slice(live, self.rows.total), self._chunk_rows):
            yield section, False

    def _within_section(self, rows: slice) -> slice:
        return slice(rows.start - self._section.start, rows.stop - self._section.start)

    def states(self, rows: slice) -> Tensor:
        """(n, H), in the precision of the product."""
        return self._x[self._within_section(rows)]

    def all_states(self) -> Tensor:
        """(live, H), those of every row with a gradient."""
        return self._states[slice(0, self.rows.live)]

    def logits(self, rows: slice) -> Tensor:
        """(n, V) float32, in memory that the next call uses again."""
        return self._project(self.states(rows))

    def beside(self, weight: Tensor, bias: Tensor | None) -> Projection:
        """Another head over the same vocabulary, with memory for the logits of a chunk of rows."""
        return Projection(weight, bias, self._project.logits.size(0))

    def gradient(self, rows: slice) -> Tensor:
        """(n, V), where the gradient of the logits of these rows is to be written."""
        return self._gradient[self._within_section(rows)]

    def backpropagate(self, rows: slice) -> None:
        """Take the gradients of a section to hidden states, weight and bias, when these rows are its last."""
        if rows.stop < self._section.stop:
            return
        gradient = self._gradient[: _length(self._section)]
        if self._d_hidden is not None:
            in_place = self.rows.index is None and self._scale is None
            if in_place and self._d_hidden.dtype in (self.dtype, torch.float32):
                product(gradient, self.weight, self._d_hidden[self._section])
            else:
                self.put_hidden(self._section, self._hidden_rows(gradient))
            if self._section.stop == self.rows.live:
                self._reduce_hidden()  # while the last section's product with the weight is computed
        self._add_to_weight(gradient, self._x)

    def _hidden_rows(self, gradient: Tensor) -> Tensor:
        d_rows = gradient.new_empty(gradient.size(0), self.weight.size(1), dtype=torch.float32)
        product(gradient, self.weight, d_rows)
        if self._scale is not None:
            d_rows /= self._scale
        return d_rows

    def _add_to_weight(self, gradient: Tensor, x: Tensor) -> None:
        if self.needs.weight:
            if self._d_weight is None:
                self._d_weight = self.weight.new_empty(self.weight.shape, dtype=self._total_dtype)
                product(gradient.t(), x, self._d_weight)
            else:
                add_product(gradient.t(), x, self._d_weight)
        if self._d_bias is not None:
            self._d_bias += gradient.sum(0, dtype=torch.float32)

    def put_hidden(self, rows: slice | Tensor, d_rows: Tensor) -> None:
        """Set the gradient of the hidden states of ``rows``, or of the rows of these numbers."""
        assert self._d_hidden is not None
        d_rows, index = d_rows.to(self._d_hidden.dtype), self.rows.index
        if index is not None:
            self._d_hidden.index_copy_(0, index[rows], d_rows)
        elif isinstance(rows, slice):
            self._d_hidden[rows] = d_rows
        else:
            self._d_hidden.index_copy_(0, rows, d_rows)

    def backpropagate_rows(self, gradient: Tensor, which: Tensor) -> None:
        """Take the gradients (n, V) of the rows of these numbers to hidden states, weight and bias."""
        if self.needs.hidden:
            self.put_hidden(which, self._hidden_rows(gradient))
        if self.needs.weight or self.needs.bias:
            self._add_to_weight(gradient, self.all_states().index_select(0, which))

    def weight_total(self) -> tuple[Tensor | None, Tensor]:
        """(the sum so far of the weight's gradient, if any; where to write it with what is added last)."""
        total = self._d_weight
        if total is None or self._weight_grad_out is None:
            self._d_weight = self.weight.new_empty(self.weight.shape, dtype=self._weight_dtype)
        assert self._d_weight is not None
        return total, self._d_weight

    def add_to_bias(self, words: Tensor, values: Tensor) -> None:
        """Add elements of the gradient of the logits to that of the bias."""
        assert self._d_bias is not None
        self._d_bias.index_put_((words,), values, accumulate=True)

    def _reduce_hidden(self) -> None:
        """Begin to add up the hidden states' gradient over the group.

        All of it at once, whichever rows are live: shards of different sizes have different sections.
        """
        if self._group is not None and self._d_hidden is not None:
            self._reduction = dist.all_reduce(self._d_hidden, group=resolve(self._group), async_op=True)

    def finish(self) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients of hidden, weight and bias, in ``gradient_dtype``; empty where there is none to hand out."""
        del self._project, self._gradient  # their memory, before the weight's gradient is rounded
        d_hidden, d_weight, d_bias = (self.weight.new_empty(0) for _ in range(3))
        for total in (self._d_weight, self._d_bias):
            if total is not None and self._scale is not None:
                total /= self._scale
        if self._d_hidden is not None:
            if self.rows.live == 0:
                self._reduce_hidden()
            if self._reduction is not None:
                self._reduction.wait()
            d_hidden = self._d_hidden.view(self._hidden.shape)
        if self.needs.weight and self._weight_grad_out is None:
            total = self.weight.new_zeros(self.weight.shape) if self._d_weight is None else self._d_weight
            d_weight = total.to(self._weight_dtype)
        if self._d_bias is not None and self._bias is not None:
            d_bias = self._d_bias.to(gradient_dtype(self._bias))
        return d_hidden, d_weight, d_bias


def _row_width(weight: Tensor) -> int:
    """How far apart rows of logits of ``weight`` (V, H) lie.

    On a GPU they begin at multiples of 16 bytes, whatever V is. On a CPU torch's product in bfloat16 may read what
    fills them up.
    """
    V = weight.size(0)
    return -(-V // 8) * 8 if weight.is_cuda else V


def _length(rows: slice) -> int:
    return int(rows.stop - rows.start)


def _to_tiles(rows: int) -> int:
    """About so many rows, at least 1, that make whole tiles."""
    tile = 3 * TILE_ROWS if rows >= 2 * TILE_ROWS else TILE_ROWS
    return max(rows if rows < tile // 2 else round(rows / tile) * tile, 1)


def _even(rows: int, most: int) -> int:
    """How many rows a part has if there are at most so many in each and, but for tiles, equal numbers."""
    even = -(-rows // max(-(-rows // most), 1))
    return max(min(-(-even // TILE_ROWS) * TILE_ROWS, most), 1)


def _steps(rows: slice, size: int) -> Iterator[slice]:
    """``rows`` in parts of so many."""
    for start in range(rows.start, rows.stop, size):
        yield slice(start, min(start + size, rows.stop))


def check_workspace(workspace_bytes: object) -> int:
    """Check a number of bytes, or give the default."""
    if workspace_bytes is None:
        return WORKSPACE_BYTES
    if isinstance(workspace_bytes, bool) or not isinstance(workspace_bytes, int):
        raise TypeError(f"workspace_bytes: got {workspace_bytes!r}, want an int or None")
    if workspace_bytes < 1:
        raise ValueError(f"workspace_bytes: got {workspace_bytes}, want at least 1")
    return workspace_bytes


def wanted(*inputs: Tensor | None) -> list[bool]:
    """Which of the inputs a backward will ask for a gradient of."""
    return [x is not None and x.requires_grad and torch.is_grad_enabled() for x in inputs]

"""From hidden states to logits and back, a chunk of rows at a time: the matrix products.

Whoever computes something from logits does, with rows in the order of ``Rows``::

    for rows, live in head.chunks():
        logits = head.logits(rows)              # float32, in memory that every chunk uses again
        ...                                     # write the logits' gradient to head.gradient(rows)[0] if live
        head.backpropagate(rows)                # its products with weight and hidden states, once a section is full

Logits come from the product in float32. Their gradient is rounded to the precision of the product that it enters;
what that gives is added up in float32 and rounded once.

The gradients of several chunks, a section, enter the products together; ``_workspace.py`` says how many rows either
has. Where kernels take hidden states, there are no logits, and a chunk is a section, or a band of one, whose gradient
may come as late as its section ends. A section of all rows may have its gradients in two parts, of the first words
and of the rest (``_section.py``):

    for rows, live in head.chunks():
        ...                                     # from head.states(rows) and head.weight to head.gradient(rows)
        if head.ends_section(rows):
            ...                                 # what is still to be there
        head.backpropagate(rows)
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from grpo_fast.ops._products import (
    add_product,
    gradient_dtype,
    is_one_product,
    product,
    products_by_words,
    sum_of_products,
)
from grpo_fast.ops._rows import HiddenRows
from grpo_fast.ops._section import Section
from grpo_fast.ops._vocabulary_parallel import resolve
from grpo_fast.ops._workspace import RowsAtATime, Sum, band_rows, row_width, rows_at_a_time, section_rows


class Needs(NamedTuple):
    """Which inputs get a gradient. What needs none costs no product."""

    hidden: bool
    weight: bool
    bias: bool


def fake_gradients(
    needs: Needs, hidden: Tensor, weight: Tensor, bias: Tensor | None, hidden_in_float32: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Tensors like those that ``ChunkedHead.finish`` gives, for the fakes of ops that do."""

    def gradient(x: Tensor | None, needed: bool, dtype: torch.dtype | None = None) -> Tensor:
        if x is None or not needed:
            return weight.new_empty(0)
        return x.new_empty(x.shape, dtype=dtype or gradient_dtype(x))

    d_hidden = gradient(hidden, needs.hidden, torch.float32 if hidden_in_float32 else None)
    return d_hidden, gradient(weight, needs.weight), gradient(bias, needs.bias)


def plan(
    workspace_bytes: int,
    rows: int,
    weight: Tensor,
    dtype: torch.dtype,
    *,
    logits_a_row: int,
    own_sum: bool,
    sparse: bool,
) -> RowsAtATime:
    """How many rows at a time a workspace holds of ``rows`` with a gradient, with products in ``dtype``.

    Args:
        logits_a_row: How many rows of logits there are for each; 0 where none are in memory.
        own_sum: Whether the gradient of ``weight`` is added up in memory of its own.
    """
    V, H = weight.shape
    width = row_width(V, weight)
    in_place = logits_a_row > 0 and dtype == torch.float32  # an element in the place of another
    return rows_at_a_time(
        workspace_bytes,
        rows,
        logits_bytes=4 * width * logits_a_row,
        gradient_bytes=0 if in_place else dtype.itemsize * width,
        states_bytes=(2 * dtype.itemsize + 4) * H,
        weight_sum=Sum.of(weight) if own_sum else Sum(),
        sparse=sparse,
        models=logits_a_row,
    )


def section_of_all(
    workspace_bytes: int, rows: int, weight: Tensor, dtype: torch.dtype, *, own_sum: bool, sparse: bool
) -> Section | None:
    """Memory for the gradients of all rows at once, where no logits are in memory; None if the workspace is less."""
    found = plan(workspace_bytes, rows, weight, dtype, logits_a_row=0, own_sum=own_sum, sparse=sparse)
    return None if found.section < rows else Section.empty(weight, rows, dtype, found.borrowed)


class Projection:
    """A head's logits, float32, in memory that every call uses again.

    Args:
        weight: (V, H).
        bias: (V,), or None.
        rows: How many there is memory for.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, rows: int) -> None:
        self._weight, self._bias = weight, bias
        self.logits = Section.empty(weight, rows, torch.float32).parts[0]

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
        workspace_bytes: What the logits of a chunk and the gradients of a section may take (``_workspace.py``).
        weight_grad_out: (V, H) float32 that the weight's gradient is added to; None for a tensor of its own.
        scale: A scalar that the gradients of the logits come multiplied by, so that they do not underflow.
        group: Of ranks that have a shard of the vocabulary each, over which the gradient of ``hidden`` is added up.
        hidden_in_float32: Whether the gradient of ``hidden`` is kept in float32, because it will be scaled.
        logits_a_row: How many rows of logits the workspace has for each, with those ``beside`` this head's; 0 where
            there are none.
        sparse: Whether rows of the gradient may be sparse; a ``SparseGradient`` then takes those.
        section: ``section_of_all`` rows, or of more; None if there is to be one here.
        first_band: If sections are in bands, how many rows the first of these has, where one section is of all rows;
            0 if that is not settled.
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
        hidden_in_float32: bool = False,
        logits_a_row: int = 1,
        sparse: bool = False,
        section: Section | None = None,
        first_band: int | None = None,
    ) -> None:
        V, H = weight.shape
        hidden = states.hidden
        self.rows = rows = states.rows
        self.dtype = states.dtype
        self._hidden, self._bias = hidden, bias
        self.weight = weight.to(self.dtype)
        self._states = states

        chunk, most, self.aside_rows, borrowed = plan(
            workspace_bytes,
            rows.live if section is None else section.own.size(0),
            weight,
            self.dtype,
            logits_a_row=logits_a_row,
            own_sum=needs.weight and weight_grad_out is None,
            sparse=sparse,
        )
        if section is not None:
            chunk, most = max(chunk, rows.live), max(rows.live, 1)
        self._chunk_rows, self._section_rows, self._first_band = chunk, most, first_band
        self._part = slice(0, 0)
        longest = {
            live: max((_length(part) for part, of_live in self._sections() if of_live == live), default=0)
            for live in (True, False)
        }
        self.longest_section = longest[True]
        self._project = Projection(self.weight, bias, min(max(longest.values()), chunk) if logits_a_row > 0 else 0)
        self._in_place = logits_a_row > 0 and self.dtype == torch.float32
        if self._in_place:
            logits = self._project.logits  # whose place the gradient takes
            section = Section(logits, logits.new_empty(0), (logits,))
        self._section = section or Section.empty(weight, longest[True], self.dtype, borrowed)

        self._scale, self._group = scale, group
        self._reduction: dist.Work | None = None
        self._d_hidden: Tensor | None = None
        self._d_weight: Tensor | None = None
        self._d_bias: Tensor | None = None
        if needs.hidden:
            make = hidden.new_empty if rows.live == rows.count else hidden.new_zeros
            in_float32 = hidden_in_float32 or group is not None
            dtype = torch.float32 if in_float32 else gradient_dtype(hidden)
            self._d_hidden = make(rows.count, H, dtype=dtype)
        self.needs = needs
        self._weight_dtype = gradient_dtype(weight)
        self._weight_grad_out = weight_grad_out
        if needs.weight and weight_grad_out is not None:
            self._d_weight = weight_grad_out if scale is None else weight_grad_out.mul_(scale)
        if needs.bias:
            self._d_bias = weight.new_zeros(V, dtype=torch.float32)

    def chunks(self) -> Iterator[tuple[slice, bool]]:
        """Consecutive rows whose logits fit the workspace; and whether they get a gradient."""
        for section, live in self._sections():
            if not live and not self._in_place:
                self._section.release()  # its last gradients are done with
            self._part, self._x = section, self._states[section]
            if live and self._first_band is not None:
                chunks = _bands(section, self._first_band, self.weight.size(1))
            else:
                chunks = _steps(section, self._chunk_rows)
            for chunk in chunks:
                yield chunk, live

    def _sections(self) -> Iterator[tuple[slice, bool]]:
        live = self.rows.live
        for section in _steps(slice(0, live), section_rows(live, self._section_rows, self.weight.size(1))):
            yield section, True
        for section in _steps(slice(live, self.rows.total), self._chunk_rows):
            yield section, False

    def _within_section(self, rows: slice) -> slice:
        return slice(rows.start - self._part.start, rows.stop - self._part.start)

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

    def gradient(self, rows: slice) -> tuple[Tensor, ...]:
        """(n, words) each, where the gradient of the logits of these rows is to be written; together all words.

        One, where there are logits.
        """
        return self._section[self._within_section(rows)]

    def ends_section(self, rows: slice) -> bool:
        """Whether these rows are the last of a section."""
        return bool(rows.stop == self._part.stop)

    def backpropagate(self, rows: slice) -> None:
        """Take the gradients of a section to hidden states, weight and bias, when these rows are its last."""
        if not self.ends_section(rows):
            return
        gradient = self._section[self._within_section(self._part)]
        if self._d_hidden is not None:
            to = self._d_hidden.dtype
            in_place = self.rows.index is None and self._scale is None
            if in_place and (to == torch.float32 or (to == self.dtype and is_one_product(gradient))):
                sum_of_products(gradient, self.weight, self._d_hidden[self._part])
            else:
                self.put_hidden(self._part, self._hidden_rows(gradient))
            if self._part.stop == self.rows.live:
                self._reduce_hidden()  # while the last section's product with the weight is computed
        # Added up in float32, unless this product gives it all.
        alone = _length(self._part) == self.rows.live and self._weight_dtype == self.dtype
        self._add_to_weight(gradient, self._x, self._weight_dtype if alone else torch.float32)

    def _hidden_rows(self, gradient: tuple[Tensor, ...]) -> Tensor:
        d_rows = self.weight.new_empty(gradient[0].size(0), self.weight.size(1), dtype=torch.float32)
        sum_of_products(gradient, self.weight, d_rows)
        if self._scale is not None:
            d_rows /= self._scale
        return d_rows

    def _add_to_weight(self, gradient: tuple[Tensor, ...], x: Tensor, total_dtype: torch.dtype) -> None:
        if self._d_bias is not None:
            self._d_bias += torch.cat([part.sum(0, dtype=torch.float32) for part in gradient])
        if self.needs.weight:
            if self._d_weight is None:
                self._d_weight = self._weight_products(gradient, x, total_dtype)
            else:
                (whole,) = gradient  # only one section of all rows has two parts
                add_product(whole.t(), x, self._d_weight)

    def _weight_products(self, gradient: tuple[Tensor, ...], x: Tensor, dtype: torch.dtype) -> Tensor:
        """gradient^T x, in memory that the gradient of the last words gives back if it had borrowed it."""
        first, rest = gradient[:1], gradient[1:]
        split = first[0].size(1)
        of_rest = self.weight.new_empty(self.weight.size(0) - split, x.size(1), dtype=dtype)
        products_by_words(rest, x, of_rest)
        self._section.give_back()
        d_weight = self.weight.new_empty(self.weight.shape, dtype=dtype)
        products_by_words(first, x, d_weight[:split])
        d_weight[split:] = of_rest
        return d_weight

    def put_hidden(self, rows: slice | Tensor, d_rows: Tensor) -> None:
        """Set the gradient of the hidden states of ``rows``, or of the rows of these numbers."""
        assert self._d_hidden is not None
        if self.rows.index is not None:
            rows = self.rows.index[rows]
        if isinstance(rows, slice):
            self._d_hidden[rows] = d_rows
        else:
            self._d_hidden.index_copy_(0, rows, d_rows.to(self._d_hidden.dtype))

    def backpropagate_rows(self, gradient: Tensor, which: Tensor) -> None:
        """Take the gradients (n, V) of the rows of these numbers to hidden states, weight and bias."""
        if self.needs.hidden:
            self.put_hidden(which, self._hidden_rows((gradient,)))
        if self.needs.weight or self.needs.bias:
            self._add_to_weight((gradient,), self.all_states().index_select(0, which), torch.float32)

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

    def release(self) -> None:
        """Give back the memory of logits and gradients, whoever still holds a part of it."""
        self._section.release()
        self._project.logits.untyped_storage().resize_(0)

    def finish(self) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients of hidden, weight and bias, in the precision kept; empty where there is none to hand out."""
        self.release()  # before the weight's gradient is rounded
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
            if self._d_weight is None:
                self._d_weight = self.weight.new_zeros(self.weight.shape, dtype=self._weight_dtype)
            d_weight = self._d_weight.to(self._weight_dtype)
        if self._d_bias is not None and self._bias is not None:
            d_bias = self._d_bias.to(gradient_dtype(self._bias))
        return d_hidden, d_weight, d_bias


def _length(rows: slice) -> int:
    return int(rows.stop - rows.start)


def _steps(rows: slice, size: int) -> Iterator[slice]:
    """``rows`` in parts of so many."""
    for start in range(rows.start, rows.stop, size):
        yield slice(start, min(start + size, rows.stop))


def _bands(section: slice, first: int, hidden_size: int) -> Iterator[slice]:
    """A section in bands, the first one of so many rows unless that is 0."""
    rest = slice(min(section.start + first, section.stop), section.stop)
    if first > 0:
        yield slice(section.start, rest.start)
    yield from _steps(rest, band_rows(_length(rest), hidden_size))


def wanted(*inputs: Tensor | None) -> list[bool]:
    """Which of the inputs a backward will ask for a gradient of."""
    return [x is not None and x.requires_grad and torch.is_grad_enabled() for x in inputs]

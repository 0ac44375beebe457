"""Which rows of a batch are projected, in which order, and their hidden states."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """Which of N rows are projected: ``total`` of them, the first ``live`` with a gradient.

    Attributes:
        index: (total,) their numbers; None for all N as they lie.
        mask: (N,) bool, what counts among them; None where everything does.
    """

    count: int
    live: int
    total: int
    index: Tensor | None = None
    mask: Tensor | None = None

    @staticmethod
    def choose(count: int, mask: Tensor | None, live: Tensor | None, *, gradient: bool, wait: bool) -> Rows:
        """Those of ``Choice``, at once."""
        return Choice.begin(count, mask, live, gradient=gradient, wait=wait).rows

    def take(self, x: Tensor) -> Tensor:
        """These rows of ``x`` (N, ...)."""
        return x if self.index is None else x.index_select(0, self.index)

    def spread(self, x: Tensor) -> Tensor:
        """``x`` (k, total) as (k, N), with 0 for the rows that are not among these."""
        if self.index is None:
            return x
        return x.new_zeros(x.size(0), self.count).index_copy(1, self.index, x)


@dataclass(frozen=True)
class Choice:
    """``Rows`` in the making: how many there are the GPU knows first, and the host once it has to.

    Attributes:
        mask: (count,) bool, what counts among all rows if nothing is chosen.
        places: (count,) int8, 2 for rows that come first, 1 for others that are projected, 0 for the rest; None if
            nothing is chosen.
        numbers: (2,) int64, how many there are with a gradient, and with or without.
        read: Those numbers, for which the host waits; None if nothing is chosen.
    """

    count: int
    gradient: bool
    mask: Tensor | None = None
    places: Tensor | None = None
    numbers: Tensor | None = None
    read: Callable[[], list[int]] | None = None

    @staticmethod
    def begin(count: int, mask: Tensor | None, live: Tensor | None, *, gradient: bool, wait: bool) -> Choice:
        """Those that ``mask`` (count,) keeps, and of these, if there is a gradient, the ``live`` (count,) ones first.

        The host has to ``wait`` for the GPU once to know how many there are. If it may not, all rows are taken.
        """
        if not gradient:
            live = None
        if not wait or (mask is None and live is None):
            return Choice(count, gradient, mask)
        if live is None:
            assert mask is not None
            places = mask.to(torch.int8)
            total = places.sum()
            numbers = torch.stack([total if gradient else torch.zeros_like(total), total])
        else:
            first = live if mask is None else live & mask
            places = first.to(torch.int8) + (1 if mask is None else mask.to(torch.int8))
            numbers = torch.stack([(places == 2).sum(), (places > 0).sum()])
        return Choice(count, gradient, None, places, numbers, begin_to_read(numbers))

    @functools.cached_property
    def order(self) -> Tensor | None:
        """(count,) the numbers of all rows, by their places; None for all as they lie."""
        return None if self.places is None else self.places.argsort(descending=True, stable=True)

    @property
    def all(self) -> Rows:
        """All rows by their places, none with a gradient as yet."""
        return Rows(self.count, 0, self.count, self.order, self.mask)

    @property
    def first(self) -> int:
        """How many have a gradient; waits if something was chosen."""
        return self._read[0]

    @functools.cached_property
    def _read(self) -> list[int]:
        return [self.count if self.gradient else 0, self.count] if self.read is None else self.read()

    @functools.cached_property
    def rows(self) -> Rows:
        """They themselves; waits if something was chosen."""
        first, total = self._read
        if self.places is None:
            return Rows(self.count, first, total, mask=self.mask)
        if total == self.count and first in (0, total):
            return Rows(self.count, first, total)
        assert self.order is not None
        return Rows(self.count, first, total, index=self.order[:total])


def as_rows(hidden: Tensor) -> Tensor:
    """Hidden states (..., H), or their gradient, as (B, T, H), which leaves the strides of these two alone."""
    while hidden.dim() < 3:
        hidden = hidden.unsqueeze(0)
    return hidden.flatten(0, -3)


def may_wait(allow_sync: bool, x: Tensor) -> bool:
    """Whether the host may wait for the GPU: not while a CUDA graph is being captured."""
    return allow_sync and not (x.device.type == "cuda" and torch.cuda.is_current_stream_capturing())


def begin_to_read(x: Tensor) -> Callable[[], list[int]]:
    """Begin to copy ``x`` (n,) int64 to the host; what is returned waits for that alone, not for what follows."""
    if not x.is_cuda:
        return x.tolist
    there = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
    there.copy_(x, non_blocking=True)
    copied = torch.cuda.current_stream(x.device).record_event()

    def read() -> list[int]:
        copied.synchronize()
        return there.tolist()

    return read


class HiddenRows:
    """Rows of hidden states, in an order and in the precision of a product.

    Rows that do not count are 0, whatever they hold.

    Args:
        hidden: (B, T, H), any strides; the rows are its N = B T positions.
        rows: Which rows, in which order.
        dtype: That of the product.
        found: (any, H), these rows and perhaps more, where they have been looked up already.
    """

    def __init__(self, hidden: Tensor, rows: Rows, dtype: torch.dtype, found: Tensor | None = None) -> None:
        self.hidden, self.rows, self.dtype = hidden, rows, dtype
        self._found = found
        # Where sequences follow each other without a gap, rows are a view.
        follow = hidden.size(0) == 1 or hidden.stride(0) == hidden.size(1) * hidden.stride(1)
        self._flat = hidden.flatten(0, 1) if follow else None
        self._mask = None if rows.mask is None else rows.take(rows.mask)

    def __getitem__(self, part: slice) -> Tensor:
        """(n, H)"""
        if self._found is not None:
            return self._found[part]
        numbers = None if self.rows.index is None else self.rows.index[part]
        if self._flat is not None:
            x = self._flat[part] if numbers is None else self._flat.index_select(0, numbers)
        else:
            if numbers is None:
                numbers = torch.arange(part.start, part.stop, device=self.hidden.device)
            T = self.hidden.size(1)
            x = self.hidden[numbers // T, numbers % T]
        if self._mask is not None:
            x = torch.where(self._mask[part, None], x, 0.0)
        return x.to(self.dtype)

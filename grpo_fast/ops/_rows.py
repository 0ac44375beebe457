"""Which rows of a batch are projected, in which order, and their hidden states."""

from __future__ import annotations

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
        """Those that ``mask`` (count,) keeps, and of these, if there is a gradient, the ``live`` (count,) ones first.

        The host has to ``wait`` for the GPU once to know how many there are. If it may not, all rows are taken.
        """
        if not gradient:
            live = None
        if not wait or (mask is None and live is None):
            return Rows(count, count if gradient else 0, count, mask=mask)
        if live is None:
            assert mask is not None
            index = mask.nonzero().squeeze(-1)
            total = index.numel()
            first = total if gradient else 0
            return Rows(count, first, total, index=None if total == count else index)
        if mask is None:
            first, total = int(live.sum()), count
        else:
            live = live & mask
            first, total = torch.stack([live.sum(), mask.sum()]).tolist()
        if total == count and first in (0, count):
            return Rows(count, first, total)
        order = 1 - live.to(torch.int8)
        if mask is not None:
            order += 1 - mask.to(torch.int8)
        index = order.argsort(stable=True)
        return Rows(count, first, total, index=index[:total])

    def among(self, projected: Tensor | None, total: int, mask: Tensor) -> Rows:
        """The ``total`` rows that ``projected`` keeps, of which those in ``mask``, which these are, count."""
        index = None
        if projected is not None and total < self.count:
            index = torch.nonzero_static(projected, size=total).squeeze(1)
        all_count = self.mask is None and self.total == total
        return Rows(self.count, total, total, index, None if all_count else mask)

    def take(self, x: Tensor) -> Tensor:
        """These rows of ``x`` (N, ...)."""
        return x if self.index is None else x.index_select(0, self.index)

    def spread(self, x: Tensor) -> Tensor:
        """``x`` (k, total) as (k, N), with 0 for the rows that are not among these."""
        if self.index is None:
            return x
        return x.new_zeros(x.size(0), self.count).index_copy(1, self.index, x)


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
    """

    def __init__(self, hidden: Tensor, rows: Rows, dtype: torch.dtype) -> None:
        self.hidden, self.rows, self.dtype = hidden, rows, dtype
        # Where sequences follow each other without a gap, rows are a view.
        follow = hidden.size(0) == 1 or hidden.stride(0) == hidden.size(1) * hidden.stride(1)
        self._flat = hidden.flatten(0, 1) if follow else None
        self._mask = None if rows.mask is None else rows.take(rows.mask)

    def __getitem__(self, part: slice) -> Tensor:
        """(n, H)"""
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

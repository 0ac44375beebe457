"""Gradients of peaked rows of logits as few of their elements, and the products that these enter.

A product with a dense row costs 4 V H operations, whatever the row holds; a sparse one reads a row of the weight and
one of the hidden states for each element. Rows with too many elements stay dense.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from grpo_fast.ops._chunks import ChunkedHead
from grpo_fast.ops._row_kernels import LinearKernels
from grpo_fast.ops._rows import begin_to_read
from grpo_fast.ops._workspace import DENSE_SHARE, LONG_ON_AVERAGE, SHORT_ON_AVERAGE

#: Elements of a short row and of a long one at most. Any dense row costs a sum over the weight, so a few long rows
#: are better sparse; if there are many, they are dense.
SHORT, LONG = 512, 16_384
#: The longest row that a block can search (kSparseWords).
MOST_WORDS = 262_144


class Buffers(NamedTuple):
    """Memory, and what does not depend on the rows.

    Attributes:
        keys, values: The pool, where a section's elements go: their words and rows as one number, to sort by; and
            their values.
        least_keys: (V + 1,), the least that a word can have, and one behind the last word.
    """

    keys: Tensor
    values: Tensor
    least_keys: Tensor


class SparseGradient:
    """Takes from a head's sections the rows that are sparse.

    Of each section the host waits for its totals: whether enough of it is sparse, and whether its long rows are.
    Meanwhile the GPU takes the rows to the hidden states, in vain if they are not, and elements are copied once the
    next section's product is under way: the GPU is not to wait for the host. Dense rows are set aside until there are
    many, so that most calls have one product with them, if any.

    Args:
        head: What they come from, and what their products go to.
        sum_of_rows: The kernel of a product with sparse rows.
        tolerance: The expected error of a section's gradient, in the L2 norm relative to itself.
    """

    def __init__(self, head: ChunkedHead, sum_of_rows: Callable[..., Any], tolerance: float) -> None:
        self._head, self._sum_of_rows, self._tolerance = head, sum_of_rows, tolerance
        self._dense = False
        self._taken: list[tuple[Tensor, Tensor]] = []
        self._last: list[tuple[Tensor, Tensor]] = []  # the last section's elements, still in the pool
        self._aside: Tensor | None = None  # gradients of dense rows
        self._numbers: list[Tensor] = []  # of those rows

    @functools.cached_property
    def _buffers(self) -> Buffers:
        """Made when the first product is under way."""
        V, room = self._head.weight.size(0), (SHORT_ON_AVERAGE + LONG_ON_AVERAGE) * self._head.longest_section
        return Buffers(
            keys=self._head.weight.new_empty(room, dtype=torch.int64),
            values=self._head.weight.new_empty(room, dtype=torch.float32),
            least_keys=torch.arange(0, (V << 32) + 1, 1 << 32, device=self._head.weight.device),
        )

    def backpropagate(self, part: slice, exponentials: Any) -> None:
        """Take a section to hidden states, weight and bias."""
        self._taken += [(keys.clone(), values.clone()) for keys, values in self._last]
        self._last.clear()
        if self._dense or not self._take(part, exponentials):
            self._dense = True  # and so, very likely, are the next ones
            exponentials.gradient()
            self._head.backpropagate(part)

    def _take(self, part: slice, exponentials: Any) -> bool:
        """Take a section unless most of it is too flat."""
        n = part.stop - part.start
        room = border, _ = SHORT_ON_AVERAGE * n, LONG_ON_AVERAGE * n
        most_dense = min(int(DENSE_SHARE * n), self._head.aside_rows)
        keys, values = (x[: sum(room)] for x in self._buffers[:2])
        found = exponentials.sparse(
            self._tolerance,
            keys,
            values,
            first_row=part.start,
            most=(SHORT, LONG),
            room=room,
            most_dense=most_dense,
        )
        starts, ends, needs, weight = found.starts, found.ends, self._head.needs, self._head.weight
        totals = begin_to_read(found.totals)
        if needs.hidden:
            d_rows = weight.new_empty(n, weight.size(1))
            self._sum_of_rows(d_rows, starts, ends, _words(keys), values, weight, limits=found.limits)
            self._head.put_hidden(part, d_rows)  # 0 for dense rows, until they are taken there
        in_short, in_long, longs, dense = totals()
        if in_long > room[1]:  # there is none for all long rows: they are dense
            ends = torch.where(ends - starts > SHORT, starts - 1, ends)
            in_long, dense = 0, dense + longs
        if in_short > room[0] or dense > most_dense:
            return False
        if (needs.weight or needs.bias) and in_short + in_long > 0:
            lot = slice(border - in_short, border + in_long)
            self._last = [(keys[lot], values[lot])]
        if dense > 0:
            which = torch.nonzero_static(ends < starts, size=dense).squeeze(1)
            exponentials.gradient(which)
            (gradient,) = self._head.gradient(part)
            self._set_aside(gradient, which, part.start)
        return True

    def _set_aside(self, gradient: Tensor, which: Tensor, first_row: int) -> None:
        if self._aside is None:
            last = first_row + gradient.size(0) == self._head.rows.live
            most = which.numel() if last else self._head.aside_rows
            self._aside = gradient.new_empty(most, gradient.stride(0))[:, : gradient.size(1)]
        before = sum(x.numel() for x in self._numbers)
        if before + which.numel() > self._aside.size(0):
            self._backpropagate_aside()
            before = 0
        torch.index_select(gradient, 0, which, out=self._aside[before : before + which.numel()])
        self._numbers.append(which + first_row)

    def _backpropagate_aside(self) -> None:
        """Take what is set aside to hidden states, weight and bias."""
        if self._aside is not None:
            numbers = _joined(self._numbers)
            self._head.backpropagate_rows(self._aside[: numbers.numel()], numbers)
        self._numbers.clear()

    def finish(self) -> None:
        """Add what was taken to the gradients of weight and bias, in the order of the words, then of the rows.

        But for what was raised: small elements have no common direction here, as they have in the hidden states'
        gradient, and are less of an error if they are left out.
        """
        found = [*self._taken, *self._last]
        self._taken.clear()
        self._last.clear()
        self._head.release()
        self._backpropagate_aside()
        self._aside = None  # its memory, before the elements are sorted
        if not found:
            return
        keys, values = (_joined(x) for x in zip(*found, strict=True))
        least_keys = self._buffers.least_keys
        del found, self._buffers  # the pool's memory, once the elements are sorted
        keys, order = keys.sort()
        values = values[order]
        if self._head.needs.weight:
            total, d_weight = self._head.weight_total()
            bounds = torch.searchsorted(keys, least_keys)  # raised ones are negative, ahead of all
            states = self._head.all_states()
            self._sum_of_rows(d_weight, bounds[:-1], bounds[1:], _rows(keys), values, states, total)
        if self._head.needs.bias:
            words = _words(keys) & (2**31 - 1)  # each its own: if all were one, a warp would have to add them up
            self._head.add_to_bias(words.long(), values.where(keys >= 0, 0.0))


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def _rows(keys: Tensor) -> Tensor:
    return keys.view(torch.int32)[0::2]


def _words(keys: Tensor) -> Tensor:
    return keys.view(torch.int32)[1::2]


def sparse_gradient(
    head: ChunkedHead, linear: LinearKernels | None, tolerance: float | None, wait: bool
) -> SparseGradient | None:
    """That of ``head`` if there is a ``tolerance`` and something needs a gradient; the host must be able to wait."""
    if tolerance is None or not any(head.needs):
        return None
    if linear is None:
        raise ValueError(
            f"sparse_grad_tol: got {tolerance} not on Hopper, or where a row of hidden or weight does not begin at a "
            f"multiple of 16 bytes, want None"
        )
    if not wait:
        raise ValueError(f"sparse_grad_tol: got {tolerance} while a CUDA graph is captured, want None")
    return SparseGradient(head, linear.sum_of_rows, tolerance)


def check_sparse_grad_tol(
    value: object,
    hidden: Tensor,
    weight: Tensor,
    *,
    impl: str,
    allow_sync: bool,
    weight_grad_out: Tensor | None = None,
    **excluded: Any,
) -> None:
    """Check the tolerance, and that nothing is asked for that sparse gradients lack."""
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"sparse_grad_tol: got {value!r}, want a number or None")
    if not 1e-4 <= value <= 0.1:
        raise ValueError(f"sparse_grad_tol: got {value}, want from 1e-4 to 0.1")
    V, H = weight.shape
    dtypes = f"{hidden.dtype} and {weight.dtype}".replace("torch.", "")
    for fits, got, want in (
        (impl == "cuda", f"impl={impl!r}", "impl='cuda' on Hopper"),
        (hidden.dtype == weight.dtype == torch.bfloat16, dtypes, "bfloat16"),
        (V <= MOST_WORDS, f"a vocabulary of {V}", f"at most {MOST_WORDS}"),
        (H % 8 == 0, f"H={H}", "a multiple of 8"),
        (allow_sync, "allow_sync=False", "allow_sync=True"),
        (weight_grad_out is None or weight_grad_out.is_contiguous(), "a strided weight_grad_out", "a contiguous one"),
        *((not given, name, "only one of the two") for name, given in excluded.items()),
    ):
        if not fits:
            raise ValueError(f"sparse_grad_tol: got {value} with {got}, want None, or {want}")

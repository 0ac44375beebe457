"""Gradients of peaked rows of logits as their largest elements, and the products that these enter.

A product with a dense row costs 4 V H operations, whatever the row holds; a sparse one reads a row of the weight and
one of the hidden states for each element. Rows with too many elements stay dense.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from grpo_fast.ops._chunks import DENSE_SHARE, ChunkedHead
from grpo_fast.ops._row_kernels import LinearKernels

#: Elements for which every row has room, and for which one in ROWS_A_WIDE_ONE rows has. A section with any dense row
#: pays for a sum over the weight, so even a long row is better sparse.
CAPACITY, WIDE_CAPACITY, ROWS_A_WIDE_ONE = 512, 16_384, 32
#: Elements of a row on average: about so many cost what a dense row does.
MOST_ON_AVERAGE = 384
#: The longest row that a block can search (kSparseWords).
MOST_WORDS = 262_144


class Entries(NamedTuple):
    """Elements of the gradient of the logits, by row and then by word."""

    rows: Tensor  # int32, counted over all sections
    columns: Tensor  # int32
    values: Tensor  # float32


class SparseGradient:
    """Takes from a head's sections the rows that are sparse.

    A section's entries are put together once the next one's product is under way, so that the GPU does not wait for
    the host to do so.

    Args:
        head: What they come from, and what their products go to.
        sum_of_rows: The kernel of a product with sparse rows.
        tolerance: What of the gradient may be dropped, in the L2 norm.
    """

    def __init__(self, head: ChunkedHead, sum_of_rows: Callable[..., Any], tolerance: float) -> None:
        self._head, self._sum_of_rows, self._tolerance = head, sum_of_rows, tolerance
        none = head.weight.new_empty(0, dtype=torch.int32)
        self._taken = [Entries(none, none, none.float())]
        self._pending: Callable[[], None] | None = None
        self._dense = False

    def backpropagate(self, part: slice, exponentials: Any) -> None:
        """Take a section to hidden states, weight and bias: what is sparse, then the rest."""
        self._settle()
        rest = None if self._dense else self._take(part, exponentials)
        if rest is None or rest.numel() > 0:
            exponentials.gradient(rest)
            self._head.backpropagate(part, rest)

    def _take(self, part: slice, exponentials: Any) -> Tensor | None:
        """The numbers of the rows that are left; None for all, where most are too flat, and so the next ones."""
        ids, values, counts = exponentials.sparse(self._tolerance, CAPACITY)
        n = counts.numel()
        places = torch.arange(n, device=counts.device) * CAPACITY  # in ids and values
        left = counts > CAPACITY
        if 0 < (remaining := int(left.sum())) <= n // ROWS_A_WIDE_ONE:
            rest = left.nonzero().squeeze(1)
            wide_ids, wide_values, wide_counts = exponentials.sparse(self._tolerance, WIDE_CAPACITY, rest)
            counts[rest] = wide_counts
            places[rest] = n * CAPACITY + torch.arange(remaining, device=rest.device) * WIDE_CAPACITY
            ids, values = (torch.cat([x.flatten(), y.flatten()]) for x, y in ((ids, wide_ids), (values, wide_values)))
            left = counts > WIDE_CAPACITY
        counts = counts.where(~left, 0)
        remaining, entries = torch.stack([left.sum(), counts.sum()]).tolist()
        if remaining > DENSE_SHARE * n or entries > MOST_ON_AVERAGE * n:
            self._dense = True
            return None
        rest = left.nonzero().squeeze(1) if remaining > 0 else places[:0]
        which = (~left).nonzero().squeeze(1) if remaining > 0 else None
        self._pending = lambda: self._put_together(
            part, ids.flatten(), values.flatten(), counts, places, entries, which
        )
        return rest

    def _settle(self) -> None:
        if self._pending is not None:
            self._pending()
            self._pending = None

    def _put_together(
        self,
        part: slice,
        ids: Tensor,
        values: Tensor,
        counts: Tensor,
        places: Tensor,
        entries: int,
        which: Tensor | None,
    ) -> None:
        starts = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
        rows = torch.arange(counts.numel(), device=counts.device).repeat_interleave(counts, output_size=entries)
        at = torch.arange(entries, device=rows.device) - starts[rows] + places[rows]
        found = Entries((rows + part.start).int(), ids[at], values[at])
        self._taken.append(found)
        if self._head.needs.hidden:
            weight = self._head.weight
            d_rows = weight.new_empty(counts.numel(), weight.size(1))
            self._sum_of_rows(d_rows, starts, found.columns, found.values, weight)
            self._head.put_hidden(part, d_rows if which is None else d_rows[which], which)

    def finish(self) -> None:
        """Add what was taken to the gradients of weight and bias, in the order of the words, then of the rows."""
        self._settle()
        d_weight, d_bias = self._head.sparse_totals()
        if d_weight is None and d_bias is None:
            return
        rows, columns, values = (torch.cat(x) for x in zip(*self._taken, strict=True))
        columns, order = columns.sort(stable=True)
        rows, values = rows[order], values[order]
        if d_weight is not None:
            bounds = torch.arange(d_weight.size(0) + 1, device=columns.device, dtype=torch.int32)
            starts = torch.searchsorted(columns, bounds)
            self._sum_of_rows(d_weight, starts, rows, values, self._head.all_states())
        if d_bias is not None:
            d_bias.index_put_((columns.long(),), values, accumulate=True)


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

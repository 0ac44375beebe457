"""Launchers of the CUDA kernels that take hidden states: on Hopper, logits stay in the registers of their product.

What the gradient needs of them is kept in 16 bits each, where the gradient then goes (csrc/exponential.cuh).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from grpo_fast import _C
from grpo_fast.cuda import address, check, logit_options, make_loss, stream, values

#: Rows that tell how much of a gradient is small, and so what may be dropped: as many as an H100 looks at at a time.
SAMPLED_ROWS = 384


def takes(hidden: Tensor, weight: Tensor) -> bool:
    """Whether these can be given, one row of ``hidden`` at least standing for all.

    That is both in the same half precision, in rows at multiples of 16 bytes that do not overlap, on Hopper.
    """
    half = hidden.dtype == weight.dtype and hidden.dtype in (torch.bfloat16, torch.float16)
    aligned = all(x.stride(-1) == 1 and x.stride(0) % 8 == 0 and x.data_ptr() % 16 == 0 for x in (hidden, weight))
    aligned = aligned and all(x.stride(0) >= x.size(1) for x in (hidden, weight))
    return half and aligned and _is_hopper(hidden.device.index)


@functools.cache
def _is_hopper(device: int) -> bool:
    """Whether the GPU can run code for Hopper alone, and there is some."""
    return torch.cuda.get_device_capability(device) == (9, 0) and "90a" in _C.architectures.split()


@dataclass(frozen=True)
class Product:
    """Rows of hidden states, and what their product with a head has left of each."""

    hidden: Tensor  # (N, H)
    weight: Tensor
    bias: Tensor | None  # float32, contiguous
    index: Tensor
    logits: dict[str, Any]  # temperature, logit_scale, softcap
    memory: tuple[Tensor, ...]  # of exponentials, (N, words) each, the words in order; none, one or two
    bases: Tensor | None
    partials: Tensor | None  # (lanes at most, N, 4); None where the exponentials are from before
    lanes: Tensor | None  # a scalar, how many there were
    counted: Tensor | None  # a scalar

    def __getitem__(self, rows: slice) -> Product:
        """What it left of some rows, whose number is known."""
        return replace(
            self,
            hidden=self.hidden[rows],
            index=self.index[rows],
            memory=tuple(part[rows] for part in self.memory),
            bases=None if self.bases is None else self.bases[rows],
            partials=None if self.partials is None else self.partials[:, rows],
            counted=None,
        )

    @functools.cached_property
    def head(self) -> _C.Head:
        """As kernels take it."""
        hidden, weight = self.hidden, self.weight
        return _C.Head(
            hidden=values(hidden),
            hidden_stride=hidden.stride(0),
            weight=values(weight),
            weight_stride=weight.stride(0),
            bias=address(self.bias),
            count=hidden.size(0),
            V=weight.size(0),
            H=weight.size(1),
            counted=address(self.counted),
            ids=values(self.index),
            multiprocessors=_multiprocessors(hidden.device.index),
            **logit_options(**self.logits),
        )

    @functools.cached_property
    def exponentials(self) -> _C.Exponentials:
        """As kernels take them."""
        first, rest, *_ = *((part.data_ptr(), part.stride(0)) for part in self.memory), (0, 0), (0, 0)
        split = -(-self.weight.size(0) // _C.TILE_WORDS) * _C.TILE_WORDS  # no rest
        if len(self.memory) > 1:
            split = self.memory[0].size(1)
        return _C.Exponentials(first=first, rest=rest, split=split, bases=address(self.bases))

    def statistics(self) -> tuple[int, int, int]:
        """As kernels take them."""
        assert self.partials is not None
        return self.partials.data_ptr(), self.partials.stride(0) // 4, address(self.lanes)


def linear_product(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    index: Tensor,
    *,
    temperature: float,
    logit_scale: float,
    softcap: float | None,
    memory: tuple[Tensor, ...] = (),
    bases: Tensor | None = None,
    counted: Tensor | None = None,
    meanwhile: Exponentials | None = None,
) -> Product:
    """The product of ``hidden`` (N, H) with ``weight`` (V, H), whose logits leave statistics of their rows.

    Args:
        memory: (N, words) each, one or two that have all words in order, a multiple of 256 in the first of two: for
            exponentials, in bfloat16 and without a softcap; none for none.
        bases: (N,) float32, those of exponentials that are in ``memory`` already: there is no product.
        counted: int64, a scalar: only so many rows count, if that is less than N. The host need not know.
        meanwhile: Exponentials of other rows, to be made their gradient at the same time: only with ``memory``.

    Raises:
        RuntimeError: A kernel was not launched.
    """
    bias, logits = _as_vector(bias), dict(temperature=temperature, logit_scale=logit_scale, softcap=softcap)
    if bases is not None:
        assert meanwhile is None
        return Product(hidden, weight, bias, index, logits, memory, bases, None, None, None)
    count = hidden.size(0)
    multiprocessors = _multiprocessors(hidden.device.index)
    most = _C.linear_lanes(count, multiprocessors) if counted is None else _C.linear_lanes_at_most(multiprocessors)
    partials = hidden.new_empty(most, count, 4, dtype=torch.float32)
    bases = hidden.new_empty(count, dtype=torch.float32) if memory else None
    lanes, next_slice = index.new_empty(2, dtype=torch.int32).unbind()
    product = Product(hidden, weight, bias, index, logits, memory, bases, partials, lanes, counted)
    error = _C.linear_product(
        device=hidden.device.index,
        stream=stream(hidden),
        head=product.head,
        exponentials=product.exponentials,
        partials=product.statistics(),
        meanwhile=None if meanwhile is None else meanwhile.conversion,
        next_slice=next_slice.data_ptr(),
    )
    check(error, "the product with the head", hidden)
    return product


def linear_logps_fwd(product: Product, return_entropy: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(logps, entropies, shifts, totals), (N,) each, from the statistics of a product; of rows that count.

    Raises:
        RuntimeError: The kernel was not launched.
    """
    hidden = product.hidden
    logps, shifts, totals = hidden.new_empty(3, hidden.size(0), dtype=torch.float32).unbind()
    entropies = torch.empty_like(logps) if return_entropy else logps.new_empty(0)
    error = _C.linear_log_probs(
        device=hidden.device.index,
        stream=stream(hidden),
        head=product.head,
        partials=product.statistics(),
        logps=logps.data_ptr(),
        entropies=entropies.data_ptr() if return_entropy else 0,
        shifts=shifts.data_ptr(),
        totals=totals.data_ptr(),
    )
    check(error, "linear_selective_log_softmax", hidden)
    return logps, entropies, shifts, totals


class SparseRows(NamedTuple):
    """Where the elements of sparse rows lie.

    Attributes:
        starts, ends: (N,) int64, of a row's elements the first, and what comes after the last; ends before starts if
            it is dense, or long and without room.
        totals: (4,) int64, the numbers of elements of short rows, of elements of long rows, of long rows, and of
            dense ones.
        limits: If these are passed, as the totals say, the search has ended early: nothing else here is of use.
    """

    starts: Tensor
    ends: Tensor
    totals: Tensor
    limits: _C.SparseLimits


@dataclass(frozen=True)
class Exponentials:
    """What a product left of rows of logits, and the slopes that make their gradient of it, in its place."""

    product: Product
    slopes: Tensor  # (N, 4)
    tilted: bool  # whether entropies have a gradient

    @functools.cached_property
    def usual(self) -> Tensor:
        """A scalar: the sampled tokens' elements in the root mean square, by which those of all rows are measured."""
        return self.slopes[:, 3].square().mean().sqrt()

    @functools.cached_property
    def conversion(self) -> _C.Conversion:
        """As kernels take it."""
        return _C.Conversion(
            head=self.product.head,
            exponentials=self.product.exponentials,
            slopes=self.slopes.data_ptr(),
            tilted=self.tilted,
        )

    def gradient(self, which: Tensor | None = None) -> None:
        """Turn the exponentials into the gradient of the logits, of all rows or those of these numbers.

        Raises:
            RuntimeError: The kernel was not launched.
        """
        hidden = self.product.hidden
        error = _C.linear_gradient(
            device=hidden.device.index,
            stream=stream(hidden),
            conversion=self.conversion,
            which=address(which),
            count=hidden.size(0) if which is None else which.numel(),
        )
        check(error, "the gradient of the logits", hidden)

    def sparse(
        self,
        tolerance: float,
        keys: Tensor,
        elements: Tensor,
        *,
        first_row: int,
        most: tuple[int, int],
        room: tuple[int, int],
        most_dense: int,
    ) -> SparseRows:
        """Rows of the gradient as some of their elements: a row's together, in the order of the words.

        Rows are short, or long, or dense, which have none. If there is no room for the elements of all long ones,
        they are to be dense too. Limits are passed if there is none for those of the short rows, or too many rows are
        dense; whether they will be is asked of some rows ahead of the search.

        Args:
            tolerance: The expected error, in the L2 norm relative to the gradient.
            keys, elements: int64 and float32 of one length, to be written: an element's word times 2^32 plus its row,
                less 2^63 if it was raised to the threshold; and its value. Those of short rows end where their room
                does, those of long ones begin there.
            first_row: The number of the first row.
            most: Elements of a short row, and of a long one.
            room: For elements of short rows, and of long ones.
            most_dense: How many rows may be dense.

        Raises:
            RuntimeError: The kernel was not launched.
        """
        hidden = self.product.hidden
        count = hidden.size(0)
        starts, ends = keys.new_empty(2, count).unbind()
        totals, sample = keys.new_zeros(4 + _C.SPARSE_SAMPLE).split([4, _C.SPARSE_SAMPLE])
        limits = _C.SparseLimits(totals=totals.data_ptr(), room=room, most_dense=most_dense)
        error = _C.sparse_rows(
            device=hidden.device.index,
            stream=stream(hidden),
            head=self.product.head,
            exponentials=self.product.exponentials,
            slopes=self.slopes.data_ptr(),
            tilted=self.tilted,
            usual=self.usual.data_ptr(),
            tolerance=tolerance,
            keys=keys.data_ptr(),
            values=elements.data_ptr(),
            starts=starts.data_ptr(),
            ends=ends.data_ptr(),
            limits=limits,
            first_row=first_row,
            most=most,
            sample=sample.data_ptr(),
            sampled=min(count, SAMPLED_ROWS),
        )
        check(error, "the sparse gradient of the logits", hidden)
        return SparseRows(starts, ends, totals, limits)


def linear_logps_bwd(
    out: tuple[Tensor, ...],
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    index: Tensor,
    *saved: Any,
    **options: Any,
) -> None:
    """The gradient of the logits, in ``out``, by those of ``linear_logps_fwd``, from the product itself.

    Args:
        out: The ``memory`` of ``linear_product``, whose further arguments are ``options``.
        saved: As for ``linear_exponentials``.

    Raises:
        RuntimeError: A kernel was not launched.
    """
    place = Product(hidden, weight, _as_vector(bias), index, options, out, None, None, None, None)
    slopes, tilted = _slopes(place, *saved)
    error = _C.linear_gradient_by_product(
        device=hidden.device.index,
        stream=stream(hidden),
        head=place.head,
        place=place.exponentials,
        slopes=slopes.data_ptr(),
        tilted=tilted,
    )
    check(error, "linear_selective_log_softmax", hidden)


def linear_exponentials(product: Product, *saved: Any) -> Exponentials:
    """The exponentials of a product, to be made the gradient of its logits, sparse or not.

    Args:
        saved: mask, the results of ``linear_logps_fwd`` (logps, entropies, shifts, totals) and their upstream
            gradients (d_logps, d_entropies), (N,) or None.

    Raises:
        RuntimeError: The kernel was not launched.
    """
    return Exponentials(product, *_slopes(product, *saved))


def linear_loss_rows(
    rows: Sequence[Tensor],
    product: Product,
    *inputs: Tensor | None,
    entropy_coef: float,
    **options: Any,
) -> Exponentials | None:
    """``cuda.grpo_loss_rows`` of one sequence from the statistics of a product, the arguments after the ids as there.

    None if it has left no exponentials.

    Raises:
        RuntimeError: A kernel was not launched.
    """
    hidden = product.hidden
    slopes = hidden.new_empty(hidden.size(0), 4, dtype=torch.float32)
    loss, _memory = make_loss(
        rows, None, 1, hidden.size(0), product.index, *inputs, entropy_coef=entropy_coef, **options
    )
    error = _C.linear_loss(
        device=hidden.device.index,
        stream=stream(hidden),
        head=product.head,
        partials=product.statistics(),
        loss=loss,
        slopes=slopes.data_ptr(),
    )
    check(error, "linear_grpo_loss", hidden)
    return Exponentials(product, slopes, entropy_coef != 0.0) if product.memory else None


def sum_of_rows(
    out: Tensor,
    starts: Tensor,
    ends: Tensor,
    index: Tensor,
    weights: Tensor,
    matrix: Tensor,
    base: Tensor | None = None,
    limits: _C.SparseLimits | None = None,
) -> None:
    """Row r of ``out`` (R, H): the sum of ``weights[e] * matrix[index[e]]``, starts[r] <= e < ends[r], and of base.

    Args:
        out: bfloat16 or float32, contiguous, to be written.
        starts, ends: (R,) int64.
        index: (entries,) int32, a view with stride 2; the sign bit does not count.
        weights: (entries,) float32.
        matrix: (any, H) bfloat16, rows at multiples of 16 bytes.
        base: (R, H) float32, contiguous, which may be ``out``; or None for nothing.
        limits: If these are passed, nothing is written; long rows are 0 if there was no room for all of them.

    Raises:
        RuntimeError: The kernel was not launched.
    """
    error = _C.sum_of_rows(
        device=out.device.index,
        stream=stream(out),
        starts=starts.data_ptr(),
        ends=ends.data_ptr(),
        index=index.data_ptr(),
        weights=weights.data_ptr(),
        matrix=values(matrix),
        stride=matrix.stride(0),
        rows=out.size(0),
        width=out.size(1),
        base=address(base),
        out=values(out),
        limits=limits or _C.SparseLimits(totals=0, room=(0, 0), most_dense=0),
    )
    check(error, "the sum of rows", out)


def _slopes(
    product: Product,
    mask: Tensor | None,
    logps: Tensor,
    entropies: Tensor | None,
    shifts: Tensor,
    totals: Tensor,
    d_logps: Tensor,
    d_entropies: Tensor | None,
) -> tuple[Tensor, bool]:
    """(slopes (N, 4) of the gradient of the logits, whether entropies have a part in it)."""
    hidden = product.hidden
    slopes = hidden.new_empty(hidden.size(0), 4, dtype=torch.float32)
    error = _C.linear_slopes(
        device=hidden.device.index,
        stream=stream(hidden),
        head=product.head,
        kept=address(mask),
        logps=logps.data_ptr(),
        entropies=address(entropies),
        shifts=shifts.data_ptr(),
        totals=totals.data_ptr(),
        d_logps=d_logps.data_ptr(),
        d_entropies=address(d_entropies),
        slopes=slopes.data_ptr(),
    )
    check(error, "linear_selective_log_softmax", hidden)
    return slopes, d_entropies is not None


def _as_vector(bias: Tensor | None) -> Tensor | None:
    """As kernels read it: float32, one word after the other."""
    return None if bias is None else bias.float().contiguous()


@functools.cache
def _multiprocessors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count

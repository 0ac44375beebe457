"""A stand-in, anywhere, for the kernels that take hidden states, with plain probabilities for exponentials."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from grpo_fast.ops._row_kernels import LinearKernels, RowKernels, row_kernels


@dataclass
class Product:
    """Log-probs of all words, NaN in rows that do not count, and where probabilities in bfloat16 are."""

    log_p: Tensor | None  # None where the probabilities are from before
    shift: Tensor | None
    index: Tensor
    memory: tuple[Tensor, ...]
    bases: Tensor | None
    slope: float

    def __getitem__(self, rows: slice) -> Product:
        assert self.log_p is not None
        assert self.shift is not None
        memory, bases = tuple(part[rows] for part in self.memory), None if self.bases is None else self.bases[rows]
        return Product(self.log_p[rows], self.shift[rows], self.index[rows], memory, bases, self.slope)


@dataclass
class Left:
    """A product's probabilities, and what flows back."""

    product: Product
    counts: Tensor | None
    entropy: Tensor | None
    d_logps: Tensor
    d_entropy: Tensor | None

    def gradient(self, which: Tensor | None = None) -> None:
        assert which is None
        memory = self.product.memory
        p = torch.cat(memory, 1).float()
        at = torch.nn.functional.one_hot(self.product.index, p.size(1))
        gradient = self.d_logps[:, None] * (at - p)
        if self.d_entropy is not None:
            assert self.entropy is not None
            gradient -= self.d_entropy[:, None] * (p * p.log().clamp(min=-1e4) + p * self.entropy[:, None])
        zero = self.d_logps == 0 if self.d_entropy is None else (self.d_logps == 0) & (self.d_entropy == 0)
        if self.counts is not None:
            zero = zero | ~self.counts
        gradient = (gradient * self.product.slope).masked_fill(zero[:, None], 0.0)
        for part, words in zip(memory, gradient.split([x.size(1) for x in memory], 1), strict=True):
            part.copy_(words)


def takes(hidden: Tensor, weight: Tensor) -> bool:
    return all(x.stride(0) % 8 == 0 and x.stride(0) >= x.size(1) for x in (hidden, weight))


def logps(product: Product, return_entropy: bool) -> tuple[Tensor, ...]:
    log_p, shift = product.log_p, product.shift
    assert log_p is not None
    assert shift is not None
    entropy = -(log_p.exp() * log_p).sum(-1) if return_entropy else log_p.new_empty(0)
    chosen = log_p.gather(1, product.index[:, None]).squeeze(1)
    return chosen, entropy, shift, torch.ones_like(shift)


def loss_rows(
    results: Sequence[Tensor], product: Product, kept: Tensor | None, *inputs: Any, **_: Any
) -> Left | None:
    """Of cross entropy."""
    *_, weights, _ = inputs
    counts = torch.ones_like(weights, dtype=torch.bool) if kept is None else kept
    logp, entropy, *_ = logps(product, True)
    assert logp[counts].isfinite().all(), "of a row that did not count"
    found = logp, entropy, -logp * weights, *3 * [torch.zeros_like(logp)]
    for result, values in zip(results, found, strict=True):
        result.copy_(values.where(counts, 0.0))
    return Left(product, counts, None, -weights, None) if product.memory else None


def exponentials(
    product: Product,
    counts: Tensor | None,
    logp: Tensor,
    entropy: Tensor | None,
    shift: Tensor,
    total: Tensor,
    d_logps: Tensor,
    d_entropy: Tensor | None,
) -> Left:
    return Left(product, counts, entropy, d_logps, d_entropy)


def places(memory: tuple[Tensor, ...]) -> set[int]:
    """Where each row begins."""
    return {row.data_ptr() for part in memory for row in part}


def with_stand_in(launched: Callable[[int, int, int], None]) -> Callable[[str], RowKernels]:
    """In place of ``row_kernels``: Triton's, and these.

    Of each product they tell its rows, how many of them count, and how many others are converted beside it.
    """

    def product(
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
        meanwhile: Left | None = None,
    ) -> Product:
        assert softcap is None or not memory
        assert takes(hidden, weight)
        slope = logit_scale / temperature
        if bases is not None:
            assert torch.equal(bases, index.to(bases.dtype))
            return Product(None, None, index, memory, bases, slope)
        rows = hidden.size(0)
        assert rows > 0
        count = rows if counted is None else int(counted.clamp(0, rows))
        launched(rows, count, 0 if meanwhile is None else len(meanwhile.product.index))
        logits = hidden.float() @ weight.float().T
        if bias is not None:
            logits += bias.float()
        logits *= slope
        log_p, shift = logits.log_softmax(-1), logits.logsumexp(-1) / math.log(2.0)
        log_p[count:] = math.nan
        start = 0
        for part in memory:
            part[:count] = log_p[:count, start : start + part.size(1)].exp().to(part.dtype)
            start += part.size(1)
        if meanwhile is not None:  # in any order with the above
            assert not places(memory) & places(meanwhile.product.memory), "the same rows"
            meanwhile.gradient()
        assert start == (weight.size(0) if memory else 0)
        return Product(log_p, shift, index, memory, index.to(torch.float32) if memory else None, slope)

    def logps_backward(
        memory: tuple[Tensor, ...],
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        index: Tensor,
        *saved: Any,
        **options: Any,
    ) -> None:
        exponentials(product(hidden, weight, bias, index, memory=memory, **options), *saved).gradient()

    linear = LinearKernels(
        takes=takes,
        product=product,
        loss_rows=loss_rows,
        logps=logps,
        exponentials=exponentials,
        logps_backward=logps_backward,
        sum_of_rows=None,  # type: ignore[arg-type]
    )
    return lambda impl: row_kernels("triton")._replace(linear=linear)

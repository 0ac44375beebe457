"""The product with the head, launched before the host knows how many rows it is of: the GPU does not wait for it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from grpo_fast.ops._chunks import section_of_all
from grpo_fast.ops._row_kernels import Gradient, RowKernels, linear_kernels
from grpo_fast.ops._rows import Choice, HiddenRows
from grpo_fast.ops._section import Section
from grpo_fast.ops._workspace import LAUNCH_ROWS, band_rows


class Ahead(NamedTuple):
    """What is under way.

    Attributes:
        product: Of all rows by their places, or of the first band; those with a gradient count if there is to be one,
            else those that are projected.
        launched: How many rows these are at the most.
        states: (N, H), in that order, of all.
        section: Where the product leaves exponentials, if there is to be a gradient.
    """

    product: Any
    launched: int
    states: Tensor
    section: Section | None


def product_ahead(
    kernels: RowKernels,
    choice: Choice,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    index: Tensor,
    *,
    workspace_bytes: int,
    own_sum: bool,
    sparse: bool,
    label_smoothing: float,
    softcap: float | None,
    **logits_options: Any,
) -> Ahead | None:
    """Launch the product of ``hidden`` (B, T, H) and ``weight`` (V, H) for tokens ``index`` (N,).

    Of the first band, where sections have bands. None if there are no kernels for that, or if one section cannot have
    all rows.
    """
    if kernels.linear is None or choice.count == 0:
        return None
    dtype = torch.promote_types(hidden.dtype, weight.dtype)
    states = HiddenRows(hidden, choice.all, dtype)
    by: Gradient = "by exponentials" if choice.gradient else "none"
    linear = linear_kernels(kernels, states, weight, label_smoothing, softcap, gradient=by)
    if linear is None:
        return None
    section = None
    if choice.gradient:
        section = section_of_all(workspace_bytes, choice.count, weight, dtype, own_sum=own_sum, sparse=sparse)
    if section is None and (choice.gradient or choice.count > LAUNCH_ROWS):
        return None
    x = states[slice(0, choice.count)]
    rows = choice.count if section is None or sparse else band_rows(choice.count, weight.size(1))
    first = slice(0, min(rows, choice.count))
    product = linear.product(
        x[first],
        weight,
        bias,
        choice.all.take(index)[first],
        softcap=softcap,
        memory=() if section is None else section[first],
        counted=None if choice.numbers is None else choice.numbers[0 if choice.gradient else 1],
        **logits_options,
    )
    return Ahead(product, first.stop, x, section)

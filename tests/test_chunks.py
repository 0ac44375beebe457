"""The products of a head's sections, added up in float32 and rounded once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from grpo_fast.ops._chunks import ChunkedHead, Needs
from grpo_fast.ops._rows import HiddenRows, Rows

pytestmark = pytest.mark.usefixtures("poisoned_buffers")

V, H, N = 301, 8, 200


def rounding(x: Tensor, exact: Tensor) -> float:
    """The error in the root mean square, by that of rounding to the precision of ``x``."""
    return float((x.double() - exact).norm() / (exact.to(x.dtype).double() - exact).norm())


@pytest.mark.parametrize("hidden_in_float32", [False, True])
@pytest.mark.parametrize("keeps_logits", [False, True])
@pytest.mark.parametrize("gathered", [False, True])
@pytest.mark.parametrize(("workspace", "sections"), [(1, 3), (2**30, 1)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_are_rounded_once(
    dtype: torch.dtype, workspace: int, sections: int, gathered: bool, keeps_logits: bool, hidden_in_float32: bool
) -> None:
    draw = torch.Generator().manual_seed(1)
    hidden, weight, truth = (torch.randn(shape, generator=draw).to(dtype) for shape in ((1, N, H), (V, H), (N, V)))
    live = N - 20 if gathered else N
    index = torch.randperm(N, generator=draw) if gathered else None
    states = HiddenRows(hidden, Rows(N, live, N, index), dtype)
    options: dict[str, Any] = {"keeps_logits": keeps_logits, "hidden_in_float32": hidden_in_float32}
    if dtype == torch.float16:
        options["scale"] = torch.tensor(2.0**-12)
        truth = truth * options["scale"]
    head = ChunkedHead(states, weight, None, Needs(True, True, False), workspace, **options)
    seen = 0
    for part, has_gradient in head.chunks():
        if has_gradient:
            head.gradient(part).copy_(truth[part])
            seen += part.stop == head._section.stop
            head.backpropagate(part)
    assert seen == 1 if sections == 1 else seen >= sections
    d_hidden, d_weight, _ = head.finish()
    rows = torch.arange(N) if index is None else index
    gradient = truth[:live].double() / options.get("scale", 1.0)
    wanted = torch.zeros(N, H, dtype=torch.float64).index_copy(0, rows[:live], gradient @ weight.double())
    kept = torch.float32 if dtype == torch.float16 else dtype
    assert d_hidden.dtype == (torch.float32 if hidden_in_float32 else kept)
    assert d_weight.dtype == kept
    for found, exact in (
        (d_hidden.view(N, H), wanted),
        (d_weight, gradient.t() @ hidden[0, rows[:live]].double()),
    ):
        if found.dtype == torch.float32:
            assert (found.double() - exact).norm() < 1e-6 * exact.norm()
        else:
            assert rounding(found, exact) < 1.05

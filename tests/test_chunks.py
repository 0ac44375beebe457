"""The products of a head's sections, added up in float32 and rounded once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from grpo_fast.ops import _products, _workspace
from grpo_fast.ops._chunks import ChunkedHead, Needs, section_of_all
from grpo_fast.ops._rows import Choice, HiddenRows, Rows
from grpo_fast.ops._section import Section

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
    options: dict[str, Any] = {"logits_a_row": int(keeps_logits), "hidden_in_float32": hidden_in_float32}
    if dtype == torch.float16:
        options["scale"] = torch.tensor(2.0**-12)
        truth = truth * options["scale"]
    head = ChunkedHead(states, weight, None, Needs(True, True, False), workspace, **options)
    seen = 0
    for part, has_gradient in head.chunks():
        if has_gradient:
            memory = head.gradient(part)
            for place, words in zip(memory, truth[part].split([x.size(1) for x in memory], 1), strict=True):
                place.copy_(words)
            seen += part.stop == head._part.stop
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


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("gathered", [False, True])
@pytest.mark.parametrize("hidden_in_float32", [False, True])
def test_words_in_borrowed_memory(
    hidden_in_float32: bool, gathered: bool, kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That of the weight's gradient: it is given back before there is one, and gradients are rounded once."""
    monkeypatch.setattr(_workspace, "TILE_WORDS", 8)
    monkeypatch.setattr(_products, "LONG_ROWS", 100)
    monkeypatch.setattr(_products, "PIECE_WORDS", 90)
    size, workspace, dtype = 64, 200_000, torch.bfloat16
    draw = torch.Generator().manual_seed(1)
    shapes = (1, N, size), (V, size), (N, V)
    hidden, weight, truth = (torch.randn(shape, generator=draw).to(dtype) for shape in shapes)
    live = N - 10 if gathered else N
    index = torch.randperm(N, generator=draw) if gathered else None
    rows = Rows(N, live, N, index)
    section = None
    if kept:  # of more rows, as where the host did not know how many would be live
        section = section_of_all(workspace, N, weight, dtype, own_sum=True, sparse=False)
    needs = Needs(True, True, True)
    bias = torch.zeros(V)
    head = ChunkedHead(
        HiddenRows(hidden, rows, dtype),
        weight,
        bias,
        needs,
        workspace,
        hidden_in_float32=hidden_in_float32,
        logits_a_row=0,
        section=section,
    )
    given_back: list[int] = []

    def spy(self: Section) -> None:
        give_back(self)
        given_back.append(self.borrowed.untyped_storage().nbytes())

    give_back = Section.give_back
    monkeypatch.setattr(Section, "give_back", spy)
    for part, has_gradient in head.chunks():
        if has_gradient:
            assert part == slice(0, live)
            first, last = memory = head.gradient(part)
            assert first.size(1) % 8 == 0
            assert last.untyped_storage().nbytes() == weight.nbytes
            for place, words in zip(memory, truth[part].split([first.size(1), last.size(1)], 1), strict=True):
                place.copy_(words)
            head.backpropagate(part)
    assert given_back[0] == 0
    d_hidden, d_weight, d_bias = head.finish()
    at = (torch.arange(N) if index is None else index)[:live]
    gradient = truth[:live].double()
    wanted = torch.zeros(N, size, dtype=torch.float64).index_copy(0, at, gradient @ weight.double())
    if hidden_in_float32:
        assert (d_hidden.view(N, size).double() - wanted).norm() < 1e-6 * wanted.norm()
    else:
        assert rounding(d_hidden.view(N, size), wanted) < 1.05
    assert rounding(d_weight, gradient.t() @ hidden[0, at].double()) < 1.05
    torch.testing.assert_close(d_bias.double(), gradient.sum(0), rtol=1e-4, atol=1e-4)


def test_rows_by_their_places() -> None:
    draw = torch.Generator().manual_seed(1)
    mask, live = (torch.rand(2, 40, generator=draw) < 0.6).unbind()
    for kept, first, gradient in ((mask, live, True), (mask, None, True), (None, live, True), (mask, live, False)):
        choice = Choice.begin(40, kept, first, gradient=gradient, wait=True)
        projected = torch.ones(40, dtype=torch.bool) if kept is None else kept
        with_gradient = projected & (live if first is not None else projected) & gradient
        rows = choice.rows
        assert rows.index is not None
        assert choice.order is not None
        assert choice.numbers is not None
        assert choice.numbers.tolist() == [rows.live, rows.total] == [int(with_gradient.sum()), int(projected.sum())]
        others = projected & ~with_gradient
        wanted = [x.nonzero().squeeze(1) for x in (with_gradient, others, ~projected)]
        assert torch.equal(choice.order, torch.cat(wanted))
        assert torch.equal(rows.index, choice.order[: rows.total])
    for everything in (torch.ones(40, dtype=torch.bool), None):
        for gradient in (True, False):
            rows = Rows.choose(40, everything, everything, gradient=gradient, wait=True)
            assert (rows.index, rows.live, rows.total) == (None, 40 if gradient else 0, 40)
    unknown = Choice.begin(40, mask, live, gradient=True, wait=False)
    assert unknown.order is None
    assert unknown.numbers is None
    assert unknown.rows.mask is mask

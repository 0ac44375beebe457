"""The host's part of sparse gradients, anywhere: stand-ins for the kernels keep their word, and nothing more."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from grpo_fast.ops import _sparse, _workspace
from grpo_fast.ops._chunks import ChunkedHead, Needs
from grpo_fast.ops._rows import HiddenRows, Rows
from grpo_fast.ops._sparse import SparseGradient

pytestmark = pytest.mark.usefixtures("poisoned_buffers")

V, H = 61, 8
#: Smaller elements of a sparse row are taken to be raised ones.
THRESHOLD = 0.5
#: Elements of a row that is zero, short, long, and dense.
ZERO, FEW, MANY, ALL = 0, 3, 8, V


class Limits(NamedTuple):
    passed: bool
    first_dense: int | None  # the place of long rows, if there is no room for all of them


class Found(NamedTuple):
    starts: Tensor
    ends: Tensor
    totals: Tensor
    limits: Limits


@dataclass
class StandIn:
    """Of what a product left of a section: its gradient, and where that goes."""

    truth: Tensor  # (n, V)
    memory: Tensor
    order: torch.Generator
    searches: list[int]  # first rows of the sections that were searched
    is_dense: Tensor  # (n,) bool, where the whole gradient was asked for

    def gradient(self, which: Tensor | None = None) -> None:
        rows = slice(None) if which is None else which
        self.memory[rows] = self.truth[rows]
        self.is_dense[rows] = True

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
    ) -> Found:
        """Rows in any order; once most are known to be flat, or an element has no room, the rest is left as it is."""
        n = self.truth.size(0)
        self.searches.append(first_row)
        keys.fill_(-1)
        elements.fill_(math.nan)
        starts, ends = torch.full((2, n), 2**40).unbind()
        totals, passed = [0, 0, 0, 0], False
        for row in torch.randperm(n, generator=self.order).tolist():
            if passed:
                break
            words = self.truth[row].nonzero().squeeze(1)
            kept = words.numel()
            is_long, start = kept > most[0], 0
            starts[row], ends[row] = 0, -1
            if kept > most[1]:
                totals[3] += 1
            else:
                start = room[0] + totals[1] if is_long else room[0] - totals[0] - kept
                totals[is_long] += kept
                totals[2] += is_long
            if kept <= most[1] and totals[is_long] <= room[is_long]:
                starts[row], ends[row] = start, start + kept
                values = self.truth[row, words].float()
                raised = values.abs() < THRESHOLD
                keys[start : start + kept] = (words << 32 | (first_row + row)) + (-(2**63)) * raised
                elements[start : start + kept] = values
            in_short, in_long, longs, dense = totals
            passed = in_short > room[0] or dense + (longs if in_long > room[1] else 0) > most_dense
        return Found(starts, ends, torch.tensor(totals), Limits(passed, room[0] if totals[1] > room[1] else None))


def sum_of_rows(
    out: Tensor,
    starts: Tensor,
    ends: Tensor,
    index: Tensor,
    weights: Tensor,
    matrix: Tensor,
    base: Tensor | None = None,
    limits: Limits | None = None,
) -> None:
    if limits is not None and limits.passed:
        return
    if limits is not None and limits.first_dense is not None:
        ends = ends.where(starts < limits.first_dense, 0)
    assert index.stride() == (2,)
    assert out.is_contiguous()
    assert starts.max() <= weights.numel(), "of a search that ended early"
    total = torch.zeros(out.shape) if base is None else base.float().clone()
    for row, (start, end) in enumerate(zip(starts.tolist(), ends.tolist(), strict=True)):
        if start < end:
            total[row] += weights[start:end] @ matrix[(index[start:end] & 2**31 - 1).long()].float()
    out.copy_(total)


def gradient_of(elements: list[int]) -> Tensor:
    """(n, V) with so many elements in each row."""
    draw = torch.Generator().manual_seed(1)
    values = torch.randn(len(elements), V, generator=draw).bfloat16()
    places = torch.rand(len(elements), V, generator=draw).argsort(1)
    return values.where(places < torch.tensor(elements)[:, None], 0.0)


#: By name, the elements of each of 64 rows, in sections of 16 at most; a section may have 8 dense rows. Up to 24 rows
#: are one section.
KINDS: dict[str, list[int]] = {
    "all sparse": [FEW, 4, ZERO, MANY] * 16,
    "nothing": [ZERO] * 64,
    "dense rows for more than one product": [FEW, ALL, FEW] * 21 + [ALL],
    "long ones for which there is no room": [MANY] * 5 + [FEW] * 11 + [FEW] * 40 + [MANY, ALL] * 4,
    "too many of both": [FEW] * 16 + [MANY] * 7 + [ALL] * 3 + [FEW] * 38,
    "short ones for which there is no room": [FEW] * 24 + [4] * 40,
    "dense after sparse": [FEW, ALL] * 8 + [FEW] * 16 + [ALL] * 32,
    "all dense": [ALL] * 64,
    "a short last section": [FEW] * 48 + [ALL],
    "one section": [FEW, MANY, FEW, 4] * 4 + [ALL] * 3 + [FEW],
    "one section, mostly dense": [FEW, ALL, ALL, 4, ALL] * 4,
    "one section, dense if there is no sum to spare": [FEW, ALL, 4, FEW, MANY, ALL, FEW] * 2
    + [FEW, ALL, ALL, 4, FEW, FEW],
    "one row": [FEW],
    "one dense row": [ALL],
    "none": [],
}
#: The first rows of the sections that are searched, where not all are.
SEARCHES = {
    "too many of both": [0, 16],
    "short ones for which there is no room": [0, 16],
    "dense after sparse": [0, 16, 32],
    "all dense": [0],
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("needs", "bias"),
    [((True, True, True), True), ((True, False, False), False), ((False, True, False), True)],
    ids=["all", "hidden", "weight"],
)
@pytest.mark.parametrize("gathered", [False, True])
@pytest.mark.parametrize("into_a_buffer", [False, True])
def test_products(
    kind: str,
    needs: tuple[bool, bool, bool],
    bias: bool,
    gathered: bool,
    into_a_buffer: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_sparse, "SHORT", 4)
    monkeypatch.setattr(_sparse, "LONG", 8)
    monkeypatch.setattr(_sparse, "SHORT_ON_AVERAGE", 3)
    monkeypatch.setattr(_sparse, "LONG_ON_AVERAGE", 2)
    truth = gradient_of(KINDS[kind])
    live = len(truth)
    count = live + 11 if gathered else live
    draw = torch.Generator().manual_seed(2)
    hidden = torch.randn(1, count, H, generator=draw).bfloat16()
    weight = torch.randn(V, H, generator=draw).bfloat16()
    index = torch.randperm(count, generator=draw) if gathered else None
    rows = Rows(count, live, count, index)
    states = HiddenRows(hidden, rows, torch.bfloat16)
    buffer = torch.ones(V, H) if into_a_buffer and needs[1] else None
    monkeypatch.setattr(_workspace, "BYTES_IN_ELEMENTS", 0)  # elements of so few words are more than a row
    head = ChunkedHead(
        states,
        weight,
        torch.zeros(V) if bias else None,
        Needs(*needs),
        16 * 3 * V,
        buffer,
        logits_a_row=0,
        sparse=True,
    )
    sparse = SparseGradient(head, sum_of_rows, 1e-3)
    order, searches, is_dense = torch.Generator().manual_seed(3), [], torch.zeros(live, dtype=torch.bool)
    for part, has_gradient in head.chunks():
        if has_gradient:
            (memory,) = head.gradient(part)
            memory.fill_(math.nan)
            sparse.backpropagate(part, StandIn(truth[part], memory, order, searches, is_dense[part]))
    assert searches == SEARCHES.get(kind, [0, 16, 32, 48] if live > 24 else [0][:live])
    assert needs[1] or needs[2] or not sparse._taken, "what needs no gradient costs nothing"
    sparse.finish()
    d_hidden, d_weight, d_bias = head.finish()
    x = hidden[0] if index is None else hidden[0, index]
    if needs[0]:
        wanted = torch.zeros(count, H)
        at = torch.arange(live) if index is None else index[:live]
        wanted[at] = truth.float() @ weight.float()
        torch.testing.assert_close(d_hidden[0].float(), wanted, rtol=2**-8, atol=1e-5)
    whole = is_dense[:, None] | (truth.abs() >= THRESHOLD)
    all_dense = kind in ("all dense", "one section, mostly dense", "one dense row", "nothing", "none")
    if kind == "one section, dense if there is no sum to spare":
        all_dense = buffer is not None or not needs[1]
        assert whole.all() == all_dense
    assert all_dense or not whole.all()
    truth = truth.where(whole, 0.0)
    if needs[1]:
        wanted = truth.float().t() @ x[:live].float()
        if buffer is not None:
            torch.testing.assert_close(buffer, wanted + 1, rtol=1e-5, atol=1e-4)
            assert d_weight.numel() == 0
        else:
            torch.testing.assert_close(d_weight.float(), wanted, rtol=2**-8, atol=1e-4)
    if needs[2]:
        torch.testing.assert_close(d_bias, truth.float().sum(0), rtol=1e-5, atol=1e-4)

"""The product that is launched before the host knows how many rows count, anywhere: a stand-in for its kernels."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from conftest import DEVICE, KERNELS, rand
from linear_stand_in import with_stand_in

from grpo_fast.ops import _ahead, _chunks, _linear_token_loss, _workspace
from grpo_fast.ops._linear_token_loss import cross_entropy_rows

pytestmark = [
    pytest.mark.usefixtures("poisoned_buffers"),
    pytest.mark.skipif("triton" not in KERNELS, reason="stands in for kernels that Triton's have none of"),
]

N, V, H = 24, 56, 16
HIDDEN = rand(1, N, H, seed=1).bfloat16()
WEIGHT = rand(V, H, seed=2, scale=0.5).bfloat16()
LABELS = torch.randint(0, V, (N,), generator=torch.Generator().manual_seed(3)).to(DEVICE)
MASK = torch.arange(N, device=DEVICE) % 4 != 1
LIVE = torch.arange(N, device=DEVICE) % 3 != 1
ALL, NONE = torch.ones_like(MASK), torch.zeros_like(MASK)
SLOPE = 1.2 / 0.9  # logit scale by temperature
#: What all rows take: their exponentials, and hidden states with their gradients.
ROOM = N * (2 * V + 8 * H)


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """How many rows each product is launched for, and how many of them count."""
    found: list[tuple[int, int]] = []
    launched = with_stand_in(lambda rows, count, _: found.append((rows, count)))
    monkeypatch.setattr(_linear_token_loss, "row_kernels", launched)
    return found


@pytest.fixture
def in_bands(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, int]]:
    """The same in bands of 8 rows, and how many rows become their gradient beside each product."""
    monkeypatch.setattr(_workspace, "BAND_ROWS", 8)
    monkeypatch.setattr(_workspace, "BAND_HIDDEN_SIZE", H)
    found: list[tuple[int, int, int]] = []
    monkeypatch.setattr(_linear_token_loss, "row_kernels", with_stand_in(lambda *launch: found.append(launch)))
    return found


def losses(
    hidden: Tensor = HIDDEN,
    mask: Tensor | None = None,
    live: Tensor | None = None,
    needs: tuple[bool, bool, bool] = (True, True, False),
    workspace: int = 2**20,
    allow_sync: bool = True,
    sparse_grad_tol: float | None = None,
    labels: Tensor = LABELS,
) -> tuple[Tensor, Tensor, Tensor]:
    """(cross entropies, and the gradients of their sum over the live ones by hidden states and weight)"""
    weights = torch.ones(labels.numel(), device=DEVICE) if mask is None else mask.float()
    values, _, (d_hidden, d_weight, _) = cross_entropy_rows(
        hidden,
        WEIGHT,
        None,
        labels,
        mask,
        weights,
        live=live,
        needs=list(needs),
        impl="triton",
        workspace_bytes=workspace,
        allow_sync=allow_sync,
        label_smoothing=0.0,
        sparse_grad_tol=sparse_grad_tol,
        temperature=0.9,
        logit_scale=1.2,
        softcap=None,
    )
    return values, d_hidden, d_weight


def check(found: tuple[Tensor, Tensor, Tensor], mask: Tensor | None, live: Tensor | None) -> None:
    """Against float64; where nothing is asked for, nothing is to be there."""
    counts = ALL if mask is None else mask
    hidden, weight = (x.double().requires_grad_() for x in (HIDDEN[0], WEIGHT))
    logp = (hidden @ weight.T * SLOPE).log_softmax(-1).gather(1, LABELS[:, None]).squeeze(1)
    values = -logp.where(counts, 0.0)
    with_gradient = counts if live is None else counts & live
    truth = torch.autograd.grad(values[with_gradient].sum(), (hidden, weight))
    torch.testing.assert_close(found[0].double(), values.detach(), rtol=1e-4, atol=1e-4)
    for x, y in zip(found[1:], truth, strict=True):
        if x.numel() > 0:
            assert (x.view_as(y).double() - y).norm() <= 1e-2 * y.norm()


@pytest.mark.parametrize(
    "needs", [(True, True, False), (True, False, False), (False, True, False), (False, False, False)]
)
@pytest.mark.parametrize("live", [None, LIVE, ALL, NONE], ids=["", "live", "all live", "none live"])
@pytest.mark.parametrize("mask", [None, MASK, ALL, NONE], ids=["", "mask", "all", "none"])
def test_rows_that_the_gpu_counts(
    mask: Tensor | None, live: Tensor | None, needs: tuple[bool, bool, bool], products: list[tuple[int, int]]
) -> None:
    hidden = HIDDEN
    if mask is not None:
        hidden = hidden.clone()
        hidden[0, ~mask] = math.nan
    check(losses(hidden, mask, live, needs), mask, live)
    counts = ALL if mask is None else mask
    with_gradient = (counts if live is None else counts & live) if any(needs) else counts
    ahead, rest = int(with_gradient.sum()), int(counts.sum()) - int(with_gradient.sum())
    assert products == [(N, ahead), *[(rest, rest)] * (rest > 0)]


@pytest.mark.parametrize("live", [None, LIVE])
def test_without_waiting_every_row_counts(live: Tensor | None, products: list[tuple[int, int]]) -> None:
    check(losses(mask=MASK, live=live, allow_sync=False), MASK, None)
    assert products == [(N, N)]


@pytest.mark.parametrize("live", [None, LIVE])
def test_in_two_places(live: Tensor | None, products: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_workspace, "TILE_WORDS", 8)
    check(losses(mask=MASK, live=live, workspace=ROOM - 100), MASK, live)
    assert products[0] == (N, int((MASK if live is None else MASK & live).sum()))


@pytest.mark.parametrize("workspace", [ROOM - 100, 2**20], ids=["two places", "one"])
@pytest.mark.parametrize("live", [None, LIVE, NONE], ids=["", "live", "none live"])
@pytest.mark.parametrize("mask", [None, MASK], ids=["", "mask"])
def test_in_bands(
    mask: Tensor | None,
    live: Tensor | None,
    workspace: int,
    in_bands: list[tuple[int, int, int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each becomes its gradient beside the next one's product; the GPU counts the first alone."""
    monkeypatch.setattr(_workspace, "TILE_WORDS", 8)
    check(losses(mask=mask, live=live, workspace=workspace), mask, live)
    counts = ALL if mask is None else mask
    with_gradient = int((counts if live is None else counts & live).sum())
    rest = int(counts.sum()) - with_gradient
    bands = [8, *{24: [8, 8], 18: [5, 5], 16: [8], 12: [4], 0: []}[with_gradient]]
    beside = [(n, n, before) for before, n in pairwise(bands)]
    assert in_bands == [(8, min(8, with_gradient), 0), *beside, *[(rest, rest, 0)] * (rest > 0)]


def test_several_sections_in_bands(in_bands: list[tuple[int, int, int]]) -> None:
    """The first of each has nothing beside it, and the last of each becomes its gradient by itself."""
    check(losses(needs=(True, False, False), workspace=11 * (2 * V + 8 * H)), None, None)
    assert in_bands == [(6, 6, 0), (5, 5, 6), (6, 6, 0), (5, 5, 6), (2, 2, 0)]
    in_bands.clear()
    check(losses(mask=MASK, live=LIVE, allow_sync=False), MASK, None)
    assert in_bands == [(8, 8, 0), (8, 8, 8), (8, 8, 8)]


@pytest.mark.parametrize(("name", "value"), [("BAND_HIDDEN_SIZE", H + 1), ("BAND_ROWS", N)])
def test_in_one_band(
    name: str, value: int, in_bands: list[tuple[int, int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_workspace, name, value)
    check(losses(), None, None)
    assert in_bands == [(N, N, 0)]


@pytest.mark.parametrize("rows", [1, 255, 2_048, 2_049, 4_736, 8_192, 131_072])
@pytest.mark.parametrize("first", [0, 1, 2_048])
def test_bands_are_all_of_a_section(first: int, rows: int) -> None:
    bands = list(_chunks._bands(slice(100, 100 + rows), first, 2_048))
    assert [band.start for band in bands] == [100, *(band.stop for band in bands[:-1])]
    assert bands[-1].stop == 100 + rows
    assert bands[0].stop == 100 + min(first, rows) or first == 0
    sizes = [band.stop - band.start for band in bands[int(first > 0) :]]
    assert all(0 < n <= _workspace.BAND_ROWS for n in sizes)
    assert all(n % 256 == 0 and n - sizes[-1] < 256 * len(sizes) for n in sizes[:-1]), "about as many in each"
    short = list(_chunks._bands(slice(100, 100 + rows), first, 896))
    assert len(short) == 1 + (0 < first < rows), "all that are left"


def test_what_one_launch_cannot_have(products: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch) -> None:
    """The host waits then, and the rows that count may fit."""
    check(losses(mask=MASK, live=LIVE, workspace=ROOM - 100), MASK, LIVE)
    live = int((MASK & LIVE).sum())
    assert products == [(live, live), (18 - live, 18 - live)]
    products.clear()
    monkeypatch.setattr(_ahead, "LAUNCH_ROWS", 10)
    monkeypatch.setattr(_workspace, "LAUNCH_ROWS", 10)
    check(losses(mask=MASK, needs=(False, False, False)), MASK, None)
    assert products == [(10, 10), (8, 8)]


@pytest.mark.parametrize("workspace", [1, 2**20])
@pytest.mark.parametrize("mask", [None, ALL, MASK], ids=["", "all", "mask"])
def test_states_that_kernels_do_not_take(
    mask: Tensor | None, workspace: int, products: list[tuple[int, int]]
) -> None:
    """As they lie; in order, they are copies, which begin where they may."""
    hidden = torch.zeros(1, N, H + 1, dtype=torch.bfloat16, device=DEVICE)[..., :H]
    hidden.copy_(HIDDEN)
    check(losses(hidden, mask, workspace=workspace), mask, None)
    assert bool(products) == (mask is MASK or (mask is ALL and workspace > 1))


def test_nothing_at_all(products: list[tuple[int, int]]) -> None:
    """No error either where rows may be sparse."""
    for tolerance in (None, 1e-3):
        found = losses(HIDDEN[:, :0], labels=LABELS[:0], sparse_grad_tol=tolerance)
        assert found[0].numel() == 0
        assert (found[2] == 0).all()
    assert products == []

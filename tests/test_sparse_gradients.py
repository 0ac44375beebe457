"""Gradients of peaked rows as sparse rows, on Hopper, held against float64 and against the dense ones."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from conftest import DEVICE, KERNELS, rand

from grpo_fast import GRPOLossConfig, linear_cross_entropy, linear_grpo_loss, linear_selective_log_softmax
from grpo_fast.ops import _sparse
from grpo_fast.reference import sparse_rows_ref

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0) and "cuda" in KERNELS
on_hopper = pytest.mark.skipif(not HOPPER, reason="needs an NVIDIA H100 or H200")
pytestmark = pytest.mark.usefixtures("poisoned_buffers")

V, H = 5_001, 64


def peaked(count: int, sure: float = 9.0, spread: float = 1.5) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, a head and ids: logits of this spread, the ids' and three others' ``sure`` above."""
    weight = rand(V, H, seed=1, scale=1.0 / math.sqrt(H))
    index = torch.randint(0, V, (count, 4), generator=torch.Generator().manual_seed(2)).to(DEVICE)
    hidden = rand(count, H, seed=3, scale=spread) + sure * (weight[index] * rand(count, 4, 1, seed=4).abs()).sum(1)
    return hidden.bfloat16(), weight.bfloat16(), index[:, 0].contiguous()


def left_by(hidden: Tensor, weight: Tensor, index: Tensor, d_logps: Tensor) -> tuple[Any, Tensor]:
    """What the product leaves, and the gradient of the logits in float64."""
    from grpo_fast import cuda_linear

    options: dict[str, Any] = {"temperature": 1.0, "logit_scale": 1.0, "softcap": None}
    logps, _, shifts, totals = cuda_linear.linear_logps_fwd(
        hidden, weight, None, index, **options, return_entropy=False
    )
    out = torch.empty(index.numel(), -(-V // 8) * 8, device="cuda", dtype=torch.bfloat16)[:, :V]
    saved = None, logps, None, shifts, totals, d_logps, None
    left = cuda_linear.linear_exponentials(out, hidden, weight, None, index, *saved, **options)
    p = (hidden.double() @ weight.double().t()).softmax(-1)
    truth = -p * d_logps[:, None]
    return left, truth.scatter_add(1, index[:, None], d_logps[:, None].double())


class Sparse(NamedTuple):
    """What was found of rows."""

    dense: Tensor  # (n, V) float64, the elements in their places
    counts: Tensor  # (n,), -1 of a row that cannot be sparse
    totals: list[int]


def sparse_rows(left: Any, tolerance: float, most: tuple[int, int] = (40, V), **limits: Any) -> Sparse:
    n, first_row, guard = left.hidden.size(0), 1_000, 64
    limits = {"room": (n * V, n * V), "most_dense": n, **limits}
    room = sum(limits["room"])
    keys = torch.full((room + guard,), -7, device="cuda")
    elements = torch.full((room + guard,), math.nan, device="cuda")
    starts, ends, totals = left.sparse(
        tolerance, keys[:room], elements[:room], first_row=first_row, most=most, **limits
    )
    assert (keys[room:] == -7).all()
    assert elements[room:].isnan().all()
    counts, sums = (ends - starts).clamp(min=-1), totals.tolist()
    found = torch.zeros(n, V, device="cuda", dtype=torch.float64)
    if all(has <= room for has, room in zip(sums, limits["room"], strict=False)) and sums[3] <= limits["most_dense"]:
        for row, (start, end) in enumerate(zip(starts.tolist(), ends.tolist(), strict=True)):
            assert (end - start > most[0]) == (end > start >= limits["room"][0])
            words, rows = keys[start : max(end, start)] >> 32, keys[start : max(end, start)] & (2**32 - 1)
            assert (rows == first_row + row).all()
            assert (words.diff() > 0).all()
            found[row, words] = elements[start : max(end, start)].double()
        long = counts > most[0]
        assert sums[0] == int(counts.clamp(min=0).where(~long, 0).sum())
        assert sums[1:] == [int(counts.where(long, 0).sum()), int(long.sum()), int((counts < 0).sum())]
    return Sparse(found, counts, sums)


@pytest.mark.parametrize("tolerance", [1e-1, 1e-2, 3e-3])
def test_the_rule(tolerance: float) -> None:
    """What is dropped is within the tolerance; with one power of two more it would not be, by the rule's bound."""
    hidden, weight, index = peaked(200)
    p = (hidden.double() @ weight.double().t()).softmax(-1)
    gradient = (torch.nn.functional.one_hot(index, V) - p) * rand(200, 1, seed=5).double()
    at_target = gradient.gather(1, index[:, None]).squeeze(1)
    usual = float(at_target.square().mean().sqrt())
    kept, fits = sparse_rows_ref(gradient, at_target, usual, tolerance)
    reference = at_target.abs().clamp(min=usual)
    dropped = gradient.where(~kept, 0.0)
    assert fits.float().mean() > 0.5
    assert (dropped.norm(dim=1) <= tolerance * reference)[fits].all()
    assert dropped[fits].norm() <= math.sqrt(2) * tolerance * gradient.norm()
    smallest = gradient.abs().where(kept, math.inf).amin(1)
    assert (smallest > dropped.abs().amax(1)).all()
    # The last power that is kept: its elements are at most twice the smallest.
    last = kept & (gradient.abs() < 2 * smallest[:, None])
    more = dropped.square().sum(1) + last.sum(1) * (2 * smallest) ** 2
    above = smallest < reference / 2  # the first power is always kept
    assert (4 * more > (tolerance * reference) ** 2)[fits & above].all()


@on_hopper
@pytest.mark.parametrize("tolerance", [1e-1, 1e-2, 2e-3])
def test_what_is_dropped(tolerance: float) -> None:
    hidden, weight, index = peaked(300)
    d_logps = rand(300, seed=5)
    d_logps[7] = 0.0
    left, truth = left_by(hidden, weight, index, d_logps)
    found = sparse_rows(left, tolerance)
    sparse, counts = found.dense, found.counts
    assert counts[7] == 0
    fits = counts >= 0
    assert fits.float().mean() > 0.5
    at_target = truth.gather(1, index[:, None]).squeeze(1)
    usual = float(at_target.square().mean().sqrt())
    reference = at_target.abs().clamp(min=usual)
    error = (sparse - truth).norm(dim=1)
    assert (error <= tolerance * reference + 2.0**-9 * truth.norm(dim=1))[fits].all()
    assert (sparse - truth)[fits].norm() <= (1.5 * tolerance + 2.0**-9) * truth.norm()
    fewest, most = (sparse_rows_ref(truth, at_target, usual, tolerance * x)[0].sum(1) for x in (1.05, 0.95))
    assert (counts >= 0.95 * fewest - 3)[fits].all()
    assert (counts <= 1.05 * most + 3)[fits].all()
    # What the elements are, and their order within a row, does not depend on the order of blocks and threads.
    again = sparse_rows(left, tolerance)
    assert torch.equal(again.counts, counts)
    assert torch.equal(again.dense, sparse)


@on_hopper
def test_rows_that_are_too_long_and_too_many() -> None:
    hidden, weight, index = peaked(40)
    left, _ = left_by(hidden, weight, index, torch.ones(40, device="cuda"))
    counts = sparse_rows(left, 1e-3).counts
    middle = int(counts.median())
    few = sparse_rows(left, 1e-3, (middle - 3, middle))
    assert torch.equal(few.counts, counts.where(counts <= middle, -1))
    assert 0 < few.totals[2] < 40
    # Whatever has no room is counted all the same, and nothing is written beyond the room there is.
    short, long = few.totals[:2]
    assert sparse_rows(left, 1e-3, (middle - 3, middle), room=(short - 1, long)).totals[0] > short - 1
    assert sparse_rows(left, 1e-3, (middle - 3, middle), room=(short, long - 1)).totals[1] > long - 1
    assert sparse_rows(left, 1e-3, (middle - 3, middle), most_dense=0).totals[3] > 0


def run(op: Any, leaves: list[Tensor], **inputs: Any) -> tuple[Any, list[Tensor]]:
    x = [leaf.detach().clone().requires_grad_(leaf.requires_grad) for leaf in leaves]
    out = op(*x[:2], **({"bias": x[2]} if len(x) > 2 else {}), **inputs)
    value = out.loss if hasattr(out, "loss") else out.sum()
    return out, list(torch.autograd.grad(value, [y for y in x if y.requires_grad]))


@on_hopper
@pytest.mark.parametrize("flat", [0.0, 0.2, 1.0], ids=["all sparse", "some dense", "all dense"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("workspace", [None, 5_008 * 2 * 192], ids=["one section", "several"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("long_on_average", [128, 8])
def test_losses(
    flat: float,
    masked: bool,
    workspace: int | None,
    bias: bool,
    long_on_average: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Of 512 rows some are long, with room for all of them or, at 8 a row, not; and a few are dense.
    monkeypatch.setattr(_sparse, "SHORT", 256)
    monkeypatch.setattr(_sparse, "LONG", 512)
    monkeypatch.setattr(_sparse, "LONG_ON_AVERAGE", long_on_average)
    count = 512
    hidden, weight, index = peaked(count, sure=14.0)
    hidden[count - int(flat * count) :] *= 0.05
    leaves = [hidden[None].requires_grad_(), weight.requires_grad_()]
    if bias:
        leaves.append(rand(V, seed=8, scale=0.1).bfloat16().requires_grad_())
    mask = (torch.arange(count, device="cuda") % 5 != 2)[None] if masked else None
    inputs: dict[str, Any] = {
        "completion_ids": index[None],
        "completion_mask": mask,
        "advantages": rand(1, count, seed=7),
        "workspace_bytes": workspace,
        "config": GRPOLossConfig(loss_type="bnpo"),
    }
    dense, dense_gradients = run(linear_grpo_loss, leaves, impl="cuda", **inputs)
    sparse, gradients = run(linear_grpo_loss, leaves, impl="cuda", sparse_grad_tol=1e-2, **inputs)
    assert torch.equal(sparse.loss, dense.loss)
    assert torch.equal(sparse.logps, dense.logps)
    for x, y in zip(gradients, dense_gradients, strict=True):
        assert x.dtype == y.dtype
        # The tolerance is that of the logits' gradient; what is dropped, all of one sign, weighs more in a product.
        assert (x.double() - y.double()).norm() <= 2e-2 * y.double().norm()
    if flat < 1.0:
        assert not torch.equal(gradients[0], dense_gradients[0])
    if flat == 1.0 and workspace is None:
        assert all(torch.equal(x, y) for x, y in zip(gradients, dense_gradients, strict=True))
    elif flat < 1.0 and not masked and workspace is None:
        again = run(linear_grpo_loss, leaves, impl="cuda", sparse_grad_tol=1e-2, **inputs)[1]
        assert all(torch.equal(x, y) for x, y in zip(gradients, again, strict=True))


@on_hopper
@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_the_other_ops_and_what_is_frozen(frozen: str) -> None:
    hidden, weight, index = peaked(300)
    leaves = [hidden.requires_grad_(frozen != "hidden"), weight.requires_grad_(frozen != "weight")]
    for op, name in ((linear_selective_log_softmax, "index"), (linear_cross_entropy, "labels")):
        inputs: dict[str, Any] = {name: index, "impl": "cuda"}
        value, (truth,) = run(op, leaves, **inputs)
        found, (gradient,) = run(op, leaves, sparse_grad_tol=3e-3, **inputs)
        assert torch.equal(found, value)
        assert (gradient.double() - truth.double()).norm() <= 6e-3 * truth.double().norm()
        assert not torch.equal(gradient, truth)


@on_hopper
@pytest.mark.parametrize("tilted", [False, True], ids=["", "entropy bonus"])
def test_rows_without_a_gradient(tilted: bool) -> None:
    """Dead rows are projected after the live ones, for their log-probs; the live ones may be dense or sparse."""
    hidden, weight, index = peaked(300)
    advantages = rand(1, 300, seed=7) * (torch.arange(300, device="cuda") % 3 > 0)
    inputs: dict[str, Any] = {"completion_ids": index[None], "advantages": advantages, "impl": "cuda"}
    inputs["config"] = GRPOLossConfig(entropy_coef=0.01 * tilted)
    leaves = [hidden[None].requires_grad_(), weight.requires_grad_()]
    dense, truth = run(linear_grpo_loss, leaves, **inputs)
    sparse, found = run(linear_grpo_loss, leaves, sparse_grad_tol=3e-3, **inputs)
    assert torch.equal(sparse.logps, dense.logps)
    for x, y in zip(found, truth, strict=True):
        assert 0.0 < (x.double() - y.double()).norm() <= 8e-3 * y.double().norm()


@on_hopper
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [8, 264, 1_000])
def test_sums_of_rows(dtype: torch.dtype, width: int) -> None:
    """Sums of no entry, of a few, and of more than a warp takes; onto nothing, onto another matrix, and in place."""
    from grpo_fast import cuda_linear

    counts = torch.tensor([0, 1, 3, 32, 33, 700, 0, 2, 16_000, 5] + [1] * 30)
    ends = counts.cumsum(0).cuda()
    starts = ends - counts.cuda()
    starts[6], ends[6] = 0, -1  # a row that is not sparse
    entries = int(counts.sum())
    pairs = torch.randint(0, 500, (entries, 2), device="cuda", dtype=torch.int32)
    weights, matrix = rand(entries, seed=1), rand(500, width, seed=2).bfloat16()
    truth = torch.zeros(counts.numel(), width, device="cuda", dtype=torch.float64)
    owners = torch.arange(counts.numel()).repeat_interleave(counts).cuda()
    truth.index_add_(0, owners, weights.double()[:, None] * matrix[pairs[:, 1].long()].double())
    base = rand(counts.numel(), width, seed=3)
    for onto in (None, base, "itself"):
        out = base.clone() if onto == "itself" else torch.full_like(truth, math.nan, dtype=dtype)
        start = out if onto == "itself" else onto
        expected = truth if onto is None else truth + base.double()
        cuda_linear.sum_of_rows(out, starts, ends, pairs[:, 1], weights, matrix, start)
        bound = 1e-5 * expected.abs().clamp(min=100.0) + (
            2.0**-8 * expected.abs() if out.dtype != torch.float32 else 0
        )
        assert ((out.double() - expected).abs() <= bound).all()


@on_hopper
def test_into_a_buffer() -> None:
    hidden, weight, index = peaked(300)
    buffers = [torch.ones(V, H, device="cuda") for _ in range(2)]
    for buffer, tolerance in zip(buffers, (None, 3e-3), strict=True):
        x, w = hidden[None].clone().requires_grad_(), weight.clone().requires_grad_()
        inputs = {"advantages": torch.ones(1, device="cuda"), "weight_grad_out": buffer, "impl": "cuda"}
        linear_grpo_loss(x, w, index[None], sparse_grad_tol=tolerance, **inputs).loss.backward()
    assert 0.0 < (buffers[1] - buffers[0]).norm() <= 6e-3 * (buffers[0] - 1).norm()
    strided = torch.ones(H, V, device="cuda").t()
    with pytest.raises(ValueError, match="with a strided weight_grad_out, want None, or a contiguous one"):
        linear_grpo_loss(x, w, index[None], sparse_grad_tol=1e-3, **{**inputs, "weight_grad_out": strided})


@on_hopper
def test_not_while_a_graph_is_captured() -> None:
    hidden, weight, index = peaked(40)
    hidden.requires_grad_()
    inputs: dict[str, Any] = {"advantages": torch.ones(1, device="cuda"), "impl": "cuda"}
    refused = pytest.raises(ValueError, match="while a CUDA graph is captured, want None")
    with refused, torch.cuda.graph(torch.cuda.CUDAGraph()):
        linear_grpo_loss(hidden[None], weight, index[None], sparse_grad_tol=1e-3, **inputs)


@on_hopper
def test_a_token_of_most_rows() -> None:
    """A word's entries are taken by the warps of a block, which are added up in order."""
    hidden, weight, index = peaked(2_000, sure=14.0)
    index.fill_(17)
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    truth = run(linear_cross_entropy, leaves, labels=index, impl="cuda")[1][1]
    first, second = (
        run(linear_cross_entropy, leaves, labels=index, impl="cuda", sparse_grad_tol=1e-2)[1][1] for _ in range(2)
    )
    assert torch.equal(first, second)
    assert not torch.equal(first, truth)
    assert (first[17].double() - truth[17].double()).norm() <= 2e-2 * truth[17].double().norm()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sparse_grad_tol": "1e-3"}, "got '1e-3', want a number or None"),
        ({"sparse_grad_tol": True}, "got True, want a number or None"),
        ({"sparse_grad_tol": 0.0}, "got 0.0, want from 1e-4 to 0.1"),
        ({"sparse_grad_tol": 0.5}, "got 0.5, want from 1e-4 to 0.1"),
        ({"impl": "torch"}, "got 0.001 with impl='torch', want None, or impl='cuda' on Hopper"),
        ({"impl": "triton"}, "got 0.001 with impl='triton', want None, or impl='cuda' on Hopper"),
        pytest.param({"allow_sync": False}, "with allow_sync=False, want None, or", marks=on_hopper),
        pytest.param({"softcap": 9.0}, "with softcap, want None, or only one", marks=on_hopper),
        pytest.param({"hidden": torch.ones(2, 3, H)}, "with float32 and bfloat16, want None", marks=on_hopper),
    ],
    ids=str,
)
def test_bad_arguments(changes: dict[str, Any], message: str) -> None:
    hidden, weight, index = peaked(6)
    inputs: dict[str, Any] = {"hidden": hidden.view(2, 3, H), "weight": weight, "index": index.view(2, 3)}
    inputs |= {"impl": "cuda" if HOPPER else "triton", "sparse_grad_tol": 1e-3, **changes}
    if "hidden" in changes:
        inputs["hidden"] = inputs["hidden"].to(DEVICE)
    kinds = (TypeError, ValueError)
    with pytest.raises(kinds, match=message):
        linear_selective_log_softmax(**inputs)
    batch = {"completion_ids": inputs.pop("index"), "advantages": torch.ones(2, device=DEVICE)}
    with pytest.raises(kinds, match=message):
        linear_grpo_loss(**inputs, **batch)
    with pytest.raises(kinds, match=message):
        linear_cross_entropy(**inputs, labels=batch["completion_ids"])

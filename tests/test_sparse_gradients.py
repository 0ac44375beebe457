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


def left_by(
    hidden: Tensor, weight: Tensor, index: Tensor, d_logps: Tensor, d_entropies: Tensor | None = None
) -> tuple[Any, Tensor]:
    """What the product leaves, and the gradient of the logits in float64."""
    from grpo_fast import cuda_linear

    options: dict[str, Any] = {"temperature": 1.0, "logit_scale": 1.0, "softcap": None}
    memory = hidden.new_empty(index.numel(), -(-V // 8) * 8)[:, :V]
    product = cuda_linear.linear_product(hidden, weight, None, index, memory=(memory,), **options)
    found = cuda_linear.linear_logps_fwd(product, return_entropy=d_entropies is not None)
    left = cuda_linear.linear_exponentials(product, None, *found, d_logps, d_entropies)
    log_p = (hidden.double() @ weight.double().t()).log_softmax(-1)
    slopes = -d_logps[:, None].double()
    if d_entropies is not None:
        slopes = slopes - d_entropies[:, None] * (log_p - (log_p.exp() * log_p).sum(1, keepdim=True))
    return left, (slopes * log_p.exp()).scatter_add(1, index[:, None], d_logps[:, None].double())


class Sparse(NamedTuple):
    """What was found of rows."""

    dense: Tensor  # (n, V) float64, the elements in their places
    raised: Tensor  # (n, V) bool
    counts: Tensor  # (n,), -1 of a row that cannot be sparse
    totals: list[int]


def sparse_rows(
    left: Any, tolerance: float, most: tuple[int, int] = (40, V), first_row: int = 1_000, **limits: Any
) -> Sparse:
    n, guard = left.slopes.size(0), 64
    limits = {"room": (n * V, n * V), "most_dense": n, **limits}
    room = sum(limits["room"])
    inside = slice(guard, guard + room)  # short rows without room would be written before it, long ones after
    all_keys = torch.full((room + 2 * guard,), -7, device="cuda")
    all_elements = torch.full((room + 2 * guard,), math.nan, device="cuda")
    keys, elements = all_keys[inside], all_elements[inside]
    starts, ends, totals, _ = left.sparse(tolerance, keys, elements, first_row=first_row, most=most, **limits)
    for edge in (slice(0, guard), slice(guard + room, None)):
        assert (all_keys[edge] == -7).all()
        assert all_elements[edge].isnan().all()
    counts, sums = (ends - starts).clamp(min=-1), totals.tolist()
    found = torch.zeros(n, V, device="cuda", dtype=torch.float64)
    raised = torch.zeros(n, V, device="cuda", dtype=torch.bool)
    if all(has <= room for has, room in zip(sums, limits["room"], strict=False)) and sums[3] <= limits["most_dense"]:
        for row, (start, end) in enumerate(zip(starts.tolist(), ends.tolist(), strict=True)):
            assert (end - start > most[0]) == (end > start >= limits["room"][0])
            own = keys[start : max(end, start)]
            words, rows = own >> 32 & (2**31 - 1), own & (2**32 - 1)
            assert (rows == first_row + row).all()
            assert (words.diff() > 0).all()
            found[row, words] = elements[start : max(end, start)].double()
            raised[row, words] = own < 0
        long = counts > most[0]
        assert sums[0] == int(counts.clamp(min=0).where(~long, 0).sum())
        assert sums[1:] == [int(counts.where(long, 0).sum()), int(long.sum()), int((counts < 0).sum())]
    return Sparse(found, raised, counts, sums)


@pytest.mark.parametrize("tolerance", [1e-1, 1e-2, 3e-3])
def test_the_rule(tolerance: float) -> None:
    """Errors are within their bounds, all together and row by row; with twice the threshold one would not be."""
    hidden, weight, index = peaked(200, sure=14.0)
    hidden[10:14] *= 0.05
    p = (hidden.double() @ weight.double().t()).softmax(-1)
    gradient = (torch.nn.functional.one_hot(index, V) - p) * rand(200, 1, seed=5).double()
    gradient[3] *= 30.0
    at_target = gradient.gather(1, index[:, None]).squeeze(1)
    usual = float(at_target.square().mean().sqrt())
    thresholds, fits = sparse_rows_ref(gradient, at_target, usual, tolerance)
    assert fits.float().mean() > 0.9
    assert variance(gradient, thresholds)[fits].sum().sqrt() <= tolerance * gradient.norm()
    most = (4 * tolerance * usual) ** 2 * (at_target.abs() / usual).clamp(min=1.0)
    assert (variance(gradient, thresholds) <= most)[fits].all()
    assert (thresholds <= tolerance * usual).all()
    common = thresholds[fits].max()
    once, twice = (bound(gradient, (k * common).expand(200)) for k in (1, 2))
    assert once.sum() <= 200 * (tolerance * usual) ** 2
    assert 2 * common > tolerance * usual or twice.sum() > 200 * (tolerance * usual) ** 2
    smaller = fits & (thresholds < common)
    assert (tolerance < 0.1) <= smaller.sum() < 100
    assert (bound(gradient, 2 * thresholds) > most)[smaller].all()


def bound(gradient: Tensor, thresholds: Tensor) -> Tensor:
    """What the expected square of a row's error is no more than, by the sum of what is small."""
    x, t = gradient.abs(), thresholds[:, None]
    return thresholds * torch.where(x < t, x, 0.0).sum(1)


def variance(gradient: Tensor, thresholds: Tensor) -> Tensor:
    """The expected square of a row's error, of elements that are drawn where they are below its threshold."""
    x, t = gradient.abs(), thresholds[:, None]
    return torch.where(x < t, x * (t - x), 0.0).sum(1)


@on_hopper
@pytest.mark.parametrize(("tolerance", "sure"), [(1e-1, 9.0), (1e-2, 9.0), (3e-3, 9.0), (3e-4, 20.0)])
@pytest.mark.parametrize("tilted", [False, True], ids=["", "entropy"])
def test_what_is_kept(tolerance: float, sure: float, tilted: bool) -> None:
    hidden, weight, index = peaked(300, sure)
    d_logps, d_entropies = rand(300, seed=5), tilted * rand(300, seed=6, scale=0.1)
    d_logps[7] = d_entropies[7] = 0.0
    left, truth = left_by(hidden, weight, index, d_logps, d_entropies if tilted else None)
    found = sparse_rows(left, tolerance)
    sparse, counts = found.dense, found.counts
    assert counts[7] == 0
    fits = counts > 0
    assert fits.float().mean() > 0.3
    at_target = truth.gather(1, index[:, None]).squeeze(1)
    usual = float(at_target.square().mean().sqrt())
    thresholds, can_be_sparse = sparse_rows_ref(truth, at_target, usual, tolerance)
    assert ((counts < 0) == ~can_be_sparse).float().mean() > 0.98
    # Where a sum is close to the bound, what 9 digits leave of it may be on the other side.
    smallest = sparse.abs().where(sparse != 0, math.inf).amin(1)
    drawn = (sparse != 0) & (truth.abs() < 0.98 * smallest[:, None])
    factor = (smallest / thresholds)[fits & drawn.any(1)]
    assert ((factor - 1).abs() < 1e-2).float().mean() > 0.98
    assert ((factor > 0.49) & (factor < 2.02)).all()
    # Large elements are what they are, and all there. Parts of log-prob and entropy may cancel.
    p = (hidden.double() @ weight.double().t()).softmax(-1)
    rounding = 2.0**-8 * (truth.abs() + d_entropies.abs()[:, None] * p)
    large = truth.abs() > 1.02 * smallest[:, None] + rounding
    assert ((sparse - truth).abs() <= rounding)[large & fits[:, None]].all()
    assert (sparse != 0)[large & fits[:, None]].all()
    # Small ones that are there are as large as the threshold, have the right sign, and are as many as expected.
    drawn &= truth.abs() > rounding
    assert ((sparse / smallest[:, None] - truth.sign()).abs() < 1e-2)[drawn & fits[:, None]].all()
    chance = (truth.abs() / smallest[:, None]).where(~large, 0.0)[fits].clamp(max=1.0)
    off = ((sparse != 0) & ~large)[fits].sum() - chance.sum()
    assert off.abs() <= 4 * (chance * (1 - chance)).sum().sqrt() + 2e-3 * chance.sum()
    assert found.raised[drawn & fits[:, None]].all()
    assert not found.raised[large | (sparse == 0)].any()
    # What the elements are, and their order within a row, does not depend on the order of blocks and threads.
    again = sparse_rows(left, tolerance)
    assert torch.equal(again.counts, counts)
    assert torch.equal(again.dense, sparse)


@on_hopper
@pytest.mark.parametrize(("flat", "half"), [(0, False), (20, False), (0, True)], ids=["", "a few flat rows", "half"])
def test_the_error_of_many_rows(flat: int, half: bool) -> None:
    """The threshold follows from a part of the rows, which may have none or many of those with the largest errors."""
    count, tolerance = 3_000, 1e-2
    hidden, weight, index = peaked(count, sure=14.0)
    hidden[:flat] *= 0.05
    hidden[count // 2 :] *= 0.4 if half else 1.0
    d_logps = rand(count, seed=5)
    d_logps[flat : 5 * flat] *= 20.0
    left, truth = left_by(hidden, weight, index, d_logps)
    found = sparse_rows(left, tolerance)
    assert (found.counts < 0).sum() <= flat
    error = (found.dense - truth)[found.counts >= 0].norm() / truth.norm()
    assert 0.4 * tolerance <= error <= 1.15 * tolerance
    again = sparse_rows(left, tolerance)
    assert torch.equal(again.dense, found.dense)


@on_hopper
@pytest.mark.parametrize(("tolerance", "smaller"), [(1e-2, [0, 1, 2, 3]), (6e-3, [2, 3])])
def test_flat_rows_among_peaked_ones(tolerance: float, smaller: list[int]) -> None:
    """They have smaller thresholds, but those of large rows are not as much smaller."""
    hidden, weight, index = peaked(300, sure=24.0)
    hidden[:4] *= 0.05
    d_logps = rand(300, seed=5)
    d_logps[:2], d_logps[2:4] = 5.0, 1.0
    left, truth = left_by(hidden, weight, index, d_logps)
    at_target = truth.gather(1, index[:, None]).squeeze(1)
    thresholds, _ = sparse_rows_ref(truth, at_target, at_target.square().mean().sqrt(), tolerance)
    assert (thresholds[:4] < thresholds.max()).nonzero().squeeze(1).tolist() == smaller
    found = sparse_rows(left, tolerance)
    raised = found.dense.abs().where(found.raised, 0.0)[:4].amax(1)
    assert ((raised / thresholds[:4] - 1).abs() < 1e-2).all()


@on_hopper
@pytest.mark.parametrize(("sure", "fits"), [(20.0, False), (22.0, True)])
def test_what_is_below_all_thresholds(sure: float, fits: bool) -> None:
    """It adds up: too much of it, and no row is sparse."""
    hidden, weight, index = peaked(300, sure)
    left, _ = left_by(hidden, weight, index, rand(300, seed=5))
    is_sparse = sparse_rows(left, 1e-4).counts >= 0
    assert is_sparse.float().mean() > 0.9 if fits else not is_sparse.any()


@on_hopper
def test_nothing_is_lost_on_average() -> None:
    """Of a row many times over, each time with other draws, of which half of it is too small to be kept as it is."""
    count, tolerance = 2_000, 3e-2
    hidden, weight, index = peaked(1, sure=3.0)
    hidden, index = hidden.expand(count, -1).contiguous(), index.expand(count).contiguous()
    left, truth = left_by(hidden, weight, index, torch.ones(count, device="cuda"))
    sparse = sparse_rows(left, tolerance).dense
    threshold = sparse[sparse != 0].abs().min()
    small = truth[0].abs() < 0.98 * threshold
    assert 0.2 < truth[0][small].abs().sum() / truth[0, index[0]] < 0.5
    off = (sparse - truth)[:, small]
    error = variance(truth[:1], threshold[None]).sum().sqrt()
    assert error <= tolerance * truth[0, index[0]]
    assert (off.square().sum(1).mean().sqrt() - error).abs() <= 0.05 * error
    # One by one, and all of them together, which have one sign.
    assert off.mean(0).norm() <= 1.1 * error / math.sqrt(count)
    assert off.mean(0).sum().abs() <= 4 * error / math.sqrt(count)


@on_hopper
def test_rows_that_are_too_long_and_too_many() -> None:
    hidden, weight, index = peaked(40)
    left, _ = left_by(hidden, weight, index, torch.ones(40, device="cuda"))
    counts = sparse_rows(left, 1e-3).counts
    middle = int(counts.median())
    few = sparse_rows(left, 1e-3, (middle - 3, middle))
    assert torch.equal(few.counts, counts.where(counts <= middle, -1))
    assert 0 < few.totals[2] < 40
    # As few rows are all sampled, whether they are too flat is known ahead of the search.
    short, long, _, dense = few.totals
    for limits in ({"room": (short - 1, long)}, {"room": (short, long - 1), "most_dense": dense}, {"most_dense": 0}):
        assert sparse_rows(left, 1e-3, (middle - 3, middle), **limits).totals == [0, 0, 0, 40]
    assert sparse_rows(left, 1e-3, (middle - 3, middle), room=(short, long)).totals == few.totals


@on_hopper
def test_elements_without_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """The only row sampled, the first, is 0: what there is no room for is seen as it is counted, and not written."""
    from grpo_fast import cuda_linear

    monkeypatch.setattr(cuda_linear, "SAMPLED_ROWS", 1)
    hidden, weight, index = peaked(40)
    upstream = torch.ones(40, device="cuda")
    upstream[0] = 0.0
    left, _ = left_by(hidden, weight, index, upstream)
    middle = int(sparse_rows(left, 1e-3, first_row=0).counts.median())
    most = (middle - 3, middle)
    few = sparse_rows(left, 1e-3, most, first_row=0)
    short, long, longs, dense = few.totals
    assert longs > 0
    assert dense > 0
    assert sparse_rows(left, 1e-3, most, first_row=0, room=(short - 1, long)).totals[0] > short - 1
    assert sparse_rows(left, 1e-3, most, first_row=0, room=(short, long - 1)).totals[1] > long - 1
    assert sparse_rows(left, 1e-3, most, first_row=0, most_dense=dense - 1).totals[3] == dense


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
@pytest.mark.parametrize("long_on_average", [64, 8])
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
        assert (x.double() - y.double()).norm() <= 1.2e-2 * y.double().norm()
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
    hidden, weight, index = peaked(300, sure=12.0)
    leaves = [hidden.requires_grad_(frozen != "hidden"), weight.requires_grad_(frozen != "weight")]
    for op, name in ((linear_selective_log_softmax, "index"), (linear_cross_entropy, "labels")):
        inputs: dict[str, Any] = {name: index, "impl": "cuda"}
        value, (truth,) = run(op, leaves, **inputs)
        found, (gradient,) = run(op, leaves, sparse_grad_tol=3e-3, **inputs)
        if op is linear_selective_log_softmax:
            with torch.no_grad():  # a frozen head's that have a gradient, and no tolerance, come from another kernel
                value = op(*leaves, **inputs)
        assert torch.equal(found, value)
        assert (gradient.double() - truth.double()).norm() <= 6e-3 * truth.double().norm()
        assert not torch.equal(gradient, truth)


@on_hopper
@pytest.mark.parametrize("tilted", [False, True], ids=["", "entropy bonus"])
def test_rows_without_a_gradient(tilted: bool) -> None:
    """Dead rows are projected after the live ones, for their log-probs; the live ones may be dense or sparse."""
    hidden, weight, index = peaked(300, sure=12.0)
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
@pytest.mark.parametrize("rows", [79, 3_001, 70_001])
def test_sums_of_rows(dtype: torch.dtype, width: int, rows: int) -> None:
    """Sums of no entry, of a few, and of more than a warp takes; onto nothing, onto another matrix, and in place.

    A block has one of a few sums, some of more, or as many as it can.
    """
    from grpo_fast import cuda_linear

    counts = torch.randint(0, 4, (rows,), generator=torch.Generator().manual_seed(4))
    counts[-74:-64] = torch.tensor([0, 1, 3, 32, 33, 700, 0, 2, 16_000, 5])
    ends = counts.cumsum(0).cuda()
    starts = ends - counts.cuda()
    starts[-68], ends[-68] = 0, -1  # a row that is not sparse
    entries = int(counts.sum())
    pairs = torch.randint(0, 500, (entries, 2), device="cuda", dtype=torch.int32)
    weights, matrix = rand(entries, seed=1), rand(500, width, seed=2).bfloat16()
    truth = torch.zeros(counts.numel(), width, device="cuda", dtype=torch.float64)
    owners = torch.arange(counts.numel()).repeat_interleave(counts).cuda()
    truth.index_add_(0, owners, weights.double()[:, None] * matrix[pairs[:, 1].long()].double())
    pairs[::3] |= -(2**31)  # does not count
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
@pytest.mark.parametrize(
    ("totals", "passed"),
    [
        ([10, 5, 9, 2], False),
        ([11, 0, 0, 0], True),
        ([0, 0, 0, 3], True),
        ([0, 6, 1, 1], False),  # one long row and one dense one
        ([0, 6, 2, 1], True),
    ],
    ids=str,
)
def test_no_sum_is_written_if_limits_are_passed(totals: list[int], passed: bool) -> None:
    from grpo_fast import _C, cuda_linear

    found, at = torch.tensor(totals, device="cuda"), torch.zeros(4, device="cuda", dtype=torch.int64)
    limits = _C.SparseLimits(totals=found.data_ptr(), room=(10, 5), most_dense=2)
    out, words = torch.full((4, H), 7.0, device="cuda"), torch.zeros(1, 2, device="cuda", dtype=torch.int32)
    matrix = rand(1, H, seed=0).bfloat16()
    cuda_linear.sum_of_rows(out, at, at, words[:, 1], torch.ones(1, device="cuda"), matrix, limits=limits)
    assert (out == (7.0 if passed else 0.0)).all()


@on_hopper
def test_into_a_buffer() -> None:
    hidden, weight, index = peaked(300, sure=12.0)
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
def test_what_is_raised_is_for_the_hidden_states() -> None:
    """A word that is rare in every row has none."""
    hidden, weight, index = peaked(300, sure=14.0)  # no row is dense: all words would have a gradient
    bias = torch.zeros(V, device="cuda")
    leaves = [hidden.requires_grad_(), weight.requires_grad_(), bias.requires_grad_()]
    truth = run(linear_cross_entropy, leaves, labels=index, impl="cuda")[1]
    found = run(linear_cross_entropy, leaves, labels=index, impl="cuda", sparse_grad_tol=1e-2)[1]
    assert (found[0].double() - truth[0].double()).norm() <= 1.2e-2 * truth[0].double().norm()
    kept = found[2] != 0
    assert torch.equal(kept, (found[1] != 0).any(1))
    assert 0 < kept.sum() < 0.8 * V  # of nearly all something is drawn
    assert truth[2][~kept].abs().max() < 0.01 * truth[2].abs().max()


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

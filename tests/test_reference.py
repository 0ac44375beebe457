"""The reference itself: gradients, layouts, masks, hostile values, and what TRL has no counterpart for."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from grpo_fast import (
    GRPOLossConfig,
    GRPOLossOutput,
    group_advantages,
    grpo_loss,
    linear_cross_entropy,
    linear_distillation_loss,
    linear_grpo_loss,
    linear_selective_log_softmax,
    selective_log_softmax,
)
from grpo_fast.reference import kl_ref, linear_logps_ref

B, T, V, H = 4, 5, 7, 3
LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "vespo")


def rand(*shape: int, seed: int, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale


def ids(*shape: int, seed: int = 9) -> Tensor:
    return torch.randint(0, V, shape, generator=torch.Generator().manual_seed(seed))


MASK = torch.arange(T) < torch.tensor([5, 2, 3, 1])[:, None]


def batch(seed: int = 0) -> dict[str, Any]:
    """Everything a loss takes beside the model, padded."""
    return {
        "completion_ids": ids(B, T),
        "completion_mask": MASK,
        "advantages": rand(B, seed=seed + 1),
        "old_logps": rand(B, T, seed=seed + 2, scale=0.4) - 2.3,
        "ref_logps": rand(B, T, seed=seed + 3, scale=0.4) - 2.3,
    }


def config(loss_type: str, **options: Any) -> GRPOLossConfig:
    options.setdefault("epsilon_high", 2.0 if loss_type == "cispo" else 0.3)
    return GRPOLossConfig(loss_type=loss_type, **options)


# Gradients ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo", "luspo", "sapo"])
def test_gradcheck_of_the_loss(loss_type: str, level: str) -> None:
    """Against finite differences, in float64. (cispo and vespo hold a factor fixed: see the next test.)"""
    c = config(loss_type, importance_sampling_level=level, beta=0.2, entropy_coef=0.1)
    options = dict(temperature=1.3, logit_scale=0.8, softcap=4.0, config=c)

    def of_logits(x: Tensor) -> Tensor:
        return grpo_loss(x, **batch(), **options).loss

    def of_hidden(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return linear_grpo_loss(x, w, bias=b, **batch(), **options).loss

    assert torch.autograd.gradcheck(of_logits, rand(B, T, V, seed=4).requires_grad_())
    head = (rand(B, T, H, seed=5), rand(V, H, seed=6), rand(V, seed=7))
    assert torch.autograd.gradcheck(of_hidden, tuple(x.requires_grad_() for x in head))


@pytest.mark.parametrize("loss_type", ["cispo", "vespo"])
def test_detached_factors(loss_type: str) -> None:
    """The gradient is that of weight * A * logp with the weight held: recovered as the loss at shifted logps."""
    c = config(loss_type)
    logits = rand(B, T, V, seed=4).requires_grad_()
    out = grpo_loss(logits, **batch(), config=c)
    (grad,) = torch.autograd.grad(out.loss, logits)
    logps = logits.log_softmax(-1).gather(-1, ids(B, T)[..., None])[..., 0]
    log_ratio = (logps - batch()["old_logps"]).detach()
    adv = batch()["advantages"][:, None].expand(B, T)
    if loss_type == "cispo":
        weight = log_ratio.exp().clamp(max=2.0)
    else:
        log_w = (log_ratio.clamp(-20, 20) * MASK).sum(-1, keepdim=True).clamp(math.log(1e-8), 20.0)
        k, lam = torch.where(adv >= 0, 2.0, 3.0), torch.where(adv >= 0, 3.0, 2.0)
        weight = torch.exp(lam + k * log_w - lam * log_w.exp())
    loss = -(weight * adv * logps * MASK).sum() / MASK.sum()
    torch.testing.assert_close(out.loss, loss)
    torch.testing.assert_close(grad, torch.autograd.grad(loss, logits)[0])


def test_gradcheck_of_the_other_ops() -> None:
    hidden, weight, bias = (x.requires_grad_() for x in (rand(B, T, H, seed=1), rand(V, H, seed=2), rand(V, seed=3)))
    check: Callable[..., bool] = torch.autograd.gradcheck
    options: dict[str, Any] = dict(mask=MASK, temperature=0.7, softcap=3.0, return_entropy=True)
    assert check(lambda x: selective_log_softmax(x, ids(B, T), **options), rand(B, T, V, seed=4).requires_grad_())
    assert check(
        lambda h, w, b: linear_selective_log_softmax(h, w, ids(B, T), bias=b, **options),
        (hidden, weight, bias),
    )
    labels = torch.where(MASK, ids(B, T), -100)
    for reduction in ("mean", "sum", "none"):
        assert check(
            lambda h, w, b, r=reduction: linear_cross_entropy(h, w, labels, bias=b, reduction=r),
            (hidden, weight, bias),
        )
    teacher = rand(B, T, 2, seed=8), rand(V, 2, seed=9)
    for beta in (0.0, 0.4, 1.0):
        assert check(
            lambda h, w, b=beta: linear_distillation_loss(
                h, w, *teacher, beta=b, completion_mask=MASK, temperature=2
            ),
            (hidden, weight),
        )


def test_upstream_gradient() -> None:
    logits = rand(B, T, V, seed=4).requires_grad_()
    (once,) = torch.autograd.grad(grpo_loss(logits, **batch()).loss, logits)
    (scaled,) = torch.autograd.grad(grpo_loss(logits, **batch()).loss, logits, torch.tensor(-2.5).double())
    torch.testing.assert_close(scaled, -2.5 * once)


@pytest.mark.parametrize("frozen", ["hidden", "weight", "bias"])
def test_any_input_may_be_frozen(frozen: str) -> None:
    tensors = {"hidden": rand(B, T, H, seed=1), "weight": rand(V, H, seed=2), "bias": rand(V, seed=3)}
    free = {k: v.clone().requires_grad_() for k, v in tensors.items()}
    some = {k: v.clone().requires_grad_(k != frozen) for k, v in tensors.items()}
    linear_grpo_loss(**free, **batch()).loss.backward()
    linear_grpo_loss(**some, **batch()).loss.backward()
    for name, x in some.items():
        if name == frozen:
            assert x.grad is None
        else:
            torch.testing.assert_close(x.grad, free[name].grad)


# Layouts -----------------------------------------------------------------------------------------------------

PER_TOKEN = ("completion_ids", "old_logps", "ref_logps")


def pack(inputs: dict[str, Any]) -> dict[str, Any]:
    packed = {k: v[MASK] if k in PER_TOKEN else v for k, v in inputs.items() if k != "completion_mask"}
    packed["cu_seqlens"] = torch.cat([torch.zeros(1, dtype=torch.long), MASK.sum(1).cumsum(0)])
    return packed


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_packed_equals_padded(loss_type: str, level: str) -> None:
    c = config(
        loss_type, importance_sampling_level=level, beta=0.2, entropy_coef=0.1, off_policy_mask_threshold=0.2,
        max_completion_length=T,
    )  # fmt: skip
    logits = rand(B, T, V, seed=4).requires_grad_()
    padded = grpo_loss(logits, **batch(), config=c)
    (want,) = torch.autograd.grad(padded.loss, logits)
    packed = grpo_loss(logits[MASK], **pack(batch()), config=c)
    (got,) = torch.autograd.grad(packed.loss, logits)
    torch.testing.assert_close(packed.loss, padded.loss)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(packed.logps, padded.logps[MASK])
    assert packed.metrics.keys() == padded.metrics.keys()
    for name, value in packed.metrics.items():
        torch.testing.assert_close(value, padded.metrics[name], msg=name)


def test_packed_rows_past_the_end_are_padding() -> None:
    packed = pack(batch())
    n = packed["completion_ids"].numel()
    logits = rand(n, V, seed=4)
    want = grpo_loss(logits, **packed).loss
    extended = {k: torch.cat([v, torch.full((3,), 10**6).to(v)]) if k in PER_TOKEN else v for k, v in packed.items()}
    got = grpo_loss(torch.cat([logits, torch.full((3, V), torch.nan).double()]), **extended).loss
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("chunk_rows", [1, 3, 100])
def test_chunks_do_not_matter(chunk_rows: int) -> None:
    hidden, weight = rand(B, T, H, seed=1), rand(V, H, seed=2)
    want = selective_log_softmax(hidden @ weight.T, ids(B, T), mask=MASK, return_entropy=True)
    got = linear_logps_ref(hidden, weight, ids(B, T), mask=MASK, chunk_rows=chunk_rows)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_linear_equals_logits(loss_type: str) -> None:
    hidden, weight = rand(B, T, H, seed=1), rand(V, H, seed=2)
    c = config(loss_type, beta=0.1)
    a = linear_grpo_loss(hidden, weight, **batch(), config=c)
    b = grpo_loss(hidden @ weight.T, **batch(), config=c)
    torch.testing.assert_close(a, b)


def test_strided_logits() -> None:
    whole = rand(B, T + 3, V + 2, seed=1)[:, 2:-1, 1:-1]
    assert not whole.is_contiguous()
    torch.testing.assert_close(grpo_loss(whole, **batch()), grpo_loss(whole.contiguous(), **batch()))


def test_linear_memory_is_bounded_by_a_chunk() -> None:
    """The largest tensor that autograd keeps or the forward builds is a chunk's logits, not N x V."""
    rows, vocabulary, chunk = 64, 1000, 8
    hidden = torch.randn(rows, 4, requires_grad=True)
    weight = torch.randn(vocabulary, 4, requires_grad=True)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for x in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(x, Tensor):
                    largest = max(largest, x.numel())
            return out

    with Watch():
        logps, entropy = linear_logps_ref(hidden, weight, torch.zeros(rows, dtype=torch.long), chunk_rows=chunk)
        (logps.sum() + entropy.sum()).backward()
    assert largest == chunk * vocabulary
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x):
        linear_logps_ref(hidden, weight, torch.zeros(rows, dtype=torch.long), chunk_rows=chunk)
    assert max(saved) <= weight.numel()


# Hostile values ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("garbage", [torch.nan, torch.inf, -torch.inf, 1e30])
def test_what_is_masked_never_matters(loss_type: str, garbage: float) -> None:
    c = config(loss_type, beta=0.2, entropy_coef=0.1, off_policy_mask_threshold=0.1, max_completion_length=T)
    clean = batch() | {"advantages": rand(B, T, seed=3), "sampling_logps": rand(B, T, seed=5) - 2}
    clean["importance_sampling_ratio"] = rand(B, T, seed=6, scale=0.2).exp()
    dirty = dict(clean)
    for name, x in clean.items():
        if name == "completion_ids":
            dirty[name] = torch.where(MASK, x, -(10**9))
        elif name != "completion_mask":
            dirty[name] = torch.where(MASK, x, garbage)
    logits, hidden, weight = rand(B, T, V, seed=4), rand(B, T, H, seed=1), rand(V, H, seed=2)

    def run(inputs: dict[str, Any], fill: float | None) -> tuple[GRPOLossOutput, ...]:
        x, h = (v if fill is None else torch.where(MASK[..., None], v, fill) for v in (logits, hidden))
        x, h, w = (v.clone().requires_grad_() for v in (x, h, weight))
        outs = grpo_loss(x, **inputs, config=c), linear_grpo_loss(h, w, **inputs, config=c)
        grads.append(torch.autograd.grad(outs[0].loss + outs[1].loss, (x, h, w)))
        return outs

    grads: list[tuple[Tensor, ...]] = []
    torch.testing.assert_close(run(clean, None), run(dirty, garbage))
    torch.testing.assert_close(*grads)
    assert not grads[1][0][~MASK].any()


def test_banned_tokens() -> None:
    """-inf logits: as if the vocabulary were smaller, in value, entropy and gradient."""
    logits = rand(6, V, seed=1)
    index = ids(6).clamp(max=V - 3)
    banned = torch.cat([logits[:, : V - 2], torch.full((6, 2), -torch.inf).double()], 1).requires_grad_()
    small = logits[:, : V - 2].clone().requires_grad_()
    for x in (banned, small):
        logps, entropy = selective_log_softmax(x, index, return_entropy=True)
        assert isinstance(entropy, Tensor)
        (logps.sum() + 0.3 * entropy.sum()).backward()
    assert banned.grad is not None
    torch.testing.assert_close(banned.grad[:, : V - 2], small.grad)
    assert not banned.grad[:, V - 2 :].any()
    sampled = selective_log_softmax(banned, torch.full((6,), V - 1))
    assert isinstance(sampled, Tensor)
    assert (sampled == -torch.inf).all()


@pytest.mark.parametrize("bad", [-1, V, 10**9, -100])
def test_ids_outside_the_vocabulary_are_visible(bad: int) -> None:
    index = ids(B, T)
    index[0, 1] = bad
    logps = selective_log_softmax(rand(B, T, V, seed=1), index)
    assert isinstance(logps, Tensor)
    assert logps.isnan().nonzero().tolist() == [[0, 1]]
    inputs = batch() | {"completion_ids": index}
    assert grpo_loss(rand(B, T, V, seed=1), **inputs).loss.isnan()
    assert linear_grpo_loss(rand(B, T, H, seed=1), rand(V, H, seed=2), **inputs).loss.isnan()


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_nothing_to_learn_from(loss_type: str) -> None:
    """All masked, or an empty batch: loss 0, gradient 0, no NaN among the means."""
    c = config(loss_type, max_completion_length=T)
    logits = rand(B, T, V, seed=1).requires_grad_()
    out = grpo_loss(logits, **(batch() | {"completion_mask": torch.zeros(B, T)}), config=c)
    (grad,) = torch.autograd.grad(out.loss, logits)
    assert out.loss == 0
    assert not grad.any()
    for n in (0, 1):
        empty = {k: v[:n] for k, v in batch().items()}
        loss = grpo_loss(logits[:n], **empty, config=c).loss
        assert loss == 0 if n == 0 else loss.isfinite()
        loss = linear_grpo_loss(rand(n, T, H, seed=1), rand(V, H, seed=2), **empty, config=c).loss
        assert loss == 0 if n == 0 else loss.isfinite()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_precision(dtype: torch.dtype) -> None:
    """Half precision inputs are computed in float32: against float64 on the same inputs, peaked rows included."""
    hidden = torch.randn(200, 16).to(dtype)
    weight = (torch.randn(300, 16) * 3).to(dtype)
    index = (hidden.float() @ weight.float().T).argmax(-1)
    want = selective_log_softmax(hidden.double() @ weight.double().T, index)
    got = linear_selective_log_softmax(hidden, weight, index)
    assert isinstance(got, Tensor)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), want, rtol=0, atol=3e-5)


def test_autocast_does_not_round_the_logits() -> None:
    hidden, weight = torch.randn(50, 16), torch.randn(90, 16)
    index = torch.randint(0, 90, (50,))
    want = linear_selective_log_softmax(hidden, weight, index)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(linear_selective_log_softmax(hidden, weight, index), want, rtol=0, atol=0)


def test_repeatable() -> None:
    first, second = (grpo_loss(rand(B, T, V, seed=1).float(), **batch()) for _ in range(2))
    torch.testing.assert_close(first, second, rtol=0, atol=0)


# What TRL has no counterpart for -------------------------------------------------------------------------------


def test_kl_estimators() -> None:
    """Their means over samples approach the KL; k3 is non-negative, and exact where exp(d) - d - 1 cancels."""
    p, q = rand(V, seed=1).softmax(0), rand(V, seed=2).softmax(0)
    exact = (p * (p / q).log()).sum()
    for name in ("k1", "k3"):
        torch.testing.assert_close((p * kl_ref(p.log(), q.log(), name)).sum(), exact)
    d = (q / p).log()
    torch.testing.assert_close(kl_ref(p.log(), q.log(), "k2"), d**2 / 2)
    assert (kl_ref(p.log(), q.log(), "k3") >= 0).all()
    tiny = torch.tensor([1e-4], dtype=torch.float32)
    torch.testing.assert_close(
        kl_ref(-tiny, torch.zeros(1), "k3").double(), (tiny.double() ** 2) / 2, rtol=1e-3, atol=0
    )


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_kl_estimators_in_the_loss(estimator: str) -> None:
    c = GRPOLossConfig(beta=0.7, kl_estimator=estimator, use_bias_correction_kl=False)
    out = grpo_loss(rand(B, T, V, seed=4), **batch(), config=c)
    plain = grpo_loss(rand(B, T, V, seed=4), **batch())
    kl = (kl_ref(out.logps, batch()["ref_logps"], estimator) * MASK).sum() / MASK.sum()
    torch.testing.assert_close(out.loss, plain.loss + 0.7 * kl)
    torch.testing.assert_close(out.metrics["kl"], kl)


def test_dual_clip() -> None:
    """verl's ``clip_ratio_c``: for A < 0 the loss is at most c |A|, its gradient 0 beyond; A > 0 is untouched."""
    logps = torch.tensor([[0.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    ratio = torch.tensor([[0.5, 1.1, 2.9, 5.0]], dtype=torch.float64)
    logits = torch.stack([logps, torch.full_like(logps, -50.0)], -1).requires_grad_()
    for advantage, want in ((-2.0, [1.6, 2.2, 5.8, 6.0]), (2.0, [-1.0, -2.2, -2.4, -2.4])):
        for t in range(4):
            out = grpo_loss(
                logits[:, t : t + 1],
                torch.zeros(1, 1, dtype=torch.long),
                advantages=torch.tensor([advantage]).double(),
                old_logps=logps[:, t : t + 1] - ratio[:, t : t + 1].log(),
                config=GRPOLossConfig(dual_clip=3.0),
            )
            assert out.loss.item() == pytest.approx(want[t])


def test_relative_cispo_bounds() -> None:
    """verl clamps the ratio to [1 - epsilon_low, 1 + epsilon_high]."""
    inputs = batch()
    c = GRPOLossConfig(loss_type="cispo", cispo_bounds="relative", epsilon_low=0.2, epsilon_high=0.3)
    logits = rand(B, T, V, seed=4)
    out = grpo_loss(logits, **inputs, config=c)
    ratio = (out.logps - inputs["old_logps"]).exp()
    assert ((ratio < 0.8) & MASK).any()
    assert ((ratio > 1.3) & MASK).any()
    terms = -ratio.clamp(0.8, 1.3) * inputs["advantages"][:, None] * out.logps
    torch.testing.assert_close(out.loss, (terms * MASK).sum() / MASK.sum())


def test_entropy_threshold_is_the_mask_of_its_values() -> None:
    c = GRPOLossConfig(entropy_coef=0.1)
    logits = rand(B, T, V, seed=4, scale=2.0)
    entropy = grpo_loss(logits, **batch()).entropy
    threshold = entropy[MASK].median()
    want = grpo_loss(logits, **batch(), entropy_mask=entropy >= threshold, config=c)
    torch.testing.assert_close(grpo_loss(logits, **batch(), entropy_threshold=threshold, config=c), want)
    torch.testing.assert_close(grpo_loss(logits, **batch(), entropy_threshold=threshold.item(), config=c), want)


def test_rewards_are_normalized_inside() -> None:
    rewards = torch.tensor([1.0, 0.0, 0.3, 0.3]).double()
    inputs = {k: v for k, v in batch().items() if k != "advantages"}
    logits = rand(B, T, V, seed=4)
    want = grpo_loss(logits, **inputs, advantages=group_advantages(rewards, group_size=2))
    got = grpo_loss(logits, **inputs, rewards=rewards, group_size=2)
    torch.testing.assert_close(got.loss, want.loss)
    assert got.metrics["frac_reward_zero_std"] == 0.5
    order = torch.tensor([2, 0, 3, 1])
    moved = {k: v[order] for k, v in inputs.items()}
    groups = torch.tensor([7, 7, -1, -1])[order]
    got = grpo_loss(logits[order], **moved, rewards=rewards[order], group_ids=groups)
    torch.testing.assert_close(got.loss, want.loss)


def test_equal_rewards_give_exactly_nothing() -> None:
    """The mean of equal float32 rewards is not always that reward; the advantage is 0 all the same."""
    rewards = torch.rand(500, 1).expand(500, 7).reshape(-1)
    assert (rewards.view(500, 7).mean(1) != rewards.view(500, 7)[:, 0]).any()
    for scale in ("group", "none"):
        assert not group_advantages(rewards, group_size=7, scale=scale).any()
    assert not group_advantages(torch.full((3,), torch.nan), group_size=3).any()
    assert group_advantages(torch.zeros(0), group_size=4).shape == (0,)
    ids_ = torch.arange(500).repeat_interleave(7)
    assert not group_advantages(rewards, group_ids=ids_).any()


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_group_ids_equal_group_size(scale: str) -> None:
    rewards = rand(12, seed=1)
    rewards[3] = torch.nan
    order = torch.randperm(12)
    want = group_advantages(rewards, group_size=4, scale=scale)
    groups = torch.tensor([5, 3, 8]).repeat_interleave(4)
    got = group_advantages(rewards[order], group_ids=groups[order], scale=scale)
    torch.testing.assert_close(got, want[order])


def test_cross_entropy_is_torchs() -> None:
    hidden, weight, bias = rand(B, T, H, seed=1), rand(V, H, seed=2), rand(V, seed=3)
    labels = torch.where(MASK, ids(B, T), -100)
    for reduction in ("mean", "sum", "none"):
        want = torch.nn.functional.cross_entropy(
            (hidden @ weight.T + bias).flatten(0, 1), labels.flatten(), reduction=reduction
        )
        got = linear_cross_entropy(hidden, weight, labels, bias=bias, reduction=reduction)
        torch.testing.assert_close(got.flatten().squeeze() if reduction != "none" else got.flatten(), want)
    total = linear_cross_entropy(hidden, weight, labels, reduction="sum")
    for n in (5, torch.tensor(5)):
        torch.testing.assert_close(linear_cross_entropy(hidden, weight, labels, num_items_in_batch=n), total / 5)
    assert linear_cross_entropy(hidden, weight, torch.full_like(labels, -100)) == 0


def test_distillation_limits() -> None:
    """Zero for equal models; forward and reverse KL swap; JSD is symmetric at 1/2 and at most log 2."""
    ha, wa, hb, wb = rand(9, H, seed=1), rand(V, H, seed=2), rand(9, 2, seed=3, scale=3.0), rand(V, 2, seed=4)
    assert linear_distillation_loss(ha, wa, ha, wa, beta=0.3).abs() < 1e-12
    forward = linear_distillation_loss(ha, wa, hb, wb, beta=0.0)
    torch.testing.assert_close(forward, linear_distillation_loss(hb, wb, ha, wa, beta=1.0))
    half = [linear_distillation_loss(*x, beta=0.5, reduction="none") for x in ((ha, wa, hb, wb), (hb, wb, ha, wa))]
    torch.testing.assert_close(*half)
    assert (half[0] > 0).all()
    assert (half[0] <= math.log(2)).all()
    with pytest.raises(dataclasses.FrozenInstanceError):
        GRPOLossConfig().beta = 1.0


# torch.compile -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_compiles_without_a_graph_break(loss_type: str) -> None:
    c = config(loss_type, beta=0.1)
    hidden, weight = rand(B, T, H, seed=1), rand(V, H, seed=2)

    def both(h: Tensor, w: Tensor, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        return linear_grpo_loss(h, w, **inputs, config=c).loss, grpo_loss(h @ w.T, **inputs, config=c).loss

    torch._dynamo.reset()
    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    grads = []
    for fn in (both, compiled):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        losses = fn(h, w, batch())
        grads.append((*losses, *torch.autograd.grad(losses[0] + losses[1], (h, w))))
    torch.testing.assert_close(*grads)

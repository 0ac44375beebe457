"""The ops from hidden states against the reference in float64: on a GPU compiled, elsewhere interpreted."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from conftest import DEVICE, KERNELS, rand

from grpo_fast import (
    GRPOLossConfig,
    GRPOLossOutput,
    linear_cross_entropy,
    linear_grpo_loss,
    linear_selective_log_softmax,
    selective_log_softmax,
)
from grpo_fast.ops import _chunks, _products, _workspace

B, T, V, H = 4, 5, 301, 16
MASK = torch.arange(T, device=DEVICE) < torch.tensor([5, 0, 2, 4], device=DEVICE)[:, None]
LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "vespo")
THREE_ROWS = 3 * 304 * 6  # bytes: several chunks, and an odd last one
IMPLS = ("torch", *KERNELS)
pytestmark = pytest.mark.usefixtures("poisoned_buffers")
on_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs an NVIDIA GPU")


def ids(*shape: int, vocabulary: int = V) -> Tensor:
    return torch.randint(0, vocabulary, shape, generator=torch.Generator().manual_seed(9)).to(DEVICE)


SEQUENCE = torch.arange(B, device=DEVICE)[:, None]
EVEN = ids(B, T) % 2 == 0
ADVANTAGES = rand(B, seed=15)
ENTROPY = GRPOLossConfig(entropy_coef=1e-3)
HIDDEN, WEIGHT, BIAS = rand(B, T, H, seed=1), rand(V, H, seed=2, scale=0.3), rand(V, seed=3, scale=0.5)


def batch(**changes: Any) -> dict[str, Any]:
    """Everything a loss takes beside the model; old and reference policies some way off."""
    inputs = {
        "completion_ids": ids(B, T),
        "completion_mask": MASK,
        "rewards": torch.tensor([0.0, 1.0, 0.5, 0.25], device=DEVICE),
        "group_size": 2,
        "old_logps": rand(B, T, seed=4, scale=0.4) - 6.3,
        "ref_logps": rand(B, T, seed=5, scale=0.4) - 6.3,
        **changes,
    }
    return {name: value for name, value in inputs.items() if value is not None}


def differentiate(
    op: Any, inputs: dict[str, Any], leaves: tuple[Tensor, ...], upstream: float | Tensor = 1.0
) -> tuple[Any, list[Tensor]]:
    """What ``op`` returns, and the gradients of its value by hidden, weight and maybe bias."""
    x = [leaf.detach().clone(memory_format=torch.preserve_format).requires_grad_() for leaf in leaves]
    out = op(*x[:2], **({"bias": x[2]} if len(x) > 2 else {}), **inputs)
    value = out.loss if isinstance(out, GRPOLossOutput) else sum(out) if isinstance(out, tuple) else out
    return out, list(torch.autograd.grad((value * upstream).sum(), x))


def assert_gradients(got: list[Tensor], truth: list[Tensor], roundings: int = 3) -> None:
    """Relative error in the Frobenius norm; half precision rounds the logits' gradient, the result and its scale."""
    for x, y in zip(got, truth, strict=True):
        assert torch.equal(x.isnan(), y.isnan())
        difference, size = ((z.nan_to_num()).norm() for z in (x.double() - y, y))
        assert difference <= (2e-5 + roundings * torch.finfo(x.dtype).eps) * size + 1e-12, f"{difference / size:.1e}"


def check_loss(
    inputs: dict[str, Any],
    leaves: tuple[Tensor, ...] = (HIDDEN, WEIGHT),
    *,
    impl: str = KERNELS[-1],
    upstream: float = 1.7,
    **options: Any,
) -> tuple[GRPOLossOutput, list[Tensor]]:
    """Loss, log-probs, entropy, metrics and gradients are the reference's in float64."""
    out, grads = differentiate(linear_grpo_loss, {**inputs, **options, "impl": impl}, leaves, upstream)
    doubles = tuple(x.double() for x in leaves)
    exact = {k: v for k, v in options.items() if k == "metrics"}
    truth, true_grads = differentiate(linear_grpo_loss, {**inputs, **exact, "impl": "torch"}, doubles, upstream)
    for name in ("loss", "logps", "entropy"):
        torch.testing.assert_close(
            getattr(out, name).double(), getattr(truth, name), rtol=1e-5, atol=1e-5, equal_nan=True, msg=name
        )
    assert out.metrics.keys() == truth.metrics.keys()
    for name, value in truth.metrics.items():
        torch.testing.assert_close(
            out.metrics[name].double(), value.double(), rtol=1e-4, atol=1e-5, equal_nan=True, msg=name
        )
    assert [g.dtype for g in grads] == [x.dtype for x in leaves]
    assert_gradients(grads, true_grads)
    return out, grads


class CountProducts:
    """The rows that each product of a chunk takes, in order."""

    def __init__(self) -> None:
        self.logits: list[int] = []
        self.d_hidden: list[int] = []
        self.d_weight: list[int] = []

    def record(self, a: Tensor, b: Tensor) -> None:
        if a.size(0) == V:
            self.d_weight.append(a.size(1))
        else:
            (self.d_hidden if a.size(1) == V else self.logits).append(a.size(0))


@contextmanager
def counted() -> Iterator[CountProducts]:
    """Count the products while they are done."""
    count, originals = CountProducts(), (_products.product, _products.add_product)

    def counting(original: Any) -> Any:
        def product(a: Tensor, b: Tensor, out: Tensor) -> None:
            count.record(a, b)
            original(a, b, out)

        return product

    _products.product, _products.add_product = map(counting, originals)
    _chunks.product, _chunks.add_product = _products.product, _products.add_product
    try:
        yield count
    finally:
        _products.product, _products.add_product = _chunks.product, _chunks.add_product = originals


# linear_grpo_loss ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("impl", IMPLS)
def test_every_loss(impl: str, loss_type: str, level: str) -> None:
    config = GRPOLossConfig(
        loss_type=loss_type,
        importance_sampling_level=level,
        beta=0.1,
        entropy_coef=0.05,
        epsilon_high=1.2 if loss_type == "cispo" else 0.3,
    )
    inputs = batch(config=config, temperature=1.3)
    check_loss(inputs, (HIDDEN, WEIGHT, BIAS), impl=impl, workspace_bytes=THREE_ROWS)


@pytest.mark.parametrize(
    "changes",
    [
        {"completion_mask": None},
        {"completion_mask": None, "allow_sync": False},
        {"completion_mask": MASK.long(), "allow_sync": False},
        {"completion_mask": torch.zeros_like(MASK)},
        {"completion_mask": torch.zeros_like(MASK), "allow_sync": False},
        {"old_logps": None},
        {"importance_sampling_ratio": rand(B, 1, seed=6).exp()},
        {"importance_sampling_ratio": rand(B, T, seed=6).clamp(min=0)},
        {"entropy_mask": rand(B, T, seed=7) > 0, "config": GRPOLossConfig(entropy_coef=0.1)},
        {"entropy_mask": rand(B, T, seed=7) > 0, "config": GRPOLossConfig(entropy_coef=0.1), "allow_sync": False},
        {"entropy_mask": rand(B, T, seed=7) > 0},
        {"entropy_threshold": 5.2},
        {"entropy_threshold": 5.2, "config": GRPOLossConfig(entropy_coef=0.1)},
        {"num_items_in_batch": 7},
        {"num_items_in_batch": torch.tensor(7, device=DEVICE)},
        {"group_size": None, "group_ids": torch.tensor([0, 1, 0, 1], device=DEVICE)},
        {"rewards": torch.tensor([1.0, 1.0, math.nan, 1.0], device=DEVICE)},
        {"rewards": None, "group_size": None, "advantages": rand(B, T, seed=8)},
        {"config": GRPOLossConfig(off_policy_mask_threshold=0.01)},
        {"config": GRPOLossConfig(delta=1.5, dual_clip=2.0), "softcap": 3.0, "logit_scale": 1.5},
    ],
    ids=lambda changes: ", ".join(changes),
)
def test_every_input(impl: str, changes: dict[str, Any]) -> None:
    check_loss(batch(**changes), impl=impl, workspace_bytes=THREE_ROWS)


@pytest.mark.parametrize("workspace_bytes", [1, THREE_ROWS, None])
@pytest.mark.parametrize("dtypes", ["float32", "bfloat16", "float16", "bfloat16 float32", "float32 bfloat16"])
def test_dtypes_and_chunks(impl: str, dtypes: str, workspace_bytes: int | None) -> None:
    """A row or two at a time, a few, or all; in half precision, with a head of another precision too."""
    first, *second = (getattr(torch, name) for name in dtypes.split())
    # As narrow, because what a rounded gradient of the weight takes is used whatever the workspace.
    leaves = HIDDEN[..., :4].to(first), WEIGHT[:, :4].contiguous().to(second[0] if second else first)
    with counted() as count:
        check_loss(batch(config=GRPOLossConfig(beta=0.1)), leaves, impl=impl, workspace_bytes=workspace_bytes)
    assert sum(count.d_weight) == MASK.sum()
    assert workspace_bytes != 1 or max(count.d_weight) <= 2
    assert workspace_bytes is not None or len(count.d_weight) == 1


@pytest.mark.parametrize(
    ("changes", "upstream"),
    [
        ({"num_items_in_batch": 1e7, "old_logps": None}, 2.0**20),
        ({"advantages": 1e-5 * rand(B, T, seed=8).where(MASK, math.inf)}, 1e5),
        ({"advantages": 1e5 * rand(B, T, seed=8)}, 1e-5),
        ({"advantages": 1e-3 * rand(B, T, seed=8), "num_items_in_batch": 1e7, "config": ENTROPY}, 2.0**12),
        ({"advantages": torch.zeros(B, T, device=DEVICE), "num_items_in_batch": 1e7, "config": ENTROPY}, 2.0**12),
        ({"advantages": torch.where(EVEN, 1e9, 1.0), "entropy_mask": ~EVEN}, 1.0),
        ({"advantages": torch.where(EVEN, 1e9, 1.0), "importance_sampling_ratio": (~EVEN).float()}, 1.0),
    ],
    ids=["many tokens", "small", "large", "small, entropy", "none, entropy", "out of the entropy mask", "ratio 0"],
)
def test_gradients_neither_underflow_nor_overflow_in_float16(
    impl: str, changes: dict[str, Any], upstream: float
) -> None:
    """Whatever else the batch holds."""
    if "advantages" in changes:
        changes = {"rewards": None, "group_size": None, "ref_logps": None, **changes}
    leaves = HIDDEN.half(), WEIGHT.half()
    check_loss(batch(**changes), leaves, impl=impl, upstream=upstream, workspace_bytes=THREE_ROWS)


def test_no_gradient_leaves_a_buffer_alone_in_float16(impl: str) -> None:
    hidden, weight = (x.half().requires_grad_() for x in (HIDDEN, WEIGHT))
    buffer = torch.full((V, H), 1e30, device=DEVICE)
    inputs = batch(rewards=torch.ones(B, device=DEVICE), impl=impl)
    linear_grpo_loss(hidden, weight, **inputs, weight_grad_out=buffer).loss.backward()
    assert (buffer == torch.full_like(buffer, 1e30)).all()


@pytest.mark.parametrize("vocabulary", [2, 7, 1_000])
def test_vocabularies(impl: str, vocabulary: int) -> None:
    weight = rand(vocabulary, H, seed=2).bfloat16()
    inputs = batch(completion_ids=ids(B, T, vocabulary=vocabulary), old_logps=None, ref_logps=None)
    check_loss(inputs, (HIDDEN.bfloat16(), weight), impl=impl, workspace_bytes=vocabulary * 6 * 4)


def test_peaked_rows_are_exact(impl: str) -> None:
    """Logits to 40 from half precision products: log-probs to 3e-5, gradients no worse than rounding makes them."""
    weight = rand(V, H, seed=2).bfloat16()
    targets = ids(B, T)
    # Hidden states along the target's row of the head, so that its logit is from 0 to 40.
    rows = weight.float()[targets]
    heights = torch.linspace(0, 40, B * T, device=DEVICE).view(B, T, 1)
    hidden = (rows / rows.square().sum(-1, keepdim=True) * heights).bfloat16()
    inputs = {"completion_ids": targets, "advantages": rand(B, seed=8)}
    out, grads = differentiate(linear_grpo_loss, {**inputs, "impl": impl}, (hidden, weight))
    doubles = hidden.double(), weight.double()
    truth, true_grads = differentiate(linear_grpo_loss, {**inputs, "impl": "torch"}, doubles)
    assert (out.logps.double() - truth.logps).abs().max() < 3e-5
    assert_gradients(grads, true_grads, roundings=2 if DEVICE == "cpu" else 1)  # the interpreter cuts off


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "luspo"])
@pytest.mark.parametrize("masked", [False, True])
def test_packed(impl: str, loss_type: str, masked: bool) -> None:
    """Sequences of lengths 5, 0, 7 and 6, and two rows of padding at the end."""
    per_token = {
        "completion_ids": ids(20),
        "completion_mask": rand(20, seed=4) > -0.5 if masked else None,
        "old_logps": rand(20, seed=2, scale=0.4) - 6.3,
        "ref_logps": rand(20, seed=3, scale=0.4) - 6.3,
        "importance_sampling_ratio": rand(4, seed=6).exp(),
        "cu_seqlens": torch.tensor([0, 5, 5, 12, 18], device=DEVICE),
    }
    inputs = batch(**per_token, config=GRPOLossConfig(beta=0.1, loss_type=loss_type))
    for allow_sync in (True, False):
        options: dict[str, Any] = {"impl": impl, "workspace_bytes": THREE_ROWS, "allow_sync": allow_sync}
        check_loss(inputs, (HIDDEN.view(20, H), WEIGHT), **options)


@pytest.mark.parametrize("kind", ["slice", "transposed", "one row", "no rows", "no tokens"])
@pytest.mark.parametrize("masked", [False, True])
def test_layouts(impl: str, kind: str, masked: bool) -> None:
    base = rand(B, T + 4, H, seed=10)
    hidden = {
        "slice": base[:, 3:-1],
        "transposed": base[:, :T].transpose(0, 1).contiguous().transpose(0, 1),
        "one row": base[:1, :1],
        "no rows": base[:0],
        "no tokens": base[:, :0],
    }[kind]
    b, t = hidden.shape[:2]
    inputs = {"completion_ids": ids(b, t), "rewards": rand(b, seed=1), "group_size": 1 if b < B else 2}
    if masked:
        inputs["completion_mask"] = ids(b, t) % 2 == 0
    check_loss(inputs, (hidden, WEIGHT), impl=impl, workspace_bytes=THREE_ROWS)


@pytest.mark.parametrize("allow_sync", [True, False])
def test_masked_rows_may_hold_anything(impl: str, allow_sync: bool) -> None:
    inputs = batch()
    dirty = {
        **inputs,
        **{name: inputs[name].masked_fill(~MASK, math.nan) for name in ("old_logps", "ref_logps")},
        "completion_ids": inputs["completion_ids"].masked_fill(~MASK, -100),
    }
    options = {"impl": impl, "allow_sync": allow_sync}
    hidden = HIDDEN.masked_fill(~MASK[..., None], math.nan)
    out, grads = differentiate(linear_grpo_loss, {**inputs, **options}, (HIDDEN, WEIGHT))
    same, same_grads = differentiate(linear_grpo_loss, {**dirty, **options}, (hidden, WEIGHT))
    assert torch.equal(out.loss, same.loss)
    assert torch.equal(out.logps, same.logps)
    assert all(map(torch.equal, grads, same_grads))
    assert not grads[0][~MASK].any()


@pytest.mark.parametrize(
    "frozen", ["", "hidden", "weight", "bias", "weight bias", "hidden weight", "hidden weight bias"]
)
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("entropy_coef", [0.0, 0.05])
def test_products_of_what_is_frozen_are_not_done(impl: str, frozen: str, level: str, entropy_coef: float) -> None:
    config = GRPOLossConfig(beta=0.1, importance_sampling_level=level, entropy_coef=entropy_coef)
    inputs = batch(config=config)
    leaves = dict(hidden=HIDDEN, weight=WEIGHT, bias=BIAS)
    _, expected = differentiate(linear_grpo_loss, {**inputs, "impl": "torch"}, tuple(leaves.values()))
    x = {name: leaf.clone().requires_grad_(name not in frozen.split()) for name, leaf in leaves.items()}
    trained = [leaf for leaf in x.values() if leaf.requires_grad]
    with counted() as count:
        out = linear_grpo_loss(**x, **inputs, impl=impl, workspace_bytes=THREE_ROWS)
        grads = torch.autograd.grad(out.loss, trained) if trained else ()
    for grad, truth in zip(
        grads, (g for g, leaf in zip(expected, x.values(), strict=True) if leaf.requires_grad), strict=True
    ):
        torch.testing.assert_close(grad, truth, rtol=1e-4, atol=1e-6)
    kept = int(MASK.sum())
    again = level == "sequence" and bool(trained) and (frozen != "weight bias" or entropy_coef != 0.0)
    assert sum(count.logits) == (2 * kept if again else kept)
    assert sum(count.d_hidden) == ("hidden" not in frozen) * kept
    assert sum(count.d_weight) == ("weight" not in frozen) * kept
    with counted() as count, torch.no_grad():
        linear_grpo_loss(**x, **inputs, impl=impl)
    assert (count.logits, count.d_hidden, count.d_weight) == ([kept], [], [])


@pytest.mark.parametrize("metrics", ["all", "active"])
@pytest.mark.parametrize(
    ("changes", "live"),
    [
        ({"rewards": torch.tensor([1.0, 1.0, 0.5, 0.25], device=DEVICE)}, MASK & (SEQUENCE > 1)),
        ({"importance_sampling_ratio": torch.tensor([0.0, 1.0, 2.0, 1.0], device=DEVICE)}, MASK & (SEQUENCE > 0)),
        ({"entropy_mask": EVEN, "config": GRPOLossConfig(entropy_coef=0.1)}, MASK & EVEN),
        ({"rewards": torch.ones(B, device=DEVICE)}, torch.zeros_like(MASK)),
        ({"rewards": torch.ones(B, device=DEVICE), "config": GRPOLossConfig(beta=0.1)}, MASK),
        ({"rewards": torch.ones(B, device=DEVICE), "config": GRPOLossConfig(entropy_coef=0.1)}, MASK),
    ],
)  # fmt: skip
def test_dead_rows(impl: str, changes: dict[str, Any], live: Tensor, metrics: str) -> None:
    """They get a log-prob and no gradient's products; with ``metrics="active"`` not even that."""
    inputs = batch(**changes)
    for each in ("torch", impl):
        out, grads = check_loss(inputs, workspace_bytes=THREE_ROWS, metrics=metrics, impl=each)
        shown = MASK if metrics == "all" else live
        assert torch.equal(out.logps != 0, shown)
        assert out.metrics["num_active_tokens"] == shown.sum()
        assert not grads[0][~live].any()
    with counted() as count:
        differentiate(linear_grpo_loss, {**inputs, "metrics": metrics, "impl": impl}, (HIDDEN, WEIGHT))
    assert sum(count.logits) == shown.sum()
    assert sum(count.d_hidden) == sum(count.d_weight) == live.sum()


def test_rows_that_nothing_flows_back_to_are_not_projected_again(impl: str) -> None:
    rewards = torch.tensor([1.0, 1.0, 0.5, 0.25], device=DEVICE)
    inputs = batch(rewards=rewards, config=GRPOLossConfig(importance_sampling_level="sequence"))
    for metrics, first in (("all", int(MASK.sum())), ("active", int(MASK[2:].sum()))):
        check_loss(inputs, metrics=metrics)
        with counted() as count:
            _, (gradient, _) = differentiate(
                linear_grpo_loss, {**inputs, "metrics": metrics, "impl": impl}, (HIDDEN, WEIGHT)
            )
        assert sum(count.logits) - first == sum(count.d_hidden) == sum(count.d_weight) == MASK[2:].sum()
        hidden = HIDDEN.clone().requires_grad_()
        with counted() as count:
            linear_grpo_loss(hidden, WEIGHT, **inputs, metrics=metrics, impl=impl).loss.backward()
        assert (sum(count.logits), sum(count.d_hidden), sum(count.d_weight)) == (first, MASK[2:].sum(), 0)
        torch.testing.assert_close(hidden.grad, gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_reference_model_in_the_same_call(impl: str, level: str) -> None:
    """Of another hidden size, with a bias of its own; the same as its log-probs given."""
    config = GRPOLossConfig(beta=0.2, importance_sampling_level=level)
    reference = {
        "ref_hidden": rand(B, T, 24, seed=11),
        "ref_weight": rand(V, 24, seed=12, scale=0.3),
        "ref_bias": BIAS,
    }
    logps = linear_selective_log_softmax(
        reference["ref_hidden"], reference["ref_weight"], ids(B, T), bias=BIAS, temperature=0.8, impl="torch"
    )
    inputs = batch(config=config, ref_logps=None, temperature=0.8, impl=impl)
    leaves = HIDDEN, WEIGHT
    out, grads = differentiate(linear_grpo_loss, {**inputs, **reference}, leaves)
    same, same_grads = differentiate(linear_grpo_loss, {**inputs, "ref_logps": logps}, leaves)
    torch.testing.assert_close(out.loss, same.loss)
    torch.testing.assert_close(out.metrics["kl"], same.metrics["kl"])
    torch.testing.assert_close(grads, same_grads)
    assert not reference["ref_weight"].requires_grad
    if impl != "torch":
        doubles = {k: v.double() for k, v in reference.items() if k != "ref_bias"}
        with pytest.raises((RuntimeError, ValueError), match="float64"):
            linear_grpo_loss(HIDDEN, WEIGHT, **inputs, **doubles)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("workspace_bytes", [THREE_ROWS, None])
def test_weight_gradient_into_a_buffer(impl: str, dtype: torch.dtype, workspace_bytes: int | None) -> None:
    """What it held stays in the sum, which is not rounded to the weight's precision."""
    hidden, weight = (x.clone().to(dtype).requires_grad_() for x in (HIDDEN, WEIGHT))
    buffer = torch.ones(V, H, device=DEVICE)
    options = {"impl": impl, "workspace_bytes": workspace_bytes}
    linear_grpo_loss(hidden, weight, **batch(), weight_grad_out=buffer, **options).loss.backward()
    assert weight.grad is None
    _, truth = differentiate(linear_grpo_loss, batch(impl="torch"), (hidden.double(), weight.double()))
    assert_gradients([hidden.grad], truth[:1])
    error = (buffer.double() - 1 - truth[1]).norm() / truth[1].norm()
    assert error < 1e-5 + torch.finfo(dtype).eps * (dtype != torch.float32)

    labels = torch.where(MASK, ids(B, T), -100)
    buffer.zero_()
    linear_cross_entropy(hidden, weight, labels, weight_grad_out=buffer, **options).backward()
    _, truth = differentiate(
        linear_cross_entropy, {"labels": labels, "impl": "torch"}, (hidden.double(), weight.double())
    )
    assert (buffer.double() - truth[1]).norm() < (1e-5 + torch.finfo(dtype).eps) * truth[1].norm()


def test_weight_gradient_into_a_buffer_takes_no_scale(impl: str) -> None:
    hidden, weight = HIDDEN.clone().requires_grad_(), WEIGHT.clone().requires_grad_()
    buffer = torch.zeros(V, H, device=DEVICE)
    loss = linear_grpo_loss(hidden, weight, **batch(), weight_grad_out=buffer, impl=impl).loss
    if DEVICE == "cpu":  # on a GPU it ends the process's use of it
        with pytest.raises(RuntimeError, match="weight_grad_out: the upstream gradient is not 1"):
            (loss * 0.5).backward()


def test_tied_embeddings() -> None:
    """The head is also what hidden states are looked up in: its gradient is the sum of both."""
    grads = []
    for impl in IMPLS:
        weight = WEIGHT.clone().requires_grad_()
        hidden = weight[ids(B, T)].tanh()
        linear_grpo_loss(hidden, weight, **batch(), impl=impl).loss.backward()
        grads.append(weight.grad)
    for grad in grads[1:]:
        torch.testing.assert_close(grad, grads[0], rtol=1e-4, atol=1e-6)


def test_autocast_changes_nothing(impl: str) -> None:
    out, grads = differentiate(linear_grpo_loss, batch(impl=impl), (HIDDEN, WEIGHT))
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        same, same_grads = differentiate(linear_grpo_loss, batch(impl=impl), (HIDDEN, WEIGHT))
    assert torch.equal(out.loss, same.loss)
    assert all(map(torch.equal, grads, same_grads))


def test_what_is_wrong_stays_visible(impl: str) -> None:
    inputs = batch()
    inputs["completion_ids"][2, 0] = V
    out, grads = differentiate(linear_grpo_loss, {**inputs, "impl": impl}, (HIDDEN, WEIGHT))
    assert out.loss.isnan()
    assert not grads[0][2, 0].any()
    hidden = HIDDEN.clone()
    hidden[0, 1, 3] = math.nan
    out, grads = differentiate(linear_grpo_loss, batch(impl=impl), (hidden, WEIGHT))
    assert out.loss.isnan()
    assert grads[0][0, 1].isnan().all()


def test_one_backward_only(impl: str) -> None:
    hidden, weight = HIDDEN.clone().requires_grad_(), WEIGHT.clone().requires_grad_()
    loss = linear_grpo_loss(hidden, weight, **batch(), impl=impl).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("op", ["loss", "cross entropy", "frozen head", "log-probs", "logits"])
def test_one_derivative_only(impl: str, op: str) -> None:
    """A graph of the first may be asked for; a second derivative is an error, not less by a part of it."""
    hidden, weight = HIDDEN.clone().requires_grad_(), WEIGHT.clone().requires_grad_(op == "log-probs")
    if op == "loss":
        value = linear_grpo_loss(hidden, weight, **batch(), impl=impl).loss
    elif op == "cross entropy":
        value = linear_cross_entropy(hidden, weight, ids(B, T), impl=impl)
    elif op == "logits":
        logps = selective_log_softmax(hidden @ weight.T, ids(B, T), impl=impl)
        assert isinstance(logps, Tensor)
        value = logps.sum()
    else:
        value = linear_selective_log_softmax(hidden, weight, ids(B, T), impl=impl).sum()
    (gradient,) = torch.autograd.grad(value, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match=r"differentiate twice|autograd formula"):
        (gradient.square().sum() + hidden.square().sum()).backward()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", ["num_items_in_batch", "temperature", "length"])
def test_compiled_while_numbers_change(impl: str, name: str) -> None:
    """Without a graph break, and for what changes in every step with no more than one graph more."""
    torch._dynamo.reset()
    graphs = 0

    def backend(module: Any, inputs: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return aot_eager(module, inputs)

    aot_eager = torch._dynamo.lookup_backend("aot_eager")

    def value(h: Tensor, index: Tensor, changing: dict[str, Any]) -> Tensor:
        return linear_grpo_loss(h, WEIGHT, index, advantages=ADVANTAGES, impl=impl, **changing).loss

    compiled = torch.compile(value, fullgraph=True, backend=backend)
    for number in (3, 4, 5, 7):
        length = number if name == "length" else T
        changing = {} if name == "length" else {name: number if name == "num_items_in_batch" else 0.25 * number}
        runs = []
        for fn in (value, compiled):
            hidden = rand(B, length, H, seed=14).requires_grad_()
            loss = fn(hidden, ids(B, length), changing)
            runs.append((loss, *torch.autograd.grad(loss, hidden)))
        torch.testing.assert_close(*runs)
    if name != "temperature":  # which is a constant of the kernels' ops
        assert graphs <= 2


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_repeatable_and_without_a_graph_break(impl: str, level: str) -> None:
    inputs = batch(config=GRPOLossConfig(beta=0.1, importance_sampling_level=level), workspace_bytes=THREE_ROWS)

    def value(h: Tensor, w: Tensor) -> Tensor:
        return linear_grpo_loss(h, w, **inputs, impl=impl).loss * 2.0

    results = []
    for fn in (value, value, torch.compile(value, fullgraph=True, backend="aot_eager")):
        leaves = [x.clone().requires_grad_() for x in (HIDDEN, WEIGHT)]
        results.append(torch.autograd.grad(fn(*leaves), leaves))
    for grads in results[1:]:
        assert all(map(torch.equal, results[0], grads))


@pytest.mark.parametrize(
    ("module", "op"),
    [(module, "linear_token_loss") for module in ("linear_grpo_loss", "_linear_token_loss")]
    + [("linear_grpo_loss", "sum_rows")]
    + [("_linear_logps", op) for op in ("_linear_logps", "_linear_logps_backward")],
)
def test_the_registered_ops(impl: str, module: str, op: str) -> None:
    """Schema and fake implementation, by torch's own checker."""
    user: Any = sys.modules[f"grpo_fast.ops.{module}"]
    original, seen = getattr(user, op), []

    def spy(*args: Any, **kwargs: Any) -> Any:
        seen.append((tuple(x.detach() if isinstance(x, Tensor) else x for x in args), kwargs))
        return original(*args, **kwargs)

    setattr(user, op, spy)
    level = "token" if module == "linear_grpo_loss" else "sequence"
    try:
        if module == "_linear_token_loss":  # of a frozen head
            hidden = HIDDEN.bfloat16().requires_grad_()
            linear_selective_log_softmax(hidden, WEIGHT.bfloat16(), ids(B, T), impl=impl)
        else:
            inputs = batch(config=GRPOLossConfig(importance_sampling_level=level), impl=impl)
            differentiate(linear_grpo_loss, inputs, (HIDDEN, WEIGHT, BIAS))
    finally:
        setattr(user, op, original)
    torch.library.opcheck(original, *seen[0])


# linear_selective_log_softmax ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("allow_sync", [False, True])
def test_log_probs_and_entropy(impl: str, dtype: torch.dtype, masked: bool, allow_sync: bool) -> None:
    inputs = {"index": ids(B, T), "mask": MASK if masked else None, "return_entropy": True, "temperature": 0.7}
    inputs |= {"softcap": 4.0, "logit_scale": 1.3}
    leaves = HIDDEN.to(dtype), WEIGHT.to(dtype), BIAS.to(dtype)
    upstream = rand(B, T, seed=13)
    options = {"impl": impl, "workspace_bytes": THREE_ROWS, "allow_sync": allow_sync}
    out, grads = differentiate(linear_selective_log_softmax, {**inputs, **options}, leaves, upstream)
    doubles = tuple(x.double() for x in leaves)
    truth, true_grads = differentiate(linear_selective_log_softmax, {**inputs, "impl": "torch"}, doubles, upstream)
    for x, y in zip(out, truth, strict=True):
        torch.testing.assert_close(x.double(), y, rtol=1e-5, atol=1e-5)
    assert_gradients(grads, true_grads)


def test_log_probs_only_of_what_is_asked_for(impl: str) -> None:
    upstream = torch.zeros(B, T, device=DEVICE)
    upstream[2, 1], upstream[0, 3] = 0.5, -2.0
    hidden, weight = HIDDEN.clone().requires_grad_(), WEIGHT.clone().requires_grad_()
    with counted() as count:
        logps = linear_selective_log_softmax(hidden, weight, ids(B, T), impl=impl)
        assert isinstance(logps, Tensor)
        logps.backward(upstream)
    assert (count.logits, count.d_hidden, count.d_weight) == ([B * T, 2], [2], [2])
    assert torch.equal(hidden.grad.any(-1), upstream != 0)
    index = ids(B, T)
    index[1, 1] = -1
    logps = linear_selective_log_softmax(HIDDEN, WEIGHT, index, impl=impl)
    assert isinstance(logps, Tensor)
    assert torch.equal(logps.isnan(), index == -1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("allow_sync", [False, True])
@pytest.mark.parametrize("softcap", [None, 4.0])
def test_log_probs_of_a_frozen_head(
    impl: str, dtype: torch.dtype, masked: bool, allow_sync: bool, softcap: float | None
) -> None:
    """Their gradient comes along with them, and the backward does no product; but for the entropy's."""
    inputs: dict[str, Any] = {"index": ids(B, T), "mask": MASK if masked else None, "temperature": 0.7}
    inputs |= {"softcap": softcap, "logit_scale": 1.3}
    hidden, weight, bias = HIDDEN.clone().to(dtype).requires_grad_(), WEIGHT.to(dtype), BIAS.to(dtype)
    upstream = rand(B, T, seed=13)
    upstream[0, 0] = 0.0
    double = hidden.detach().double().requires_grad_()
    doubles = double, weight.double()
    options = {"impl": impl, "workspace_bytes": THREE_ROWS, "allow_sync": allow_sync}
    for entropy in (False, True):
        inputs["return_entropy"] = entropy
        truth = linear_selective_log_softmax(*doubles, bias=bias.double(), impl="torch", **inputs)
        with counted() as count:
            found = linear_selective_log_softmax(hidden, weight, bias=bias, **inputs, **options)
        assert bool(count.d_hidden) == (not entropy)
        pairs = list(zip(found, truth, strict=True)) if entropy else [(found, truth)]
        for x, y in pairs:
            torch.testing.assert_close(x.double(), y, rtol=1e-5, atol=1e-5)
        with counted() as count:
            grads = [
                torch.autograd.grad([x for x, _ in pairs], hidden, [upstream] * len(pairs), True)[0] for _ in "ab"
            ]
        assert bool(count.d_hidden) == entropy
        assert torch.equal(*grads)
        (true_grad,) = torch.autograd.grad([y for _, y in pairs], double, [upstream.double()] * len(pairs))
        assert_gradients(grads[:1], [true_grad])
        assert not grads[0][0, 0].any()


def test_log_probs_of_a_frozen_head_are_rounded_once(impl: str) -> None:
    hidden = HIDDEN.bfloat16().requires_grad_()
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (saved.append(x), x)[1], lambda x: x):
        logps = linear_selective_log_softmax(hidden, WEIGHT.bfloat16(), ids(B, T), impl=impl)
    assert isinstance(logps, Tensor)
    upstream = rand(B, T, seed=13)
    (gradient,) = torch.autograd.grad(logps, hidden, upstream)
    (kept,) = (x for x in saved if x.numel() == hidden.numel())
    assert kept.dtype == torch.float32
    assert not torch.equal(kept, kept.bfloat16().float())
    assert torch.equal(gradient, (kept.view(B, T, H) * -upstream[..., None]).bfloat16())


def test_log_probs_of_a_frozen_head_compiled_and_where_nothing_flows_back(impl: str) -> None:
    """What a hidden state holds that nothing flows back to does not matter, as if it had not been projected."""
    assert not MASK[1, 2]
    hidden = HIDDEN.clone()
    hidden[1, 2] = math.nan
    hidden.requires_grad_()
    index = ids(B, T)

    def value(h: Tensor) -> Tensor:
        logps = linear_selective_log_softmax(h, WEIGHT, index, impl=impl)
        assert isinstance(logps, Tensor)
        return logps.where(MASK, 0.0).sum()

    found, compiled = (
        torch.autograd.grad(fn(hidden), hidden)[0]
        for fn in (value, torch.compile(value, fullgraph=True, backend="aot_eager"))
    )
    assert found.isfinite().all()
    assert torch.equal(found.any(-1), MASK)
    assert torch.equal(found, compiled)


@pytest.mark.parametrize("frozen", [False, True])
def test_log_probs_of_excluded_tokens(impl: str, frozen: bool) -> None:
    """A logit of -inf: the log-prob is -inf, the gradient that of the other logits."""
    index, bias = ids(B, T), BIAS.clone()
    bias[index[0, 0]] = bias[7] = -math.inf
    results = []
    for x, how in ((HIDDEN.double(), "torch"), (HIDDEN.clone(), impl)):
        weight = WEIGHT.clone().to(x.dtype).requires_grad_(not frozen)
        logps = linear_selective_log_softmax(x.requires_grad_(), weight, index, bias=bias.to(x.dtype), impl=how)
        assert isinstance(logps, Tensor)
        results.append((logps.double(), torch.autograd.grad(logps.sum(), x)[0].double()))
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-5)
    assert results[1][0][0, 0] == -math.inf
    loss = linear_cross_entropy(HIDDEN, WEIGHT, index, bias=bias, impl=impl)
    assert loss == math.inf


@pytest.mark.parametrize("allow_sync", [False, True])
def test_log_probs_of_a_frozen_head_where_masked(impl: str, allow_sync: bool) -> None:
    """They are 0, also in sign, and nothing gets through to the hidden states, whatever flows back."""
    hidden = HIDDEN.clone().requires_grad_()
    logps = linear_selective_log_softmax(hidden, WEIGHT, ids(B, T), mask=MASK, allow_sync=allow_sync, impl=impl)
    assert isinstance(logps, Tensor)
    assert not torch.signbit(logps[~MASK]).any()
    (gradient,) = torch.autograd.grad(logps, hidden, torch.where(MASK, 1.0, math.nan))
    assert torch.equal(gradient.isfinite().all(-1) & gradient.any(-1), MASK)
    assert not gradient[~MASK].any()


@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
def test_log_probs_of_a_frozen_head_are_differentiated_once(impl: str, label_smoothing: float) -> None:
    """A graph of the first derivative may be asked for; a second derivative is an error, not a part of it."""
    gradients = []
    for x, how in ((HIDDEN.double(), "torch"), (HIDDEN.clone(), impl)):
        losses = linear_cross_entropy(
            x.requires_grad_(),
            WEIGHT.to(x.dtype),
            ids(B, T),
            label_smoothing=label_smoothing,
            reduction="none",
            impl=how,
        )
        gradients += torch.autograd.grad(losses.square().sum(), x, create_graph=how == impl)
    truth, gradient = gradients
    assert_gradients([gradient.detach()], [truth])
    with pytest.raises(RuntimeError, match="differentiate twice"):
        gradient.sum().backward()


@pytest.mark.parametrize("shape", [(7, H), (H,), (2, 1, 3, H), (0, H)])
def test_log_probs_of_any_shape(shape: tuple[int, ...]) -> None:
    hidden, index = rand(*shape, seed=14), ids(*shape[:-1])
    for impl in IMPLS:
        logps = linear_selective_log_softmax(hidden, WEIGHT, index, impl=impl)
        assert isinstance(logps, Tensor)
        truth = torch.log_softmax(hidden @ WEIGHT.T, -1).gather(-1, index[..., None])[..., 0]
        torch.testing.assert_close(logps, truth, rtol=1e-5, atol=1e-5)


# linear_cross_entropy --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cross_entropy(dtype: torch.dtype, impl: str, reduction: str, label_smoothing: float) -> None:
    """Against torch's own, in float64."""
    labels = torch.where(MASK, ids(B, T), -100)
    leaves = HIDDEN.to(dtype), WEIGHT.to(dtype), BIAS.to(dtype)
    options = {"reduction": reduction, "label_smoothing": label_smoothing}
    upstream = rand(B, T, seed=13) if reduction == "none" else 1.7

    def own(h: Tensor, w: Tensor, bias: Tensor, labels: Tensor) -> Tensor:
        logits = torch.nn.functional.linear(h, w, bias) / 0.9
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), **options)
        return loss.view(labels.shape) if reduction == "none" else loss

    truth, true_grads = differentiate(own, {"labels": labels}, tuple(x.double() for x in leaves), upstream)
    for allow_sync in (True, False):
        inputs = {"labels": labels, "temperature": 0.9, "impl": impl, "allow_sync": allow_sync, **options}
        loss, grads = differentiate(linear_cross_entropy, {**inputs, "workspace_bytes": THREE_ROWS}, leaves, upstream)
        torch.testing.assert_close(loss.double(), truth, rtol=1e-5, atol=1e-5)
        assert_gradients(grads, true_grads)


@pytest.mark.parametrize("impl", IMPLS)
def test_cross_entropy_divisors_and_corners(impl: str) -> None:
    labels = torch.where(MASK, ids(B, T), -100)
    total = linear_cross_entropy(HIDDEN, WEIGHT, labels, reduction="sum", impl=impl)
    for n in (7, torch.tensor(7.0, device=DEVICE)):
        mean = linear_cross_entropy(HIDDEN, WEIGHT, labels, num_items_in_batch=n, impl=impl)
        torch.testing.assert_close(mean, total / 7)
    loss, grads = differentiate(
        linear_cross_entropy, {"labels": torch.full_like(labels, -100), "impl": impl}, (HIDDEN, WEIGHT)
    )
    assert loss == 0
    assert not any(g.any() for g in grads)
    wrong = labels.clone()
    wrong[0, 0] = V
    assert linear_cross_entropy(HIDDEN, WEIGHT, wrong, impl=impl).isnan()


# What only a GPU can show ----------------------------------------------------------------------------------------


@on_gpu
@pytest.mark.parametrize("op", ["loss", "of sequences", "into a buffer", "cross entropy", "log-probs", "frozen head"])
def test_in_a_cuda_graph(impl: str, op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bits as outside of one, where no more may be known of the mask than there; and nothing is read."""
    monkeypatch.setattr(_workspace, "BAND_ROWS", 8)
    monkeypatch.setattr(_workspace, "BAND_HIDDEN_SIZE", H)
    hidden, weight = HIDDEN.bfloat16().requires_grad_(), WEIGHT.bfloat16().requires_grad_(op != "frozen head")
    level: Any = "sequence" if op == "of sequences" else "token"
    inputs = batch(config=GRPOLossConfig(beta=0.1, importance_sampling_level=level))
    index, labels = ids(B, T), ids(B, T).where(MASK, -100)
    buffer = torch.zeros(V, H, device=DEVICE)

    def step(allow_sync: bool = True) -> tuple[Tensor, ...]:
        options: dict[str, Any] = {"workspace_bytes": THREE_ROWS, "allow_sync": allow_sync, "impl": impl}
        leaves = [x for x in (hidden, weight) if x.requires_grad]
        if op in ("loss", "of sequences"):
            value = linear_grpo_loss(hidden, weight, **inputs, **options).loss
        elif op == "into a buffer":
            buffer.zero_()
            value = linear_grpo_loss(hidden, weight, **inputs, **options, weight_grad_out=buffer).loss
            return value, buffer.clone(), *torch.autograd.grad(value, leaves[:1])
        elif op == "cross entropy":
            value = linear_cross_entropy(hidden, weight, labels, **options)
        else:
            logps = linear_selective_log_softmax(hidden, weight, index, mask=MASK, **options)
            assert isinstance(logps, Tensor)
            value = logps.square().sum()
        return value, *torch.autograd.grad(value, leaves)

    step()  # compiled before the capture
    step(allow_sync=False)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(allow_sync=False)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    for seed in (31, 32):
        with torch.no_grad():
            hidden.copy_(rand(B, T, H, seed=seed))
        graph.replay()
        torch.testing.assert_close(results, step(allow_sync=False), rtol=0.0, atol=0.0)


@on_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_keep_float32(dtype: torch.dtype) -> None:
    """float32 from the product on, and added up in it: what a rounding in between would show."""
    from grpo_fast.ops._products import add_product, product

    a, b = rand(256, 4_096, seed=1).to(dtype), rand(4_096, 320, seed=2).to(dtype)
    truth = a.double() @ b.double()
    out = torch.empty(256, 328, device=DEVICE)[:, :320]
    product(a, b, out)
    assert (out - truth).norm() < 1e-5 * truth.norm()
    add_product(a, b, out)
    assert (out - 2.0 * truth).norm() < 1e-5 * truth.norm()


@on_gpu
@pytest.mark.parametrize("workspace_mib", [256, 1_024, 1_900, 2_100])
@pytest.mark.parametrize("size", [128, 512])
def test_memory_is_the_workspace(size: int, workspace_mib: int) -> None:
    """Beyond inputs and gradients, 2 GiB of logits in bfloat16 take it, or what the weight's sum takes in float32."""
    rows, vocabulary = 4_096, 262_144
    hidden = torch.randn(1, rows, size, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(vocabulary, size, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    index = torch.randint(0, vocabulary, (1, rows), device="cuda")
    for inputs in ({}, {"config": GRPOLossConfig(importance_sampling_level="sequence")}):
        few = [x.detach().requires_grad_() for x in (hidden[:, :512], weight[:1_024])]  # cuBLAS has memory of its own
        small = index[:, :512] % 1_024
        linear_grpo_loss(
            *few, small, advantages=torch.ones(1, device="cuda"), workspace_bytes=1, **inputs
        ).loss.backward()
        del few, small
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        advantages = torch.ones(1, device="cuda")
        linear_grpo_loss(
            hidden, weight, index, advantages=advantages, workspace_bytes=workspace_mib * 2**20, **inputs
        ).loss.backward()
        most = max(workspace_mib * 2**20, 2 * weight.nbytes) + hidden.nbytes + weight.nbytes
        assert torch.cuda.max_memory_allocated() - before < most + 64 * rows + 12 * 2**20
        hidden.grad = weight.grad = None


@on_gpu
def test_long_completions_on_one_gpu() -> None:
    """4 x 32,768 tokens, V 151,936, H 2,048: 37 GiB of logits, within 3 GiB beyond inputs and gradients."""
    if torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("needs 12 GiB of free GPU memory")
    shape, vocabulary = (4, 32_768, 2_048), 151_936
    hidden = torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = (0.02 * torch.randn(vocabulary, 2_048, device="cuda")).bfloat16().requires_grad_()
    index = torch.randint(0, vocabulary, shape[:2], device="cuda")
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    linear_grpo_loss(hidden, weight, index, advantages=rand(4, seed=1), workspace_bytes=2**30).loss.backward()
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before - hidden.nbytes - weight.nbytes < 3 * 2**30
    assert hidden.grad.isfinite().all()

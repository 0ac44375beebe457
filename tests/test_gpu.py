"""The ops on an NVIDIA GPU, held against float64 on the CPU; skipped where there is none."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from grpo_fast import (
    GRPOLossConfig,
    group_advantages,
    grpo_loss,
    linear_cross_entropy,
    linear_distillation_loss,
    linear_grpo_loss,
    linear_selective_log_softmax,
    selective_log_softmax,
)

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")

B, T, V, H = 6, 33, 1_531, 40
LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "vespo")
MASK = torch.arange(T) < torch.tensor([33, 1, 0, 20, 7, 32])[:, None]


def rand(*shape: int, seed: int, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def ids(*shape: int) -> Tensor:
    return torch.randint(0, V, shape, generator=torch.Generator().manual_seed(9))


def batch() -> dict[str, Tensor]:
    """Everything a loss takes beside the model."""
    return {
        "completion_ids": ids(B, T),
        "completion_mask": MASK,
        "rewards": torch.tensor([0.0, 1.0, 1.0, 0.25, 0.25, 0.25]),
        "group_ids": torch.tensor([0, 0, 0, 1, 1, 1]),
        "old_logps": rand(B, T, seed=2, scale=0.4) - 7.0,
        "ref_logps": rand(B, T, seed=3, scale=0.4) - 7.0,
    }


def both(op: Any, leaves: tuple[Tensor, ...], dtype: torch.dtype, rest: dict[str, Any]) -> tuple[Any, Any]:
    """Value and gradients of ``op`` on the GPU with leaves in ``dtype``, and the truth from the same values."""

    def run(device: str, dtype: torch.dtype) -> list[Tensor]:
        x = tuple(leaf.to(device, dtype).requires_grad_() for leaf in rounded)
        arguments = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in rest.items()}
        value = op(*x, **arguments)
        return [y.detach().cpu().double() for y in (value, *torch.autograd.grad(value, x))]

    rounded = [leaf.to(dtype) for leaf in leaves]
    return run("cuda", dtype), run("cpu", torch.float64)


def assert_close(got: list[Tensor], truth: list[Tensor], dtype: torch.dtype) -> None:
    """Relative error in the Frobenius norm: float32 arithmetic, and one rounding of the result to ``dtype``."""
    for x, y in zip(got, truth, strict=True):
        error = (x - y).norm() / y.norm().clamp(min=1e-30)
        assert error < 2e-5 + torch.finfo(dtype).eps, f"relative error {error:.1e}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_losses(loss_type: str, dtype: torch.dtype) -> None:
    config = GRPOLossConfig(loss_type=loss_type, beta=0.1, epsilon_high=2.0 if loss_type == "cispo" else 0.3)
    rest = {**batch(), "config": config, "temperature": 1.2, "softcap": 20.0}
    logits = (rand(B, T, V, seed=4, scale=3.0),)
    assert_close(*both(lambda x, **r: grpo_loss(x, **r).loss, logits, dtype, rest), dtype)
    head = (rand(B, T, H, seed=5), rand(V, H, seed=6, scale=0.3))
    assert_close(*both(lambda h, w, **r: linear_grpo_loss(h, w, **r).loss, head, dtype, rest), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_other_ops(dtype: torch.dtype) -> None:
    upstream = rand(B, T, seed=7)

    def weighed(pair: Any) -> Tensor:
        logps, entropy = pair
        return (upstream.to(logps) * (logps + 0.3 * entropy)).sum()

    masked: dict[str, Any] = {"index": ids(B, T), "mask": MASK, "return_entropy": True}
    logits = (rand(B, T, V, seed=4, scale=3.0),)
    head = (rand(B, T, H, seed=5), rand(V, H, seed=6, scale=0.3))
    assert_close(*both(lambda x, **r: weighed(selective_log_softmax(x, **r)), logits, dtype, masked), dtype)
    linear = both(lambda h, w, **r: weighed(linear_selective_log_softmax(h, w, **r)), head, dtype, masked)
    assert_close(*linear, dtype)
    labels = {"labels": torch.where(MASK, ids(B, T), -100)}
    assert_close(*both(lambda h, w, **r: linear_cross_entropy(h, w, **r), head, dtype, labels), dtype)
    teacher = {
        "teacher_hidden": rand(B, T, 24, seed=8),
        "teacher_weight": rand(V, 24, seed=9, scale=0.3),
        "completion_mask": MASK,
    }
    for beta in (0.0, 0.5, 1.0):
        rest = {**teacher, "beta": beta}
        assert_close(*both(lambda h, w, **r: linear_distillation_loss(h, w, **r), head, dtype, rest), dtype)


def test_advantages() -> None:
    rewards, groups = batch()["rewards"], batch()["group_ids"]
    for options in ({"group_size": 3}, {"group_ids": groups}):
        on_gpu = {k: v.cuda() if isinstance(v, Tensor) else v for k, v in options.items()}
        got = group_advantages(rewards.cuda(), **on_gpu).cpu()
        assert torch.equal(got[3:], torch.zeros(3))
        torch.testing.assert_close(got.double(), group_advantages(rewards.double(), **options), rtol=1e-6, atol=1e-6)


def test_packed_equals_padded() -> None:
    inputs = {k: v.cuda() for k, v in batch().items()}
    logits = rand(B, T, V, seed=4).cuda()
    mask = inputs["completion_mask"]
    packed = {k: v[mask] if v.shape == mask.shape else v for k, v in inputs.items() if k != "completion_mask"}
    packed["cu_seqlens"] = torch.nn.functional.pad(mask.sum(-1).cumsum(0), (1, 0))
    config = GRPOLossConfig(beta=0.1, loss_type="grpo")
    padded = grpo_loss(logits, **inputs, config=config)
    out = grpo_loss(logits[mask], **packed, config=config)
    torch.testing.assert_close(out.loss, padded.loss)
    for name, value in padded.metrics.items():
        torch.testing.assert_close(out.metrics[name], value, msg=name)


def test_memory_is_that_of_a_chunk() -> None:
    """From hidden states the logits (2 GiB here, before any gradient) are never whole in memory."""
    rows, vocab = 4_096, 131_072
    hidden = torch.randn(1, rows, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(vocab, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    loss = linear_grpo_loss(
        hidden,
        weight,
        torch.randint(0, vocab, (1, rows), device="cuda"),
        advantages=torch.ones(1, device="cuda"),
        workspace_bytes=2**28,
    ).loss
    loss.backward()
    assert torch.cuda.max_memory_allocated() - before < 1.0 * 2**30


def test_more_than_2_31_elements() -> None:
    rows, vocab = 2**14 + 1, 2**17
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("needs 24 GiB of free GPU memory")
    logits = torch.zeros(rows, vocab, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    index = torch.zeros(rows, dtype=torch.int64, device="cuda")
    index[-1] = vocab - 1
    with torch.no_grad():
        logits[-1, -1] = 12.0
    logps = selective_log_softmax(logits, index)
    assert isinstance(logps, Tensor)
    (grad,) = torch.autograd.grad(logps.sum(), logits)
    truth = torch.log_softmax(logits.detach()[-2:].double(), -1)
    torch.testing.assert_close(logps[-2:].double(), torch.stack([truth[0, 0], truth[1, -1]]), rtol=1e-5, atol=0.0)
    expected = torch.nn.functional.one_hot(index[-2:], vocab) - truth.exp()
    torch.testing.assert_close(grad[-2:].double(), expected, rtol=1e-2, atol=1e-9)

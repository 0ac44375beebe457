"""The smallest of the benchmarks for pytest-benchmark: ``pytest benchmarks/``, on a GPU or on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from grpo_fast import group_advantages, grpo_loss, linear_grpo_loss, selective_log_softmax
from grpo_fast.benchmarks.harness import DEVICE

B, T, V, H = (8, 64, 151936, 896) if DEVICE == "cuda" else (4, 16, 4096, 64)


def _once(fn: Callable[[], Any]) -> Callable[[], None]:
    def run() -> None:
        fn()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    run()  # kernels are compiled
    return run


@pytest.fixture
def batch() -> dict[str, Any]:
    torch.manual_seed(0)
    rewards = torch.randint(0, 2, (B,), device=DEVICE).float()
    return {"completion_ids": torch.randint(0, V, (B, T), device=DEVICE), "rewards": rewards, "group_size": B // 2}


def test_group_advantages(benchmark: Any, batch: dict[str, Any]) -> None:
    benchmark(_once(lambda: group_advantages(batch["rewards"], group_size=B // 2)))


def test_selective_log_softmax(benchmark: Any, batch: dict[str, Any]) -> None:
    logits = torch.randn(B, T, V, device=DEVICE)
    benchmark(_once(lambda: selective_log_softmax(logits, batch["completion_ids"])))


def test_grpo_loss(benchmark: Any, batch: dict[str, Any]) -> None:
    logits = torch.randn(B, T, V, device=DEVICE, requires_grad=True)
    benchmark(_once(lambda: torch.autograd.grad(grpo_loss(logits, **batch).loss, logits)))


def test_linear_grpo_loss(benchmark: Any, batch: dict[str, Any]) -> None:
    hidden = torch.randn(B, T, H, device=DEVICE, requires_grad=True)
    weight = torch.randn(V, H, device=DEVICE, requires_grad=True)
    benchmark(_once(lambda: torch.autograd.grad(linear_grpo_loss(hidden, weight, **batch).loss, (hidden, weight))))

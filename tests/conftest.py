"""Without a GPU, Triton's kernels run in its interpreter; it must be told before it is imported."""

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
#: The implementations with kernels that can run here; on a GPU all of them have to.
KERNELS = ("triton", "cuda") if DEVICE == "cuda" else ("triton",)


def rand(*shape: int, seed: int, scale: float = 1.0) -> torch.Tensor:
    """Normal numbers, the same on every machine."""
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale).to(DEVICE)


def digits(completions: list[str], **_: Any) -> list[float]:
    """A reward that even an untrained model gets some of, so that every step has something to learn from."""
    return [sum(c.isdigit() for c in text) / 12 for text in completions]


@pytest.fixture(params=KERNELS)
def impl(request: pytest.FixtureRequest) -> str:
    """Each implementation with kernels, in turn."""
    return str(request.param)


@pytest.fixture
def poisoned_buffers() -> Iterator[None]:
    """Every uninitialized buffer holds NaN, so that what a kernel leaves unwritten is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)

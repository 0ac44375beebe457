"""The one place that chooses an implementation.

``"torch"`` is the reference path, everywhere. ``"triton"`` and ``"cuda"`` are for NVIDIA GPUs. With ``impl=None``
the first implementation an op has that can run on its input is taken; one asked for by name either runs or raises.
"""

from __future__ import annotations

import importlib.util
import os

import torch
from torch import Tensor

IMPLEMENTATIONS = ("cuda", "triton", "torch")

#: What each op has, best first.
OPS: dict[str, tuple[str, ...]] = {
    "group_advantages": ("torch",),
    "selective_log_softmax": ("triton", "torch"),
    "grpo_loss": ("triton", "torch"),
    "linear_selective_log_softmax": ("triton", "torch"),
    "linear_grpo_loss": ("triton", "torch"),
    "linear_cross_entropy": ("triton", "torch"),
    "linear_distillation_loss": ("torch",),
}

_HAS_TRITON = importlib.util.find_spec("triton") is not None  # asked once: torch.compile cannot look it up


def choose(op: str, impl: str | None, x: Tensor) -> str:
    """The implementation of ``op`` to run on ``x``, the input that fixes device and precision.

    Raises:
        ValueError: ``impl`` is no implementation's name.
        RuntimeError: ``impl`` cannot run ``op`` here; the message says why.
    """
    if impl is None:
        return _best(op, x.device, x.dtype)
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl: got {impl!r}, want None or one of {', '.join(IMPLEMENTATIONS)}")
    if impl not in OPS[op]:
        raise RuntimeError(f"impl={impl!r}: {op} has no such kernel in this version; it has {', '.join(OPS[op])}")
    obstacle = _obstacle(impl, x.device, x.dtype)
    if obstacle is not None:
        raise RuntimeError(f"impl={impl!r}: {obstacle}")
    return impl


def describe() -> dict[str, str]:
    """What each op would run on this machine, for ``grpo-fast info``."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return {op: _best(op, device, torch.bfloat16) for op in OPS}


def _best(op: str, device: torch.device, dtype: torch.dtype) -> str:
    if device.type != "cuda":  # Triton's interpreter runs there too, but only to be tested
        return "torch"
    return next(name for name in OPS[op] if _obstacle(name, device, dtype) is None)


def _obstacle(impl: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why ``impl`` cannot run on such input, or None if it can."""
    if impl == "torch":
        return None
    if not _HAS_TRITON:
        return "the package triton is not installed"
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"needs tensors on an NVIDIA GPU, got {device}"
    if dtype == torch.float64:
        return "computes in float32, got float64"
    return None

"""The one place that chooses an implementation.

``"torch"`` is the reference path, everywhere. ``"triton"`` and ``"cuda"`` are for NVIDIA GPUs. With ``impl=None``
the first implementation an op has that can run on its inputs' device is taken; one asked for by name either
runs or raises.
"""

from __future__ import annotations

import importlib.util

import torch

IMPLEMENTATIONS = ("cuda", "triton", "torch")

#: What each op has, best first.
OPS: dict[str, tuple[str, ...]] = {
    "group_advantages": ("torch",),
    "selective_log_softmax": ("torch",),
    "grpo_loss": ("torch",),
    "linear_selective_log_softmax": ("torch",),
    "linear_grpo_loss": ("torch",),
    "linear_cross_entropy": ("torch",),
    "linear_distillation_loss": ("torch",),
}


def choose(op: str, impl: str | None, device: torch.device) -> str:
    """The implementation of ``op`` to run on ``device``.

    Raises:
        ValueError: ``impl`` is no implementation's name.
        RuntimeError: ``impl`` cannot run ``op`` here; the message says why.
    """
    if impl is None:
        return next(name for name in OPS[op] if _obstacle(name, device) is None)
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl: got {impl!r}, want None or one of {', '.join(IMPLEMENTATIONS)}")
    if impl not in OPS[op]:
        raise RuntimeError(f"impl={impl!r}: {op} has no such kernel in this version; it has {', '.join(OPS[op])}")
    obstacle = _obstacle(impl, device)
    if obstacle is not None:
        raise RuntimeError(f"impl={impl!r}: {obstacle}")
    return impl


def _obstacle(impl: str, device: torch.device) -> str | None:
    """Why ``impl`` cannot run on ``device``, or None if it can."""
    if impl == "torch":
        return None
    if device.type != "cuda":
        return f"needs tensors on an NVIDIA GPU, got {device}"
    if impl == "triton" and importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    return None


def describe() -> dict[str, str]:
    """What each op would run on this machine, for ``grpo-fast info``."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return {op: choose(op, None, device) for op in OPS}

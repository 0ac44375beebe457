"""The one place that chooses an implementation.

``"torch"`` is the reference path, everywhere. ``"triton"`` and ``"cuda"`` are for NVIDIA GPUs. With ``impl=None``
the first implementation an op has that can run on its input is taken; one asked for by name either runs or raises.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import warnings
from types import ModuleType

import torch
from torch import Tensor

IMPLEMENTATIONS = ("cuda", "triton", "torch")

#: What each op has, best first.
OPS: dict[str, tuple[str, ...]] = {
    "group_advantages": ("torch",),
    "selective_log_softmax": ("cuda", "triton", "torch"),
    "grpo_loss": ("cuda", "triton", "torch"),
    "linear_selective_log_softmax": ("cuda", "triton", "torch"),
    "linear_grpo_loss": ("cuda", "triton", "torch"),
    "linear_cross_entropy": ("cuda", "triton", "torch"),
    "linear_distillation_loss": ("triton", "torch"),
}

_OLDEST_CAPABILITY = (9, 0)  # of the CUDA kernels


def _load_extension() -> tuple[ModuleType | None, str]:
    """The CUDA extension, and why there is none."""
    if importlib.util.find_spec("grpo_fast._C") is None:
        return None, "the CUDA extension is not built"
    try:
        return importlib.import_module("grpo_fast._C"), ""
    except ImportError as error:
        message = f"the CUDA extension is built, but fails to import: {error}"
        warnings.warn(message, RuntimeWarning, stacklevel=2)  # impl=None would pass over it in silence
        return None, message


#: The CUDA extension or None, and then why.
EXTENSION, WHY_NO_EXTENSION = _load_extension()

_HAS_TRITON = importlib.util.find_spec("triton") is not None  # asked once: torch.compile cannot look it up


def check_impl(impl: str | None) -> None:
    """Check that ``impl`` is None or an implementation's name.

    Raises:
        ValueError: It is not.
    """
    if impl is not None and impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl: got {impl!r}, want None or one of {', '.join(IMPLEMENTATIONS)}")


def choose(op: str, impl: str | None, x: Tensor) -> str:
    """The implementation of ``op`` to run on ``x``, the input that fixes device and precision.

    Raises:
        ValueError: ``impl`` is no implementation's name.
        RuntimeError: ``impl`` cannot run ``op`` here; the message says why.
    """
    check_impl(impl)
    if impl is None:
        return _best(op, x.device, x.dtype, x.stride(-1))
    if impl not in OPS[op]:
        raise RuntimeError(f"impl={impl!r}: {op} has no such kernel in this version; it has {', '.join(OPS[op])}")
    obstacle = _obstacle(impl, x.device, x.dtype, x.stride(-1))
    if obstacle is not None:
        hint = " (pip install with nvcc; see grpo-fast info)" if obstacle == WHY_NO_EXTENSION else ""
        raise RuntimeError(f"impl={impl!r}: {obstacle}{hint}")
    return impl


def describe() -> dict[str, tuple[str, dict[str, str]]]:
    """What each op would run on this machine, and what keeps it from each better implementation it has."""
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    described = {}
    for op, names in OPS.items():
        best = _best(op, device, torch.bfloat16)
        obstacles = {name: _obstacle(name, device, torch.bfloat16) for name in names[: names.index(best)]}
        described[op] = best, {name: why or "interpreted here, for tests" for name, why in obstacles.items()}
    return described


def _best(op: str, device: torch.device, dtype: torch.dtype, stride: int = 1) -> str:
    if device.type != "cuda":  # Triton's interpreter runs there too, but only to be tested
        return "torch"
    return next(name for name in OPS[op] if _obstacle(name, device, dtype, stride) is None)


def _obstacle(impl: str, device: torch.device, dtype: torch.dtype, stride: int = 1) -> str | None:
    """Why ``impl`` cannot run on input with such a last dimension, or None if it can."""
    if impl == "torch":
        return None
    if impl == "cuda" and EXTENSION is None:
        return WHY_NO_EXTENSION
    if impl == "triton" and not _HAS_TRITON:
        return "the package triton is not installed"
    interpreted = impl == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
    if device.type != "cuda" and not interpreted:
        return f"needs tensors on an NVIDIA GPU, got {device}"
    if dtype == torch.float64:
        return "computes in float32, got float64"
    if impl == "cuda" and stride != 1:
        return f"needs a last dimension of stride 1, got {stride}"
    return _unserved(device) if impl == "cuda" else None


def _unserved(device: torch.device) -> str | None:
    """Why the CUDA extension has no kernels for a GPU, or None if it has."""
    properties = torch.cuda.get_device_properties(device)  # what torch.compile can evaluate; the capability it cannot
    capability = (properties.major, properties.minor)
    got = f"{properties.major}.{properties.minor}"
    if capability < _OLDEST_CAPABILITY:
        return f"needs a GPU of compute capability 9.0 or newer (thread-block clusters), got {got}"
    assert EXTENSION is not None
    if not any(_serves(architecture, capability) for architecture in EXTENSION.architectures.split()):
        built = EXTENSION.architectures
        return f"the CUDA extension is built for {built}, which a GPU of compute capability {got} cannot run"
    return None


def _serves(architecture: str, capability: tuple[int, int]) -> bool:
    """Whether a GPU runs what was compiled for an architecture such as 80, 90a or 100+PTX."""
    name, _, ptx = architecture.partition("+")
    number = name.rstrip("af")
    compiled = (int(number[:-1]), int(number[-1]))
    if ptx and compiled <= capability:  # PTX is that of the bare number, which newer GPUs compile for themselves
        return True
    if name.endswith("a"):
        return compiled == capability
    return compiled[0] == capability[0] and compiled[1] <= capability[1]

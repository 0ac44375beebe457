"""Registration of ops that write into one of their arguments.

``torch.library.custom_op`` does the same with more checks at each call; over the thirty arguments of the loss those
take longer than its launches do.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor


def mutating_op(name: str, *, mutates: str, fake: Callable[..., Any]) -> Callable[[Callable[..., Any]], Any]:
    """Register the decorated function as the op ``grpo_fast::name``, which overwrites its argument ``mutates``.

    ``fake`` takes the same arguments and returns results of the right shapes. The op has no derivative.
    """

    def register(fn: Callable[..., Any]) -> Any:
        qualified = f"grpo_fast::{name}"
        torch.library.define(qualified, torch.library.infer_schema(fn, mutates_args=(mutates,)))
        torch.library.impl(qualified, ("cpu", "cuda"), fn)
        torch.library.register_fake(qualified, fake)
        return getattr(torch.ops.grpo_fast, name).default

    return register


def launchers(op: str, impl: str) -> ModuleType:
    """The module with the launchers of ``op``: the same names and signatures for every ``impl`` with kernels."""
    return importlib.import_module("grpo_fast.cuda" if impl == "cuda" else f"grpo_fast.kernels.{op}")


def overwritten(x: Tensor) -> None:
    """Tell autograd that such an op has overwritten ``x``, so that what was saved of it is not used unseen."""
    if not torch.compiler.is_compiling():  # there the compiler sees it in the schema
        torch.autograd.graph.increment_version(x)

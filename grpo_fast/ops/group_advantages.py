"""Group-relative advantages from raw rewards."""

from __future__ import annotations

from typing import get_args

from torch import Tensor

from grpo_fast import backend
from grpo_fast.config import ScaleRewards
from grpo_fast.ops._checks import IDS, Shapes, check_choice
from grpo_fast.reference import group_advantages_ref


def group_advantages(
    rewards: Tensor,
    *,
    group_size: int | None = None,
    group_ids: Tensor | None = None,
    scale: ScaleRewards = "group",
    impl: str | None = None,
) -> Tensor:
    """Advantage of each completion over the others sampled for its prompt.

    A = (r - mean of the group) / (std + 1e-4); DeepSeekMath, arXiv 2402.03300, section 4.1.2. A group whose
    rewards are all equal gets exactly 0.

    Args:
        rewards: (B,) float. NaN marks a completion that could not be scored: it is left out of its group's mean
            and std, and its advantage is 0.
        group_size: Completions of a prompt lie side by side, ``group_size`` of them; divides B.
        group_ids: (B,) int, completions with equal ids form a group, in any order. Give one of the two.
        scale: ``"group"`` divides by the group's std (Bessel-corrected), ``"batch"`` by the std of all rewards,
            ``"none"`` by nothing (Dr. GRPO, arXiv 2503.20783).
        impl: None, or an implementation by name.

    Returns:
        (B,) advantages, float32 (float64 for float64 rewards).

    Raises:
        ValueError, TypeError: An argument is wrong; the message names it.
        RuntimeError: ``impl`` cannot run here.
    """
    shapes = Shapes()
    shapes.check("rewards", rewards, ("B",))
    check_groups(shapes, group_size, group_ids)
    check_choice("scale", scale, get_args(ScaleRewards))
    backend.choose("group_advantages", impl, rewards)
    return group_advantages_ref(rewards, group_size=group_size, group_ids=group_ids, scale=scale)[0]


def check_groups(shapes: Shapes, group_size: object, group_ids: object) -> None:
    """Check that exactly one of the two says how the B rewards are grouped."""
    if (group_size is None) == (group_ids is None):
        both = "neither" if group_size is None else "both"
        raise ValueError(f"group_size: got {both} group_size and group_ids, want exactly one of the two")
    if group_ids is not None:
        shapes.check("group_ids", group_ids, ("B",), dtypes=IDS)
        return
    if isinstance(group_size, bool) or not isinstance(group_size, int):
        raise TypeError(f"group_size: got {group_size!r}, want an int")
    if group_size < 1 or shapes.dims["B"] % group_size:
        raise ValueError(f"group_size: got {group_size}, want at least 1 and a divisor of B = {shapes.dims['B']}")

"""Slips and self-corrections in chains of sums: ``4-1=2,3;wait;4-1=3,3`` has one slip, noticed and repaired."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from grpo_fast.train.items import WAIT

_STEP = re.compile(r"(-?\d+)([+-])(\d+)=(-?\d+)(?:,-?\d+)?")


@dataclass(frozen=True)
class Corrections:
    """Counts over some completions. A step is an equation ``a+b=c`` or ``a-b=c`` between two ``;``, which
    a check of its result, ``,c``, may follow.

    Attributes:
        steps: Equations.
        slips: Wrong ones.
        noticed: Slips that ``wait`` follows.
        repaired: Noticed slips after which the same sum comes out right.
        false_alarms: Right equations that ``wait`` follows.
    """

    steps: int
    slips: int
    noticed: int
    repaired: int
    false_alarms: int


def count_corrections(completions: Iterable[str]) -> Corrections:
    """Count them in the thoughts of completions, each up to ``</think>``.

    A step with the wrong operands, such as a number copied wrong, is not seen as a slip if its equation is true.
    """
    steps = slips = noticed = repaired = false_alarms = 0
    for text in completions:
        parts = text.partition("</think>")[0].removeprefix("<think>").split(";")
        padded = [*parts, "", ""]
        for place, part in enumerate(parts):
            following, again = padded[place + 1 : place + 3]
            if (right := _is_right(part)) is None:
                continue
            steps += 1
            slips += not right
            if following == WAIT:
                false_alarms += right
                noticed += not right
                same = again.partition("=")[0] == part.partition("=")[0]
                repaired += not right and same and _is_right(again) is True
    return Corrections(steps, slips, noticed, repaired, false_alarms)


def _is_right(step: str) -> bool | None:
    """Whether an equation is true; None for anything else."""
    found = _STEP.fullmatch(step)
    if found is None:
        return None
    a, sign, b, result = found.groups()
    return int(result) == int(a) + (int(b) if sign == "+" else -int(b))

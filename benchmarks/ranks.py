"""What the benchmarks of several GPUs share: a start together, and one record of all ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from .harness import DEVICE, Record, Timer


class TimerTogether(Timer):
    """A timer whose runs begin on all ranks at once."""

    def interleaved(self, *fns: Callable[[], Any], before: Callable[[], Any] | None = None) -> list[dict[str, float]]:
        token = torch.zeros(1, device=DEVICE)

        def meet() -> None:
            if before is not None:
                before()
            dist.all_reduce(token)

        return super().interleaved(*fns, before=meet)


def merged(records: Sequence[Record]) -> list[Record]:
    """The records of all ranks as one each: the slowest, the largest, the least exact; wrong if one of them is."""
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, list(records))
    found = []
    for same in zip(*every, strict=True):
        record = dict(same[0])
        for other in same[1:]:
            for name in ("skipped", "wrong"):
                if name in other:
                    record.setdefault(name, other[name])
            for name in ("ms", "ms_p10", "ms_p90", "ceiling_ms", "peak_bytes"):
                if name in record and name in other:
                    record[name] = max(record[name], other[name])
            for name, value in other.get("errors", {}).items():
                own = record.get("errors", {}).get(name, value)
                record.setdefault("errors", {})[name] = own if own != own or own >= value else value
        if "skipped" in record:  # on one rank is on all
            for name in ("ms", "ms_p10", "ms_p90", "ceiling_ms", "peak_bytes", "errors"):
                record.pop(name, None)
        found.append(record)
    return found

"""What moved between two runs, beyond the noise of both."""

from __future__ import annotations

import json
from dataclasses import dataclass

from .harness import Record

#: A median that moves by less is the same: what reruns on one machine differ by.
SAME = 0.05


@dataclass(frozen=True)
class Move:
    """A record that is not what it was."""

    case: dict[str, object]
    task: str
    provider: str
    what: str  # "time", "memory" or "result"
    before: float
    after: float

    @property
    def worse(self) -> bool:
        return self.after > self.before


def compare(old: list[Record], new: list[Record]) -> list[Move]:
    """Moves of the records that both runs have.

    A time is taken beside its ceiling's in the same turns, so that a GPU at another clock is no move. It moved if it
    did so by more than 5 %, and by more than half the spread of its runs, from the 10 % to the 90 % quantile.
    """
    before = {_key(record): record for record in old}
    moves = []
    for record in new:
        was = before.get(_key(record))
        if was is None or "ms" not in was or "ms" not in record:
            continue
        identity = record["case"], record["task"], record["provider"]
        times = [r["ms"] / r["ceiling_ms"] if "ceiling_ms" in r else r["ms"] for r in (was, record)]
        noise = max((r["ms_p90"] - r["ms_p10"]) / r["ms"] / 2 for r in (was, record))
        if abs(times[1] / times[0] - 1) > max(SAME, noise):
            moves.append(Move(*identity, "time", *times))
        sizes = [r.get("peak_bytes", 0) for r in (was, record)]
        if abs(sizes[1] - sizes[0]) > max(0.01 * sizes[0], 2**20):
            moves.append(Move(*identity, "memory", *map(float, sizes)))
        results = [float("wrong" in r) for r in (was, record)]
        if results[0] != results[1]:
            moves.append(Move(*identity, "result", *results))
    return moves


def _key(record: Record) -> str:
    return json.dumps([record["case"], record["task"], record["provider"]], sort_keys=True)

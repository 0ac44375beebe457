"""What a run writes down as it goes: metrics as JSON lines and for TensorBoard."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from grpo_fast.train.evaluate import rechecks
from grpo_fast.train.files import write_file
from grpo_fast.train.ranks import Ranks
from grpo_fast.train.rewards import RewardBatch
from grpo_fast.train.rollout import Rollout
from grpo_fast.version import __version__, commit

METRICS_FILE = "metrics.jsonl"
SUMMARY_FILE = "summary.json"


class Recorder:
    """Appends metrics rows of GRPO steps.

    Args:
        folder: The run's folder; gets ``metrics.jsonl`` and ``tensorboard/``.
        last_step: Rows of later steps are dropped: what a run wrote between its last checkpoint and its end.
    """

    def __init__(self, folder: Path, last_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._path = folder / METRICS_FILE
        kept = [row for row in read_metrics(self._path) if row["step"] <= last_step] if self._path.exists() else []
        write_file(self._path, "".join(f"{json.dumps(row)}\n" for row in kept))
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=last_step + 1)  # type: ignore[no-untyped-call]

    def write(self, step: int, row: Mapping[str, float]) -> None:
        """Append one row, ``step`` first."""
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **row}) + "\n")
        for name, value in row.items():
            self._board.add_scalar(name, value, step)  # type: ignore[no-untyped-call]

    def close(self) -> None:
        """Flush what TensorBoard has not written."""
        self._board.close()  # type: ignore[no-untyped-call]


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The rows of a metrics file; a last line that a kill tore off is left out.

    Raises:
        ValueError: Another line is no JSON object; the message names it.
    """
    lines = path.read_text(encoding="utf-8").splitlines()
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number < len(lines):
                raise ValueError(f"{path}, line {number}: no JSON object: {line[:60]!r}") from error
    return rows


def versions() -> dict[str, str]:
    """The versions that a result depends on, and the commit."""
    from importlib.metadata import version

    names = ("torch", "transformers", "reasoning-gym", "safetensors")
    found = {"grpo_fast": __version__, "python": platform.python_version(), **{name: version(name) for name in names}}
    return {**found, "commit": commit()}


def device_name(device: torch.device) -> str:
    """The GPU's name, or the CPU's architecture with the threads in use."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU ({platform.machine()}, {torch.get_num_threads()} threads)"


def batch_metrics(
    batch: Rollout, scores: RewardBatch, advantages: Tensor, group_size: int, ranks: Ranks
) -> dict[str, float]:
    """What a row of metrics says of the batch of all ranks, of which each passes its own completions."""
    own = {
        "reward": scores.total,
        "advantage": advantages,
        "length": batch.completion_mask.sum(-1).float(),
        "truncated": batch.truncated.float(),
        "rechecks": torch.tensor([float(rechecks(text)) for text in batch.texts]),
    }
    if (ratio := batch.importance_sampling_ratio) is not None:
        off = ratio.log().abs() * batch.completion_mask
        own["sampling/logp_difference"] = off.sum(-1) / batch.completion_mask.sum(-1).clamp(min=1)
    parts = ranks.gather({name: x.cpu() for name, x in (own | scores.per_function).items()})
    of_all = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    scored, lengths = of_all["reward"][~of_all["reward"].isnan()], of_all["length"]
    return {
        "reward": scored.mean().item(),
        "reward_std": scored.std().item(),
        **{f"rewards/{name}/mean": of_all[name].nanmean().item() for name in scores.per_function},
        "frac_reward_zero_std": (of_all["advantage"].view(-1, group_size) == 0).all(-1).float().mean().item(),
        "completions/mean_length": lengths.mean().item(),
        "completions/max_length": lengths.max().item(),
        "completions/clipped_ratio": of_all["truncated"].mean().item(),
        "completions/rechecks": of_all["rechecks"].mean().item(),
        **{name: x.mean().item() for name, x in of_all.items() if name == "sampling/logp_difference"},
        "num_tokens": lengths.sum().item(),
    }

"""Checkpoints that survive a crash at any moment: weights and optimizer as safetensors, the rest as JSON.

They hold whole tensors, however many ranks the run has and whether its model is sharded, so that any other number of
them, and either kind, goes on from them.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from grpo_fast.train.files import write_json
from grpo_fast.train.ranks import ALONE, Ranks
from grpo_fast.train.sharding import placed_like, whole

_NAME = "checkpoint"


def save_checkpoint(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any], ranks: Ranks = ALONE
) -> None:
    """Replace the checkpoint in ``folder``. Until the new one is whole the old one stays.

    Args:
        folder: The run's folder.
        model: Its parameters are saved, in float32 or whatever they are.
        optimizer: Its per-parameter state is saved, in the order of the parameters.
        state: Anything that is JSON.
        ranks: All of them call this, the first one writes, and all wait until it has.
    """
    weights = _whole(dict(model.named_parameters()), ranks)
    moments = _whole(_optimizer_tensors(optimizer), ranks)
    if ranks.first:
        _write(folder, weights, moments, state)
    ranks.wait()


def _whole(tensors: dict[str, Tensor], ranks: Ranks) -> dict[str, Tensor]:
    """All of each tensor, on the first rank: one at a time, so that no GPU holds more than one of them whole."""
    found = {}
    for name, tensor in tensors.items():
        gathered = whole(tensor)
        if ranks.first:
            found[name] = gathered.cpu().contiguous()
    return found


def _write(folder: Path, weights: dict[str, Tensor], moments: dict[str, Tensor], state: dict[str, Any]) -> None:
    new, current, old = (folder / f"{_NAME}{suffix}" for suffix in (".partial", "", ".old"))
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    save_file(weights, new / "model.safetensors")
    save_file(moments, new / "optimizer.safetensors")
    write_json(new / "state.json", state)
    for file in new.iterdir():
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
    shutil.rmtree(old, ignore_errors=True)
    if current.exists():
        current.rename(old)
    new.rename(current)
    shutil.rmtree(old, ignore_errors=True)


def find_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint in a run's folder."""
    for suffix in ("", ".old"):  # .old is what is left when a crash hits between the two renames
        if (folder / f"{_NAME}{suffix}" / "state.json").is_file():
            return folder / f"{_NAME}{suffix}"
    return None


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The JSON part of a checkpoint."""
    return dict(json.loads((checkpoint / "state.json").read_text(encoding="utf-8")))


@torch.no_grad()
def restore(checkpoint: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Load weights and optimizer state in place; a rank of a sharded model takes its part of them.

    Raises:
        ValueError: The checkpoint is of another model.
    """
    file = checkpoint / "model.safetensors"
    saved, named = load_file(file), dict(model.named_parameters())
    if saved.keys() != named.keys() or any(saved[n].shape != p.shape for n, p in named.items()):
        raise ValueError(f"resume: {file} holds the weights of another model")
    for name, parameter in named.items():
        parameter.copy_(placed_like(parameter, saved[name]))
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for name, tensor in load_file(checkpoint / "optimizer.safetensors").items():
        index, key = name.split(".")
        parameter = parameters[int(index)]
        # Adam keeps its step count on the CPU, and its moments beside the parameter.
        optimizer.state[parameter][key] = tensor if key == "step" else placed_like(parameter, tensor)


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return {
        f"{index}.{key}": value
        for index, parameter in enumerate(parameters)
        for key, value in optimizer.state.get(parameter, {}).items()
    }

"""Checkpoints that survive a crash at any moment: weights and optimizer as safetensors, the rest as JSON."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

_NAME = "checkpoint"


def write_json(path: Path, value: Any) -> None:
    """Write JSON under a temporary name, then rename."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


def save_checkpoint(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Replace the checkpoint in ``folder``. Until the new one is whole the old one stays.

    Args:
        folder: The run's folder.
        model: Its parameters are saved, in float32 or whatever they are.
        optimizer: Its per-parameter state is saved, in the order of the parameters.
        state: Anything that is JSON.
    """
    new, current, old = (folder / f"{_NAME}{suffix}" for suffix in (".partial", "", ".old"))
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    save_file({n: p.detach().contiguous() for n, p in model.named_parameters()}, new / "model.safetensors")
    save_file(_optimizer_tensors(optimizer), new / "optimizer.safetensors")
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


def restore(checkpoint: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Load weights and optimizer state in place.

    Raises:
        ValueError: The checkpoint is of another model.
    """
    load_weights(checkpoint / "model.safetensors", model)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for name, tensor in load_file(checkpoint / "optimizer.safetensors").items():
        index, key = name.split(".")
        parameter = parameters[int(index)]
        # Adam keeps its step count on the CPU, and its moments beside the parameter.
        optimizer.state[parameter][key] = tensor if key == "step" else tensor.to(parameter.device)


@torch.no_grad()
def load_weights(file: Path, model: nn.Module) -> None:
    """Copy saved parameters into a model.

    Raises:
        ValueError: The file is of another model.
    """
    saved, parameters = load_file(file), dict(model.named_parameters())
    if saved.keys() != parameters.keys() or any(saved[n].shape != p.shape for n, p in parameters.items()):
        raise ValueError(f"resume: {file} holds the weights of another model")
    for name, parameter in parameters.items():
        parameter.copy_(saved[name])


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return {
        f"{index}.{key}": value.detach().contiguous()
        for index, parameter in enumerate(parameters)
        for key, value in optimizer.state.get(parameter, {}).items()
    }

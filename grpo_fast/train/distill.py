"""Distillation: a student learns a teacher's verified traces by cross entropy, as DeepSeek-R1's students did."""

from __future__ import annotations

import time
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from grpo_fast.train.checkpoint import find_checkpoint, read_state, restore, save_checkpoint
from grpo_fast.train.files import write_json
from grpo_fast.train.model import Policy, load_policy
from grpo_fast.train.progress import progress, stop_flag
from grpo_fast.train.recorder import SUMMARY_FILE, Recorder
from grpo_fast.train.supervised import Example, divergence_loss, supervised_loss
from grpo_fast.train.trainer import RunStopped


@dataclass(frozen=True, kw_only=True)
class DistillSettings:
    """How a student learns.

    Attributes:
        model: The student, as in ``load_policy``.
        epochs: Times it goes through the traces.
        batch: Traces a step.
        lr: AdamW's learning rate at its start; it falls linearly to a tenth.
        divergence: None for cross entropy alone; else the divergence from the teacher's distribution is added, and
            this is its ``beta``: 0 for the forward KL, 1 for the reverse KL, between them the generalized JSD.
        save_every: Steps between two checkpoints.
        device, seed: As in ``Settings``.
    """

    model: str
    epochs: int = 5
    batch: int = 64
    lr: float = 3e-3
    divergence: float | None = None
    save_every: int = 100
    device: str = "auto"
    seed: int = 0


def distill(
    settings: DistillSettings, examples: list[Example], folder: Path, teacher: Policy | None = None
) -> dict[str, Any]:
    """Train the student; ``folder`` gets ``model/``, ``metrics.jsonl``, ``checkpoint/`` and ``summary.json``.

    A run that was stopped goes on from its checkpoint, to the same result.

    Args:
        settings: How.
        examples: Problems with the completions to learn.
        folder: Of this run.
        teacher: Whose distribution ``settings.divergence`` is from.

    Returns:
        The summary: steps, tokens learned from, seconds.

    Raises:
        ValueError: There are no examples, or a divergence without a teacher.
        RunStopped: SIGINT or SIGTERM came; the checkpoint is written.
    """
    if not examples:
        raise ValueError("examples: got none, want traces to learn from")
    if settings.divergence is not None and teacher is None:
        raise ValueError(f"divergence: got {settings.divergence} without a teacher, want one, or None")
    policy = load_policy(settings.model, device=settings.device, seed=settings.seed)
    optimizer = torch.optim.AdamW(policy.model.parameters(), lr=settings.lr, betas=(0.9, 0.99), weight_decay=0.0)
    state: dict[str, Any] = {"steps": 0, "tokens": 0, "seconds": 0.0}
    if (checkpoint := find_checkpoint(folder)) is not None:
        state = read_state(checkpoint)
        restore(checkpoint, policy.model, optimizer)
    folder.mkdir(parents=True, exist_ok=True)
    batches = _batches(len(examples), settings)
    policy.model.train()
    started = time.perf_counter() - state["seconds"]
    with (
        closing(Recorder(folder, last_step=state["steps"])) as recorder,
        progress("distill", len(batches), state["steps"]) as advance,
        stop_flag() as stop,
    ):
        for step in range(state["steps"], len(batches)):
            chosen = [examples[i] for i in batches[step]]
            for group in optimizer.param_groups:
                group["lr"] = settings.lr * max(0.1, 1 - step / len(batches))
            if settings.divergence is None or teacher is None:
                loss = supervised_loss(policy, chosen)
            else:
                loss = divergence_loss(policy, teacher, chosen, settings.divergence)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(policy.model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            tokens = sum(len(policy.completion(text)) for _, text in chosen)
            state = {"steps": step + 1, "tokens": state["tokens"] + tokens, "seconds": time.perf_counter() - started}
            recorder.write(step + 1, {"loss": loss.item()})
            advance(f"loss {loss.item():.3f}")
            stopped = stop()
            if stopped or (step + 1) % settings.save_every == 0:
                save_checkpoint(folder, policy.model, optimizer, state)
            if stopped:
                raise RunStopped
    policy.save(folder / "model")
    summary = {"settings": asdict(settings), "examples": len(examples), **state}
    write_json(folder / SUMMARY_FILE, summary)
    return summary


def _batches(count: int, settings: DistillSettings) -> list[list[int]]:
    """Indices of each step's examples: every epoch all of them, in an order that follows from the seed."""
    generator = torch.Generator().manual_seed(settings.seed)
    orders = [torch.randperm(count, generator=generator).tolist() for _ in range(settings.epochs)]
    size = settings.batch
    return [order[start : start + size] for order in orders for start in range(0, count, size)]

"""The run: cold start, then GRPO - sample groups, score them, push toward the answers that beat their group."""

from __future__ import annotations

import datetime
import hashlib
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch

from grpo_fast.train.checkpoint import find_checkpoint, read_state, restore, save_checkpoint
from grpo_fast.train.evaluate import Evaluation, evaluate
from grpo_fast.train.files import write_json
from grpo_fast.train.model import Policy, load_policy
from grpo_fast.train.progress import progress, stop_flag
from grpo_fast.train.ranks import ALONE, Ranks
from grpo_fast.train.recorder import SUMMARY_FILE, Recorder, batch_metrics, device_name, versions
from grpo_fast.train.rewards import accuracy_reward, columns, combine, reward_functions
from grpo_fast.train.rollout import Rollout, sample
from grpo_fast.train.rollout_vllm import VLLMSampler, connect
from grpo_fast.train.settings import Settings
from grpo_fast.train.supervised import supervised_loss, worked
from grpo_fast.train.tasks import Problem, Split
from grpo_fast.train.update import (
    advantages_over_ranks,
    check_sparse_grad_tol,
    grpo_gradients,
    optimizer_step,
    reference_logps,
    slices,
)

SETTINGS_FILE = "settings.json"

COLD_START = "cold_start"
GRPO = "grpo"


class RunStopped(KeyboardInterrupt):
    """A signal ended the run after a whole step; the checkpoint is written."""


def train(settings: Settings, folder: Path, *, resume: bool = False, command: str = "") -> dict[str, Any]:
    """Cold start, GRPO and evaluation; everything it writes lies in ``folder``.

    Under torchrun every rank calls this, takes its share of each batch, and has the same model. The first one writes
    and measures.

    Args:
        settings: The run. With ``resume``, the ones it began with.
        folder: Gets ``settings.json``, ``metrics.jsonl``, ``tensorboard/``, ``checkpoint/``, the models
            ``cold_start/`` and ``model/`` (which transformers loads), and ``summary.json``.
        resume: Go on from the checkpoint in ``folder``; the result is that of a run that was never stopped.
        command: The command line that begins the run, kept in the summary.

    Returns:
        The summary: evaluations on test problems before and after GRPO, settings, versions, device, seconds.

    Raises:
        ValueError: ``folder`` holds a run and ``resume`` is not set, or holds none and it is; or a setting is wrong.
        RunStopped: SIGINT or SIGTERM came; the checkpoint is written.
    """
    ranks = Ranks.join()
    if ranks.from_first(not resume and (folder / SETTINGS_FILE).exists()):
        raise ValueError(f"out: {folder} holds a run already; want another folder, or --resume {folder}")
    run = Run(settings, folder, command, ranks)
    try:
        if run.phase == COLD_START:
            stopped = run.cold_start()
            run.begin_grpo()
            if stopped:
                raise RunStopped
        run.grpo()
        return run.finish()
    finally:
        if run.recorder is not None:
            run.recorder.close()


class Run:
    """A run's state, and its phases in order: ``cold_start``, ``begin_grpo``, ``grpo``, ``finish``.

    ``phase`` and ``done`` (steps of that phase) say how far it is; both come from the checkpoint.
    """

    def __init__(self, settings: Settings, folder: Path, command: str = "", ranks: Ranks = ALONE) -> None:
        completions = settings.prompts * settings.group_size // settings.minibatches
        if completions % ranks.count:
            raise ValueError(
                f"prompts: got {settings.prompts}, or {completions} completions in each of minibatches = "
                f"{settings.minibatches}, want as many on each of {ranks.count} ranks"
            )
        if settings.cold_start_steps and settings.cold_start_batch < ranks.count:
            raise ValueError(
                f"cold_start_batch: got {settings.cold_start_batch}, want one trace at least on each of "
                f"{ranks.count} ranks"
            )
        self.settings, self.folder, self.ranks = settings, folder, ranks
        self.task = settings.load_task()
        self.policy = self._policy(settings.model)
        check_sparse_grad_tol(self.policy, settings)
        self.rewards = reward_functions(settings, self.task)
        self.draw: Callable[..., Rollout] = sample
        if settings.rollout == "vllm":
            client = connect(settings.vllm_server, self.policy, sends_weights=ranks.first)
            self.draw = VLLMSampler(client, settings, ranks).sample

        state: dict[str, Any] = {"phase": COLD_START, "done": 0, "before": None, "seconds": {}, "command": command}
        checkpoint = find_checkpoint(folder)
        if checkpoint is not None:
            state = read_state(checkpoint)
        self.phase: str = state["phase"]
        self.done: int = state["done"]
        self.command: str = state["command"]
        self.before: dict[str, Any] | None = state["before"]
        self.seconds = defaultdict(float, state["seconds"])
        self.optimizer = self._optimizer(settings.cold_start_lr if self.phase == COLD_START else settings.lr)
        if checkpoint is not None:
            restore(checkpoint, self.policy.model, self.optimizer)
        # Only now that all of it has been found right, by all ranks, is the folder a run's.
        self.recorder: Recorder | None = None
        ranks.wait()
        if ranks.first:
            folder.mkdir(parents=True, exist_ok=True)
            write_json(folder / SETTINGS_FILE, asdict(settings))
            self.recorder = Recorder(folder, last_step=self.done if self.phase == GRPO else -1)

    def _policy(self, model: str) -> Policy:
        s = self.settings
        policy = load_policy(model, device=s.device, seed=s.seed, lm_head_dtype=s.lm_head_dtype)
        if s.shard and self.ranks.count > 1:
            policy.shard()
        return policy

    def _optimizer(self, lr: float) -> torch.optim.Optimizer:
        return torch.optim.AdamW(
            self.policy.model.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=self.settings.weight_decay
        )

    # Phases ----------------------------------------------------------------------------------------------------

    def cold_start(self) -> bool:
        """Supervised steps on worked traces until the sampled accuracy on dev problems is high enough.

        Returns whether a signal came in the last of them, which ends the run once GRPO has its first checkpoint: on
        one of the cold start it would go on with more steps.
        """
        s = self.settings
        self.policy.model.train()
        with progress("cold start", s.cold_start_steps, self.done, self.ranks.first) as advance, stop_flag() as stop:
            while self.done < s.cold_start_steps:
                with self.timed("cold_start"):
                    problems = self.task.problems("train", self.done * s.cold_start_batch, s.cold_start_batch)
                    loss = supervised_loss(self.policy, worked(self.ranks.share(problems)), self.ranks)
                    loss.backward()
                    self.ranks.sum_gradients(self.policy.model.parameters())
                    torch.nn.utils.clip_grad_norm_(self.policy.model.parameters(), 1.0)
                    self.optimizer.step()
                    self.optimizer.zero_grad()
                self.done += 1
                advance(f"loss {sum(self.ranks.gather(loss.item())):.3f}")
                if self.done % s.cold_start_check == 0 and self.accuracy_now() >= s.cold_start_until:
                    return self.ranks.any(stop())
                self.save_if_due(stop(), last=False)
        return False

    def begin_grpo(self) -> None:
        """Keep the model as it is: it is measured, and it is the reference of the KL term."""
        self.write_model(COLD_START)
        self.optimizer = self._optimizer(self.settings.lr)
        self.phase, self.done = GRPO, 0
        self.before = asdict(self.evaluate("test", self.settings.test_problems))
        if self.settings.eval_every:
            self.record(self.dev_metrics())
        self.save()

    def grpo(self) -> None:
        """Sample, score, update."""
        s = self.settings
        reference = self.reference() if s.beta else None
        self.policy.model.train()
        with progress("GRPO", s.steps, self.done, self.ranks.first) as advance, stop_flag() as stop:
            while self.done < s.steps:
                row = self.step(reference)
                self.done += 1
                last = self.done == s.steps
                if s.eval_every and (last or self.done % s.eval_every == 0):
                    row |= self.dev_metrics()
                self.record(row)
                advance(f"reward {row['reward']:.2f}, {row['rewards/accuracy/mean']:.0%} right")
                self.save_if_due(stop(), last)

    def finish(self) -> dict[str, Any]:
        """Measure the final model on test problems, write it and the summary."""
        after = asdict(self.evaluate("test", self.settings.test_problems))
        summary = {
            "before": self.before,
            "after": after,
            "settings": asdict(self.settings),
            "versions": versions(),
            "date": datetime.date.today().isoformat(),
            "device": device_name(self.policy.device),
            "seconds": {**self.seconds, "total": sum(self.seconds.values())},
            "command": self.command,
            "ranks": self.ranks.count,
        }
        self.write_model("model")
        if self.ranks.first:
            write_json(self.folder / SUMMARY_FILE, summary)
        return summary

    # One step of GRPO ------------------------------------------------------------------------------------------

    def step(self, reference: Policy | None) -> dict[str, float]:
        """One batch of prompts x group_size completions, at most T tokens each, and the updates on it.

        A rank has B of them, side by side in the batch.
        """
        s, started = self.settings, time.perf_counter()
        with self.timed("rollout"):
            first = s.cold_start_steps * s.cold_start_batch + self.done * s.prompts  # past those of the cold start
            # A group may span ranks, which then have so many of its completions, or a multiple.
            size = math.gcd(s.group_size, s.prompts * s.group_size // self.ranks.count)
            every = [p for p in self.task.problems("train", first, s.prompts) for _ in range(s.group_size // size)]
            problems = self.ranks.share(every)
            batch = self.sample(problems, size)
        with self.timed("rewards"):
            scores = combine(self.rewards, batch.texts, columns(problems, size, batch))
            advantages = advantages_over_ranks(scores.total, s, self.ranks).to(self.policy.device)  # (B,)

        warmup, decay = (self.done + 1) / max(s.warmup_steps, 1), max(0.1, 1 - self.done / s.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = s.lr * min(1.0, warmup, decay)
        metrics: defaultdict[str, float] = defaultdict(float)
        with self.timed("loss"):
            ref_logps = None if reference is None else reference_logps(reference, batch, s)  # (B, T)
        for rows in [*slices(advantages.numel(), advantages.numel() // s.minibatches)] * s.num_iterations:
            with self.timed("loss"):
                ref = None if ref_logps is None else ref_logps[rows]
                update = grpo_gradients(self.policy, batch.part(rows), advantages[rows], ref, s, self.ranks)
            with self.timed("optimizer"):
                update["grad_norm"] = optimizer_step(self.policy, self.optimizer, s.max_grad_norm)
            for name, value in update.items():
                metrics[name] += value / (s.minibatches * s.num_iterations)

        return {
            **batch_metrics(batch, scores, advantages, s.group_size, self.ranks),
            **metrics,
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            "step_time": time.perf_counter() - started,
        }

    def sample(self, problems: list[Problem], group_size: int) -> Rollout:
        """Completions drawn from seed, phase, step and rank alone, so that a resumed run draws the same."""
        key = f"{self.settings.seed} {self.phase} {self.done}" + (f" {self.ranks.rank}" if self.ranks.rank else "")
        seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:7], "big")
        return self.draw(
            self.policy.whole(),
            [self.policy.prompt(p) for p in problems],
            group_size=group_size,
            max_new_tokens=self.settings.max_new_tokens,
            temperature=self.settings.temperature,
            generator=torch.Generator(self.policy.device).manual_seed(seed),
        )

    def reference(self) -> Policy:
        """The model that GRPO began with, frozen."""
        reference = self._policy(str(self.folder / COLD_START))
        reference.model.eval().requires_grad_(False)
        return reference

    # Measuring and saving --------------------------------------------------------------------------------------

    def accuracy_now(self, problems: int = 256) -> float:
        """Share of right answers on dev problems, one sample each."""
        with self.timed("evaluation"):
            chosen = self.ranks.share(self.task.problems("dev", 0, problems))
            texts = self.sample(chosen, 1).texts
            right = accuracy_reward(self.task)(texts, problem=chosen)
        return sum(self.ranks.gather(sum(r or 0.0 for r in right))) / problems

    def evaluate(self, split: Split, problems: int) -> Evaluation:
        """Accuracy of the model as it is: by the first rank, while the others wait."""
        s = self.settings
        with self.timed("evaluation"):
            policy = self.policy.whole()
            found = self.ranks.first and evaluate(
                policy,
                self.task,
                split,
                problems=problems,
                samples=s.eval_samples,
                max_new_tokens=s.max_new_tokens,
                temperature=s.temperature,
                seed=s.seed,
                batch=s.eval_batch,
            )
            return self.ranks.from_first(cast(Evaluation, found))

    def record(self, row: dict[str, float]) -> None:
        """Write a row of metrics, of the first rank."""
        if self.recorder is not None:
            self.recorder.write(self.done, row)

    def dev_metrics(self) -> dict[str, float]:
        """Accuracy on dev problems, under the names of a metrics row."""
        found = self.evaluate("dev", self.settings.eval_problems)
        return {
            "eval/pass@1": found.pass_at_1,
            "eval/pass@1_se": found.pass_at_1_se,
            "eval/cons@k": found.cons_at_k,
            "eval/greedy": found.greedy,
        }

    def save_if_due(self, stop: bool, last: bool) -> None:
        """Save every ``save_every`` steps, at the end, and before a signal ends the run."""
        stop = self.ranks.any(stop)
        if stop or last or self.done % self.settings.save_every == 0:
            self.save()
        if stop:
            raise RunStopped

    def save(self) -> None:
        """Write the checkpoint, which is the same for any number of ranks."""
        state = {
            "phase": self.phase,
            "done": self.done,
            "before": self.before,
            "seconds": dict(self.seconds),
            "command": self.command,
        }
        save_checkpoint(self.folder, self.policy.model, self.optimizer, state, self.ranks)

    def write_model(self, name: str) -> None:
        """Write the model as it is, for transformers. All wait until it is there."""
        policy = self.policy.whole()
        if self.ranks.first:
            policy.save(self.folder / name)
        self.ranks.wait()

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Add the time of a block to ``seconds``."""
        start = time.perf_counter()
        yield
        if self.policy.device.type == "cuda":
            torch.cuda.synchronize()
        self.seconds[name] += time.perf_counter() - start

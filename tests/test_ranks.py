"""Training under torchrun: ranks take the step of one process, and a run goes on with another number of them."""

from __future__ import annotations

import json
import os
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp

from grpo_fast.train import trainer
from grpo_fast.train.model import Policy, load_policy
from grpo_fast.train.ranks import ALONE, Ranks
from grpo_fast.train.rollout import Rollout, sample
from grpo_fast.train.settings import Settings
from grpo_fast.train.supervised import supervised_loss, worked
from grpo_fast.train.tasks import load_task
from grpo_fast.train.trainer import RunStopped, train
from grpo_fast.train.update import grpo_gradients, optimizer_step, reference_logps

RANKS = 2
LOSS_TYPES = ("grpo", "dr_grpo", "dapo", "luspo", "cispo")
RUN = Settings(
    cold_start_steps=2,
    cold_start_batch=7,  # shares of 3 and 4
    cold_start_check=2,
    cold_start_until=2.0,
    steps=4,
    prompts=8,
    minibatches=2,
    group_size=2,
    max_new_tokens=12,
    eval_every=2,
    eval_problems=3,
    eval_samples=2,
    test_problems=3,
    save_every=2,
    device="cpu",
)


# What a rank does: modules' functions, which another process can import ------------------------------------------


def as_rank(rank: int, port: int, work: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    environment = {"RANK": rank, "WORLD_SIZE": RANKS, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1"}
    os.environ.update({name: str(value) for name, value in {**environment, "MASTER_PORT": port}.items()})
    torch.set_num_threads(1)
    ranks = Ranks.join()
    try:
        work(ranks, *arguments)
    finally:
        ranks.leave()


def on_ranks(work: Callable[..., None], *arguments: Any) -> None:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    mp.spawn(as_rank, (port, work, arguments), nprocs=RANKS)


def batch_of(policy: Policy) -> tuple[Rollout, torch.Tensor]:
    """Six groups of four, of different lengths."""
    problems = load_task("basic_arithmetic").problems("train", 0, 6)
    batch = sample(
        policy,
        [policy.prompt(p) for p in problems],
        group_size=4,
        max_new_tokens=16,
        temperature=2.0,
        generator=torch.Generator().manual_seed(0),
    )
    return batch, torch.randn(24, generator=torch.Generator().manual_seed(0))


def update(ranks: Ranks, loss_type: str) -> dict[str, Any]:
    """Metrics of an update on this rank's share, and the model after it."""
    policy = load_policy("tiny", device="cpu", seed=3)
    batch, rewards = batch_of(policy)
    settings = Settings(
        prompts=6, minibatches=1, micro_prompts=1, group_size=4, loss_type=loss_type, max_grad_norm=1e9, lr=1.0
    )
    ref_logps = reference_logps(policy, batch, settings) - 0.1
    groups = ranks.share(range(6))
    rows = slice(4 * groups[0], 4 * groups[-1] + 4)
    optimizer = torch.optim.SGD(policy.model.parameters(), lr=1.0)
    metrics = grpo_gradients(policy, batch.part(rows), rewards[rows], ref_logps[rows], settings, ranks)
    metrics["grad_norm"] = optimizer_step(policy, optimizer, settings.max_grad_norm)
    return {"metrics": metrics, "model": {n: p.detach() for n, p in policy.model.named_parameters()}}


def write_updates(ranks: Ranks, folder: Path) -> None:
    found = {loss_type: update(ranks, loss_type) for loss_type in LOSS_TYPES}
    policy = load_policy("tiny", device="cpu", seed=3)
    problems = load_task("chain_sum").problems("train", 0, 7)
    supervised_loss(policy, worked(ranks.share(problems)), ranks).backward()
    ranks.sum_gradients(policy.model.parameters())
    found["supervised"] = {n: p.grad for n, p in policy.model.named_parameters()}
    torch.save(found, folder / f"{ranks.rank}.pt")


def run_until_stopped(ranks: Ranks, folder: Path) -> None:
    """Until the second rank, and it alone, is told to stop, in the third step of GRPO."""
    original, calls = trainer.grpo_gradients, []

    def interrupt(*args: Any) -> Any:
        calls.append(args)
        if ranks.rank == 1 and len(calls) == 3 * RUN.minibatches:
            os.kill(os.getpid(), signal.SIGINT)
        return original(*args)

    trainer.grpo_gradients = interrupt  # type: ignore[assignment]
    try:
        train(RUN, folder)
    except RunStopped:
        return
    raise AssertionError("the run was not stopped")


def refuse(ranks: Ranks, folder: Path) -> None:
    for changes, message in (
        ({"prompts": 6, "minibatches": 2}, "prompts: got 6, want a multiple of minibatches = 2, on each of 2 ranks"),
        ({"scale_rewards": "batch"}, "scale_rewards: got 'batch' with several ranks"),
    ):
        with pytest.raises(ValueError, match=message):
            train(Settings(**{**vars(RUN), **changes}), folder / "refused")
        assert not (folder / "refused").exists()


# ------------------------------------------------------------------------------------------------------------------


def test_ranks_take_the_step_of_one_process(tmp_path: Path) -> None:
    on_ranks(write_updates, tmp_path)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(RANKS))
    before = {n: p.detach() for n, p in load_policy("tiny", device="cpu", seed=3).model.named_parameters()}
    for loss_type in LOSS_TYPES:
        alone = update(ALONE, loss_type)
        for name, value in alone["metrics"].items():
            assert first[loss_type]["metrics"][name] == pytest.approx(value, rel=1e-3, abs=1e-6), (loss_type, name)
        for name in alone["model"]:
            assert torch.equal(first[loss_type]["model"][name], second[loss_type]["model"][name])
            step, steps = (after[name] - before[name] for after in (alone["model"], first[loss_type]["model"]))
            torch.testing.assert_close(steps, step, rtol=1e-3, atol=1e-3 * step.abs().max().item() + 1e-9)
    policy = load_policy("tiny", device="cpu", seed=3)
    supervised_loss(policy, worked(load_task("chain_sum").problems("train", 0, 7))).backward()
    for name, parameter in policy.model.named_parameters():
        torch.testing.assert_close(first["supervised"][name], parameter.grad, rtol=1e-4, atol=1e-6)


def test_a_run_stops_on_all_ranks_and_goes_on_with_one(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    on_ranks(run_until_stopped, folder)
    state = json.loads((folder / "checkpoint" / "state.json").read_text())
    assert (state["phase"], state["done"]) == ("grpo", 3)
    summary = train(RUN, folder, resume=True)
    assert summary["ranks"] == 1
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]
    assert all(row["num_tokens"] <= 8 * 2 * 12 for row in rows[1:])
    assert all(row["num_tokens"] > 8 * 2 for row in rows[1:])  # those of both ranks


def test_what_ranks_cannot_share_is_refused(tmp_path: Path) -> None:
    on_ranks(refuse, tmp_path)


def test_shares_cover_everything_in_order() -> None:
    for count in (1, 2, 3, 5):
        shares = [Ranks(rank, count).share(range(7)) for rank in range(count)]
        assert [x for share in shares for x in share] == list(range(7))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1

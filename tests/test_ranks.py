"""Training under torchrun: ranks, the model whole or sharded, make the run of one process; others go on with it."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import time
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.multiprocessing as mp
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

from grpo_fast.train import checkpoint, trainer
from grpo_fast.train.model import Policy, character_tokenizer, load_policy
from grpo_fast.train.ranks import ALONE, Ranks
from grpo_fast.train.recorder import read_metrics
from grpo_fast.train.rollout import Rollout, sample
from grpo_fast.train.settings import Settings
from grpo_fast.train.sharding import whole
from grpo_fast.train.supervised import supervised_loss, worked
from grpo_fast.train.tasks import load_task
from grpo_fast.train.trainer import RunStopped, train
from grpo_fast.train.update import advantages_over_ranks, grpo_gradients, optimizer_step, reference_logps

LOSS_TYPES = ("grpo", "dr_grpo", "dapo", "luspo", "cispo")


#: 12 completions a step, of which 2 ranks have 6 each and 4 have 3: groups of 4 that span ranks.
RUN = Settings(
    reward="conftest:digits",
    cold_start_steps=2,
    cold_start_batch=7,  # shares of 3 and 4
    cold_start_check=2,
    cold_start_until=2.0,
    steps=4,
    prompts=3,
    minibatches=1,
    num_iterations=2,
    micro_prompts=1,
    group_size=4,
    scale_rewards="batch",
    max_new_tokens=8,
    eval_every=2,
    eval_problems=3,
    eval_samples=2,
    test_problems=3,
    save_every=2,
    device="cpu",
)


# What a rank does: modules' functions, which another process can import ------------------------------------------


def as_rank(rank: int, environment: dict[str, str], work: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    os.environ.update(environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
    torch.set_num_threads(1)
    ranks = Ranks.join()
    trainer.sample = sample_alike(ranks)
    try:
        work(ranks, *arguments)
    finally:
        ranks.leave()


def on_ranks(count: int, work: Callable[..., None], *arguments: Any, gpus: bool = False) -> None:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(torch.cuda.device_count()))))
    environment = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    environment["CUDA_VISIBLE_DEVICES"] = visible if gpus else ""
    # A server without threads imports what ranks need once, and forks them. Some imports ask for GPUs, as torchao's
    # does: if the server had any, ranks could not have them.
    multiprocessing.set_forkserver_preload(["grpo_fast.train.trainer", "torch.utils.tensorboard"])
    with patch.dict(os.environ, CUDA_VISIBLE_DEVICES=""):
        mp.start_processes(as_rank, (environment, work, arguments), nprocs=count, start_method="forkserver")


def sample_alike(ranks: Ranks) -> Callable[..., Rollout]:
    """A ``sample`` that draws the same batch on any number of ranks, of which each takes its part."""

    def sample_all(policy: Policy, prompts: list[list[int]], *, group_size: int, **options: Any) -> Rollout:
        own = [prompt for prompt in prompts for _ in range(group_size)]
        everyones = ranks.gather(own)
        seed = sum(sum(map(sum, part)) for part in everyones)
        options["generator"] = torch.Generator(policy.device).manual_seed(seed)
        batch = sample(policy, [prompt for part in everyones for prompt in part], group_size=1, **options)
        begin = sum(map(len, everyones[: ranks.rank]))
        return batch.part(slice(begin, begin + len(own)))

    return sample_all


def batch_of(policy: Policy) -> tuple[Rollout, torch.Tensor]:
    """Six groups of four, of different lengths; one completion cannot be scored."""
    problems = load_task("basic_arithmetic").problems("train", 0, 6)
    batch = sample(
        policy,
        [policy.prompt(p) for p in problems],
        group_size=4,
        max_new_tokens=16,
        temperature=2.0,
        generator=torch.Generator().manual_seed(0),
    )
    rewards = torch.randn(24, generator=torch.Generator().manual_seed(0))
    rewards[5] = torch.nan
    return batch, rewards


def new_policy(tied: bool = False) -> Policy:
    policy = load_policy("tiny", device="cpu", seed=3)
    if tied:
        policy.model.lm_head.weight = policy.model.model.embed_tokens.weight
    return policy


def update(ranks: Ranks, loss_type: str, tied: bool, shard: bool = False) -> dict[str, Any]:
    """Metrics of an update on this rank's share, and the model after it."""
    policy = new_policy(tied)
    batch, rewards = batch_of(policy)
    settings = Settings(
        prompts=6,
        minibatches=1,
        micro_prompts=1,
        group_size=4,
        loss_type=loss_type,
        scale_rewards="batch" if loss_type == "dapo" else "group",
        max_grad_norm=1e9,
        lr=1.0,
    )
    if shard:
        policy.shard()
    mine = ranks.share(range(24))
    rows = slice(mine[0], mine[-1] + 1)
    ref_logps = reference_logps(policy, batch.part(rows), settings) - 0.1
    optimizer = torch.optim.SGD(policy.model.parameters(), lr=1.0)
    advantages = advantages_over_ranks(rewards[rows], settings, ranks)
    metrics = grpo_gradients(policy, batch.part(rows), advantages, ref_logps, settings, ranks)
    metrics["grad_norm"] = optimizer_step(policy, optimizer, settings.max_grad_norm)
    return {"metrics": metrics, "model": {n: p.detach() for n, p in policy.whole().model.named_parameters()}}


def write_updates(ranks: Ranks, folder: Path, loss_types: tuple[str, ...], tied: bool, shard: bool) -> None:
    found = {loss_type: update(ranks, loss_type, tied, shard) for loss_type in loss_types}
    policy = new_policy()
    if shard:
        policy.shard()
        assert all(isinstance(p, DTensor) for p in policy.model.parameters())
    problems = load_task("chain_sum").problems("train", 0, 7)
    supervised_loss(policy, worked(ranks.share(problems)), ranks).backward()
    ranks.sum_gradients(policy.model.parameters())
    found["supervised"] = {n: whole(p.grad) for n, p in policy.model.named_parameters() if p.grad is not None}
    torch.save(found, folder / f"{ranks.rank}.pt")


def sample_unlike(ranks: Ranks) -> None:
    """Ranks that sample from a sharded model for as long as each likes draw from the model as it is."""
    policy, prompts = new_policy(), [[10, 11, 12]]
    options: dict[str, Any] = {"group_size": 3, "max_new_tokens": 2 + 5 * ranks.rank, "temperature": 1.0}
    want = sample(policy, prompts, **options, generator=torch.Generator().manual_seed(ranks.rank))
    policy.shard()
    copy = policy.whole()
    got = sample(copy, prompts, **options, generator=torch.Generator().manual_seed(ranks.rank))
    assert torch.equal(got.completion_ids, want.completion_ids)
    assert torch.equal(got.logps, want.logps)
    left = weakref.ref(copy.model)
    del copy
    assert left() is None  # and with it the memory of the weights


def run(ranks: Ranks, folder: Path, device: str, shard: bool, model: str = "tiny") -> None:
    train(replace(RUN, device=device, shard=shard, model=model), folder)


def resume(ranks: Ranks, folder: Path) -> None:
    train(replace(RUN, shard=True), folder, resume=True)


def run_until_stopped(ranks: Ranks, folder: Path) -> None:
    """Until the second rank, and it alone, is told to stop, in the third step of GRPO."""
    original, calls = trainer.grpo_gradients, []

    def interrupt(*args: Any) -> Any:
        calls.append(args)
        if ranks.rank == 1 and len(calls) == 3 * RUN.num_iterations:
            os.kill(os.getpid(), signal.SIGINT)
        return original(*args)

    trainer.grpo_gradients = interrupt  # type: ignore[assignment]
    try:
        train(RUN, folder)
    except RunStopped:
        return
    raise AssertionError("the run was not stopped")


def run_until_killed(ranks: Ranks, folder: Path) -> None:
    """Until the first rank dies while it writes the checkpoint of the last step."""
    original = checkpoint.write_json

    def die(path: Path, value: Any) -> None:
        if path.name == "state.json" and value["done"] == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        original(path, value)

    checkpoint.write_json = die
    try:
        train(replace(RUN, shard=True), folder)
    except RuntimeError:
        time.sleep(5)  # the other finds the first gone: whose end it was is to be known before
        raise


def refuse(ranks: Ranks, folder: Path) -> None:
    for changes, message in (
        (
            {"prompts": 3, "group_size": 3},
            "prompts: got 3, or 9 completions in each of minibatches = 1",
        ),
        ({"cold_start_batch": 1}, "cold_start_batch: got 1, want one trace at least on each of 2 ranks"),
    ):
        with pytest.raises(ValueError, match=message):
            train(replace(RUN, **changes), folder / "refused")
        assert not (folder / "refused").exists()


# ------------------------------------------------------------------------------------------------------------------


def pretrained(folder: Path) -> str:
    """A model with a tied head that the loop does not know, and on a GPU computes in bfloat16."""
    tokenizer = character_tokenizer()
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # as large as pretrained ones: at 0, they would be Adam's steps and nothing else
            torch.nn.init.normal_(parameter, std=config.initializer_range)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process."""
    folder = tmp_path_factory.mktemp("runs") / "alone"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "sample", sample_alike(ALONE))
        train(RUN, folder)
    return folder


def assert_same_run(folder: Path, alone: Path, near: float = 1e-4) -> None:
    """Metrics and weights of two runs; each weight as a whole, for Adam makes a step of what is rounding alone."""
    want, got = (read_metrics(f / "metrics.jsonl") for f in (alone, folder))
    assert [row["step"] for row in got] == [row["step"] for row in want] == [0, 1, 2, 3, 4]
    for row, other in zip(got, want, strict=True):
        assert row.keys() == other.keys()
        for name, value in other.items():
            if name != "step_time":
                assert row[name] == pytest.approx(value, rel=10 * near, abs=near / 10), (name, row["step"])
    assert any(row.get("loss", 0.0) != 0.0 for row in want)
    for name in ("cold_start", "model"):
        weights, others = (load_file(f / name / "model.safetensors") for f in (folder, alone))
        assert weights.keys() == others.keys()
        for key, w in others.items():
            assert (weights[key] - w).norm() <= near * w.norm(), key
    AutoModelForCausalLM.from_pretrained(folder / "model")


@pytest.mark.parametrize(
    ("count", "loss_types", "tied", "shard"),
    [(2, LOSS_TYPES, False, False), (2, LOSS_TYPES, False, True), (4, ("dapo",), True, True)],
)
def test_ranks_take_the_step_of_one_process(
    tmp_path: Path, count: int, loss_types: tuple[str, ...], tied: bool, shard: bool
) -> None:
    on_ranks(count, write_updates, tmp_path, loss_types, tied, shard)
    each = [torch.load(tmp_path / f"{rank}.pt") for rank in range(count)]
    before = dict(new_policy(tied).model.named_parameters())
    for loss_type in loss_types:
        alone = update(ALONE, loss_type, tied)
        for name, value in alone["metrics"].items():
            assert each[0][loss_type]["metrics"][name] == pytest.approx(value, rel=1e-3, abs=1e-6), (loss_type, name)
        for name in alone["model"]:
            assert all(torch.equal(each[0][loss_type]["model"][name], one[loss_type]["model"][name]) for one in each)
            step, steps = (
                after[name] - before[name].detach() for after in (alone["model"], each[0][loss_type]["model"])
            )
            torch.testing.assert_close(steps, step, rtol=1e-3, atol=1e-3 * step.abs().max().item() + 1e-9)
    policy = new_policy()
    supervised_loss(policy, worked(load_task("chain_sum").problems("train", 0, 7))).backward()
    for name, parameter in policy.model.named_parameters():
        torch.testing.assert_close(each[0]["supervised"][name], parameter.grad, rtol=1e-4, atol=1e-6)


def test_ranks_sample_at_their_own_pace() -> None:
    on_ranks(2, sample_unlike)


@pytest.mark.parametrize(("count", "shard"), [(2, False), (2, True), (4, True)])
def test_ranks_make_the_run_of_one_process(tmp_path: Path, alone: Path, count: int, shard: bool) -> None:
    on_ranks(count, run, tmp_path / "run", "cpu", shard)
    assert_same_run(tmp_path / "run", alone)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two NVIDIA GPUs")
@pytest.mark.parametrize("near", [1e-4, 1e-3], ids=["float32", "autocast"])
def test_two_gpus_make_the_same_run_whole_and_sharded(tmp_path: Path, near: float) -> None:
    model = "tiny" if near == 1e-4 else pretrained(tmp_path / "pretrained")
    for shard in (False, True):
        on_ranks(2, run, tmp_path / str(shard), "cuda", shard, model, gpus=True)
    assert_same_run(tmp_path / "True", tmp_path / "False", near)


def test_a_run_stops_on_all_ranks_and_goes_on_with_one(
    tmp_path: Path, alone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    on_ranks(2, run_until_stopped, folder)
    state = json.loads((folder / "checkpoint" / "state.json").read_text())
    assert (state["phase"], state["done"]) == ("grpo", 3)
    monkeypatch.setattr(trainer, "sample", sample_alike(ALONE))
    assert train(RUN, folder, resume=True)["ranks"] == 1
    assert_same_run(folder, alone)


def test_a_sharded_run_that_is_killed_while_it_saves_goes_on_alone(
    tmp_path: Path, alone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    with pytest.raises(mp.ProcessExitedException):
        on_ranks(2, run_until_killed, folder)
    assert json.loads((folder / "checkpoint" / "state.json").read_text())["done"] == 2
    monkeypatch.setattr(trainer, "sample", sample_alike(ALONE))
    train(replace(RUN, shard=True), folder, resume=True)
    assert_same_run(folder, alone)


def test_a_run_of_one_process_goes_on_sharded(tmp_path: Path, alone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, original = tmp_path / "run", trainer.reference_logps

    def interrupt(*args: Any) -> torch.Tensor:
        os.kill(os.getpid(), signal.SIGINT)
        return original(*args)

    monkeypatch.setattr(trainer, "sample", sample_alike(ALONE))
    monkeypatch.setattr(trainer, "reference_logps", interrupt)
    with pytest.raises(RunStopped):
        train(RUN, folder)
    on_ranks(2, resume, folder)
    assert_same_run(folder, alone)


def test_what_ranks_cannot_share_is_refused(tmp_path: Path) -> None:
    on_ranks(2, refuse, tmp_path)


def test_shares_cover_everything_in_order() -> None:
    for count in (1, 2, 3, 5):
        shares = [Ranks(rank, count).share(range(7)) for rank in range(count)]
        assert [x for share in shares for x in share] == list(range(7))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1

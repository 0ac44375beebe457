"""The loop: policy and sampling, the update's arithmetic, runs that stop and go on, settings."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("reasoning_gym")

from grpo_fast import group_advantages, linear_selective_log_softmax
from grpo_fast.train import checkpoint, trainer, update
from grpo_fast.train.model import Policy, load_policy
from grpo_fast.train.ranks import ALONE
from grpo_fast.train.recorder import batch_metrics, read_metrics
from grpo_fast.train.rewards import RewardBatch
from grpo_fast.train.rollout import Rollout, sample
from grpo_fast.train.settings import PRESETS, Settings, load_settings
from grpo_fast.train.supervised import supervised_loss, worked
from grpo_fast.train.tasks import TASKS, completion_text, load_task
from grpo_fast.train.trainer import RunStopped, train
from grpo_fast.train.update import grpo_gradients, optimizer_step, reference_logps

SMALL = Settings(
    reward="conftest:digits",
    cold_start_steps=4,
    cold_start_batch=8,
    cold_start_check=2,
    cold_start_until=2.0,
    steps=4,
    prompts=4,
    group_size=2,
    max_new_tokens=12,
    eval_every=2,
    eval_problems=4,
    eval_samples=2,
    test_problems=4,
    save_every=1,
    device="cpu",
)


@pytest.fixture(scope="module")
def policy() -> Policy:
    return load_policy("tiny", device="cpu", seed=3)


def draw(policy: Policy, temperature: float = 1.0, seed: int = 0, group_size: int = 3, length: int = 20) -> Rollout:
    problems = load_task("basic_arithmetic").problems("train", 0, 5)
    return sample(
        policy,
        [policy.prompt(p) for p in problems],
        group_size=group_size,
        max_new_tokens=length,
        temperature=temperature,
        generator=torch.Generator(policy.device).manual_seed(seed),
    )


def test_the_tiny_model_reads_and_writes_every_task(policy: Policy) -> None:
    assert 300_000 < sum(p.numel() for p in policy.model.parameters()) < 500_000
    for name in TASKS:
        for problem in load_task(name).problems("train", 0, 20):
            ids = policy.completion(completion_text(problem))
            assert policy.decode(torch.tensor(ids)) == completion_text(problem)
            assert policy.decode(torch.tensor(policy.prompt(problem))) == problem.compact
            assert ids[-1] == policy.eos_id
            assert policy.pad_id not in ids


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_sampling_log_probs_are_those_of_a_full_forward(policy: Policy, temperature: float) -> None:
    """Prompts of different lengths, so that padding on the left matters; the cache changes nothing."""
    batch = draw(policy, temperature)
    assert len(set(batch.prompt_mask.sum(1).tolist())) > 1
    logps = linear_selective_log_softmax(
        batch.hidden_states(policy),
        index=batch.completion_ids,
        mask=batch.completion_mask,
        temperature=temperature,
        **policy.head,
    )
    torch.testing.assert_close(logps, batch.logps, rtol=0, atol=2e-5)
    assert not batch.logps[~batch.completion_mask].any()


@pytest.mark.filterwarnings("error::FutureWarning")  # such as of a name that transformers gives up
def test_samples_end_with_the_end_token(policy: Policy) -> None:
    batch = draw(policy, temperature=3.0)
    lengths = batch.completion_mask.sum(1)
    for ids, mask, length, truncated in zip(
        batch.completion_ids, batch.completion_mask, lengths, batch.truncated, strict=True
    ):
        assert mask[:length].all()
        assert not mask[length:].any()
        assert (ids[:length] == policy.eos_id).nonzero().flatten().tolist() == ([] if truncated else [length - 1])
    assert batch.truncated.any()
    assert not batch.truncated.all()


def test_sampling_is_repeatable_and_greedy_is_greedy(policy: Policy) -> None:
    assert torch.equal(draw(policy, seed=1).completion_ids, draw(policy, seed=1).completion_ids)
    assert not torch.equal(draw(policy, seed=1).completion_ids, draw(policy, seed=2).completion_ids)
    greedy = draw(policy, temperature=0.0)
    assert torch.equal(greedy.completion_ids[0::3], greedy.completion_ids[1::3])


def test_a_completion_does_not_depend_on_when_others_end(policy: Policy) -> None:
    """Each token is the winner of the race over noise for all rows, though rows that have ended are dropped."""
    batch = draw(policy, temperature=3.0, length=80)
    rows, length = batch.completion_ids.shape
    assert batch.completion_mask[:, length // 2].float().mean() < 0.75  # some are dropped on the way
    log_p = policy.log_probs(batch.hidden_states(policy).flatten(0, 1), 3.0).view(rows, length, -1)
    generator = torch.Generator().manual_seed(0)
    for position in range(length):
        noise = torch.empty_like(log_p[:, position]).exponential_(generator=generator)
        token = (log_p[:, position].exp() / noise).argmax(-1).where(batch.completion_mask[:, position], policy.pad_id)
        assert torch.equal(token, batch.completion_ids[:, position])


def test_a_prompt_of_nothing_is_refused(policy: Policy) -> None:
    with pytest.raises(ValueError, match=r"prompts: got no tokens in prompt 1, want one at least in each"):
        sample(policy, [[5], []], group_size=2, max_new_tokens=3, temperature=1.0, generator=None)


def test_sampling_follows_the_distribution(policy: Policy) -> None:
    """First tokens of many samples against the model's probabilities (chi-squared-like bound)."""
    batch = draw(policy, group_size=2000)
    prompt = batch.prompt_ids[:1], batch.prompt_mask[:1]
    hidden = policy.forward(*prompt, use_cache=False).last_hidden_state[:, -1]
    p = policy.log_probs(hidden, 1.0).exp()[0]
    counts = torch.bincount(batch.completion_ids[:2000, 0], minlength=p.numel())
    assert ((counts - 2000 * p) ** 2 / (2000 * p)).sum() < 2 * p.numel()


def test_a_head_in_bfloat16_is_one_in_sampling_and_in_the_loss() -> None:
    """Both round, but for a hidden state halfway; the gradient of the weights, in float32, passes through."""
    p = load_policy("tiny", device="cpu", seed=3, lm_head_dtype="bfloat16")
    exact = load_policy("tiny", device="cpu", seed=3)
    batch = draw(p)
    settings = replace(SMALL, group_size=3)
    off = [(reference_logps(own, batch, settings) - batch.logps).abs().mean() for own in (p, exact)]
    assert off[0] < 2e-6 < 1e-4 < off[1]
    grpo_gradients(p, batch, torch.ones(15), batch.logps, settings)
    assert p.model.lm_head.weight.grad.dtype == torch.float32
    assert p.model.lm_head.weight.grad.norm() > 0


@pytest.mark.parametrize("tolerance", [0.0, 3e-3])
def test_the_tolerance_of_the_gradient_reaches_the_loss(
    tolerance: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in takes what the kernels on a GPU would, and the reference path does the rest."""
    calls, real = [], update.linear_grpo_loss

    def stand_in(hidden: torch.Tensor, *, weight: torch.Tensor, sparse_grad_tol: float | None, **options: Any) -> Any:
        calls.append((tuple(hidden.shape[:2]), hidden.dtype, weight.dtype, sparse_grad_tol))
        return real(hidden, weight=weight, **options)

    monkeypatch.setattr(update, "linear_grpo_loss", stand_in)
    train(replace(SMALL, steps=1, lm_head_dtype="bfloat16", sparse_grad_tol=tolerance), tmp_path / "run")
    assert {call[1:] for call in calls} == {(torch.bfloat16, torch.bfloat16, tolerance or None)}
    assert (calls[0][0] == (1, 1)) == (tolerance > 0)  # asked before anything is sampled
    assert len(calls) == SMALL.minibatches + (tolerance > 0)


@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU"
)
def test_a_sparse_gradient_of_the_loop_is_nearly_the_dense_one() -> None:
    """And not it, so that the kernels were at work."""
    p = load_policy("tiny", device="cuda", seed=3, lm_head_dtype="bfloat16")
    with torch.no_grad():
        p.model.lm_head.weight.mul_(8.0)
    batch, advantages = draw(p), torch.linspace(-1.0, 1.0, 15, device="cuda")
    found = []
    for tolerance in (0.0, 0.03):
        settings = replace(SMALL, group_size=3, lm_head_dtype="bfloat16", sparse_grad_tol=tolerance, beta=0.0)
        update.check_sparse_grad_tol(p, settings)
        p.model.zero_grad()
        grpo_gradients(p, batch, advantages, None, settings)
        found.append([x.grad.clone() for x in (p.model.lm_head.weight, p.model.model.layers[0].mlp.up_proj.weight)])
    for dense, sparse in zip(*found, strict=True):
        assert 0 < (sparse - dense).norm() < 0.2 * dense.norm()


def test_supervised_loss_is_the_mean_over_completion_tokens(policy: Policy) -> None:
    problems = load_task("chain_sum").problems("train", 0, 6)
    total, count = 0.0, 0
    for problem in problems:
        prompt, completion = policy.prompt(problem), policy.completion(completion_text(problem))
        logits = policy.model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
        total += torch.nn.functional.cross_entropy(logits, torch.tensor(completion), reduction="sum").item()
        count += len(completion)
    assert supervised_loss(policy, worked(problems)).item() == pytest.approx(total / count, rel=1e-5)


class Recording:
    """An optimizer that keeps the gradients it was given."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model

    def step(self) -> None:
        self.grads = [p.grad.clone() for p in self.model.parameters() if p.grad is not None]

    def zero_grad(self) -> None:
        self.model.zero_grad()


@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo"])
def test_accumulated_gradients_are_those_of_the_whole_batch(policy: Policy, loss_type: str) -> None:
    batch = draw(policy, group_size=4)
    advantages = group_advantages(torch.randn(20, generator=torch.Generator().manual_seed(0)), group_size=4)
    options: dict[str, Any] = {
        "group_size": 4,
        "prompts": 5,
        "minibatches": 1,
        "loss_type": loss_type,
        "max_grad_norm": 1e9,
    }
    ref_logps = reference_logps(policy, batch, Settings(**options, micro_prompts=2)) - 0.1
    grads, losses = [], []
    for micro_prompts in (5, 2):
        optimizer = Recording(policy.model)
        settings = Settings(**options, micro_prompts=micro_prompts)
        losses.append(grpo_gradients(policy, batch, advantages, ref_logps, settings))
        losses[-1]["grad_norm"] = optimizer_step(policy, optimizer, 1e9)  # type: ignore[arg-type]
        grads.append(optimizer.grads)
    assert max(g.abs().max() for g in grads[0]) > 1e-4
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-4, atol=1e-6)
    assert losses[1].keys() == losses[0].keys()
    for name, value in losses[0].items():
        # Advantages cancel in the loss, which is far smaller than what is summed.
        assert losses[1][name] == pytest.approx(value, rel=1e-4, abs=1e-6), name


def test_a_row_counts_the_groups_that_teach_nothing(policy: Policy) -> None:
    rewards = torch.tensor([1.0] * 3 + [0.0] + [1.0] * 16)
    advantages = group_advantages(rewards, group_size=4)
    scores = RewardBatch(rewards, {"digits": rewards})
    row = batch_metrics(draw(policy, group_size=4), scores, advantages, 4, ALONE)
    assert row["frac_reward_zero_std"] == pytest.approx(4 / 5)
    assert row["reward"] == row["rewards/digits/mean"] == pytest.approx(19 / 20)


def test_an_update_raises_what_was_rewarded(policy: Policy) -> None:
    policy = load_policy("tiny", device="cpu", seed=5)
    batch = draw(policy, group_size=4)
    rewards = torch.tensor([1.0, 0.0, 0.0, 0.0]).repeat(5)
    settings = Settings(group_size=4, prompts=5, minibatches=1, beta=0.0)
    optimizer = torch.optim.SGD(policy.model.parameters(), lr=0.05)
    grpo_gradients(policy, batch, group_advantages(rewards, group_size=4), None, settings)
    optimizer_step(policy, optimizer, 1.0)
    change = (reference_logps(policy, batch, settings) - batch.logps).sum(1)
    assert change[rewards == 1].mean() > 0.01
    assert change[rewards == 1].mean() > change[rewards == 0].mean() + 0.01


# Runs --------------------------------------------------------------------------------------------------------

TIMES = ("step_time", "time/")


def rows(folder: Path) -> list[dict[str, Any]]:
    return [
        {k: v for k, v in row.items() if not k.startswith(TIMES)} for row in read_metrics(folder / "metrics.jsonl")
    ]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("runs") / "whole"
    return folder, train(SMALL, folder, command="begun so")


def test_a_run_leaves_what_it_promises(whole: tuple[Path, dict[str, Any]]) -> None:
    folder, summary = whole
    assert [row["step"] for row in rows(folder)] == [0, 1, 2, 3, 4]
    assert all("eval/pass@1" in row for row in rows(folder)[::2])
    assert {"reward", "rewards/accuracy/mean", "kl", "entropy", "clip_ratio/region_mean"} <= rows(folder)[1].keys()
    assert summary == json.loads((folder / "summary.json").read_text())
    assert any((folder / "tensorboard").iterdir())
    assert rows(folder)[2]["kl"] != 0  # the second batch is off the reference
    again = load_policy(str(folder / "model"), device="cpu")
    problem = load_task("chain_sum").problem("train", 0)
    assert again.prompt(problem) == load_policy("tiny", device="cpu").prompt(problem)
    files = {f.suffix for f in folder.rglob("*") if f.is_file() and "tensorboard" not in f.parts}
    assert files <= {".json", ".jsonl", ".safetensors"}  # nothing that could run when it is loaded


@pytest.mark.parametrize(("phase", "step"), [("cold_start", 2), ("cold_start", 3), ("grpo", 1), ("grpo", 3)])
@pytest.mark.parametrize("how", ["signal", "crash"])
def test_a_resumed_run_is_the_same_run(
    whole: tuple[Path, dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    phase: str,
    step: int,
    how: str,
) -> None:
    """Stopped by Ctrl-C after a whole step, or torn down in the middle of one, and resumed: the same numbers."""
    folder, summary = whole
    seen = {"calls": 0}
    original = trainer.supervised_loss if phase == "cold_start" else trainer.grpo_gradients
    calls_a_step = 1 if phase == "cold_start" else SMALL.minibatches

    def interrupt(*args: Any) -> Any:
        seen["calls"] += 1
        if seen["calls"] == (step - 1) * calls_a_step + calls_a_step:
            if how == "crash":
                raise OSError("power cut")
            os.kill(os.getpid(), signal.SIGINT)
        return original(*args)

    monkeypatch.setattr(trainer, original.__name__, interrupt)
    with pytest.raises(OSError if how == "crash" else RunStopped):
        train(SMALL, tmp_path / "run", command="begun so")
    monkeypatch.undo()
    resumed = train(SMALL, tmp_path / "run", resume=True, command="resumed so")
    assert rows(tmp_path / "run") == rows(folder)
    for key in ("before", "after"):
        assert resumed[key] == summary[key]
    if how == "signal":
        assert resumed["command"] == summary["command"]
    final = [checkpoint.load_file(f / "model" / "model.safetensors") for f in (tmp_path / "run", folder)]
    assert all(torch.equal(final[0][name], final[1][name]) for name in final[1])


def test_a_signal_in_the_last_step_of_the_cold_start_is_heard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = replace(SMALL, cold_start_until=0.0, steps=1)  # ended by the first look, after step 2
    train(settings, tmp_path / "whole")
    original = trainer.accuracy_reward

    def interrupt(*args: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        return original(*args)

    monkeypatch.setattr(trainer, "accuracy_reward", interrupt)
    with pytest.raises(RunStopped):
        train(settings, tmp_path / "run")
    monkeypatch.undo()
    state = checkpoint.read_state(tmp_path / "run" / "checkpoint")
    assert (state["phase"], state["done"]) == ("grpo", 0)
    train(settings, tmp_path / "run", resume=True)
    assert rows(tmp_path / "run") == rows(tmp_path / "whole")


def test_a_folder_with_a_run_is_not_overwritten(whole: tuple[Path, dict[str, Any]]) -> None:
    with pytest.raises(ValueError, match="holds a run already"):
        train(SMALL, whole[0])


def test_without_a_reference_model_there_is_no_kl(tmp_path: Path) -> None:
    settings = Settings(**{**vars(SMALL), "beta": 0.0, "steps": 1, "cold_start_steps": 0, "eval_every": 0})
    train(settings, tmp_path / "run")
    assert "kl" not in rows(tmp_path / "run")[0]


@pytest.mark.parametrize("moment", ["weights", "state", "between the renames"])
def test_a_crash_while_saving_keeps_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    checkpoint.save_checkpoint(tmp_path, model, optimizer, {"done": 1})
    want = model.weight.detach().clone()
    with torch.no_grad():
        model.weight.add_(1.0)

    def crash(*_: Any) -> None:
        raise OSError("power cut")

    if moment == "between the renames":
        real, calls = Path.rename, []

        def rename(self: Path, target: Path) -> Path:
            calls.append(target)
            if len(calls) == 2:
                raise OSError("power cut")
            return real(self, target)

        monkeypatch.setattr(Path, "rename", rename)
    else:
        monkeypatch.setattr(checkpoint, "save_file" if moment == "weights" else "write_json", crash)
    with pytest.raises(OSError, match="power cut"):
        checkpoint.save_checkpoint(tmp_path, model, optimizer, {"done": 2})
    monkeypatch.undo()

    found = checkpoint.find_checkpoint(tmp_path)
    assert found is not None
    assert checkpoint.read_state(found) == {"done": 1}
    fresh = torch.nn.Linear(3, 2)
    other = torch.optim.AdamW(fresh.parameters())
    checkpoint.restore(found, fresh, other)
    assert torch.equal(fresh.weight, want)
    moments = [optimizer.state[p]["exp_avg"] for p in model.parameters()]
    assert all(torch.equal(a, other.state[p]["exp_avg"]) for a, p in zip(moments, fresh.parameters(), strict=True))
    checkpoint.save_checkpoint(tmp_path, model, optimizer, {"done": 3})  # and saving works again
    assert sorted(f.name for f in tmp_path.iterdir()) == ["checkpoint"]


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    checkpoint.save_checkpoint(tmp_path, model, optimizer, {})
    other = torch.nn.Linear(4, 2)
    with pytest.raises(ValueError, match="holds the weights of another model"):
        checkpoint.restore(tmp_path / "checkpoint", other, torch.optim.AdamW(other.parameters()))


# Settings ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.toml", 'task = "gcd"\nsteps = 7\nlr = 1\n'),
        ("a.yaml", "task: gcd\nsteps: 7\nlr: 1\n"),
        ("a.json", '{"task": "gcd", "steps": 7, "lr": 1}'),
    ],
)
def test_settings_from_a_file_and_flags(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    settings = load_settings({"steps": 9}, tmp_path / name)
    assert (settings.task, settings.steps, settings.lr) == ("gcd", 9, 1.0)


def test_a_preset_gives_way_to_what_is_said() -> None:
    assert load_settings({"model": "smollm2-135m"}).cold_start_steps == PRESETS["smollm2-135m"]["cold_start_steps"]
    assert load_settings({"model": "smollm2-135m", "cold_start_steps": 5}).cold_start_steps == 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "chess"}, "task: got 'chess', want one of chain_sum"),
        ({"stepz": 3}, "stepz: no such setting"),
        ({"steps": 0}, "steps: got 0, want at least 1"),
        ({"steps": "many"}, "steps: got 'many', want an int"),
        ({"group_size": 1}, "group_size: got 1"),
        ({"temperature": 0.0}, "temperature: got 0.0"),
        ({"loss_type": "ppo"}, "loss_type: got 'ppo'"),
        ({"device": "tpu"}, "device: got 'tpu'"),
        ({"minibatches": 5}, "minibatches: got 5, want a divisor of prompts = 32"),
        ({"task_options": "[1]"}, "task_options: got"),
        ({"task_options": "{"}, "task_options: got '{', want a JSON object"),
        ({"overlong_buffer": 999}, "overlong_buffer: got 999"),
        ({"lr": -1.0}, "lr: got -1.0"),
        ({"language_weight": -1.0}, "language_weight: got -1.0"),
        ({"language": "klingon"}, "language: got 'klingon'"),
        ({"lm_head_dtype": "float16"}, "lm_head_dtype: got 'float16', want float32 or bfloat16"),
        ({"sparse_grad_tol": 1e-3}, "sparse_grad_tol: got 0.001 with lm_head_dtype = 'float32', want bfloat16"),
        ({"sparse_grad_tol": -1.0}, "sparse_grad_tol: got -1.0, want at least 0"),
        ({"rollout": "sglang"}, "rollout: got 'sglang', want model or vllm"),
        ({"rollout": "vllm"}, "vllm_server: got '', want an address"),
        ({"rollout": "vllm", "vllm_server": "localhost:8000"}, "vllm_server: got 'localhost:8000', want an address"),
        ({"vllm_server": "http://localhost:8000"}, "vllm_server: got .*, want none"),
        ({"vllm_importance_sampling_clip_max": 0.5}, "vllm_importance_sampling_clip_max: got 0.5, want at least 1"),
    ],
)
def test_bad_settings(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_settings(options)


def test_a_bad_file(tmp_path: Path) -> None:
    for name, text, message in (
        ("a.ini", "", "want a file ending in"),
        ("a.toml", "steps = ", "does not parse"),
        ("a.yaml", "!!python/object/apply:os.system ['true']", "does not parse"),
        ("a.yaml", "- 1", "got list"),
        ("none.toml", None, "cannot read"),
    ):
        if text is not None:
            (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match=message):
            load_settings({}, tmp_path / name)


def test_the_reference_model_does_not_learn(tmp_path: Path, whole: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = whole
    start = checkpoint.load_file(folder / "cold_start" / "model.safetensors")
    end = checkpoint.load_file(folder / "model" / "model.safetensors")
    assert start.keys() == end.keys()
    assert any(not torch.equal(start[name], end[name]) for name in start)


def test_the_example_of_a_run_is_one() -> None:
    file = Path(__file__).parents[1] / "examples" / "smollm2.toml"
    settings = load_settings({"model": "some/folder"}, file)
    # Whatever the preset of the model says is said by the file, which also serves a copy of the model elsewhere.
    given = load_settings({}, file)
    assert replace(settings, model=given.model) == given

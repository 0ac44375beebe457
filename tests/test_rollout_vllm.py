"""Sampling by a vLLM server, against a stand-in that answers by the interface of TRL's client."""

from __future__ import annotations

import copy
import importlib.util
import itertools
import json
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

pytest.importorskip("reasoning_gym")

from grpo_fast.train import rollout_vllm, trainer
from grpo_fast.train.model import Policy, load_policy
from grpo_fast.train.ranks import ALONE
from grpo_fast.train.recorder import METRICS_FILE, read_metrics
from grpo_fast.train.rollout import Rollout, sample
from grpo_fast.train.rollout_vllm import FileClient, VLLMSampler, connect, truncated_ratio
from grpo_fast.train.settings import Settings
from grpo_fast.train.tasks import load_task
from grpo_fast.train.trainer import train
from grpo_fast.train.update import grpo_gradients, reference_logps


class StandIn:
    """A server with a model of its own, as far from the policy's as ``noise`` moves its log-probs."""

    def __init__(self, noise: float = 0.0, unknown: bool = False) -> None:
        self.model: Any = None
        self.noise, self.unknown = noise, unknown
        self.calls: list[str] = []
        self.answers: list[dict[str, Any]] = []

    def update_model_params(self, model: Any) -> None:
        self.calls.append("weights")
        self.model = copy.deepcopy(model)

    def reset_prefix_cache(self) -> None:
        self.calls.append("cache")

    def generate(
        self,
        prompts: list[list[int]],
        *,
        n: int,
        max_tokens: int,
        temperature: float,
        logprobs: int,
        generation_kwargs: dict[str, Any],
    ) -> dict[str, Any]:
        self.calls.append("generate")
        policy = load_policy("tiny", device="cpu")
        assert logprobs == 0
        assert generation_kwargs == {"stop_token_ids": [policy.eos_id], "ignore_eos": True}
        policy.model = self.model
        generator = torch.Generator().manual_seed(len(self.answers))
        drawn = sample(
            policy,
            prompts,
            group_size=n,
            max_new_tokens=max_tokens,
            temperature=temperature,
            generator=generator,
        )
        noisy = drawn.logps + self.noise * torch.randn(drawn.logps.shape, generator=generator)
        rows = [*zip(drawn.completion_ids, noisy, drawn.completion_mask, strict=True)]
        answer: dict[str, Any] = {
            "completion_ids": [ids[kept].tolist() for ids, _, kept in rows],
            "logprobs": [[[x] for x in logps[kept].tolist()] for _, logps, kept in rows],
        }
        if self.unknown:
            answer["logprobs"][0][0] = [None]
        self.answers.append(answer)
        return answer


@pytest.fixture
def policy() -> Policy:
    return load_policy("tiny", device="cpu", seed=3)


SETTINGS = Settings(
    rollout="vllm", vllm_server="http://localhost:8000", temperature=0.8, prompts=4, group_size=3, max_new_tokens=20
)
OPTIONS: dict[str, Any] = {"group_size": 3, "max_new_tokens": 20, "temperature": 0.8}


def prompts(policy: Policy) -> list[list[int]]:
    return [policy.prompt(p) for p in load_task("basic_arithmetic").problems("train", 0, 4)]


def test_an_answer_arrives_as_a_rollout(policy: Policy) -> None:
    server = StandIn(noise=0.3)
    with torch.no_grad():  # likelier ends, so that lengths differ
        policy.model.lm_head.weight[policy.eos_id] += 0.3 * policy.model.lm_head.weight.norm(dim=1).mean()
    got = VLLMSampler(server, SETTINGS).sample(policy, prompts(policy), **OPTIONS)
    generator = torch.Generator().manual_seed(0)
    wanted = sample(policy, prompts(policy), generator=generator, **OPTIONS)
    for name in ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "texts", "truncated"):
        mine, other = getattr(got, name), getattr(wanted, name)
        assert torch.equal(mine, other) if isinstance(mine, torch.Tensor) else mine == other, name
    assert got.completion_mask.sum(1).unique().numel() > 1
    assert 0 < got.truncated.sum() < got.truncated.numel()
    torch.testing.assert_close(got.logps, wanted.logps, rtol=0, atol=2e-5)  # the policy's own, not the server's


def test_an_end_in_the_last_place_is_an_end(policy: Policy) -> None:
    with torch.no_grad():
        policy.model.lm_head.weight[policy.eos_id] += 0.3 * policy.model.lm_head.weight.norm(dim=1).mean()
    options = {**OPTIONS, "group_size": 8, "max_new_tokens": 1}
    got = VLLMSampler(StandIn(), SETTINGS).sample(policy, prompts(policy), **options)
    assert torch.equal(got.truncated, got.completion_ids[:, 0] != policy.eos_id)
    assert 0 < got.truncated.sum() < got.truncated.numel()


def test_the_ratio_is_between_the_policy_and_the_server_and_truncated(policy: Policy) -> None:
    server = StandIn(noise=1.0)
    settings = replace(SETTINGS, vllm_importance_sampling_clip_max=1.5)
    got = VLLMSampler(server, settings).sample(policy, prompts(policy), **OPTIONS)
    ratio = got.importance_sampling_ratio
    assert ratio is not None
    assert ratio.shape == got.completion_ids.shape
    for row, told in enumerate(server.answers[0]["logprobs"]):
        sampling = torch.tensor([x for (x,) in told])
        wanted = (got.logps[row, : len(told)] - sampling).exp()
        torch.testing.assert_close(ratio[row, : len(told)], wanted.clamp(max=1.5), rtol=1e-5, atol=0)
        assert ratio[row, len(told) :].eq(1).all()
    assert ratio.max() == 1.5


def test_a_log_prob_the_server_cannot_give_is_no_correction(policy: Policy) -> None:
    got = VLLMSampler(StandIn(unknown=True, noise=0.5), SETTINGS).sample(policy, prompts(policy), **OPTIONS)
    assert got.importance_sampling_ratio is not None
    assert got.importance_sampling_ratio[0, 0] == 1
    assert got.importance_sampling_ratio.isfinite().all()


def test_the_correction_is_that_of_trl(policy: Policy) -> None:
    """``token_truncate``, as the trainer of TRL writes it."""
    own, told = torch.randn(2, 5), torch.randn(2, 5)
    told[0, 1] = float("nan")
    wanted = torch.clamp(torch.exp(torch.nan_to_num(own - told, nan=0.0)), min=None, max=2.0)
    assert torch.equal(truncated_ratio(own, told, 2.0), wanted)


def gradients(policy: Policy, batch: Any, settings: Settings) -> torch.Tensor:
    policy.model.zero_grad()
    advantages = torch.arange(batch.logps.size(0)).remainder(5).float() - 2
    grpo_gradients(policy, batch, advantages, reference_logps(policy, batch, settings), settings)
    return torch.cat([p.grad.flatten().clone() for p in policy.model.parameters()])


def test_the_loss_is_weighted_by_the_ratio(policy: Policy) -> None:
    """Not at all where the server has the trainer's log-probs; by half where all ratios are a half."""
    batch = VLLMSampler(StandIn(), SETTINGS).sample(policy, prompts(policy), **OPTIONS)
    plain = gradients(policy, replace(batch, importance_sampling_ratio=None), SETTINGS)
    same = gradients(policy, batch, SETTINGS)
    torch.testing.assert_close(same, plain, rtol=1e-4, atol=1e-6)
    settings = replace(SETTINGS, beta=0.0)
    half = replace(batch, importance_sampling_ratio=torch.full_like(batch.logps, 0.5))
    whole = gradients(policy, replace(batch, importance_sampling_ratio=None), settings)
    torch.testing.assert_close(gradients(policy, half, settings), whole / 2)


def test_a_slice_takes_its_rows_of_the_ratio(policy: Policy) -> None:
    batch = VLLMSampler(StandIn(noise=1.0), SETTINGS).sample(policy, prompts(policy), **OPTIONS)
    settings = replace(SETTINGS, micro_prompts=1)
    torch.testing.assert_close(gradients(policy, batch, settings), gradients(policy, batch, SETTINGS))


@pytest.mark.parametrize("what", ["completions", "logps"])
def test_an_answer_of_another_size_is_refused(policy: Policy, what: str) -> None:
    class Wrong(StandIn):
        def generate(self, *args: Any, **options: Any) -> dict[str, Any]:
            answer = super().generate(*args, **options)
            if what == "completions":
                return {name: rows[:-1] for name, rows in answer.items()}
            return {**answer, "logprobs": [row[:-1] for row in answer["logprobs"]]}

    with pytest.raises(ValueError, match=r"vllm_server: got 1[12] completions .* want 12"):
        VLLMSampler(Wrong(), SETTINGS).sample(policy, prompts(policy), **OPTIONS)


RUN = replace(
    SETTINGS,
    temperature=1.0,
    reward="conftest:digits",
    cold_start_steps=2,
    cold_start_batch=8,
    cold_start_check=2,
    cold_start_until=2.0,
    steps=3,
    group_size=2,
    max_new_tokens=12,
    eval_every=0,
    eval_samples=2,
    test_problems=4,
    save_every=10,
    lr=1e-3,
    device="cpu",
)


def run(server: StandIn, settings: Settings, folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, float]]:
    monkeypatch.setattr(trainer, "connect", lambda *_, **__: server)
    train(settings, folder)
    return read_metrics(folder / METRICS_FILE)


def test_a_run_sends_its_weights_before_every_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And learns from what comes back as a run does that samples the same completions by itself."""
    server = StandIn()
    sent: list[torch.Tensor] = []
    monkeypatch.setattr(
        StandIn,
        "update_model_params",
        lambda self, model: (
            sent.append(model.lm_head.weight.detach().clone()),
            self.calls.append("weights"),
            setattr(self, "model", copy.deepcopy(model)),
        ),
    )
    rows = run(server, RUN, tmp_path / "vllm", monkeypatch)
    assert server.calls == ["weights", "cache", "generate"] * (1 + RUN.steps)  # one look in the cold start
    # The first batch of GRPO comes from the weights of that look; each later one from updated ones.
    assert [torch.equal(a, b) for a, b in itertools.pairwise(sent)] == [True, False, False]
    assert max(row["sampling/logp_difference"] for row in rows) < 1e-4

    seeds = itertools.count()  # as the stand-in's

    def replay(policy: Policy, prompts: list[list[int]], **options: Any) -> Rollout:
        return sample(policy, prompts, **{**options, "generator": torch.Generator().manual_seed(next(seeds))})

    monkeypatch.setattr(trainer, "sample", replay)
    plain = replace(RUN, rollout="model", vllm_server="")
    train(plain, tmp_path / "plain")
    for mine, other in zip(rows, read_metrics(tmp_path / "plain" / METRICS_FILE), strict=True):
        for name in ("reward", "loss", "kl", "entropy", "grad_norm"):
            assert mine[name] == pytest.approx(other[name], rel=2e-3, abs=1e-5), name


def test_a_noisy_server_is_seen_in_the_metrics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = run(StandIn(noise=0.1), RUN, tmp_path / "run", monkeypatch)
    assert all(0.05 < row["sampling/logp_difference"] < 0.12 for row in rows)  # mean of |0.1 z| is 0.08


def test_only_the_first_rank_sends_weights(policy: Policy) -> None:
    waited: list[int] = []

    def ranks(first: bool) -> Any:
        return SimpleNamespace(first=first, wait=lambda: waited.append(len(server.calls)))

    server = StandIn()
    server.model = policy.model
    VLLMSampler(server, SETTINGS, ranks(first=False)).sample(policy, prompts(policy), **OPTIONS)
    assert server.calls == ["generate"]
    VLLMSampler(server, SETTINGS, ranks(first=True)).sample(policy, prompts(policy), **OPTIONS)
    assert server.calls[1:] == ["weights", "cache", "generate"]
    assert waited == [0, 3]  # after the weights, before the completions
    assert ALONE.first


def on(device: str, *, tied: bool = False) -> Any:
    """What ``connect`` looks at of a policy."""
    model = SimpleNamespace(config=SimpleNamespace(tie_word_embeddings=tied))
    return SimpleNamespace(device=torch.device(device), model=model)


def info(mode: str = "processed_logprobs", device: str = "cpu") -> dict[str, Any]:
    """What is looked at of what a server tells of itself."""
    return {"model_config": {"logprobs_mode": mode}, "device_config": {"device": device}}


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"needs trl and vllm: pip install 'grpo_fast\[train,vllm\]'"):
        connect("http://localhost:8000", on("cuda"))


@pytest.fixture
def trl_client(monkeypatch: pytest.MonkeyPatch) -> type:
    """TRL's own client, on a machine without vLLM."""
    module = pytest.importorskip("trl.generation.vllm_client")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(module, "is_vllm_available", lambda *_, **__: True)
    client: type = module.VLLMClient
    return client


def test_a_server_that_is_not_there(trl_client: type) -> None:
    with pytest.raises(ValueError, match=r"vllm_server: cannot reach http://127.0.0.1:9; want one started by"):
        connect("http://127.0.0.1:9", on("cuda"))


@pytest.mark.parametrize("mode", ["raw_logprobs", "processed_logprobs"])
def test_log_probs_have_to_be_those_of_the_distribution_sampled_from(
    trl_client: type, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    opened: list[torch.device] = []
    monkeypatch.setattr(trl_client, "__init__", lambda self, base_url: None)
    monkeypatch.setattr(trl_client, "get_server_info", lambda self: info(mode))
    monkeypatch.setattr(trl_client, "init_communicator", lambda self, device: opened.append(device))
    if mode == "raw_logprobs":
        with pytest.raises(ValueError, match=r"logprobs mode 'raw_logprobs'; want .*processed_logprobs"):
            connect("http://localhost:8000", on("cuda"))
    else:
        for device, first in (("cuda", True), ("cuda", False), ("cpu", True)):
            connect("http://localhost:8000", on(device), sends_weights=first)
        assert opened == [torch.device("cuda")]


def test_a_head_that_would_stay_old_is_refused(trl_client: type, monkeypatch: pytest.MonkeyPatch) -> None:
    server = "http://localhost:8000"
    monkeypatch.setattr(trl_client, "__init__", lambda self, base_url: None)
    monkeypatch.setattr(trl_client, "generate", None)
    monkeypatch.setattr(trl_client, "get_server_info", lambda self: info(device="cpu"))
    with pytest.raises(ValueError, match=r"model: got one with tied embeddings, .* want an untied one"):
        connect(server, on("cpu", tied=True))
    monkeypatch.setattr(trl_client, "get_server_info", lambda self: info(device="cuda"))
    connect(server, on("cpu", tied=True))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_trls_client_and_the_sampler_over_http(
    policy: Policy, trl_client: type, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    """With a server that answers as vLLM does: what it is asked for, and that all arrives in its place."""
    engine, asked, files = StandIn(noise=0.2), [], []
    told = {"/health": {}, "/v1/models": {"data": [{"id": "tiny"}]}, "/server_info": {"vllm_config": info()}}

    class Handler(BaseHTTPRequestHandler):
        def answer(self, body: Any) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps(body).encode())

        def do_GET(self) -> None:
            self.answer(told[self.path.partition("?")[0]])

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if self.path == "/collective_rpc":
                assert body["method"] == "reload_weights"
                files.append(body["kwargs"]["weights_path"])
                engine.update_model_params(LlamaForCausalLM.from_pretrained(files[-1]))
                self.answer({"results": [None]})
                return
            asked.append(body)
            options = {name: body[name] for name in ("n", "max_tokens", "temperature", "logprobs")}
            stop = {name: body[name] for name in ("stop_token_ids", "ignore_eos")}
            drawn = engine.generate(body["prompt"], generation_kwargs=stop, **options)
            choices = []
            for row, (ids, logps) in enumerate(zip(drawn["completion_ids"], drawn["logprobs"], strict=True)):
                tokens = [f"token_id:{i}" for i in ids]
                values = [value for (value,) in logps]
                tops = [{token: value} for token, value in zip(tokens, values, strict=True)]
                logprobs = {"tokens": tokens, "token_logprobs": values, "top_logprobs": tops}
                prompt = body["prompt"][row // body["n"]]
                choices.append({"prompt_token_ids": prompt, "token_ids": ids, "logprobs": logprobs})
            self.answer({"choices": choices})

        def log_message(self, *_: Any) -> None:
            pass

    if device == "cuda":
        monkeypatch.setattr(trl_client, "init_communicator", lambda self, device: None)
        monkeypatch.setattr(trl_client, "update_model_params", lambda self, model: engine.update_model_params(model))
    monkeypatch.setattr(trl_client, "reset_prefix_cache", lambda self: engine.reset_prefix_cache())
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        client = connect(f"http://127.0.0.1:{server.server_port}", on(device))
        got = VLLMSampler(client, SETTINGS).sample(policy, prompts(policy), **OPTIONS)
        server.shutdown()
    assert [(body["model"], body["top_p"], body["top_k"], body["min_p"]) for body in asked] == [("tiny", 1.0, 0, 0.0)]
    assert engine.calls == ["weights", "cache", "generate"]
    assert [Path(file).exists() for file in files] == ([False] if device == "cpu" else [])
    wanted = VLLMSampler(StandIn(noise=0.2), SETTINGS).sample(policy, prompts(policy), **OPTIONS)
    assert got.texts == wanted.texts
    for name in ("completion_ids", "completion_mask", "logps", "importance_sampling_ratio", "truncated"):
        torch.testing.assert_close(getattr(got, name), getattr(wanted, name))


def test_weights_the_server_cannot_load(policy: Policy) -> None:
    requests = pytest.importorskip("requests")

    class Refuses(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.send_error(400)

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Refuses) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        client = SimpleNamespace(session=requests, base_url=address, generate=None, reset_prefix_cache=None)
        with pytest.raises(ValueError, match=rf"vllm_server: {address} cannot load weights from .*sees this folder"):
            FileClient(client).update_model_params(policy.model)
        server.shutdown()


def test_the_stand_in_is_called_as_the_real_client_takes_it(trl_client: type) -> None:
    """So that a stand-in that drifts from TRL is seen."""
    import inspect

    taken = inspect.signature(trl_client.generate).parameters  # type: ignore[attr-defined]
    assert {"prompts", "n", "max_tokens", "temperature", "logprobs", "generation_kwargs"} <= set(taken)
    assert [*inspect.signature(trl_client.update_model_params).parameters] == ["self", "model"]  # type: ignore[attr-defined]
    assert [*inspect.signature(trl_client.init_communicator).parameters] == ["self", "device"]  # type: ignore[attr-defined]
    assert rollout_vllm.SERVE.endswith("processed_logprobs")

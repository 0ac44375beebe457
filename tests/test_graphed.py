"""Decoding by CUDA graphs says what the plain loop says. On a CPU a graph is its step, run as it is."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from grpo_fast.train import graphed, rollout
from grpo_fast.train.graphed import GraphedDecoder, can_be_graphed, next_token
from grpo_fast.train.model import Policy, load_policy
from grpo_fast.train.rollout import Rollout, sample

PROMPTS = ["12+7=", "3+4+5+61=", "9="]

MakePolicy = Callable[..., Policy]


@pytest.fixture(params=["cpu", "cuda"])
def policy(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> MakePolicy:
    """Makes one that ends its completions now and then, and decodes by graphs."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
    if request.param == "cpu":

        def capture(decoder: GraphedDecoder, policy: Policy, steps: int) -> Any:
            own, its = weakref.proxy(decoder), weakref.proxy(policy)  # a graph holds neither

            def replay() -> None:
                own._cache.end = min(own.width + steps, own._mask.size(-1))
                GraphedDecoder._step(own, its)

            return SimpleNamespace(replay=replay)

        monkeypatch.setattr(GraphedDecoder, "_capture", capture)
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
        monkeypatch.setattr(rollout, "can_be_graphed", lambda *_: True)

    def make(seed: int = 0, autocast: bool = False) -> Policy:
        made = load_policy("tiny", device=request.param, seed=seed)
        made.autocast = autocast
        with torch.no_grad():
            made.model.lm_head.weight.mul_(8.0)
        return made

    return make


def draw(p: Policy, temperature: float = 1.0, group_size: int = 5, seed: int = 1) -> Rollout:
    return sample(
        p,
        [p.completion(text)[:-1] for text in PROMPTS],
        group_size=group_size,
        max_new_tokens=40,
        temperature=temperature,
        generator=torch.Generator(p.device).manual_seed(seed),
    )


def test_the_race_draws_from_the_distribution() -> None:
    p = torch.tensor([0.5, 0.25, 0.2, 0.05, 0.0])
    noise = torch.empty(200_000, 5).exponential_(generator=torch.Generator().manual_seed(0))
    found = next_token(p.log().expand_as(noise), noise).bincount(minlength=5) / len(noise)
    torch.testing.assert_close(found, p, atol=5e-3, rtol=0.0)
    assert found[4] == 0


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_as_the_plain_loop(policy: MakePolicy, temperature: float, monkeypatch: pytest.MonkeyPatch) -> None:
    p = policy()
    graphed = draw(p, temperature)
    monkeypatch.setattr(rollout, "can_be_graphed", lambda *_: False)
    plain = draw(p, temperature)
    assert graphed.texts == plain.texts
    assert torch.equal(graphed.completion_ids, plain.completion_ids)
    assert torch.equal(graphed.completion_mask, plain.completion_mask)
    assert torch.equal(graphed.truncated, plain.truncated)
    torch.testing.assert_close(graphed.logps, plain.logps, atol=1e-4, rtol=1e-4)
    if temperature:
        assert 0 < graphed.completion_mask.float().mean() < 1


def test_the_head_takes_what_autocast_leaves(policy: MakePolicy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hidden states in float32, as the loss does; seen at the first tokens, whose states the prompts' pass made."""
    p = policy(autocast=True)
    graphed = draw(p)
    monkeypatch.setattr(rollout, "can_be_graphed", lambda *_: False)
    plain = draw(p)
    assert torch.equal(graphed.completion_ids[:, 0], plain.completion_ids[:, 0])
    torch.testing.assert_close(graphed.logps[:, 0], plain.logps[:, 0], atol=1e-5, rtol=1e-5)


def test_log_probs_are_those_of_the_whole_sequence(policy: MakePolicy) -> None:
    p = policy()
    found = draw(p)
    log_p = p.log_probs(found.hidden_states(p).flatten(0, 1), 1.0).view(*found.completion_ids.shape, -1)
    expected = log_p.gather(-1, found.completion_ids[..., None]).squeeze(-1) * found.completion_mask
    torch.testing.assert_close(found.logps, expected, atol=1e-4, rtol=1e-4)


def test_a_graph_follows_the_weights(policy: MakePolicy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Changed in place they are read anew; in another place they make another graph."""
    p = policy()
    before = draw(p)
    assert draw(p).texts == before.texts
    other = policy(seed=1)
    with torch.no_grad():
        for x, y in zip(p.model.parameters(), other.model.parameters(), strict=True):
            x.copy_(y)
    assert draw(p).texts == draw(other).texts != before.texts
    p.model.lm_head.weight = torch.nn.Parameter(policy().model.lm_head.weight.detach().clone())
    after = draw(p)
    monkeypatch.setattr(rollout, "can_be_graphed", lambda *_: False)
    assert after.texts == draw(p).texts


def test_a_few_graphs_are_kept_and_go_with_their_model(policy: MakePolicy) -> None:
    p = policy()
    for group_size in range(1, 7):
        draw(p, group_size=group_size)
    held = [weakref.ref(decoder) for decoder in graphed._DECODERS[p.model].values()]
    assert len(held) == 4
    del p
    gc.collect()
    assert not any(decoder() for decoder in held)


def test_copies_leave_no_memory_behind(policy: MakePolicy) -> None:
    """A sharded run samples from a copy of its model in every step, and captures graphs for it."""
    p = policy()
    if p.device.type == "cpu":
        pytest.skip("counts a GPU's memory")

    def after_a_copy() -> int:
        other = copy.copy(p)
        other.model = copy.deepcopy(p.model)
        draw(other)
        del other
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        return torch.cuda.memory_reserved()

    first = after_a_copy()
    assert max(after_a_copy() for _ in range(3)) <= first


def test_what_cannot_be_captured_is_decoded_plainly() -> None:
    def asked(kind: str = "cuda", layer: type = DynamicLayer, attention: str = "sdpa", compiles: bool = True) -> bool:
        config = SimpleNamespace(_attn_implementation=attention)
        model = SimpleNamespace(config=config, _can_compile_fullgraph=compiles)
        policy: Any = SimpleNamespace(device=torch.device(kind), model=model)
        cache: Any = SimpleNamespace(layers=[DynamicLayer(), layer.__new__(layer)])
        return can_be_graphed(policy, cache)

    assert asked()
    assert not asked(kind="cpu")
    assert not asked(layer=DynamicSlidingWindowLayer)
    assert not asked(attention="eager")
    assert not asked(compiles=False)  # such as a mixture of experts that asks the host where tokens go

"""Decoding by CUDA graphs says what the plain loop says."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

from grpo_fast.train import rollout
from grpo_fast.train.graphed import next_token
from grpo_fast.train.model import Policy, load_policy
from grpo_fast.train.rollout import Rollout, sample

on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")

PROMPTS = ["12+7=", "3+4+5+61=", "9="]


def policy(seed: int = 0) -> Policy:
    """One that ends its completions now and then."""
    made = load_policy("tiny", seed=seed)
    with torch.no_grad():
        made.model.lm_head.weight.mul_(8.0)
    return made


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
    found = next_token(p.log().expand_as(noise), 1.0, noise).bincount(minlength=5) / len(noise)
    torch.testing.assert_close(found, p, atol=5e-3, rtol=0.0)
    assert found[4] == 0


@on_a_gpu
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_as_the_plain_loop(temperature: float, monkeypatch: pytest.MonkeyPatch) -> None:
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


@on_a_gpu
def test_log_probs_are_those_of_the_whole_sequence() -> None:
    p = policy()
    found = draw(p)
    log_p = p.log_probs(found.hidden_states(p).flatten(0, 1), 1.0).view(*found.completion_ids.shape, -1)
    expected = log_p.gather(-1, found.completion_ids[..., None]).squeeze(-1) * found.completion_mask
    torch.testing.assert_close(found.logps, expected, atol=1e-4, rtol=1e-4)


@on_a_gpu
def test_a_graph_follows_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
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

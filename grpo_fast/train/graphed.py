"""Decoding on a GPU: a step, from hidden states to the next ones, is one CUDA graph over tensors that stay in place.

A step of a small model is hundreds of kernels of a few microseconds each, which take longer to launch than to run.
"""

from __future__ import annotations

import functools
import weakref
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from grpo_fast.train.model import Policy

#: Prompts are padded to multiples of this, so that one graph serves many batches.
_WIDTH = 32
#: Graphs kept of a model; each holds the keys and values of a batch.
_KEPT = 4
#: Steps between two looks at whether all completions have ended, for which the host waits.
_LOOK = 16
#: A graph reads all slots up to its end, filled or not; so there are so many of them at most, each for some steps.
_GRAPHS = 8


def next_token(log_p: Tensor, noise: Tensor | None) -> Tensor:
    """Token ids (B,) drawn from log-probs (B, V) with exponential noise (B, V), or without noise the likeliest.

    The index of the largest p / noise is distributed as p (the exponential race that ``torch.multinomial`` runs).
    """
    return log_p.argmax(-1) if noise is None else (log_p.exp() / noise).argmax(-1)


class _Slots(Cache):
    """Keys and values of all positions; a new one goes to the slot that a tensor names, before ``end``."""

    def __init__(self, keys: list[Tensor], values: list[Tensor], slot: Tensor) -> None:
        super().__init__(layers=[])
        self.keys, self.values, self.slot, self.end = keys, values, slot, 0

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Put those (B, heads, 1, dim) of a layer into the slot; returns its keys and values up to the end."""
        held = (x[layer_idx][:, :, : self.end] for x in (self.keys, self.values))
        keys, values = (
            x.index_copy_(2, self.slot, new.to(x.dtype))
            for x, new in zip(held, (key_states, value_states), strict=True)
        )
        return keys, values

    def get_seq_length(self, *_: Any, **__: Any) -> int:
        """What models ask for to number positions, which they are given here."""
        return 0


class GraphedDecoder:
    """The steps of one batch size, prompt width and length, captured on first use.

    Args:
        policy: The model. It is not kept, but its weights must stay where they are.
        cache: Keys and values of prompts, one for each group, as ``transformers`` leaves them.
        rows: Completions (B).
        width: Tokens that a prompt has room for (P).
        length: Tokens that a completion has room for (T).
        temperature: As in ``sample``.
    """

    def __init__(self, policy: Policy, cache: Cache, rows: int, width: int, length: int, temperature: float) -> None:
        device, total = policy.device, width + length
        head = policy.head["weight"]
        self.width, self.length, self.temperature, self._pad = width, length, temperature, policy.pad_id
        self.ids = torch.empty(rows, length, dtype=torch.int64, device=device)
        self.logps = torch.empty(rows, length, device=device)
        self.kept = torch.empty(rows, length, dtype=torch.bool, device=device)
        self.alive = torch.empty(rows, dtype=torch.bool, device=device)
        self._hidden = torch.empty(rows, head.size(1), device=device)  # float32, as autocast leaves them
        self._noise = torch.ones(rows, head.size(0), device=device) if temperature > 0 else None
        self._mask = torch.empty(rows, 1, 1, total, dtype=torch.bool, device=device)
        self._positions = torch.empty(rows, 1, dtype=torch.int64, device=device)
        self._slot = torch.empty(1, dtype=torch.int64, device=device)

        def room(x: Tensor) -> Tensor:
            dtype = torch.bfloat16 if policy.autocast else x.dtype  # as attention takes them
            return x.new_zeros(rows, x.size(1), total, x.size(3), dtype=dtype)

        self._cache = _Slots([room(x.keys) for x in cache.layers], [room(x.values) for x in cache.layers], self._slot)
        self._addresses = _addresses(policy)
        self._pool = torch.cuda.graph_pool_handle()
        self._steps = max(_LOOK, -(-length // _GRAPHS))  # of a graph
        self._graphs = [self._capture(policy, last) for last in range(self._steps, length + self._steps, self._steps)]

    def fits(self, policy: Policy) -> bool:
        """Whether the weights are where they were."""
        return self._addresses == _addresses(policy)

    def begin(self, cache: Cache, hidden: Tensor, mask: Tensor) -> None:
        """Take the prompts of a batch: keys and values (B / G, heads, p, dim), hidden states (B, H), mask (B, p)."""
        prompt = slice(self.width - mask.size(1), self.width)
        for held, new in ((self._cache.keys, "keys"), (self._cache.values, "values")):
            for to, layer in zip(held, cache.layers, strict=True):
                x = getattr(layer, new)
                to[:, :, prompt].unflatten(0, (x.size(0), -1)).copy_(x[:, None])
        self._mask.zero_()
        self._mask[:, 0, 0, prompt] = mask
        self._positions.copy_(mask.sum(1, keepdim=True))
        self._slot.fill_(self.width)
        self._hidden.copy_(hidden)
        self.ids.fill_(self._pad)
        self.logps.zero_()
        self.kept.zero_()
        self.alive.fill_(True)

    def run(self, generator: torch.Generator | None) -> int:
        """All steps until every completion has ended; returns how many tokens the longest one has."""
        for step in range(self.length):
            if self._noise is not None:
                self._noise.exponential_(generator=generator)
            self._graphs[step // self._steps].replay()
            if step % _LOOK == _LOOK - 1 and not self.alive.any():
                break
        return int(self.kept.any(0).sum())

    def _step(self, policy: Policy) -> None:
        """Choose a token of each row, and read it."""
        log_p = policy.log_probs(self._hidden, self.temperature or 1.0)
        token = next_token(log_p, self._noise)
        at = self._slot - self.width
        logp = log_p.gather(-1, token[:, None])
        token = torch.where(self.alive, token, self._pad)
        self.ids.index_copy_(1, at, token[:, None])
        self.logps.index_copy_(1, at, torch.where(self.alive[:, None], logp, 0.0))
        self.kept.index_copy_(1, at, self.alive[:, None])
        self._mask.index_copy_(3, self._slot, self.alive[:, None, None, None])
        self.alive.logical_and_(token != policy.eos_id)
        with policy.precision():
            out = policy.model.base_model(
                input_ids=token[:, None],
                attention_mask=self._mask[..., : self._cache.end],
                position_ids=self._positions,
                use_cache=True,
                **{policy.cache_name: self._cache},
            )
        self._hidden.copy_(out.last_hidden_state[:, -1])
        self._slot.add_(1)
        self._positions.add_(1)

    def _capture(self, policy: Policy, steps: int) -> torch.cuda.CUDAGraph:
        """A step that is among the first ``steps``. What the warm-up leaves behind is overwritten by ``begin``."""
        for x in (self.ids, self._positions, self._hidden):
            x.zero_()
        self._mask.fill_(True)
        self.alive.fill_(True)
        self._cache.end = min(self.width + steps, self._mask.size(-1))
        side, graph = _side_stream(self.ids.device), torch.cuda.CUDAGraph()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self._slot.fill_(self.width)
            self._step(policy)
        torch.cuda.current_stream().wait_stream(side)
        with torch.cuda.graph(graph, pool=self._pool):
            self._step(policy)
        return graph


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """The same for every warm-up: cuBLAS keeps a workspace for each stream that it sees, 32 MiB on Hopper."""
    return torch.cuda.Stream(device)


_DECODERS: weakref.WeakKeyDictionary[Any, OrderedDict[Any, GraphedDecoder]] = weakref.WeakKeyDictionary()


def can_be_graphed(policy: Policy, cache: Cache) -> bool:
    """Whether a policy decodes so: on a GPU, with plain attention over all that came before, in every layer.

    And by a model that asks the host nothing on the way, which transformers says of those that compile as a whole.
    """
    if policy.device.type != "cuda" or not policy.model._can_compile_fullgraph:
        return False
    plain = all(type(layer) is DynamicLayer for layer in cache.layers)
    return plain and policy.model.config._attn_implementation == "sdpa"


def graphed_decoder(
    policy: Policy, cache: Cache, rows: int, prompt: int, length: int, temperature: float
) -> GraphedDecoder:
    """That of these sizes, made or found again; ``prompt`` is the tokens of the longest one."""
    width = -(-prompt // _WIDTH) * _WIDTH
    known = _DECODERS.setdefault(policy.model, OrderedDict())
    key = (rows, width, length, temperature)
    found = known.pop(key, None)
    if found is None or not found.fits(policy):
        found = None  # its memory is the next one's
        while len(known) >= _KEPT:
            known.popitem(last=False)
        found = GraphedDecoder(policy, cache, *key)
    known[key] = found
    return found


def _addresses(policy: Policy) -> list[int]:
    return [p.data_ptr() for p in policy.model.parameters()]

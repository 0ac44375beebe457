"""The policy: a transformers model with its tokenizer, and how it is asked a question."""

from __future__ import annotations

import copy
import inspect
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from grpo_fast.train import sharding
from grpo_fast.train.fetch import GGUF, model_folder
from grpo_fast.train.tasks import ALPHABET, Problem

T = TypeVar("T")

TAGS = ("<think>", "</think>", "<answer>", "</answer>")

_SYSTEM = "You are a helpful assistant. You think first, then answer."
_EXAMPLE = (
    "Think step by step between <think> and </think>, then give only the final answer between <answer> and </answer>."
)


class Policy:
    """A causal language model that answers problems.

    Attributes:
        model: The transformers model.
        tokenizer: Its tokenizer.
        device: Where it is.
        autocast: Compute in bfloat16 (weights stay float32): on a GPU, for pretrained models.
        lm_head_dtype: What hidden states and head are rounded to where logits are made of them, in losses and in
            sampling. The logits themselves are float32.
        cache_name: What the model calls its key-value cache, as an argument and in its output: ``"cache"`` from
            transformers 5.24 on, ``"past_key_values"`` before.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        compact: bool,
        device: torch.device,
        lm_head_dtype: torch.dtype = torch.float32,
    ) -> None:
        self.model = model.to(device)
        self.tokenizer = tokenizer
        self.device = device
        self.autocast = device.type == "cuda" and not compact
        self.lm_head_dtype = lm_head_dtype
        arguments = inspect.signature(model.base_model.forward).parameters
        self.cache_name = "cache" if "cache" in arguments else "past_key_values"
        self._compact = compact
        self.eos_id: int = tokenizer.eos_token_id
        self.pad_id: int = self.eos_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        config = model.config
        self.softcap: float | None = getattr(config, "final_logit_softcapping", None)
        divisor = getattr(config, "logits_scaling", None)  # Granite divides its logits, Cohere multiplies them
        self.logit_scale: float = getattr(config, "logit_scale", None) or (1.0 / divisor if divisor else 1.0)
        self._root: Any = None  # with the outline, of a sharded model
        self._outline: Any = None

    def shard(self) -> None:
        """Spread weights, gradients and what an optimizer made later keeps over all ranks, which call it together.

        Then passes that ranks make together run in ``inside``, and what each does by itself takes ``whole``.
        """
        self._outline = sharding.outline(self.model)
        self._root = sharding.shard(self.model, self.device.type)

    def inside(self, work: Callable[[], T]) -> T:
        """What ``work`` returns; while it runs, ``forward`` and ``head`` can be used though the model is sharded."""
        if self._root is None:
            return work()
        found: T = self._root(work)
        if not torch.is_grad_enabled():
            self._root.reshard()  # a backward would
        return found

    def whole(self) -> Policy:
        """The policy with all its weights on every rank: itself, or a copy if it is sharded. All ranks call it."""
        if self._root is None:
            return self
        found = copy.copy(self)
        found.model, found._root = sharding.whole_copy(self._outline, self.model), None
        return found

    def prompt(self, problem: Problem) -> list[int]:
        """The token ids that ask for an answer: the compact form, or a chat with the question."""
        if self._compact:
            return list(self.tokenizer(problem.compact, add_special_tokens=False)["input_ids"])
        question = f"{problem.question}\n\n{_EXAMPLE}"
        if self.tokenizer.chat_template is None:
            return list(self.tokenizer(f"{question}\n")["input_ids"])
        messages = [{"role": "system", "content": _SYSTEM}, {"role": "user", "content": question}]
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def completion(self, text: str) -> list[int]:
        """The token ids of an answer, with the end token."""
        return [*self.tokenizer(text, add_special_tokens=False)["input_ids"], self.eos_id]

    def decode(self, ids: Tensor) -> str:
        """The text of token ids (T,), tags included, without end and padding."""
        kept = [i for i in ids.tolist() if i not in (self.eos_id, self.pad_id)]
        return str(self.tokenizer.decode(kept, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def precision(self) -> torch.autocast:
        """The context that forward passes run in."""
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.autocast)

    def forward(self, input_ids: Tensor, mask: Tensor, **options: Any) -> Any:
        """The model without its head. ``input_ids`` (B, n) are the last n of the positions in ``mask`` (B, L)."""
        positions = (mask.long().cumsum(-1) - 1).clamp(min=0)[:, -input_ids.size(1) :]
        with self.precision():
            return self.model.base_model(
                input_ids=input_ids, attention_mask=mask.long(), position_ids=positions, **options
            )

    def hidden_states(self, input_ids: Tensor, mask: Tensor) -> Tensor:
        """(B, L, H) of sequences (B, L) from their beginning, as the linear ops take them beside ``head``."""
        states: Tensor = self.forward(input_ids, mask, use_cache=False).last_hidden_state
        return states.to(self.lm_head_dtype)

    @property
    def head(self) -> dict[str, Any]:
        """The arguments that the linear ops take for the head and its logits."""
        head = self.model.get_output_embeddings()
        weight, bias = head.weight.to(self.lm_head_dtype), getattr(head, "bias", None)
        return {"weight": weight, "bias": bias, "logit_scale": self.logit_scale, "softcap": self.softcap}

    def log_probs(self, hidden: Tensor, temperature: float) -> Tensor:
        """Log-probabilities (B, V) of the next token from hidden states (B, H), in float32 as in the loss."""
        head, hidden = self.head, hidden.to(self.lm_head_dtype)
        bias = None if head["bias"] is None else head["bias"].float()
        z = torch.nn.functional.linear(hidden.float(), head["weight"].float(), bias) * self.logit_scale
        if self.softcap is not None:
            z = self.softcap * torch.tanh(z / self.softcap)
        return torch.log_softmax(z / temperature, dim=-1)

    def save(self, folder: Path) -> None:
        """Write model (safetensors) and tokenizer so that transformers loads them."""
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)


#: Models that are made anew, by their hidden size: 0.4, 0.1, 6.4 and 1.6 M parameters.
MADE_ANEW: dict[str, int] = {"tiny": 128, "tiny-student": 64, "small": 512, "small-student": 256}


def load_policy(name: str, *, device: str = "auto", seed: int = 0, lm_head_dtype: str = "float32") -> Policy:
    """Load a model by name: one of ``MADE_ANEW``, ``"smollm2-135m"``, a folder, or a name on the hub.

    Tiny ones are made anew, their weights drawn from ``seed``. Weights are float32; only safetensors files are
    read, and no code that comes with a model runs.

    Raises:
        ValueError: No such model, a fetchable one that is not fetched yet, or a device that is not there.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: got 'cuda', but torch sees no GPU; want 'cpu' or 'auto'")
    where = torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")
    options: dict[str, Any] = dict(device=where, lm_head_dtype=getattr(torch, lm_head_dtype))
    if name in MADE_ANEW:
        torch.manual_seed(seed)
        tokenizer = character_tokenizer()
        return Policy(tiny_model(tokenizer, MADE_ANEW[name]), tokenizer, compact=True, **options)
    source = str(model_folder(name)) if name in GGUF else name
    if not Path(source).is_dir() and (name.startswith((".", "/", "~")) or name.count("/") != 1):
        raise ValueError(
            f"model: got {name!r}, want {', '.join([*MADE_ANEW, *GGUF])}, a folder, or a hub name 'owner/name'"
        )
    safe: dict[str, Any] = {"trust_remote_code": False}
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **safe)
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, use_safetensors=True, **safe)
    except OSError as error:
        raise ValueError(f"model: cannot load {name!r}: {str(error).splitlines()[0]}") from error
    compact = isinstance(model, LlamaForCausalLM) and TAGS[0] in tokenizer.get_vocab()
    return Policy(model, tokenizer, compact=compact, **options)


def character_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character of ``ALPHABET``, one a tag, an end and a padding token."""
    specials = ("<pad>", "<eos>", *TAGS)
    vocabulary = {token: i for i, token in enumerate((*specials, *ALPHABET))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", additional_special_tokens=list(TAGS)
    )


def tiny_model(tokenizer: PreTrainedTokenizerFast, hidden_size: int) -> LlamaForCausalLM:
    """A Llama-style decoder of two layers."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=hidden_size,
            intermediate_size=3 * hidden_size,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=1024,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            tie_word_embeddings=False,
        )
    )


def quiet_transformers() -> None:
    """Keep transformers' own progress bars and advice out of a run's output."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()

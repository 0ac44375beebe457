"""Rule rewards: functions of a batch of completions, and their weighted sum.

A reward function is called as ``f(completions, **columns)``, each column a list with one value a completion,
and returns one number a completion, or None where it does not apply. This is the contract of TRL's reward
functions.
"""

from __future__ import annotations

import importlib
import math
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

from grpo_fast.train.language import script_words
from grpo_fast.train.rollout import Rollout
from grpo_fast.train.settings import Settings
from grpo_fast.train.tasks import Problem, Task

RewardFunction: TypeAlias = Callable[..., list[float | None]]

_TAGS = ("<think>", "</think>", "<answer>", "</answer>")


def extract_answer(completion: str) -> str | None:
    """Return the stripped text of ``<answer>...</answer>``; None unless there is exactly one such block."""
    if completion.count("<answer>") != 1 or completion.count("</answer>") != 1:
        return None
    block = re.search(r"<answer>(.*)</answer>", completion, re.DOTALL)
    return block.group(1).strip() if block else None


def format_reward(completions: list[str], **_: Any) -> list[float | None]:
    """Reward 1.0 for a completion of the chain-of-thought form, 0.0 for any other.

    The form is ``<think>...</think><answer>...</answer>`` and nothing else: each tag once and in this order,
    with no more than whitespace around and between the blocks. Format reward of DeepSeek-R1
    (arXiv 2501.12948, section 2.2.2).
    """
    form = re.compile(r"<think>.*</think>\s*<answer>.*</answer>", re.DOTALL)
    return [
        float(all(text.count(tag) == 1 for tag in _TAGS) and form.fullmatch(text.strip()) is not None)
        for text in completions
    ]


def accuracy_reward(task: Task) -> RewardFunction:
    """Make the reward of a task: 1.0 where ``task.verify`` accepts the extracted answer, 0.0 elsewhere.

    It reads the column ``problem``, of ``tasks.Problem``. Accuracy reward of DeepSeek-R1 (arXiv 2501.12948,
    section 2.2.2).
    """

    def reward(completions: list[str], *, problem: list[Problem], **_: Any) -> list[float | None]:
        pairs = zip(completions, problem, strict=True)
        return [float(task.verify(extract_answer(text), one)) for text, one in pairs]

    return reward


def language_consistency_reward(language: Callable[[str], list[bool]]) -> RewardFunction:
    """Make the reward for a thought in one language: the share of its words that are of that language.

    The thought is the text of ``<think>...</think>``. The value is 0.0 unless there is exactly one such block with
    a word in it. Language consistency reward of DeepSeek-R1 (arXiv 2501.12948, section 2.3.2), which is added to
    the accuracy reward as it is.

    Args:
        language: What the words of a text are: True for each one of the language, False for another. For natural
            text ``script_words``, for the traces of a task ``Task.trace_words``.
    """

    def score(completion: str) -> float:
        if completion.count("<think>") != 1 or completion.count("</think>") != 1:
            return 0.0
        thought = re.search(r"<think>(.*)</think>", completion, re.DOTALL)
        words = language(thought.group(1)) if thought else []
        return sum(words) / len(words) if words else 0.0

    def reward(completions: list[str], **_: Any) -> list[float | None]:
        return [score(text) for text in completions]

    return reward


def math_accuracy_reward(completions: list[str], *, answer: list[str], **_: Any) -> list[float | None]:
    r"""Reward 1.0 where the extracted answer equals the gold one as mathematics (``1/2`` and ``\frac12``).

    It reads the column ``answer``: gold answers as LaTeX, with or without ``$``. The value is 0.0 where the
    two differ or ``extract_answer`` finds none, and None where math-verify cannot parse the gold answer.

    math-verify bounds its time by a signal, which only the main thread can have: on another thread, an
    answer that takes forever to evaluate (``9^{9^9}``) holds that thread forever.

    Raises:
        ImportError: Without the package math-verify.
    """
    try:
        from math_verify import parse, verify
    except ImportError as error:
        raise ImportError(
            "math_accuracy_reward needs the package math-verify: pip install 'grpo_fast[train]'"
        ) from error
    timeout = 5 if threading.current_thread() is threading.main_thread() else None

    def read(text: str) -> list[Any]:
        # Bare text is searched for its last number, which would read "12 or 13" as 13 and "x+1" as nothing.
        has_delimiter = any(mark in text for mark in ("$", r"\(", r"\[", r"\boxed"))
        latex = text if has_delimiter else f"${text}$"
        return list(parse(latex, fallback_mode="no_fallback", parsing_timeout=timeout))

    golds = {text: read(text) for text in set(answer)}

    def score(completion: str, gold: list[Any]) -> float | None:
        if not gold:
            return None
        extracted = extract_answer(completion)
        return float(extracted is not None and verify(gold, read(extracted), timeout_seconds=timeout))

    return [score(text, golds[gold]) for text, gold in zip(completions, answer, strict=True)]


def soft_overlong_reward(max_length: int, buffer: int) -> RewardFunction:
    """Make DAPO's soft overlong punishment (arXiv 2503.14476, section 3.4, eq. 13).

    With a length in tokens, from the column ``completion_ids``: 0 up to ``max_length - buffer``, then falling
    linearly to -1 at ``max_length``, and -1 beyond.

    Raises:
        ValueError: Unless ``0 < buffer <= max_length``.
    """
    if not 0 < buffer <= max_length:
        raise ValueError(f"buffer: got {buffer}, want 0 < buffer <= max_length = {max_length}")

    def reward(completions: list[str], *, completion_ids: list[list[int]], **_: Any) -> list[float | None]:
        return [min(0.0, max(-1.0, (max_length - buffer - len(ids)) / buffer)) for ids in completion_ids]

    return reward


def repetition_penalty_reward(ngram_size: int, max_penalty: float) -> RewardFunction:
    """Make a penalty on repeated n-grams of tokens (after arXiv 2502.03373).

    The value is ``max_penalty * (1 - distinct / total)``, counting the ``ngram_size``-grams of the token ids
    in the column ``completion_ids``; 0 for a completion with none.

    Raises:
        ValueError: Unless ``ngram_size >= 1`` and ``max_penalty <= 0``.
    """
    if ngram_size < 1:
        raise ValueError(f"ngram_size: got {ngram_size}, want 1 or more")
    if not max_penalty <= 0:
        raise ValueError(f"max_penalty: got {max_penalty}, want 0 or less")

    def penalty(ids: list[int]) -> float:
        ngrams = [tuple(ids[start : start + ngram_size]) for start in range(len(ids) - ngram_size + 1)]
        return max_penalty * (1 - len(set(ngrams)) / len(ngrams)) if ngrams else 0.0

    def reward(completions: list[str], *, completion_ids: list[list[int]], **_: Any) -> list[float | None]:
        return [penalty(ids) for ids in completion_ids]

    return reward


def load_reward(reward: str) -> RewardFunction:
    """Import a user's own reward function.

    Args:
        reward: Where it is, ``"package.module:function"``.

    Raises:
        ValueError: When the text has another form, or names no importable module or no callable in it.
    """
    module_name, _, name = reward.partition(":")
    if not module_name or not name:
        raise ValueError(f"reward: got {reward!r}, want 'package.module:function'")
    try:
        function = getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"reward: got {reward!r}, which cannot be imported: {error}") from error
    if not callable(function):
        kind = type(function).__name__
        raise ValueError(f"reward: got {reward!r}, a {kind}, want a function")
    found: RewardFunction = function
    return found


@dataclass(frozen=True)
class RewardBatch:
    """The rewards of B completions.

    Attributes:
        total: Weighted sum over the functions that apply, float32 (B,); NaN where none does.
        per_function: Each function's own, unweighted values, float32 (B,); NaN where it does not apply.
    """

    total: torch.Tensor
    per_function: dict[str, torch.Tensor]


def combine(
    functions: Mapping[str, tuple[RewardFunction, float]],
    completions: list[str],
    columns: Mapping[str, list[Any]],
) -> RewardBatch:
    """Call every reward function and add up what they return.

    Args:
        functions: Name to (function, weight); at least one.
        completions: The B completions.
        columns: Name to a list of B values, passed to every function by keyword.

    Raises:
        ValueError: Without functions, or when one returns other than B values or a value that is not finite.
    """
    if not functions:
        raise ValueError("functions: got none, want at least one")
    per_function = {}
    for name, (function, _) in functions.items():
        values = function(completions, **columns)
        if len(values) != len(completions):
            raise ValueError(f"reward function {name!r}: got {len(values)} values, want {len(completions)}")
        if not all(value is None or math.isfinite(value) for value in values):
            raise ValueError(f"reward function {name!r}: got {values}, want finite numbers or None")
        per_function[name] = torch.tensor(
            [math.nan if value is None else value for value in values], dtype=torch.float32
        )
    stacked = torch.stack(list(per_function.values()))
    weights = torch.tensor([weight for _, weight in functions.values()], dtype=torch.float32)
    total = (stacked.nan_to_num(nan=0.0) * weights[:, None]).sum(0)
    total[stacked.isnan().all(0)] = math.nan
    return RewardBatch(total, per_function)


def reward_functions(settings: Settings, task: Any) -> dict[str, tuple[RewardFunction, float]]:
    """The reward functions of a run by name, each with its weight.

    Raises:
        ValueError: The user's own has the name of another, or cannot be loaded.
    """
    functions: dict[str, tuple[RewardFunction, float]] = {
        "accuracy": (accuracy_reward(task), 1.0),
        "format": (format_reward, settings.format_weight),
    }
    if settings.language_weight:
        language = task.trace_words if settings.language == "trace" else script_words(settings.language)
        functions["language"] = (language_consistency_reward(language), settings.language_weight)
    if settings.overlong_buffer:
        functions["overlong"] = (soft_overlong_reward(settings.max_new_tokens, settings.overlong_buffer), 1.0)
    if settings.repetition_weight:
        functions["repetition"] = (repetition_penalty_reward(4, -settings.repetition_weight), 1.0)
    if settings.reward:
        name = settings.reward.rpartition(":")[2]
        if name in functions:
            raise ValueError(f"reward: got {settings.reward!r}, want another name than {', '.join(functions)}")
        functions[name] = (load_reward(settings.reward), 1.0)
    return functions


def columns(problems: Sequence[Problem], group_size: int, batch: Rollout) -> dict[str, list[Any]]:
    """The columns that reward functions get, one value a completion, of which each problem has ``group_size``."""
    each = [p for p in problems for _ in range(group_size)]
    rows = zip(batch.completion_ids.cpu(), batch.completion_mask.cpu(), strict=True)
    return {
        "prompts": [p.question for p in each],
        "answer": [p.answer for p in each],
        "problem": each,
        "completion_ids": [ids[kept].tolist() for ids, kept in rows],
    }

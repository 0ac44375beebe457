"""Rewards: format, accuracy, mathematics, length, repetition, and their weighted sum."""

from __future__ import annotations

import math
import sys
import threading
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch

from grpo_fast.train.language import script_words
from grpo_fast.train.rewards import (
    accuracy_reward,
    combine,
    extract_answer,
    format_reward,
    language_consistency_reward,
    load_reward,
    math_accuracy_reward,
    repetition_penalty_reward,
    soft_overlong_reward,
)


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("<think>1+1=2</think><answer>2</answer>", "2"),
        ("<answer> 1\n2 </answer> tail", "1\n2"),
        ("<answer></answer>", ""),
        ("<answer>2", None),
        ("2</answer>", None),
        ("</answer>2<answer>", None),
        ("<answer>2</answer><answer>3</answer>", None),
        ("<answer><answer>2</answer>", None),
        ("<answer>2</answer></answer>", None),
        ("12", None),
        ("", None),
    ],
)
def test_extract_answer(completion: str, answer: str | None) -> None:
    assert extract_answer(completion) == answer


@pytest.mark.parametrize(
    ("completion", "score"),
    [
        ("<think>a</think><answer>b</answer>", 1.0),
        ("\n<think>\na\nb\n</think>\n <answer>\nb\n</answer>\n", 1.0),
        ("<think>a < b > c </b></think><answer>x</answer>", 1.0),
        ("", 0.0),
        ("b", 0.0),
        ("<answer>b</answer>", 0.0),
        ("<think>a</think>", 0.0),
        ("<think>a<answer>b</answer>", 0.0),
        ("a</think><answer>b</answer>", 0.0),
        ("<think>a</think><answer>b", 0.0),
        ("<think>a</think>so<answer>b</answer>", 0.0),
        ("so <think>a</think><answer>b</answer>", 0.0),
        ("<think>a</think><answer>b</answer> so", 0.0),
        ("<answer>b</answer><think>a</think>", 0.0),
        ("<think>a<answer>b</answer></think>", 0.0),
        ("<think><think>a</think><answer>b</answer>", 0.0),
        ("<think>a</think></think><answer>b</answer>", 0.0),
        ("<think>a</think><think>a</think><answer>b</answer>", 0.0),
        ("<think>a</think><answer>b</answer><answer>c</answer>", 0.0),
        ("<think>a</think><answer><answer>b</answer>", 0.0),
        ("<think>a</think><answer>b</answer></answer>", 0.0),
        ("<THINK>a</THINK><answer>b</answer>", 0.0),
        ("<think>a</think><answer><think>b</answer>", 0.0),
    ],
)
def test_format_reward(completion: str, score: float) -> None:
    assert format_reward([completion, "junk"], answer=["b", "b"]) == [score, 0.0]


@pytest.mark.parametrize(
    ("script", "thought", "score"),
    [
        ("latin", "two and two make 4", 1.0),
        ("latin", "two and два make 4", 0.75),
        ("cyrillic", "two and два make 4", 0.25),
        ("latin", "so 我们 add", 0.5),  # an ideograph is a word
        ("cjk", "so 我们 add", 0.5),
        ("latin", "na\u00efve nai\u0308ve", 1.0),  # a letter with its mark is one letter, however it is written
        ("latin", "ma\u0442h is", 0.5),  # one foreign letter makes a word foreign
        ("devanagari", "\u0939\u093f\u0928\u094d\u0926\u0940 is", 0.5),  # vowel signs do not part a word
        ("latin", "1+1=2", 0.0),
        ("latin", "", 0.0),
    ],
)
def test_language_is_told_by_the_script(script: str, thought: str, score: float) -> None:
    reward = language_consistency_reward(script_words(script))
    assert reward([f"<think>{thought}</think><answer>ответ</answer>"], answer=["x"]) == [score]


@pytest.mark.parametrize("text", ["a word", "<think>a word", "<think>a</think><think>b</think>", "</think>a<think>"])
def test_no_thought_has_no_language(text: str) -> None:
    assert language_consistency_reward(script_words("latin"))([text]) == [0.0]


@pytest.mark.parametrize("script", ["", "klingon", "lat", "digit"])  # no letter is a digit
def test_an_unknown_script_is_refused(script: str) -> None:
    with pytest.raises(ValueError, match=f"language: got '{script}'"):
        script_words(script)


def test_accuracy_reward_asks_the_task_about_the_extracted_answer() -> None:
    class Echo:
        def verify(self, answer: str | None, problem: str) -> bool:
            return answer == problem

    reward = accuracy_reward(Echo())  # type: ignore[arg-type]
    completions = ["<think>1</think><answer> 2 </answer>", "2", "<answer>3</answer>"]
    assert reward(completions, problem=["2", "2", "2"], answer=["", "", ""]) == [1.0, 0.0, 0.0]
    with pytest.raises(ValueError, match="shorter"):
        reward(completions, problem=["2", "2"])


# Mathematics

MATHS = [
    ("1/2", "0.5", 1.0),
    ("1/2", r"\frac{1}{2}", 1.0),
    (r"$\frac{1}{2}$", "1/2", 1.0),
    (r"\boxed{12}", "12", 1.0),
    ("12", r"so \(12\)", 1.0),
    ("12", "12", 1.0),
    ("12", "13", 0.0),
    ("12", "12 or 13", 0.0),
    ("13", "12 or 13", 0.0),
    ("12", "112", 0.0),
    ("12", "", 0.0),
    ("12", r"\frac{1", 0.0),
    ("x+1", "1+x", 1.0),
    ("x+1", "x-1", 0.0),
    ("1,234", "1234", 1.0),
    ("", "12", None),
    (r"\frac{", "12", None),
]


def maths() -> list[float | None]:
    golds, answers, _ = zip(*MATHS, strict=True)
    return math_accuracy_reward([f"<think>7</think><answer>{one}</answer>" for one in answers], answer=list(golds))


def test_maths_on_the_main_thread_and_off_it() -> None:
    pytest.importorskip("math_verify")
    wanted = [score for _, _, score in MATHS]
    assert maths() == wanted
    found: list[list[float | None]] = []
    thread = threading.Thread(target=lambda: found.append(maths()))
    thread.start()
    thread.join()
    assert found == [wanted]


def test_maths_counts_only_what_is_in_the_one_answer_block() -> None:
    pytest.importorskip("math_verify")
    completions = [
        "12",
        "<answer>12</answer><answer>12</answer>",
        "12 <answer>13</answer>",
        "13 <answer>12</answer>",
    ]
    assert math_accuracy_reward(completions, answer=["12"] * 4) == [0.0, 0.0, 0.0, 1.0]


def test_maths_without_its_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(ImportError, match=r"math-verify.*grpo_fast\[train\]"):
        math_accuracy_reward(["<answer>1</answer>"], answer=["1"])


# Length and repetition


@pytest.mark.parametrize(
    ("length", "score"),
    [(0, 0.0), (12, 0.0), (13, -0.125), (16, -0.5), (19, -0.875), (20, -1.0), (21, -1.0), (999, -1.0)],
)
def test_soft_overlong_reward(length: int, score: float) -> None:
    assert soft_overlong_reward(max_length=20, buffer=8)(["?"], completion_ids=[[5] * length]) == [score]


@pytest.mark.parametrize("buffer", [0, -1, 21])
def test_soft_overlong_reward_refuses(buffer: int) -> None:
    with pytest.raises(ValueError, match=f"^buffer: got {buffer}"):
        soft_overlong_reward(20, buffer)


@pytest.mark.parametrize(
    ("size", "ids", "score"),
    [
        (1, [1, 2, 3, 4], 0.0),
        (1, [1, 1, 1, 2], -1.0),
        (2, [1, 2, 1, 2, 1], -1.0),
        (2, [1, 2, 3, 1, 3, 2], 0.0),
        (3, [7, 7, 7, 7, 7, 7], -1.5),
        (3, [7, 7, 7], 0.0),
        (3, [7, 7], 0.0),
        (1, [], 0.0),
    ],
)
def test_repetition_penalty(size: int, ids: list[int], score: float) -> None:
    assert repetition_penalty_reward(size, -2.0)(["?", "?"], completion_ids=[ids, [1] * size]) == [score, 0.0]


@pytest.mark.parametrize(
    ("size", "penalty", "argument"),
    [(0, -1.0, "ngram_size"), (2, 0.5, "max_penalty"), (2, math.nan, "max_penalty")],
)
def test_repetition_penalty_refuses(size: int, penalty: float, argument: str) -> None:
    with pytest.raises(ValueError, match=f"^{argument}: "):
        repetition_penalty_reward(size, penalty)


# A user's own function


def test_load_reward(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("user_rewards")
    module.length = lambda completions, **_: [float(len(text)) for text in completions]  # type: ignore[attr-defined]
    module.number = 3  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "user_rewards", module)
    assert load_reward("user_rewards:length")(["ab", ""], answer=[1, 2]) == [2.0, 0.0]
    for spec in ("user_rewards", "user_rewards:", ":length", "", "no_such_module:f", "user_rewards:none"):
        with pytest.raises(ValueError, match=f"^reward: got {spec!r}"):
            load_reward(spec)
    with pytest.raises(ValueError, match="a int, want a function"):
        load_reward("user_rewards:number")


# The weighted sum


def returning(*values: float | None) -> Callable[..., list[float | None]]:
    return lambda completions, **_: list(values)


def test_combine_weighs_and_skips_none() -> None:
    functions = {
        "one": (returning(1.0, None, 0.5, None), 2.0),
        "two": (returning(3.0, 4.0, None, None), -1.0),
    }
    batch = combine(functions, ["a", "b", "c", "d"], {})
    nan = math.nan
    torch.testing.assert_close(batch.total, torch.tensor([-1.0, -4.0, 1.0, nan]), equal_nan=True)
    assert list(batch.per_function) == ["one", "two"]
    torch.testing.assert_close(batch.per_function["one"], torch.tensor([1.0, nan, 0.5, nan]), equal_nan=True)
    torch.testing.assert_close(batch.per_function["two"], torch.tensor([3.0, 4.0, nan, nan]), equal_nan=True)
    assert {batch.total.dtype, *(values.dtype for values in batch.per_function.values())} == {torch.float32}


def test_combine_passes_the_completions_and_every_column() -> None:
    def seen(completions: list[str], **columns: list[Any]) -> list[float | None]:
        assert columns == {"answer": ["1", "2"], "level": [3, 4]}
        return [float(len(text)) for text in completions]

    total = combine({"seen": (seen, 0.5)}, ["ab", "abcd"], {"answer": ["1", "2"], "level": [3, 4]}).total
    assert total.tolist() == [1.0, 2.0]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((1.0,), "'bad': got 1 values, want 2"),
        ((1.0, 2.0, 3.0), "'bad': got 3 values, want 2"),
        ((1.0, math.nan), r"'bad': .*finite"),
        ((1.0, math.inf), r"'bad': .*finite"),
    ],
)
def test_combine_refuses(values: tuple[float, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        combine({"good": (returning(1.0, 2.0), 1.0), "bad": (returning(*values), 1.0)}, ["a", "b"], {})
    with pytest.raises(ValueError, match=r"^functions: "):
        combine({}, ["a"], {})

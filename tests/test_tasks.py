"""Tasks: the splits, the compact forms and traces, and a verifier that gives full credit only."""

from __future__ import annotations

import ast
import operator
import re
import time
import zlib
from collections.abc import Callable
from fractions import Fraction
from functools import cache
from typing import Any

import pytest

pytest.importorskip("reasoning_gym")

from grpo_fast.train.rewards import accuracy_reward, format_reward
from grpo_fast.train.tasks import ALPHABET, SPLITS, TASKS, Problem, Split, Task, completion_text, load_task

SMALL_SPLITS: tuple[tuple[Split, int], ...] = (("test", 0), ("dev", 1))


@cache
def task(name: str) -> Task:
    return load_task(name)


@cache
def some_problems(name: str) -> list[Problem]:
    return task(name).problems("train", 0, 100)


def value(expression: str) -> Fraction:
    """The exact value of a trusted expression: Python's own precedence, over fractions."""
    return Fraction(eval(re.sub(r"\d+", r"Fraction(\g<0>)", expression), {"Fraction": Fraction}))


def first(name: str, wanted: Callable[[Problem], bool]) -> Problem:
    return next(problem for problem in some_problems(name) if wanted(problem))


# Splits


@pytest.mark.parametrize("name", TASKS)
def test_splits_are_disjoint(name: str) -> None:
    seen = {split: task(name).problems(split, 0, 60) for split in SPLITS}
    for form in ("question", "compact"):
        forms = {split: {getattr(problem, form) for problem in problems} for split, problems in seen.items()}
        assert len(set.union(*forms.values())) == sum(len(some) for some in forms.values())
        assert all(len(some) > 20 for some in forms.values())


def test_a_whole_small_task_is_dealt_by_its_hash_whatever_the_seed() -> None:
    # Two-term one-digit sums: 200 problems in all, so every one of them comes up many times.
    counts_asked: dict[Split, int] = {"train": 1500, "dev": 200, "test": 200}
    for seed in (0, 1):
        sums = load_task("chain_sum", min_terms=2, max_terms=2, seed=seed)
        counts = {}
        for split, count in counts_asked.items():
            questions = {problem.compact for problem in sums.problems(split, 0, count)}
            counts[split] = len(questions)
            buckets = {zlib.crc32(question.encode()) % 10 for question in questions}
            assert buckets <= {"test": {0}, "dev": {1}, "train": set(range(2, 10))}[split]
        assert sum(counts.values()) == 200
        assert counts["train"] > 130


@pytest.mark.parametrize("name", ["chain_sum", "letter_counting"])
def test_a_problem_does_not_depend_on_the_order_of_calls(name: str) -> None:
    forwards, backwards = load_task(name), load_task(name)
    asked = [(split, index) for split in SPLITS for index in range(12)]
    ahead = {key: forwards.problem(*key) for key in asked}
    behind = {key: backwards.problem(*key) for key in reversed(asked)}
    assert ahead == behind
    assert forwards.problems("dev", 3, 4) == [ahead["dev", index] for index in range(3, 7)]


def test_the_seed_changes_the_problems() -> None:
    default, zero, one = (load_task("chain_sum", **seed) for seed in ({}, {"seed": 0}, {"seed": 1}))
    assert default.problems("train", 0, 10) == zero.problems("train", 0, 10)
    assert default.problems("train", 0, 10) != one.problems("train", 0, 10)


def test_wordings_and_orders_of_one_countdown_puzzle_share_a_compact_form() -> None:
    small = load_task("countdown", max_value=3, max_target=4)
    problems = small.problems("train", 0, 60)
    assert len({problem.question for problem in problems}) > len({problem.compact for problem in problems})


def test_a_task_without_a_test_problem_says_so() -> None:
    # The divisors of 2 and 3: four problems, so the hash leaves at least one split without any.
    few = load_task("gcd", min_value=2, max_value=3)
    forms = [f"gcd({a},{b})=?" for a in (2, 3) for b in (2, 3)]
    buckets = {zlib.crc32(form.encode()) % 10 for form in forms}
    missing: list[Split] = [split for split, bucket in SMALL_SPLITS if bucket not in buckets]
    assert missing
    with pytest.raises(ValueError, match=f"'gcd'.*{missing[0]} problem.*too few distinct"):
        few.problem(missing[0], 0)


# Loading


def test_an_unknown_name_lists_the_names() -> None:
    with pytest.raises(ValueError, match=r"name: got 'sudoku'.*chain_sum.*countdown"):
        load_task("sudoku")


@pytest.mark.parametrize("override", ["max_term", "size"])
def test_an_unknown_override_is_named(override: str) -> None:
    with pytest.raises(ValueError, match=rf"^{override}: .*chain_sum.*max_terms"):
        load_task("chain_sum", **{override: 5})


def test_a_refused_value_is_a_value_error() -> None:
    with pytest.raises(ValueError, match=r"min_terms.*max_terms must be >= min_terms"):
        load_task("chain_sum", min_terms=9)


def test_overrides_reach_the_problems() -> None:
    for problem in load_task("chain_sum", min_terms=6, max_terms=6).problems("train", 0, 20):
        assert len(re.findall(r"\d+", problem.compact)) == 6


@pytest.mark.parametrize(("split", "index", "argument"), [("validation", 0, "split"), ("dev", -1, "index")])
def test_bad_requests_name_the_argument(split: Any, index: int, argument: str) -> None:
    with pytest.raises(ValueError, match=f"^{argument}: "):
        task("chain_sum").problem(split, index)


# Compact forms, traces and gold answers


@pytest.mark.parametrize("name", TASKS)
def test_gold_completions_earn_full_reward(name: str) -> None:
    problems = some_problems(name)
    completions = [completion_text(problem) for problem in problems]
    assert accuracy_reward(task(name))(completions, problem=problems) == [1.0] * 100
    assert format_reward(completions) == [1.0] * 100
    for problem in problems:
        assert problem.trace
        assert task(name).verify(problem.entry["answer"], problem)


@pytest.mark.parametrize("name", TASKS)
def test_the_text_stays_in_the_alphabet(name: str) -> None:
    assert list(ALPHABET) == sorted(set(ALPHABET))
    for problem in some_problems(name):
        assert set(problem.compact + problem.trace + problem.answer) <= set(ALPHABET)


@pytest.mark.parametrize("name", ["chain_sum", "basic_arithmetic", "products", "gcd", "countdown"])
def test_every_step_of_a_trace_is_true_and_the_last_one_gives_the_answer(name: str) -> None:
    for problem in some_problems(name):
        steps = [step.split("=") for step in problem.trace.split(";")]
        if problem.trace != problem.answer:
            assert all(value(left) == value(right) for left, right in steps), problem
        if name == "gcd":
            assert steps[-1][1] == f"{steps[-1][1].split('*')[0]}*{problem.answer}+0"
        elif name == "countdown":
            assert int(steps[-1][1]) == problem.entry["metadata"]["target"] == value(problem.answer)
        else:
            assert steps[-1][-1] == problem.answer
            assert value(problem.compact.removesuffix("=?")) == int(problem.answer)


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("basic_arithmetic", {"min_terms": 5, "max_terms": 6, "max_digits": 2}),
        ("basic_arithmetic", {"allow_parentheses": False, "format_style": "natural"}),
        ("products", {"min_terms": 3, "max_terms": 3, "max_digits": 3, "allow_negation": True}),
        ("chain_sum", {"max_digits": 3, "allow_negation": True}),
    ],
)
def test_traces_hold_under_overrides(name: str, overrides: dict[str, Any]) -> None:
    for problem in load_task(name, **overrides).problems("train", 0, 100):
        assert value(problem.compact.removesuffix("=?")) == int(problem.answer)
        steps = [step.split("=") for step in problem.trace.split(";")]
        assert all(value(step[0]) == value(step[-1]) for step in steps)
        assert steps[-1][-1] == problem.answer


@pytest.mark.parametrize(
    ("name", "entry", "compact", "trace", "answer"),
    [
        ("chain_sum", {"expression": "1 - 5 - 6 + 4"}, "1-5-6+4=?", "1-5=-4;-4-6=-10;-10+4=-6", "-6"),
        (
            "basic_arithmetic",
            {"expression": "-( 2 - -8 / 4 ) * 3"},
            "-(2--8/4)*3=?",
            "-8/4=-2;2--2=4;-(4)=-4;-4*3=-12",
            "-12",
        ),
        ("products", {"expression": "15 * 43"}, "15*43=?", "15*40=600;15*3=45;600+45=645", "645"),
        ("products", {"expression": "7 * 0"}, "7*0=?", "7*0=0", "0"),
        ("products", {"expression": "2 * 3 * 20"}, "2*3*20=?", "2*3=6;6*20=120", "120"),
        ("gcd", {"numbers": [12, 18]}, "gcd(12,18)=?", "18=1*12+6;12=2*6+0", "6"),
        ("spell_backward", {"word": "Cat"}, "reverse cat", "c;ac;tac", "taC"),
        (
            "letter_counting",
            {"span": ["The", "Tattoo"], "target_letter": "t"},
            "count t in the tattoo",
            "the:1;tattoo:4",
            "4",
        ),
        (
            "countdown",
            {"expression": "8*(4 - 1)", "numbers": [8, 4, 1], "target": 24},
            "make 24 from 1,4,8",
            "4-1=3;8*3=24",
            "8*(4 - 1)",
        ),
    ],
)
def test_forms_by_hand(name: str, entry: dict[str, Any], compact: str, trace: str, answer: str) -> None:
    class OneItem:
        def __getitem__(self, position: int) -> dict[str, Any]:
            return {"question": "?", "answer": answer, "metadata": entry}

    found = Task(name, OneItem())._read(0)
    assert found is not None
    assert (found.compact, found.trace) == (compact, trace)
    assert found.answer == answer.lower().replace(" ", "")


def test_items_whose_gold_answer_is_not_the_value_are_dropped() -> None:
    class OneItem:
        def __init__(self, expression: str, answer: str) -> None:
            self.item = {"question": "?", "answer": answer, "metadata": {"expression": expression}}

        def __getitem__(self, position: int) -> dict[str, Any]:
            return self.item

    assert Task("basic_arithmetic", OneItem("4 / 2", "2"))._read(0) is not None
    assert Task("basic_arithmetic", OneItem("4 / -( 6 * 6 + 37 )", "-1"))._read(0) is None
    assert Task("basic_arithmetic", OneItem("4 / 0", "4"))._read(0) is None


def test_letters_outside_the_alphabet_are_dropped() -> None:
    class OneItem:
        def __getitem__(self, position: int) -> dict[str, Any]:
            return {"question": "?", "answer": "1", "metadata": {"span": ["aërial"], "target_letter": "l"}}

    assert Task("letter_counting", OneItem())._read(0) is None


@pytest.mark.parametrize("name", ["spell_backward", "letter_counting"])
def test_word_traces_end_at_the_answer(name: str) -> None:
    for problem in some_problems(name):
        assert re.split("[;:]", problem.trace)[-1] == problem.answer


def test_a_checked_sum_waits_where_it_slipped_and_the_next_step_is_right() -> None:
    slips = 0
    for checked, plain in zip(some_problems("checked_sum"), some_problems("chain_sum"), strict=True):
        assert (checked.compact, checked.answer) == (plain.compact, plain.answer)
        kept, steps = [], checked.trace.split(";")
        for place, step in enumerate(steps):
            if step != "wait":
                equation, _, check = step.partition(",")
                left, _, result = equation.partition("=")
                assert value(left) == int(check)
                slipped = result != check
                assert slipped == (place + 1 < len(steps) and steps[place + 1] == "wait")
                slips += slipped
                kept += [] if slipped else [equation]
        assert ";".join(kept) == plain.trace
    assert 20 < slips < 80  # of about 300 steps


# Verifier


def test_no_partial_credit_for_text_around_the_gold_answer() -> None:
    for name in TASKS:
        for problem in some_problems(name)[:10]:
            gold = problem.answer
            for junk in (
                "",
                " ",
                None,
                f"{gold} or 13",
                f"{gold}x",
                f"x{gold}",
                f"={gold}",
                f"1{gold}",
                "\0",
                "²",
            ):
                assert not task(name).verify(junk, problem), (name, junk, problem)


def test_the_gold_answer_counts_in_any_case_and_amid_whitespace() -> None:
    problem = first("spell_backward", lambda problem: len(problem.answer) == 5)
    for form in (problem.answer.upper(), f"\n {problem.answer.capitalize()} "):
        assert task("spell_backward").verify(form, problem)
    assert not task("spell_backward").verify(problem.answer[::-1] + "q", problem)


def test_numbers_count_by_value_in_sums() -> None:
    problem = first("chain_sum", lambda problem: problem.answer == "12")
    for form, right in (("+12", True), ("012", True), ("12.0", True), ("12.5", False), ("-12", False)):
        assert task("chain_sum").verify(form, problem) is right
    for junk in ("12 or 13", "12,13", "nan", "inf", "1e999999999", "9" * 5000, "9**9**9"):
        assert not task("chain_sum").verify(junk, problem)


def test_a_gold_answer_longer_than_verifiers_read_still_counts() -> None:
    products = load_task("products", min_digits=60, max_digits=60)
    problem = products.problem("train", 0)
    assert len(problem.answer) > 100
    assert products.verify(problem.answer, problem)


def test_a_rounded_sum_of_partial_credits_is_not_full_credit() -> None:
    # reasoning-gym adds 1/9 nine times for a nine-letter word, which comes to more than 1.
    words = load_task("spell_backward", min_word_len=9, max_word_len=9)
    problem = words.problem("train", 0)
    assert words._dataset.score_answer(problem.answer + "junk", problem.entry) > 1
    assert not words.verify(problem.answer + "junk", problem)
    assert words.verify(problem.answer, problem)


COUNTDOWN = Problem(
    "?", "make 24 from 2,3,8,8", "(8+8)*3/2", "", {"metadata": {"numbers": [8, 3, 2, 8], "target": 24}}
)


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("8*3*2/(8-6)", False),  # a number that is not there
        ("8*3", False),  # two numbers unused
        ("(8/8+2)*3", False),  # all the numbers, another value
        ("8*(3*2)/8", False),
        ("8*(8-3-2)", True),
        (" 8 * ( 8 - 3 - 2 ) ", True),
        ("-8*(2+3-8)", True),
        ("(8+8)*3/2", True),
        ("(8+8)/2*3", True),
        ("3/(2/(8+8))", True),  # through a fraction
        ("8*(8-3-2)=24", False),
        ("8+8+8", False),  # one number thrice
        ("24", False),
        ("8*(8-3-2", False),
        ("8(8-3-2)", False),
        ("8*(8-3-2)/1", False),
        ("(8+8)*3//2", False),
        ("8/(8-8)*3*2", False),
        ("8 3 2 8", False),
        ("08*(8-3-2)", False),
        ("٨*(8-3-2)", False),
        ("9**9**9", False),
        ("__import__('os')", False),
        ("(" * 5000 + "8", False),
        ("8*3 # 2 8", False),
        ("-" * 99 + "8", False),
        ("-" * 20000 + "8", False),
        ("(" * 99 + "8", False),
    ],
)
def test_countdown_answers(answer: str, right: bool) -> None:
    start = time.perf_counter()
    assert task("countdown").verify(answer, COUNTDOWN) is right
    assert time.perf_counter() - start < 1


@pytest.mark.parametrize("name", TASKS)
def test_answers_are_never_run(name: str, tmp_path: Any) -> None:
    witness = tmp_path / "run"
    code = f"__import__('pathlib').Path({str(witness)!r}).touch()"
    assert not task(name).verify(code, some_problems(name)[0])
    assert not task(name).verify("open('run','w')", some_problems(name)[0])
    assert not witness.exists()


def test_other_countdown_solutions_are_found_right() -> None:
    """Every left-to-right expression of a puzzle is judged as its value says, many of them solutions."""
    operations: dict[str, Callable[[Fraction, Fraction], Fraction]] = {
        "+": operator.add,
        "-": operator.sub,
        "*": operator.mul,
        "/": operator.truediv,
    }
    others = 0
    for problem in some_problems("countdown")[:20]:
        a, b, c = problem.entry["metadata"]["numbers"]
        for one, two in ((x, y) for x in operations for y in operations):
            answer = f"({a}{one}{b}){two}{c}"
            right = operations[two](operations[one](Fraction(a), Fraction(b)), Fraction(c))
            assert task("countdown").verify(answer, problem) is (right == problem.entry["metadata"]["target"])
            others += right == problem.entry["metadata"]["target"] and ast.dump(ast.parse(answer)) != ast.dump(
                ast.parse(problem.answer)
            )
    assert others >= 5


@pytest.mark.parametrize("name", TASKS)
def test_worked_traces_are_in_their_own_language(name: str) -> None:
    task = load_task(name)
    for problem in task.problems("train", 0, 300):
        assert all(task.trace_words(problem.trace)), problem.trace


def test_words_that_no_trace_would_have() -> None:
    task = load_task("checked_sum")
    thought = "1-5=-3,-4;wait;1-5=-4,-4;hmm;1-5=-4;1-5==-4,-4;;-4+6=9,9"
    assert task.trace_words(thought) == [True, True, True, False, False, False, False, True]
    assert task.trace_words("") == []

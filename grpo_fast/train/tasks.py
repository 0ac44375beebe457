"""Reasoning tasks with a verifier, a compact form and a worked chain of thought, on top of reasoning-gym.

Every task is an endless, deterministic sequence of problems, dealt into train, dev and test by a hash of the
problem itself: no problem of one split is ever in another, however often a small task repeats itself.
"""

from __future__ import annotations

import ast
import operator
import random
import re
import string
import zlib
from collections.abc import Callable
from dataclasses import dataclass, fields
from fractions import Fraction
from functools import reduce
from typing import Any, Literal, get_args

#: How a trace says that it takes its last step back: ``4-1=2,3;wait;4-1=3,3``.
WAIT = "wait"

Split = Literal["train", "dev", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)

#: Every character that a compact prompt, a trace or a gold answer can have, sorted.
ALPHABET: str = "".join(sorted(string.ascii_lowercase + string.digits + " +-*/()=?,:;."))

# A split with none of this many items in a row is taken to be empty. The smallest has a tenth of the distinct
# problems, so only a task with a handful of them can come to this.
_PATIENCE = 10_000

# Verifiers see no longer text than this, too little to exhaust a parser; only a gold answer may be longer.
_LONGEST_ANSWER = 100


@dataclass(frozen=True)
class Problem:
    """One problem of a task.

    Attributes:
        question: The problem in words, for a pretrained model.
        compact: The problem in a few characters of ``ALPHABET``, for a character-level model: ``1-5-6+4=?``.
        answer: The gold answer (for countdown, one of several right ones), in ``ALPHABET``.
        trace: A worked chain of thought in ``ALPHABET``: what belongs between ``<think>`` and ``</think>``.
        entry: The reasoning-gym item behind it, with keys ``question``, ``answer`` and ``metadata``.
    """

    question: str
    compact: str
    answer: str
    trace: str
    entry: dict[str, Any]


class Task:
    """An endless sequence of problems for each split, and the verifier of answers to them.

    Made by :func:`load_task`.
    """

    def __init__(self, name: str, dataset: Any) -> None:
        self.name = name
        self._dataset = dataset
        self._write = _RECIPES[name].write
        self._positions: dict[Split, list[int]] = {split: [] for split in SPLITS}

    def problem(self, split: Split, index: int) -> Problem:
        """Return problem ``index`` (from 0) of a split: the same one however often and in whatever order.

        Raises:
            ValueError: On an unknown split or a negative index, and where the task's settings leave so few
                distinct problems that the split has none.
        """
        if split not in SPLITS:
            raise ValueError(f"split: got {split!r}, want one of {', '.join(SPLITS)}")
        if index < 0:
            raise ValueError(f"index: got {index}, want 0 or more")
        positions = self._positions[split]
        while len(positions) <= index:
            positions.append(self._next_position(split, positions[-1] + 1 if positions else 0))
        problem = self._read(positions[index])
        assert problem is not None
        return problem

    def problems(self, split: Split, start: int, count: int) -> list[Problem]:
        """Return ``count`` problems of a split from index ``start`` on; errors are those of ``problem``."""
        return [self.problem(split, index) for index in range(start, start + count)]

    def verify(self, answer: str | None, problem: Problem) -> bool:
        """Tell whether an answer is wholly right; None, junk and half-right answers are not, and none raises.

        Right is the gold answer, but for case and surrounding whitespace, and whatever the task's own
        verifier gives full credit: ``+05`` for ``5`` in a sum or a product. In countdown it is any expression
        that makes the target from the numbers, each used exactly once.
        """
        if answer is None:
            return False
        answer = answer.strip()
        if answer == problem.answer:
            return True
        if len(answer) > _LONGEST_ANSWER:
            return False
        if self.name == "countdown":
            return _solves_countdown(answer, problem.entry)
        # Not "at least 1": partial credit for spelling is a sum of fractions, which can round above 1.
        return bool(self._dataset.score_answer(answer, problem.entry) == 1.0)

    def trace_words(self, text: str) -> list[bool]:
        """Tell which words of a thought are of the language that the task's worked traces are written in.

        Words stand between ``;``. One of the language is a step as the traces write it, right or wrong, such as
        ``1-5=-4``, or what the traces say beside steps (``wait``); for words see ``language_consistency_reward``.
        """
        return [_RECIPES[self.name].word.fullmatch(word) is not None for word in text.split(";")] if text else []

    def _next_position(self, split: Split, start: int) -> int:
        for position in range(start, start + _PATIENCE):
            problem = self._read(position)
            if problem is not None and _split_of(problem) == split:
                return position
        raise ValueError(
            f"task {self.name!r}: none of {_PATIENCE} items in a row is a {split} problem; "
            "its settings leave too few distinct problems, want wider ones"
        )

    def _read(self, position: int) -> Problem | None:
        """Return the problem at a position of the dataset, or None where it is not fit for use."""
        entry = self._dataset[position]
        written = self._write(entry)
        if written is None:
            return None
        compact, trace = written
        answer = entry["answer"].lower().replace(" ", "")
        if not set(compact + trace + answer) <= set(ALPHABET):
            return None
        return Problem(entry["question"], compact, answer, trace or answer, entry)


def load_task(name: str, **overrides: Any) -> Task:
    """Load a task by name, its settings small enough for a tiny character-level model unless overridden.

    Args:
        name: One of ``TASKS``.
        overrides: Fields of the reasoning-gym config of that task, ``seed`` (default 0) among them. ``size``
            is not: a task has no end.

    Raises:
        ValueError: On an unknown name or override, or on values that reasoning-gym refuses.
        ImportError: Without the package reasoning-gym.
    """
    if name not in _RECIPES:
        raise ValueError(f"name: got {name!r}, want one of {', '.join(TASKS)}")
    try:
        from reasoning_gym.factory import DATASETS, create_dataset
    except ImportError as error:
        raise ImportError("tasks need the package reasoning-gym: pip install 'grpo_fast[train]'") from error
    recipe = _RECIPES[name]
    known = {field.name for field in fields(DATASETS[recipe.dataset][1])} - {"size"}
    for key in overrides:
        if key not in known:
            raise ValueError(f"{key}: not a setting of task {name!r}, want one of {', '.join(sorted(known))}")
    try:
        dataset = create_dataset(recipe.dataset, size=2**30, **{"seed": 0, **recipe.settings, **overrides})
    except AssertionError as error:
        raise ValueError(f"overrides: task {name!r} got {overrides}: {error}") from error
    return Task(name, dataset)


def completion_text(problem: Problem) -> str:
    """Return the ideal completion: the trace and the gold answer in the tags that the rewards look for."""
    return f"<think>{problem.trace}</think><answer>{problem.answer}</answer>"


def _split_of(problem: Problem) -> Split:
    # Of the compact form, not the question: one problem in two wordings must not be on both sides. As the
    # question determines the compact form, no question is on both sides either.
    bucket = zlib.crc32(problem.compact.encode()) % 10
    return "test" if bucket == 0 else "dev" if bucket == 1 else "train"


_OPERATIONS: dict[type[ast.operator], tuple[str, Callable[[Fraction, Fraction], Fraction]]] = {
    ast.Add: ("+", operator.add),
    ast.Sub: ("-", operator.sub),
    ast.Mult: ("*", operator.mul),
    ast.Div: ("/", operator.truediv),
}


def _evaluate(expression: str) -> tuple[Fraction, list[str]]:
    """Work an expression of integers, ``+ - * /`` and parentheses out exactly, without ever running it.

    Returns:
        Its value, and each step on the way as an equation, ``-4-6=-10``.

    Raises:
        ValueError: When it is anything else, or divides by zero.
    """
    steps: list[str] = []

    def show(value: Fraction) -> str:
        return str(value) if value.denominator == 1 else f"({value})"

    def walk(node: ast.expr) -> Fraction:
        match node:
            case ast.Constant(value=int(number)):
                return Fraction(number)
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                value = walk(operand)
                if not isinstance(operand, ast.Constant):
                    steps.append(f"-({show(value)})={show(-value)}")
                return -value
            case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATIONS:
                symbol, apply = _OPERATIONS[type(op)]
                a, b = walk(left), walk(right)
                steps.append(f"{show(a)}{symbol}{show(b)}={show(apply(a, b))}")
                return apply(a, b)
        raise ValueError(f"expression: got {expression!r}, want integers, + - * / and parentheses")

    try:
        return walk(ast.parse(expression, mode="eval").body), steps
    except (SyntaxError, ZeroDivisionError) as error:
        raise ValueError(f"expression: got {expression!r}, which has no value: {error}") from error


def _solves_countdown(answer: str, entry: dict[str, Any]) -> bool:
    # reasoning-gym's own verifier hands the answer to sympy's parse_expr, which evaluates it as Python. Its
    # rule is kept: each number exactly once, though some of its questions say "at most once". The characters
    # allowed leave no way to mention a number without using it, as a comment would.
    if not re.fullmatch(r"[-+*/() 0-9]+", answer):
        return False
    try:
        value, _ = _evaluate(answer)
    except ValueError:
        return False
    used = [int(number) for number in re.findall(r"[0-9]+", answer)]
    return sorted(used) == sorted(entry["metadata"]["numbers"]) and value == entry["metadata"]["target"]


# The writers below turn a reasoning-gym item into its compact form and its trace, or None to drop the item.


def _steps_to(value: int, expression: str) -> str | None:
    # A few gold answers of basic_arithmetic rest on rounding a division down, or miss precedence: None there.
    try:
        found, steps = _evaluate(expression)
    except ValueError:
        return None
    return ";".join(steps) if found == value else None


def _write_arithmetic(entry: dict[str, Any]) -> tuple[str, str] | None:
    """Each operation in turn: ``1-5=-4;-4-6=-10``."""
    expression = entry["metadata"]["expression"].replace(" ", "")
    trace = _steps_to(int(entry["answer"]), expression)
    return None if trace is None else (f"{expression}=?", trace)


#: Share of the steps of a checked sum that a worked trace gets wrong at first.
_SLIPS = 0.15


def _write_checked_sum(entry: dict[str, Any]) -> tuple[str, str] | None:
    """As arithmetic, each result worked out twice; where the two differ it waits: ``1-5=-3,-4;wait;1-5=-4,-4``.

    Which steps slip at first follows from the problem.
    """
    written = _write_arithmetic(entry)
    if written is None:
        return None
    compact, trace = written
    chance = random.Random(compact)
    steps = []
    for step in trace.split(";"):
        result = step.partition("=")[2]
        if chance.random() < _SLIPS:
            slip = int(result) + chance.choice((-2, -1, 1, 2))
            steps += [f"{step.removesuffix(result)}{slip},{result}", WAIT]
        steps.append(f"{step},{result}")
    return compact, ";".join(steps)


def _write_products(entry: dict[str, Any]) -> tuple[str, str]:
    """One partial product for each digit of a factor: ``15*40=600;15*3=45;600+45=645``."""
    expression = entry["metadata"]["expression"].replace(" ", "")
    product, *factors = (int(factor) for factor in expression.split("*"))
    steps = []
    for factor in factors:
        sign = -1 if factor < 0 else 1
        digits = enumerate(reversed(str(abs(factor))))
        places = [sign * int(digit) * 10**power for power, digit in digits if digit != "0"] or [0]
        steps += [f"{product}*{place}={product * place}" for place in reversed(places)]
        total, *partials = [product * place for place in reversed(places)]
        for partial in partials:
            steps.append(f"{total}+{partial}={total + partial}")
            total += partial
        product = total
    return f"{expression}=?", ";".join(steps)


def _write_gcd(entry: dict[str, Any]) -> tuple[str, str]:
    """Euclid's divisions with remainder: ``18=1*12+6;12=2*6+0``."""
    numbers: list[int] = entry["metadata"]["numbers"]
    steps = []

    def euclid(a: int, b: int) -> int:
        a, b = max(a, b), min(a, b)
        while b:
            steps.append(f"{a}={a // b}*{b}+{a % b}")
            a, b = b, a % b
        return a

    reduce(euclid, numbers)
    return f"gcd({','.join(map(str, numbers))})=?", ";".join(steps)


def _write_spell_backward(entry: dict[str, Any]) -> tuple[str, str]:
    """Each letter in reading order goes in front of the ones before: ``c;ac;tac``."""
    word = entry["metadata"]["word"].lower()
    return f"reverse {word}", ";".join(word[:end][::-1] for end in range(1, len(word) + 1))


def _write_letter_counting(entry: dict[str, Any]) -> tuple[str, str]:
    """The count so far after each word: ``hundred:1;thousand:2``."""
    letter = entry["metadata"]["target_letter"]
    words = [word.lower() for word in entry["metadata"]["span"]]
    counts = ["".join(words[:end]).count(letter) for end in range(1, len(words) + 1)]
    trace = ";".join(f"{word}:{count}" for word, count in zip(words, counts, strict=True))
    return f"count {letter} in {' '.join(words)}", trace


def _write_countdown(entry: dict[str, Any]) -> tuple[str, str] | None:
    """The steps of the known solution; the compact form sorts the numbers, whose order means nothing."""
    target = entry["metadata"]["target"]
    numbers = ",".join(map(str, sorted(entry["metadata"]["numbers"])))
    trace = _steps_to(target, entry["metadata"]["expression"])
    return None if trace is None else (f"make {target} from {numbers}", trace)


@dataclass(frozen=True)
class _Recipe:
    """A dataset of reasoning-gym, what writes its items, what a step of the traces looks like, and the settings in
    which the task differs from it.
    """

    dataset: str
    write: Callable[[dict[str, Any]], tuple[str, str] | None]
    word: re.Pattern[str]
    settings: dict[str, int]


_SUMS = {"min_terms": 3, "max_terms": 5, "max_digits": 1}
_NUMBER = r"(?:-?\d+|\(-?\d+/\d+\))"
_STEP = re.compile(rf"{_NUMBER}[-+*/]{_NUMBER}={_NUMBER}|-\({_NUMBER}\)={_NUMBER}|{_NUMBER}")
_CHECKED_STEP = re.compile(rf"-?\d+[-+]\d+=-?\d+,-?\d+|{WAIT}")
_RECIPES: dict[str, _Recipe] = {
    "chain_sum": _Recipe("chain_sum", _write_arithmetic, _STEP, _SUMS),
    "checked_sum": _Recipe("chain_sum", _write_checked_sum, _CHECKED_STEP, _SUMS),
    "basic_arithmetic": _Recipe("basic_arithmetic", _write_arithmetic, _STEP, {"max_terms": 4, "max_digits": 1}),
    "products": _Recipe("products", _write_products, _STEP, {"max_digits": 2}),
    "gcd": _Recipe("gcd", _write_gcd, re.compile(r"\d+=\d+\*\d+\+\d+"), {"min_value": 2, "max_value": 60}),
    "spell_backward": _Recipe("spell_backward", _write_spell_backward, re.compile("[a-z]+"), {"max_word_len": 6}),
    "letter_counting": _Recipe(
        "letter_counting", _write_letter_counting, re.compile(r"[a-z0-9]+:\d+"), {"min_words": 2, "max_words": 4}
    ),
    "countdown": _Recipe(
        "countdown",
        _write_countdown,
        _STEP,
        {"min_numbers": 3, "max_numbers": 3, "max_value": 9, "min_target": 1, "max_target": 50},
    ),
}

#: The names of the tasks.
TASKS: tuple[str, ...] = tuple(_RECIPES)

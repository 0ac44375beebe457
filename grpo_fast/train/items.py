"""The kinds of items that tasks are made of: each a dataset of reasoning-gym, and how an item of it is worked out.

Compact forms and traces are written in the characters of ``tasks.ALPHABET``.
"""

from __future__ import annotations

import ast
import operator
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from functools import reduce
from typing import Any

#: How a trace says that it takes its last step back: ``4-1=2,3;wait;4-1=3,3``.
WAIT = "wait"

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


def solves_countdown(answer: str, entry: dict[str, Any]) -> bool:
    """Whether an answer makes the item's target from its numbers, each used exactly once."""
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


# What writes items: ``Kind.write``.


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
class Kind:
    """A task, but for what is said when it is loaded.

    Attributes:
        dataset: That of reasoning-gym.
        write: Gives an item's compact form and its trace, or None to drop the item.
        word: What a step of the traces looks like.
        settings: Where the task differs from the dataset's defaults.
    """

    dataset: str
    write: Callable[[dict[str, Any]], tuple[str, str] | None]
    word: re.Pattern[str]
    settings: dict[str, int]


_SUMS = {"min_terms": 3, "max_terms": 5, "max_digits": 1}
_NUMBER = r"(?:-?\d+|\(-?\d+/\d+\))"
_STEP = re.compile(rf"{_NUMBER}[-+*/]{_NUMBER}={_NUMBER}|-\({_NUMBER}\)={_NUMBER}|{_NUMBER}")
_CHECKED_STEP = re.compile(rf"-?\d+[-+]\d+=-?\d+,-?\d+|{WAIT}")
#: By the task's name.
KINDS: dict[str, Kind] = {
    "chain_sum": Kind("chain_sum", _write_arithmetic, _STEP, _SUMS),
    "checked_sum": Kind("chain_sum", _write_checked_sum, _CHECKED_STEP, _SUMS),
    "basic_arithmetic": Kind("basic_arithmetic", _write_arithmetic, _STEP, {"max_terms": 4, "max_digits": 1}),
    "products": Kind("products", _write_products, _STEP, {"max_digits": 2}),
    "gcd": Kind("gcd", _write_gcd, re.compile(r"\d+=\d+\*\d+\+\d+"), {"min_value": 2, "max_value": 60}),
    "spell_backward": Kind("spell_backward", _write_spell_backward, re.compile("[a-z]+"), {"max_word_len": 6}),
    "letter_counting": Kind(
        "letter_counting", _write_letter_counting, re.compile(r"[a-z0-9]+:\d+"), {"min_words": 2, "max_words": 4}
    ),
    "countdown": Kind(
        "countdown",
        _write_countdown,
        _STEP,
        {"min_numbers": 3, "max_numbers": 3, "max_value": 9, "min_target": 1, "max_target": 50},
    ),
}

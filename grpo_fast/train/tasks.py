"""Reasoning tasks with a verifier, a compact form and a worked chain of thought, on top of reasoning-gym.

Every task is an endless, deterministic sequence of problems, dealt into train, dev and test by a hash of the
problem itself: no problem of one split is ever in another, however often a small task repeats itself.
"""

from __future__ import annotations

import string
import zlib
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from grpo_fast.train.items import KINDS, solves_countdown

Split = Literal["train", "dev", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)

#: The names of the tasks.
TASKS: tuple[str, ...] = tuple(KINDS)

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
        self._write = KINDS[name].write
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
            return solves_countdown(answer, problem.entry)
        # Not "at least 1": partial credit for spelling is a sum of fractions, which can round above 1.
        return bool(self._dataset.score_answer(answer, problem.entry) == 1.0)

    def trace_words(self, text: str) -> list[bool]:
        """Tell which words of a thought are of the language that the task's worked traces are written in.

        Words stand between ``;``. One of the language is a step as the traces write it, right or wrong, such as
        ``1-5=-4``, or what the traces say beside steps (``wait``); for words see ``language_consistency_reward``.
        """
        return [KINDS[self.name].word.fullmatch(word) is not None for word in text.split(";")] if text else []

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
    if name not in KINDS:
        raise ValueError(f"name: got {name!r}, want one of {', '.join(TASKS)}")
    try:
        from reasoning_gym.factory import DATASETS, create_dataset
    except ImportError as error:
        raise ImportError("tasks need the package reasoning-gym: pip install 'grpo_fast[train]'") from error
    kind = KINDS[name]
    known = {field.name for field in fields(DATASETS[kind.dataset][1])} - {"size"}
    for key in overrides:
        if key not in known:
            raise ValueError(f"{key}: not a setting of task {name!r}, want one of {', '.join(sorted(known))}")
    try:
        dataset = create_dataset(kind.dataset, size=2**30, **{"seed": 0, **kind.settings, **overrides})
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

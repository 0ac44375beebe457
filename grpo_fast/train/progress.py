"""What a person at the terminal sees and does while a phase runs: a progress bar, Ctrl-C."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


@contextmanager
def progress(title: str, total: int, completed: int = 0, shown: bool = True) -> Iterator[Callable[[str], None]]:
    """A bar over ``total`` steps; calling what it yields takes one step and shows a text beside the bar."""
    columns = (
        TextColumn(f"{title:>10}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[text]}"),
    )
    with Progress(*columns, disable=not shown) as bar:
        task = bar.add_task(title, total=total, completed=completed, text="")
        yield lambda text: bar.update(task, advance=1, text=text)


@contextmanager
def stop_flag() -> Iterator[Callable[[], bool]]:
    """Tell whether Ctrl-C or SIGTERM came, so that a run ends after a whole step; a second one ends it at once."""
    received: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)

    previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)

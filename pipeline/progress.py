"""What the user sees of long work: a rich bar in a terminal, lines in a log. Text is never markup."""

import json
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from schemas.errors import printable

console = Console()
LOG_EVERY_SECONDS = 10


def say(text: str, style: str = "", aside: bool = False) -> None:
    """Print a line as it is: no markup, no wrapping, nothing that could drive the terminal.

    `aside` is for words that must not stand among data: they go to standard error.
    """
    chosen = Console(stderr=True) if aside else console
    chosen.print(Text(printable(text), style=style), highlight=False, soft_wrap=True)


class Bar:
    """One piece of long work; `update` takes the share done in [0, 1] and what to say beside the bar and below it."""

    def __init__(self, title: str, progress: "_Bar | None", silent: bool = False):
        self.title, self.progress, self.silent, self.spoken = title, progress, silent, time.monotonic()
        self.started, self.first = time.monotonic(), 0.0
        self.task = progress.add_task(printable(title), total=1.0, note="", left="") if progress else None

    def update(self, done: float, note: str, below: str = "", seconds_left: float | None = None) -> None:
        """Show how far the work is; without `seconds_left` the time left is what the pace since the start makes it."""
        now = time.monotonic()
        if not self.first:  # work that goes on from half its way did not get there in no time
            self.started, self.first = now, done
        if seconds_left is None and done > self.first:
            seconds_left = (now - self.started) * (1 - done) / (done - self.first)
        left = f"{timedelta(seconds=round(seconds_left))} left" if seconds_left is not None and done < 1 else ""
        if self.progress is not None and self.task is not None:
            self.progress.below = printable(below)
            self.progress.update(self.task, completed=done, note=printable(note), left=left)
        elif not self.silent and now - self.spoken > LOG_EVERY_SECONDS:
            self.spoken = now
            say(f"{self.title}: {done:.0%}, {', '.join(part for part in (note, below, left) if part)}")


class _Bar(Progress):
    """A bar with a line of text below it."""

    below = ""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        if self.below:
            yield Text(self.below, style="dim")


@contextmanager
def bar(title: str, show: bool = True) -> Iterator[Bar]:
    """A bar for as long as the work lasts; ranks other than the first show none."""
    if not show or not console.is_terminal:
        if show:
            say(f"{title} ...")
        yield Bar(title, None, silent=not show)
        return
    columns = (
        TextColumn("{task.description}", style="bold", markup=False),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TextColumn("{task.fields[note]}", markup=False),
        TimeElapsedColumn(),
        TextColumn("{task.fields[left]}", markup=False),
    )
    with _Bar(*columns, console=console) as progress:
        yield Bar(title, progress)


class JsonLines:
    """One JSON object a line on standard output, for programs that follow long work."""

    def __init__(self, every: float = LOG_EVERY_SECONDS):
        self.every, self.written = every, float("-inf")

    def write(self, event: str, figures: dict[str, Any], always: bool = False) -> None:
        """Write `figures` as they are now, at most once in `every` seconds unless `always`."""
        if always or time.monotonic() - self.written >= self.every:
            self.written = time.monotonic()
            sys.stdout.write(json.dumps({"event": event, "time": round(time.time(), 3)} | figures) + "\n")
            sys.stdout.flush()

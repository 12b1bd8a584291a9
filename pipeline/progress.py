"""Progress for long work: a rich bar in a terminal, a line every ten seconds in a log."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

console = Console()
LOG_EVERY_SECONDS = 10


class Bar:
    """One piece of long work; `update` takes the share done in [0, 1] and what to say beside the bar."""

    def __init__(self, title: str, progress: Progress | None, silent: bool = False):
        self.title, self.progress, self.silent, self.spoken = title, progress, silent, time.monotonic()
        self.started = time.monotonic()
        self.task = progress.add_task(title, total=1.0, note="") if progress else None

    def update(self, done: float, note: str) -> None:
        """Show how far the work is."""
        if self.progress is not None and self.task is not None:
            self.progress.update(self.task, completed=done, note=note)
        elif not self.silent and time.monotonic() - self.spoken > LOG_EVERY_SECONDS:
            self.spoken = time.monotonic()
            left = f", {(self.spoken - self.started) * (1 - done) / done:.0f} s left" if done else ""
            console.print(f"{self.title}: {done:.0%}, {note}{left}", highlight=False, soft_wrap=True)


@contextmanager
def bar(title: str, show: bool = True) -> Iterator[Bar]:
    """A bar for as long as the work lasts; ranks other than the first show none."""
    if not show or not console.is_terminal:
        if show:
            console.print(f"{title} ...", highlight=False)
        yield Bar(title, None, silent=not show)
        return
    columns = (TextColumn("[bold]{task.description:<22}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"),
               TextColumn("{task.fields[note]}"), TimeElapsedColumn(), TextColumn("ETA"), TimeRemainingColumn())  # fmt: skip
    with Progress(*columns, console=console) as progress:
        yield Bar(title, progress)

"""What the user sees of long work: a rich bar in a terminal, a line every ten seconds in a log. Text is never markup."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from schemas.errors import printable

console = Console()
LOG_EVERY_SECONDS = 10


def say(text: str, style: str = "") -> None:
    """Print a line as it is: no markup, no wrapping, nothing that could drive the terminal."""
    console.print(Text(printable(text), style=style), highlight=False, soft_wrap=True)


class Bar:
    """One piece of long work; `update` takes the share done in [0, 1] and what to say beside the bar."""

    def __init__(self, title: str, progress: Progress | None, silent: bool = False):
        self.title, self.progress, self.silent, self.spoken = title, progress, silent, time.monotonic()
        self.started = time.monotonic()
        self.task = progress.add_task(printable(title), total=1.0, note="") if progress else None

    def update(self, done: float, note: str) -> None:
        """Show how far the work is."""
        if self.progress is not None and self.task is not None:
            self.progress.update(self.task, completed=done, note=printable(note))
        elif not self.silent and time.monotonic() - self.spoken > LOG_EVERY_SECONDS:
            self.spoken = time.monotonic()
            left = f", {(self.spoken - self.started) * (1 - done) / done:.0f} s left" if done else ""
            say(f"{self.title}: {done:.0%}, {note}{left}")


@contextmanager
def bar(title: str, show: bool = True) -> Iterator[Bar]:
    """A bar for as long as the work lasts; ranks other than the first show none."""
    if not show or not console.is_terminal:
        if show:
            say(f"{title} ...")
        yield Bar(title, None, silent=not show)
        return
    columns = (
        TextColumn("{task.description:<22}", style="bold", markup=False),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TextColumn("{task.fields[note]}", markup=False),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        yield Bar(title, progress)

"""Decontamination: no run of 13 words of a held-out text stands in training text, the field's usual measure.

Words are what white space parts, in lower case. A text of fewer words counts as one run of its own length.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator

RUN_WORDS = 13


class HeldOut:
    """The runs of all held-out texts."""

    def __init__(self, texts: Iterable[str]):
        """Index `texts`; an empty one is left out."""
        self.runs: defaultdict[int, set[str]] = defaultdict(set)  # by their number of words
        for text in texts:
            size = min(RUN_WORDS, len(text.split()))
            if size:
                self.runs[size] |= set(_runs(text, size))

    def touches(self, text: str) -> bool:
        """Whether a run of a held-out text stands in `text`."""
        return any(not runs.isdisjoint(_runs(text, size)) for size, runs in self.runs.items())

    def without(self, texts: Iterable[str]) -> Iterator[str]:
        """Those texts that hold no run of a held-out one."""
        return (text for text in texts if not self.touches(text))


def _runs(text: str, size: int) -> Iterator[str]:
    words = text.lower().split()
    return (" ".join(words[start : start + size]) for start in range(len(words) - size + 1))

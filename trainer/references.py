"""Several references over one corpus: their score datasets joined window by window, so nothing is tokenised again."""

from collections.abc import Collection, Sequence
from dataclasses import replace

import numpy as np

from schemas.errors import UserError
from schemas.fingerprint import difference
from schemas.seal import digest
from schemas.shard import Window
from trainer.data import ScoreShards
from trainer.ranks import Ranks

SAME_PARTS = ("tokenizer", "context", "corpus")


class References:
    """Score datasets of one corpus as one: the first one's tokens in its order, and the mean of all their scores.

    Row groups are joined one by one as they are read: datasets cut the corpus at the same documents, if tokenizer,
    context and `score.unit_bytes` are the same, whatever made the scores.
    """

    def __init__(self, datasets: Sequence[ScoreShards]):
        """Match the row groups of the others to the first one's, by the input rows they were made from.

        Raises UserError naming what differs: a setting, the cut, or documents that one of them put into quarantine.
        """
        self.datasets = datasets
        first, *others = datasets
        self.group_sizes, self.tokens, self.conversations = first.group_sizes, first.tokens, first.conversations
        self.columns = frozenset.intersection(*(one.columns for one in datasets))
        self.scored_by = frozenset.union(*(one.scored_by for one in datasets))
        self.made_of = first.made_of
        self.fingerprint = digest([one.fingerprint for one in datasets])
        self.matches = [_match(first, other) for other in others]

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each window, int32 [windows]."""
        return self.datasets[0].lengths

    def valid(self, keys: np.ndarray) -> np.ndarray:
        """Tokens that count of the windows of these numbers."""
        return self.datasets[0].valid(keys)

    def index(self, ranks: Ranks) -> None:
        """Have the counts ready, the work shared out over the ranks."""
        self.datasets[0].index(ranks)

    def read(
        self, group: int, rows: Sequence[int] | None = None, columns: Collection[str] | None = None
    ) -> list[Window]:
        """The windows of one row group of the first dataset, or these `rows` of it.

        Raises UserError if another holds other tokens there.
        """
        first, *others = self.datasets
        windows = first.read(group, rows, columns)
        scored = [other.read(match[group], rows, columns) for other, match in zip(others, self.matches, strict=True)]
        for other, found in zip(others, scored, strict=True):
            for one, same in zip(windows, found, strict=True):
                if one.doc_id != same.doc_id or one.index != same.index or not np.array_equal(one.tokens, same.tokens):
                    raise UserError(
                        f"{other.root}: holds document {same.doc_id!r}, window {same.index}, where {first.root} holds"
                        f" document {one.doc_id!r}, window {one.index}, or other tokens of it",
                        "score the same corpus with the same tokenizer and context",
                    )
        return [_mean(together) for together in zip(windows, *scored, strict=True)]


def _match(first: ScoreShards, other: ScoreShards) -> list[int]:
    """For each row group of the first dataset the number of the other's that was made from the same input rows."""
    stored, current = ({part: one.dataset[part] for part in SAME_PARTS} for one in (first, other))
    changed = difference(stored, current)
    if changed:
        raise UserError(
            f"{other.root}: cannot stand beside {first.root}:\n  " + "\n  ".join(changed),
            "references of one run share tokenizer, context and corpus fields",
        )
    numbers = {(group.rows, group.index): number for number, group in enumerate(other.groups)}
    lacking = [group for group in first.groups if (group.rows, group.index) not in numbers]
    if lacking:
        raise UserError(
            f"{other.root}: has no scores of the rows of {lacking[0].path} ({len(lacking)} row groups in all)",
            "score the same files with the same score.unit_bytes, to the end",
        )
    found = [numbers[group.rows, group.index] for group in first.groups]
    for group, number in zip(first.groups, found, strict=True):
        if group.windows != other.groups[number].windows:
            raise UserError(
                f"{other.groups[number].path}: holds {other.groups[number].windows} windows in row group {group.index},"
                f" and {group.path} holds {group.windows}",
                "one of the two put documents into quarantine that the other scored: see their quarantine/ folders",
            )
    return found


def _mean(windows: Sequence[Window]) -> Window:
    """One window with the mean of what several references say of it: float32 nats."""

    def mean(name: str) -> np.ndarray | None:
        values = [getattr(window, name) for window in windows]
        return None if any(v is None for v in values) else np.stack(values).mean(0, dtype=np.float32)

    return replace(windows[0], ref_loss=mean("ref_loss"), ref_entropy=mean("ref_entropy"))

"""A source of made windows, and the order and the packing of steps written out plainly, one window at a time."""

from collections import deque

import numpy as np

from schemas.shard import Window
from trainer.ahead import Placed


class Made:
    """Windows held in memory in these groups."""

    scored_by, made_of, conversations = frozenset(), frozenset(), False

    def __init__(self, groups, columns=("ref_loss",), fingerprint="made"):
        self.groups, self.columns, self.fingerprint = groups, frozenset(columns), fingerprint
        self.group_sizes = np.array([len(group) for group in groups], dtype=np.int64)
        self.lengths = np.array([len(window.tokens) for group in groups for window in group], dtype=np.int32)
        self.counted = np.array([window.valid for group in groups for window in group], dtype=np.int32)
        self.tokens = int(self.lengths.sum())
        self.reads = []  # the group and the number of its windows of each call

    def valid(self, keys):
        return self.counted[keys]

    def index(self, ranks):
        pass

    def read(self, group, rows=None, columns=None):
        rows = range(len(self.groups[group])) if rows is None else rows
        self.reads.append((group, len(rows)))
        return [self.groups[group][row] for row in rows]


def made(lengths, size=3, seed=0, **fields):
    """Windows of these lengths, `size` a group, of random tokens and losses."""
    rng = np.random.default_rng(seed)
    windows = [window(rng, length, f"{seed}-{number}") for number, length in enumerate(lengths)]
    return Made([windows[start : start + size] for start in range(0, len(windows), size)], **fields)


def window(rng, length, doc_id="#"):
    losses = rng.normal(size=length).astype(np.float16)
    losses[0] = np.nan
    return Window(doc_id=doc_id, index=0, tokens=rng.integers(2, 512, length), ref_loss=losses)


def of_all(source):
    """Every window of a source by its key."""
    return [window for group in range(len(source.group_sizes)) for window in source.read(group)]


def spread_out(source, stretches):
    """The windows of stretches one by one."""
    windows = of_all(source)
    for stretch in stretches:
        for epoch, key in zip(stretch.epochs.tolist(), stretch.keys.tolist(), strict=True):
            yield Placed(epoch, key, windows[key])


def plainly_ordered(source, seed, shuffle_groups, position):
    """Windows from `position` on, without end: (epoch, key), each block read whole, as releases before this one did."""
    total = int(source.group_sizes.sum())
    first_key = [0, *np.cumsum(source.group_sizes).tolist()]
    while True:
        epoch, offset = divmod(position, total)
        rng = np.random.default_rng([seed, epoch])
        groups = rng.permutation(len(source.group_sizes))
        for start in range(0, len(groups), shuffle_groups):
            block = groups[start : start + shuffle_groups]
            shuffle = rng.permutation(int(source.group_sizes[block].sum()))
            keys = [key for group in block for key in range(first_key[group], first_key[group + 1])]
            for index in shuffle:
                if offset > 0:
                    offset -= 1
                    continue
                yield epoch, keys[index]
                position += 1


def plainly_packed(windows, lengths, rows, row_tokens, alone=False):
    """Steps of (epoch, key) windows: rows of such, the first row with room first, until the next one fits nowhere."""
    windows, waiting, taken = iter(windows), deque(), 0
    while True:
        step = [[] for _ in range(rows)]
        while True:
            place = waiting.popleft() if waiting else next(windows)
            free = [row for row in step if row_tokens - sum(lengths[key] for _, key in row) >= lengths[place[1]]]
            free = [row for row in free if not (alone and row)]
            if not free:
                waiting.append(place)
                break
            free[0].append(place)
            taken += 1
        yield step, taken

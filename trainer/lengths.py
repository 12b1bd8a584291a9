"""The index of a dataset: how many tokens each of its windows has, and how many count: all that a step is planned from.

Parquet keeps no lengths of its own: they are read once off the shards and stored beside them, in a file that may be
deleted.
"""

from collections.abc import Callable, Iterator
from contextlib import suppress

import numpy as np
import torch
import xxhash

from schemas.errors import UserError
from schemas.place import Place, open_store
from trainer.ranks import Ranks

NAME = ".lengths"
DIGEST_BYTES = 16


def indexed(
    root: Place,
    fingerprint: str,
    group_sizes: np.ndarray,
    counts_of: Callable[[int, int], Iterator[np.ndarray]],
    ranks: Ranks,
    kinds: int = 1,
) -> np.ndarray:
    """Tokens of each window of the dataset at `root`, in stored order: int32 [kinds, windows].

    kinds: 1, or 2 where a second row holds those that are trained on. counts_of: the same of row groups from the first
    to the second number, in parts. What is stored is taken if every rank finds it whole and made from this very dataset;
    else each rank reads its share of the groups, and the first one stores them all, if the place can be written to.
    """
    windows = int(group_sizes.sum())
    found = stored(root, fingerprint, windows, kinds)
    lacking = ranks.greatest(int(found is None))
    if found is not None and not lacking:
        return found
    edges = [len(group_sizes) * rank // ranks.world for rank in range(ranks.world + 1)]
    own = np.concatenate([np.empty((kinds, 0), np.int32), *counts_of(edges[ranks.rank], edges[ranks.rank + 1])], axis=1)
    sizes = [int(group_sizes[start:end].sum()) for start, end in zip(edges, edges[1:], strict=False)]
    padded = torch.zeros(kinds, max(sizes), dtype=torch.int32)
    padded[:, : own.shape[1]] = torch.from_numpy(own)
    every = ranks.gather(padded.flatten().to(ranks.device)).cpu().numpy().reshape(ranks.world, kinds, -1)
    counts = np.concatenate([part[:, :size] for part, size in zip(every, sizes, strict=True)], axis=1)
    if ranks.first:
        with suppress(OSError, UserError):  # a place that is only read: they are read off the shards each time
            write(root, fingerprint, counts)
    return counts


def write(root: Place, fingerprint: str, counts: np.ndarray) -> None:
    """Store the index of the dataset of this fingerprint beside it."""
    content = counts.astype("<u4").tobytes()
    open_store(root).put(NAME, _digest(fingerprint, content) + content)


def stored(root: Place, fingerprint: str, windows: int, kinds: int) -> np.ndarray | None:
    """What is stored, int32 [kinds, windows]; None if it is damaged, or of another dataset."""
    try:
        content = (root / NAME).read_bytes()
    except OSError:
        return None
    digest, counts = content[:DIGEST_BYTES], content[DIGEST_BYTES:]
    whole = len(counts) == 4 * windows * kinds and digest == _digest(fingerprint, counts)
    return np.frombuffer(counts, "<u4").astype(np.int32).reshape(kinds, windows) if whole else None


def _digest(fingerprint: str, counts: bytes) -> bytes:
    return xxhash.xxh3_128_digest(fingerprint.encode() + counts)

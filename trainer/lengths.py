"""The index of a dataset: how many tokens each of its windows has, all that a step is packed from.

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
    lengths_of: Callable[[int, int], Iterator[np.ndarray]],
    ranks: Ranks,
) -> np.ndarray:
    """Tokens of each window of the dataset at `root`, int32 [windows], in stored order.

    lengths_of: those of row groups from the first to the second number, in parts. What is stored is taken if every rank
    finds it whole and made from this very dataset; else each rank reads its share of the groups, and the first one
    stores them all, if the place can be written to.
    """
    windows = int(group_sizes.sum())
    found = stored(root, fingerprint, windows)
    lacking = ranks.greatest(int(found is None))
    if found is not None and not lacking:
        return found
    edges = [len(group_sizes) * rank // ranks.world for rank in range(ranks.world + 1)]
    own = np.concatenate([np.empty(0, np.int32), *lengths_of(edges[ranks.rank], edges[ranks.rank + 1])])
    sizes = [int(group_sizes[start:end].sum()) for start, end in zip(edges, edges[1:], strict=False)]
    padded = torch.zeros(max(sizes), dtype=torch.int32)
    padded[: len(own)] = torch.from_numpy(own)
    every = ranks.gather(padded.to(ranks.device)).cpu().numpy()
    lengths = np.concatenate([part[:size] for part, size in zip(every, sizes, strict=True)])
    if ranks.first:
        with suppress(OSError, UserError):  # a place that is only read: they are read off the shards each time
            write(root, fingerprint, lengths)
    return lengths


def write(root: Place, fingerprint: str, lengths: np.ndarray) -> None:
    """Store the lengths of the dataset of this fingerprint beside it."""
    content = lengths.astype("<u4").tobytes()
    open_store(root).put(NAME, _digest(fingerprint, content) + content)


def stored(root: Place, fingerprint: str, windows: int) -> np.ndarray | None:
    """What is stored, int32 [windows]; None if it is damaged, or of another dataset."""
    try:
        content = (root / NAME).read_bytes()
    except OSError:
        return None
    digest, lengths = content[:DIGEST_BYTES], content[DIGEST_BYTES:]
    whole = len(lengths) == 4 * windows and digest == _digest(fingerprint, lengths)
    return np.frombuffer(lengths, "<u4").astype(np.int32) if whole else None


def _digest(fingerprint: str, lengths: bytes) -> bytes:
    return xxhash.xxh3_128_digest(fingerprint.encode() + lengths)

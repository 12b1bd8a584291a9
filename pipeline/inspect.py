"""Inspection: what a score dataset or shard holds, for eyes: fingerprints, counts, losses, coloured documents."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby, islice
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from pipeline.progress import console as default_console
from schemas.errors import printable
from schemas.place import Place
from schemas.receipt import HISTOGRAM_EDGES_NATS, Layout, read_dataset, read_receipts
from schemas.shard import Window, open_shard, read_group, shard_metadata

# Green over yellow to red, one for each bin of HISTOGRAM_EDGES_NATS; black text is readable on all of them.
COLOURS = ("#5fbf77", "#7fc97a", "#a3d37c", "#c8dc7e", "#e8e07f", "#f2c772", "#f2a765", "#ee8560", "#e8635c")
BAR_WIDTH = 40
SHOWN_TOKENS = 1024
HASH_LENGTH = 24
PARTIAL = "▪"


@dataclass(frozen=True, slots=True)
class Summary:
    """Counts of a dataset or shard; bytes are those of the shards, losses are in nats, None is unknown."""

    units: int
    documents: int
    windows: int
    tokens: int
    quarantined: int | None
    bytes: int
    loss_sum: float
    loss_count: int
    histogram: list[int]


def inspect(path: Place, tokenizer: Any = None, documents: int = 3, console: Console | None = None) -> None:
    """Print what a score dataset folder or a lone score shard holds, then `documents` coloured documents,
    each as far as its first 1,024 tokens.

    Without a `tokenizer` tokens are shown as ids. Raises UserError if `path` is neither a dataset nor a shard.
    """
    console = console or default_console
    if path.is_dir():
        layout = Layout(path)
        fingerprint = read_dataset(layout)
        summary, shards = _of_dataset(layout)
    else:
        fingerprint = shard_metadata(path, open_shard(path)).fingerprint
        summary, shards = _of_shard(path), [path]
    console.print(_tree(str(path), fingerprint), _counts(summary))
    if summary.loss_count:
        console.print(_histogram(summary))
    for doc_id, windows in islice(_documents(shards), documents):
        console.print(_coloured(doc_id, windows, tokenizer), soft_wrap=True)


def spell(tokenizer: Any, ids: list[int]) -> list[str]:
    """The text of each token by itself, spaces kept, control characters replaced.

    Tokens that hold only a part of a character are `▪`, but the last of them shows what they spell together.
    """
    anchor = tokenizer("a", add_special_tokens=False)["input_ids"][-1:]  # a first token would lose its space
    alone = len(_decode(tokenizer, anchor))
    pieces = [_decode(tokenizer, [*anchor, token])[alone:] for token in ids]
    spelt: list[str] = []
    for partial, group in groupby(zip(ids, pieces, strict=True), key=lambda pair: "\ufffd" in pair[1]):
        run = list(group)
        if partial:
            together = _decode(tokenizer, [*anchor, *(token for token, _ in run)])[alone:]
            spelt += [PARTIAL] * (len(run) - 1) + [together]
        else:
            spelt += [piece for _, piece in run]
    return [printable(piece) for piece in spelt]


def _decode(tokenizer: Any, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def _of_dataset(layout: Layout) -> tuple[Summary, list[Place]]:
    receipts = read_receipts(layout)

    def total(name: str) -> Any:
        return sum(getattr(receipt, name) for receipt in receipts.values())

    counts = [receipt.loss_histogram for receipt in receipts.values()] or [[0] * len(HISTOGRAM_EDGES_NATS)]
    names = ("documents", "windows", "tokens", "quarantined", "bytes", "loss_sum", "loss_count")
    named = dict(zip(names, (total(name) for name in names), strict=True))
    summary = Summary(units=len(receipts), **named, histogram=np.sum(counts, axis=0).tolist())
    return summary, [layout.shard(unit) for unit in receipts]


def _of_shard(path: Place) -> Summary:
    documents = windows = tokens = count = 0
    loss_sum, histogram = 0.0, np.zeros(len(HISTOGRAM_EDGES_NATS), dtype=np.int64)
    for window in _windows(path):
        losses = np.empty(0) if window.ref_loss is None else window.ref_loss[1:].astype(np.float64)
        losses = losses[np.isfinite(losses)]
        documents += window.index == 0
        windows += 1
        tokens += len(window.tokens)
        count += len(losses)
        loss_sum += float(losses.sum())
        histogram += np.histogram(losses, [*HISTOGRAM_EDGES_NATS, np.inf])[0]
    return Summary(
        units=1,
        documents=documents,
        windows=windows,
        tokens=tokens,
        quarantined=None,
        bytes=path.stat().st_size,
        loss_sum=loss_sum,
        loss_count=count,
        histogram=histogram.tolist(),
    )


def _windows(path: Place) -> Iterator[Window]:
    file = open_shard(path)
    for group in range(file.num_row_groups):
        yield from read_group(path, file, group)


def _documents(shards: list[Place]) -> Iterator[tuple[str, list[Window]]]:
    for shard in shards:
        document: list[Window] = []
        for window in _windows(shard):
            if window.index == 0 and document:  # ids need not be unique, but every document begins with window 0
                yield document[0].doc_id, document
                document = []
            document.append(window)
        if document:
            yield document[0].doc_id, document


def _tree(title: str, values: dict[str, Any], tree: Tree | None = None) -> Tree:
    tree = tree or Tree(Text(printable(title), style="bold"))
    for key, value in values.items():
        if isinstance(value, dict):
            _tree(key, value, tree.add(Text(printable(key), style="bold")))
        else:
            key, text = printable(key), printable(str(value))
            short = text if len(text) <= HASH_LENGTH else text[:12] + "…"
            tree.add(Text.assemble((f"{key} ", "dim"), short))
    return tree


def _counts(summary: Summary) -> Table:
    table = Table(box=None, show_header=False)
    for name in ("units", "documents", "windows", "tokens", "quarantined", "bytes"):
        value = getattr(summary, name)
        table.add_row(name, "-" if value is None else f"{value:,}")
    if summary.tokens:
        table.add_row("bytes/token", f"{summary.bytes / summary.tokens:.2f}")
    if summary.loss_count:
        table.add_row("mean reference loss", f"{summary.loss_sum / summary.loss_count:.3f} nats")
    return table


def _histogram(summary: Summary) -> Table:
    """Bars of the reference losses; their colours are the legend of the documents."""
    table = Table("reference loss (nats)", "tokens", "share", title="token colours", title_justify="left", box=None)
    most = max(1, *summary.histogram)
    for label, count, colour in zip(_labels(), summary.histogram, COLOURS, strict=True):
        width = round(BAR_WIDTH * count / most) or bool(count)
        share = f"{count / summary.loss_count:.1%}"
        table.add_row(
            Text(label, style=f"black on {colour}"), f"{count:,}", Text(f"{'█' * width} {share}", style=colour)
        )
    return table


def _labels() -> list[str]:
    edges = HISTOGRAM_EDGES_NATS
    return [f"{low:g} to {high:g}" for low, high in zip(edges, edges[1:], strict=False)] + [f"{edges[-1]:g} and more"]


def _coloured(doc_id: str, windows: list[Window], tokenizer: Any) -> Text:
    text = Text.assemble("\n", (printable(doc_id), "bold"), f" ({len(windows)} windows)\n")
    left = SHOWN_TOKENS
    for window in windows:
        ids = window.tokens[:left].tolist()
        left -= len(ids)
        words = spell(tokenizer, ids) if tokenizer else [f"{token} " for token in ids]
        losses = np.full(len(ids), np.nan) if window.ref_loss is None else window.ref_loss[: len(ids)]
        for word, loss in zip(words, losses, strict=True):
            bin_ = int(np.searchsorted(HISTOGRAM_EDGES_NATS, max(float(loss), 0.0), side="right")) - 1
            text.append(word, style="dim" if np.isnan(loss) else f"black on {COLOURS[bin_]}")
    hidden = sum(len(window.tokens) for window in windows) - SHOWN_TOKENS
    return text.append(f"\n… {hidden:,} more tokens", style="dim") if hidden > 0 else text

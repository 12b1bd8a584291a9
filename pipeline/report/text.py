"""The report's text: a few windows of the corpus, judged by the trained model beside the stored reference losses."""

from dataclasses import replace
from itertools import groupby, islice

import numpy as np
import torch

from pipeline.inspect import spell
from pipeline.report.page import Token
from schemas.batch import collate
from schemas.config import Config
from schemas.loss import batch_losses
from schemas.models import open_model, open_tokenizer
from schemas.place import Place
from schemas.receipt import Layout, read_receipts
from schemas.shard import Window, open_shard, read_group
from trainer.selection import select_top

SHOWN_WINDOWS, SHOWN_TOKENS, FEWEST_TOKENS = 8, 384, 24


def chosen_windows(scores: Place) -> list[Window]:
    """The middle windows of the first documents of the first shards: the same at every call, cut to what a page shows.

    Middles, because a web page begins and ends with its menus.
    """
    layout = Layout(scores)
    by_shard: list[list[Window]] = []
    for unit in list(read_receipts(layout))[:SHOWN_WINDOWS]:
        path = layout.shard(unit)
        file = open_shard(path)
        rows = read_group(path, file, 0) if file.metadata.num_row_groups else []
        documents = (list(group) for _, group in groupby(rows, key=lambda row: row.doc_id))
        middles = (windows[len(windows) // 2] for windows in documents)
        by_shard.append(list(islice((row for row in middles if len(row.tokens) >= FEWEST_TOKENS), SHOWN_WINDOWS)))
    turns = [rows[turn] for turn in range(SHOWN_WINDOWS) for rows in by_shard if turn < len(rows)]
    return [
        replace(
            row,
            tokens=row.tokens[:SHOWN_TOKENS],
            ref_loss=row.ref_loss[:SHOWN_TOKENS],  # type: ignore[index]
            ref_entropy=None,
            trained=None if row.trained is None else row.trained[:SHOWN_TOKENS],
        )
        for row in turns[:SHOWN_WINDOWS]
    ]


@torch.no_grad()
def judge_documents(config: Config) -> list[tuple[str, list[Token]]]:
    """Some windows with the final SLM model's losses beside the stored ones, kept tokens marked among all of them.

    None where several references are averaged: no one of them is what was ranked by.
    """
    first, *others = config.parts[0].scores
    folder, windows = config.train.output / "slm" / "final", [] if others else chosen_windows(first)
    if not windows:
        return []
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, config.train.dtype) if device == "cuda" else torch.float32
    model = open_model(folder, "slm", config.context.window, dtype=dtype, device=device)
    tokenizer, lengths = open_tokenizer(folder, "slm"), [len(window.tokens) for window in windows]
    rows, trained = model.rows(lengths, max(lengths)), [window.trained for window in windows]
    batch = collate([window.tokens for window in windows], rows, trained=trained).to(device)
    live = batch.gather(batch_losses(model, batch).loss)
    reference = [window.ref_loss.astype(np.float32) for window in windows]  # type: ignore[union-attr]
    excess = torch.from_numpy(np.concatenate(live) - np.concatenate(reference))
    kept = np.split(select_top(excess, config.train.keep).numpy(), np.cumsum(lengths)[:-1])
    judged = []
    for window, *columns in zip(windows, live, reference, kept, strict=True):
        words = [word.replace("\n", "↵\n") for word in spell(tokenizer, window.tokens.tolist())]
        values = (column.tolist() for column in columns)
        judged.append(
            (f"{window.doc_id}, window {window.index}", [Token(*token) for token in zip(words, *values, strict=True)])
        )
    return judged

"""Held-out rows: read from JSON lines, tokenised once, judged by any live model."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from schemas.batch import IGNORE
from schemas.config import Context
from schemas.errors import UserError, first_line
from trainer.live import Live, choose_none


class Continuations:
    """Texts that follow prompts, as windows of at most `context.window` tokens, BOS first if `context` says so.

    judged: numbers of the pairs that have a token to predict within the window. cut: numbers of those that do not fit.
    """

    def __init__(self, pairs: Sequence[tuple[str, str]], tokenizer: Any, context: Context, batch_tokens: int):
        """Tokenise (prompt, text) pairs, each part by itself."""
        head = [tokenizer.bos_token_id] if context.bos else []
        self.window, self.batch_tokens = context.window, max(context.window, batch_tokens)
        self.windows: dict[int, np.ndarray] = {}
        self.starts: dict[int, int] = {}  # where the tokens begin that are judged
        self.cut: set[int] = set()
        for number, (prompt, text) in enumerate(pairs):
            before = head + tokenizer(prompt, add_special_tokens=False)["input_ids"]
            tokens = before + tokenizer(text, add_special_tokens=False)["input_ids"]
            start = max(1, len(before))
            if len(tokens) > context.window:
                self.cut.add(number)
            if start < min(len(tokens), context.window):
                self.windows[number] = np.array(tokens[: context.window], dtype=np.int64)
                self.starts[number] = start

    def texts(self) -> list[list[int]]:
        """The tokens that are judged, pair by pair."""
        return [window[self.starts[number] :].tolist() for number, window in self.windows.items()]

    def losses(self, live: Live) -> dict[int, np.ndarray]:
        """Float32 nats of the tokens of each text, given the prompt and the text before them."""
        judged = [np.arange(len(window)) >= self.starts[number] for number, window in self.windows.items()]
        found = judged_losses(live, list(self.windows.values()), judged, self.window, self.batch_tokens)
        return dict(zip(self.windows, found, strict=True))


@torch.no_grad()
def judged_losses(
    live: Live, windows: Sequence[np.ndarray], judged: Sequence[np.ndarray], longest: int, batch_tokens: int
) -> list[np.ndarray]:
    """Float32 nats of some tokens of each window, given all before them.

    windows: token ids, none longer than `longest`. judged: masks of the windows, false at their first tokens.
    """
    device = next(live.parameters()).device
    found = [np.empty(0, np.float32)] * len(windows)
    for indices, batch in live.opened.collated(windows, longest, batch_tokens):
        for index, place in zip(indices, batch.places, strict=True):
            rest = torch.from_numpy(~judged[index][1:])  # a target is the token after its place
            batch.targets[place.row, place.start : place.start + len(rest)][rest] = IGNORE
        losses = batch.gather(live(batch.to(device), choose_none).losses)
        for index, values in zip(indices, losses, strict=True):
            found[index] = values[judged[index]]
    return found


def read_rows(path: Path, field: str, keys: tuple[str, ...], more: tuple[str, ...] = ()) -> list[dict[str, Any]]:
    """JSON lines that all have `keys`; of `more` what there is. Raises UserError naming file and line."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{field}: {path} cannot be read ({first_line(error)})", "mend the path or the file") from error
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            rows.append({key: row[key] for key in keys} | {key: row[key] for key in more if key in row})
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{path}:{number}: not a JSON object with {', '.join(keys)} ({first_line(error)})", f"mend {field}"
            ) from error
    return rows

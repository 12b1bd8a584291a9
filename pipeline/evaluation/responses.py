"""Held-out conversations: the loss of what the assistant says in them, as fine-tuning trains on it."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.evaluation.heldout import read_rows
from schemas.config import Config
from schemas.conversation import TURN_COLUMNS, Piece, encode_conversation, read_messages, templated
from schemas.errors import UserError
from trainer.live import Live, choose_none


class ResponseLoss:
    """Mean loss of the assistant's tokens in held-out conversations; tokenised once, then called on any live model."""

    name = "response"

    def __init__(self, path: Path, tokenizer: Any, config: Config):
        """Read JSON lines of {messages}, the column that `corpus.messages` names, rendered by its template.

        Raises UserError, naming the line, for one that cannot be rendered.
        """
        column = config.corpus.messages
        if column is None:
            raise UserError("eval.conversations: there is no corpus.messages", "name the column of messages there")
        templated(tokenizer, config.corpus)
        self.pieces: list[Piece] = []
        for number, row in enumerate(read_rows(path, "eval.conversations", (), (column, *TURN_COLUMNS)), 1):
            messages = read_messages(row, column)
            window = config.context.window
            found = messages if isinstance(messages, str) else encode_conversation(tokenizer, messages, window)
            if isinstance(found, str):
                raise UserError(f"{path}:{number}: {found}", "mend eval.conversations")
            self.pieces += found
        self.window, self.batch_tokens = config.context.window, max(config.context.window, config.eval.batch_tokens)

    @torch.no_grad()
    def __call__(self, live: Live) -> dict[str, float]:
        """`response_loss` in nats/token."""
        device, judged = next(live.parameters()).device, list[np.ndarray]()
        windows = [piece.tokens for piece in self.pieces]
        for numbers, batch in live.opened.collated(windows, self.window, self.batch_tokens):
            found = batch.gather(live(batch.to(device), choose_none).losses)
            judged += [losses[self.pieces[n].trained] for n, losses in zip(numbers, found, strict=True)]
        losses = np.concatenate(judged)
        return {"response_loss": float(losses.sum(dtype=np.float64)) / len(losses)}

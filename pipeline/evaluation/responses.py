"""Held-out conversations: the loss of what the assistant says in them, as fine-tuning trains on it."""

from pathlib import Path
from typing import Any

import numpy as np

from pipeline.evaluation.heldout import judged_losses, read_rows
from schemas.config import Config
from schemas.conversation import TURN_COLUMNS, encode_conversation, read_messages, templated
from schemas.errors import UserError
from trainer.live import Live


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
        self.windows, self.judged = list[np.ndarray](), list[np.ndarray]()
        for number, row in enumerate(read_rows(path, "eval.conversations", (), (column, *TURN_COLUMNS)), 1):
            messages = read_messages(row, column)
            window = config.context.window
            found = messages if isinstance(messages, str) else encode_conversation(tokenizer, messages, window)
            if isinstance(found, str):
                raise UserError(f"{path}:{number}: {found}", "mend eval.conversations")
            self.windows += [piece.tokens for piece in found]
            self.judged += [piece.trained for piece in found if piece.trained is not None]  # conversations' all have it
        self.window, self.batch_tokens = config.context.window, max(config.context.window, config.eval.batch_tokens)

    def __call__(self, live: Live) -> dict[str, float]:
        """`response_loss` in nats/token."""
        losses = np.concatenate(judged_losses(live, self.windows, self.judged, self.window, self.batch_tokens))
        return {"response_loss": float(losses.sum(dtype=np.float64)) / len(losses)}

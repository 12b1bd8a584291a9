"""Accuracy by likelihood: is the right answer to a problem more likely than its distractors?

A small model never writes a right answer, and still it may prefer one. Two counts, as the field reports them: `acc` ranks
answers by their summed log-likelihood, which is how likely the model is to say them, `acc_norm` by the mean of a token,
which does not favour short ones.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.evaluation.heldout import Continuations, read_rows
from schemas.config import Context
from schemas.errors import UserError
from trainer.live import Live


class Ranking:
    """Problems with answers to choose from; tokenised once, then called on any live model."""

    def __init__(self, path: Path, tokenizer: Any, context: Context, batch_tokens: int):
        """Read JSON lines of {prompt, choices, right}: `right` is the right choice's number, from 0.

        Problems of one `template`, where rows name it, count as one draw in the standard error: they are much alike.
        Problems of which a choice does not fit into `context.window` are left out. Raises UserError, naming the line, for
        one that has fewer than two choices, two equal ones, or no right one; and if none is left.
        """
        rows = read_rows(path, "eval.choices", ("prompt", "choices", "right"), ("template",))
        for number, row in enumerate(rows, 1):
            if reason := wrong(row["choices"], row["right"]):
                raise UserError(f"{path}:{number}: {reason}", "mend eval.choices")
        pairs = [(row["prompt"], choice) for row in rows for choice in row["choices"]]
        self.answers = Continuations(pairs, tokenizer, context, batch_tokens)
        ends = np.cumsum([len(row["choices"]) for row in rows])
        fit = self.answers.windows.keys() - self.answers.cut
        self.problems: list[tuple[range, int]] = []
        self.clusters: list[str] = []
        for number, (end, row) in enumerate(zip(ends.tolist(), rows, strict=True)):
            group = range(end - len(row["choices"]), end)
            if fit.issuperset(group):
                self.problems.append((group, row["right"]))
                self.clusters.append(f"template {row['template']}" if "template" in row else f"row {number}")
        if not self.problems:
            raise UserError(
                f"eval.choices: {path} has no problem that fits in context.window ({context.window})",
                "raise the window",
            )

    def __call__(self, live: Live) -> dict[str, float]:
        """Shares of problems in [0, 1], the standard error of each, what guessing would give, and how many problems."""
        losses = self.answers.losses(live)
        found = np.array([preferred([losses[number] for number in group], right) for group, right in self.problems])
        shares, errors = found.mean(0), standard_errors(found, self.clusters)
        return {
            "acc": float(shares[0]),
            "acc_stderr": float(errors[0]),
            "acc_norm": float(shares[1]),
            "acc_norm_stderr": float(errors[1]),
            "chance": float(np.mean([1 / len(group) for group, _ in self.problems])),
            "ranked": len(self.problems),
        }


def standard_errors(found: np.ndarray, clusters: Sequence[str]) -> np.ndarray:
    """Standard errors of the means of `found` [n, k], rows of one cluster taken together (Liang and Zeger's, 1986).

    Without clusters of several rows it is the binomial law's sqrt(p (1 - p) / n).
    """
    names = np.unique(clusters, return_inverse=True)[1]
    sums = np.zeros((names.max() + 1, found.shape[1]))
    np.add.at(sums, names, found - found.mean(0))
    return np.sqrt((sums**2).sum(0)) / len(found)


def preferred(losses: Sequence[np.ndarray], right: int) -> tuple[bool, bool]:
    """Whether the right answer is the likeliest, by sum and by mean; `losses` [tokens] of each answer, nats.

    An answer that is no likelier than another was not preferred to it.
    """
    measures = np.array([(values.sum(dtype=np.float64), values.mean(dtype=np.float64)) for values in losses])
    others = np.delete(measures, right, axis=0)
    by_sum, by_mean = (measures[right] < others.min(0)).tolist()
    return by_sum, by_mean


def wrong(choices: Any, right: Any) -> str | None:
    """What is wrong with a problem, or None."""
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(one, str) for one in choices):
        return "`choices` must be two texts or more"
    if len({*choices}) < len(choices):
        return "two of `choices` are equal"
    if type(right) is not int or not 0 <= right < len(choices):
        return f"`right` must be the number of one of the {len(choices)} choices, from 0"
    return None

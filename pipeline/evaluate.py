"""Held-out evaluation of any checkpoint: loss on target-domain text; on problems, exact match and ranking of answers.

Full-token perplexity gets worse under selective training by design, so nothing is measured on the corpus.
"""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table

from pipeline.generate import Generator, HuggingFace
from pipeline.grading import final_answer, same_answer
from pipeline.heldout import Continuations, read_rows
from pipeline.progress import bar, console
from pipeline.ranking import Ranking
from pipeline.responses import ResponseLoss
from schemas.config import Config, Context
from schemas.errors import UserError
from schemas.models import local_model, open_model, open_tokenizer, positions
from schemas.store import write_atomic
from trainer.export import as_model
from trainer.live import Live

NEXT_PROBLEM = "\nProblem:"  # base models go on to pose one
FIGURES = "evaluation.json"  # in train.output


class TargetLoss:
    """Mean loss of held-out texts given their prompts; tokenised once, then called on any live model."""

    def __init__(self, path: Path, tokenizer: Any, context: Context, batch_tokens: int, name: str = "target"):
        """Read JSON lines of {prompt, text}; tokens beyond `context.window` are not judged. `name`: the field of `eval`."""
        self.name = name
        pairs = [(row["prompt"], row["text"]) for row in read_rows(path, f"eval.{name}", ("prompt", "text"))]
        self.texts = Continuations(pairs, tokenizer, context, batch_tokens)
        self.bytes = sum(len(tokenizer.decode(text).encode()) for text in self.texts.texts())
        if not self.texts.windows:
            raise UserError(
                f"eval.{name}: {path} has no row that fits in context.window ({context.window})", "raise the window"
            )

    def __call__(self, live: Live) -> dict[str, float]:
        """`<name>_loss` in nats/token and `<name>_bits_per_byte`."""
        losses = np.concatenate(list(self.texts.losses(live).values()))
        nats = float(losses.sum(dtype=np.float64))
        return {
            f"{self.name}_loss": nats / len(losses),
            f"{self.name}_bits_per_byte": nats / math.log(2) / self.bytes,
        }


class HeldOutLosses:
    """`TargetLoss` of each held-out set that the config names; no figures if it names none."""

    def __init__(self, config: Config, tokenizer: Any):
        named = {"target": config.eval.target, "validation": config.eval.validation}
        self.sets: list[TargetLoss | ResponseLoss] = [
            TargetLoss(path, tokenizer, config.context, config.eval.batch_tokens, name)
            for name, path in named.items()
            if path
        ]
        if config.eval.conversations:
            self.sets.append(ResponseLoss(config.eval.conversations, tokenizer, config))

    def __call__(self, live: Live) -> dict[str, float]:
        """The figures of all sets."""
        return {name: value for one in self.sets for name, value in one(live).items()}


def exact_match(generator: Generator, config: Config) -> dict[str, float]:
    """Share of held-out problems whose greedy answer ends in the right value, and how many were asked."""
    problems = read_rows(config.eval.problems or Path(), "eval.problems", ("prompt", "answer"))
    texts = generator.complete([row["prompt"] for row in problems], [NEXT_PROBLEM], config.eval.new_tokens)
    right = sum(same_answer(final_answer(text), str(row["answer"])) for text, row in zip(texts, problems, strict=True))
    return {"exact_match": right / max(1, len(problems)), "problems": len(problems)}


def evaluate_models(config: Config, models: list[str], show: bool = True) -> list[dict[str, Any]]:
    """Figures of models; without names, of the base, the reference and every finished arm.

    Then they are also kept in `train.output`, for the report. `show`: progress is shown.
    """
    if not (config.eval.target or config.eval.conversations or config.eval.problems or config.eval.choices):
        raise UserError("field `eval`: nothing to evaluate on", "give eval.target, eval.problems or eval.choices")
    rows = []
    with bar("evaluate", show) as progress:
        chosen = chosen_models(config, models)
        for number, name in enumerate(chosen):
            progress.update(number / len(chosen), name)
            with as_model(local_model(name)) as folder:
                rows.append({"model": name, **evaluate_model(config, folder)})
    if not models:
        write_atomic(config.train.output / FIGURES, (json.dumps(rows, indent=1) + "\n").encode())
    return rows


def chosen_models(config: Config, models: list[str]) -> list[str]:
    """The models named; without names the base, the reference and every finished arm."""
    arms = sorted(str(path.parent) for path in config.train.output.glob("*/final/config.json"))
    return models or [config.base, config.score.model, *arms]


def print_figures(rows: list[dict[str, Any]]) -> None:
    """The figures of models as a table."""
    table = Table("model", "nats/token", "bits/byte", "exact match", "acc", "acc_norm")
    for row in rows:
        table.add_row(row["model"], f"{row.get('target_loss', float('nan')):.3f}",
                      f"{row.get('target_bits_per_byte', float('nan')):.3f}", *on_problems(row))  # fmt: skip
    console.print(table)
    if any("acc" in row for row in rows):
        row = next(row for row in rows if "acc" in row)
        console.print(
            f"acc: the right answer is likelier than its distractors; acc_norm: by the mean of a token. {row['ranked']}"
            f" problems, ± one standard error; guessing gives {row['chance']:.1%}"
        )


def on_problems(row: dict[str, Any]) -> list[str]:
    """What a model did with problems, in words: exact match, then accuracy of ranking by sum and by mean."""
    match = f"{row['exact_match']:.1%} of {row['problems']}" if "exact_match" in row else "-"
    kinds = ("acc", "acc_norm")
    return [match, *(f"{row[kind]:.1%} ± {row[f'{kind}_stderr']:.1%}" if kind in row else "-" for kind in kinds)]


def evaluate_model(config: Config, folder: Path) -> dict[str, float]:
    """Every held-out figure of one checkpoint, in float32."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    opened = open_model(folder, "model", config.context.window, device=device)
    tokenizer = open_tokenizer(folder, "model")
    figures = HeldOutLosses(config, tokenizer)(Live(opened))
    if config.eval.choices:
        figures |= Ranking(config.eval.choices, tokenizer, config.context, config.eval.batch_tokens)(Live(opened))
    if config.eval.problems:
        limit = positions(folder, "model")
        generator = HuggingFace(opened.module, tokenizer, config.context, limit, config.eval.batch_tokens)
        figures |= exact_match(generator, config)
    return figures

"""Held-out evaluation of any checkpoint: loss on target-domain text; on problems, exact match and ranking of answers.

Full-token perplexity gets worse under selective training by design, so nothing is measured on the corpus.
"""

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table

from pipeline.evaluation.generate import Generator, HuggingFace, Vllm
from pipeline.evaluation.grading import final_answer, same_answer
from pipeline.evaluation.heldout import Continuations, read_rows
from pipeline.evaluation.ranking import Ranking
from pipeline.evaluation.responses import ResponseLoss
from pipeline.evaluation.sandbox import Sandbox
from pipeline.evaluation.tool_use import ROUNDS, solve
from pipeline.progress import bar, console
from schemas.config import Config, Context
from schemas.errors import UserError
from schemas.models import local_model, open_model, open_tokenizer, positions
from schemas.store import write_atomic
from trainer.export import as_model
from trainer.live import Live

NEXT_PROBLEM = "\nProblem:"  # base models go on to pose one
LOSSES = {
    "target_loss": "nats/token",
    "target_bits_per_byte": "bits/byte",
    "response_loss": "responses, nats/token",
}
FIGURES = "evaluation.json"  # in train.output
WITH_TOOL = (
    "with Python: exact match where the model may have programs run; answers whose last program ended without an error;"
    " times that the model wrote, on average"
)


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
    prompts, golds = read_problems(config)
    texts = generator.complete(prompts, [NEXT_PROBLEM], config.eval.new_tokens)
    return {"exact_match": share_right(map(final_answer, texts), golds), "problems": len(golds)}


def tool_match(generator: Generator, sandbox: Sandbox, config: Config, rounds: int) -> dict[str, float]:
    """The same with a Python tool; also the share of answers whose last program ran without an error, and mean rounds."""
    prompts, golds = read_problems(config)
    answers = solve(generator, sandbox, prompts, config.eval.new_tokens, rounds, [NEXT_PROBLEM])
    count = max(1, len(answers))
    return {
        "tool_match": share_right((one.final() for one in answers), golds),
        "tool_problems": len(golds),
        "tool_ran": sum(one.ran() for one in answers) / count,
        "tool_rounds": sum(one.rounds for one in answers) / count,
    }


def read_problems(config: Config) -> tuple[list[str], list[str]]:
    """Prompts and right answers of `eval.problems`."""
    rows = read_rows(config.eval.problems or Path(), "eval.problems", ("prompt", "answer"))
    return [row["prompt"] for row in rows], [str(row["answer"]) for row in rows]


def share_right(answers: Iterable[str], golds: list[str]) -> float:
    """Share of answers worth the right ones."""
    return sum(map(same_answer, answers, golds)) / max(1, len(golds))


@dataclass(frozen=True, slots=True)
class Asking:
    """How problems are put to models: by which `backend` (hf, vllm), and also with a Python `tool`, in so many rounds."""

    backend: str = "hf"
    tool: bool = False
    rounds: int = ROUNDS


def evaluate_models(
    config: Config, models: list[str], show: bool = True, asking: Asking | None = None
) -> list[dict[str, Any]]:
    """Figures of models; without names, of the base, the reference and every finished arm.

    Then they are also kept in `train.output`, for the report. `show`: progress is shown. Raises UserError before the
    first model is opened if there is nothing to evaluate on, or no sandbox for the tool's programs.
    """
    asking = asking or Asking()
    if not (config.eval.target or config.eval.conversations or config.eval.problems or config.eval.choices):
        raise UserError("field `eval`: nothing to evaluate on", "give eval.target, eval.problems or eval.choices")
    if asking.backend not in ("hf", "vllm"):
        raise UserError(f"--backend {asking.backend}: is neither hf nor vllm", "choose one")
    if asking.tool and not config.eval.problems:
        raise UserError("--tool: there are no problems to answer", "give eval.problems")
    sandbox = Sandbox() if asking.tool else None
    rows = []
    with bar("evaluate", show) as progress:
        chosen = chosen_models(config, models)
        for number, name in enumerate(chosen):
            progress.update(number / len(chosen), name)
            with as_model(local_model(name)) as folder:
                rows.append({"model": name, **evaluate_model(config, folder, asking, sandbox)})
    if not models:
        write_atomic(config.train.output / FIGURES, (json.dumps(rows, indent=1) + "\n").encode())
    return rows


def chosen_models(config: Config, models: list[str]) -> list[str]:
    """The models named; without names the base, the reference and every finished arm.

    What was fine-tuned without scores may have no reference.
    """
    made = config.root not in Path(config.score.model).parents or Path(config.score.model).exists()
    arms = sorted(str(path.parent) for path in config.train.output.glob("*/final/config.json"))
    return models or [config.base, *([config.score.model] if made else []), *arms]


def print_figures(rows: list[dict[str, Any]]) -> None:
    """The figures of models as a table."""
    columns, cells = on_problems(rows)
    losses = {name: words for name, words in LOSSES.items() if any(name in row for row in rows)}
    table = Table("model", *losses.values(), *columns)
    for row, found in zip(rows, cells, strict=True):
        table.add_row(row["model"], *(f"{row.get(name, float('nan')):.3f}" for name in losses), *found)
    console.print(table)
    if any("acc" in row for row in rows):
        row = next(row for row in rows if "acc" in row)
        console.print(
            f"acc: the right answer is likelier than its distractors; acc_norm: by the mean of a token. {row['ranked']}"
            f" problems, ± one standard error; guessing gives {row['chance']:.1%}"
        )
    if any("tool_match" in row for row in rows):
        console.print(WITH_TOOL)


def on_problems(rows: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """What models did with problems, in words: names of the columns, and a row of cells each.

    Exact match, with a Python tool (if any was asked so), accuracy of ranking by sum and by mean.
    """
    columns: dict[str, Callable[[dict[str, Any]], str]] = {"exact match": plain_match}
    if any("tool_match" in row for row in rows):
        columns["with Python"] = match_with_tool
    columns |= {kind: partial(ranked, kind=kind) for kind in ("acc", "acc_norm")}
    return list(columns), [[said(row) for said in columns.values()] for row in rows]


def plain_match(row: dict[str, Any]) -> str:
    """Exact match in words."""
    return f"{row['exact_match']:.1%} of {row['problems']}" if "exact_match" in row else "-"


def match_with_tool(row: dict[str, Any]) -> str:
    """Exact match with a Python tool in words."""
    if "tool_match" not in row:
        return "-"
    return f"{row['tool_match']:.1%}, ran {row['tool_ran']:.0%}, {row['tool_rounds']:.1f} rounds"


def ranked(row: dict[str, Any], kind: str) -> str:
    """An accuracy of ranking in words."""
    return f"{row[kind]:.1%} ± {row[f'{kind}_stderr']:.1%}" if kind in row else "-"


def evaluate_model(
    config: Config, folder: Path, asking: Asking | None = None, sandbox: Sandbox | None = None
) -> dict[str, float]:
    """Every held-out figure of one checkpoint, in float32; with a `sandbox`, of answers with a Python tool as well."""
    asking = asking or Asking()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    opened = open_model(folder, "model", config.context.window, device=device)
    tokenizer = open_tokenizer(folder, "model")
    figures = HeldOutLosses(config, tokenizer)(Live(opened))
    if config.eval.choices:
        figures |= Ranking(config.eval.choices, tokenizer, config.context, config.eval.batch_tokens)(Live(opened))
    if not config.eval.problems:
        return figures
    if asking.backend == "vllm":
        del opened  # vLLM takes what memory there is
        generator: Generator = Vllm(folder, tokenizer, config.context)
    else:
        limit = positions(folder, "model")
        generator = HuggingFace(opened.module, tokenizer, config.context, limit, config.eval.batch_tokens)
    figures |= exact_match(generator, config)
    return figures | (tool_match(generator, sandbox, config, asking.rounds) if sandbox else {})

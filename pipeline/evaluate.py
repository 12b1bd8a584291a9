"""Held-out evaluation: loss on target-domain text and exact match on problems, for any checkpoint.

Full-token perplexity gets worse under selective training by design, so neither is measured on the corpus.
"""

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table

from pipeline.progress import bar, console
from schemas.batch import IGNORE, collate, renumbered
from schemas.config import Config, Context
from schemas.errors import UserError, first_line
from schemas.models import local_model, open_model, open_tokenizer
from trainer.export import as_model
from trainer.live import Live, choose_none

NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
GENERATED_TOGETHER = 32


class TargetLoss:
    """Mean loss of held-out texts given their prompts; tokenised once, then called on any live model."""

    def __init__(self, path: Path, tokenizer: Any, context: Context, batch_tokens: int, name: str = "target"):
        """Read JSON lines of {prompt, text}; tokens beyond `context.window` are not judged. `name`: the field of `eval`."""
        self.name = name
        self.windows: list[np.ndarray] = []
        self.prompts: list[int] = []
        self.bytes, self.row_tokens, self.rows = 0, context.window, max(1, batch_tokens // context.window)
        head = [tokenizer.bos_token_id] if context.bos else []
        for row in read_rows(path, f"eval.{name}", ("prompt", "text")):
            prompt = head + tokenizer(row["prompt"], add_special_tokens=False)["input_ids"]
            text = tokenizer(row["text"], add_special_tokens=False)["input_ids"][: context.window - len(prompt)]
            if len(prompt) < context.window and text:
                self.windows.append(np.array(prompt + text, dtype=np.int64))
                self.prompts.append(len(prompt))
                self.bytes += len(tokenizer.decode(text).encode())
        if not self.windows:
            raise UserError(
                f"eval.{name}: {path} has no row that fits in context.window ({context.window})", "raise the window"
            )

    @torch.no_grad()
    def __call__(self, live: Live) -> dict[str, float]:
        """`<name>_loss` in nats/token and `<name>_bits_per_byte`."""
        device = next(live.parameters()).device
        rows = live.opened.rows([len(window) for window in self.windows], self.row_tokens)
        rows += [[]] * (-len(rows) % self.rows)  # every batch of one shape
        nats = tokens = 0.0
        for start in range(0, len(rows), self.rows):
            chosen = rows[start : start + self.rows]
            members = [index for row in chosen for index in row]
            batch = collate([self.windows[index] for index in members], renumbered(chosen), self.row_tokens)
            for index, place in zip(members, batch.places, strict=True):
                batch.targets[place.row, place.start : place.start + self.prompts[index] - 1] = IGNORE
            losses = live(batch.to(device), choose_none).losses
            nats += float(losses.nansum(dtype=torch.float64))
            tokens += int((batch.targets != IGNORE).sum())
        return {
            f"{self.name}_loss": nats / tokens,
            f"{self.name}_bits_per_byte": nats / math.log(2) / self.bytes,
        }


class HeldOutLosses:
    """`TargetLoss` of each held-out set that the config names; no figures if it names none."""

    def __init__(self, config: Config, tokenizer: Any):
        named = {"target": config.eval.target, "validation": config.eval.validation}
        self.sets = [
            TargetLoss(path, tokenizer, config.context, config.eval.batch_tokens, name)
            for name, path in named.items()
            if path
        ]

    def __call__(self, live: Live) -> dict[str, float]:
        """The figures of all sets."""
        return {name: value for one in self.sets for name, value in one(live).items()}


@torch.no_grad()
def exact_match(model: Any, tokenizer: Any, config: Config) -> dict[str, float]:
    """Share of held-out problems whose greedy answer ends in the right number, and how many were asked."""
    problems = read_rows(config.eval.problems or Path(), "eval.problems", ("prompt", "answer"))
    head = [tokenizer.bos_token_id] if config.context.bos else []
    right = 0
    for start in range(0, len(problems), GENERATED_TOGETHER):
        group = problems[start : start + GENERATED_TOGETHER]
        prompts = [head + tokenizer(row["prompt"], add_special_tokens=False)["input_ids"] for row in group]
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts], device=model.device)
        mask = torch.tensor(
            [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=model.device
        )
        found = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=config.eval.new_tokens,
                               do_sample=False, pad_token_id=tokenizer.eos_token_id)  # fmt: skip
        texts = tokenizer.batch_decode(found[:, width:], skip_special_tokens=True)
        right += sum(answers(text, str(row["answer"])) for text, row in zip(texts, group, strict=True))
    return {"exact_match": right / max(1, len(problems)), "problems": len(problems)}


def answers(text: str, gold: str) -> bool:
    """Whether a completion gives the gold number: the one after `####` if there is one, else its last."""
    text = text.split("\nProblem:")[0].replace(",", "")
    numbers = NUMBER.findall(text.split("####", 1)[1])[:1] if "####" in text else NUMBER.findall(text)[-1:]
    try:
        return bool(numbers) and float(numbers[0]) == float(gold.replace(",", ""))
    except ValueError:
        return False


def read_rows(path: Path, field: str, keys: tuple[str, ...]) -> list[dict[str, Any]]:
    """JSON lines that all have `keys`. Raises UserError naming file and line."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{field}: {path} cannot be read ({first_line(error)})", "mend the path or the file") from error
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            rows.append({key: row[key] for key in keys})
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{path}:{number}: not a JSON object with {', '.join(keys)} ({first_line(error)})", f"mend {field}"
            ) from error
    return rows


def evaluate_models(config: Config, models: list[str]) -> list[dict[str, Any]]:
    """Evaluate and print; without names, the base, the reference and every finished arm."""
    if not (config.eval.target or config.eval.problems):
        raise UserError("field `eval`: nothing to evaluate on", "give eval.target or eval.problems")
    arms = sorted(str(path.parent) for path in config.train.output.glob("*/final/config.json"))
    rows = []
    with bar("evaluate") as progress:
        chosen = models or [config.base, config.score.model, *arms]
        for number, name in enumerate(chosen):
            progress.update(number / len(chosen), name)
            with as_model(local_model(name)) as folder:
                rows.append({"model": name, **evaluate_model(config, folder)})
    table = Table("model", "nats/token", "bits/byte", "exact match")
    for row in rows:
        match = f"{row['exact_match']:.1%} of {row['problems']}" if "exact_match" in row else "-"
        table.add_row(row["model"], f"{row.get('target_loss', float('nan')):.3f}",
                      f"{row.get('target_bits_per_byte', float('nan')):.3f}", match)  # fmt: skip
    console.print(table)
    return rows


def evaluate_model(config: Config, folder: Path) -> dict[str, float]:
    """Every held-out figure of one checkpoint, in float32."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    opened = open_model(folder, "model", config.context.window, device=device)
    tokenizer = open_tokenizer(folder, "model")
    figures = HeldOutLosses(config, tokenizer)(Live(opened))
    if config.eval.problems:
        figures |= exact_match(opened.module, tokenizer, config)
    return figures

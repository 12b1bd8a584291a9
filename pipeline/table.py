"""`tokensift eval` as the user sees it: one row a model."""

from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from transformers import AutoModelForCausalLM

from pipeline.evaluate import TargetLoss, exact_match
from pipeline.progress import bar, console
from pipeline.runs import load_tokenizer
from schemas.config import Config
from schemas.errors import UserError
from schemas.fingerprint import local_model
from trainer.live import Live


def evaluate_models(config: Config, models: list[str]) -> list[dict]:
    """Evaluate and print; without names, the base, the reference and every finished arm."""
    if not (config.eval.target or config.eval.problems):
        raise UserError("field `eval`: give eval.target or eval.problems")
    arms = sorted(str(path.parent) for path in config.train.output.glob("*/final/config.json"))
    rows = []
    with bar("evaluate") as progress:
        chosen = models or [config.base, config.score.model, *arms]
        for number, name in enumerate(chosen):
            progress.update(number / len(chosen), name)
            rows.append({"model": name, **evaluate_model(config, local_model(name))})
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
    loaded: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, use_safetensors=True)
    model = loaded.to(device).eval()
    tokenizer = load_tokenizer(folder, "model")
    figures: dict[str, float] = {}
    if config.eval.target:
        figures |= TargetLoss(config.eval.target, tokenizer, config.context, config.eval.batch_tokens)(
            Live(model, torch.float32)
        )
    if config.eval.problems:
        figures |= exact_match(model, tokenizer, config)
    return figures

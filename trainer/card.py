"""The model card of an exported folder: how it was trained, from what the run itself wrote down, and nothing else."""

from typing import Any

import yaml

from trainer.checkpoint import State

TAGS = ["tokensift", "selective-language-modeling"]
SELECTED = {
    "clm": "every token",
    "slm": "the {keep:.0%} of tokens with the highest excess loss, the model's own minus the reference's",
    "random": "{keep:.0%} of tokens, drawn at random",
    "self-ref-loss": "the {keep:.0%} of tokens with the lowest reference loss",
    "self-ref-entropy": "the {keep:.0%} of tokens with the lowest reference entropy",
    "self-ref-both": "tokens that are among the {keep:.0%} of both lowest reference loss and lowest reference entropy",
}
RANKED = {
    "micro": "ranked over a forward of all ranks",
    "sequence": "ranked within each window",
    "step": "ranked over the optimizer step",
}
SCHEDULES = {
    "cosine": "cosine down to {min_learning_rate_ratio:.0%} of it, warm-up over {warmup:.1%} of the run",
    "wsd": "constant, then down to {min_learning_rate_ratio:.0%} of it over the last {decay:.1%}, warm-up over {warmup:.1%}",
    "constant": "constant, warm-up over {warmup:.1%} of the run",
}
FIGURES = {"loss": "nats/token", "bits_per_byte": "bits/byte"}  # how names of held-out figures end, and their units
LOAD = """
## To load it

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("this folder")
tokenizer = AutoTokenizer.from_pretrained("this folder")
```
"""


def card(state: State, metrics: list[dict[str, Any]]) -> str:
    """README.md of the model at `state`, Hugging Face front matter first; `metrics` are the rows of its run.

    A function of both alone: equal runs have equal cards. The licence is left to whoever publishes the model.
    """
    parts = [_front_matter(state), _facts(state), _held_out(state, metrics), _settings(state), LOAD]
    return "\n".join(part.strip("\n") + "\n" for part in parts if part)


def _front_matter(state: State) -> str:
    """What the hub reads."""
    known: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": TAGS}
    if "base" in state.names:
        known["base_model"] = state.names["base"].partition("@")[0]
    if "corpus" in state.names:
        known["datasets"] = [name.partition("@")[0] for name in state.names["corpus"].split(", ")]
    return f"---\n{yaml.safe_dump(known, sort_keys=True)}---\n"


def _facts(state: State) -> str:
    """The table of how it was trained; a row that is not known is left out."""
    train, names = state.origin.get("train", {}), state.names
    context, dataset = state.origin.get("context"), state.origin.get("dataset")
    share = f" ({state.tokens_selected / state.tokens_seen:.1%})" if state.tokens_seen else ""
    rows = {
        "base": names.get("base"),
        "base's files, sha256": _hashes(state.origin.get("base", {})),
        "objective": f"`{train['objective']}`: trained on {_selected(train)}" if "objective" in train else None,
        "reference": names.get("reference"),
        "corpus": names.get("corpus"),
        "data": names.get("data"),
        "data's fingerprint": f"`{dataset}`" if dataset else None,
        "context": "{window} tokens; BOS {bos}, EOS {eos}".format(**context) if context else None,
        "optimizer steps": f"{state.step:,}",
        "tokens seen": f"{state.tokens_seen:,}",
        "tokens trained on": f"{state.tokens_selected:,}{share}",
        "learning rate": f"{train['learning_rate']:g}, {_schedule(train)}" if "learning_rate" in train else None,
        "optimizer": "AdamW, betas {betas[0]:g} and {betas[1]:g}, weight decay {weight_decay:g}, gradients clipped at a"
        " norm of {clip:g}".format(**train) if "betas" in train else None,
        "dtype": f"weights float32, products {train['dtype']}" if "dtype" in train else None,
        "versions": ", ".join(f"{name} {number}" for name, number in sorted(state.origin.get("versions", {}).items())),
    }  # fmt: skip
    table = "".join(f"| {name} | {value} |\n" for name, value in rows.items() if value)
    title = "# Selective language model" if train.get("objective", "clm") != "clm" else "# Language model"
    method = "[Selective Language Modeling](https://arxiv.org/abs/2404.07965)"
    return f"{title}\n\nTrained by Tokensift ({method}).\n\n## How it was trained\n\n| | |\n|---|---|\n{table}"


def _hashes(files: dict[str, str]) -> str:
    return ", ".join(f"{name} `{number[:16]}`" for name, number in sorted(files.items()))


def _selected(train: dict[str, Any]) -> str:
    objective = train["objective"]
    words = SELECTED.get(objective, "the tokens that it selects").format(**train)
    scope = RANKED.get(train.get("scope", ""), "")
    return words if objective == "clm" or not scope else f"{words}, {scope}"


def _schedule(train: dict[str, Any]) -> str:
    name = str(train["schedule"])
    return SCHEDULES.get(name, name).format(**train)


def _held_out(state: State, metrics: list[dict[str, Any]]) -> str:
    """Held-out figures before the first step and at the last evaluation up to this one."""
    rows = [row for row in metrics if row["kind"] == "eval" and row["step"] <= state.step]
    ends = [row for row in (rows[0], rows[-1]) if row] if len(rows) > 1 else rows
    named = {name: unit for row in ends for name in row for end, unit in FIGURES.items() if name.endswith(f"_{end}")}
    if not named:
        return ""
    head = "".join(f" | step {row['step']:,}" for row in ends)
    lines = [
        f"| {name} ({unit}) | " + " | ".join(f"{row[name]:.4f}" if name in row else "" for row in ends) + " |\n"
        for name, unit in named.items()
    ]
    rule = "|---" * (len(ends) + 1)
    return f"## Held-out figures\n\n| {head} |\n{rule}|\n".replace("|  |", "| |") + "".join(lines)


def _settings(state: State) -> str:
    """Every setting that decided the numbers."""
    settings = {name: state.origin[name] for name in ("context", "train") if name in state.origin}
    return f"## Settings\n\n```yaml\n{yaml.safe_dump(settings, sort_keys=True)}```\n" if settings else ""

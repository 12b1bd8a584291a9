"""Held-out figures: a loss given the prompt that any plain forward gives, and an exact match that batching leaves alone."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.evaluation.evaluate import HeldOutLosses, TargetLoss, evaluate_models, exact_match
from pipeline.evaluation.generate import HuggingFace
from pipeline.evaluation.heldout import read_rows
from schemas.config import Config
from schemas.errors import UserError
from schemas.forward import Opened
from trainer.live import Live

ROWS = [
    {"prompt": "Theorem 3. For every", "text": " $\\varepsilon > 0$ there is $\\delta > 0$."},
    {"prompt": "Let $x_1 = 2$;", "text": " then $f(x) = 0$, naïve café ∑ 🧮."},
    {"prompt": "The sum of", "text": " 7"},
]


def write_rows(path: Path, rows: list[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def model(tiny_model: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()


@pytest.fixture
def tokenizer(tiny_model: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_model)


@torch.no_grad()
@pytest.mark.parametrize("batch_tokens", [1, 10_000])
def test_the_target_loss_is_the_plain_forwards_mean_over_the_texts_tokens_given_their_prompts(
    scores: Config, model: Any, tokenizer: Any, tmp_path: Path, batch_tokens: int
) -> None:
    nats, tokens, size = 0.0, 0, 0
    for row in ROWS:
        prompt = [0, *tokenizer(row["prompt"], add_special_tokens=False)["input_ids"]]
        text = tokenizer(row["text"], add_special_tokens=False)["input_ids"]
        logits = model(input_ids=torch.tensor([prompt + text])).logits[0].log_softmax(1)
        nats -= sum(float(logits[len(prompt) - 1 + i, token]) for i, token in enumerate(text))
        tokens, size = tokens + len(text), size + len(row["text"].encode())
    path = write_rows(tmp_path / "target.jsonl", ROWS)
    found = TargetLoss(path, tokenizer, scores.context, batch_tokens)(
        Live(Opened(module=model, linear=True, isolation="packed", compute=torch.float32))
    )
    assert found["target_loss"] == pytest.approx(nats / tokens, abs=1e-5)
    assert found["target_bits_per_byte"] == pytest.approx(nats / math.log(2) / size, abs=1e-5)


def test_each_held_out_set_has_figures_of_its_own(scores: Config, model: Any, tokenizer: Any, tmp_path: Path) -> None:
    one, other = write_rows(tmp_path / "a.jsonl", ROWS[:1]), write_rows(tmp_path / "b.jsonl", ROWS[1:])
    sets = {"target": one, "validation": other}
    config = scores.model_copy(update={"eval": scores.eval.model_copy(update=sets)})
    live = Live(Opened(module=model, linear=True, isolation="packed", compute=torch.float32))
    found = HeldOutLosses(config, tokenizer)(live)
    assert found == {
        **TargetLoss(one, tokenizer, config.context, config.eval.batch_tokens)(live),
        **TargetLoss(other, tokenizer, config.context, config.eval.batch_tokens, "validation")(live),
    }
    assert found["target_loss"] != found["validation_loss"]


def test_exact_match_finds_what_greedy_decoding_says_also_for_prompts_of_other_lengths_beside_it(
    scores: Config, model: Any, tokenizer: Any, tmp_path: Path
) -> None:
    prompts = ["Let $x_1", "The sum of the first 12 odd numbers is", "Theorem", "def f(n):\n    return n *"]
    rows = []
    for prompt in prompts:  # what the model says of each prompt alone, unpadded, token by token
        ids = [0, *tokenizer(prompt, add_special_tokens=False)["input_ids"]]
        start = len(ids)
        for _ in range(8):
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        said = tokenizer.decode(ids[start:], skip_special_tokens=True)
        numbers = "".join(letter if letter.isdigit() else " " for letter in said).split()
        rows.append({"prompt": prompt, "answer": numbers[-1] if numbers else "none"})
    wanted = float(np.mean([row["answer"] != "none" for row in rows]))
    assert wanted > 0  # otherwise nothing could be found
    raw = {"problems": write_rows(tmp_path / "problems.jsonl", rows), "new_tokens": 8}
    config = scores.model_copy(update={"eval": scores.eval.model_copy(update=raw)})
    generator = HuggingFace(model, tokenizer, config.context, None, config.eval.batch_tokens)
    assert exact_match(generator, config)["exact_match"] == wanted


def test_a_row_that_lacks_a_field_is_named_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "target.jsonl"
    path.write_text('{"prompt": "a", "text": "b"}\n{"prompt": "a"}\n')
    with pytest.raises(UserError, match=r"target\.jsonl:2.*text"):
        read_rows(path, "eval.target", ("prompt", "text"))
    with pytest.raises(UserError, match=r"eval\.target: .*missing\.jsonl"):
        read_rows(tmp_path / "missing.jsonl", "eval.target", ("prompt",))


def test_a_config_without_held_out_material_is_told_which_field_to_give(scores: Config) -> None:
    with pytest.raises(UserError, match=r"eval\.target, eval\.problems or eval\.choices"):
        evaluate_models(scores, [])

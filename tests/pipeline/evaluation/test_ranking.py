"""Ranked answers: the counts of one plain forward a sequence, whatever shares a batch; errors as the binomial law gives them."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.cli import main
from pipeline.evaluation.heldout import Continuations
from pipeline.evaluation.ranking import Ranking, preferred, standard_errors
from schemas.config import Config
from schemas.errors import UserError
from schemas.forward import Opened
from trainer.live import Live

WORDS = (
    "Let",
    "odd numbers",
    "$x_1$",
    "7",
    "12",
    "Theorem 3",
    "a root",
    "pebbles in a square",
    "∑ 🧮",
    "42",
    "f(n)",
    "0",
)


def problems(count: int) -> list[dict[str, Any]]:
    """Problems of three to five choices, of several lengths."""
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(count):
        choices = [f" {' '.join(rng.choice(WORDS, size=rng.integers(1, 4)))} {i}" for i in range(rng.integers(3, 6))]
        rows.append({"prompt": " ".join(rng.choice(WORDS, size=6)), "choices": choices, "right": int(rng.integers(3))})
    return rows


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@torch.no_grad()
def plain_losses(model: Any, tokenizer: Any, prompt: str, choice: str) -> list[float]:
    """The textbook's way: one sequence, one forward, one token after another."""
    before = [0, *tokenizer(prompt, add_special_tokens=False)["input_ids"]]
    after = tokenizer(choice, add_special_tokens=False)["input_ids"]
    likely = model(input_ids=torch.tensor([before + after])).logits[0].double().log_softmax(1)
    return [-float(likely[len(before) - 1 + place, token]) for place, token in enumerate(after)]


@pytest.mark.parametrize("batch_tokens", [1, 10_000])
def test_the_counts_are_those_of_a_plain_forward_of_one_sequence_after_another(
    scores: Config, tiny_model: Path, tmp_path: Path, batch_tokens: int
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    rows = problems(40)
    by_sum, by_mean = [], []
    for row in rows:
        losses = [plain_losses(model, tokenizer, row["prompt"], choice) for choice in row["choices"]]
        sums, means = [sum(one) for one in losses], [sum(one) / len(one) for one in losses]
        by_sum.append(sums.index(min(sums)) == row["right"])
        by_mean.append(means.index(min(means)) == row["right"])
    assert by_sum != by_mean  # or the two could be mistaken for each other
    ranking = Ranking(write(tmp_path / "choices.jsonl", rows), tokenizer, scores.context, batch_tokens)
    found = ranking(Live(Opened(module=model, linear=True, isolation="packed", compute=torch.float32)))
    assert (found["acc"], found["acc_norm"], found["ranked"]) == (sum(by_sum) / 40, sum(by_mean) / 40, 40)
    assert found["acc_stderr"] == pytest.approx(np.std(by_sum) / math.sqrt(40))
    assert found["acc_norm_stderr"] == pytest.approx(np.std(by_mean) / math.sqrt(40))
    assert found["chance"] == pytest.approx(sum(1 / len(row["choices"]) for row in rows) / 40)


@pytest.mark.parametrize(("bos", "prompt"), [(True, "Let"), (True, ""), (False, "Let"), (False, "")])
def test_losses_are_of_every_token_of_the_text_that_something_stands_before(
    scores: Config, tiny_model: Path, bos: bool, prompt: str
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    texts = Continuations([(prompt, " 12 odd numbers")], tokenizer, scores.context.model_copy(update={"bos": bos}), 100)
    (found,) = texts.losses(Live(Opened(module=model, linear=True, isolation="packed", compute=torch.float32))).values()
    before = [0] * bos + tokenizer(prompt, add_special_tokens=False)["input_ids"]
    ids = before + tokenizer(" 12 odd numbers", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        likely = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(1)
    wanted = [-float(likely[place - 1, ids[place]]) for place in range(max(1, len(before)), len(ids))]
    assert found == pytest.approx(wanted, abs=1e-5) and texts.texts() == [ids[max(1, len(before)) :]]


@given(
    losses=st.lists(st.lists(st.integers(1, 50), min_size=1, max_size=5), min_size=2, max_size=5),
    right=st.integers(0, 4),
)
def test_an_answer_is_preferred_if_every_other_one_is_less_likely(losses: list[list[int]], right: int) -> None:
    right %= len(losses)
    by_sum, by_mean = preferred([np.array(one, dtype=np.float32) for one in losses], right)
    others = [one for number, one in enumerate(losses) if number != right]
    assert by_sum is all(sum(one) > sum(losses[right]) for one in others)
    # Means compared as fractions, without a division.
    own = losses[right]
    assert by_mean is all(sum(one) * len(own) > sum(own) * len(one) for one in others)


def test_the_error_is_the_binomial_law_s_and_larger_where_problems_of_a_template_are_alike() -> None:
    found = np.array([[True], [True], [False], [False]])
    alone = standard_errors(found, ["a", "b", "c", "d"])
    assert alone == pytest.approx([math.sqrt(0.5 * 0.5 / 4)])
    # Two draws, one right and one wrong, each told twice, are worth two draws.
    assert standard_errors(found, ["a", "a", "b", "b"]) == pytest.approx([math.sqrt(0.5 * 0.5 / 2)])
    assert standard_errors(found, ["a", "b", "b", "a"]) == pytest.approx([0.0])


def test_a_problem_of_which_a_choice_does_not_fit_is_left_out(scores: Config, tiny_model: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    long = {"prompt": "Let", "choices": [" 1", " pebbles" * 80], "right": 0}
    path = tmp_path / "choices.jsonl"
    assert len(Ranking(write(path, [*problems(3), long]), tokenizer, scores.context, 100).problems) == 3
    with pytest.raises(UserError, match=r"no problem that fits in context\.window"):
        Ranking(write(path, [long]), tokenizer, scores.context, 100)


@pytest.mark.parametrize(
    ("choices", "right", "reason"),
    [
        ([" 1"], 0, "two texts or more"),
        ([" 1", 2], 0, "two texts or more"),
        (" 12", 0, "two texts or more"),
        ([" 1", " 1"], 0, "equal"),
        ([" 1", " 2"], 2, "one of the 2 choices"),
        ([" 1", " 2"], -1, "one of the 2 choices"),
        ([" 1", " 2"], True, "one of the 2 choices"),
    ],
)
def test_a_problem_that_cannot_be_ranked_is_named_with_its_line(
    scores: Config, tiny_model: Path, tmp_path: Path, choices: Any, right: Any, reason: str
) -> None:
    rows = [*problems(1), {"prompt": "a", "choices": choices, "right": right}]
    path = write(tmp_path / "choices.jsonl", rows)
    with pytest.raises(UserError, match=rf"choices\.jsonl:2: .*{reason}"):
        Ranking(path, AutoTokenizer.from_pretrained(tiny_model), scores.context, 100)


def test_eval_shows_the_ranking_as_a_table_and_as_json(
    scores: Config, write_config: Any, tiny_model: Path, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    choices = write(tmp_path / "choices.jsonl", problems(5))
    config = scores.model_copy(update={"eval": scores.eval.model_copy(update={"choices": choices})})
    path = write_config(config, tmp_path / "config.yaml")
    shown = {}
    for options in ([], ["--json"]):
        monkeypatch.setattr("sys.argv", ["tokensift", "eval", "-c", str(path), str(tiny_model), *options])
        with pytest.raises(SystemExit) as left:
            main()
        assert left.value.code == 0
        shown[bool(options)] = capsys.readouterr().out
    words = " ".join(shown[False].split())
    assert "acc_norm" in words and "5 problems" in words and "guessing gives" in words
    assert json.loads(shown[True])["ranked"] == 5

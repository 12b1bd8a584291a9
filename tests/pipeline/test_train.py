"""Stage 2 as the user meets it: it says how far it is, and takes only scores of the base's own tokenizer and of the config's own context (law 14)."""

import json
import shutil

import pytest

from pipeline.train import blocks, described, train_live
from schemas.errors import UserError
from schemas.models import open_tokenizer


def changed(config, **fields):
    return config.model_copy(update=fields)


@pytest.mark.parametrize(("field", "value"), [("window", 32), ("bos", False), ("eos", False)])
def test_scores_of_another_context_are_refused_by_field(scores, tmp_path, field, value):
    train = scores.train.model_copy(update={"output": tmp_path})
    context = scores.context.model_copy(update={field: value})
    with pytest.raises(UserError, match=rf"context\.{field}: .* stored, {value} now"):
        train_live(changed(scores, train=train, context=context))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("field", ["vocabulary", "size", "eos"])
def test_scores_of_another_tokenizer_are_refused_by_field(scores, tmp_path, field):
    base = shutil.copytree(scores.base, tmp_path / "base")
    if field == "eos":
        written = json.loads((base / "tokenizer_config.json").read_text())
        (base / "tokenizer_config.json").write_text(json.dumps(written | {"eos_token": "<s>"}))
    else:
        tokenizer = open_tokenizer(base, "base")
        tokenizer.add_tokens(["<another>"])
        tokenizer.save_pretrained(base)
        shape = json.loads((base / "config.json").read_text())
        (base / "config.json").write_text(json.dumps(shape | {"vocab_size": 600}))  # room for it
    train = scores.train.model_copy(update={"output": tmp_path / "train"})
    with pytest.raises(UserError, match=rf"tokenizer\.{field}: .* stored, .* now"):
        train_live(changed(scores, base=str(base), train=train))
    assert not (tmp_path / "train").exists()


def test_the_live_view_says_what_is_learnt_what_is_selected_and_how_fast():
    row = {"step": 1200, "tokens_seen": 5_000_000, "tokens_per_second": 66_000.4, "mfu": 0.412, "loss_kept": 2.5}
    row |= {"loss_dropped": 1.25, "threshold": 0.125, "score_over": [0.9, 0.8, 0.7, 0.4, 0.2, 0.1, 0.0]}
    row |= {"grad_norm": 0.75, "data_wait": 0.014}
    assert described(row) == (
        "step 1,200 · 5,000,000 tokens · 66,000 tokens/s (41% MFU)",
        "loss kept 2.500 · dropped 1.250 · threshold 0.125 · scores ▃▃▃█▆▃▃▁ · gradient 0.75 · waiting for data 1%",
    )
    unranked = row | {"loss_dropped": None, "threshold": None, "score_over": None}
    assert described(unranked)[1] == "loss kept 2.500 · gradient 0.75 · waiting for data 1%"


def test_a_histogram_has_a_block_for_each_bin_the_highest_a_full_one():
    assert blocks([1.0, 1.0, 0.0]) == "▁▁█▁"
    assert blocks([0.5, 0.25]) == "█▅▅"

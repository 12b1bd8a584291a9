"""Stage 2 takes only scores of the base's own tokenizer and of the config's own context (law 14)."""

import json
import shutil

import pytest

from pipeline.train import train_live
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

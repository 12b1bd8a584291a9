"""Inspect shows what is there, whatever is in the text."""

import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from transformers import AutoTokenizer

from pipeline.inspect import inspect, spell
from schemas.config import Config
from schemas.errors import UserError, printable
from schemas.receipt import HISTOGRAM_EDGES_NATS, Layout, read_receipts
from schemas.shard import Window, encode_shard, shard_schema


def shown(path: Path, tokenizer: object = None, documents: int = 3, **console: object) -> str:
    output = io.StringIO()
    inspect(path, tokenizer, documents, Console(file=output, width=160, **console))  # type: ignore[arg-type]
    return output.getvalue()


def test_a_dataset_shows_counts_fingerprints_and_losses(scores: Config) -> None:
    receipts = list(read_receipts(Layout(scores.score.output)).values())
    text = shown(scores.score.output)
    assert f"{sum(receipt.tokens for receipt in receipts):,}" in text
    mean = sum(receipt.loss_sum for receipt in receipts) / sum(receipt.loss_count for receipt in receipts)
    assert f"{mean:.3f}" in text
    assert "vocabulary" in text and "0.5 to 1" in text and "16 and more" in text


def test_a_lone_shard_shows_the_figures_of_its_receipt(scores: Config) -> None:
    layout = Layout(scores.score.output)
    unit, receipt = next(iter(read_receipts(layout).items()))
    text = shown(layout.shard(unit))
    assert f"{receipt.loss_sum / receipt.loss_count:.3f}" in text
    counts = re.findall(r"(?:\d to [\d.]+|and more)\s+([\d,]+)\s", text)
    assert [int(count.replace(",", "")) for count in counts] == receipt.loss_histogram


def test_documents_are_spelt_and_limited(scores: Config, tiny_model: Path) -> None:
    text = shown(scores.score.output, AutoTokenizer.from_pretrained(tiny_model), documents=2)
    assert text.count("windows)\n") == 2
    assert "<s>" in text and "</s>" in text and "Theorem" in text
    assert "windows)" not in shown(scores.score.output, documents=0)


def test_without_a_tokenizer_ids_are_shown(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    one = Window("doc", 0, np.array([7, 41, 93]), np.array([np.nan, 0.005, 20], dtype=np.float16))
    path.write_bytes(encode_shard([one], shard_schema(100, False), {"fingerprint": {"size": 100}, "unit": "a"}))
    assert "7 41 93" in shown(path)


def test_low_and_high_losses_differ_in_colour(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    one = Window("doc", 0, np.array([7, 41, 93]), np.array([np.nan, 0.005, 20], dtype=np.float16))
    path.write_bytes(encode_shard([one], shard_schema(100, False), {"fingerprint": {}, "unit": "a"}))
    line = shown(path, force_terminal=True, color_system="truecolor").splitlines()[-1]
    assert "48;2;95;191;119m41" in line and "48;2;232;99;92m93" in line


def test_an_empty_shard_is_shown(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(encode_shard([], shard_schema(100, False), {"fingerprint": {}, "unit": "a"}))
    assert re.search(r"windows +0", shown(tmp_path / "a.parquet"))


def test_what_is_no_dataset_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"dataset\.json"):
        shown(tmp_path)
    (tmp_path / "x.parquet").write_text(json.dumps(HISTOGRAM_EDGES_NATS))
    with pytest.raises(UserError, match=r"x\.parquet"):
        shown(tmp_path / "x.parquet")


@given(text=st.text(alphabet="aé漢🧮 \n<>&$\\x1", min_size=1, max_size=30))
def test_spelling_keeps_every_character_and_one_piece_a_token(tokenizer: object, text: str) -> None:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]  # type: ignore[operator]
    words = spell(tokenizer, ids)
    assert len(words) == len(ids)
    assert "".join(words).replace("▪", "") == text


@given(text=st.text())
def test_printable_text_cannot_drive_a_terminal(text: str) -> None:
    clean = printable(text)
    assert len(clean) == len(text)
    assert all(letter.isprintable() or letter in "\n\t" for letter in clean)


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> object:
    return AutoTokenizer.from_pretrained(tiny_model)

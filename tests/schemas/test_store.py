"""Files and fingerprints: published whole or not at all, and differences that name their fields."""

import hashlib
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas.config import Config
from schemas.errors import UserError
from schemas.fingerprint import difference, digest, model_fingerprint
from schemas.receipt import Layout, read_dataset, read_receipts, write_dataset
from schemas.store import NotWritten, Store, sha256_file, write_atomic

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.dictionaries(st.text("abc", min_size=1, max_size=3), inner, max_size=3),
    max_leaves=8,
)


def names(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


def test_put_if_absent_never_replaces_and_says_so(tmp_path: Path) -> None:
    for content, expected in ((b"first", True), (b"second", False)):
        assert Store(tmp_path).put_if_absent("receipt.json", content) is expected
        assert (tmp_path / "receipt.json").read_bytes() == b"first"
    assert names(tmp_path) == ["receipt.json"]


def test_put_replaces_and_leaves_no_temporary(tmp_path: Path) -> None:
    for content in (b"first", b"second"):
        Store(tmp_path).put("shard", content)
        assert Store(tmp_path).read("shard") == content
    assert names(tmp_path) == ["shard"]


@pytest.mark.parametrize("put", ["put", "put_if_absent"])
def test_what_the_disk_gives_back_differently_never_gets_the_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, put: str
) -> None:
    real = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: real(path)[:-1] + b"!")
    with pytest.raises(NotWritten, match="reads back differently"):
        getattr(Store(tmp_path), put)("shard", b"content")
    assert names(tmp_path) == []


def test_names_are_sorted_and_leave_out_what_is_not_finished(tmp_path: Path) -> None:
    for name in ("b.json", "a.json", ".tmp-c.json-1", "d.txt"):
        (tmp_path / name).write_bytes(b"")
    assert Store(tmp_path).names(".", ".json") == ["a", "b"]
    Store(tmp_path).sweep(".")
    assert sorted(names(tmp_path)) == ["a.json", "b.json", "d.txt"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_an_atomic_write_that_fails_leaves_the_old_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    path = tmp_path / "deep" / "file"
    write_atomic(path, b"old")

    def fail(*arguments: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(OSError, match="no space"):
        write_atomic(path, b"new")
    monkeypatch.undo()
    assert path.read_bytes() == b"old"
    assert names(path.parent) == ["file"]


def test_a_file_is_flushed_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    for name in ("fsync", "replace", "link"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, name=name, real=real, **k: (calls.append(name), real(*a, **k))[1])
    write_atomic(tmp_path / "a", b"x")
    Store(tmp_path).put_if_absent("b", b"x")
    assert calls == ["fsync", "replace", "fsync", "fsync", "link", "fsync"]


def test_sha256_file_is_the_sha256_of_the_bytes(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc" * 100_000)
    assert sha256_file(tmp_path / "a") == hashlib.sha256(b"abc" * 100_000).hexdigest()


@given(JSON)
def test_nothing_differs_from_itself_and_its_digest_does_not_change(value: object) -> None:
    assert difference(value, value) == [] and digest(value) == digest(value)


@given(st.dictionaries(st.text("abc", min_size=1), JSON, min_size=1), st.data())
def test_a_difference_names_the_field_that_changed(value: dict, data: st.DataObject) -> None:
    key = data.draw(st.sampled_from(sorted(value)))
    lines = difference({"scorer": value}, {"scorer": {**value, key: "changed!"}})
    assert lines == [f"scorer.{key}: {value[key]!r} stored, 'changed!' now"]
    assert digest(value) != digest({**value, key: "changed!"})


def test_a_field_that_appears_or_goes_is_a_difference() -> None:
    assert difference({"a": {"x": 1}}, {"a": {}}) == ["a.x: 1 stored, None now"]
    assert difference({}, {"b": 2}) == ["b: None stored, 2 now"]


def test_law_3_a_field_that_goes_is_a_difference_even_if_it_was_null() -> None:
    assert difference({"a": {"x": None}}, {"a": {"x": 0}}) == ["a.x: None stored, 0 now"]


def test_the_models_fingerprint_changes_with_its_weights_and_its_shape(tmp_path: Path, tiny_model: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((tiny_model / name).read_bytes())
    first = model_fingerprint(tmp_path)
    assert first == model_fingerprint(tiny_model)
    for name in ("config.json", "model.safetensors"):
        data = bytearray((tmp_path / name).read_bytes())
        data[-1] ^= 1
        (tmp_path / name).write_bytes(data)
        assert [line.split(":")[0] for line in difference(first, model_fingerprint(tmp_path))] == [name]
        (tmp_path / name).write_bytes((tiny_model / name).read_bytes())


def test_a_model_without_safetensors_is_the_users_error(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UserError, match="safetensors"):
        model_fingerprint(tmp_path)


def test_dataset_json_is_written_once_and_read_back(tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    with pytest.raises(UserError, match=r"dataset\.json"):
        read_dataset(layout)
    parts: dict[str, object] = {part: {} for part in ("tokenizer", "model", "corpus", "context", "scorer")}
    write_dataset(layout, {"schema_version": 2, "a": 2, **parts})
    write_dataset(layout, {"schema_version": 2, "a": 3, **parts})
    assert read_dataset(layout) == {"schema_version": 2, "a": 2, **parts}


def test_a_damaged_receipt_is_the_users_error_and_is_named(scores: Config, tmp_path: Path) -> None:
    source = min((scores.score.output / "receipts").glob("*.json"))
    (tmp_path / "receipts").mkdir()
    good = source.read_bytes()
    for damage in (b"", good[:100], b"{}", b"[]", b"5", good.replace(b'"tokens"', b'"tok"')):
        (tmp_path / "receipts" / source.name).write_bytes(damage)
        with pytest.raises(UserError, match=source.name):
            read_receipts(Layout(tmp_path))

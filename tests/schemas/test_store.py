"""Files: a name appears whole or not at all, and stays."""

import hashlib
import os
from pathlib import Path

import pytest

from schemas.store import FolderStore, NotWritten, sha256_file, write_atomic


def names(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


def test_put_if_absent_never_replaces_and_says_so(tmp_path: Path) -> None:
    for content, expected in ((b"first", True), (b"second", False)):
        assert FolderStore(tmp_path).put_if_absent("receipt.json", content) is expected
        assert (tmp_path / "receipt.json").read_bytes() == b"first"
    assert names(tmp_path) == ["receipt.json"]


def test_put_replaces_and_leaves_no_temporary(tmp_path: Path) -> None:
    for content in (b"first", b"second"):
        FolderStore(tmp_path).put("shard", content)
        assert FolderStore(tmp_path).read("shard") == content
    assert names(tmp_path) == ["shard"]


@pytest.mark.parametrize("put", ["put", "put_if_absent"])
def test_what_the_disk_gives_back_differently_never_gets_the_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, put: str
) -> None:
    real = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: real(path)[:-1] + b"!")
    with pytest.raises(NotWritten, match="reads back differently"):
        getattr(FolderStore(tmp_path), put)("shard", b"content")
    assert names(tmp_path) == []


def test_names_are_sorted_and_leave_out_what_is_not_finished(tmp_path: Path) -> None:
    for name in ("b.json", "a.json", ".tmp-c.json-1", "d.txt"):
        (tmp_path / name).write_bytes(b"")
    assert FolderStore(tmp_path).names(".", ".json") == ["a", "b"]
    FolderStore(tmp_path).sweep(".")
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
    FolderStore(tmp_path).put_if_absent("b", b"x")
    assert calls == ["fsync", "replace", "fsync", "fsync", "link", "fsync"]


def test_sha256_file_is_the_sha256_of_the_bytes(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc" * 100_000)
    assert sha256_file(tmp_path / "a") == hashlib.sha256(b"abc" * 100_000).hexdigest()


def test_a_name_is_there_until_it_is_deleted_and_may_be_deleted_twice(tmp_path: Path) -> None:
    store = FolderStore(tmp_path)
    assert not store.exists("a")
    store.put("a", b"x")
    assert store.exists("a")
    for _ in range(2):
        store.delete("a")
        assert not store.exists("a")


def test_a_sweep_does_not_mind_another_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = [tmp_path / ".tmp-a", tmp_path / ".tmp-b"]
    monkeypatch.setattr(Path, "glob", lambda path, pattern: gone)
    FolderStore(tmp_path).sweep(".")


def test_an_atomic_write_makes_every_folder_above(tmp_path: Path) -> None:
    write_atomic(tmp_path / "a" / "b" / "file", b"x")
    assert (tmp_path / "a" / "b" / "file").read_bytes() == b"x"

"""Places: what a path and a URL name, and where something may be kept."""

import threading
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from schemas.object_store import ObjectStore, Url
from schemas.place import AnyPlace, Folder, each, is_bucket, open_store, to_place
from schemas.store import FolderStore

BUCKET = Url("s3://bucket", "runs")


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("runs/a", Path("runs/a")),
        ("file:///runs/a", Path("/runs/a")),
        (Path("runs"), Path("runs")),
        ("s3://bucket/runs/", BUCKET),
        ("abfss://box/runs", Url("abfss://box", "runs")),
        (BUCKET, BUCKET),
    ],
)
def test_a_place_is_a_path_or_a_url_and_reads_again_from_what_is_written(text: Any, place: Path | Url) -> None:
    assert to_place(text) == place and to_place(str(place)) == place
    field = TypeAdapter(AnyPlace)
    assert field.validate_python(text) == place and field.dump_python(place, mode="json") == str(place)
    store = open_store(place)
    assert isinstance(store, FolderStore if isinstance(place, Path) else ObjectStore) and store.root == place


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (3, "must be a path or a URL"),
        (None, "must be a path or a URL"),
        ("https://a/b", "`https://a/b` is no URL of an"),
    ],
)
def test_what_is_no_place_says_so(text: Any, said: str) -> None:
    with pytest.raises(ValueError, match=f"^{said}"):
        to_place(text)


def test_only_urls_that_are_read_and_written_here_are_buckets() -> None:
    assert is_bucket("s3://a/b") and is_bucket("gs://a") and is_bucket("az://a/b://c")
    assert not any(map(is_bucket, ("s3", "s3/a", "hf://datasets/a/b", "https://s3://a", "file:///s3")))


def test_a_folder_is_of_this_machine() -> None:
    folder = TypeAdapter(Folder)
    for given, path in (("runs/a", "runs/a"), (Path("runs/a"), "runs/a"), ("file:///runs", "/runs")):
        assert folder.validate_python(given) == Path(path)
    for url in ("s3://bucket/runs", "https://a/runs"):
        with pytest.raises(ValidationError, match=rf"`{url}`: must be a folder of this machine; .*`score\.output`"):
            folder.validate_python(url)


def test_each_of_a_bucket_waits_for_several_answers_at_once_and_of_a_folder_runs_here() -> None:
    together, threads = threading.Barrier(4, timeout=30), set[int]()

    def call(number: int, name: str) -> str:
        threads.add(threading.get_ident())
        together.wait()
        return f"{name}{number}"

    names = "abcdefgh"
    expected = [f"{name}{number}" for number, name in enumerate(names)]
    assert list(each(BUCKET, call, range(8), names)) == expected
    assert threading.get_ident() not in threads
    together, threads = threading.Barrier(1), set()
    assert list(each(Path("runs"), call, range(8), names)) == expected and threads == {threading.get_ident()}

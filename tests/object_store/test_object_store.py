"""A bucket behaves as a folder does, whatever the network does to a request."""

import pickle
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pipeline.cli import read_place
from schemas import object_store
from schemas.config import load_config
from schemas.errors import Unreachable, UserError
from schemas.object_store import ObjectStore, Url
from schemas.place import is_bucket, open_store, to_place
from schemas.store import FolderStore, NotWritten, Store
from tests.object_store.server import KINDS, PAGE, Proxy


@pytest.fixture(params=["folder", "bucket"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    made = open_store(tmp_path) if request.param == "folder" else open_store(request.getfixturevalue("root"))
    made.make("units")
    return made


def test_put_if_absent_never_replaces_and_put_does(store: Store) -> None:
    assert store.put_if_absent("units/a", b"first")
    assert not store.put_if_absent("units/a", b"second")
    assert store.read("units/a") == b"first"
    store.put("units/a", b"third")
    assert store.read("units/a") == b"third" == store.path("units/a").read_bytes()


def test_names_are_sorted_direct_and_visible_and_go_when_deleted(store: Store) -> None:
    assert store.names("units", ".json") == [] and not store.exists("units/a.json")
    store.make("units/deeper")
    for name in ("b.json", "a.json", "c.txt", ".hidden.json", "deeper/d.json"):
        store.put(f"units/{name}", b"x")
    assert store.names("units", ".json") == ["a", "b"]
    assert sorted(path.name for path in store.path("units").glob("*.json")) == [".hidden.json", "a.json", "b.json"]
    for _ in range(2):
        store.delete("units/a.json")
        assert store.names("units", ".json") == ["b"] and not store.exists("units/a.json")
    store.sweep("units")
    assert store.names("units", ".json") == ["b"]


def test_what_is_missing_is_a_file_not_found(store: Store) -> None:
    with pytest.raises(FileNotFoundError):
        store.read("units/a")
    with pytest.raises(FileNotFoundError):
        store.path("units/a").stat()


def test_a_listing_goes_on_after_a_page_of_names(root: Url) -> None:
    store, names = ObjectStore(root), [f"{number:03d}" for number in range(2 * PAGE + 1)]
    for name in names:
        store.put(f"units/{name}.json", b"")
    assert store.names("units", ".json") == names


def test_of_many_who_put_if_absent_at_once_one_is_told_that_it_did(root: Url) -> None:
    contents = [str(number).encode() for number in range(8)]
    with ThreadPoolExecutor(8) as writers:
        told = list(writers.map(lambda content: ObjectStore(root).put_if_absent("receipt", content), contents))
    assert told.count(True) == 1 and ObjectStore(root).read("receipt") == contents[told.index(True)]


@pytest.mark.parametrize("kind", KINDS)
def test_a_fault_of_any_kind_loses_nothing(kind: str, root: Url, proxy: Proxy) -> None:
    store, generator = ObjectStore(root), random.Random(1)
    store.put("first", b"so that the bucket has answered")
    proxy.trouble(0.3, seed=3, kinds=(kind,))
    contents = {f"units/{number}": generator.randbytes(generator.randrange(1, 20_000)) for number in range(4)}
    for number, (name, content) in enumerate(contents.items()):
        if number % 2:
            store.put(name, content)
        else:
            assert store.put_if_absent(name, content)
            assert not store.put_if_absent(name, b"another")
    assert store.names("units", "") == sorted(name.removeprefix("units/") for name in contents)
    assert {name: store.read(name) for name in contents} == contents
    for name, content in contents.items():
        with store.path(name).open() as file:
            file.seek(len(content) // 3)
            assert file.read() == content[len(content) // 3 :]
    assert proxy.faults[kind] >= 4, proxy.faults


def test_what_the_bucket_gives_back_differently_is_not_written(root: Url, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Url.read_bytes
    monkeypatch.setattr(Url, "read_bytes", lambda url: real(url)[:-1] + b"!")
    for put in (ObjectStore(root).put, ObjectStore(root).put_if_absent):
        with pytest.raises(NotWritten, match="reads back differently"):
            put(put.__name__, b"content")


def test_an_object_is_replaced_only_in_the_version_that_was_seen(root: Url) -> None:
    store = ObjectStore(root)
    store.put("lease", b"one")
    seen = (root / "lease").stat()
    assert store.put_if_unchanged("lease", b"two", seen)
    assert not store.put_if_unchanged("lease", b"three", seen)
    assert not store.put_if_unchanged("absent", b"three", seen)
    assert store.read("lease") == b"two"


def test_globs_of_a_bucket_are_those_of_fsspec(root: Url) -> None:
    names = ("a.jsonl", "b.jsonl", "c.parquet", "deep/d.jsonl", "deep/er/e.jsonl", "ab.jsonl.zst")
    for name in names:
        ObjectStore(root).put(name, b"x")

    def named(pattern: str) -> list[str]:
        return [str(url).removeprefix(f"{root}/") for url in Url(root.bucket).glob(f"{root.key}/{pattern}")]

    assert named("*.jsonl") == ["a.jsonl", "b.jsonl"] and named("?.jsonl") == ["a.jsonl", "b.jsonl"]
    assert named("[bc].*") == ["b.jsonl", "c.parquet"] and named("deep/*.jsonl") == ["deep/d.jsonl"]
    assert named("**/*.jsonl") == ["a.jsonl", "b.jsonl", "deep/d.jsonl", "deep/er/e.jsonl"]
    assert named("nothing*") == [] and list(root.glob("*.zst")) == [root / "ab.jsonl.zst"]


def test_a_url_is_put_together_and_taken_apart_as_a_path_is() -> None:
    url = Url.parse("s3://bucket/runs//mine/scores/")
    assert str(url) == "s3://bucket/runs/mine/scores" and url == Url("s3://bucket", "runs/mine/scores")
    assert (url / "units/a.parquet").stem == "a" and (url / "a.json").name == "a.json" and (url / "a").parent == url
    assert Url.parse(str(Url("gs://bucket"))).key == "" and pickle.loads(pickle.dumps(url)) == url
    assert (
        to_place("runs/a") == Path("runs/a") and to_place("file:///x/y") == Path("/x/y") and to_place(str(url)) == url
    )
    assert isinstance(open_store(Path("x")), FolderStore)
    assert not is_bucket("hf://datasets/x") and not is_bucket("s3/x") and is_bucket("az://container/x")
    for wrong in ("ftp://host/x", "s3://", "s3:///x"):
        with pytest.raises(ValueError, match="no URL of an object store"):
            to_place(wrong)


def test_a_bucket_that_is_not_there_is_the_users_to_mend(proxy: Proxy) -> None:
    for call in (lambda url: ObjectStore(url).put("a", b"x"), lambda url: ObjectStore(url).names("units", "")):
        with pytest.raises(UserError, match="no such bucket"):
            call(Url("s3://nowhere-at-all"))


def test_an_endpoint_that_does_not_answer_is_named_after_a_while(
    root: Url, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(object_store, "FIRST_PATIENCE_SECONDS", 0.5)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(Unreachable, match=r"s3://scores/.*127.0.0.1:9.*docs/object-stores.md"):
        ObjectStore(root).read("a")


def test_a_server_that_hangs_is_given_up_and_asked_again(
    root: Url, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    ObjectStore(root).put("a", b"x")
    monkeypatch.setitem(object_store.CLIENT, "timeout", "200ms")
    object_store._client.cache_clear()
    proxy.trouble(0.4, seed=2, kinds=("late",))
    for _ in range(6):
        assert ObjectStore(root).read("a") == b"x"
        ObjectStore(root).put_if_absent("b", b"y")
    assert proxy.faults["late"] > 1


def test_profiles_of_the_aws_tools_are_used(
    root: Url, proxy: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL", "AWS_REGION"):
        monkeypatch.delenv(name)
    (tmp_path / "credentials").write_text("[lab]\naws_access_key_id = of-the-lab\naws_secret_access_key = secret\n")
    (tmp_path / "config").write_text(f"[profile lab]\nregion = us-east-1\nendpoint_url = {proxy.url}\n")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_PROFILE", "lab")
    ObjectStore(root).put("a", b"x")
    assert ObjectStore(root).read("a") == b"x"
    object_store._client.cache_clear()
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    with pytest.raises(UserError, match=r"nobody.*AWS_PROFILE"):
        ObjectStore(root).read("a")


def test_a_machine_without_a_bucket_imports_no_obstore() -> None:
    code = "import sys, schemas.receipt, schemas.lock, score_jobs.inputs; assert 'obstore' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("field", ["root", "train.output", "train.cache", "reference.train.output"])
def test_what_must_be_a_folder_is_no_url(field: str) -> None:
    demo = Path(__file__).resolve().parents[2] / "configs" / "demo.yaml"
    with pytest.raises(UserError, match=rf"field `{field}`: .*only `score.output` may be a URL"):
        load_config(demo, {field: "s3://bucket/x"})
    assert load_config(demo, {"root": "file:///x"}).score.output == Path("/x/scores")
    assert load_config(demo, {"score.output": "gs://bucket/x/"}).score.output == Url("gs://bucket", "x")
    with pytest.raises(UserError, match=r"field `score.output`: .*no URL of an object store"):
        load_config(demo, {"score.output": "ftp://host/x"})


def test_a_verb_that_is_given_a_url_of_another_kind_says_so() -> None:
    with pytest.raises(UserError, match=r"ftp://host/x.*no URL of an object store"):
        read_place("ftp://host/x")
    assert read_place("runs/demo") == Path("runs/demo") and read_place("s3://b/x") == Url("s3://b", "x")

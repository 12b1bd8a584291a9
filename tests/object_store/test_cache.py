"""Stage 2 reads a bucket as it reads a folder, each byte once a node, within a bound, and notices a damaged cache."""

import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from pipeline.train import train_live
from schemas.config import Config, load_config
from schemas.errors import UserError
from schemas.object_store import ObjectStore, Url
from schemas.receipt import Layout
from schemas.shard import Window
from tests.object_store.server import Proxy
from trainer.cache import Cache
from trainer.data import ScoreShards

PLENTY = 10_000_000


@pytest.fixture
def far(scores: Config, root: Url) -> Url:
    """The finished dataset, in the bucket."""
    for path in scores.score.output.rglob("*"):
        if path.is_file():
            ObjectStore(root).put(str(path.relative_to(scores.score.output)), path.read_bytes())
    return root


def windows(shards: ScoreShards) -> list[Window]:
    return [window for group in range(len(shards.groups)) for window in shards.read(group)]


def same(one: list[Window], other: list[Window]) -> bool:
    fields = ("tokens", "ref_loss", "ref_entropy")
    return [window.doc_id for window in one] == [window.doc_id for window in other] and all(
        np.array_equal(getattr(a, name), getattr(b, name), equal_nan=True)
        for a, b in zip(one, other, strict=True)
        for name in fields
    )


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def test_a_bucket_is_read_as_a_folder_through_faults_and_each_byte_once(
    scores: Config, far: Url, proxy: Proxy, tmp_path: Path
) -> None:
    proxy.trouble(0.1, seed=9)
    here, there = ScoreShards(scores.score.output), ScoreShards(far, cache=Cache(tmp_path / "cache", PLENTY))
    assert there.fingerprint == here.fingerprint and there.group_sizes.tolist() == here.group_sizes.tolist()
    assert same(windows(there), windows(here))
    proxy.trouble(0)
    assert same(windows(there), windows(here)) and not proxy.requests
    again = ScoreShards(far, cache=Cache(tmp_path / "cache", PLENTY))
    proxy.trouble(0)
    assert same(windows(again), windows(here)) and not proxy.requests


def test_the_cache_stays_within_its_bound_and_its_files_are_its_users_alone(
    scores: Config, far: Url, tmp_path: Path
) -> None:
    bound, whole = 60_000, windows(ScoreShards(scores.score.output))
    there = ScoreShards(far, cache=Cache(tmp_path / "cache", bound))
    for _ in range(2):
        for group in range(len(there.groups)):
            there.read(group)
            assert size(tmp_path / "cache") <= bound
    assert size(tmp_path / "cache") > bound / 4 and same(windows(there), whole)
    assert (tmp_path / "cache").stat().st_mode & 0o077 == 0
    nothing = ScoreShards(far, cache=Cache(tmp_path / "none", 0))
    assert same(windows(nothing), whole) and not (tmp_path / "none").exists()


def test_what_was_read_last_is_kept_longest(root: Url, proxy: Proxy, tmp_path: Path) -> None:
    cache = Cache(tmp_path, 80_000)
    for name in "abcdefgh":
        ObjectStore(root).put(name, name.encode() * 9_000)

    def requests(name: str) -> int:
        before = sum(proxy.requests.values())
        with cache.open(root / name) as file:  # type: ignore[union-attr]
            assert file.read() == name.encode() * 9_000
        for path in tmp_path.iterdir():  # a file system's clock may be coarse
            os.utime(path, (path.stat().st_atime, path.stat().st_mtime - 10))
        return sum(proxy.requests.values()) - before

    assert all(requests(name) for name in "abcdefg")
    assert not requests("a")
    assert requests("h")  # seven have room: now `b` must have gone
    assert not requests("a") and not requests("c") and requests("b")


def test_a_damaged_file_of_the_cache_is_fetched_again(scores: Config, far: Url, tmp_path: Path) -> None:
    whole, cache = windows(ScoreShards(scores.score.output)), tmp_path / "cache"
    there = ScoreShards(far, cache=Cache(cache, PLENTY))
    assert same(windows(there), whole)
    good = {path: path.read_bytes() for path in cache.iterdir()}
    for number, (path, content) in enumerate(good.items()):
        flipped = bytearray(content)
        if content:
            flipped[number % len(content)] ^= 1
        path.write_bytes((flipped, content[: len(content) // 2], b"")[number % 3])
    assert same(windows(there), whole)
    assert all(path.read_bytes() == content for path, content in good.items() if content)


def test_processes_of_a_node_fetch_once_together(scores: Config, far: Url, proxy: Proxy, tmp_path: Path) -> None:
    ranks = [ScoreShards(far, cache=Cache(tmp_path / "cache", PLENTY)) for _ in range(4)]
    shutil.rmtree(tmp_path / "cache")
    proxy.trouble(0)
    with ThreadPoolExecutor(4) as pool:
        read = list(pool.map(windows, ranks))
    assert all(same(found, read[0]) for found in read)
    shards, groups = len(Layout(far).committed()), len(ranks[0].groups)
    assert proxy.requests["GET"] <= shards + groups + 1  # each footer, each group, and the listing here


def test_a_cache_that_cannot_be_written_is_the_users_to_mend(far: Url, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"train\.cache: .*file/cache.*train\.cache_bytes"):
        ScoreShards(far, cache=Cache(tmp_path / "file" / "cache", PLENTY))


def test_a_full_disk_costs_the_cache_alone(
    scores: Config, far: Url, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, content: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    there = ScoreShards(far, cache=Cache(tmp_path / "cache", PLENTY))
    assert same(windows(there), windows(ScoreShards(scores.score.output)))


def test_a_shard_that_is_gone_from_the_bucket_is_named(far: Url) -> None:
    victim = Layout(far).committed()[0]
    ObjectStore(far).delete(Layout.name(Layout.UNITS, victim))
    with pytest.raises(UserError, match=rf"{Layout(far).shard(victim)}: missing"):
        ScoreShards(far)


def test_training_from_a_bucket_gives_the_weights_of_training_from_a_folder(
    scores: Config, far: Url, proxy: Proxy, tmp_path: Path, make_config: Callable, write_config: Callable
) -> None:
    weights = []
    for name, output in (("here", str(scores.score.output)), ("there", str(far))):
        changes = {"score.output": output, "train.cache": str(tmp_path / "cache"), "score.entropy": True}
        config = load_config(write_config(make_config(tmp_path / name, changes), tmp_path / f"{name}.yaml"))
        proxy.trouble(0.2, seed=10)
        weights.append((train_live(config) / "model.safetensors").read_bytes())
    assert sum(proxy.faults.values()) > 3 and weights[0] == weights[1]

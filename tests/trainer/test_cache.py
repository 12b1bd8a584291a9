"""The cache of a node by its files: what is fetched once, what is kept, what is thrown away, beside a store of a few lines."""

import os
import re
from pathlib import Path

import pytest
import xxhash

from schemas.errors import UserError
from trainer.cache import DIGEST_BYTES, Cache

PLENTY = 1_000_000


class Object:
    """An object of a store in memory; notes what is asked of it."""

    def __init__(self, name, content, version="1"):
        self.name, self.content, self.version, self.asked = name, content, version, []

    def __str__(self):
        return self.name

    @property
    def st_size(self):
        return len(self.content)

    def stat(self):
        self.asked.append("stat")
        return self

    def read_range(self, start, length):
        self.asked.append((start, length))
        return self.content[start : start + length]


def read(cache, place, start=0, length=-1):
    with cache.open(place) as file:
        file.seek(start)
        return file.read(length)


@pytest.fixture
def place():
    return Object("s3://b/a", bytes(range(200)))


def files(folder):
    return [path for path in folder.iterdir() if not path.name.startswith(".lock-")]


def test_each_range_of_each_version_is_fetched_once_and_is_what_the_store_holds(tmp_path, place):
    cache = Cache(tmp_path, PLENTY)
    for _ in range(2):
        assert cache.size(place) == 200
        assert (
            read(cache, place, 10, 50) == place.content[10:60] and read(cache, place, 60, 50) == place.content[60:110]
        )
    assert place.asked == ["stat", (10, 50), (60, 50)]
    again = Object("s3://b/a", place.content)
    assert read(Cache(tmp_path, PLENTY), again, 10, 50) == place.content[10:60] and again.asked == ["stat"]
    for other in (Object("s3://b/a", bytes(200), "2"), Object("s3://b/other", bytes(200))):
        assert read(Cache(tmp_path, PLENTY), other, 10, 50) == bytes(50) and other.asked == ["stat", (10, 50)]
    assert len(files(tmp_path)) == 4
    for path in files(tmp_path):
        content = path.read_bytes()
        assert content[:DIGEST_BYTES] == xxhash.xxh3_128_digest(content[DIGEST_BYTES:])


def test_a_file_system_is_left_to_itself(tmp_path):
    (tmp_path / "file").write_bytes(b"12345")
    cache = Cache(tmp_path / "cache", PLENTY)
    assert cache.size(tmp_path / "file") == 5 and cache.open(tmp_path / "file") == tmp_path / "file"
    assert not (tmp_path / "cache").exists()
    with pytest.raises(FileNotFoundError):
        cache.size(tmp_path / "none")


def test_the_folder_is_the_users_alone_made_with_those_above_it_and_a_temporary_one_unless_it_is_named(tmp_path, place):
    read(Cache(tmp_path / "deep" / "cache", PLENTY), place)
    assert (tmp_path / "deep" / "cache").stat().st_mode & 0o777 == 0o700
    locks = [path for path in (tmp_path / "deep" / "cache").iterdir() if path.name.startswith(".lock-")]
    assert len(locks) == 1 and locks[0].stat().st_mode & 0o777 == 0o600
    assert re.fullmatch(r"tokensift-\d+", Cache().folder.name) and Cache().folder.name.endswith(str(os.getuid()))
    assert Cache().most_bytes == 0


@pytest.mark.parametrize("most", [0, 200])
def test_what_would_not_leave_room_for_others_is_read_from_the_store_each_time(tmp_path, place, most):
    cache = Cache(tmp_path / "cache", most)
    for _ in range(2):
        assert read(cache, place) == place.content
    assert place.asked == ["stat", (0, 200), (0, 200)] and not (tmp_path / "cache").exists()


def test_a_range_is_kept_if_it_and_its_digest_take_no_more_than_the_eighth_that_is_left_free(tmp_path, place):
    for most, kept in ((216 * 8, True), (216 * 8 - 1, False)):
        cache = Cache(tmp_path / str(most), most)
        assert read(cache, place) == place.content and (tmp_path / str(most)).exists() is kept


def test_what_was_not_read_for_longest_goes_first_and_no_more_than_is_needed(tmp_path):
    places = [Object(f"s3://b/{number}", bytes([number]) * 84) for number in range(11)]  # 100 bytes of the cache each
    cache = Cache(tmp_path, 1000)
    old = {}
    for number, place in enumerate(places[:8]):
        read(cache, place)
        (path,) = set(files(tmp_path)) - set(old)
        old[path] = number
        os.utime(path, (1000 + number, 1000 + number))
    assert len(old) == 8  # 800 of 875 bytes
    read(cache, places[0])  # now it was read last
    read(cache, places[8])
    assert [old[path] for path in old if not path.exists()] == [1]
    read(cache, places[9])
    assert [old[path] for path in old if not path.exists()] == [1, 2] and len(files(tmp_path)) == 8


def test_nothing_is_looked_over_until_a_sixty_fourth_of_the_bound_was_written_but_at_the_start(tmp_path, monkeypatch):
    looks = []
    monkeypatch.setattr(Cache, "_make_room", lambda self: looks.append(len(files(tmp_path))))
    cache = Cache(tmp_path, 64 * 250)
    for number in range(7):
        read(cache, Object(f"s3://b/{number}", bytes(84)))
    assert looks == [1, 4, 7]


@pytest.mark.parametrize(
    "damage", [lambda content: content[:-1], lambda content: b"", lambda content: b"?" + content[1:]]
)
def test_a_damaged_file_is_fetched_again_and_mended(tmp_path, place, damage):
    read(Cache(tmp_path, PLENTY), place)
    (path,) = files(tmp_path)
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    assert read(Cache(tmp_path, PLENTY), place) == place.content and path.read_bytes() == whole


def test_a_folder_that_cannot_be_made_is_the_users_to_mend(tmp_path, place):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        UserError, match=r"train\.cache: .*file/cache: cannot be written to \(Not a dir.*cache_bytes: 0"
    ):
        read(Cache(tmp_path / "file" / "cache", PLENTY), place)


def test_a_full_disk_costs_the_cache_alone_and_leaves_nothing_half_written(tmp_path, place, monkeypatch):
    real = Path.write_bytes

    def full(path, content):
        real(path, content[:20])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    assert read(Cache(tmp_path, PLENTY), place) == place.content and not files(tmp_path)


def test_a_file_that_another_process_took_away_meanwhile_is_no_trouble(tmp_path, place, monkeypatch):
    cache = Cache(tmp_path, 1000)
    for number in range(8):
        read(cache, Object(f"s3://b/{number}", bytes(84)))
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")  # listed, and not there to be looked at
    real = Path.unlink
    monkeypatch.setattr(Path, "unlink", lambda path, missing_ok=False: (real(path), real(path, missing_ok)))
    assert read(cache, place, 0, 84) == place.content[:84]
    assert len(files(tmp_path)) <= 9

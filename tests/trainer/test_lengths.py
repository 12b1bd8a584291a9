"""The index of lengths: the same on any number of ranks, each group read by one of them, and never another dataset's."""

import numpy as np
import pytest
import xxhash

from schemas.errors import UserError
from tests.trainer.threads import on_threads
from trainer.lengths import NAME, indexed
from trainer.ranks import ALONE

SIZES = np.array([3, 1, 4, 2, 5])
COUNTS = np.stack([np.arange(15) * 7 + 1, np.arange(15) * 3])


class Shards:
    """Counts of the groups, as they would be read; notes which groups were."""

    def __init__(self, kinds):
        self.kinds, self.read = kinds, []

    def __call__(self, first, end):
        for group in range(first, end):
            self.read.append(group)
            start = int(SIZES[:group].sum())
            yield COUNTS[: self.kinds, start : start + SIZES[group]].astype(np.int32)


@pytest.mark.parametrize("kinds", [1, 2])
@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_each_group_is_read_by_one_rank_and_every_rank_holds_all_in_stored_order(tmp_path, world, kinds):
    shards = Shards(kinds)
    for read in (list(range(len(SIZES))), []):  # then it is taken from where it was stored
        shards.read.clear()
        found = on_threads(world, lambda ranks: indexed(tmp_path, "print", SIZES, shards, ranks, kinds))
        assert all(counts.dtype == np.int32 and np.array_equal(counts, COUNTS[:kinds]) for counts in found)
        assert sorted(shards.read) == read
    content = (tmp_path / NAME).read_bytes()
    assert np.array_equal(np.frombuffer(content[16:], "<u4").reshape(kinds, -1), COUNTS[:kinds])
    assert content[:16] == xxhash.xxh3_128_digest(b"print" + content[16:])


def test_ranks_share_the_groups_evenly_and_the_first_alone_stores_them(tmp_path):
    shards = [Shards(1) for _ in range(3)]
    for rank in range(3):
        (tmp_path / str(rank)).mkdir()
    on_threads(3, lambda ranks: indexed(tmp_path / str(ranks.rank), "print", SIZES, shards[ranks.rank], ranks))
    assert [len(own.read) for own in shards] == [1, 2, 2]
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob(NAME)] == [f"0/{NAME}"]


def test_where_one_rank_lacks_the_index_all_of_them_read(tmp_path):
    (tmp_path / "0").mkdir()
    indexed(tmp_path / "0", "print", SIZES, Shards(1), ALONE)
    assert (tmp_path / "0" / NAME).exists()
    shards = Shards(1)
    found = on_threads(2, lambda ranks: indexed(tmp_path / str(ranks.rank), "print", SIZES, shards, ranks))
    assert sorted(shards.read) == list(range(5)) and all(np.array_equal(counts, COUNTS[:1]) for counts in found)


DAMAGE = {
    "a digest that is not its own": lambda content: bytes([content[0] ^ 1]) + content[1:],
    "another count": lambda content: content[:-1] + bytes([content[-1] ^ 1]),
    "too short": lambda content: content[:-4],
    "empty": lambda content: b"",
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_index_is_made_again_and_mended(tmp_path, damage):
    indexed(tmp_path, "print", SIZES, Shards(1), ALONE)
    whole = (tmp_path / NAME).read_bytes()
    (tmp_path / NAME).write_bytes(damage(whole))
    shards = Shards(1)
    assert np.array_equal(indexed(tmp_path, "print", SIZES, shards, ALONE), COUNTS[:1])
    assert shards.read == list(range(5)) and (tmp_path / NAME).read_bytes() == whole


def test_an_index_of_another_dataset_or_without_what_is_trained_on_is_not_taken(tmp_path):
    indexed(tmp_path, "print", SIZES, Shards(1), ALONE)
    for fingerprint, kinds in (("other", 1), ("other", 2)):
        shards = Shards(kinds)
        assert np.array_equal(indexed(tmp_path, fingerprint, SIZES, shards, ALONE, kinds), COUNTS[:kinds])
        assert shards.read == list(range(5))


def test_a_place_that_cannot_be_written_to_costs_the_stored_index_alone(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("no folder")
    assert np.array_equal(indexed(tmp_path / "file", "print", SIZES, Shards(1), ALONE), COUNTS[:1])

    def refused(_root):
        raise UserError("s3://bucket: cannot be written to", "ask for it")

    monkeypatch.setattr("trainer.lengths.open_store", refused)
    assert np.array_equal(indexed(tmp_path / "file", "print", SIZES, Shards(1), ALONE), COUNTS[:1])

"""What ranks say to each other, against a second rank that is written out here."""

import os
import signal
import sys
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

import trainer.ranks
from schemas.errors import UserError
from trainer.ranks import Ranks, die_with_parent, joined

CPU = torch.device("cpu")


@pytest.fixture
def two(monkeypatch):
    """Rank 1 of two; the other one has 5 of everything. Returns what the two of them did together."""
    done = []

    def all_reduce(values, op=dist.ReduceOp.SUM):
        done.append(values.device)
        other = torch.full_like(values, 5)
        found = {
            dist.ReduceOp.SUM: values + other,
            dist.ReduceOp.MIN: torch.minimum(values, other),
            dist.ReduceOp.MAX: torch.maximum(values, other),
        }[op]
        values.copy_(found)

    def broadcast(box, src, device):
        assert (src, device) == (0, CPU)
        box[:] = ["the first one's"]

    def gather(every, values):
        every.copy_(torch.cat([torch.full_like(values, 5), values]))

    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    monkeypatch.setattr(dist, "broadcast_object_list", broadcast)
    monkeypatch.setattr(dist, "barrier", lambda: done.append("met"))
    monkeypatch.setattr(trainer.ranks, "gather_into", gather)
    return Ranks(1, 2, CPU), done


def test_two_ranks_add_compare_gather_and_share(two):
    ranks, done = two
    assert not ranks.first
    assert ranks.sum(torch.tensor([1.0, 2.0])).tolist() == [6, 7]
    assert ranks.least(torch.tensor([1.0, 9.0])).tolist() == [1, 5]
    assert (ranks.greatest(3), ranks.greatest(8)) == (5, 8) and isinstance(ranks.greatest(3), int)
    assert ranks.gather(torch.tensor([1.0, 2.0, 3.0])).tolist() == [[5, 5, 5], [1, 2, 3]]
    assert ranks.share("mine") == "the first one's"
    assert set(done) == {CPU}
    ranks.wait()
    assert done[-1] == "met"


def test_one_rank_alone_asks_nobody(two):
    alone, (_, done) = Ranks(0, 1, CPU), two
    assert alone.first
    values = torch.tensor([1.0, 2.0])
    assert alone.sum(values).tolist() == alone.least(values).tolist() == [1, 2]
    assert alone.gather(values).tolist() == [[1, 2]]
    assert (alone.greatest(3), alone.share("mine")) == (3, "mine")
    alone.wait()
    assert not done


class Store(dict):
    """Where ranks meet, with one of two there; `wait` fails for who never came."""

    def set(self, key, value):
        self[key] = value

    def wait(self, keys, limit):
        self.limit = limit
        if set(keys) - {"joined/0", *self}:
            raise dist.DistStoreError("nobody\nand more")


@pytest.fixture
def meeting(monkeypatch):
    """Environment of rank 1 of two, a store that knows rank 0, and a group that notes how it was made."""
    store, made = Store(), {}
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    def rendezvous(url, timeout):
        made.update(url=url, timeout=timeout)
        yield store, 1, made.get("world", 2)

    def init(backend, **options):
        made.update(backend=backend, **options)

    monkeypatch.setattr(trainer.ranks, "rendezvous", rendezvous)
    monkeypatch.setattr(dist, "PrefixStore", lambda prefix, inner: (prefix, inner))
    monkeypatch.setattr(dist, "init_process_group", init)
    monkeypatch.setattr(dist, "is_initialized", lambda: "backend" in made)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: made.update(ended=True))
    return store, made


def test_ranks_meet_within_the_time_to_join_and_work_within_a_longer_one(meeting):
    store, made = meeting
    with joined() as ranks:
        assert ranks == Ranks(1, 2, CPU) and "ended" not in made
    assert store == {"joined/1": ""}
    assert made == {
        "url": "env://",
        "timeout": timedelta(seconds=120),
        "backend": "gloo",
        "store": ("group", store),
        "rank": 1,
        "world_size": 2,
        "ended": True,
    } | {"timeout": timedelta(seconds=1800)}
    assert store.limit == timedelta(seconds=120)


def test_a_rank_that_never_comes_is_one_error(meeting):
    _, made = meeting
    made["world"] = 3
    with pytest.raises(UserError) as caught, joined():
        pytest.fail("nobody came")
    assert caught.value.problem == "rank 1: another rank did not join within 120 s (nobody)"
    assert caught.value.fix == "see what the others print, end what is left of the run, and start it again"
    assert "ended" not in made


@pytest.mark.parametrize("error", [RuntimeError("[gloo/x.cc] Connection closed\nmore"), dist.DistBackendError("gone")])
def test_a_lost_rank_is_one_error_that_says_how_to_go_on(meeting, error):
    with pytest.raises(UserError) as caught, joined():
        raise error
    assert caught.value.problem == f"rank 1 of 2: lost another rank ({str(error).splitlines()[0]})"
    fix = "its own message says why; run the same command again to go on from the last checkpoint"
    assert caught.value.fix == fix
    assert meeting[1]["ended"]


@pytest.mark.parametrize("world", ["1", "2"])
def test_errors_that_are_no_lost_rank_pass(meeting, monkeypatch, world):
    monkeypatch.setenv("WORLD_SIZE", world)
    with pytest.raises(RuntimeError, match="our own"), joined():
        raise RuntimeError("our own")


def test_one_rank_alone_calls_no_error_a_lost_rank(meeting, monkeypatch):
    monkeypatch.delenv("WORLD_SIZE")
    with pytest.raises(RuntimeError, match="gloo"), joined() as ranks:
        assert ranks == Ranks(0, 1, CPU)
        raise RuntimeError("gloo")
    assert "backend" not in meeting[1]


def test_a_rank_takes_the_gpu_of_its_place_on_its_node(meeting, monkeypatch):
    taken = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setenv("LOCAL_RANK", "3")
    with joined() as ranks:
        assert ranks.device == torch.device("cuda", 3)
    monkeypatch.delenv("LOCAL_RANK")
    with joined() as ranks:
        assert ranks.device == torch.device("cuda", 0)
    assert taken == [torch.device("cuda", 3), torch.device("cuda", 0)] and meeting[1]["backend"] == "nccl"


class Prctl:
    def __init__(self):
        self.asked = []

    def __call__(self, name, use_errno):
        assert name is None
        return self

    def prctl(self, *arguments):
        self.asked.append(arguments)


@pytest.mark.parametrize(
    ("elastic", "platform", "asked"), [(True, "linux", True), (False, "linux", False), (True, "darwin", False)]
)
def test_a_rank_of_torchrun_asks_the_kernel_to_end_it_with_its_agent(monkeypatch, elastic, platform, asked):
    prctl = Prctl()
    monkeypatch.setattr(trainer.ranks.ctypes, "CDLL", prctl)
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    if elastic:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "run")
    die_with_parent()
    assert prctl.asked == ([(1, signal.SIGKILL)] if asked else [])


def test_a_rank_whose_agent_died_before_it_asked_ends_itself(monkeypatch):
    monkeypatch.setattr(trainer.ranks.ctypes, "CDLL", Prctl())
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "run")
    parents, ended = iter([40, 1]), []
    monkeypatch.setattr(os, "getppid", lambda: next(parents))
    monkeypatch.setattr(os, "_exit", ended.append)
    die_with_parent()
    assert ended == [1]

"""Several copies of a model among the ranks (HSDP), as four processes: 2 x 2, 4 x 1, against one copy over all four."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file

from schemas.errors import UserError
from tests.trainer.conftest import read_rows
from tests.trainer.spawned import run_job
from trainer import checkpoint
from trainer.parts import Parts
from trainer.ranks import Ranks, holders

FIELDS = {"scope": "sequence", "micro_rows": 1, "epochs": 0.5, "checkpoint_every": 2, "keep_every": 2}
CUT = 4  # the step that runs go on from
FIGURES = (
    "position",
    "tokens_seen",
    "tokens_selected",
    "loss_all",
    "loss_kept",
    "loss_dropped",
    "threshold",
    "grad_norm",
)


def go(config, folder, name, ranks, **fields):
    settings = config.train.model_copy(update={**FIELDS, **fields, "output": folder / name})
    run_job(config, settings, Path(config.base), ranks)


def cut(folder, source, target):
    """A run as a kill after step `CUT` left it."""
    kept = folder / source / "checkpoints" / f"step-{CUT:07d}"
    shutil.copytree(kept, folder / target / "checkpoints" / kept.name)
    shutil.copy(folder / source / "metrics.jsonl", folder / target)


def work(rank, meeting, config, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=4)
    ranks = Ranks(rank, 4, torch.device("cpu"))
    go(config, folder, "one copy", ranks)
    go(config, folder, "two copies", ranks, shard_ranks=2)
    if rank == 0:
        for target in ("again", "four copies", "on one rank"):
            cut(folder, "two copies", target)
    dist.barrier()
    go(config, folder, "again", ranks, shard_ranks=2)
    go(config, folder, "four copies", ranks, shard_ranks=1)
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def runs(scores, tmp_path_factory):
    folder = tmp_path_factory.mktemp("copies")
    mp.spawn(work, (folder / "meeting", scores, folder), nprocs=4)
    go(scores, folder, "on one rank", Ranks(0, 1, torch.device("cpu")), shard_ranks=2)
    return SimpleNamespace(folder=folder, rows=lambda name: figures(read_rows(folder / name)))


def figures(rows):
    return torch.tensor([[row[name] for name in FIGURES] for row in rows], dtype=torch.float64)


def test_several_copies_make_the_steps_of_one_copy_over_all_ranks(runs):
    one, two = runs.rows("one copy"), runs.rows("two copies")
    assert len(one) >= 6 and torch.equal(one[:, :3], two[:, :3])
    assert torch.allclose(one, two, rtol=1e-5, atol=1e-6)  # gradients are added up in another order


def test_law_10_a_run_of_copies_goes_on_to_the_bit_and_as_other_copies_or_alone_within_rounding(runs):
    whole = runs.rows("two copies")
    assert torch.equal(runs.rows("again"), whole)
    for name in ("four copies", "on one rank"):
        assert torch.equal(runs.rows(name)[:CUT], whole[:CUT]) and torch.equal(runs.rows(name)[:, :3], whole[:, :3])
        assert torch.allclose(runs.rows(name), whole, rtol=1e-5, atol=1e-6), name


@pytest.mark.parametrize(("name", "files"), [("one copy", 4), ("two copies", 2), ("four copies", 1)])
def test_one_copy_alone_writes_a_checkpoint_and_it_holds_the_whole_model(runs, name, files):
    last = checkpoint.newest(runs.folder / name / "checkpoints")
    assert [path.name for path in sorted(last.glob("rank-*"))] == [f"rank-{n:05d}.safetensors" for n in range(files)]
    parts, final = Parts(last), load_file(runs.folder / name / "final" / "model.safetensors")
    for tensor, values in final.items():
        assert torch.equal(torch.cat(list(parts.blocks(f"weight|{tensor}"))), values), tensor
        assert parts.shape(f"exp_avg|{tensor}") == list(values.shape), tensor


def lost(last, other):
    (last / "rank-00001.safetensors").unlink()
    return "rank-00001.safetensors: missing"


def torn(last, other):
    path = last / "rank-00001.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    return "rank-00001.safetensors: not the bytes that were written"


def of_another_layout(last, other):
    shutil.copy(other / "rank-00002.safetensors", last)
    return "rank-00002.safetensors: not one of the checkpoint's own files"


def of_another_run(last, other):
    shutil.copy(other / "rank-00000.safetensors", last)
    return "rank-00000.safetensors: not the bytes that were written"


@pytest.mark.parametrize("damage", [lost, torn, of_another_layout, of_another_run])
def test_a_torn_or_foreign_file_among_those_of_a_copy_is_refused_by_name(runs, tmp_path, damage):
    last, other = (checkpoint.newest(runs.folder / name / "checkpoints") for name in ("two copies", "one copy"))
    copied = shutil.copytree(last, tmp_path / last.name)
    checkpoint.load_state(copied)
    problem = damage(copied, other)
    with pytest.raises(UserError, match=problem):
        checkpoint.load_state(copied)


def test_ranks_are_a_whole_number_of_copies():
    assert [holders(8, most) for most in (None, 8, 4, 2, 1, 16)] == [8, 8, 4, 2, 1, 8]
    with pytest.raises(UserError, match=r"train.shard_ranks: 8 ranks are no whole number of copies of 3"):
        holders(8, 3)

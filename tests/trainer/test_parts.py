"""A checkpoint's files against torch.chunk, which says how sharding cuts, and the safetensors library, which reads them."""

import json
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import LlamaConfig, LlamaForCausalLM

from schemas.forward import Opened
from trainer import parts
from trainer.live import Live
from trainer.parts import Parts, Snapshot, buffers, fill, hash_file, own

DTYPES = [torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.bool]


def tensors_of(seed, shapes):
    torch.manual_seed(seed)
    return {
        f"t{number}": (torch.randn(shape) * 9).to(DTYPES[number % len(DTYPES)]) for number, shape in enumerate(shapes)
    }


def written_by(folder, tensors, world):
    """The files of `world` ranks, each with its chunk of every tensor; tensors without rows are the first one's."""
    hashes = []
    for rank in range(world):
        own = {name: tensor for name, tensor in tensors.items() if not tensor.ndim and not rank}
        chunks = {name: tensor.chunk(world) for name, tensor in tensors.items() if tensor.ndim}
        own |= {name: chunk[rank] for name, chunk in chunks.items() if rank < len(chunk)}
        snapshot = Snapshot()
        snapshot.take(own)
        hashes.append(snapshot.write(folder / f"rank-{rank:05d}.safetensors"))
    return hashes


SHAPES = st.lists(st.lists(st.integers(1, 7), max_size=3).map(tuple), min_size=1, max_size=6)


@settings(max_examples=30)
@given(shapes=SHAPES, world=st.integers(1, 5), seed=st.integers(0, 9), block=st.integers(1, 64), data=st.data())
def test_any_rows_are_read_whole_however_many_ranks_wrote_them(tmp_path_factory, shapes, world, seed, block, data):
    folder, tensors = tmp_path_factory.mktemp("parts"), tensors_of(seed, shapes)
    written_by(folder, tensors, world)
    found = Parts(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts, "BLOCK_BYTES", block)
        for name, tensor in tensors.items():
            assert found.shape(name) == list(tensor.shape) and found.dtype(name) == tensor.dtype
            into = torch.empty_like(tensor)
            found.read(name, into)
            assert torch.equal(into, tensor)
            blocks = list(found.blocks(name))
            assert torch.equal(torch.cat(blocks) if tensor.ndim else blocks[0], tensor)
            if tensor.ndim:
                start = data.draw(st.integers(0, len(tensor)))
                stop = data.draw(st.integers(start, len(tensor)))
                rows = list(found.rows(name, start, stop))
                assert torch.equal(torch.cat([tensor[:0], *rows]), tensor[start:stop])


@settings(max_examples=30)
@given(shapes=SHAPES, seed=st.integers(0, 9))
def test_a_file_is_one_that_the_safetensors_library_reads_and_its_hash_is_the_files(tmp_path_factory, shapes, seed):
    folder, tensors = tmp_path_factory.mktemp("parts"), tensors_of(seed, shapes)
    (said,) = written_by(folder, tensors, 1)
    path = folder / "rank-00000.safetensors"
    read = load_file(path)
    assert read.keys() == tensors.keys() and all(torch.equal(read[name], tensors[name]) for name in tensors)
    assert said == hash_file(path) == xxhash.xxh3_128(path.read_bytes()).hexdigest()
    save_file(tensors, folder / "theirs.safetensors", {"format": "pt"})
    assert path.stat().st_size == (folder / "theirs.safetensors").stat().st_size
    size = int.from_bytes(path.read_bytes()[:8], "little")
    assert json.loads(path.read_bytes()[8 : 8 + size])["__metadata__"] == {"format": "pt"}  # transformers asks for it


def test_a_snapshot_holds_what_was_there_when_it_was_taken_and_keeps_its_memory(tmp_path):
    tensor, snapshot = torch.arange(6.0).view(2, 3), Snapshot()
    snapshot.take({"a": tensor})
    memory = snapshot.memory.data_ptr()
    tensor.zero_()
    snapshot.write(tmp_path / "rank-00000.safetensors")
    assert torch.equal(load_file(tmp_path / "rank-00000.safetensors")["a"], torch.arange(6.0).view(2, 3))
    snapshot.take({"a": tensor})
    assert snapshot.memory.data_ptr() == memory


def test_a_tensor_of_another_shape_than_the_models_is_named(tmp_path):
    written_by(tmp_path, {"a": torch.zeros(4, 3)}, 2)
    for other in (torch.zeros(5, 3), torch.zeros(2, 3), torch.zeros(4, 1)):
        with pytest.raises(ValueError, match=r"a: \[4, 3\] in the checkpoint, \[.*\] in the model"):
            Parts(tmp_path).read("a", other)


@pytest.fixture
def group(monkeypatch):
    """`group(rank, world)`: be this rank of so many, all by oneself: a process group that answers at once."""

    def be(rank, world):
        if dist.is_initialized():
            dist.destroy_process_group()
        dist.init_process_group("fake", rank=rank, world_size=world, store=FakeStore())

    yield be
    dist.destroy_process_group()


def sharded(tensor, rank, mesh, world):
    """A rank's rows of a tensor, as FSDP cuts it: torch.chunk."""
    chunks = tensor.chunk(world)
    local = chunks[rank] if rank < len(chunks) else tensor[:0]
    placements = [Replicate()] * (mesh.ndim - 1) + [Shard(0)]
    return DTensor.from_local(
        local.clone(), mesh, placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
    )


@pytest.mark.parametrize("rows", [1, 4, 5, 9])
@pytest.mark.parametrize(("copies", "shards"), [(1, 4), (2, 3)])
def test_each_rank_reads_the_rows_that_sharding_gives_it_whatever_number_wrote_them(
    tmp_path, group, rows, copies, shards
):
    tensor = torch.arange(rows * 3.0).view(rows, 3)
    written_by(tmp_path, {"a": tensor}, 2)
    for rank in range(copies * shards):
        group(rank, copies * shards)
        shape, names = ((copies, shards), ("copy", "shard")) if copies > 1 else ((shards,), ("shard",))
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
        into = sharded(torch.zeros_like(tensor), rank % shards, mesh, shards)
        Parts(tmp_path).read("a", into)
        wanted = sharded(tensor, rank % shards, mesh, shards).to_local()
        assert torch.equal(into.to_local(), wanted)


def stepped(seed=1):
    """A model that also saves a buffer, and its optimizer after a step."""
    model = LlamaForCausalLM(LlamaConfig(**SHAPE))
    model.register_buffer("seen", torch.tensor([seed, 2]))
    live = Live(Opened(model, linear=True, isolation="alone", compute=torch.float32))
    optimizer = torch.optim.AdamW(live.parameters(), lr=0.1 * seed)
    for parameter in live.parameters():
        parameter.grad = torch.full_like(parameter, 0.5 * seed)
    optimizer.step()
    return live, optimizer


SHAPE = {"vocab_size": 11, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}


def test_a_rank_owns_weights_buffers_and_moments_by_name_and_what_all_hold_alike_is_the_firsts():
    live, optimizer = stepped()
    found = own(live, optimizer, first=True)
    names = [name for name, _ in live.model.named_parameters()]
    assert found.keys() == {
        f"{what}|{name}" for what in ("weight", "step", "exp_avg", "exp_avg_sq") for name in names
    } | {"weight|seen"}
    assert torch.equal(found["weight|seen"], torch.tensor([1, 2])) and not any(t.requires_grad for t in found.values())
    name, parameter = next(iter(live.model.named_parameters()))
    assert found[f"weight|{name}"].data_ptr() == parameter.data_ptr()
    assert torch.equal(found[f"exp_avg|{name}"], optimizer.state[parameter]["exp_avg"])
    assert own(live, optimizer, first=False) == {}


def test_of_what_is_sharded_a_rank_owns_its_rows_first_or_not_and_nothing_of_what_it_has_no_rows_of(group):
    group(1, 2)
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("shard",))
    live, optimizer = stepped()
    wide, narrow = torch.arange(6.0).view(3, 2), torch.ones(1, 2)
    live.model.lm_head.weight = nn.Parameter(sharded(wide, 1, mesh, 2))
    live.model.model.norm.weight = nn.Parameter(sharded(narrow, 1, mesh, 2))
    for first in (False, True):
        found = own(live, optimizer, first)
        assert torch.equal(found["weight|lm_head.weight"], wide[2:]) and "weight|model.norm.weight" not in found
        assert type(found["weight|lm_head.weight"]) is torch.Tensor and ("weight|seen" in found) is first


def test_a_model_and_an_optimizer_are_filled_to_the_bit_and_hyperparameters_are_the_configs(tmp_path):
    (live, optimizer), (other, fresh) = stepped(), stepped(2)
    snapshot = Snapshot()
    snapshot.take(own(live, optimizer, first=True))
    snapshot.write(tmp_path / "rank-00000.safetensors")
    fill(Parts(tmp_path), other, fresh)
    one, two = own(live, optimizer, first=True), own(other, fresh, first=True)
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    assert fresh.param_groups[0]["lr"] == 0.2
    third, empty = stepped(3)
    empty = torch.optim.AdamW(third.parameters())
    snapshot.take({name: tensor for name, tensor in one.items() if name.startswith("weight|")})  # before a first step
    snapshot.write(tmp_path / "rank-00000.safetensors")
    fill(Parts(tmp_path), third, empty)
    assert not empty.state and torch.equal(third.model.seen, live.model.seen)


def test_buffers_are_what_a_model_saves_beside_its_parameters_tied_ones_being_one():
    live, _ = stepped()
    live.model.lm_head.weight = live.model.model.embed_tokens.weight
    live.model.register_buffer("made again", torch.ones(1), persistent=False)
    assert buffers(live).keys() == {"seen"}
    live.model._keys_to_ignore_on_save = {"seen"}
    assert buffers(live) == {}
    live.model._keys_to_ignore_on_save = None
    assert buffers(live).keys() == {"seen"}


def test_tensors_lie_at_multiples_of_their_items_and_a_snapshot_of_others_takes_their_size(tmp_path):
    snapshot = Snapshot()
    snapshot.take({"a": torch.ones(3, dtype=torch.uint8), "c": torch.ones(1), "b": torch.ones(2)})
    assert [(name, entry["data_offsets"]) for name, entry in snapshot.header.items()] == [
        ("b", [0, 8]), ("c", [8, 12]), ("a", [12, 15])
    ]  # fmt: skip
    snapshot.take({"a": torch.ones(2)})
    assert len(snapshot.memory) == 8
    snapshot.write(tmp_path / "file.safetensors")
    assert load_file(tmp_path / "file.safetensors").keys() == {"a"}


def test_a_files_bytes_are_on_the_disk_when_its_hash_is_told(tmp_path, monkeypatch):
    seen, real = [], os.fsync

    def fsync(handle):
        seen.append((Path(f"/proc/self/fd/{handle}").readlink(), os.fstat(handle).st_size))
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    snapshot = Snapshot()
    snapshot.take({"a": torch.ones(5)})
    snapshot.write(tmp_path / "file")
    assert seen == [(tmp_path / "file", (tmp_path / "file").stat().st_size)]
    head = (tmp_path / "file").read_bytes()
    assert int.from_bytes(head[:8], "little") % 8 == 0 and head[-20:] == torch.ones(5).numpy().tobytes()

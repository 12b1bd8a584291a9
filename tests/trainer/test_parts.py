"""A checkpoint's files against torch.chunk, which says how sharding cuts, and the safetensors library, which reads them."""

import json

import pytest
import torch
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from trainer import parts
from trainer.parts import Parts, Snapshot, hash_file

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
        with pytest.raises(ValueError, match=r"a: \[4, 3\] in the checkpoint"):
            Parts(tmp_path).read("a", other)

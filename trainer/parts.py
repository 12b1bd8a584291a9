"""The tensors of a checkpoint: one safetensors file a rank, with the rows that the rank owned.

Sharding (FSDP2) cuts every tensor along its first dimension, in the order of the ranks: a whole tensor is the rows of
the files one after another. So no index is needed, and any number of ranks can read the rows that it owns now.
Files are written here, straight from one block of host memory and hashed on the way: the library would hold Python's
lock for as long as it writes.
"""

import json
import os
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import safe_open
from torch.distributed.tensor import DTensor

from trainer.live import Live

BLOCK_BYTES = 16 << 20  # read, hashed or written at once
DTYPES = {
    torch.float64: "F64",
    torch.int64: "I64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int16: "I16",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.bool: "BOOL",
}
WEIGHT = "weight|"  # `<what>|<the parameter's name>`; the moments' names are the optimizer's own


def own(live: Live, optimizer: torch.optim.Optimizer, first: bool) -> dict[str, torch.Tensor]:
    """This rank's rows of weights and moments, by name; what every rank holds alike is the `first` one's."""
    every: dict[str, torch.Tensor] = {WEIGHT + name: buffer for name, buffer in buffers(live).items()}
    for name, parameter in live.model.named_parameters():
        every[WEIGHT + name] = parameter.detach()
        every |= {f"{what}|{name}": tensor for what, tensor in optimizer.state.get(parameter, {}).items()}
    rows = {name: tensor.to_local() for name, tensor in every.items() if isinstance(tensor, DTensor)}
    return {name: tensor for name, tensor in rows.items() if len(tensor)} | {
        name: tensor for name, tensor in every.items() if first and not isinstance(tensor, DTensor)
    }


def buffers(live: Live) -> dict[str, torch.Tensor]:
    """Tensors that a model saves beside its parameters; most have none."""
    names = {name for name, _ in live.model.named_parameters(remove_duplicate=False)}
    names |= set(live.model._keys_to_ignore_on_save or ())
    return {name: tensor for name, tensor in live.model.state_dict().items() if name not in names}


def fill(parts: "Parts", live: Live, optimizer: torch.optim.Optimizer) -> None:
    """Give a model and its optimizer what a checkpoint holds, whatever number of ranks it was saved on."""
    names = {parameter: name for name, parameter in live.model.named_parameters()}
    moments: dict[int, dict[str, torch.Tensor]] = {}
    with torch.no_grad():
        for name, buffer in buffers(live).items():
            parts.read(WEIGHT + name, buffer)
        for parameter, name in names.items():
            parts.read(WEIGHT + name, parameter)
        for index, parameter in enumerate(item for group in optimizer.param_groups for item in group["params"]):
            if f"step|{names[parameter]}" in parts:
                moments[index] = {"step": torch.zeros(()), **{
                    what: torch.zeros_like(parameter) for what in ("exp_avg", "exp_avg_sq")
                }}  # fmt: skip
                for what, tensor in moments[index].items():
                    parts.read(f"{what}|{names[parameter]}", tensor)
    # Hyper-parameters come from the config; only the moments are state.
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": moments, "param_groups": groups})


class Snapshot:
    """A copy of a rank's tensors in host memory, laid out as a safetensors file holds them.

    Its memory, as much as the file, is kept for the next copy: pages that a GPU can write to are dear to get.
    """

    def __init__(self) -> None:
        self.memory = torch.empty(0, dtype=torch.uint8)
        self.header: dict[str, Any] = {}

    def take(self, tensors: dict[str, torch.Tensor]) -> None:
        """Copy; when this returns, the tensors may change."""
        # Wide ones first, so that each begins at a multiple of its items' size.
        ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
        size = sum(tensor.nbytes for tensor in tensors.values())
        cuda = any(tensor.is_cuda for tensor in tensors.values())
        if len(self.memory) != size:
            self.memory = torch.empty(size, dtype=torch.uint8, pin_memory=cuda)
        self.header, end = {}, 0
        for name, tensor in ordered:
            start, end = end, end + tensor.nbytes
            self.header[name] = described(tensor.dtype, tensor.shape, start)
            self.memory[start:end].view(tensor.dtype).view(tensor.shape).copy_(tensor, non_blocking=True)
        if cuda:
            torch.cuda.synchronize()

    def write(self, path: Path) -> str:
        """Make it a file, durably; returns its hash."""
        data = self.memory.numpy().data
        blocks = (data[start : start + BLOCK_BYTES] for start in range(0, len(data), BLOCK_BYTES))
        return write_safetensors(path, self.header, blocks)


class Parts:
    """The tensors of a checkpoint's files, whole; nothing is read before it is asked for."""

    def __init__(self, folder: Path):
        self.pieces: dict[str, list[Any]] = {}
        for path in sorted(folder.glob("rank-*.safetensors")):
            file: Any = safe_open(path, "pt")
            for name in file.keys():  # noqa: SIM118 (it is no dict)
                self.pieces.setdefault(name, []).append(file.get_slice(name))

    def __contains__(self, name: str) -> bool:
        return name in self.pieces

    def shape(self, name: str) -> list[int]:
        """Of the whole tensor."""
        shapes = [piece.get_shape() for piece in self.pieces[name]]
        return [sum(shape[0] for shape in shapes), *shapes[0][1:]] if shapes[0] else []

    def dtype(self, name: str) -> torch.dtype:
        """Of a tensor."""
        return next(dtype for dtype, word in DTYPES.items() if word == self.pieces[name][0].get_dtype())

    def blocks(self, name: str) -> Iterator[torch.Tensor]:
        """A whole tensor, some `BLOCK_BYTES` at a time."""
        shape = self.shape(name)
        return self.rows(name, 0, shape[0]) if shape else iter([self.pieces[name][0][...]])

    def rows(self, name: str, start: int, stop: int) -> Iterator[torch.Tensor]:
        """Rows from `start` to `stop`, in order, some `BLOCK_BYTES` at a time."""
        width = self.dtype(name).itemsize * max(1, torch.Size(self.shape(name)[1:]).numel())
        before, at_once = 0, max(1, BLOCK_BYTES // width)
        for piece in self.pieces[name]:
            count = piece.get_shape()[0]
            first, last = max(start - before, 0), min(stop - before, count)
            for row in range(first, last, at_once):
                yield piece[row : min(row + at_once, last)]
            before += count

    def read(self, name: str, into: torch.Tensor) -> None:
        """Fill a tensor, or a rank's rows of a sharded one. Raises ValueError if it is of another shape."""
        if list(into.shape) != self.shape(name):
            raise ValueError(f"{name}: {self.shape(name)} in the checkpoint, {list(into.shape)} in the model")
        if not into.ndim:
            into.copy_(self.pieces[name][0][...])
            return
        start, local = 0, into
        if isinstance(into, DTensor):
            local, mesh = into.to_local(), into.device_mesh
            last = mesh.ndim - 1  # before it, copies (`Ranks.mesh`)
            start = min(len(into), mesh.get_local_rank(last) * -(-len(into) // mesh.size(last)))
        at = 0
        for block in self.rows(name, start, start + len(local)):
            local[at : at + len(block)].copy_(block)
            at += len(block)


def described(dtype: torch.dtype, shape: Iterable[int], start: int) -> dict[str, Any]:
    """A tensor's entry in the header of a safetensors file whose data it stands in from byte `start`."""
    size = torch.Size(shape)
    return {"dtype": DTYPES[dtype], "shape": list(size), "data_offsets": [start, start + size.numel() * dtype.itemsize]}


def write_safetensors(path: Path, header: dict[str, Any], blocks: Iterable[bytes | memoryview]) -> str:
    """Write a safetensors file, durably; returns its xxh3-128: against damage, not against forgery."""
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    hasher = xxhash.xxh3_128()
    with path.open("wb") as file:
        for block in chain([len(text).to_bytes(8, "little") + text], blocks):
            file.write(block)
            hasher.update(block)
        file.flush()
        os.fsync(file.fileno())
    return hasher.hexdigest()


def hash_file(path: Path) -> str:
    """The same of a file's bytes."""
    hasher = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(BLOCK_BYTES):
            hasher.update(block)
    return hasher.hexdigest()

"""What a step will hold, before there is one: a micro-batch runs on tensors that have shapes and no bytes.

Everything that autograd keeps for the backward is added up, so the figure follows the model's own code; what the head
and the sharding add is arithmetic of their modules (`trainer.head`, `trainer.live`).
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch._subclasses import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from transformers import AutoConfig, AutoModelForCausalLM

from schemas.attention import bounded, install
from schemas.config import Train
from schemas.forward import decoder_layers
from schemas.loss import CHUNK_TOKENS
from trainer.head import KEPT_BYTES
from trainer.live import recompute
from trainer.ranks import holders

FLOAT = 4  # bytes


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of one rank at the end of a step's last forward, when most is held, and of its checkpoints."""

    parameters: int
    gradients: int
    moments: int
    gathered: int
    activations: int
    head: int
    checkpoint_copy: int

    @property
    def device(self) -> int:
        """On the device: all but the checkpoint's copy, which is in host memory (on a CPU they are one)."""
        return sum(asdict(self).values()) - self.checkpoint_copy


@dataclass(frozen=True, slots=True)
class Shape:
    """What a folder's config says of its model: parameters in all, in one of its decoder layers, in the rest."""

    parameters: int
    layers: int
    layer: int
    rest: int
    vocabulary: int
    width: int


def foretell(base: Path, config: Train, rows: int, row_tokens: int, world: int) -> tuple[Shape, Memory]:
    """Memory of a rank of `world` that trains `base` on micro-batches of `rows` x `row_tokens`."""
    compute = getattr(torch, config.dtype)
    kept, shape = kept_by_autograd(base, compute, rows, row_tokens, world > 1)
    if config.recompute == "full":
        # Besides the layers' inputs, what one layer keeps while it runs again.
        kept = kept // shape.layers + kept_by_autograd(base, compute, rows, row_tokens, world > 1, again=True)[0]
    own = -(-shape.parameters // holders(world, config.shard_ranks)) * FLOAT
    return shape, Memory(
        parameters=own,
        gradients=own,
        moments=2 * own,
        gathered=gathered(shape, compute.itemsize) if world > 1 else 0,
        activations=kept,
        head=head(shape, compute.itemsize, rows * row_tokens),
        checkpoint_copy=3 * own,
    )


def shape_of(model: Any) -> Shape:
    """Count a model's parameters; tied ones once."""
    every = sum(parameter.numel() for parameter in model.parameters())
    layers = [sum(parameter.numel() for parameter in layer.parameters()) for layer in decoder_layers(model)]
    vocabulary, width = model.get_output_embeddings().weight.shape
    return Shape(every, len(layers), max(layers, default=0), every - sum(layers), vocabulary, width)


def kept_by_autograd(
    base: Path, compute: torch.dtype, rows: int, row_tokens: int, sharded: bool, again: bool = False
) -> tuple[int, Shape]:
    """Bytes that the body's forward keeps for its backward, parameters not counted; `again`: layers run again there."""
    # FSDP hands a layer its parameters in the products' dtype and casts what goes in; one rank alone casts by autocast.
    dtype = compute if sharded else torch.float32
    storages: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        storages[id(storage)] = storage  # held, so that its id stays its own
        return tensor

    with FakeTensorMode():
        model: Any = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base), dtype=dtype)
        if again:
            recompute(model)
        ids = torch.zeros(rows, row_tokens, dtype=torch.int64)
        install(model)  # attention as in training: without a mask
        cast = torch.autocast("cpu", compute, enabled=dtype != compute)
        with saved_tensors_hooks(keep, lambda t: t), cast, bounded():
            output = model.base_model(input_ids=ids, use_cache=False)
        del output
        for parameter in model.parameters():
            storages.pop(id(parameter.untyped_storage()), None)
        return sum(storage.nbytes() for storage in storages.values()), shape_of(model)


def gathered(shape: Shape, itemsize: int) -> int:
    """What FSDP holds whole: embeddings, norm and head to the end, this layer and the next; a layer's gradient to add up."""
    return (shape.rest + 2 * shape.layer) * itemsize + max(shape.rest, shape.layer) * (itemsize + FLOAT)


def head(shape: Shape, itemsize: int, tokens: int) -> int:
    """The head's log-probabilities where they are kept, two chunks of them in float32, its weight's gradient and a chunk's."""
    every = tokens * shape.vocabulary * itemsize
    chunk = min(tokens, CHUNK_TOKENS) * shape.vocabulary * FLOAT
    hidden = 2 * tokens * shape.width * itemsize
    return (every if every <= KEPT_BYTES else 0) + 2 * chunk + 2 * shape.vocabulary * shape.width * FLOAT + hidden

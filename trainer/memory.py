"""What a step will hold, before there is one: a micro-batch runs on tensors that have shapes and no bytes.

Everything that autograd keeps for the backward is added up, so the figure follows the model's own code; what the head
and the sharding add is arithmetic of their modules (`trainer.head`, `trainer.live`).
"""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch._subclasses import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM

from schemas.attention import bounded, install
from schemas.config import Train
from schemas.forward import decoder_layers
from schemas.loss import CHUNK_TOKENS
from trainer.head import KEPT_BYTES
from trainer.live import kept_operators, recompute
from trainer.ranks import holders

FLOAT = 4  # bytes


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of one rank at a step's fullest moment, and of its checkpoints."""

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


def foretell(
    base: Path, config: Train, rows: int, row_tokens: int, world: int, micros: int = 1
) -> tuple[Shape, Memory]:
    """Memory of a rank of `world` that trains `base` on steps of `micros` micro-batches of `rows` x `row_tokens`.

    It is fullest in the backward: at the head, where all activations are held, and no gradients yet but those of earlier
    micro-batches; where the last layer runs again; or, where activations are few, at the end, where all gradients are.
    """
    compute = getattr(torch, config.dtype)
    kept, shape = kept_by_autograd(base, compute, rows, row_tokens, world > 1)
    layer = kept // max(1, shape.layers)
    if config.recompute != "none":
        kept = kept_by_autograd(base, compute, rows, row_tokens, world > 1, config.recompute)[0]
    own = -(-shape.parameters // holders(world, config.shard_ranks)) * FLOAT
    always = {"parameters": own, "moments": 2 * own, "checkpoint_copy": 3 * own}
    at_head = Memory(
        **always,
        gradients=own if micros > 1 else 0,
        gathered=shape.rest * compute.itemsize if world > 1 else 0,
        activations=kept,
        head=head(shape, compute.itemsize, rows * row_tokens),
    )
    running_again = replace(at_head, activations=kept + layer, head=shape.vocabulary * shape.width * compute.itemsize)
    at_end = Memory(
        **always,
        gradients=own,
        gathered=gathered(shape, compute.itemsize, world, not torch.cuda.is_available()) if world > 1 else 0,
        activations=layer,
        head=0,
    )
    moments = [at_head, at_end] + ([running_again] if config.recompute != "none" else [])
    return shape, max(moments, key=lambda moment: moment.device)


def shape_of(model: Any) -> Shape:
    """Count a model's parameters; tied ones once."""
    every = sum(parameter.numel() for parameter in model.parameters())
    layers = [sum(parameter.numel() for parameter in layer.parameters()) for layer in decoder_layers(model)]
    vocabulary, width = model.get_output_embeddings().weight.shape
    return Shape(every, len(layers), max(layers, default=0), every - sum(layers), vocabulary, width)


def kept_by_autograd(
    base: Path, compute: torch.dtype, rows: int, row_tokens: int, sharded: bool, again: str = "none"
) -> tuple[int, Shape]:
    """Bytes that the body's forward keeps for its backward, parameters not counted; `again` is `train.recompute`."""
    # FSDP hands a layer its parameters in the products' dtype and casts what goes in; one rank alone casts by autocast.
    dtype = compute if sharded else torch.float32
    storages: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        storages[id(storage)] = storage  # held, so that its id stays its own
        return tensor

    class Results(TorchDispatchMode):
        """What `selective` keeps goes past autograd's hooks."""

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            found = func(*args, **(kwargs or {}))
            for tensor in tree_leaves(found) if again == "selective" and func in operators else ():
                if isinstance(tensor, torch.Tensor):
                    keep(tensor)
            return found

    operators = set(kept_operators())
    with FakeTensorMode():
        model: Any = AutoModelForCausalLM.from_config(
            AutoConfig.from_pretrained(base, trust_remote_code=False), dtype=dtype
        )
        if again != "none":
            recompute(model, again)
        ids = torch.zeros(rows, row_tokens, dtype=torch.int64)
        install(model)  # attention as in training: without a mask
        cast = torch.autocast("cpu", compute, enabled=dtype != compute)
        with saved_tensors_hooks(keep, lambda t: t), cast, bounded(), Results():
            output = model.base_model(input_ids=ids, use_cache=False)
        del output
        for parameter in model.parameters():
            storages.pop(id(parameter.untyped_storage()), None)
        return sum(storage.nbytes() for storage in storages.values()), shape_of(model)


def gathered(shape: Shape, itemsize: int, world: int, gloo: bool) -> int:
    """What FSDP holds whole near a backward's end: of the layers, or of the rest after them, whichever is more.

    A layer's turn: embeddings, norm and head, the head's gradient, this layer and the next, its gradient and that again to
    add up in float32. The turn of the rest: its gradient, and that again. Gloo adds up a copy. A rank's sum comes beside
    that of earlier micro-batches.
    """
    head = shape.vocabulary * shape.width
    reduced = FLOAT * (2 if gloo else 1) + FLOAT / world
    of_layer = (shape.rest + head) * itemsize + shape.layer * (3 * itemsize + reduced)
    return int(max(of_layer, shape.rest * (itemsize + reduced)))


def head(shape: Shape, itemsize: int, tokens: int) -> int:
    """The head's log-probabilities where they are kept, and what it makes on the way, whichever is more.

    In its forward two chunks in float32, in its backward one, the weight's gradient and a chunk's share of it.
    """
    every = tokens * shape.vocabulary * itemsize
    chunk = min(tokens, CHUNK_TOKENS) * shape.vocabulary * FLOAT
    hidden = 2 * tokens * shape.width * itemsize
    made = max(2 * chunk, chunk + 2 * shape.vocabulary * shape.width * FLOAT)
    return (every if every <= KEPT_BYTES else 0) + made + hidden

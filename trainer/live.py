"""The live model: any opened causal LM, wrapped so that one forward gives losses, selection and loss sum."""

from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from schemas.batch import Batch
from schemas.errors import UserError
from schemas.forward import Opened, decoder_layers, forward
from schemas.loss import losses_of_logits
from trainer.head import Choose, KeptLoss
from trainer.kept import KeptRows, carry_kept


class Judged(NamedTuple):
    """A batch under the live model; a plain tuple, since FSDP looks for gradients in those."""

    loss_sum: torch.Tensor
    losses: torch.Tensor
    mask: torch.Tensor


def choose_none(losses: torch.Tensor) -> torch.Tensor:
    """For evaluation: losses are wanted, gradients are not."""
    return torch.zeros_like(losses, dtype=torch.bool)


class Live(nn.Module):
    """A causal LM that returns (sum of kept losses, losses [rows, row_tokens], mask) instead of logits."""

    def __init__(self, opened: Opened, backward: str = "full"):
        """`opened.compute` is the dtype of the forward's products; parameters keep theirs. `backward`: `train.backward`."""
        super().__init__()
        self.model = opened.module
        self.opened = opened
        self.kept: KeptRows | None = carry_kept(opened.module) if backward == "kept" else None
        self.compiled = False  # `trainer.compiled`

    def forward(self, batch: Batch, choose: Choose, count: int | None = None) -> Judged:
        """Run a batch; `choose` sees float32 losses in nats, NaN where nothing is predicted, and gives a mask.

        count: how many tokens the mask will hold, if that is known.
        """
        if self.compiled:
            batch = of_one_shape(batch)
        output, targets = forward(self.opened, batch).flatten(0, 1), batch.targets.flatten()
        if self.opened.linear:
            # Losses of the head are float32 whatever the dtype, so autocast ends before it.
            kept: Any = KeptLoss.apply(
                output,
                self.model.get_output_embeddings().weight,
                targets,
                lambda losses: choose(losses.view_as(batch.targets)).flatten(),
                count,
                self.opened.compute,
            )
            loss_sum, losses, mask = kept
        else:
            losses = losses_of_logits(output, targets).loss
            mask = choose(losses.detach().view_as(batch.targets)).flatten()
            loss_sum = torch.where(mask, losses, 0.0).sum()
        if self.kept and torch.is_grad_enabled():  # else no backward will ask, and the device need not be waited for
            self.kept.set(mask, count)
        return Judged(loss_sum, losses.detach().view_as(batch.targets), mask.view_as(batch.targets))


def of_one_shape(batch: Batch) -> Batch:
    """A batch such that compiled layers see nothing change but values, and how many windows there are."""
    torch._dynamo.maybe_mark_dynamic(batch.bounds, 0)  # type: ignore[attr-defined]
    return replace(batch, longest=1 << (batch.ids.shape[1] - 1).bit_length())


def kept_operators() -> list[Any]:
    """Operators whose results `selective` keeps: products and attention, which are what costs time."""
    names = {
        "aten": ("mm", "addmm", "bmm", "_scaled_dot_product_flash_attention", "_scaled_dot_product_efficient_attention",
                 "_scaled_dot_product_cudnn_attention", "_scaled_dot_product_flash_attention_for_cpu"),
        "mkldnn": ("_linear_pointwise",),
        "tokensift": ("onednn",),
        "torch_attn": ("_varlen_attn",),
    }  # fmt: skip
    found = (getattr(getattr(torch.ops, space), name, None) for space, wanted in names.items() for name in wanted)
    return [packet.default for packet in found if packet is not None]


def recompute(module: Any, way: str = "full") -> None:
    """Have each decoder layer run again in the backward.

    full: it keeps its input alone, a third more compute. selective: also the results of products and attention, so that
    what runs again is cheap.
    """
    named = {}
    if way == "selective":
        named["context_fn"] = partial(create_selective_checkpoint_contexts, kept_operators())
    for layer in decoder_layers(module):
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, **named)


def parallelize(live: Live, mesh: DeviceMesh | None) -> Live:
    """Shard parameters, gradients and optimizer state over a mesh of ranks (FSDP2), one unit a decoder layer.

    Over [copies, holders] (HSDP) gradients are added up within a copy, then over copies. None: one rank, nothing is done.
    Raises UserError if the model has no list of layers.
    """
    if mesh is None:
        return live
    compute = live.opened.compute
    policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32, output_dtype=torch.float32)
    layers = decoder_layers(live.model)
    if not layers:
        name = type(live.model).__name__
        raise UserError(f"base: {name} has no list of decoder layers, so it cannot be sharded", "use one GPU")
    for layer in layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    # The root unit holds embeddings, last norm and head: gathered once, for the forward and the kept-rows backward.
    fully_shard(live, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    for module in live.modules():
        if isinstance(module, FSDPModule):
            # The loss is already divided by the step's global count, so ranks add up.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo has no fused multiply-and-sum
    return live

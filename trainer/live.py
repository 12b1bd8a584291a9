"""The live model: any opened causal LM, wrapped so that one forward gives losses, selection and loss sum."""

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint

from schemas.batch import Batch
from schemas.errors import UserError
from schemas.forward import Opened, decoder_layers, forward
from schemas.loss import losses_of_logits
from trainer.head import Choose, KeptLoss


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

    def __init__(self, opened: Opened):
        """`opened.compute` is the dtype of the forward's products; parameters keep theirs."""
        super().__init__()
        self.model = opened.module
        self.opened = opened

    def forward(self, batch: Batch, choose: Choose, count: int | None = None) -> Judged:
        """Run a batch; `choose` sees float32 losses in nats, NaN where nothing is predicted, and gives a mask.

        count: how many tokens the mask will hold, if that is known.
        """
        output, targets = forward(self.opened, batch).flatten(0, 1), batch.targets.flatten()
        if self.opened.linear:
            # Losses of the head are float32 whatever the dtype, so autocast ends before it.
            compute = self.opened.compute
            weight = self.model.get_output_embeddings().weight
            kept: Any = KeptLoss.apply(
                output.to(compute),
                weight.to(compute),
                targets,
                lambda losses: choose(losses.view_as(batch.targets)).flatten(),
                count,
            )
            loss_sum, losses, mask = kept
        else:
            losses = losses_of_logits(output, targets).loss
            mask = choose(losses.detach().view_as(batch.targets)).flatten()
            loss_sum = torch.where(mask, losses, 0.0).sum()
        return Judged(loss_sum, losses.detach().view_as(batch.targets), mask.view_as(batch.targets))


def recompute(module: Any) -> None:
    """Have each decoder layer keep its input alone, and run again in the backward: a third more compute, less memory."""
    for layer in decoder_layers(module):
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)


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

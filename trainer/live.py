"""The live model: any Hugging Face causal LM, wrapped so that one forward gives losses, selection and loss sum."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from schemas.errors import UserError
from schemas.loss import has_linear_head, losses_of_logits
from trainer.head import KeptLoss

Choose = Callable[[torch.Tensor], torch.Tensor]


class Live(nn.Module):
    """A causal LM that returns (sum of kept losses, losses [rows, row_tokens], mask) instead of logits."""

    def __init__(self, model: Any, dtype: torch.dtype):
        """`dtype` is that of the forward's products; parameters stay float32."""
        super().__init__()
        self.model = model
        self.dtype = dtype
        self.linear = has_linear_head(model)

    def forward(self, ids: torch.Tensor, positions: torch.Tensor, targets: torch.Tensor, choose: Choose) -> Any:
        """Forward of packed rows; `choose` sees float32 losses, NaN where nothing is predicted, and gives a mask."""
        shape = targets.shape
        cast = self.dtype != torch.float32 and not isinstance(self, FSDPModule)
        with torch.autocast(ids.device.type, self.dtype, enabled=cast):
            if not self.linear:
                logits = self.model(input_ids=ids, position_ids=positions, use_cache=False).logits
            else:
                hidden = self.model.base_model(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state
        if self.linear:
            weight = self.model.get_output_embeddings().weight
            hidden = hidden.flatten(0, 1).to(self.dtype)
            # Losses of the head are float32 whatever the dtype, so autocast ends before it.
            loss_sum, losses, mask = KeptLoss.apply(hidden, weight.to(self.dtype), targets.flatten(),
                                                    lambda flat: choose(flat.view(shape)).flatten())  # fmt: skip
            return loss_sum, losses.view(shape), mask.view(shape)
        losses = losses_of_logits(logits.flatten(0, 1), targets.flatten())[0].view(shape)
        mask = choose(losses.detach())
        return losses[mask].sum(), losses.detach(), mask


def parallelize(live: Live, world: int) -> Live:
    """Shard parameters, gradients and optimizer state over the ranks (FSDP2), one unit a decoder layer."""
    if world == 1:
        return live
    policy = MixedPrecisionPolicy(param_dtype=live.dtype, reduce_dtype=torch.float32, output_dtype=torch.float32)
    for layer in decoder_layers(live.model):
        fully_shard(layer, mp_policy=policy)
    # The root unit holds embeddings, last norm and head: gathered once, for the forward and the kept-rows backward.
    fully_shard(live, mp_policy=policy, reshard_after_forward=False)
    for module in live.modules():
        if isinstance(module, FSDPModule):
            # The loss is already divided by the step's global count, so ranks add up.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo has no fused multiply-and-sum
    return live


def decoder_layers(model: Any) -> nn.ModuleList:
    """The longest list of modules in the body. Raises UserError if the model has none."""
    lists = [module for module in model.base_model.modules() if isinstance(module, nn.ModuleList) and len(module)]
    if not lists:
        raise UserError(
            f"{type(model).__name__}: no list of decoder layers found, so it cannot be sharded; use one GPU"
        )
    return max(lists, key=len)

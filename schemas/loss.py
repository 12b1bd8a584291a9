"""The definition of a per-token loss, shared by the scorer and the trainer.

L(x_i) = -log P(x_i | x_<i) in nats (Rho-1, equation 1), computed in float32 whatever the model's dtype,
chunk by chunk, so that no [tokens, vocab] float32 tensor is kept.
"""

from dataclasses import dataclass

import torch

from schemas.batch import IGNORE, Batch
from schemas.forward import Opened, forward
from schemas.product import project

CHUNK_TOKENS = 1024
TILE_TOKENS = 1024  # of the vocabulary, on a CPU


@dataclass(frozen=True, slots=True)
class Losses:
    """Float32 nats, NaN where nothing is predicted; `entropy` is that of the same distributions, if asked for."""

    loss: torch.Tensor
    entropy: torch.Tensor | None = None

    def view(self, *shape: int) -> "Losses":
        """The same values in another shape."""
        return Losses(self.loss.view(shape), None if self.entropy is None else self.entropy.view(shape))


def batch_losses(model: Opened, batch: Batch, entropy: bool = False) -> Losses:
    """Losses [rows, row_tokens] of a batch, at the column that predicts each token. Call it without gradients."""
    output, targets = forward(model, batch).flatten(0, 1), batch.targets.flatten()
    if not model.linear:
        return losses_of_logits(output, targets, entropy).view(*batch.targets.shape)
    weight = model.module.get_output_embeddings().weight
    found = token_losses(output[batch.predicted].to(weight.dtype), weight, targets[batch.predicted], entropy)

    def spread(values: torch.Tensor) -> torch.Tensor:
        return torch.full(targets.shape, torch.nan, device=values.device).index_copy_(0, batch.predicted, values)

    grids = Losses(spread(found.loss), None if found.entropy is None else spread(found.entropy))
    return grids.view(*batch.targets.shape)


def token_losses(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, entropy: bool = False) -> Losses:
    """Losses [n] of `targets` [n] under the head `weight` [vocab, d] applied to `hidden` [n, d], both of one dtype."""
    chunks = zip(hidden.split(CHUNK_TOKENS), targets.split(CHUNK_TOKENS), strict=True)
    losses = [_chunk_losses(rows, weight, wanted, entropy) for rows, wanted in chunks]
    nothing = hidden.new_empty(0, dtype=torch.float32)
    return Losses(
        torch.cat([nothing, *(item.loss for item in losses)]),
        torch.cat([nothing, *(item.entropy for item in losses if item.entropy is not None)]) if entropy else None,
    )


def _chunk_losses(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, entropy: bool) -> Losses:
    """One pass over the vocabulary, a tile at a time, with a running log-sum-exp: on a CPU a tile stays in its cache."""
    width = weight.shape[0] if hidden.is_cuda else TILE_TOKENS
    target = hidden.new_full(targets.shape, torch.nan, dtype=torch.float32)
    top, total, mean = torch.full_like(target, -torch.inf), torch.zeros_like(target), torch.zeros_like(target)
    for start in range(0, weight.shape[0], width):
        logits = project(hidden, weight[start : start + width])
        places = targets - start
        inside = (places >= 0) & (places < logits.shape[1])
        places = places.clamp(0, logits.shape[1] - 1)
        target = torch.where(inside, logits.gather(1, places[:, None]).squeeze(1), target)
        higher = torch.maximum(top, logits.amax(1))
        shrink = torch.exp(top - higher)
        weights = torch.exp(logits - higher[:, None]) if entropy else logits.sub_(higher[:, None]).exp_()
        total = total * shrink + weights.sum(1)
        if entropy:
            mean = mean * shrink + weights.mul_(logits).sum(1)
        top = higher
    log_z = top + total.log()
    return Losses(log_z - target, log_z - mean / total if entropy else None)


def losses_of_logits(logits: torch.Tensor, targets: torch.Tensor, entropy: bool = False) -> Losses:
    """`token_losses` from finished logits [n, vocab], for heads that are not one matrix product."""
    losses, entropies = [], []
    for chunk, wanted in zip(logits.split(CHUNK_TOKENS), targets.split(CHUNK_TOKENS), strict=True):
        exact = chunk.float()
        log_z = torch.logsumexp(exact, dim=1)
        nats = log_z - exact.gather(1, wanted.clamp_min(0)[:, None]).squeeze(1)
        losses.append(torch.where(wanted == IGNORE, torch.nan, nats))
        if entropy:
            entropies.append(log_z - (torch.exp(exact - log_z[:, None]) * exact).sum(1))
    return Losses(torch.cat(losses), torch.cat(entropies) if entropy else None)

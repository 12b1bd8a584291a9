"""The definition of a per-token loss, shared by the scorer and the trainer.

L(x_i) = -log P(x_i | x_<i) in nats (Rho-1, equation 1), computed in float32 whatever the model's dtype,
chunk by chunk, so that no [tokens, vocab] float32 tensor is kept.
"""

from dataclasses import dataclass

import torch

from schemas.batch import IGNORE, Batch
from schemas.forward import Opened, forward

CHUNK_TOKENS = 1024


@dataclass(frozen=True, slots=True)
class Losses:
    """Float32 nats, NaN where nothing is predicted; `entropy` is that of the same distributions, if asked for."""

    loss: torch.Tensor
    entropy: torch.Tensor | None = None

    def view(self, *shape: int) -> "Losses":
        """The same values in another shape."""
        return Losses(self.loss.view(shape), None if self.entropy is None else self.entropy.view(shape))


def project(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Logits in float32, [n, vocab]. Rounding logits to bfloat16 costs up to 0.06 nats at a logit of 20."""
    if hidden.dtype == torch.float32:
        return hidden @ weight.T
    if hidden.is_cuda:
        return torch.mm(hidden, weight.T, out_dtype=torch.float32)
    return hidden.float() @ weight.float().T


def batch_losses(model: Opened, batch: Batch, entropy: bool = False) -> Losses:
    """Losses [rows, row_tokens] of a batch, at the column that predicts each token. Call it without gradients."""
    output, targets = forward(model, batch).flatten(0, 1), batch.targets.flatten()
    if model.linear:
        losses = token_losses(output, model.module.get_output_embeddings().weight, targets, entropy)
    else:
        losses = losses_of_logits(output, targets, entropy)
    return losses.view(*batch.targets.shape)


def token_losses(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, entropy: bool = False) -> Losses:
    """Losses of `targets` [n] under the head `weight` [vocab, d] applied to `hidden` [n, d]."""
    losses = torch.full(targets.shape, torch.nan, device=hidden.device)
    entropies = torch.full_like(losses, torch.nan) if entropy else None
    rows = torch.nonzero(targets != IGNORE).squeeze(1)
    if hidden.dtype != torch.float32 and not hidden.is_cuda:
        weight = weight.float()
    for chunk in rows.split(CHUNK_TOKENS):
        logits = project(hidden[chunk].to(weight.dtype), weight)
        log_z = torch.logsumexp(logits, dim=1)
        losses[chunk] = log_z - logits.gather(1, targets[chunk, None]).squeeze(1)
        if entropies is not None:
            entropies[chunk] = log_z - (torch.exp(logits - log_z[:, None]) * logits).sum(1)
    return Losses(losses, entropies)


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

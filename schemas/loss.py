"""The definition of a per-token loss, shared by the scorer and the trainer.

L(x_i) = -log P(x_i | x_<i) in nats (Rho-1, equation 1), computed in float32 whatever the model's dtype,
chunk by chunk, so that no [tokens, vocab] float32 tensor is kept.
"""

from typing import Any

import torch

from schemas.batch import IGNORE

CHUNK_TOKENS = 1024


def project(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Logits in float32, [n, vocab]. Rounding logits to bfloat16 costs up to 0.06 nats at a logit of 20."""
    if hidden.dtype == torch.float32:
        return hidden @ weight.T
    if hidden.is_cuda:
        return torch.mm(hidden, weight.T, out_dtype=torch.float32)
    return hidden.float() @ weight.float().T


def token_losses(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, entropy: bool = False
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Losses of `targets` [n] under the head `weight` [vocab, d] applied to `hidden` [n, d].

    Returns float32 losses [n] in nats, NaN where the target is IGNORE, and the entropies [n] if asked for.
    """
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
    return losses, entropies


def has_linear_head(model: Any) -> bool:
    """Whether logits are just `last_hidden_state @ weight.T`; false for soft-capped, scaled or biased heads.

    Checked by running the model on eight tokens, not by a list of class names. The head's output is replaced
    by logits from -100 to 100 on the way, so that a soft cap shows also in a model whose own logits are small.
    """
    head = model.get_output_embeddings()
    if head is None or getattr(head, "bias", None) is not None:
        return False
    weight = head.weight
    ids = torch.arange(8, device=weight.device).unsqueeze(0) % weight.shape[0]
    given: list[torch.Tensor] = []

    def replace(_module: Any, _inputs: Any, logits: torch.Tensor) -> torch.Tensor:
        large = torch.linspace(-100, 100, logits.numel(), device=logits.device).view(logits.shape).to(logits.dtype)
        given[:] = [logits.float(), large.float()]
        return large

    training = model.training
    model.eval()
    hook = head.register_forward_hook(replace)
    try:
        with torch.no_grad():
            hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
            finished = model(input_ids=ids, use_cache=False).logits.float()
    finally:
        hook.remove()
        model.train(training)
    found = (hidden @ weight.T).float()
    if not given or found.shape != given[0].shape or finished.shape != given[1].shape:
        return False
    return torch.equal(finished, given[1]) and torch.allclose(found, given[0], rtol=1e-2, atol=1e-2)


def model_losses(
    model: Any, ids: torch.Tensor, positions: torch.Tensor, targets: torch.Tensor, linear: bool, entropy: bool = False
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Losses of one batch of packed rows [rows, row_tokens], at the column that predicts each token.

    Returns float32 [rows, row_tokens], NaN where nothing is predicted. Call it without gradients.
    """
    if linear:
        hidden = model.base_model(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state
        weight = model.get_output_embeddings().weight
        losses, entropies = token_losses(hidden.flatten(0, 1), weight, targets.flatten(), entropy)
    else:
        logits = model(input_ids=ids, position_ids=positions, use_cache=False).logits
        losses, entropies = losses_of_logits(logits.flatten(0, 1), targets.flatten(), entropy)
    return losses.view(targets.shape), None if entropies is None else entropies.view(targets.shape)


def losses_of_logits(
    logits: torch.Tensor, targets: torch.Tensor, entropy: bool = False
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`token_losses` from finished logits [n, vocab], for heads that are not one matrix product."""
    losses, entropies = [], []
    for chunk, wanted in zip(logits.split(CHUNK_TOKENS), targets.split(CHUNK_TOKENS), strict=True):
        exact = chunk.float()
        log_z = torch.logsumexp(exact, dim=1)
        nats = log_z - exact.gather(1, wanted.clamp_min(0)[:, None]).squeeze(1)
        losses.append(torch.where(wanted == IGNORE, torch.nan, nats))
        if entropy:
            entropies.append(log_z - (torch.exp(exact - log_z[:, None]) * exact).sum(1))
    return torch.cat(losses), torch.cat(entropies) if entropy else None

"""Stage 2 written out a second time, from the paper and PyTorch alone: one window a forward, full logits, autograd.

It shares no line with the product: its own order, packing, selection, clipping and schedule. Slow, short and plain.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM


@dataclass
class Piece:
    """A window, and of those of its tokens that count stored losses and entropies, and the draws of the random control.

    All count but the first one, of a conversation those that are trained on.
    """

    tokens: torch.Tensor
    counted: torch.Tensor
    ref_loss: torch.Tensor
    ref_entropy: torch.Tensor
    chance: torch.Tensor


def windows_in_order(root, seed, shuffle_groups, epochs):
    groups, key = [], 0
    for path in sorted((root / "units").glob("*.parquet")):
        file = pq.ParquetFile(path)
        for number in range(file.num_row_groups):
            rows = file.read_row_group(number).to_pylist()
            groups.append([(key + i, row) for i, row in enumerate(rows)])
            key += len(rows)
    order = []
    for epoch in range(epochs):
        rng = np.random.default_rng([seed, epoch])
        permuted = [groups[i] for i in rng.permutation(len(groups))]
        for start in range(0, len(permuted), shuffle_groups):
            block = [item for group in permuted[start : start + shuffle_groups] for item in group]
            for key_, row in (block[i] for i in rng.permutation(len(block))):
                draws = np.random.default_rng([seed, 0x5EED, epoch, key_]).random(len(row["tokens"]), dtype=np.float32)
                stored = [torch.tensor(row[name], dtype=torch.float32) for name in ("ref_loss", "ref_entropy")]
                tokens, counted = torch.tensor(row["tokens"]), torch.ones(len(draws), dtype=torch.bool)
                if "trained" in row:
                    counted = torch.tensor(row["trained"])
                columns = [values[1:][counted[1:]] for values in (*stored, torch.from_numpy(draws))]
                order.append(Piece(tokens, counted[1:], *columns))
    return order, key


def packed(waiting, rows, row_tokens):
    """The step's rows: each window into the first row with room, until one fits nowhere; and how many it took."""
    filled = [[] for _ in range(rows)]
    for taken, piece in enumerate(waiting):
        row = next((r for r in filled if sum(len(p.tokens) for p in r) + len(piece.tokens) <= row_tokens), None)
        if row is None:
            return filled, taken
        row.append(piece)
    raise AssertionError("more windows are needed")


def losses_alone(model, tokens, dtype):
    """Losses of a window's tokens 1.. from a forward of it alone."""
    if dtype == "float32":
        return cross_entropy(model(input_ids=tokens[None]).logits[0, :-1], tokens[1:], reduction="none")
    with torch.autocast("cpu", torch.bfloat16):
        if getattr(model.config, "final_logit_softcapping", None):
            logits = model(input_ids=tokens[None]).logits[0, :-1]
            return cross_entropy(logits.float(), tokens[1:], reduction="none")
        hidden = model.base_model(input_ids=tokens[None]).last_hidden_state[0, :-1]
    weight = model.get_output_embeddings().weight
    # The head multiplies bfloat16 numbers and adds them up in float32.
    logits = hidden.bfloat16().float() @ weight.bfloat16().float().T
    return cross_entropy(logits, tokens[1:], reduction="none")


def best(scores, keep):
    """Places of the best round(keep * n), the earlier of equals."""
    return set(sorted(range(len(scores)), key=lambda i: (-scores[i], i))[: round(keep * len(scores))])


SCORES = {
    "slm": [lambda losses, piece: losses.detach() - piece.ref_loss],
    "random": [lambda losses, piece: piece.chance],
    "self-ref-loss": [lambda losses, piece: -piece.ref_loss],
    "self-ref-entropy": [lambda losses, piece: -piece.ref_entropy],
}
SCORES["self-ref-both"] = SCORES["self-ref-loss"] + SCORES["self-ref-entropy"]


def selected(config, live, pieces):
    """For each piece of what is ranked together, which tokens count; and the scores, if they are one, that say so."""
    masks, scores = [[True] * len(losses) for losses in live], None
    for score in SCORES.get(config.objective, []):
        scores = [score(losses, piece).tolist() for losses, piece in zip(live, pieces, strict=True)]
        if config.scope == "sequence":
            chosen = [best(own, config.keep) for own in scores]
        else:
            every = best([score for own in scores for score in own], config.keep)
            starts = [sum(map(len, scores[:number])) for number in range(len(scores))]
            chosen = [{i - start for i in every} for start in starts]
        masks = [[kept and i in own for i, kept in enumerate(mask)] for mask, own in zip(masks, chosen, strict=True)]
    return masks, scores if len(SCORES.get(config.objective, [])) == 1 else None


def rate_at(config, done):
    if done < config.warmup:
        return config.learning_rate * done / config.warmup
    floor = config.min_learning_rate_ratio
    if config.schedule == "constant":
        return config.learning_rate
    if config.schedule == "wsd":
        share = min(1.0, (1 - done) / config.decay)
    else:
        share = (1 + math.cos(math.pi * (done - config.warmup) / (1 - config.warmup))) / 2
    return config.learning_rate * (floor + (1 - floor) * share)


def oracle(base: Path, scores: Path, config, window: int, ranked_rows: int):
    """Train from `base`; `ranked_rows`: rows of all ranks that are selected over together. Returns weights and rows."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model.eval()
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in parameters if p.dim() > 1], "weight_decay": config.weight_decay},
            {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
        ],
        betas=config.betas,
    )
    order, total = windows_in_order(scores, config.seed, config.shuffle_groups, 3)
    size = config.tokens_per_step // window
    position, rows = 0, []
    while position < config.epochs * total:
        filled, taken = packed(order[position:], size, window)
        done = (position + min(position + taken, config.epochs * total)) / 2 / (config.epochs * total)
        kept, dropped, thresholds = [], [], []
        for start in range(0, size, ranked_rows):
            pieces = [piece for row in filled[start : start + ranked_rows] for piece in row]
            live = [losses_alone(model, piece.tokens, config.dtype)[piece.counted] for piece in pieces]
            masks, ranked = selected(config, live, pieces)
            for number, (losses, mask) in enumerate(zip(live, masks, strict=True)):
                kept += [loss for loss, keep in zip(losses, mask, strict=True) if keep]
                dropped += [loss.item() for loss, keep in zip(losses, mask, strict=True) if not keep]
                if ranked:
                    thresholds += [score for score, keep in zip(ranked[number], mask, strict=True) if keep]
        optimizer.zero_grad()
        loss = torch.stack(kept).sum() / len(kept)
        loss.backward()
        norm = math.sqrt(sum(float(p.grad.double().pow(2).sum()) for p in parameters))
        for p in parameters:
            p.grad *= min(1.0, config.clip / (norm + 1e-6))
        for group in optimizer.param_groups:
            group["lr"] = rate_at(config, done)
        optimizer.step()
        position += taken
        rows.append(
            {
                "position": position,
                "selected": len(kept),
                "loss_all": (float(loss.detach()) * len(kept) + sum(dropped)) / (len(kept) + len(dropped)),
                "loss_kept": loss.item(),
                "loss_dropped": sum(dropped) / len(dropped) if dropped else None,
                "threshold": min(thresholds) if thresholds else None,
                "grad_norm": norm,
                "learning_rate": rate_at(config, done),
            }
        )
    return model.state_dict(), rows

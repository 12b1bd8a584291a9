"""The probe: what a model does with windows that share a batch, found out on the model itself when it is opened.

A few windows of random tokens are scored alone by the model's own plain forward; that is the truth. Then:

1. causal: no prediction changes with the token it predicts or a later one;
2. varlen: the same windows in shared rows give the same losses when attention is told their boundaries;
3. packed: if 2 fails, the same by restarting positions; alone: else in rows of one window each, of unequal lengths;
4. as it runs: in the very dtype and by the very kernels that will run, no loss of a window changes with its neighbours
   or with a later token, and nine losses in ten are as near the truth as the plain forward's are in that dtype.

The windows' lengths halve from the longest down, so that wherever a model behaves otherwise beyond some length (a rotary
embedding for long contexts, a chunk, a sliding window), windows of both kinds share a batch.

1 to 3 are held in float32, where rounding cannot hide a leak: weights of another dtype are widened for the moment it
takes, which is exact, and narrowed again. Float32 may take another path, as on a GPU, whose attention kernels are of half
types alone: hence 4. It compares runs of one shape, so rounding cancels; its last part leaves out the worst losses, for
in a narrow type a router of experts may choose otherwise now and then. All costs about as much as scoring a thousand
tokens, half as much again in a narrow type, and more where the config names a length below the window.
"""

import re
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from schemas import attention, product
from schemas.batch import Batch, collate, one_a_row
from schemas.errors import UserError, first_line
from schemas.forward import Isolation, Opened, casting
from schemas.loss import batch_losses

PROBE_TOKENS = 64
TOLERANCE_NATS = 1e-3  # float32 rounding makes 3e-5 over 88 families, and 3e-5 at 135M parameters
ROUGH_NATS = 1.0  # where there is no memory for float32 weights: bfloat16 rounding makes up to 0.4 at 135M parameters
ROUNDING_FACTOR, ROUNDING_SHARE = 3.0, 0.9  # at this quantile of errors, so many times the plain forward's own
NOISE_FACTOR = 4.0  # some GPU kernels add in any order: what two equal runs differ by is allowed so many times over
ISOLATIONS: tuple[Isolation, ...] = ("varlen", "packed", "alone")
# Config fields that name a length at which a model changes its ways, and such that only sound alike.
LENGTH_FIELDS = re.compile("window|chunk|position|block|local_attention|index_topk|compress|context|seq_len")
COUNT_FIELDS = re.compile("layers|pattern")
# What foreign model code raises when it is given a batch it was not written for.
FOREIGN = (TypeError, ValueError, RuntimeError, IndexError, KeyError, AttributeError, AssertionError)


class Refused(Exception):
    """The model cannot be used; the message follows its name."""


def prove(module: Any, compute: torch.dtype, window: int, name: str, onednn: bool = False) -> Opened:
    """What may be done with a model: its head and its isolation. `compute`: dtype of the products it will run in.

    `onednn`: linear layers are given their product by oneDNN once the truth is known, so it is held to that as well.

    Raises UserError, naming the model, if it is not causal, gives no finite losses or cannot keep windows apart.
    """
    lengths = _lengths(probe_length(module.config, window))
    windows = _windows(_vocabulary(module), lengths)
    try:
        opened = Opened(module=module, linear=has_linear_head(module), isolation="packed", compute=compute)
        with _widened(opened) as exact:
            truth = [_plain(exact.opened, ids) for ids in windows]
            if not all(np.isfinite(losses).all() for losses in truth):
                raise Refused("gives losses that are not finite: its weights are damaged")
            _check_causal(exact.opened, windows[0], truth[0], exact.tolerance)
        most = _most_rounding(opened, windows, truth) if exact.opened.compute == torch.float32 else float("inf")
        if onednn:
            product.install(module)
        apart: list[str] = []
        for isolation in ISOLATIONS:
            if isolation == "varlen" and not attention.install(module):
                continue
            opened = replace(opened, isolation=isolation)
            with _widened(opened) as exact:
                distance = _distance(_losses(exact.opened, windows), truth)
            if distance <= exact.tolerance and _holds_as_it_runs(opened, windows, truth, most):
                return opened
            if isolation == "varlen":
                attention.remove(module)
            where = "" if distance > exact.tolerance else f" but not as it runs, in {str(compute).split('.')[-1]}"
            apart.append(f"{distance:.2g} nats {isolation}{where}")
        raise Refused(f"lets a window's losses depend on what else is in the batch ({', '.join(apart)})")
    except Refused as error:
        raise UserError(f"{name} ({type(module).__name__}) {error}", "choose another model or context.window") from None


def probe_length(config: Any, window: int) -> int:
    """Tokens of the longest probe window: all of `window` where the config names a length that windows can exceed."""
    limits = (value for key, value in _integers("", config.to_dict()) if _is_length(key))
    return window if any(1 < limit < window for limit in limits) else min(window, PROBE_TOKENS)


def _is_length(field: str) -> bool:
    return LENGTH_FIELDS.search(field) is not None and COUNT_FIELDS.search(field) is None


def _integers(field: str, value: Any) -> Iterator[tuple[str, int]]:
    """Every integer of a nested config with the innermost name above it."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _integers(str(name), inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _integers(field, inner)
    elif isinstance(value, int) and not isinstance(value, bool):
        yield field, value


def _vocabulary(module: Any) -> int:
    """Tokens that the model both reads and predicts."""
    embeddings = (module.get_input_embeddings(), module.get_output_embeddings())
    return min(int(item.weight.shape[0]) for item in embeddings if getattr(item, "weight", None) is not None)


def _lengths(longest: int) -> list[int]:
    """One window that fills a row, and its halves down to 2, two at least, that share another; the longest is last."""
    halves = [longest >> times for times in range(1, longest.bit_length() - 1)]
    return [longest, *[2] * (2 - len(halves)), *reversed(halves)]


def _windows(vocabulary: int, lengths: list[int]) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(min(8, vocabulary // 2), vocabulary, size=length) for length in lengths]


@dataclass(frozen=True, slots=True)
class Exact:
    """A model as exact as the device can run it, and what rounding may then amount to, nats."""

    opened: Opened
    tolerance: float


@contextmanager
def _widened(opened: Opened) -> Generator[Exact]:
    """Weights and buffers in float32 for a while, exactly both ways; as they are if the device has no room for that."""
    module = opened.module
    narrow = [
        (tensor, tensor.dtype)
        for tensor in (*module.parameters(), *module.buffers())
        if tensor.is_floating_point() and tensor.dtype != torch.float32
    ]

    def restore() -> None:
        for tensor, dtype in narrow:
            tensor.data = tensor.data.to(dtype)

    exact = Exact(opened=replace(opened, compute=torch.float32), tolerance=TOLERANCE_NATS)
    try:
        for tensor, _ in narrow:
            tensor.data = tensor.data.float()
    except torch.OutOfMemoryError:
        restore()
        exact = Exact(opened=opened, tolerance=ROUGH_NATS)
    try:
        yield exact
    finally:
        restore()


def _check_causal(opened: Opened, window: np.ndarray, truth: np.ndarray, tolerance: float) -> None:
    """Change the second half, then the last token alone: a model may see ahead within blocks that end at the half."""
    for cut in {len(window) // 2, len(window) - 1}:
        changed = np.concatenate([window[:cut], _other(opened, window[cut:])])
        worst = _distance([_plain(opened, changed, window)[:cut]], [truth[:cut]])
        if worst > tolerance:
            raise Refused(f"is not causal: losses change with later tokens, by {worst:.2g} nats")


def _most_rounding(opened: Opened, windows: list[np.ndarray], truth: list[np.ndarray]) -> float:
    """Nats that rounding in the dtype that runs may make of most losses, by what it makes of the plain forward's."""
    own = 0.0 if opened.compute == torch.float32 else _rounding([_plain(opened, ids) for ids in windows], truth)
    return TOLERANCE_NATS + ROUNDING_FACTOR * own


def _rounding(found: list[np.ndarray], truth: list[np.ndarray]) -> float:
    """How far from the truth losses are, all but the worst, nats."""
    return float(np.quantile(np.abs(np.concatenate(found) - np.concatenate(truth)), ROUNDING_SHARE))


def _holds_as_it_runs(opened: Opened, windows: list[np.ndarray], truth: list[np.ndarray], most: float) -> bool:
    """The fourth of the above, in the dtype that will run. `most`: nats that rounding may make of most losses."""
    one = _losses(opened, windows)
    if one is None or not _rounding(one, truth) <= most:
        return False
    for changed, kept in _changes(opened, windows):
        distance = _distance(_first(one, kept), _first(_losses(opened, changed, windows), kept))
        if distance <= TOLERANCE_NATS:
            continue
        noise = _distance(_first(one, kept), _first(_losses(opened, windows), kept))
        if not distance <= TOLERANCE_NATS + NOISE_FACTOR * noise:
            return False
    return True


def _changes(opened: Opened, windows: list[np.ndarray]) -> Iterator[tuple[list[np.ndarray], list[int]]]:
    """The windows with other tokens, and how many of the first losses of each may not notice."""
    yield [*(_other(opened, ids) for ids in windows[:-1]), windows[-1]], [*[0] * (len(windows) - 1), len(windows[-1])]
    if opened.compute != torch.float32:  # in which they are as causal as the truth that they were held to
        for cuts in ([len(ids) // 2 for ids in windows], [len(ids) - 1 for ids in windows]):
            pairs = zip(windows, cuts, strict=True)
            yield [np.concatenate([ids[:cut], _other(opened, ids[cut:])]) for ids, cut in pairs], cuts


def _first(losses: list[np.ndarray] | None, kept: list[int]) -> list[np.ndarray] | None:
    return losses and [values[:number] for values, number in zip(losses, kept, strict=True)]


def _other(opened: Opened, tokens: np.ndarray) -> np.ndarray:
    return (tokens + 1) % _vocabulary(opened.module)


@torch.no_grad()
def _plain(opened: Opened, window: np.ndarray, predicted: np.ndarray | None = None) -> np.ndarray:
    """The truth: the model's own forward of one window and PyTorch's own cross-entropy. float32 [length - 1].

    The losses are those of the window's tokens, or of `predicted` [length] in their place.
    """
    ids = torch.from_numpy(window).to(opened.module.device)
    targets = ids if predicted is None else torch.from_numpy(predicted).to(ids.device)
    try:
        with casting(opened):
            logits = opened.module(input_ids=ids[None], use_cache=False).logits
        return cross_entropy(logits[0, :-1].float(), targets[1:], reduction="none").cpu().numpy()
    except FOREIGN as error:
        raise Refused(f"cannot be run: {first_line(error)}") from error


@torch.no_grad()
def _losses(
    opened: Opened, windows: list[np.ndarray], predicted: list[np.ndarray] | None = None
) -> list[np.ndarray] | None:
    """Losses of the windows in one batch, float32 [length - 1] each; None if the model does not take such a batch.

    They are those of the windows' tokens, or of `predicted` in their place.
    """
    try:
        batch = _batch(opened, windows)
        if predicted is not None:
            batch = replace(batch, targets=_batch(opened, predicted).targets)
        return [losses[1:] for losses in batch.gather(batch_losses(opened, batch).loss)]
    except FOREIGN:
        return None  # it knows no position ids, or none that restart


def _batch(opened: Opened, windows: Sequence[np.ndarray]) -> Batch:
    shared = list(range(1, len(windows)))
    rows = one_a_row([len(ids) for ids in windows]) if opened.isolation == "alone" else [[0], shared]
    return collate(windows, rows).to(opened.module.device)


def _distance(one: Sequence[np.ndarray] | None, other: Sequence[np.ndarray] | None) -> float:
    """Largest difference in nats; infinite if something is missing or not finite."""
    if one is None or other is None:
        return float("inf")
    apart = np.concatenate([np.abs(left - right) for left, right in zip(one, other, strict=True)])
    return float(apart.max(initial=0.0)) if np.isfinite(apart).all() else float("inf")


def has_linear_head(module: Any) -> bool:
    """Whether logits are just `last_hidden_state @ weight.T`; false for soft-capped, scaled or biased heads.

    Checked by running the model on eight tokens, not by a list of class names. The head's output is replaced
    by logits from -100 to 100 on the way, so that a soft cap shows also in a model whose own logits are small.
    """
    head = module.get_output_embeddings()
    if head is None or getattr(head, "bias", None) is not None or getattr(head, "weight", None) is None:
        return False
    weight = head.weight
    ids = torch.arange(8, device=weight.device).unsqueeze(0) % weight.shape[0]
    given: list[torch.Tensor] = []

    def replace_logits(_module: Any, _inputs: Any, logits: torch.Tensor) -> torch.Tensor:
        large = torch.linspace(-100, 100, logits.numel(), device=logits.device).view(logits.shape).to(logits.dtype)
        given[:] = [logits.float(), large.float()]
        return large

    hook = head.register_forward_hook(replace_logits)
    try:
        with torch.no_grad():
            hidden = module.base_model(input_ids=ids, use_cache=False).last_hidden_state
            finished = module(input_ids=ids, use_cache=False).logits.float()
            found = (hidden @ weight.T).float()
    except FOREIGN:  # a body of another shape: its finished logits are taken
        return False
    finally:
        hook.remove()
    if not given or found.shape != given[0].shape or finished.shape != given[1].shape:
        return False
    return torch.equal(finished, given[1]) and torch.allclose(found, given[0], rtol=1e-2, atol=1e-2)

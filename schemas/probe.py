"""The probe: what a model does with windows that share a batch, found out on the model itself when it is opened.

A few windows of random tokens are scored alone by the model's own plain forward; that is the truth. Then:

1. causal: a later token changes no earlier loss;
2. packed: the same windows in shared rows give the same losses;
3. alone: if 2 fails, the same in rows of one window each, of unequal lengths;
4. isolated: in the very dtype that will run, other neighbours change no loss of a window.

1 to 3 are held in float32, where rounding cannot hide a leak: weights of another dtype are widened for the moment it
takes, which is exact, and narrowed again. 4 compares two runs of one shape, so rounding cancels. It takes milliseconds
on a GPU and about a second on a CPU.
"""

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from schemas.batch import Batch, collate, one_a_row
from schemas.errors import UserError, first_line
from schemas.forward import Isolation, Opened, casting
from schemas.loss import batch_losses

PROBE_TOKENS = 64
TOLERANCE_NATS = 1e-3  # float32 rounding makes 3e-5 over 88 families, and 3e-5 at 135M parameters
ROUGH_NATS = 1.0  # where there is no memory for float32 weights: bfloat16 rounding makes up to 0.4 at 135M parameters
NOISE_FACTOR = 4.0  # some GPU kernels add in any order: what two equal runs differ by is allowed so many times over
ISOLATIONS: tuple[Isolation, ...] = ("packed", "alone")
# What foreign model code raises when it is given a batch it was not written for.
FOREIGN = (TypeError, ValueError, RuntimeError, IndexError, KeyError, AttributeError, AssertionError)


class Refused(Exception):
    """The model cannot be used; the message follows its name."""


def prove(module: Any, compute: torch.dtype, window: int, name: str) -> Opened:
    """What may be done with a model: its head and its isolation. `compute`: dtype of the products it will run in.

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
            _check_causal(exact.opened, windows[1], truth[1], exact.tolerance)
        apart: list[str] = []
        for isolation in ISOLATIONS:
            opened = replace(opened, isolation=isolation)
            with _widened(opened) as exact:
                distance = _distance(_losses(exact.opened, windows), truth)
            if distance <= exact.tolerance and _isolated(opened, windows):
                return opened
            apart.append(f"{distance:.2g} nats {isolation}")
        raise Refused(f"lets a window's losses depend on what else is in the batch ({', '.join(apart)})")
    except Refused as error:
        raise UserError(f"{name} ({type(module).__name__}) {error}", "choose another model or context.window") from None


def probe_length(config: Any, window: int) -> int:
    """Tokens of the longest probe window: all of `window` where the config names a length that windows can exceed."""
    names = ("window", "chunk", "position", "block")
    limits = (
        value
        for key, value in _flat(config.to_dict())
        if isinstance(value, int) and not isinstance(value, bool) and any(name in key for name in names)
    )
    return window if any(1 < limit < window for limit in limits) else min(window, PROBE_TOKENS)


def _flat(values: Any) -> list[tuple[str, Any]]:
    if not isinstance(values, dict):
        return []
    return [pair for key, value in values.items() for pair in ((str(key), value), *_flat(value))]


def _vocabulary(module: Any) -> int:
    """Tokens that the model both reads and predicts."""
    embeddings = (module.get_input_embeddings(), module.get_output_embeddings())
    return min(int(item.weight.shape[0]) for item in embeddings if getattr(item, "weight", None) is not None)


def _lengths(longest: int) -> list[int]:
    """One window that fills a row, and three that share one of as many tokens."""
    return [longest, max(4, longest // 2), max(2, longest // 8), max(2, longest // 4)]


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
    half = len(window) // 2
    changed = _plain(opened, np.concatenate([window[:half], _other(opened, window[half:])]))
    worst = _distance([changed[: half - 1]], [truth[: half - 1]])
    if worst > tolerance:
        raise Refused(f"is not causal: losses change with later tokens, by {worst:.2g} nats")


def _isolated(opened: Opened, windows: list[np.ndarray]) -> bool:
    """Whether the last window's losses stay when all its neighbours change, in the dtype that will run."""
    neighbours = [_other(opened, ids) for ids in windows[:-1]]
    one, again, other = (_losses(opened, given) for given in (windows, windows, [*neighbours, windows[-1]]))
    noise = _distance(one and one[-1:], again and again[-1:])
    return _distance(one and one[-1:], other and other[-1:]) <= TOLERANCE_NATS + NOISE_FACTOR * noise


def _other(opened: Opened, tokens: np.ndarray) -> np.ndarray:
    return (tokens + 1) % _vocabulary(opened.module)


@torch.no_grad()
def _plain(opened: Opened, window: np.ndarray) -> np.ndarray:
    """The truth: the model's own forward of one window and PyTorch's own cross-entropy. float32 [length - 1]."""
    ids = torch.from_numpy(window).to(opened.module.device)
    try:
        with casting(opened):
            logits = opened.module(input_ids=ids[None], use_cache=False).logits
        return cross_entropy(logits[0, :-1].float(), ids[1:], reduction="none").cpu().numpy()
    except FOREIGN as error:
        raise Refused(f"cannot be run: {first_line(error)}") from error


@torch.no_grad()
def _losses(opened: Opened, windows: list[np.ndarray]) -> list[np.ndarray] | None:
    """Losses of the windows in one batch, float32 [length - 1] each; None if the model does not take such a batch."""
    try:
        batch = _batch(opened, windows)
        return [losses[1:] for losses in batch.gather(batch_losses(opened, batch).loss)]
    except FOREIGN:
        return None  # it knows no position ids, or none that restart


def _batch(opened: Opened, windows: Sequence[np.ndarray]) -> Batch:
    shared = list(range(1, len(windows)))
    rows = [[0], shared] if opened.isolation == "packed" else one_a_row([len(ids) for ids in windows])
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

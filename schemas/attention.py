"""Attention by explicit boundaries: windows laid end to end see themselves alone, without padding and without a mask.

Transformers lets an attention function be registered by name. Ours is its own SDPA until a forward names the windows'
boundaries (`cu_seq_lens_q`, the field's word for them); then each window attends to itself, by one kernel that takes
boundaries where the device has it (`torch.nn.attention.varlen`), else window by window: by SDPA, or without gradients on a
CPU in blocks where a window is large enough for them. Whether a model that was given our attention really keeps windows
apart is proven when the model is opened (`schemas.probe`).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from inspect import signature
from itertools import pairwise
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from schemas.product import autocast_dtype, project

try:
    from torch.nn.attention import varlen
except ImportError:  # not in every build of torch
    varlen_attn: Any = None
else:
    varlen_attn = varlen.varlen_attn

NAME = "tokensift_varlen"
KERNEL_DTYPES = (torch.bfloat16, torch.float16)  # of the one that takes boundaries
BLOCK_DTYPES = (torch.float32, torch.bfloat16)
BLOCK_TOKENS = 128  # their scores against 1024 keys for three heads stay in a core's cache
BLOCK_PRODUCTS = 2**22  # multiplications of a block's largest product; below it the calls cost more than they save
# What a family may ask of its attention beyond ours; the probe then finds another way for it.
UNSUPPORTED = ("softcap", "s_aux", "position_bias", "cache")
SHARES_HEADS = varlen_attn is not None and "enable_gqa" in signature(varlen_attn).parameters
_bounded: ContextVar[bool] = ContextVar("bounded", default=False)


@contextmanager
def bounded() -> Iterator[None]:
    """While it is entered, models that have our attention make no masks."""
    token = _bounded.set(True)
    try:
        yield
    finally:
        _bounded.reset(token)


def install(module: Any) -> bool:
    """Give a model our attention; false if it cannot have it, since its own is not SDPA or is wired in."""
    if getattr(module.config, "_attn_implementation", None) != "sdpa":
        return False
    module.set_attn_implementation(NAME)
    return module.config._attn_implementation == NAME


def remove(module: Any) -> None:
    """Give a model its SDPA back."""
    module.set_attn_implementation("sdpa")


def attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int = 0,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention of windows that lie end to end in the rows; SDPA where no boundaries are given.

    query [rows, heads, row_tokens, d], key and value with as many heads or a divisor of them. `cu_seq_lens_q`: int32
    [windows + 1] tokens before each window and before the end, rows laid end to end; padding is a window as well.
    `max_length_q`: at least the longest window. Returns [rows, row_tokens, heads, d]. Raises ValueError for what a
    family asks for and this does not do.
    """
    if cu_seq_lens_q is None:
        found = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, sliding_window=sliding_window, **others
        )
        return found[0], None
    asked = [name for name in UNSUPPORTED if others.get(name) is not None]
    if asked or attention_mask is not None or others.get("is_causal") is False or key.shape[2] != query.shape[2]:
        raise ValueError(f"attention by boundaries does not do {asked or 'masks'}")
    if (compute := autocast_dtype(query.device)) is not None:
        # As autocast does for SDPA: rotary embeddings in float32 would else keep queries and keys from the kernel.
        query, key, value = (tensor.to(compute) for tensor in (query, key, value))
    rows, heads, row_tokens, _ = query.shape
    query, key, value = (tensor.transpose(1, 2).flatten(0, 1) for tensor in (query, key, value))
    if varlen_attn and query.is_cuda and query.dtype in KERNEL_DTYPES and not dropout:
        found = _by_kernel(query, key, value, cu_seq_lens_q, max_length_q, scaling, sliding_window)
    elif torch.is_grad_enabled() or dropout:
        found = _uncompiled(query, key, value, cu_seq_lens_q, dropout, scaling, sliding_window)
    else:
        found = _opaque(query, key, value, cu_seq_lens_q, scaling, sliding_window)
    return found.view(rows, row_tokens, heads, -1), None


def _by_kernel(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bounds: torch.Tensor,
    longest: int,
    scale: float | None,
    sliding_window: int | None,
) -> torch.Tensor:
    """[tokens, heads, d] each; one call for all windows."""
    groups: dict[str, Any] = {}
    if query.shape[1] != key.shape[1]:
        if SHARES_HEADS:
            groups["enable_gqa"] = True
        else:  # torch 2.11
            key, value = (tensor.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for tensor in (key, value))
    window = (sliding_window - 1 if sliding_window else -1, 0)  # tokens before a token's own, none after it
    return varlen_attn(query, key, value, bounds, bounds, longest, longest, scale=scale, window_size=window, **groups)


def _window_by_window(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bounds: torch.Tensor,
    dropout: float,
    scale: float | None,
    sliding_window: int | None,
) -> torch.Tensor:
    """[tokens, heads, d] each; a window at a time, none of which sees more than its own slice."""
    pieces: list[torch.Tensor] = []
    plain = not dropout and not torch.is_grad_enabled()
    for start, end in pairwise(bounds.tolist()):
        own = query[start:end], key[start:end], value[start:end]
        narrow = _narrower(sliding_window, end - start)
        if plain and _fills_blocks(own[0], own[1], narrow):
            pieces.append(_in_blocks(*own, scale, narrow))
        else:
            pieces.append(_by_sdpa(*own, dropout, scale, narrow))
    return torch.cat(pieces)


_uncompiled: Any = torch.compiler.disable(_window_by_window)


def _by_sdpa(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    dropout: float,
    scale: float | None,
    narrow: int | None,
) -> torch.Tensor:
    """One window, [tokens, heads, d] each."""
    band = _band(len(query), len(query), narrow, query.device) if narrow else None
    found = scaled_dot_product_attention(
        *(tensor.transpose(0, 1)[None] for tensor in (query, key, value)),
        attn_mask=band,
        dropout_p=dropout,
        is_causal=band is None,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return found[0].transpose(0, 1)


def _fills_blocks(query: torch.Tensor, key: torch.Tensor, narrow: int | None) -> bool:
    """Whether blocks are faster than SDPA for one window: a function of its shape, dtype and device alone.

    Measured with one thread and with two, four to 32 heads of 16 to 128, windows of 32 to 2048 tokens.
    """
    tokens, heads, size = query.shape
    rows = min(tokens, BLOCK_TOKENS) * heads // key.shape[1]
    keys = min(tokens, narrow + BLOCK_TOKENS) if narrow else tokens
    return query.device.type == "cpu" and query.dtype in BLOCK_DTYPES and rows * keys * size >= BLOCK_PRODUCTS


def _in_blocks(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None, narrow: int | None
) -> torch.Tensor:
    """One window, without gradients: a few queries at a time against all keys they may see, softmax in float32.

    Up to twice as fast as SDPA on a CPU, whose products are of smaller pieces, and no less exact: its errors at a length
    of 1024 in bfloat16 were 1.6e-4, these 1.1e-4; 2e-8 and 3e-8 in float32.
    """
    found = query.new_empty(*query.shape[:2], value.shape[2])
    shared = query.shape[1] // key.shape[1]
    keys, values = key.transpose(0, 1).contiguous(), value.transpose(0, 1).contiguous()
    factor = query.shape[2] ** -0.5 if scale is None else scale
    for first in range(0, len(query), BLOCK_TOKENS):
        last = min(first + BLOCK_TOKENS, len(query))
        begin = max(0, first - narrow + 1) if narrow else 0
        # Without a sliding window only a block's own columns hold later tokens.
        columns = last - begin if narrow else last - first
        hidden = ~_band(last - first, columns, narrow or columns, query.device)[:, None]
        for head in range(len(keys)):
            heads = slice(head * shared, (head + 1) * shared)
            scores = project(query[first:last, heads].flatten(0, 1), keys[head, begin:last]).mul_(factor)
            scores = scores.view(last - first, shared, -1)
            scores[..., -columns:].masked_fill_(hidden, -torch.inf)
            seen = project(scores.softmax(2).flatten(0, 1), values[head, begin:last].T)
            found[first:last, heads] = seen.view(last - first, shared, -1)
    return found


@torch.library.custom_op("tokensift::window_by_window", mutates_args=())
def _opaque(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bounds: torch.Tensor,
    scale: float | None,
    sliding_window: int | None,
) -> torch.Tensor:
    """The same in one piece for a compiler, which would else cut a layer in two here; without gradients."""
    return _window_by_window(query, key, value, bounds, 0.0, scale, sliding_window)


@_opaque.register_fake
def _(query: torch.Tensor, _key: Any, value: torch.Tensor, *_: Any) -> torch.Tensor:
    return query.new_empty(*query.shape[:2], value.shape[2])


def _narrower(sliding_window: int | None, length: int) -> int | None:
    """The sliding window, if a window of `length` tokens notices it."""
    return sliding_window if sliding_window and length > sliding_window else None


def _band(rows: int, length: int, sliding_window: int, device: torch.device) -> torch.Tensor:
    """Bool [rows, length], of the last of `length` tokens: each sees itself and the `sliding_window` - 1 before it."""
    places = torch.arange(length, device=device)
    behind = places[-rows:, None] - places[None, :]
    return (behind >= 0) & (behind < sliding_window)


def _mask(**named: Any) -> torch.Tensor | None:
    return None if _bounded.get() else sdpa_mask(**named)


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, _mask)

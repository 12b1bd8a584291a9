"""Attention by boundaries: each window sees itself alone, whatever lies beside it, forward and backward."""

from dataclasses import replace
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch._dynamo import eval_frame
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention
from transformers import AutoConfig, AutoModelForCausalLM

from schemas import attention
from schemas.batch import collate
from schemas.config import Score
from schemas.forward import Opened, forward
from schemas.loss import Losses
from score_jobs.engines import packed
from score_jobs.engines.packed import PackedEngine

VOCABULARY = 64
SHAPE = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3, "bos_token_id": 0, "eos_token_id": 1,
         "pad_token_id": 0}  # fmt: skip
LENGTHS = (9, 1, 14, 3, 6)
ROWS = [[0, 1], [2], [3, 4]]


def build(family: str = "llama", **fields: Any) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SHAPE, **fields), dtype=torch.float32).eval()


def windows() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(2, VOCABULARY, size=length) for length in LENGTHS]


def opened(model: Any) -> Opened:
    return Opened(module=model, linear=False, isolation="varlen", compute=torch.float32)


@pytest.mark.parametrize("fields", [{}, {"family": "mistral", "sliding_window": 4}], ids=["causal", "sliding"])
def test_gradients_are_those_of_the_plain_forward_of_each_window_alone(fields: dict[str, Any]) -> None:
    model, own = build(**fields), windows()
    for ids in own:
        tokens = torch.from_numpy(ids)
        if len(ids) > 1:
            cross_entropy(model(tokens[None]).logits[0, :-1], tokens[1:], reduction="sum").backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    assert attention.install(model)
    batch = collate(own, ROWS)
    logits = forward(opened(model), batch)
    cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), ignore_index=-100, reduction="sum").backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("road", ["_uncompiled", "_opaque"])
def test_under_autocast_attention_computes_in_its_dtype_as_sdpa_does(
    road: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, seen = build(), set[torch.dtype]()
    plain = getattr(attention, road)

    def watched(*tensors: Any) -> torch.Tensor:
        seen.update(tensor.dtype for tensor in tensors[:3])
        return plain(*tensors)

    monkeypatch.setattr(attention, road, watched)
    assert attention.install(model)
    with torch.set_grad_enabled(road == "_uncompiled"), torch.autocast("cpu", torch.bfloat16):
        query = torch.randn(1, 4, 8, 8)
        attention.attend(
            model, query, query[:, :2], query[:, :2].bfloat16(), None, cu_seq_lens_q=torch.tensor([0, 5, 8]).int()
        )
        forward(replace(opened(model), compute=torch.bfloat16), collate(windows(), ROWS))
    assert seen == {torch.bfloat16}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sliding_window", [None, 1, 50, 200])
@pytest.mark.parametrize("heads", [1, 2, 6])
@torch.no_grad()
def test_attention_in_blocks_is_that_of_float64_by_sdpa(
    dtype: torch.dtype, sliding_window: int | None, heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    bounds = torch.tensor([0, 300, 301, 301 + attention.BLOCK_TOKENS, 700], dtype=torch.int32)
    query, key, value = (torch.randn(700, count, size).to(dtype) for count, size in ((6, 16), (heads, 16), (heads, 24)))
    exact = (tensor.double() for tensor in (query, key, value))
    scale = None if heads == 1 else 0.7
    expected = attention._window_by_window(*exact, bounds, 0.0, scale, sliding_window)
    monkeypatch.setattr(attention, "BLOCK_PRODUCTS", 0)
    monkeypatch.setattr(attention, "_by_sdpa", None)
    found = attention._window_by_window(query, key, value, bounds, 0.0, scale, sliding_window)
    assert found.dtype == dtype
    most = 1e-5 if dtype == torch.float32 else 2**-7
    torch.testing.assert_close(found.double(), expected, atol=most, rtol=most)


def way_of(tokens: int, heads: int, shared_heads: int, size: int, monkeypatch: pytest.MonkeyPatch, **named: Any) -> str:
    """How one window of that shape is attended to."""
    used: list[str] = []
    for way in ("_in_blocks", "_by_sdpa"):
        monkeypatch.setattr(attention, way, lambda query, *_, way=way: used.append(way) or query)
    dtype, window = named.get("dtype", torch.float32), named.get("sliding_window")
    query, key = torch.empty(tokens, heads, size, dtype=dtype), torch.empty(tokens, shared_heads, size, dtype=dtype)
    bounds = torch.tensor([0, tokens], dtype=torch.int32)
    attention._window_by_window(query, key, key, bounds, named.get("dropout", 0.0), None, window)
    return used.pop()


@torch.no_grad()
def test_windows_too_small_to_fill_a_block_are_left_to_sdpa(monkeypatch: pytest.MonkeyPatch) -> None:
    def way(*shape: int, **named: Any) -> str:
        return way_of(*shape, monkeypatch, **named)

    # 128 queries of three heads against 1024 keys of 64: 25M multiplications; 4M are needed
    assert way(1024, 9, 3, 64) == way(256, 9, 3, 64) == way(1024, 9, 3, 64, dtype=torch.bfloat16) == "_in_blocks"
    assert way(256, 4, 4, 32) == way(100, 9, 3, 64) == "_by_sdpa"
    assert way(512, 16, 16, 64) == "_in_blocks" and way(511, 16, 16, 64) == "_by_sdpa"
    # behind a sliding window a block meets its own 128 tokens and those before its first one that the window reaches
    assert way(2048, 16, 16, 64, sliding_window=384) == "_in_blocks"
    assert way(2048, 16, 16, 64, sliding_window=383) == "_by_sdpa"
    assert way(1024, 9, 3, 64, dropout=0.1) == way(1024, 9, 3, 64, dtype=torch.float64) == "_by_sdpa"
    with torch.enable_grad():
        assert way(1024, 9, 3, 64) == "_by_sdpa"


def test_a_windows_logits_do_not_change_by_a_bit_when_its_neighbours_do() -> None:
    model, own = build(), windows()
    attention.install(model)
    other = [own[0], *[(ids + 7) % VOCABULARY for ids in own[1:]]]
    with torch.no_grad():
        one, two = (forward(opened(model), collate(ids, ROWS))[0, : LENGTHS[0]] for ids in (own, other))
    assert torch.equal(one, two)


def test_without_boundaries_a_model_is_its_sdpa_padding_and_cache_included() -> None:
    model = build()
    ids = torch.from_numpy(np.stack([windows()[2], windows()[2][::-1].copy()]))
    seen = torch.ones_like(ids)
    seen[0, :5] = 0  # padded on the left, as for generation
    before = (
        model(ids, attention_mask=seen).logits,
        model.generate(ids, attention_mask=seen, max_new_tokens=6, do_sample=False),
    )
    assert attention.install(model)
    after = (
        model(ids, attention_mask=seen).logits,
        model.generate(ids, attention_mask=seen, max_new_tokens=6, do_sample=False),
    )
    assert torch.equal(before[0], after[0]) and torch.equal(before[1], after[1])
    attention.remove(model)
    assert model.config._attn_implementation == "sdpa"


def test_a_model_whose_attention_is_not_sdpa_keeps_its_own() -> None:
    model = build()
    model.set_attn_implementation("eager")
    assert not attention.install(model) and model.config._attn_implementation == "eager"


@pytest.mark.parametrize("is_causal", [True, False])
def test_without_boundaries_attention_is_pytorchs_own_in_whatever_is_asked_of_it(is_causal: bool) -> None:
    query, key, value = torch.randn(3, 2, 4, 5, 8).unbind()
    found, _ = attention.attend(torch.nn.Module(), query, key, value, None, scaling=0.7, is_causal=is_causal)
    expected = scaled_dot_product_attention(query, key, value, is_causal=is_causal, scale=0.7)
    torch.testing.assert_close(found, expected.transpose(1, 2))


class OnGpu(torch.Tensor):
    """A tensor that says it is on a GPU, and is not."""

    is_cuda = True  # type: ignore[assignment]


@pytest.mark.parametrize("road", ["with gradients", "without", "by the kernel"])
@pytest.mark.parametrize("sliding_window", [None, 3])
def test_attention_by_boundaries_is_plain_softmax_of_each_window_on_every_road(
    road: str, sliding_window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    dtype = torch.bfloat16 if road == "by the kernel" else torch.float32
    given = [torch.randn(2, heads, 7, 8).to(dtype) for heads in (4, 2, 2)]
    bounds = torch.tensor([0, 5, 7, 14], dtype=torch.int32)
    laid = [tensor.float().transpose(1, 2).flatten(0, 1) for tensor in given]
    window = (sliding_window - 1 if sliding_window else -1, 0)
    expected = of_torch_2_13(*laid, bounds, bounds, 8, 8, scale=0.7, window_size=window, enable_gqa=True)
    asked: list[int] = []

    def kernel(*arguments: Any, **named: Any) -> torch.Tensor:
        asked.append(1)
        return of_torch_2_13(*arguments, **named)

    monkeypatch.setattr(attention, "varlen_attn", kernel)
    if road == "by the kernel":
        given = [tensor.as_subclass(OnGpu) for tensor in given]
    with torch.set_grad_enabled(road == "with gradients"):
        found, _ = attention.attend(
            torch.nn.Module(), *given, None, scaling=0.7, sliding_window=sliding_window, cu_seq_lens_q=bounds, max_length_q=8
        )  # fmt: skip
    assert found.shape == (2, 7, 4, 8) and bool(asked) == (road == "by the kernel")
    torch.testing.assert_close(
        found.float().as_subclass(torch.Tensor).flatten(0, 1), expected, atol=2e-2 if asked else 1e-5, rtol=0
    )


@pytest.mark.parametrize(("dtype", "dropout"), [(torch.float32, 0.0), (torch.bfloat16, 0.5)])
def test_what_the_kernel_does_not_do_is_not_asked_of_it(
    dtype: torch.dtype, dropout: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "varlen_attn", object())
    query = torch.randn(1, 4, 5, 8).to(dtype).as_subclass(OnGpu)
    bounds = torch.tensor([0, 5], dtype=torch.int32)
    attention.attend(torch.nn.Module(), query, query, query, None, dropout, cu_seq_lens_q=bounds, max_length_q=8)


def test_a_saved_model_does_not_name_our_attention(tmp_path: Path) -> None:
    model = build()
    attention.install(model)
    model.save_pretrained(tmp_path)
    assert attention.NAME not in (tmp_path / "config.json").read_text()


@pytest.mark.parametrize(
    ("asked", "named"),
    [
        ({"softcap": 30.0}, r"\['softcap'\]"),
        ({"s_aux": torch.zeros(4)}, r"\['s_aux'\]"),
        ({"is_causal": False}, "masks"),
        ({"attention_mask": torch.ones(1, 1, 5, 5).bool()}, "masks"),
        ({"key": torch.randn(1, 4, 6, 8), "value": torch.randn(1, 4, 6, 8)}, "masks"),
    ],
)
def test_what_a_family_asks_of_attention_beyond_ours_is_an_error_not_left_out(
    asked: dict[str, Any], named: str
) -> None:
    query = torch.randn(1, 4, 5, 8)
    given: dict[str, Any] = {"key": query, "value": query, "attention_mask": None, **asked}
    with pytest.raises(ValueError, match=f"does not do {named}$"):
        attention.attend(
            torch.nn.Module(), query, cu_seq_lens_q=torch.tensor([0, 5], dtype=torch.int32), max_length_q=8, **given
        )


def of_torch_2_11(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1)
):
    """The kernel as torch 2.11 declares it, played by plain softmax: no heads are shared."""
    assert query.shape[1] == key.shape[1] and window_size[0] >= -1 and window_size[1] == 0
    assert max_q == max_k >= int(cu_seq_q.diff().max()) and torch.equal(cu_seq_q, cu_seq_k)
    out = torch.empty_like(query)
    for start, end in zip(cu_seq_q[:-1].tolist(), cu_seq_q[1:].tolist(), strict=True):
        own = slice(start, end)
        scores = torch.einsum("qhd,khd->hqk", query[own], key[own]) * (scale or query.shape[2] ** -0.5)
        behind = torch.arange(end - start)[:, None] - torch.arange(end - start)
        seen = (behind >= 0) & ((window_size[0] < 0) | (behind <= window_size[0]))
        weights = scores.masked_fill(~seen, -torch.inf).softmax(2)
        out[own] = torch.einsum("hqk,khd->qhd", weights, value[own])
    return out


def of_torch_2_13(query, key, value, *arguments, enable_gqa=False, num_splits=None, **named):
    """As torch 2.13 declares it."""
    assert enable_gqa == (query.shape[1] != key.shape[1])
    key, value = (tensor.repeat_interleave(query.shape[1] // tensor.shape[1], dim=1) for tensor in (key, value))
    return of_torch_2_11(query, key, value, *arguments, **named)


@pytest.mark.parametrize("kernel", [of_torch_2_11, of_torch_2_13])
@pytest.mark.parametrize("heads", [4, 2])
@pytest.mark.parametrize("sliding_window", [None, 3])
def test_the_kernel_is_asked_as_each_release_of_torch_declares_it(
    kernel: Any, heads: int, sliding_window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "varlen_attn", kernel)
    monkeypatch.setattr(attention, "SHARES_HEADS", "enable_gqa" in signature(kernel).parameters)
    torch.manual_seed(0)
    query, key, value = (torch.randn(14, count, 8) for count in (4, heads, heads))
    bounds = torch.tensor([0, 6, 7, 14], dtype=torch.int32)
    asked = attention._by_kernel(query, key, value, bounds, 8, 0.3, sliding_window)
    expected = attention._window_by_window(query, key, value, bounds, 0.0, 0.3, sliding_window)
    torch.testing.assert_close(asked, expected, atol=1e-5, rtol=1e-5)


def test_the_installed_torch_declares_what_is_asked_of_its_kernel() -> None:
    named = signature(varlen_attn).parameters
    assert list(named)[:7] == ["query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k"]
    assert {"scale", "window_size"} <= named.keys() and ("enable_gqa" in named) == attention.SHARES_HEADS


@pytest.mark.slow
def test_a_compiled_engine_gives_the_same_losses_and_the_same_bytes_whatever_came_first(tiny_model: Path) -> None:
    torch._dynamo.reset()
    own = [ids % 60 for ids in (*windows(), np.arange(7))]  # 31 tokens in one row, 9 in another
    settings = {"model": "", "output": "", "dtype": "float32", "batch_tokens": 32}
    plain = PackedEngine(tiny_model, 16, Score.model_validate(settings), "cpu").score(own)
    compiled = [
        PackedEngine(tiny_model, 16, Score.model_validate({**settings, "compile": True}), "cpu") for _ in range(2)
    ]
    compiled[1].score(own[:1])
    first, second = (engine.score(own) for engine in compiled)
    assert compiled[0].describe()["compiled"] is True
    for one, two, other in zip(plain, first, second, strict=True):
        np.testing.assert_allclose(one.loss, two.loss, atol=1e-4, rtol=0)
        assert np.array_equal(two.loss, other.loss, equal_nan=True)
    uncompiled = [np.array_equal(one.loss, two.loss, equal_nan=True) for one, two in zip(plain, first, strict=True)]
    assert uncompiled == [len(ids) in (1, 3, 6) for ids in own]  # of one token there is no loss


def test_a_compiled_engine_pads_only_a_batch_that_is_nearly_whole(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"model": "", "output": "", "dtype": "float32", "batch_tokens": 100, "compile": True}
    engine = PackedEngine(tiny_model, 50, Score.model_validate(settings), "cpu")
    seen: list[tuple[int, str]] = []

    def watched(_model: Any, batch: Any, _entropy: bool) -> Losses:
        seen.append((batch.ids.shape[1], eval_frame._stance.stance))
        return Losses(torch.zeros(batch.ids.shape))

    monkeypatch.setattr(packed, "batch_losses", watched)
    for tokens in (100, 80, 79, 32):
        engine.score([np.arange(length) for length in (tokens // 2, tokens - tokens // 2)])
    assert seen == [(100, "default"), (100, "default"), (79, "force_eager"), (32, "force_eager")]

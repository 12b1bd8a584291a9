"""Law 5: packed losses are the plain Hugging Face float32 forward's, window by window, for every family tested.

Tolerance: 1e-4 nats in float32 on CPU, for losses and for entropies.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForCausalLM

from schemas import attention
from schemas.batch import IGNORE, best_fit, collate
from schemas.config import Score
from schemas.forward import Opened
from schemas.loss import batch_losses, losses_of_logits, token_losses
from schemas.probe import has_linear_head

TOLERANCE_NATS = 1e-4
VOCABULARY, ROW = 120, 48
SHAPE = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.3,
         "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 1}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": SHAPE,
    "llama-tied": {**SHAPE, "tie_word_embeddings": True},
    "mistral": {**SHAPE, "sliding_window": 7},
    "qwen2": SHAPE,
    "qwen3": {**SHAPE, "head_dim": 8},
    "gpt2": {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64,
             "initializer_range": 0.3, "bos_token_id": 0, "eos_token_id": 1},
    "gpt_neox": {**SHAPE, "num_key_value_heads": 4},
    "gemma2": {**SHAPE, "head_dim": 8, "final_logit_softcapping": 2.0, "sliding_window": 7, "query_pre_attn_scalar": 8},
}  # fmt: skip
NOT_LINEAR = {"gemma2"}
NOT_SDPA = {"gemma2"}  # its soft-capped attention


def build(family: str) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(family.split("-")[0], **FAMILIES[family])
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(3.0)
    return model


def make_windows() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, VOCABULARY, size=length) for length in (48, 1, 17, 30, 2, 2, 5, 31, 9, 40, 3, 8, 1, 24)]


def settings(**fields: Any) -> Score:
    return Score.model_validate({"model": "", "output": "", "dtype": "float32", **fields})


@torch.no_grad()
def plain(model: Any, window: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Losses and entropies of one window by the model's own forward and PyTorch's own cross-entropy."""
    ids = torch.from_numpy(window)[None]
    logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
    losses = cross_entropy(logits, ids[0, 1:], reduction="none")
    return losses.numpy(), torch.special.entr(logits.softmax(1)).sum(1).numpy()


@torch.no_grad()
def shared_losses(model: Any, linear: bool, isolation: Any = "packed") -> list[tuple[np.ndarray, np.ndarray]]:
    windows = make_windows()
    lengths = [len(window) for window in windows]
    batch = collate(windows, best_fit(lengths, ROW), ROW)
    opened = Opened(module=model, linear=linear, isolation=isolation, compute=torch.float32)
    losses = batch_losses(opened, batch, entropy=True)
    assert losses.entropy is not None
    assert torch.equal(torch.isnan(losses.loss), batch.targets == IGNORE)
    both = (batch.gather(losses.loss), batch.gather(losses.entropy))
    return [(loss[1:], entropy[1:]) for loss, entropy in zip(*both, strict=True)]


@pytest.mark.parametrize("isolation", ["varlen", "packed"])
@pytest.mark.parametrize("family", FAMILIES)
def test_law_5_losses_and_entropies_in_shared_rows_are_the_plain_forwards_window_by_window(
    family: str, isolation: str
) -> None:
    model = build(family)
    linear = has_linear_head(model)
    assert linear is (family not in NOT_LINEAR)
    windows = make_windows()
    expected = [plain(model, window) for window in windows]
    if isolation == "varlen" and not attention.install(model):
        assert family in NOT_SDPA
        return
    spread = []
    for (losses, entropies), (expected_losses, expected_entropies) in zip(
        shared_losses(model, linear, isolation), expected, strict=True
    ):
        np.testing.assert_allclose(losses, expected_losses, atol=TOLERANCE_NATS, rtol=0)
        np.testing.assert_allclose(entropies, expected_entropies, atol=TOLERANCE_NATS, rtol=0)
        spread.append(losses)
    assert np.concatenate(spread).std() > 0.1  # a model whose losses are all alike would prove nothing


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_law_5_the_linear_head_and_the_finished_logits_give_the_same_losses(family: str) -> None:
    model = build(family)
    for (fast, fast_entropy), (slow, slow_entropy) in zip(
        shared_losses(model, True), shared_losses(model, False), strict=True
    ):
        np.testing.assert_allclose(fast, slow, atol=TOLERANCE_NATS, rtol=0)
        np.testing.assert_allclose(fast_entropy, slow_entropy, atol=TOLERANCE_NATS, rtol=0)


def test_law_5_the_engine_gives_the_plain_forwards_losses_whatever_the_batch(tiny_model: Any) -> None:
    from score_jobs.engines.packed import PackedEngine

    windows = make_windows()
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
    for batch_tokens in (1, 150, 10_000):
        engine = PackedEngine(tiny_model, ROW, settings(batch_tokens=batch_tokens, entropy=True), "cpu")
        for window, scored in zip(windows, engine.score(windows), strict=True):
            assert np.isnan(scored.loss[0]) and scored.entropy is not None and np.isnan(scored.entropy[0])
            expected_losses, expected_entropies = plain(model, window)
            np.testing.assert_allclose(scored.loss[1:], expected_losses, atol=TOLERANCE_NATS, rtol=0)
            np.testing.assert_allclose(scored.entropy[1:], expected_entropies, atol=TOLERANCE_NATS, rtol=0)


@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
def test_law_5_the_engine_loads_and_scores_families_of_another_build(family: str, tmp_path: Path) -> None:
    from score_jobs.engines.packed import PackedEngine

    model = build(family)
    model.save_pretrained(tmp_path)
    engine = PackedEngine(tmp_path, ROW, settings(batch_tokens=200), "cpu")
    for window, scored in zip(make_windows(), engine.score(make_windows()), strict=True):
        np.testing.assert_allclose(scored.loss[1:], plain(model, window)[0], atol=TOLERANCE_NATS, rtol=0)


def test_a_window_longer_than_the_models_positions_is_an_error_that_names_the_field(tiny_model: Any) -> None:
    from schemas.errors import UserError
    from score_jobs.engines.packed import PackedEngine

    with pytest.raises(UserError, match=r"context\.window: 513.*512"):
        PackedEngine(tiny_model, 513, settings(batch_tokens=1024), "cpu")


@pytest.mark.parametrize("cap", [2.0, 30.0])
def test_a_soft_capped_head_is_not_linear_even_where_the_cap_hardly_bites(cap: float) -> None:
    torch.manual_seed(0)
    shape = {**FAMILIES["gemma2"], "final_logit_softcapping": cap, "initializer_range": 0.02}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("gemma2", **shape))
    assert not has_linear_head(model)


def test_a_scaled_or_biased_head_is_not_linear() -> None:
    torch.manual_seed(0)
    scaled = AutoModelForCausalLM.from_config(AutoConfig.for_model("cohere", **{**SHAPE, "logit_scale": 0.0625}))
    assert not has_linear_head(scaled)
    biased = build("llama")
    biased.lm_head.bias = torch.nn.Parameter(torch.ones(VOCABULARY))
    assert not has_linear_head(biased)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_losses_are_float32_whatever_the_dtype_of_the_model_and_nan_where_nothing_is_predicted(dtype: Any) -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(3000, 16).to(dtype), torch.randn(50, 16).to(dtype)
    targets = torch.randint(0, 50, (3000,))
    targets[::7] = IGNORE
    found = token_losses(hidden, weight, targets, entropy=True)
    exact = losses_of_logits(hidden.double() @ weight.double().T, targets, entropy=True)
    kept = targets != IGNORE
    assert found.loss.dtype == torch.float32 and torch.equal(torch.isnan(found.loss), ~kept)
    for one, other in ((found.loss, exact.loss), (found.entropy, exact.entropy)):
        assert one is not None and other is not None
        torch.testing.assert_close(one[kept], other[kept], atol=TOLERANCE_NATS, rtol=0)

"""Completions: what plain greedy decoding of one prompt alone says, whatever lies beside it, cut where it should be."""

import os
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from pipeline.evaluation.generate import HuggingFace, Speller, Vllm, batches
from schemas.config import Context

PROMPTS = [
    "Let $x_1", "The sum of the first 12 odd numbers is", "Theorem", "漢字 7 と数学: naïve", "def f(n):\n    return n *",
    "Theorem 3. For every $\\varepsilon > 0$ there is $\\delta > 0$ with $|x - 3| <", "x",
]  # fmt: skip
NEW = 12


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_model)


@pytest.fixture(scope="module")
def alone(model: Any, tokenizer: Any) -> list[str]:
    """What transformers' own `generate` says to each prompt by itself."""
    texts = []
    for prompt in PROMPTS:
        ids = torch.tensor([[0, *tokenizer(prompt, add_special_tokens=False)["input_ids"]]])
        found = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False)
        texts.append(tokenizer.decode(found[0, ids.shape[1] :], skip_special_tokens=True))
    return texts


def generator(model: Any, tokenizer: Any, limit: int | None = None, batch_tokens: int = 10_000) -> HuggingFace:
    return HuggingFace(model, tokenizer, Context(bos=True), limit, batch_tokens)


@pytest.mark.parametrize("batch_tokens", [1, 60, 10_000])
def test_a_prompt_in_company_is_completed_as_plain_generate_completes_it_alone(
    model: Any, tokenizer: Any, alone: list[str], batch_tokens: int
) -> None:
    assert any(alone)
    assert generator(model, tokenizer, batch_tokens=batch_tokens).complete(PROMPTS, [], NEW) == alone


def test_a_completion_ends_before_the_first_stop_string_and_others_go_on(
    model: Any, tokenizer: Any, alone: list[str]
) -> None:
    marks = [alone[0][3:6], alone[3][5:7]]
    wanted = [
        text[: min([place for mark in marks if (place := text.find(mark)) >= 0] or [len(text)])] for text in alone
    ]
    assert wanted != alone
    assert generator(model, tokenizer).complete(PROMPTS, marks, NEW) == wanted


def test_generation_stops_when_every_row_has_said_a_stop_string(
    model: Any, tokenizer: Any, alone: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    forwards = []
    monkeypatch.setattr(model, "forward", lambda *a, _f=model.forward, **k: (forwards.append(1), _f(*a, **k))[1])
    generator(model, tokenizer).complete(PROMPTS[:1], [alone[0][1:2]], NEW)
    assert 0 < len(forwards) < NEW


def test_no_completion_goes_beyond_the_models_positions_and_none_is_cut_for_a_neighbours_sake(
    model: Any, tokenizer: Any
) -> None:
    lengths = [1 + len(tokenizer(prompt, add_special_tokens=False)["input_ids"]) for prompt in PROMPTS]
    limit = max(lengths)
    found = generator(model, tokenizer, limit).complete(PROMPTS, [], NEW)
    for prompt, text, length in zip(PROMPTS, found, lengths, strict=True):
        room = min(NEW, limit - length)
        assert text == (generator(model, tokenizer).complete([prompt], [], room)[0] if room else "")


def test_what_a_models_own_generation_config_asks_for_does_not_bend_greedy_decoding(
    model: Any, tokenizer: Any, alone: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {
        "repetition_penalty": 9.0,
        "do_sample": True,
        "num_beams": 3,
        "no_repeat_ngram_size": 1,
    }.items():
        monkeypatch.setattr(model.generation_config, name, value)
    assert generator(model, tokenizer).complete(PROMPTS, [], NEW) == alone


def test_a_completion_ends_where_the_model_says_so_also_by_another_token_than_the_tokenizers(
    model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = generator(model, tokenizer)
    ids = plain.speller.ids(PROMPTS[1])
    said = plain._continue([ids], [], NEW)[0]
    monkeypatch.setattr(model.generation_config, "eos_token_id", [said[4], tokenizer.eos_token_id])
    ended = said[: said.index(said[4])]
    assert generator(model, tokenizer).complete([PROMPTS[1]], [], NEW) == [tokenizer.decode(ended)]


def test_a_tokenizer_that_drops_a_leading_space_keeps_it_after_a_prompt(tokenizer: Any) -> None:
    words = Tokenizer(models.WordLevel({"▁Answer:": 0, "▁7": 1, "?": 2}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Metaspace()
    words.decoder = decoders.Metaspace()  # as SentencePiece's: no space before the first word
    speller = Speller(PreTrainedTokenizerFast(tokenizer_object=words), False, set())
    assert speller.tokenizer.decode([1]) == "7"
    assert speller.text(speller.ids("Answer:"), [1], []) == " 7"


def test_vllm_completes_as_hugging_face_does(tokenizer: Any, tmp_path: Path) -> None:
    pytest.importorskip("vllm", reason="vllm is not installed: `make test-vllm`")
    torch.manual_seed(0)
    shape = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    names = {"vocab_size": 512, "initializer_range": 0.2, "bos_token_id": 0, "eos_token_id": tokenizer.eos_token_id}
    model = LlamaForCausalLM(LlamaConfig(max_position_embeddings=32, **names, **shape)).eval()
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path)
    with patch.dict(os.environ):
        vllm = Vllm(tmp_path, tokenizer, Context(bos=True))
        for stop in ([], ["e"], ["12", "\n"]):
            wanted = generator(model, tokenizer, 32).complete(PROMPTS, stop, NEW)
            assert vllm.complete(PROMPTS, stop, NEW) == wanted
    assert any(wanted)


@given(
    st.lists(st.integers(0, 50), max_size=30), st.integers(1, 20), st.none() | st.integers(1, 60), st.integers(1, 200)
)
def test_batches_hold_each_prompt_that_has_room_once_with_its_own_room_and_within_the_tokens_allowed(
    lengths: list[int], new_tokens: int, limit: int | None, batch_tokens: int
) -> None:
    seen = []
    for members, room in batches(lengths, new_tokens, limit, batch_tokens):
        seen += members
        assert all(room == min(new_tokens, (limit or 10**9) - lengths[member]) for member in members)
        assert len(members) == 1 or len(members) * (max(lengths[member] for member in members) + room) <= batch_tokens
    assert sorted(seen) == [n for n, length in enumerate(lengths) if length and (limit is None or length < limit)]

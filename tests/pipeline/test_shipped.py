"""Shipped configs go through every check of scoring and training on stand-ins of their models' shapes; weak to strong runs."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, MistralConfig, PreTrainedConfig

from pipeline.forecast import forecast
from pipeline.train import train_live
from schemas.config import Config, load_config
from schemas.errors import UserError
from schemas.fingerprint import model_fingerprint
from schemas.receipt import Layout, read_dataset
from score_jobs.estimate import estimate
from trainer.metrics import read_metrics

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
TINYLLAMA = LlamaConfig(vocab_size=32_000, hidden_size=2048, intermediate_size=5632, num_hidden_layers=22,
                        num_attention_heads=32, num_key_value_heads=4, max_position_embeddings=2048)  # fmt: skip
LLAMA_7B = LlamaConfig(vocab_size=32_000, hidden_size=4096, intermediate_size=11_008, num_hidden_layers=32,
                       num_attention_heads=32, max_position_embeddings=4096)  # fmt: skip
MISTRAL = MistralConfig(vocab_size=32_000, hidden_size=4096, intermediate_size=14_336, num_hidden_layers=32,
                        num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=32_768)  # fmt: skip
SHAPES = {
    "openwebmath-1b": (TINYLLAMA, 1_100_048_384),
    "openwebmath-7b": (MISTRAL, 7_241_732_096),
    "general-1b": (TINYLLAMA, 1_100_048_384),
    "openwebmath-70b-reference": (TINYLLAMA, 1_100_048_384),
    "weak-to-strong-7b": (LLAMA_7B, 6_738_415_616),
}


def stand_in(folder: Path, shape: PreTrainedConfig, tokenizer: Path) -> Path:
    """A model's folder as checks see it: its shape, the tests' tokenizer, and a file in the place of its weights."""
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
    shape.save_pretrained(folder)
    save_file({"nothing": torch.zeros(1)}, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def scored(
    make_config: Callable[..., Config], score_here: Any, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[int], Path]:
    """`scored(window)`: scores of a small corpus, made with windows as long as a real model's."""
    made: dict[int, Path] = {}

    def score(window: int) -> Path:
        if window not in made:
            folder = tmp_path_factory.mktemp(f"scored-{window}")
            model = folder / "model"
            shutil.copytree(tiny_model, model)
            shape = json.loads((model / "config.json").read_text())
            (model / "config.json").write_text(json.dumps(shape | {"max_position_embeddings": window}))
            fields = {"context": {"window": window}, "score.model": str(model), "score.batch_tokens": window}
            made[window] = score_here(make_config(folder, fields)).score.output
        return made[window]

    return score


def test_every_shipped_config_has_a_shape_here() -> None:
    assert {path.stem for path in CONFIGS.glob("*.yaml")} - {"demo", "finetune-demo"} == SHAPES.keys()


@pytest.mark.parametrize("name", SHAPES)
def test_a_shipped_config_passes_the_dry_runs_of_scoring_and_of_training(
    name: str, scored: Any, tiny_model: Path, corpus_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape, parameters = SHAPES[name]
    monkeypatch.chdir(tmp_path)  # outputs are relative to where the command is typed
    fields: dict[str, Any] = {"base": str(stand_in(tmp_path / "base", shape, tiny_model)), "corpus.dataset": None}
    fields |= {"corpus.paths": [str(corpus_folder / "part-*")]}
    reference = load_config(CONFIGS / f"{name}.yaml", fields).score.model
    if "70b" in name:
        with pytest.raises(UserError, match="make vllm"):  # the one package that this environment lacks
            estimate(load_config(CONFIGS / f"{name}.yaml", fields | {"score.model": fields["base"]}), rate=False)
    else:
        stand_in(tmp_path / reference, shape, tiny_model)
        found = estimate(load_config(CONFIGS / f"{name}.yaml", fields), rate=False)
        assert found.documents > 90 and found.tokens.value > 1000 and not found.broken and found.gpus == 8
    config = load_config(CONFIGS / f"{name}.yaml", fields)
    for place in (place for part in config.parts for place in part.scores):
        shutil.copytree(scored(config.context.window), str(place))
    plan = forecast(config, 8)
    assert plan["parameters"] == parameters and plan["ranks"] == 8
    assert plan["steps"] == round((config.train.tokens or 0) / 2**20)
    assert plan["rows_per_step"] * config.context.window == plan["tokens_per_step"] == 2**20
    assert not config.train.output.exists()


def test_weak_to_strong_a_smaller_reference_chooses_for_a_larger_live_model(
    scores: Config, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    strong = tmp_path / "strong"
    shape = json.loads((tiny_model / "config.json").read_text())
    larger = LlamaConfig(
        **shape | {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "head_dim": 16}
    )
    torch.manual_seed(1)
    LlamaForCausalLM(larger).save_pretrained(strong)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(strong)
    monkeypatch.chdir(tmp_path)
    fields = {"base": str(strong), "context.window": 64, "score.output": str(scores.score.output), "train.tokens": 1536,
              "train.tokens_per_step": 512, "train.micro_rows": 2, "train.dtype": "float32"}  # fmt: skip
    config = load_config(CONFIGS / "weak-to-strong-7b.yaml", fields)
    assert read_dataset(Layout(config.score.output))["model"] != model_fingerprint(strong)
    final = train_live(config)
    rows = [row for row in read_metrics(final.parent / "metrics.jsonl") if row["kind"] == "train"]
    assert len(rows) == 3 and all(row["keep"] == pytest.approx(0.7, abs=0.01) for row in rows)
    # Ranked by live loss minus the small model's: what is kept lies further above the reference than what is dropped.
    assert all(row["threshold"] is not None and row["loss_kept"] > row["loss_dropped"] for row in rows)
    made = json.loads((final / "config.json").read_text())
    assert (made["hidden_size"], made["num_hidden_layers"]) == (64, 3)

"""The demo's own part: a base model from nothing, then the same verbs that everyone else calls."""

from functools import partial
from pathlib import Path

import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from pipeline.tokens import tokenised
from pipeline.train import TOKENS, run_training
from schemas.config import Config, Corpus, Train
from schemas.errors import UserError
from schemas.models import open_tokenizer
from score_jobs.corpus import Document, corpus_documents

VOCABULARY, LAYERS = 2048, 4


def corpus_folder(config: Config) -> Path:
    """Where made data lie. Raises UserError for a config whose corpus is somebody's own."""
    folder = config.root / "data"
    if any(folder not in Path(path).parents for path in config.corpus.paths or ["elsewhere"]):
        raise UserError(f"corpus.paths: not below {folder}, so this is not a demo's config", "use configs/demo.yaml")
    return folder


def data_folder(config: Config) -> Path:
    """Where the demo's data lie. Raises UserError for a config whose corpus or base is somebody's own."""
    folder = corpus_folder(config)
    if Path(config.base) != config.root / "base" / "final":
        raise UserError(
            f"base: `{config.base}` is not {config.root}/base/final, so this is not a demo's config",
            "use configs/demo.yaml",
        )
    return folder


def make_base(config: Config) -> Path:
    """A Llama of 1.1M parameters trained on pages that are not in the corpus, which stands for TinyLlama; where
    `demo.small_layers` asks for it a smaller one before, with the same tokenizer, for a reference weaker than the live model.
    """
    if config.demo.small_layers:
        train_base(config, config.root / "small", config.demo.small_layers)
    return train_base(config, config.root / "base", LAYERS)


def train_base(config: Config, output: Path, layers: int) -> Path:
    """A base from nothing; returns its folder."""
    pages = Corpus(paths=[str(data_folder(config) / "base" / "*.jsonl.zst")])
    start = output / "init"
    if not (start / "model.safetensors").exists():
        make_tokenizer([pages, config.corpus], start)
        torch.manual_seed(config.train.seed)
        LlamaForCausalLM(model_shape(config.context.window, layers)).save_pretrained(start)
    settings = Train(
        output=output,
        seed=config.train.seed,
        epochs=config.demo.base_epochs,
        tokens_per_step=2048,
        micro_rows=8,
        learning_rate=5e-3,
        dtype="bfloat16",
        checkpoint_every=10_000,
    )
    tokenizer = open_tokenizer(start, "base")
    tokens = partial(tokenised, pages, tokenizer, config.context, output / TOKENS)
    return run_training(f"train {output.name}", config, settings, start, tokens, tokenizer)


def model_shape(window: int, layers: int) -> LlamaConfig:
    """The demo's architecture; 1.1M parameters with 4 layers."""
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=max(512, window),
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
    )


def make_tokenizer(corpora: list[Corpus], folder: Path) -> None:
    """Train a byte-level BPE on the demo's text and save it as a Hugging Face tokenizer."""
    texts = [row.text for corpus in corpora for row in corpus_documents(corpus) if isinstance(row, Document)]
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(texts, vocab_size=VOCABULARY, special_tokens=["<s>", "</s>"], show_progress=False)
    fast = PreTrainedTokenizerFast(tokenizer_object=trained._tokenizer, bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(folder)

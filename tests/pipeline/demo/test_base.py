"""The demo's base models."""

from pathlib import Path

import pytest
from transformers import AutoConfig

from pipeline.demo.base import data_folder, make_base
from pipeline.demo.data import build
from schemas.config import load_config
from schemas.fingerprint import tokenizer_fingerprint
from schemas.models import open_tokenizer

DEMO = Path(__file__).resolve().parents[3] / "configs" / "demo.yaml"


@pytest.mark.parametrize("small", [None, 1])
def test_a_small_base_has_the_layers_asked_for_and_the_tokenizer_of_the_other(
    tmp_path: Path, small: int | None
) -> None:
    config = load_config(DEMO, {"root": str(tmp_path), "demo.small_layers": small, "demo.base_epochs": 0.1})
    build(data_folder(config), seed=0, scale=0.02, sizes=config.demo)
    make_base(config)
    finals = {path.parent.name: path for path in tmp_path.glob("*/final")}
    layers = {name: AutoConfig.from_pretrained(path).num_hidden_layers for name, path in finals.items()}
    assert layers == ({"base": 4} if small is None else {"base": 4, "small": 1})
    prints = [tokenizer_fingerprint(open_tokenizer(path, name)) for name, path in finals.items()]
    assert prints == prints[:1] * len(finals)

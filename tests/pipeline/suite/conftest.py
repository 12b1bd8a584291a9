"""A folder of data sets as `--data` takes it, from rows of our own, and a tiny model with room for long prompts."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

ROWS = Path(__file__).parent / "rows"
AGIEVAL = ("aqua-rat", "gaokao-english", "logiqa-en", "lsat-ar", "lsat-lr", "lsat-rc", "math", "sat-math")


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of every data set of the suites, in the data sets' own columns."""
    folder = tmp_path_factory.mktemp("data") / "hub"
    shutil.copytree(ROWS, folder)
    for name in (*AGIEVAL, "sat-en", "sat-en-without-passage"):
        shutil.copytree(ROWS / "hails" / "agieval", folder / "hails" / f"agieval-{name}")
    return folder


@pytest.fixture(scope="session")
def long_model(corpus_tools: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tests' tiny model with 8,192 positions."""
    build: Callable[[Path], Path] = corpus_tools.build_tiny_model
    folder = build(tmp_path_factory.mktemp("long"))
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"max_position_embeddings": 8192}))
    return folder


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """What `datasets` makes of rows stays out of the user's cache."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))

"""`init` writes a config that works for a corpus and a model of one's own, or says which answer cannot."""

import shutil
from pathlib import Path

import pytest

from pipeline.init import write_config
from schemas.config import load_config
from schemas.errors import UserError


def answers(tiny_model: Path, corpus_folder: Path, **changes: object) -> dict[str, object]:
    given = {
        "name": "mine",
        "base": str(tiny_model),
        "corpus": [str(corpus_folder / "part-0*"), str(corpus_folder / "part-3.parquet")],
        "curated": [str(corpus_folder / "part-1.jsonl.gz")],
        "reference": None,
        "text": "text",
    }
    return given | changes


def test_the_written_config_fits_the_model_and_the_corpus(
    tiny_model: Path, corpus_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    path = tmp_path / "mine.yaml"
    write_config(path, **answers(tiny_model, corpus_folder))  # type: ignore[arg-type]
    config = load_config(path)
    assert config.context.window == 512 and config.context.bos and config.context.eos  # the tiny model's positions
    assert config.score.model == "runs/mine/reference/final" and str(config.score.output) == "runs/mine/scores"
    assert config.reference and config.reference.corpus.paths == [str(corpus_folder / "part-1.jsonl.gz")]
    assert len(path.read_text().splitlines()) <= 20
    shown = capsys.readouterr().out.replace("\n", " ")
    assert "documents can be used" in shown and f"tokensift reference -c {path}" in shown


def test_a_finished_reference_takes_the_place_of_curated_files(
    tiny_model: Path, corpus_folder: Path, tmp_path: Path
) -> None:
    path = tmp_path / "mine.yaml"
    write_config(path, **answers(tiny_model, corpus_folder, curated=[], reference=str(tiny_model)))  # type: ignore[arg-type]
    config = load_config(path)
    assert config.reference is None and config.score.model == str(tiny_model)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"reference": "also"}, "one of the two"),
        ({"curated": []}, "one of the two"),
        ({"base": "./nowhere"}, "--base"),
        ({"corpus": ["nowhere/*.jsonl"]}, "nowhere"),
        ({"text": "body"}, "body"),
    ],
)
def test_an_answer_that_cannot_work_is_named_and_nothing_is_written(
    tiny_model: Path, corpus_folder: Path, tmp_path: Path, changes: dict[str, object], word: str
) -> None:
    path = tmp_path / "mine.yaml"
    with pytest.raises(UserError, match=word):
        write_config(path, **answers(tiny_model, corpus_folder, **changes))  # type: ignore[arg-type]
    assert not path.exists()


def test_a_config_that_is_there_is_never_overwritten(tiny_model: Path, corpus_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("precious")
    with pytest.raises(UserError, match="is there already"):
        write_config(path, **answers(tiny_model, corpus_folder))  # type: ignore[arg-type]
    assert path.read_text() == "precious"


def test_a_model_without_special_tokens_gets_a_context_without_them(
    tiny_model: Path, corpus_folder: Path, tmp_path: Path
) -> None:
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    config = (model / "tokenizer_config.json").read_text()
    (model / "tokenizer_config.json").write_text(config.replace('"bos_token": "<s>"', '"bos_token": null'))
    path = tmp_path / "mine.yaml"
    write_config(path, **answers(model, corpus_folder))  # type: ignore[arg-type]
    assert load_config(path).context.bos is False

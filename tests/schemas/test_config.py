"""Config errors name the file and the field."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from schemas.config import MOST_VALUES, Corpus, Train, load_config, parse_yaml
from schemas.errors import UserError


def test_a_config_that_is_written_is_read_back_the_same(
    make_config: Callable, write_config: Callable, tmp_path: Path
) -> None:
    config = make_config(tmp_path)
    assert load_config(write_config(config, tmp_path / "c.yaml")) == config


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("train.keep", 1.5),
        ("train.kep", 0.5),
        ("score.dtype", "float16"),
        ("context.window", 1),
        ("score.workers", "many"),
        ("corpus.dataset", "both/given"),
        ("train.tokens", 100),
    ],
)
def test_a_wrong_field_is_named_together_with_its_file(
    make_config: Callable, write_config: Callable, tmp_path: Path, field: str, value: Any
) -> None:
    path = write_config(make_config(tmp_path), tmp_path / "mine.yaml")
    with pytest.raises(UserError) as caught:
        load_config(path, {field: value})
    message = str(caught.value)
    named = field.rpartition(".")[0] if field in ("corpus.dataset", "train.tokens") else field
    assert str(path) in message and f"`{named}`" in message


MIXED = [{"scores": "one/scores", "weight": 3}, {"scores": ["two/scores", "three/scores"], "weight": 1}]


def test_scores_are_one_path_several_references_or_a_mixture_of_both(
    make_config: Callable, write_config: Callable, tmp_path: Path
) -> None:
    path = write_config(make_config(tmp_path), tmp_path / "c.yaml")
    assert load_config(path).train.scores == []
    assert load_config(path, {"train.scores": "one/scores"}).train.scores == [Path("one/scores")]
    mixture = load_config(path, {"train.mixture": MIXED}).train.mixture
    assert [part.weight for part in mixture] == [3, 1]
    assert [part.scores for part in mixture] == [[Path("one/scores")], [Path("two/scores"), Path("three/scores")]]


REFERENCE = {"corpus": {"paths": ["a"]}, "train": {"epochs": 1, "scores": ["one/scores"]}}
WRONG_DATA = {
    "give either `scores` or `mixture`": {"train.scores": ["a"], "train.mixture": MIXED},
    "a reference trains on its `corpus`": {"reference": REFERENCE},
    "train.mixture.0.weight": {"train.mixture": [{"scores": ["a"], "weight": 0}]},
    "train.mixture.0.scores": {"train.mixture": [{"scores": [], "weight": 1}]},
    "`skip` must be ranges": {"train.skip": [[5, 3]]},
    "ascending order": {"train.skip": [[5, 9], [2, 4]]},
    "none empty": {"train.skip": [[5, 5]]},
    "into another": {"train.skip": [[5, 9], [8, 12]]},
}


@pytest.mark.parametrize("message", WRONG_DATA)
def test_data_that_contradict_themselves_are_refused(
    make_config: Callable, write_config: Callable, tmp_path: Path, message: str
) -> None:
    path = write_config(make_config(tmp_path), tmp_path / "c.yaml")
    with pytest.raises(UserError, match=message.replace(".", r"\.")):
        load_config(path, WRONG_DATA[message])


def test_overrides_reach_nested_fields(make_config: Callable, write_config: Callable, tmp_path: Path) -> None:
    path = write_config(make_config(tmp_path), tmp_path / "c.yaml")
    assert load_config(path, {"train.keep": 0.7}).train.keep == 0.7


@pytest.mark.parametrize("content", [None, "a: [", "- just\n- a list\n", ""])
def test_a_file_that_is_no_config_is_the_users_error_and_is_named(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "mine.yaml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=r"mine\.yaml"):
        load_config(path)


MINIMAL = {
    "name": "mine",
    "base": "b",
    "corpus": {"paths": ["{root}/a.jsonl", "b.jsonl"]},
    "score": {"model": "{root}/reference/final"},
    "train": {"epochs": 1},
}


def written(path: Path, **fields: Any) -> Path:
    path.write_text(yaml.safe_dump(MINIMAL | fields), encoding="utf-8")
    return path


def refusal(path: Path, overrides: dict[str, Any] | None = None) -> tuple[str, str]:
    with pytest.raises(UserError) as caught:
        load_config(path, overrides)
    return caught.value.problem, caught.value.fix


def test_all_that_an_experiment_makes_lies_below_its_root(tmp_path: Path) -> None:
    path = written(tmp_path / "c.yaml", reference={"corpus": {"paths": ["{root}/good"]}, "train": {"epochs": 3}})
    for root, overrides in (("runs/mine", {}), ("elsewhere", {"root": "elsewhere"})):
        config = load_config(path, overrides)
        assert config.root == Path(root)
        assert config.score.output == Path(root, "scores") and config.train.output == Path(root, "train")
        assert config.corpus.paths == [f"{root}/a.jsonl", "b.jsonl"]
        assert config.score.model == f"{root}/reference/final"
        assert config.reference is not None and config.reference.corpus.paths == [f"{root}/good"]
        assert config.reference.train.output == Path(root, "reference")


def test_an_output_that_is_given_is_kept(tmp_path: Path) -> None:
    path = written(tmp_path / "c.yaml")
    config = load_config(path, {"score.output": "s", "train.output": "{root}/t", "train.run": None})
    assert (config.score.output, config.train.output) == (Path("s"), Path("runs/mine/t"))


def test_a_config_is_read_as_utf_8_and_anything_else_is_the_users_error(tmp_path: Path) -> None:
    path = written(tmp_path / "c.yaml", base="modèle")
    assert load_config(path).base == "modèle"
    path.write_bytes(path.read_text(encoding="utf-8").replace("mine", "mïne").encode("latin-1"))
    problem, fix = refusal(path)
    assert problem.startswith(f"{path}: 'utf-8' codec can't decode") and "\n" not in problem
    assert fix == "mend it; `tokensift init` writes one that works"


def test_what_is_wrong_with_a_file_is_said_with_the_way_on(tmp_path: Path) -> None:
    missing = tmp_path / "none.yaml"
    assert refusal(missing) == (f"{missing}: cannot be read (No such file or directory)", "give a config with --config")
    path = tmp_path / "c.yaml"
    path.write_text("a: [\n")
    problem, fix = refusal(path)
    assert problem.startswith(f"{path}: is not valid YAML: while parsing") and "  " not in problem
    assert fix == "mend it; `tokensift init` writes one that works"
    path.write_text("- a\n")
    assert refusal(path) == (f"{path}: must be a mapping of fields", "write it as in configs/demo.yaml")


def test_every_wrong_field_is_named_at_once(tmp_path: Path) -> None:
    path = written(tmp_path / "c.yaml", train={"epochs": 1, "tokens": 5}, score={"model": "m", "workers": 0})
    problem, fix = refusal(path)
    assert problem == (
        f"{path}: field `score.workers`: Input should be greater than or equal to 1;"
        " field `train`: give either `epochs` or `tokens`"
    )
    assert fix == "see configs/ for examples"
    assert "field `name`: Input should be a valid string" in refusal(path, {"name": None})[0]


@pytest.mark.parametrize("root", [5, ["a"], {"a": 1}])
def test_a_root_that_is_no_path_is_named(tmp_path: Path, root: Any) -> None:
    assert "field `root`" in refusal(written(tmp_path / "c.yaml"), {"root": root})[0]


@pytest.mark.parametrize("section", ["score", "train", "reference"])
def test_a_section_that_is_no_mapping_is_named(tmp_path: Path, section: str) -> None:
    assert f"field `{section}`" in refusal(written(tmp_path / "c.yaml"), {section: 3})[0]


def test_an_override_makes_the_sections_above_it_and_refuses_to_go_below_a_value(tmp_path: Path) -> None:
    path = written(tmp_path / "c.yaml", eval=None)
    assert load_config(path, {"eval.target": "t", "context.window": 9}).eval.target == Path("t")
    assert refusal(path, {"base.x.y": 1}) == (
        "--set base.x.y: `base` holds 'b', which has no fields",
        "override `base`",
    )


def test_yaml_is_one_value_of_sane_size() -> None:
    assert parse_yaml("{a: [1, x], b: null}") == {"a": [1, "x"], "b": None}
    assert parse_yaml("2026-01-01T00:00:00Z") is not None
    most = MOST_VALUES - 1  # the list itself counts
    assert len(parse_yaml(f"[{'1,' * most}]")) == most
    assert len(parse_yaml(f"{{{','.join(f'{n}: 1' for n in range(most))}}}")) == most
    for text, message in (
        (f"[{'1,' * (most + 1)}]", f"holds more than {MOST_VALUES} values, or itself"),
        ("&a [*a]", f"holds more than {MOST_VALUES} values, or itself"),
        ("&a {b: *a}", f"holds more than {MOST_VALUES} values, or itself"),
        ("[" * 5000, "is nested too deeply"),
    ):
        with pytest.raises(ValueError) as caught:
            parse_yaml(text)
        assert str(caught.value) == message
    with pytest.raises(
        ValueError, match=r"^is not valid YAML: while parsing a flow node expected .* line 3, column 1: \^$"
    ):
        parse_yaml("a: [\n\n")


def test_a_corpus_has_one_origin_and_a_run_one_length() -> None:
    for fields in ({}, {"paths": ["a"], "dataset": "b"}):
        with pytest.raises(ValueError, match="give either `paths` or `dataset`"):
            Corpus(**fields)
    for fields in ({}, {"epochs": 1, "tokens": 1}):
        with pytest.raises(ValueError, match="give either `epochs` or `tokens`"):
            Train(output=Path("x"), **fields)
    assert Train(output=Path("x"), tokens=1).folder == Path("x/clm")
    assert Train(output=Path("x"), tokens=1, run="r").folder == Path("x/r")

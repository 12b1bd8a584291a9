"""Law 15: whatever a user types or writes, the answer is one message and exit status 0, 1 or 2: never a traceback."""

import errno
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline import cli
from pipeline.failure import FIXES, as_user_error, explain
from schemas.config import Config, load_config
from schemas.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
DEMO: dict[str, Any] = yaml.safe_load((ROOT / "configs" / "demo.yaml").read_text())
# `make test` feeds a tenth of what the slow test does, and other inputs each time only there.
QUICK = settings(max_examples=400, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
LONG = settings(max_examples=4000, deadline=None, suppress_health_check=list(HealthCheck))


def dotted_fields(values: dict[str, Any], before: str = "") -> list[str]:
    found = []
    for key, value in values.items():
        found += [before + key] + (dotted_fields(value, f"{before}{key}.") if isinstance(value, dict) else [])
    return found


def fields_of_the_model(model: Any, before: str = "") -> list[str]:
    found = []
    for name, field in model.model_fields.items():
        inner = [
            part
            for part in (field.annotation, *getattr(field.annotation, "__args__", ()))
            if hasattr(part, "model_fields")
        ]
        found += [before + name, *(line for part in inner for line in fields_of_the_model(part, f"{before}{name}."))]
    return found


FIELDS = sorted({*dotted_fields(DEMO), *fields_of_the_model(Config)})
NASTY = st.sampled_from(
    ["", "[/]", "[bold", "[red]x[/blue]", "{root}", "{root", "\x1b[2J", "\x00", "../../x", "/", "~", "s3://b/x.parquet", "x://y.jsonl",
     "http://127.0.0.1:1/x.jsonl", "é漢", "a" * 5000, "null", "nan", "-1", "1e999", "0x10", "2024-13-45", "!!python/object:os.system x"]
)  # fmt: skip
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**30), 10**30),
    st.integers(-2, 3),
    st.floats(),
    st.text(max_size=8),
    NASTY,
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.one_of(st.text(max_size=5), st.integers()), inner, max_size=3)),
    max_leaves=6,
)  # fmt: skip
CHANGES = st.lists(st.tuples(st.sampled_from(FIELDS), VALUES), min_size=1, max_size=4)
YAML_TEXTS = st.one_of(
    st.text("{}[]:,-&*!|>'\"#%@` \n\tabc019.~", max_size=30), NASTY, VALUES.map(lambda value: yaml.dump(value))
)


def changed(changes: list[tuple[str, Any]]) -> dict[str, Any]:
    raw = yaml.safe_load(yaml.safe_dump(DEMO))
    for dotted, value in changes:
        *parents, leaf = dotted.split(".")
        node = raw
        for parent in parents:
            node = node.setdefault(parent, {}) if isinstance(node, dict) else {}
        if isinstance(node, dict):
            node[leaf] = value
    return raw


def config_or_user_error(work: Callable[[], Config]) -> None:
    try:
        assert isinstance(work(), Config)
    except UserError as error:
        assert error.problem and error.fix


def feed(profile: settings, folder: Path) -> None:
    """Configs with changed values, damaged and random files, and overrides: `profile.max_examples` of each."""
    path, demo = folder / "config.yaml", ROOT / "configs" / "demo.yaml"
    good = demo.read_bytes()

    @profile
    @given(CHANGES)
    def values(changes: list[tuple[str, Any]]) -> None:
        path.write_text(yaml.dump(changed(changes)))
        config_or_user_error(lambda: load_config(path))

    @profile
    @given(st.integers(0, len(good)), st.binary(max_size=3), st.one_of(st.none(), st.binary(max_size=40), YAML_TEXTS))
    def files(at: int, new: bytes, whole: bytes | str | None) -> None:
        content = good[:at] + new + good[at + 1 :] if whole is None else whole
        path.write_bytes(content.encode(errors="replace") if isinstance(content, str) else content)
        config_or_user_error(lambda: load_config(path))

    names = st.one_of(st.sampled_from(FIELDS), st.text(".=abc", max_size=6))

    @profile
    @given(st.lists(st.tuples(names, YAML_TEXTS), min_size=1, max_size=3))
    def overrides(items: list[tuple[str, str]]) -> None:
        config_or_user_error(lambda: cli.read_config(demo, [f"{field}={text}" for field, text in items]))

    values()
    files()
    overrides()


def test_any_config_and_any_override_is_a_config_or_one_error_with_a_fix(tmp_path: Path) -> None:
    feed(QUICK, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_ten_thousand_configs_and_overrides(tmp_path: Path) -> None:
    feed(LONG, tmp_path)


@pytest.mark.parametrize(
    "text",
    ["&a [*a]", "a: &a {b: *a}", "[" * 5000, "{a: " * 2000, "x: !!binary '%'", "? [a]\n: b", "- - " * 3000,
     "a: &a [x,x]\nb: &b [*a,*a]\nc: &c [*b,*b]\n" + "".join(f"k{i}: &k{i} [*{'c' if not i else f'k{i-1}'},*{'c' if not i else f'k{i-1}'}]\n" for i in range(40))],
)  # fmt: skip
def test_yaml_that_is_deep_endless_or_a_bomb_is_one_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(UserError, match=r"x\.yaml"):
        load_config(tmp_path / "x.yaml")


def test_the_root_stands_wherever_it_is_written_and_moves_every_output(tmp_path: Path) -> None:
    moved = cli.read_config(ROOT / "configs" / "demo.yaml", ["root=elsewhere"])
    assert {str(moved.score.output), str(moved.train.output), moved.base, moved.score.model} == {
        "elsewhere/scores", "elsewhere/train", "elsewhere/base/final", "elsewhere/reference/final"
    }  # fmt: skip
    assert moved.reference and str(moved.reference.train.output) == "elsewhere/reference"
    assert all("elsewhere" in path for path in [*moved.corpus.paths, str(moved.eval.target)])
    own = cli.read_config(ROOT / "configs" / "demo.yaml", ["score.output=shared/scores", "train.run=best"])
    assert str(own.score.output) == "shared/scores" and str(own.train.folder) == "runs/demo/train/best"


@pytest.mark.parametrize("run", ["..", "a/b", "", "-x", ".hidden", "a" * 101])
def test_a_runs_name_leads_nowhere_else(run: str) -> None:
    with pytest.raises(UserError, match=r"train\.run"):
        cli.read_config(ROOT / "configs" / "demo.yaml", None, run=run)


CONFIG_VERBS = ("score", "train", "eval", "reference", "report", "demo", "data", "base")
PATHS = st.one_of(
    st.sampled_from(["demo", "good.yaml", "file", "folder", "empty.parquet", "scores", "missing/x"]), NASTY
)
SETTINGS = st.one_of(
    st.tuples(st.sampled_from(FIELDS), YAML_TEXTS).map("=".join),
    st.sampled_from(["root=file", "base=folder", "score.model=folder", "score.model=file", "corpus.paths=[folder]",
                     "corpus.paths=[file]", "corpus.paths=[empty.parquet]", "score.output=file", "train.output=file/x",
                     "score.output=scores", "eval.target=folder", "reference.corpus.paths=[s3://bucket/x.jsonl]"]),
    NASTY,
)  # fmt: skip
OPTIONS = st.lists(st.one_of(st.tuples(st.just("-s"), SETTINGS), st.tuples(st.just("-c"), PATHS)), max_size=3)
ENDS = st.sampled_from(
    [(), (), ("--objective", "slm"), ("--objective", "[/]"), ("--run", "../x"), ("--help",), ("-3",)]
)
# Every config is broken somewhere, so that no verb begins its real work: the corpus, `base` and `score.model` are missing.
BROKEN = ("-s", "base=./no", "-s", "score.model=./no", "-s", "corpus.paths=[missing/x.jsonl]")


def command(*parts: Any) -> list[str]:
    """Words of nested tuples and lists, in order."""
    return [word for part in parts for word in ([part] if isinstance(part, str) else command(*part))]


COMMANDS = st.one_of(
    st.builds(command, st.sampled_from(CONFIG_VERBS), OPTIONS, st.just(BROKEN)),
    st.builds(command, st.sampled_from(CONFIG_VERBS), st.just(BROKEN), OPTIONS, ENDS),
    st.builds(command, st.just("inspect"), PATHS, st.one_of(st.just(()), st.tuples(st.just("--tokenizer"), PATHS))),
    st.builds(command, st.just("verify"), PATHS),
    st.builds(command, st.just(("init", "--base")), PATHS, st.just("--corpus"), PATHS, st.just("--curated"), PATHS),
    st.lists(st.one_of(NASTY, st.sampled_from(["nonsense", "--version", "-c", "inspect", "--documents", "-3"])), max_size=4),
)  # fmt: skip


def run_command(arguments: list[str], capsys: pytest.CaptureFixture) -> tuple[int, str]:
    old = sys.argv
    sys.argv = ["tokensift", *arguments]
    try:
        cli.main()
        status = 0
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else int(bool(error.code))
    finally:
        sys.argv = old
    shown = capsys.readouterr()
    return status, shown.out + shown.err


def command_lines(count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("no folder")
    (tmp_path / "folder").mkdir()
    (tmp_path / "empty.parquet").write_bytes(b"")
    (tmp_path / "scores" / "receipts").mkdir(parents=True)
    (tmp_path / "scores" / "dataset.json").write_text("{}")
    (tmp_path / "good.yaml").write_text(yaml.safe_dump(DEMO))

    @settings(max_examples=count, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(COMMANDS)
    def check(words: list[str]) -> None:
        status, shown = run_command(words, capsys)
        assert status in (0, 1, 2), (words, shown)
        assert "Traceback" not in shown and "not foreseen" not in shown, (words, shown)
        assert "\x1b[2J" not in shown

    check()


def test_any_command_line_ends_in_a_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    command_lines(150, tmp_path, monkeypatch, capsys)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_thousands_of_command_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    command_lines(3000, tmp_path, monkeypatch, capsys)


@pytest.mark.parametrize("verb", ["data", "base", "demo"])
def test_the_demo_writes_nothing_for_a_config_that_is_not_its_own(
    verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    talks = "corpus={paths: [data/mine.jsonl], messages: messages}"
    for setting in ("corpus.paths=[data/mine.jsonl]", "corpus={dataset: hub/name}", "base=hub/name", talks):
        status, shown = run_command([verb, "-s", setting], capsys)
        assert status == 2 and "not a demo's config" in shown
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("code", sorted(FIXES))
def test_an_error_of_the_system_names_the_file_and_a_way_on(code: int, capsys: pytest.CaptureFixture) -> None:
    assert explain(OSError(code, os.strerror(code), "runs/[/]x")) == 2
    shown = capsys.readouterr().err
    assert "runs/[/]x: " in shown and os.strerror(code) in shown and FIXES[code] in shown


def test_a_full_disk_while_training_is_a_users_error_and_memory_too() -> None:
    assert "free some space" in str(as_user_error(OSError(errno.ENOSPC, "full")))
    assert "micro_rows" in str(as_user_error(MemoryError()))


def test_what_nobody_foresaw_is_one_line_and_a_log_with_the_traceback(
    capsys: pytest.CaptureFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    try:
        raise KeyError("surprise\nof two lines")
    except KeyError as error:
        assert explain(error) == 1
    shown = capsys.readouterr().err
    (log,) = tmp_path.glob("tokensift-*.log")
    assert shown.count("\n") == 1 and str(log) in shown and "Traceback" not in shown
    assert "Traceback" in log.read_text() and "surprise" in log.read_text()

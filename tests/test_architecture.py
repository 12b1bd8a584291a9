"""The layout holds: arrows point one way, heavy imports stay where they belong, every config and the README are true."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from schemas.config import load_config

ROOT = Path(__file__).resolve().parents[1]
ALLOWED = {
    "schemas": set(),
    "score_jobs": {"schemas"},
    "trainer": {"schemas"},
    "pipeline": {"schemas", "score_jobs", "trainer"},
}


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


@pytest.mark.parametrize("package", ALLOWED)
def test_arrows_point_one_way(package: str) -> None:
    for path in (ROOT / package).rglob("*.py"):
        ours = {name.split(".")[0] for name in imports(path)} & (ALLOWED.keys() - {package})
        assert ours <= ALLOWED[package], path.name


def test_ray_is_imported_only_where_ray_is_driven() -> None:
    users = {
        f"{package}/{path.name}"
        for package in ALLOWED
        for path in (ROOT / package).rglob("*.py")
        if any(name.split(".")[0] == "ray" for name in imports(path))
    }
    assert users == {"score_jobs/cluster.py", "score_jobs/pool.py", "pipeline/launch.py"}


def test_no_code_of_a_models_repository_is_ever_run() -> None:
    for path in (path for package in ALLOWED for path in (ROOT / package).rglob("*.py")):
        calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
        for call in calls:
            told = {word.arg: word.value for word in call.keywords}.get("trust_remote_code")
            name = ast.unparse(call.func)
            asks = name.startswith("Auto") and name.endswith(".from_pretrained")
            assert not (asks and told is None), f"{path}: {name}"
            assert told is None or (isinstance(told, ast.Constant) and told.value is False), f"{path}: {name}"


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_config_is_valid_and_fits_eight_gpus(path: Path) -> None:
    config = load_config(path)
    assert config.name == path.stem
    if not config.name.endswith("demo"):
        for train in (config.train, config.reference.train if config.reference else config.train):
            assert train.tokens_per_step // config.context.window % (8 * train.micro_rows) == 0


def test_the_readmes_pyarrow_lines_work(scores, monkeypatch, tmp_path, capsys) -> None:
    code = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert code
    (tmp_path / "runs" / "demo").mkdir(parents=True)
    (tmp_path / "runs" / "demo" / "scores").symlink_to(scores.score.output)
    monkeypatch.chdir(tmp_path)
    exec(code.group(1), {})
    assert capsys.readouterr().out.strip()


def test_the_readmes_layout_names_every_folder() -> None:
    text = (ROOT / "README.md").read_text()
    for name in (*ALLOWED, "configs", "benchmarks", "tests", "docs"):
        assert re.search(rf"^{name}/ +\S", text, re.M), name


@pytest.mark.parametrize(
    "page",
    [
        "README.md",
        "CONTRIBUTING.md",
        "docs/architecture.md",
        "docs/cluster.md",
        "docs/evaluation.md",
        "docs/experiments.md",
        "docs/families.md",
        "docs/finetuning.md",
        "docs/object-stores.md",
        "docs/scale.md",
        "docs/storage.md",
        "docs/training-on-a-cluster.md",
    ],
)
def test_every_file_that_a_page_names_exists_and_so_does_every_name_it_gives_to_code(page: str) -> None:
    text = (ROOT / page).read_text()
    for path in re.findall(r"`((?:schemas|score_jobs|trainer|pipeline|tests|benchmarks|configs|docs)/[\w./]+)`", text):
        assert (ROOT / path).exists(), path
    for name, path in re.findall(r"`(\w+)`(?: \(\w+\))? in\s+`([\w/]+\.py)`", text):
        assert re.search(rf"^ *(?:def|class) {name}\b|^{name}\b", (ROOT / path).read_text(), re.M), (name, path)

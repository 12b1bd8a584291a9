"""Names of the hub, against its own client over HTTP: a revision is what is fetched, a moved branch is refused, the commit is kept."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from schemas.hub import dataset_of, known_as, split
from tests.hub import Hub

COMMIT = "0123456789abcdef0123456789abcdef01234567"
ROOT = Path(__file__).resolve().parents[2]
BEGIN = """
import sys
from pathlib import Path
from schemas.config import load_config
from schemas.errors import UserError
from schemas.models import local_model
from schemas.receipt import Layout, read_receipts, write_complete, write_dataset
from score_jobs.job import prepare
config = load_config(Path(sys.argv[1]))
layout = Layout(config.score.output)
"""
SCORE_AND_TRAIN = """
from pipeline.train import train_live
from score_jobs.plan import plan
from score_jobs.worker import Worker
job = prepare(config, layout)
layout.make()
write_dataset(layout, job.fingerprint)
worker = Worker(job)
units = plan(job.corpus, job.fingerprint, 3_000, layout.root / ".inventory.json", lambda done, total: None).units
for unit in units:
    assert unit.url.startswith(f"hf://datasets/org/web@{sys.argv[3]}/"), unit.url
    worker.score(unit)
write_complete(layout, [unit.name for unit in units])
assert {receipt.engine["model"] for receipt in read_receipts(layout).values()} == {f"org/tiny@{sys.argv[2]}"}
train_live(config)
"""
AFTER_THE_MOVE = """
try:
    prepare(config, layout)
except UserError as error:
    print("refused:", error)
score = config.score.model_copy(update={"model": f"org/tiny@{sys.argv[2]}"})
prepare(config.model_copy(update={"score": score}), layout)
for name in ("org/tiny@v9", "org/none"):
    try:
        local_model(name, "base")
    except UserError as error:
        print(error)
"""


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    hub = Hub()
    yield hub
    hub.close()


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_name_of_the_hub_is_a_repository_and_maybe_a_revision() -> None:
    assert split("gpt2") == ("gpt2", None) and split("org/n-1.0_x") == ("org/n-1.0_x", None)
    assert split("org/name@v1") == ("org/name", "v1") and split("org/name@refs/pr/1") == ("org/name", "refs/pr/1")
    for wrong in ("", "a/b/c", "a/b@", "@v1", "a b", "./a", "/a", "../a", "a/b@v 1", "a/b@v@w", "a/b\n"):
        with pytest.raises(ValueError, match="is not org/name"):
            split(wrong)


def test_only_a_folder_of_the_hubs_cache_is_known_by_a_name() -> None:
    cache = Path("/any/hub")
    assert known_as(cache / "models--org--name" / "snapshots" / COMMIT) == f"org/name@{COMMIT}"
    assert known_as(cache / "models--gpt2" / "snapshots" / COMMIT) == f"gpt2@{COMMIT}"
    for folder in (
        "models--org--name",
        "models--org--name/refs",
        "datasets--org--name/snapshots",
        "models/snapshots",
        "mine/snapshots",
    ):
        assert known_as(cache / folder / COMMIT) is None
    assert known_as(cache / "models--org--name" / "snapshots" / "main") is None and known_as(cache / "a@b") is None


def test_a_file_of_the_hubs_data_sets_is_known_by_name_and_commit() -> None:
    assert dataset_of(f"hf://datasets/org/web@{COMMIT}/data/a.parquet") == f"org/web@{COMMIT}"
    for other in ("s3://bucket/a.parquet", "/data/a.parquet", "hf://datasets/org/web/a.parquet"):
        assert dataset_of(other) is None


def test_a_revision_is_what_is_fetched_its_commit_is_kept_and_a_moved_branch_is_refused(
    hub: Hub, tiny_model: Path, corpus_tools, make_config, write_config, tmp_path: Path
) -> None:
    other = corpus_tools.build_tiny_model(tmp_path / "other", seed=1)
    poison = {"pytorch_model.bin": b"never fetched", "modeling.py": b"raise SystemExit('never run')"}
    first = hub.commit("models/org/tiny", files_of(tiny_model) | poison, "main", "v1")
    corpus = corpus_tools.write_documents(tmp_path / "train.jsonl", corpus_tools.make_documents(12))
    web = hub.commit("datasets/org/web", {"data/train.jsonl": corpus.read_bytes()}, "v1")
    hub.commit("datasets/org/web", {"data/train.jsonl": b"another"}, "main")
    changes = {"base": "org/tiny", "score.model": "org/tiny@main", "corpus": {"dataset": "org/web@v1"}}
    path = write_config(make_config(tmp_path / "run", changes), tmp_path / "config.yaml")
    settings = {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
    }

    def run(code: str) -> str:
        command = [sys.executable, "-c", BEGIN + code, str(path), first, web]
        done = subprocess.run(command, env=os.environ | settings, cwd=ROOT, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    run(SCORE_AND_TRAIN)
    card = (tmp_path / "run" / "train" / "slm" / "final" / "README.md").read_text()
    assert "base_model: org/tiny\n" in card and "datasets:\n- org/web\n" in card
    for row in (f"| base | org/tiny@{first} |", f"| reference | org/tiny@{first} |", f"| corpus | org/web@{web} |"):
        assert row in card
    fetched = {file.name for file in (tmp_path / "home" / "hub" / "models--org--tiny" / "snapshots" / first).iterdir()}
    assert fetched == {file.name for file in tiny_model.iterdir()}
    hub.commit("models/org/tiny", files_of(other), "main")
    said = run(AFTER_THE_MOVE)
    assert "refused:" in said and "model.model.safetensors: " in said and "stored" in said
    assert "base: `org/tiny@v9`: org/tiny has no such revision; mend what follows the @" in said
    assert "base: `org/none` is neither a local folder nor to be had from the hub" in said

"""Laws 1 and 2 at every step of publication: the process dies there, and the unit is redone to the same bytes."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pyarrow.parquet as pq

from schemas.config import Config
from schemas.receipt import Layout, read_receipts
from score_jobs.plan import Plan, plan
from score_jobs.worker import CANARIES, Job, Worker
from tests.helpers import PATIENCE_SECONDS

# Dies just before or just after the call with that number, of those that make bytes or names durable.
SCRIPT = """
import json, os, pathlib, sys
from schemas.config import Config
from schemas.receipt import Layout
from score_jobs.lines import Mark
from score_jobs.plan import Unit
from score_jobs.worker import Job, Worker

folder = pathlib.Path(sys.argv[1])
raw = json.loads((folder / "job.json").read_text())
config = Config.model_validate(raw["config"])
worker = Worker(Job(pathlib.Path(raw["model"]), config.corpus, config.context, config.score, raw["fingerprint"]))
unit = Unit(**{**raw["unit"], "mark": Mark(**raw["unit"]["mark"])})
calls = 0


def deadly(real, when):
    def call(*arguments, **options):
        global calls
        calls += 1
        if when == "before" and calls == limit:
            os._exit(9)
        result = real(*arguments, **options)
        if when == "after" and calls == limit:
            os._exit(9)
        return result
    return call


real = {name: getattr(os, name) for name in ("replace", "link", "fsync", "unlink")}
limit, reached = 0, []
for when in ("before", "after"):
    for limit in range(1, 100):
        output = folder / f"{when}-{limit}"
        Layout(output).make()
        worker.layout, calls = Layout(output), 0
        child = os.fork()
        if not child:
            for name, function in real.items():
                setattr(os, name, deadly(function, when))
            worker.score(unit)
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert status in (0, 9), status
        if status == 0:
            break
        reached.append(output.name)
print(json.dumps(reached))
"""


def prepare(config: Config) -> tuple[Job, Plan]:
    from transformers import AutoTokenizer

    from schemas.fingerprint import dataset_fingerprint

    model = Path(config.score.model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    fingerprint = dataset_fingerprint(tokenizer, model, config.corpus, config.context, config.score)
    inventory = config.score.output / ".inventory.json"
    planned = plan(config.corpus, fingerprint, config.score.unit_bytes, inventory, lambda done, total: None)
    return Job(model, config.corpus, config.context, config.score, fingerprint), planned


def test_law_1_a_crash_at_any_step_of_publication_leaves_a_unit_that_is_redone_to_the_same_bytes(
    make_config: Callable[..., Config], corpus_folder: Path, tmp_path: Path
) -> None:
    config = make_config(tmp_path, {"corpus.paths": [str(corpus_folder / "part-2.jsonl")]})
    Layout(config.score.output).make()
    job, planned = prepare(config)
    unit = planned.units[-1]  # it has quarantined documents, so every kind of file is published
    worker = Worker(job)
    whole = worker.score(unit)
    assert whole.quarantined == 3
    expected = worker.layout.shard(unit.name).read_bytes(), worker.layout.quarantine(unit.name).read_bytes()
    described = asdict(unit)
    (tmp_path / "job.json").write_text(
        json.dumps(
            {
                "config": config.model_dump(mode="json"),
                "model": str(job.model),
                "fingerprint": job.fingerprint,
                "unit": described,
            }
        )
    )
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path)], capture_output=True, text=True, check=False,
        cwd=Path(__file__).parents[2], env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=PATIENCE_SECONDS,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    crashes = json.loads(done.stdout.splitlines()[-1])
    assert len(crashes) >= 20
    for name in crashes:
        worker.layout = layout = Layout(tmp_path / name)
        for path in (layout.root / "units").glob("*.parquet"):  # no reader sees a part of a file
            if not path.name.startswith("."):
                assert path.read_bytes() == expected[0], name
        pq.read_table(layout.root / "units") if any((layout.root / "units").glob("[!.]*")) else None
        for receipt in read_receipts(layout).values():  # and what is committed is whole
            assert (receipt.sha256, receipt.quarantine_sha256) == (whole.sha256, whole.quarantine_sha256), name
            assert layout.shard(unit.name).read_bytes() == expected[0]
            assert layout.quarantine(unit.name).read_bytes() == expected[1]
        if unit.name not in read_receipts(layout):
            worker.score(unit)
        assert (layout.shard(unit.name).read_bytes(), layout.quarantine(unit.name).read_bytes()) == expected, name
        assert list(read_receipts(layout)) == [unit.name]
        assert pq.read_table(layout.root / "units").num_rows == whole.windows


def test_law_1_the_bytes_of_a_unit_do_not_depend_on_what_its_worker_scored_before(
    make_config: Callable[..., Config], tmp_path: Path
) -> None:
    config = make_config(tmp_path)
    Layout(config.score.output).make()
    job, planned = prepare(config)
    seen = []
    for order in (planned.units, planned.units[::-1]):
        worker = Worker(job)
        worker.layout = Layout(tmp_path / f"order-{len(seen)}")
        worker.layout.make()
        for unit in order:
            worker.score(unit)
        seen.append({unit.name: worker.layout.shard(unit.name).read_bytes() for unit in planned.units})
    assert seen[0] == seen[1]


def test_law_2_a_unit_scored_twice_is_committed_once(make_config: Callable[..., Config], tmp_path: Path) -> None:
    config = make_config(tmp_path)
    Layout(config.score.output).make()
    job, planned = prepare(config)
    worker, unit = Worker(job), planned.units[0]
    worker.score(unit)
    paths = worker.layout.receipt(unit.name), worker.layout.shard(unit.name)
    receipt, shard = (path.stat() for path in paths)
    worker.score(unit)
    assert paths[0].stat().st_ino == receipt.st_ino and paths[0].stat().st_mtime_ns == receipt.st_mtime_ns
    assert paths[1].stat().st_ino == shard.st_ino and paths[1].stat().st_mtime_ns == shard.st_mtime_ns


def test_law_4_a_document_with_a_loss_that_float16_cannot_hold_costs_itself_alone(
    make_config: Callable[..., Config], tmp_path: Path
) -> None:
    config = make_config(tmp_path)
    Layout(config.score.output).make()
    job, planned = prepare(config)
    worker, unit = Worker(job), planned.units[0]
    normal = worker.score(unit)
    real = worker.engine.score

    def poisoned(windows: list) -> list:
        results = real(windows)
        if len(windows) > CANARIES:  # the canary's own call is of fewer, and is no document
            results[3].loss[1] = float("inf")
        return results

    worker.engine.score = poisoned  # type: ignore[method-assign]
    worker.layout = Layout(tmp_path / "poisoned")
    worker.layout.make()
    receipt = worker.score(unit)
    assert (receipt.quarantined, receipt.documents) == (normal.quarantined + 1, normal.documents - 1)
    assert "not finite" in worker.layout.quarantine(unit.name).read_text()

"""Laws 1 to 4 against real processes: `tokensift score` is killed, and what it leaves is held against a whole run."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from schemas.config import Config
from tests.helpers import PATIENCE_SECONDS, edit_sealed
from tests.score_jobs.conftest import ROOT, Job, committed, everything, outputs, receipts

TWO_WORKERS = "score.workers=2"


@pytest.mark.parametrize(("whom", "after"), [("group", 0), ("group", 3), ("driver", 2)])
def test_law_1_and_2_a_killed_job_resumes_to_the_bytes_of_an_uninterrupted_one(
    world: tuple[Config, Path], whole: dict[str, bytes], start: Callable[..., Job], whom: str, after: int
) -> None:
    config, path = world
    first = start(path, TWO_WORKERS)
    first.until(lambda: (config.score.output / "dataset.json").exists() and len(receipts(config)) >= after)
    first.watch()
    if whom == "group":
        os.killpg(first.process.pid, signal.SIGKILL)
    else:
        first.process.kill()
    first.process.wait()
    before = committed(config.score.output)
    assert len(before) >= after
    status, output = start(path).end()
    assert status == 0, output
    assert outputs(config.score.output) == whole
    assert len(receipts(config)) == len([name for name in whole if name.startswith("units/")])
    now = committed(config.score.output)
    assert {unit: now[unit] for unit in before} == before
    assert not first.survivors()


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_a_job_that_is_asked_to_stop_says_how_to_go_on_and_keeps_what_is_scored(
    world: tuple[Config, Path], start: Callable[..., Job], how: signal.Signals
) -> None:
    config, path = world
    settings = ("score.unit_bytes=100", "score.workers=1")  # a unit a document: far from done at the first receipt
    job = start(path, *settings)
    job.until(lambda: len(receipts(config)) >= 1)
    job.process.send_signal(how)
    status, output = job.end()
    assert status == 130 and "run `make score` again" in output, output
    assert "Traceback" not in output and "SIGTERM received" not in output
    kept = committed(config.score.output)
    status, output = start(path, *settings).end()
    assert status == 0, output
    now = committed(config.score.output)
    assert 0 < len(kept) < len(now) and {unit: now[unit] for unit in kept} == kept


def test_law_4_a_killed_worker_costs_its_unit_in_flight_and_the_job_finishes(
    world: tuple[Config, Path], whole: dict[str, bytes], start: Callable[..., Job]
) -> None:
    config, path = world
    job = start(path, TWO_WORKERS)

    def workers() -> list[psutil.Process]:
        found = []
        for process in job.watch():
            try:
                if any("ray::" in part and "Actor" in part for part in process.cmdline()):
                    found.append(process)
            except psutil.Error:
                continue
        return found

    job.until(lambda: workers())
    victim = workers()[0]
    (config.score.output / "units" / ".tmp-half-written").write_bytes(b"what a killed writer leaves")
    victim.kill()
    status, output = job.end()
    assert status == 0, output
    assert not victim.is_running()
    assert outputs(config.score.output) == whole


def test_law_4_a_corrupt_shard_costs_that_shard_alone_until_it_is_mended(
    world: tuple[Config, Path], whole: dict[str, bytes], start: Callable[..., Job]
) -> None:
    config, path = world
    broken = Path(config.corpus.paths[0]).parent / "part-1.jsonl.gz"
    good = broken.read_bytes()
    broken.write_bytes(good[: len(good) * 2 // 3])
    status, output = start(path).end()
    assert status == 1 and broken.name in output and "Traceback" not in output
    assert outputs(config.score.output) == {name: data for name, data in whole.items() if "part-1" not in name}
    broken.write_bytes(good)
    before = committed(config.score.output)
    status, output = start(path).end()
    assert status == 0, output
    assert outputs(config.score.output) == whole
    assert {unit: committed(config.score.output)[unit] for unit in before} == before


@pytest.fixture
def finished(world: tuple[Config, Path], score_here: Callable) -> tuple[Config, Path]:
    return score_here(world[0]), world[1]


def forbid_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    import score_jobs.job

    def refuse(*arguments: object) -> None:
        raise AssertionError("Ray was started")

    monkeypatch.setattr(score_jobs.job, "_score_units", refuse)


def test_law_2_a_finished_dataset_is_not_touched_and_starts_no_ray(
    finished: tuple[Config, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from score_jobs.job import score

    config, _ = finished
    before = everything(config.score.output)
    forbid_ray(monkeypatch)
    outcome = score(config)
    assert not outcome.missing and outcome.new_tokens == 0
    assert everything(config.score.output) == before


@pytest.mark.parametrize(
    ("settings", "fields"),
    [
        (("score.dtype=bfloat16", "context.window=32"), ("scorer.dtype: 'float32'", "context.window: 64 stored")),
        ((), ("part-2.jsonl",)),
    ],
)
def test_law_3_changed_settings_or_corpus_are_refused_by_name_and_nothing_changes(
    finished: tuple[Config, Path], start: Callable[..., Job], settings: tuple[str, ...], fields: tuple[str, ...]
) -> None:
    config, path = finished
    if not settings:
        shard = Path(config.corpus.paths[0]).parent / "part-2.jsonl"
        shard.write_bytes(shard.read_bytes().replace(b"x = 1", b"x = 2"))
    before = everything(config.score.output)
    status, output = start(path, *settings).end()
    assert status == 2 and all(field in output for field in fields) and "Traceback" not in output, output
    assert everything(config.score.output) == before


def test_law_3_a_machine_that_no_longer_gives_the_stored_losses_is_refused(
    finished: tuple[Config, Path], start: Callable[..., Job]
) -> None:
    config, path = finished
    first, last = min(receipts(config)), max(receipts(config))
    canary = json.loads(first.read_text())["canary"]
    canary[0]["ref_loss"][0] += 1.0
    edit_sealed(first, canary=canary)
    last.unlink()
    before = everything(config.score.output)
    status, output = start(path).end()
    drift = 1 / sum(len(pair["ref_loss"]) for pair in canary)
    assert status == 2 and f"{drift:.3g} nats off" in output and "Traceback" not in output
    assert everything(config.score.output) == before


def test_law_3_a_second_job_on_the_same_dataset_is_refused_by_the_lock(world: tuple[Config, Path]) -> None:
    import fcntl

    from schemas.errors import UserError
    from score_jobs.job import score

    config, _ = world
    config.score.output.mkdir(parents=True)
    holder = subprocess.Popen(
        [sys.executable, "-c", "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.flock(f, fcntl.LOCK_EX);"
         " print('held', flush=True); sys.stdin.read()", str(config.score.output / ".lock")],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    try:
        with pytest.raises(UserError, match="another"):
            score(config)
        assert not (config.score.output / "dataset.json").exists()
    finally:
        holder.communicate("")
    with open(config.score.output / ".lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_law_4_a_unit_whose_worker_always_dies_is_given_up_and_the_rest_finishes(
    world: tuple[Config, Path], whole: dict[str, bytes], start: Callable[..., Job], tmp_path: Path
) -> None:
    config, path = world
    script = tmp_path / "deadly.py"
    script.write_text(
        "import os, sys\n"
        "import score_jobs.pool as pool\n"
        "from pipeline import cli\n"
        "class Deadly(pool.Actor):\n"
        "    def score(self, unit):\n"
        "        if unit.name.startswith('part-0'):\n"
        "            os._exit(9)\n"
        "        return super().score(unit)\n"
        "pool.Actor = Deadly\n"
        "cli.main()\n"
    )
    command = [sys.executable, str(script), "score", "-c", str(path), "-s", "score.attempts=2"]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
        timeout=PATIENCE_SECONDS, check=False,
    )  # fmt: skip
    assert done.returncode == 1, done.stdout + done.stderr
    assert "missing: part-0" in done.stderr and "2 attempts" in done.stderr
    assert outputs(config.score.output) == {name: data for name, data in whole.items() if "part-0" not in name}
    assert not [receipt for receipt in receipts(config) if receipt.name.startswith("part-0")]

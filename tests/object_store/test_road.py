"""Both stages with corpus and scores in a bucket, whatever the network does: the bytes are those of a folder's run."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from io import StringIO
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from pipeline.inspect import inspect
from pipeline.status import status
from pipeline.verify import verify
from schemas.config import Config, load_config
from schemas.fingerprint import dataset_fingerprint
from schemas.lock import locked
from schemas.models import open_tokenizer
from schemas.object_store import ObjectStore, Url
from schemas.receipt import Layout, read_receipts
from score_jobs.inputs import version_of
from score_jobs.plan import Unit, plan
from score_jobs.survey import survey
from score_jobs.worker import Job as ScoreJob
from score_jobs.worker import Worker
from tests.object_store.server import Proxy
from tests.score_jobs.conftest import ROOT, Job, outputs

TRIALS = int(os.environ.get("TRIALS", "12"))  # of the campaign; some half a minute each


@pytest.fixture
def start() -> Iterator[Callable[..., Job]]:
    jobs: list[Job] = []

    def begin(config: Path) -> Job:
        jobs.append(Job(config))
        return jobs[-1]

    yield begin
    for job in jobs:
        job.destroy()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, make_config: Callable, score_here: Callable) -> Config:
    """A folder's run over the same corpus."""
    return score_here(make_config(tmp_path_factory.mktemp("whole"), {"score.batch_tokens": 64}))


def upload(folder: Path, root: Url) -> None:
    for path in folder.iterdir():
        ObjectStore(root).put(path.name, path.read_bytes())


@pytest.fixture
def far(root: Url, tmp_path: Path, corpus_folder: Path, make_config: Callable) -> Config:
    """The same corpus in the bucket, and scores that go there."""
    upload(corpus_folder, root / "corpus")
    names = {"corpus.paths": [f"{root}/corpus/part-*"], "score.output": f"{root}/scores", "score.batch_tokens": 64}
    return make_config(tmp_path, names)


def objects(root: Url) -> dict[str, bytes]:
    """Every score shard and quarantine file below a name."""
    found = [url for kind in ("units", "quarantine") for url in (root / kind).glob("**")]
    return {f"{url.parent.name}/{url.name}": url.read_bytes() for url in found}


def without_times(layout: Layout) -> list[tuple]:
    """All that receipts say but when and how long."""
    kept = (
        "unit",
        "shard",
        "bytes",
        "sha256",
        "windows",
        "tokens",
        "quarantined",
        "quarantine_sha256",
        "loss_sum",
        "canary",
    )
    return [tuple(str(getattr(receipt, name)) for name in kept) for receipt in read_receipts(layout).values()]


def units(config: Config) -> tuple[Worker, list[Unit]]:
    tokenizer, model = open_tokenizer(Path(config.score.model), "score.model"), Path(config.score.model)
    fingerprint = dataset_fingerprint(tokenizer, model, config.corpus, config.context, config.score)
    inventory = Layout(config.score.output).root / Layout.INVENTORY
    planned = plan(config.corpus, fingerprint, config.score.unit_bytes, inventory, lambda done, total: None)
    return Worker(ScoreJob(model, config.corpus, config.context, config.score, fingerprint)), planned.units


def test_a_run_through_faults_comes_to_the_same_bytes_and_every_verb_reads_it(
    whole: Config, far: Config, proxy: Proxy, score_here: Callable
) -> None:
    proxy.trouble(0.15, seed=5)
    score_here(far)
    layout, posix = Layout(far.score.output), Layout(whole.score.output)
    assert objects(layout.root) == outputs(whole.score.output)
    assert without_times(layout) == without_times(posix)
    assert verify(layout.root, progress=False) == []
    (damaged,) = [unit for unit in layout.committed() if "part-1-00000" in unit]
    assert verify(layout.shard(damaged), progress=False) == []
    said, here = status(layout), status(posix)
    same = ("complete", "units", "units_total", "documents", "tokens", "quarantined", "quarantine", "bytes", "running")
    assert [said[name] for name in same] == [here[name] for name in same]
    shown = StringIO()
    inspect(layout.root, documents=1, console=Console(file=shown, width=200))
    assert str(layout.root) in shown.getvalue() and f"{said['tokens']:,}" in shown.getvalue()
    assert sum(proxy.faults.values()) > 30, proxy.faults
    content = layout.shard(damaged).read_bytes()
    layout.store.put(Layout.name(Layout.UNITS, damaged), content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
    (problem,) = verify(layout.root, progress=False)
    assert problem.startswith(str(layout.shard(damaged))) and "sha256 differs" in problem


def test_a_surveys_marks_and_versions_are_those_of_the_bytes(corpus_folder: Path, far: Config, root: Url) -> None:
    for path in sorted(corpus_folder.iterdir()):
        url = f"{root}/corpus/{path.name}"
        assert survey(url) == survey(str(path))
        before = version_of(url)
        ObjectStore(root).put(f"corpus/{path.name}", path.read_bytes() + b"\n")
        assert version_of(url) != before


def test_two_workers_on_the_same_units_at_once_harm_nothing(whole: Config, far: Config, proxy: Proxy) -> None:
    """What a lease that was lost comes to."""
    proxy.trouble(0.1, seed=6)
    (one, todo), (other, _) = units(far), units(far)
    with ThreadPoolExecutor(2) as both:
        runs = [both.submit(lambda worker=worker, order=order: [worker.score(unit) for unit in order])
                for worker, order in ((one, todo), (other, todo[::-1]))]  # fmt: skip
        receipts = [{receipt.unit: receipt for receipt in run.result()} for run in runs]
    layout = Layout(far.score.output)
    assert objects(layout.root) == outputs(whole.score.output)
    stored = read_receipts(layout)
    assert without_times(layout) == without_times(Layout(whole.score.output))
    assert all(stored[unit] in [found.get(unit) for found in receipts] for unit in stored)


def test_a_unit_costs_six_requests_beside_its_input(far: Config, proxy: Proxy) -> None:
    """docs/object-stores.md names them."""
    worker, todo = units(far)
    one, after, *_ = (unit for unit in todo if "part-2" in unit.name)
    worker.score(one)
    proxy.trouble(0)
    assert not worker.score(after).quarantined
    assert proxy.requests == {"HEAD": 1, "PUT": 2, "GET": 2, "POST": 1}


def killed(path: Path, seed: int, kills: int) -> list[str]:
    """A scoring process killed so many times, then left to finish; what came of each attempt."""
    command = [sys.executable, "-m", "tests.object_store.killed", str(path), str(seed), str(kills)]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=1500)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout.split()


def test_a_process_killed_at_any_request_loses_nothing(
    whole: Config, far: Config, proxy: Proxy, write_config: Callable, tmp_path: Path
) -> None:
    path, layout = write_config(far, tmp_path / "config.yaml"), Layout(far.score.output)
    proxy.trouble(0.05, seed=8)
    assert killed(path, seed=1, kills=6).count("killed") >= 3
    assert objects(layout.root) == outputs(whole.score.output)
    assert without_times(layout) == without_times(Layout(whole.score.output))
    assert verify(layout.root, progress=False) == [] and not layout.store.exists(".lock")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_campaign_of_kills_through_faults_loses_nothing(
    whole: Config, far: Config, proxy: Proxy, write_config: Callable, tmp_path: Path
) -> None:
    requests = faults = kills = 0
    for trial in range(TRIALS):
        score = far.score.model_copy(update={"output": far.score.output / f"{trial}"})
        path, layout = (
            write_config(far.model_copy(update={"score": score}), tmp_path / "config.yaml"),
            Layout(score.output),
        )
        proxy.trouble(0.1, seed=trial)
        kills += killed(path, seed=trial, kills=8).count("killed")
        requests, faults = requests + sum(proxy.requests.values()), faults + sum(proxy.faults.values())
        proxy.trouble(0)
        assert objects(layout.root) == outputs(whole.score.output), trial
        assert without_times(layout) == without_times(Layout(whole.score.output)), trial
    print(f"{requests} requests, {faults} faults, {kills} kills, nothing lost, nothing different")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_jobs_killed_on_the_way_lose_nothing_and_two_at_once_are_one(
    whole: Config, far: Config, proxy: Proxy, write_config: Callable, start: Callable[..., Job], tmp_path: Path
) -> None:
    far = far.model_copy(update={"score": far.score.model_copy(update={"workers": 2})})
    path, layout = write_config(far, tmp_path / "config.yaml"), Layout(far.score.output)
    assert load_config(path).score.output == far.score.output
    proxy.trouble(0.05, seed=7)
    with locked(layout.root, "`make score`"):
        status_, output = start(path).end()
        assert status_ == 2 and "another `make score` is writing here" in output, output
    first = start(path)
    first.until(lambda: len(layout.committed()) >= 1)
    next(child for child in first.watch() if child.name().startswith("ray::")).kill()
    first.until(lambda: len(layout.committed()) >= 2)
    os.killpg(first.process.pid, signal.SIGKILL)
    first.end()
    kept = {unit: layout.receipt(unit).read_bytes() for unit in layout.committed()}
    assert len(kept) < len(without_times(Layout(whole.score.output)))
    status_, output = start(path).end()
    assert status_ == 0, output
    assert {unit: layout.receipt(unit).read_bytes() for unit in kept} == kept
    assert objects(layout.root) == outputs(whole.score.output)
    assert without_times(layout) == without_times(Layout(whole.score.output))
    assert verify(layout.root, progress=False) == [] and not layout.store.exists(".lock")


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_the_demos_road_with_corpus_and_scores_in_a_bucket_gives_the_weights_of_a_folders(
    root: Url, proxy: Proxy, tmp_path: Path
) -> None:
    """A tenth of the demo's text: every verb as a real process, on real Ray, through faults."""
    raw = yaml.safe_load((ROOT / "configs" / "demo.yaml").read_text())
    for train in (raw["train"], raw["reference"]["train"]):
        train |= {"evaluate_every": 0, "epochs": 0.4}
    (tmp_path / "demo.yaml").write_text(yaml.safe_dump(raw))

    def tokensift(verb: str, *settings: str, arguments: tuple[str, ...] = ()) -> None:
        command = [sys.executable, "-m", "pipeline.cli", verb, *arguments]
        command += [] if verb == "verify" else ["-c", "demo.yaml"]
        for setting in settings:
            command += ["-s", setting]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=1200)
        assert ended.returncode == 0, (verb, ended.stdout + ended.stderr)

    tokensift("data", arguments=("--scale", "0.1"))
    tokensift("base")
    tokensift("reference")
    demo, scores = tmp_path / "runs" / "demo", root / "scores"
    upload(demo / "data" / "corpus", root / "corpus")
    tokensift("score")
    tokensift("train")
    proxy.trouble(0.1, seed=11)
    corpus = f"corpus.paths=['{root}/corpus/*.jsonl.zst', '{root}/corpus/*.parquet']"
    there = (corpus, f"score.output={scores}", "train.run=far", f"train.cache={tmp_path / 'cache'}")
    tokensift("score", *there)
    tokensift("train", *there)
    tokensift("verify", arguments=(str(scores),))
    requests, faults = sum(proxy.requests.values()), sum(proxy.faults.values())
    assert objects(scores) == outputs(demo / "scores")
    assert without_times(Layout(scores)) == without_times(Layout(demo / "scores"))
    here, far_ = (demo / "train" / run / "final" / "model.safetensors" for run in ("slm", "far"))
    assert here.read_bytes() == far_.read_bytes()
    print(f"{requests} requests, {faults} faults, nothing lost, nothing different")

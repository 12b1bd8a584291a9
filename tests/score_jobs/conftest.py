"""What reliability tests share: `tokensift score` as a real process, a world for it, and the bytes it must come to."""

import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from schemas.config import Config
from schemas.receipt import Layout
from score_jobs.keeper import lives
from tests.helpers import PATIENCE_SECONDS

ROOT = Path(__file__).resolve().parents[2]


class Job:
    """`tokensift score` as a process group of its own."""

    def __init__(self, config: Path, *settings: str, arguments: tuple[str, ...] = (), apart: bool = False):
        """`apart` keeps standard error from standard output."""
        command = [sys.executable, "-m", "pipeline.cli", "score", "-c", str(config), *arguments]
        for setting in settings:
            command += ["-s", setting]
        self.process = subprocess.Popen(
            command,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE if apart else subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self.family: set[psutil.Process] = set()

    def watch(self) -> list[psutil.Process]:
        """Living descendants; remembered, so that orphans can be found after the driver is gone."""
        try:
            children = psutil.Process(self.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            children = []
        self.family.update(children)
        return children

    def until(self, happened: Callable[[], object]) -> None:
        """Wait for something; fails if the job ends first."""
        limit = time.monotonic() + PATIENCE_SECONDS
        while not happened():
            self.watch()
            assert self.process.poll() is None, self.process.communicate()[0]
            assert time.monotonic() < limit, "the job did not get there"
            time.sleep(0.005)

    def end(self) -> tuple[int, str]:
        """Exit status and everything printed."""
        output = self.process.communicate(timeout=PATIENCE_SECONDS)[0]
        return self.process.returncode, output

    def end_apart(self) -> tuple[int, str, str]:
        """Exit status, standard output and standard error."""
        output, words = self.process.communicate(timeout=PATIENCE_SECONDS)
        return self.process.returncode, output, words

    def survivors(self, patience_seconds: float = 60.0) -> list[psutil.Process]:
        """Remembered descendants that still live after a while."""
        _, alive = psutil.wait_procs(self.family, timeout=patience_seconds)
        return [process for process in alive if lives(process)]

    def destroy(self) -> None:
        """Leave nothing behind: only processes that this job started."""
        self.watch()
        for process in self.family:
            if process.is_running():
                process.kill()
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()


@pytest.fixture
def start() -> Iterator[Callable[..., Job]]:
    jobs: list[Job] = []

    def begin(config: Path, *settings: str, arguments: tuple[str, ...] = (), apart: bool = False) -> Job:
        jobs.append(Job(config, *settings, arguments=arguments, apart=apart))
        return jobs[-1]

    yield begin
    for job in jobs:
        job.destroy()


@pytest.fixture
def world(tmp_path: Path, corpus_folder: Path, make_config: Callable, write_config: Callable) -> tuple[Config, Path]:
    """A corpus of its own, a config over it, and that config as a file; small batches."""
    corpus = tmp_path / "corpus"
    shutil.copytree(corpus_folder, corpus)
    config = make_config(tmp_path, {"corpus.paths": [str(corpus / "part-*")], "score.batch_tokens": 64})
    return config, write_config(config, tmp_path / "config.yaml")


@pytest.fixture(scope="module")
def whole(
    tmp_path_factory: pytest.TempPathFactory, make_config: Callable, score_here: Callable, corpus_folder: Path
) -> dict[str, bytes]:
    """The bytes of an uninterrupted run over the same corpus bytes and settings."""
    config = make_config(tmp_path_factory.mktemp("whole"), {"score.batch_tokens": 64})
    return outputs(score_here(config).score.output)


def outputs(root: Path) -> dict[str, bytes]:
    """Every score shard and quarantine file, hidden ones included."""
    files = [*(root / "units").iterdir(), *(root / "quarantine").iterdir()]
    return {f"{path.parent.name}/{path.name}": path.read_bytes() for path in files}


def everything(root: Path) -> dict[str, tuple[int, int, bytes]]:
    """Inode, modification time and bytes of all that readers see."""
    files = [path for path in root.rglob("*") if path.is_file() and not path.name.startswith(".")]
    return {str(path): (path.stat().st_ino, path.stat().st_mtime_ns, path.read_bytes()) for path in files}


def committed(root: Path) -> dict[str, tuple[int, int]]:
    """Inode and modification time of each shard that has a receipt."""
    layout = Layout(root)
    stats = {path.stem: layout.shard(path.stem).stat() for path in (root / "receipts").glob("[!.]*.json")}
    return {unit: (stat.st_ino, stat.st_mtime_ns) for unit, stat in stats.items()}


def receipts(config: Config) -> list[Path]:
    return list((config.score.output / "receipts").glob("[!.]*.json"))

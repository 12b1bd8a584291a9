"""The one-call GPU script runs where only torch, transformers, numpy and pyarrow are, with what those need themselves."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
OURS_ALONE = ("ray", "vllm", "datasets", "pydantic", "zstandard", "typer", "xxhash", "rich", "psutil", "tensorboard",
              "obstore", "fsspec", "accelerate", "hypothesis", "pytest")  # fmt: skip


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of packages from which those that only this project asks for are missing."""
    folder, installed = tmp_path_factory.mktemp("packages"), Path(torch.__file__).parents[1]
    for path in installed.iterdir():
        name = path.name.lower().replace("-", "_")
        if not name.startswith(tuple(f"{missing}{end}" for missing in OURS_ALONE for end in ("_", "."))) and (
            name not in OURS_ALONE and path.suffix != ".pth"
        ):
            (folder / path.name).symlink_to(path)
    return folder


def run(bare: Path, before: str = "pass") -> subprocess.CompletedProcess[str]:
    """`python -m benchmarks.gpu --tiny` without site-packages but those in `bare`; `before` is done to the module first."""
    code = f"import sys, benchmarks.gpu as gpu; {before}; sys.exit(gpu.main(['--tiny']))"
    environment = {"PYTHONPATH": f"{ROOT}:{bare}", "PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-S", "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


def test_the_script_checks_and_times_both_stages_with_bare_packages(bare: Path) -> None:
    done = run(bare)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line for line in done.stdout.splitlines() if line.startswith("|")]
    assert len({row.count("|") for row in rows}) == 1, "one table"
    assert sum(row.startswith("| ok: ") for row in rows) >= 5 and not any("FAILED" in row for row in rows)
    for words in (
        "law 5",
        "law 6",
        "by positions",
        "by boundaries",
        "step, clm",
        "keep 0.6",
        "keep 0.3",
        "live reference",
    ):
        assert any(words in row for row in rows), words


def test_a_check_that_fails_is_the_exit_status_and_a_part_that_breaks_costs_itself_alone(bare: Path) -> None:
    done = run(bare, "gpu.EXACT_NATS = 0.0; gpu.scoring = gpu.training = lambda *arguments: 1 / 0")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "FAILED: law 5, float32" in done.stdout and "ok: law 5, bfloat16" in done.stdout
    assert "FAILED: stage 1 | ZeroDivisionError" in done.stdout and "FAILED: stage 2 | ZeroDivisionError" in done.stdout

"""Laws 10 and 15 under SIGKILL: at random moments and at every durable step, on one rank and on two.

The losses of a run that went on are those of one that never died, bit for bit, and nobody hangs.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.trainer.campaign import prepare

FIELDS = {"objective": "slm", "epochs": 0.4, "checkpoint_every": 2, "micro_rows": 2}


def campaign(config, folder, ranks, *options):
    prepare(config, folder, **FIELDS)
    command = [sys.executable, "-m", "tests.trainer.campaign", str(folder), "--ranks", str(ranks), *options]
    done = subprocess.run(
        command,
        cwd=Path(__file__).resolve().parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    counts = json.loads(done.stdout.splitlines()[-1])
    assert counts["rows"] > 4
    assert counts["differences"] == counts["hangs"] == counts["failures"] == 0, done.stderr
    return counts


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_few_kills_change_nothing(scores, tmp_path, ranks):
    assert campaign(scores, tmp_path, ranks, "--trials", "2", "--stride", "67", "--first", "23")["killed"] >= 2


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("ranks", [1, 2])
def test_kills_at_random_moments_change_nothing(scores, tmp_path, ranks):
    assert campaign(scores, tmp_path, ranks, "--trials", "60")["killed"] > 30


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_death_at_every_durable_step_changes_nothing(scores, tmp_path, ranks):
    assert campaign(scores, tmp_path, ranks, "--stride", "1")["killed"] > 100

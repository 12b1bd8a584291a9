"""Boards: Weights & Biases against the real package in offline mode, read back from the files it would send."""

import struct
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from schemas.errors import UserError
from tests.helpers import PATIENCE_SECONDS
from trainer.board import require_wandb

ROOT = Path(__file__).resolve().parents[2]
WRITE = """
import sys
from pathlib import Path
from trainer.metrics import Log
for first in (0, 2):
    log = Log(Path(sys.argv[1]), first, "sift", {"keep": 0.6})
    for step in range(first + 1, first + 4):
        log.write("train", step, {"loss_kept": 8 / step, "score_over": [1.0, 0.5, 0.5, 0.5, 0.5, 0.25, 0.125]})
    log.close()
"""


def records(path):
    """What a .wandb file holds: after 7 bytes, blocks of 32 KiB of LevelDB's log format, each record a message."""
    from wandb.proto import wandb_internal_pb2

    data, at, whole = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record = wandb_internal_pb2.Record()
            record.ParseFromString(whole)
            yield record
            whole = b""


@pytest.mark.skipif(find_spec("wandb") is None, reason="wandb is not installed")
def test_a_run_that_goes_on_is_one_run_of_weights_and_biases_and_holds_what_the_log_holds(tmp_path):
    env = {"PATH": "", "HOME": str(tmp_path), "WANDB_MODE": "offline", "PYTHONPATH": ":".join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, "-c", WRITE, str(tmp_path / "slm")],
        cwd=ROOT, env=env, capture_output=True, text=True, timeout=PATIENCE_SECONDS,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    files = sorted((tmp_path / "slm" / "wandb").glob("offline-run-*/*.wandb"))
    assert len(files) == 2 and len({path.name for path in files}) == 1
    points, runs = [], []
    for path in files:
        for record in records(path):
            if record.WhichOneof("record_type") == "history":
                items = record.history.item
                values = {item.key or "/".join(item.nested_key): float(item.value_json) for item in items}
                points.append((values["step"], values["train/loss_kept"], values["train/score_over/1"]))
            elif record.WhichOneof("record_type") == "run":
                runs.append((record.run.run_id, record.run.project, record.run.display_name))
    assert points == [(step, 8 / step, 0.25) for step in (1, 2, 3, 3, 4, 5)]
    assert set(runs) == {((tmp_path / "slm" / "wandb-id").read_text(), "sift", "slm")}


def test_without_wandb_a_run_that_asks_for_it_is_refused_at_the_start(monkeypatch):
    require_wandb(None)
    monkeypatch.setattr("trainer.board.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"train\.wandb: sift is asked for, and wandb is not installed"):
        require_wandb("sift")

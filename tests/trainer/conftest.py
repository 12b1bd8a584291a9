import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pipeline.train import open_scores, source_of
from schemas.conversation import templated
from schemas.models import open_tokenizer
from tests.helpers import PATIENCE_SECONDS
from trainer.loop import Run, train
from trainer.ranks import Ranks


@pytest.fixture
def train_here():
    """`train_here(config, **fields)`: stage 2 in this process on one rank; fields override `train`'s."""

    def run(config, evaluate=None, **fields):
        settings = config.train.model_copy(update=fields)
        base = Path(config.base)
        alone = Ranks(0, 1, torch.device("cpu"))
        tokenizer = templated(open_tokenizer(base, "base"), config.corpus)
        config = config.model_copy(update={"train": settings})
        source = source_of(config, open_scores(config), tokenizer)
        final = train(Run(settings, config.context, base, source, tokenizer, alone, evaluate))
        return final, read_rows(settings.output)

    return run


@pytest.fixture
def torchrun(write_config):
    """`torchrun(config, folder, ranks)`: `tokensift train` as a user runs it on several ranks (gloo); rows, output."""

    def run(config, folder, ranks):
        folder.mkdir(parents=True, exist_ok=True)
        path = write_config(config, folder / "config.yaml")
        command = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        command += ["-m", "pipeline.cli", "train", "-c", str(path)]
        root = Path(__file__).resolve().parents[2]
        result = subprocess.run(
            [sys.executable, *command], cwd=root, capture_output=True, text=True, timeout=PATIENCE_SECONDS
        )
        assert result.returncode == 0, result.stdout + result.stderr
        return read_rows(config.train.output / config.train.objective)

    return run


def read_rows(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["kind"] == "train"]

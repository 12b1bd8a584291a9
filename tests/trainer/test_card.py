"""The model card says how a model was trained, from the run's own files, and nothing that they do not say."""

import json
import re
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard

from pipeline.train import names_of
from schemas.fingerprint import model_fingerprint
from trainer.card import RANKED, SCHEDULES, SELECTED, card
from trainer.checkpoint import CARD, State, load_state
from trainer.data import ScoreShards
from trainer.export import export_to

STEPS = "optimizer steps"


def table(text):
    """First and second cells of a card's tables."""
    return dict(re.findall(r"^\| ([^|]+) \| ([^|]+) \|", text, re.MULTILINE))


@pytest.fixture(scope="module")
def run(scores, tmp_path_factory):
    """A short run's settings, which evaluates every two steps and keeps every checkpoint."""
    output = tmp_path_factory.mktemp("run") / "slm"
    fields = {
        "evaluate_every": 2,
        "checkpoint_every": 2,
        "keep_checkpoints": 9,
        "keep": 0.4,
        "scope": "step",
        "tokens": 6 * 8 * 64,
    }
    return scores, {"output": output, "epochs": None, **fields}


@pytest.fixture
def trained(run, train_here):
    config, fields = run
    heard = iter(range(1, 100))
    final, rows = train_here(config, evaluate=lambda live: {"target_loss": 10.0 / next(heard)}, **fields)
    return final, rows, final.parent


def test_the_card_says_what_the_run_s_own_files_say(trained):
    final, rows, folder = trained
    content = (final / CARD).read_text()
    found, state = table(content), load_state(final)
    assert found[STEPS] == str(rows[-1]["step"]) == "6"
    assert found["tokens seen"] == f"{rows[-1]['tokens_seen']:,}"
    assert found["tokens trained on"].startswith(f"{rows[-1]['tokens_selected']:,} (")
    assert "40% of tokens with the highest excess loss" in found["objective"] and RANKED["step"] in found["objective"]
    assert state.origin["dataset"] in found["data's fingerprint"] and "0.001, cosine" in found["learning rate"]
    assert all(
        f"{name} `{number[:16]}`" in found["base's files, sha256"] for name, number in state.origin["base"].items()
    )
    assert found["versions"] == ", ".join(
        f"{name} {number}" for name, number in sorted(state.origin["versions"].items())
    )
    settings = yaml.safe_load(re.search(r"```yaml\n(.*?)```", content, re.DOTALL)[1])
    assert settings == {name: state.origin[name] for name in ("context", "train")}
    evals = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines() if '"eval"' in line]
    assert f"| target_loss (nats/token) | {evals[0]['target_loss']:.4f} | {evals[-1]['target_loss']:.4f} |" in content


def test_the_hub_reads_the_front_matter_and_the_licence_is_left_to_the_publisher(trained):
    final, *_ = trained
    data = ModelCard.load(final / CARD).data
    assert data.library_name == "transformers" and "selective-language-modeling" in data.tags
    assert (
        data.license is None and data.base_model is None and data.datasets is None
    )  # a local folder has no name there
    state = State(1, 1, 1, 1, {}, names={"base": f"org/tiny@{'0' * 40}", "corpus": "org/code@v2, org/web@v1"})
    named = ModelCard(card(state, [])).data
    assert named.base_model == "org/tiny" and named.datasets == ["org/code", "org/web"]


def test_an_earlier_checkpoint_s_card_knows_nothing_of_later_and_is_the_same_bytes_again(trained, tmp_path):
    final, _, folder = trained
    for name in ("one", "two"):
        export_to(folder / "checkpoints" / "step-0000002", tmp_path / name)
    content = (tmp_path / "one" / CARD).read_text()
    assert table(content)[STEPS] == "2" and "| step 0 | step 2 |" in content and "step 6" not in content
    files = {path.name: path.read_bytes() for path in (tmp_path / "one").iterdir()}
    assert files == {path.name: path.read_bytes() for path in (tmp_path / "two").iterdir()}
    export_to(folder / "checkpoints" / "step-0000006", tmp_path / "last")
    assert (tmp_path / "last" / CARD).read_bytes() == (final / CARD).read_bytes()


def test_a_reference_of_this_machine_is_told_by_the_hashes_of_its_files(scores):
    names = names_of(Path(scores.base), ScoreShards(scores.score.output))
    files = model_fingerprint(Path(scores.score.model))
    told = table(card(State(1, 1, 1, 1, {}, names=names), []))["reference"]
    assert told == ", ".join(f"{name} `{number[:16]}`" for name, number in sorted(files.items()))
    assert names.keys() == {"reference"}


def test_what_is_not_known_is_not_said():
    content = card(State(step=1, position=1, tokens_seen=0, tokens_selected=0, origin={}), [])
    assert set(table(content)) == {STEPS, "tokens seen", "tokens trained on", "---"} - {"---"}
    assert "None" not in content and "## Settings" not in content and "Held-out" not in content


@pytest.mark.parametrize("objective", [*SELECTED, "of the future"])
@pytest.mark.parametrize("schedule", [*SCHEDULES, "of the future"])
def test_every_objective_scope_and_schedule_is_spelled(scores, objective, schedule):
    settings = scores.train.model_dump(mode="json") | {"objective": objective, "schedule": schedule, "keep": 0.25}
    for scope in (*RANKED, "of the future"):
        state = State(1, 1, 1, 1, {"train": settings | {"scope": scope}})
        found = table(card(state, []))
        assert ("25%" in found["objective"]) is (objective not in ("clm", "of the future"))
        assert (RANKED.get(scope, "?") in found["objective"]) is (objective != "clm" and scope in RANKED)
        assert "{" not in found["objective"] + found["learning rate"]


def test_whoever_publishes_a_model_may_write_on_in_its_card(trained, train_here, run):
    final, *_ = trained
    (final / CARD).write_text("license: mine")
    load_state(final)
    config, fields = run
    assert train_here(config, **fields)[0] == final and (final / CARD).read_text() == "license: mine"

"""A job, without model and Ray: what it hands out, what it holds to be done, what it refuses, and what it leaves behind."""

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from schemas.config import Config
from schemas.conversation import templated
from schemas.errors import UserError
from schemas.models import open_tokenizer
from schemas.receipt import Layout, read_complete, read_receipts
from score_jobs.job import prepare, score
from score_jobs.progress import Progress
from score_jobs.survey import survey_here
from tests.score_jobs.made import MadePool


@pytest.fixture
def pool(monkeypatch: pytest.MonkeyPatch) -> type[MadePool]:
    """The pool that jobs of this test are given."""

    made = type("Pool", (MadePool,), {"asked": []})
    monkeypatch.setitem(sys.modules, "score_jobs.pool", SimpleNamespace(Pool=made))
    return made


@pytest.fixture
def config(tmp_path: Path, corpus_folder: Path, make_config: Callable[..., Config]) -> Config:
    """A job over three shards of its own; every document can be scored."""
    corpus = tmp_path / "corpus"
    shutil.copytree(corpus_folder, corpus)
    (corpus / "part-2.jsonl").unlink()
    return make_config(tmp_path, {"corpus.paths": [str(corpus / "part-*")]})


def changed(config: Config, section: str, **fields: Any) -> Config:
    return config.model_copy(update={section: getattr(config, section).model_copy(update=fields)})


def progress_file(config: Config) -> dict[str, Any]:
    return json.loads((config.score.output / Layout.PROGRESS).read_text())


def shards(config: Config) -> list[Path]:
    return sorted(Path(config.corpus.paths[0]).parent.iterdir())


def test_law_2_a_job_hands_out_what_has_no_receipt_in_order_and_the_dataset_is_whole_with_the_last(
    config: Config, pool: type[MadePool]
) -> None:
    layout, seen = Layout(config.score.output), list[tuple[str, int, int]]()

    def report(progress: Progress) -> None:
        seen.append((progress.note, progress.units, progress.units_left))

    first = score(config, report, limit=2)
    names = [unit.name for unit in pool.asked[0].units]
    assert list(first.receipts) == sorted(names) == layout.committed() and len(names) == 2
    assert first.left > 1 and not first.missing and read_complete(layout) is None
    assert pool.asked[0].canaries == []
    assert seen[:4] == [(f"survey, {done} of 3 shards", 0, 0) for done in range(4)]
    assert seen[4:] == [("score", 0, 2), ("score", 1, 1), ("score", 2, 0)]

    second = score(config)
    assert [unit.name for unit in pool.asked[0].units + pool.asked[1].units] == [*second.receipts]
    assert pool.asked[1].canaries == min(first.receipts.items())[1].canary != []
    assert (second.left, second.missing) == (0, []) and len(pool.asked[1].units) == first.left
    assert second.receipts == read_receipts(layout)
    assert second.new_tokens + first.new_tokens == sum(receipt.tokens for receipt in second.receipts.values())
    assert second.new_tokens == sum(second.receipts[unit.name].tokens for unit in pool.asked[1].units)
    assert read_complete(layout) == sorted(second.receipts)

    third = score(config)
    assert third.receipts == second.receipts and third.new_tokens == 0 and len(pool.asked) == 2


def test_a_limit_that_nothing_is_left_of_by_chance_makes_the_dataset_whole(
    config: Config, pool: type[MadePool]
) -> None:
    left = score(config, limit=1).left
    assert score(config, limit=left).left == 0 and read_complete(Layout(config.score.output)) is not None


def test_law_4_what_cannot_be_read_or_scored_is_named_the_rest_is_scored_and_the_dataset_is_not_whole(
    config: Config, pool: type[MadePool]
) -> None:
    good = shards(config)[0].read_bytes()
    shards(config)[0].write_bytes(good[:-9])
    pool.unable = staticmethod(lambda unit: "given up" if unit.name.startswith("part-1-00000") else None)
    found = score(config)
    assert [line.split(":")[0].rpartition("/")[2] for line in found.missing] == [
        "part-0.jsonl.zst",
        found.missing[1].split(":")[0],
    ]
    assert found.missing[1].startswith("part-1-00000-") and found.missing[1].endswith(": given up")
    assert found.left == 0 and read_complete(Layout(config.score.output)) is None
    assert len(found.receipts) == len(pool.asked[0].units) - 1 == len(read_receipts(Layout(config.score.output)))
    shards(config)[0].write_bytes(good)
    pool.unable = staticmethod(lambda unit: None)
    assert score(config).missing == [] and read_complete(Layout(config.score.output)) is not None
    # Broken again, it is still missing, though nothing else is left to do.
    (shards(config)[0].parent / "part-9.jsonl.zst").write_bytes(good[:-9])
    again = score(config)
    assert len(again.missing) == 1 and "part-9" in again.missing[0] and len(pool.asked) == 2


def test_a_whole_dataset_that_shards_were_added_to_is_whole_with_them(config: Config, pool: type[MadePool]) -> None:
    before = score(config).receipts
    added = shards(config)[1].parent / "part-7.jsonl"
    added.write_text('{"url": "u", "text": "one more"}\n')
    found = score(config)
    assert [unit.url for unit in pool.asked[1].units] == [str(added)]
    assert (
        read_complete(Layout(config.score.output)) == sorted(found.receipts) and len(found.receipts) == len(before) + 1
    )


def test_law_3_shards_that_changed_or_went_are_refused_with_what_was_scored_and_what_is_there(
    config: Config, pool: type[MadePool]
) -> None:
    stored = {receipt.shard: receipt.input_hash for receipt in score(config).receipts.values()}
    edited, gone, _ = shards(config)
    edited.write_bytes(edited.read_bytes() * 2)
    gone.unlink()
    with pytest.raises(UserError, match=r"corpus changed") as caught:
        score(config)
    first, second = caught.value.problem.splitlines()[1:]
    assert all(line.startswith("  part-") and line.endswith(" now") for line in (first, second))
    assert edited.name in first and stored[edited.name] in first and first.count(" now") == 1
    assert gone.name in second and stored[gone.name] in second and "no such shard or unreadable now" in second
    assert first.split(", ")[1] not in (f"{stored[edited.name]} now", "no such shard or unreadable now")
    assert "new score.output" in caught.value.fix and len(pool.asked) == 1


def bad_shard(config: Config, documents: int, bad: int) -> Config:
    """A corpus of one more shard, a unit for each of its documents, of which the first `bad` are empty."""
    rows = [{"url": str(row), "text": "" if row < bad else f"document {row}"} for row in range(documents)]
    path = shards(config)[0].parent / "bad.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return changed(changed(config, "corpus", paths=[str(path)]), "score", unit_bytes=10)


def test_too_many_in_quarantine_end_a_job_at_the_document_that_makes_them_enough_to_tell(
    config: Config, pool: type[MadePool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("score_jobs.job.EARLY_DOCUMENTS", 10)
    layout = Layout(config.score.output)
    few = changed(bad_shard(config, 40, bad=4), "score", max_quarantined=0.3)
    with pytest.raises(UserError, match=r"4 of 10 documents are in quarantine, 4 of them because: `text` is empty"):
        score(few)
    assert len(layout.committed()) == 10 and read_complete(layout) is None
    assert progress_file(few)["ended"] and progress_file(few)["units"] == 10
    with pytest.raises(UserError, match=r"4 of 11 documents"):  # what earlier jobs found counts
        score(changed(few, "score", max_quarantined=0.35))
    assert len(score(changed(few, "score", max_quarantined=0.4)).receipts) == 40  # not more than 4 of 10


def test_too_many_of_a_few_documents_in_quarantine_are_refused_at_the_end_and_whenever_it_is_run_again(
    config: Config, pool: type[MadePool]
) -> None:
    few = changed(bad_shard(config, 8, bad=4), "score", max_quarantined=0.3)
    for _ in range(2):
        with pytest.raises(UserError, match=r"4 of 8 documents.*score\.max_quarantined \(30%\)"):
            score(few)
    assert len(Layout(config.score.output).committed()) == 8 and len(pool.asked) == 1
    assert read_complete(Layout(config.score.output)) is None


def test_what_killed_writers_left_is_gone_before_a_job_begins_and_after_it_ends_and_a_finished_one_is_not_touched(
    config: Config, pool: type[MadePool]
) -> None:
    Layout(config.score.output).make()
    half = config.score.output / "units" / ".tmp-half"

    def unable(unit: object) -> None:
        assert not half.exists() or half.read_bytes() == b"of this job"
        half.write_bytes(b"of this job")

    half.write_bytes(b"of an earlier job")
    pool.unable = staticmethod(unable)
    score(config)
    assert not half.exists()
    half.write_bytes(b"x")
    score(config)
    assert half.exists()


@pytest.mark.parametrize("how", ["ends", "breaks"])
def test_the_dataset_says_how_its_last_job_ended(config: Config, pool: type[MadePool], how: str) -> None:
    def unable(unit: object) -> str:
        if how == "breaks" and pool.asked[0].retries:
            raise KeyboardInterrupt
        return "given up"

    pool.unable = staticmethod(unable)
    if how == "breaks":
        with pytest.raises(KeyboardInterrupt):
            score(config)
    else:
        score(config)
    found, asked = progress_file(config), pool.asked[0]
    assert found["ended"] is True and found["note"] == "end" and found["retries"] == asked.retries
    assert found["retries"] == (1 if how == "breaks" else len(asked.units))
    assert (found["workers"], found["in_flight"]) == (0, 0) and found["units_total"] == len(asked.units)


def test_while_a_job_runs_the_dataset_says_so(config: Config, pool: type[MadePool]) -> None:
    def unable(unit: object) -> None:
        found = progress_file(config)
        assert found["ended"] is False and found["note"] == "score"
        assert (found["workers"], found["in_flight"], found["retries"]) == (1, 1, 0)

    pool.unable = staticmethod(unable)
    score(config)


def test_law_3_other_settings_are_refused_field_by_field_and_receipts_without_their_dataset_too(
    config: Config, pool: type[MadePool]
) -> None:
    score(config, limit=1)
    layout = Layout(config.score.output)
    with pytest.raises(UserError, match=r"other settings") as caught:
        score(changed(changed(config, "context", window=32), "score", unit_bytes=1))
    lines = caught.value.problem.splitlines()[1:]
    assert lines == [
        "  context.window: 64 stored, 32 now",
        f"  scorer.unit_bytes: {config.score.unit_bytes} stored, 1 now",
    ]
    assert str(layout.dataset) in caught.value.problem and "new score.output" in caught.value.fix
    layout.dataset.unlink()
    with pytest.raises(UserError, match=r"dataset\.json: missing while receipts exist; .*new score\.output"):
        score(config)
    assert not layout.dataset.exists() and len(pool.asked) == 1


def test_workers_of_any_folder_and_node_get_whole_paths_and_the_template_itself(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert prepare(config, Layout(config.score.output)).corpus == config.corpus
    monkeypatch.chdir(tmp_path)
    shutil.copytree(config.score.model, "model")
    Path("template.jinja").write_text("{% for message in messages %}{{ message['content'] + eos_token }}{% endfor %}")
    chats = changed(config, "corpus", messages="messages", template="template.jinja")
    job = prepare(changed(chats, "score", model="model", output=Path("scores")), Layout(Path("scores")))
    assert job.model == tmp_path / "model" and job.score.output == tmp_path / "scores"
    assert job.context == config.context and job.fingerprint["context"]["window"] == config.context.window
    Path("template.jinja").unlink()
    tokenizer = templated(open_tokenizer(job.model, "score.model"), job.corpus)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False) == "a</s>"


def test_a_model_that_is_not_there_or_has_a_damaged_tokenizer_is_the_users_error_that_names_the_field(
    config: Config, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"score\.model: .*nowhere"):
        prepare(changed(config, "score", model="./nowhere"), Layout(config.score.output))
    model = Path(shutil.copytree(config.score.model, tmp_path / "model"))
    (model / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match=r"score\.model"):
        prepare(changed(config, "score", model=str(model)), Layout(config.score.output))
    assert not (config.score.output / "dataset.json").exists()


def test_units_of_other_settings_have_other_names(config: Config, pool: type[MadePool], tmp_path: Path) -> None:
    one = score(config, limit=1).receipts
    other = changed(changed(config, "context", window=32), "score", output=tmp_path / "other")
    assert not set(one) & set(score(other, limit=1).receipts)


@pytest.mark.parametrize("address", [None, "auto"])
def test_a_cluster_surveys_the_corpus_itself_and_a_ray_of_ones_own_listens_to_this_machine_alone(
    config: Config, pool: type[MadePool], monkeypatch: pytest.MonkeyPatch, address: str | None
) -> None:
    surveys = []

    def survey_on_cluster(asked: Any, *arguments: Any) -> None:
        surveys.append(asked)
        survey_here(*arguments)

    monkeypatch.setattr(sys.modules["score_jobs.pool"], "survey_on_cluster", survey_on_cluster, raising=False)
    monkeypatch.delenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", raising=False)
    config = changed(config, "score", address=address)
    assert score(config).receipts and len(pool.asked) == 1
    assert surveys == ([] if address is None else [config.score])
    assert os.environ.get("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER") == ("0" if address is None else None)


def test_a_job_holds_its_dataset_while_it_runs(config: Config, pool: type[MadePool]) -> None:
    def unable(unit: object) -> None:
        with pytest.raises(UserError, match="another `make score`"):
            score(config)

    pool.unable = staticmethod(unable)
    score(config, limit=1)

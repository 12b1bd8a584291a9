"""Laws of the demo's data: reproducible, OpenWebMath's shape, nothing held out leaks into training."""

import json
import re
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import zstandard

from pipeline.demo import chats
from pipeline.demo.data import Sources, build
from schemas.config import Demo
from schemas.errors import UserError

SCALE = 0.05
COLUMNS = ["url", "text", "date", "metadata"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    """A small build, shared by the tests that only read."""
    folder = tmp_path_factory.mktemp("demo") / "data"
    return folder, build(folder, seed=3, scale=SCALE)


def read(path: Path) -> list[dict]:
    """Rows of any of the files."""
    if path.suffix == ".parquet":
        return pq.read_table(path).to_pylist()
    data = path.read_bytes()
    if path.suffix == ".zst":
        data = zstandard.ZstdDecompressor().decompress(data)
    return [json.loads(line) for line in data.decode().splitlines()]


def rows_below(made: tuple[Path, dict], *parts: str) -> list[dict]:
    """Rows of every file below the named folders."""
    return [row for name in made[1]["files"] if name.startswith(parts) for row in read(made[0] / name)]


def phrases(text: str) -> set[tuple[str, ...]]:
    """Runs of five words, numbers left out: what all items of one template share."""
    words = re.findall(r"[a-z]+", text.lower())
    return {tuple(words[i : i + 5]) for i in range(len(words) - 4)}


def test_same_seed_gives_same_bytes_and_another_seed_others(made: tuple[Path, dict], tmp_path: Path) -> None:
    again, other = build(tmp_path / "a", seed=3, scale=SCALE), build(tmp_path / "b", seed=4, scale=SCALE)
    assert again == made[1]
    for name in again["files"]:
        assert (tmp_path / "a" / name).read_bytes() == (made[0] / name).read_bytes()
        assert other["files"][name]["sha256"] != again["files"][name]["sha256"]


def test_manifest_counts_what_the_files_hold(made: tuple[Path, dict]) -> None:
    for name, facts in made[1]["files"].items():
        assert facts["documents"] == len(read(made[0] / name)) > 0
        assert facts["bytes"] == (made[0] / name).stat().st_size
    assert {"numpy", "champ-dataset", "reasoning-gym"} <= set(made[1]["sources"])


def test_corpus_has_openwebmath_columns_and_unique_urls(made: tuple[Path, dict]) -> None:
    rows = rows_below(made, "corpus", "base")
    assert all(list(row) == COLUMNS and all(isinstance(value, str) for value in row.values()) for row in rows)
    assert all(isinstance(json.loads(row["metadata"]), dict) for row in rows)
    assert len({row["url"] for row in rows}) == len(rows)
    assert {Path(name).suffix for name in made[1]["files"] if name.startswith("corpus")} == {".zst", ".parquet"}


def test_problems_are_in_the_corpus_and_not_in_the_base_pages(made: tuple[Path, dict]) -> None:
    assert sum("Problem:" in row["text"] for row in rows_below(made, "corpus")) > 5
    assert not any("Problem:" in row["text"] and "\nAnswer:" in row["text"] for row in rows_below(made, "base"))


def test_no_heldout_text_in_training_text(made: tuple[Path, dict]) -> None:
    trained = "\n".join(row["text"] for row in rows_below(made, "corpus", "base", "reference"))
    known = phrases(trained)
    for row in rows_below(made, "heldout"):
        question = row["prompt"].removeprefix("Problem: ").removesuffix("\nAnswer:")
        assert question not in trained
        assert row.get("text", "").strip() not in trained or row.get("text") is None
        asked = phrases(question)
        assert len(asked & known) < 0.5 * len(asked) or row["id"].startswith("P_")


def thirteen_words(text: str) -> set[tuple[str, ...]]:
    """Every run of 13 words, or all words of a shorter text."""
    words = text.casefold().split()
    return {tuple(words[i : i + 13]) for i in range(max(1, len(words) - 12))}


def shared_runs(folder: Path, made: dict) -> list[str]:
    """Held-out items of which 13 words in a row, or the whole of a shorter prompt, stand in training text."""
    rows = rows_below((folder, made), "corpus", "base", "reference")
    known = {run for row in rows for run in thirteen_words(row["text"])}
    flat = " ".join(" ".join(row["text"].casefold().split()) for row in rows)
    found = []
    for row in rows_below((folder, made), "heldout"):
        prompt = " ".join(row["prompt"].casefold().split())
        if thirteen_words(row["prompt"] + row.get("text", "")) & known or prompt in flat:
            found.append(row["id"])
    return found


def test_no_13_words_of_a_heldout_item_stand_in_training_text(made: tuple[Path, dict]) -> None:
    assert shared_runs(*made) == []


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_no_13_words_of_a_heldout_item_stand_in_training_text_at_full_scale(tmp_path: Path, seed: int) -> None:
    made = build(tmp_path / "data", seed=seed)
    assert shared_runs(tmp_path / "data", made) == []
    held = rows_below((tmp_path / "data", made), "heldout")
    assert (
        len(held) == 480
        and sum("Problem:" in row["text"] for row in rows_below((tmp_path / "data", made), "corpus")) > 300
    )


def test_phrases_would_catch_a_leaked_template(made: tuple[Path, dict]) -> None:
    sources = Sources(3)
    known = phrases("\n".join(row["text"] for row in rows_below(made, "reference")))
    # A build this small does not use every template, so a quarter of many fresh items is enough.
    prompts = [prompt for _, prompt, _, _ in islice(sources.gsm(3, sources.templates.train), 60)]
    caught = [prompt for prompt in prompts if len(phrases(prompt) & known) > 0.5 * len(phrases(prompt))]
    assert len(caught) > len(prompts) / 4


def test_test_validation_and_training_share_no_template_and_no_problem(made: tuple[Path, dict]) -> None:
    sources = Sources(3)
    for split, count in ((sources.templates, 85), (sources.problems, 270)):
        assert len(split.train | split.validation | split.test) == count
        assert len(split.train) + len(split.validation) + len(split.test) == count
    for part, name in (("test", "target"), ("validation", "validation")):
        kept = made[1]["heldout"][part]
        assert kept["gsm_templates"] == sorted(getattr(sources.templates, part))
        assert kept["champ_problems"] == sorted(getattr(sources.problems, part))
        rows = read(made[0] / f"heldout/{name}.jsonl")
        champ = {row["id"] for row in rows if row["source"] == "champ"}
        assert champ and champ <= set(kept["champ_problems"])
        assert {row["template"] for row in rows if row["source"] == "gsm_symbolic"} <= set(kept["gsm_templates"])
    problems = read(made[0] / "heldout/problems.jsonl")
    assert problems and all(float(row["answer"]) is not None for row in problems)
    ranked = read(made[0] / "heldout/choices.jsonl")
    assert len(ranked) == 10 and all(len(row["choices"]) == 4 for row in ranked)
    assert {row["template"] for row in problems + ranked} <= set(made[1]["heldout"]["test"]["gsm_templates"])
    assert not {row["prompt"] for row in problems} & {row["prompt"] for row in read(made[0] / "heldout/target.jsonl")}


def test_more_noise_is_more_pages_around_the_same_problems(made: tuple[Path, dict], tmp_path: Path) -> None:
    sizes = Demo()
    noisy = build(tmp_path / "noisy", 3, SCALE, sizes.model_copy(update={"manuals": 2 * sizes.manuals}))
    heldout = [name for name in noisy["files"] if name.startswith("heldout")]
    assert all(noisy["files"][name] == made[1]["files"][name] for name in heldout)

    def share(manifest: tuple[Path, dict]) -> float:
        texts = [row["text"] for row in rows_below(manifest, "corpus")]
        inside = sum(len(part) for text in texts for part in text.split("\n\n") if part.startswith("Problem:"))
        return inside / sum(map(len, texts))

    assert share((tmp_path / "noisy", noisy)) < 0.75 * share(made)


def test_intact_data_is_kept_and_damaged_data_is_rebuilt(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    manifest = build(folder, seed=3, scale=SCALE)
    hurt = folder / "heldout/target.jsonl"
    before = hurt.stat().st_mtime_ns
    assert build(folder, seed=3, scale=SCALE) == manifest and hurt.stat().st_mtime_ns == before
    good = hurt.read_bytes()
    hurt.write_bytes(good[:-7])
    assert build(folder, seed=3, scale=SCALE) == manifest
    assert hurt.read_bytes() == good
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


@pytest.mark.parametrize("make", [build, chats.build])
def test_a_folder_of_other_things_is_never_overwritten(tmp_path: Path, make: Any) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(UserError, match=r"did not make.*empty folder"):
        make(tmp_path, seed=3, scale=SCALE)
    assert (tmp_path / "thesis.tex").read_text() == "mine"

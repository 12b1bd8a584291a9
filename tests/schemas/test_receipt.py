"""The contract's small files: what is written is read, what is damaged is refused and named."""

import json
import os
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.inspect import inspect
from pipeline.verify import verify
from schemas.config import Config
from schemas.errors import UserError
from schemas.receipt import (
    Canary,
    Layout,
    Receipt,
    is_unit,
    read_complete,
    read_dataset,
    read_receipt,
    read_receipts,
    read_version,
    write_complete,
    write_dataset,
    write_receipt,
)
from schemas.seal import seal
from tests.helpers import edit_sealed
from trainer.data import ScoreShards

VERSION_1 = Path(__file__).parents[1] / "data" / "version-1"
PARTS: dict[str, Any] = {part: {} for part in ("tokenizer", "model", "corpus", "context", "scorer")}
RECEIPT = Receipt(
    unit="u-1",
    shard="part.jsonl",
    first_document=0,
    end_document=3,
    input_hash="ab",
    bytes=10,
    sha256="cd",
    windows=4,
    tokens=40,
    documents=2,
    quarantined=1,
    quarantine_sha256="ef",
    loss_sum=1.5,
    loss_count=36,
    loss_histogram=[36, 0, 0, 0, 0, 0, 0, 0, 0],
    engine={"name": "hf-varlen"},
    seconds={"read": 0.5},
    canary=[Canary(tokens=[1, 2], ref_loss=[0.25])],
)


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    made = Layout(tmp_path / "scores")
    made.make()
    return made


@pytest.fixture
def version_1(tmp_path: Path) -> Layout:
    return Layout(Path(shutil.copytree(VERSION_1, tmp_path / "version-1")))


def test_the_files_of_a_unit_lie_where_the_contract_says(tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    assert layout.shard("u") == tmp_path / "units" / "u.parquet"
    assert layout.receipt("u") == tmp_path / "receipts" / "u.json"
    assert layout.quarantine("u") == tmp_path / "quarantine" / "u.jsonl"
    assert layout.dataset == tmp_path / "dataset.json" and layout.complete == tmp_path / "complete.json"
    assert layout.store.root == tmp_path
    layout.make()
    layout.make()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["quarantine", "receipts", "units"]


def test_a_sweep_deletes_what_killed_writers_left_and_nothing_else(layout: Layout) -> None:
    for folder in ("units", "receipts", "quarantine"):
        for name in (".tmp-x", "kept.json"):
            (layout.root / folder / name).write_text("")
    layout.sweep()
    assert sorted(path.name for path in layout.root.glob("*/*")) == ["kept.json"] * 3
    assert layout.committed() == ["kept"]


@pytest.mark.parametrize("name", ["", "..", "../x", "a/b", "a b", "a\x1b[31m", "a\n", "é", "a.b", "x" * 129])
def test_no_name_of_a_unit_leads_out_of_the_folder_or_drives_a_terminal(layout: Layout, name: str) -> None:
    assert not is_unit(name)
    for path in (layout.shard, layout.receipt, layout.quarantine):
        with pytest.raises(UserError, match=r"is not named as a unit is .*; move it away"):
            path(name)


@given(st.text())
def test_a_units_name_is_one_ascii_path_component(name: str) -> None:
    if is_unit(name):
        assert name.isascii() and Path("/root", name).parent == Path("/root") and len(name) <= 128
    assert is_unit("part-0_A-00000-" + "f" * 16) and is_unit("x" * 128)


def test_a_receipt_is_written_once_and_read_back_field_by_field(layout: Layout) -> None:
    assert write_receipt(layout, RECEIPT) is True
    assert write_receipt(layout, replace(RECEIPT, tokens=41)) is False
    assert read_receipt(layout.receipt("u-1")) == RECEIPT
    assert write_receipt(layout, replace(RECEIPT, unit="a"))
    assert read_receipts(layout) == {"a": replace(RECEIPT, unit="a"), "u-1": RECEIPT}
    assert list(read_receipts(layout)) == ["a", "u-1"]


def test_a_receipt_under_another_name_is_refused(layout: Layout) -> None:
    write_receipt(layout, RECEIPT)
    shutil.copy(layout.receipt("u-1"), layout.receipt("u-2"))
    with pytest.raises(UserError, match=r"u-2\.json: is the receipt of unit 'u-1', not of 'u-2'; delete it and its"):
        read_receipts(layout)


@pytest.mark.parametrize(
    "changes",
    [
        {"tokens": -1}, {"bytes": 2**63}, {"windows": 1.5}, {"tokens": "3"}, {"documents": True}, {"unit": 5},
        {"loss_histogram": [1] * 8}, {"loss_histogram": [1] * 10}, {"loss_histogram": [-1] * 9}, {"more": 1},
        {"canary": [{"tokens": [1]}]}, {"engine": []}, {"quarantine_sha256": 5},
    ],
)  # fmt: skip
def test_a_sealed_receipt_of_another_shape_is_refused_and_named(layout: Layout, changes: dict[str, Any]) -> None:
    layout.receipt("u-1").write_bytes(seal(asdict(RECEIPT) | changes))
    with pytest.raises(UserError, match=r"u-1\.json: not a receipt \(.*\); delete it and run `make score` again"):
        read_receipts(layout)


def test_a_receipt_without_a_field_is_refused(layout: Layout) -> None:
    for name in asdict(RECEIPT).keys() - {"canary", "committed"}:
        content = asdict(RECEIPT)
        del content[name]
        layout.receipt("u-1").write_bytes(seal(content))
        with pytest.raises(UserError, match=r"u-1\.json: not a receipt"):
            read_receipts(layout)


def test_a_damaged_receipt_is_the_users_error_and_is_named(layout: Layout) -> None:
    good = seal(asdict(RECEIPT))
    deep = b'{"a":' * 10_000 + b"1" + b"}" * 10_000
    for damage in (b"", good[:100], b"{}", b"[]", b"5", good.replace(b'"tokens"', b'"tok"'), deep, b"\xff\xfe"):
        layout.receipt("u-1").write_bytes(damage)
        with pytest.raises(UserError, match=r"u-1\.json: cannot be trusted \(.*\); delete it and run"):
            read_receipts(layout)


def test_a_receipt_that_is_a_folder_or_a_pipe_is_named_and_never_waited_for(layout: Layout) -> None:
    layout.receipt("a").mkdir()
    with pytest.raises(UserError, match=r"a\.json: cannot be trusted \(not a file\)"):
        read_receipts(layout)
    layout.receipt("a").rmdir()
    os.mkfifo(layout.receipt("a"))
    with pytest.raises(UserError, match=r"a\.json: cannot be trusted \(not a file\)"):
        read_receipts(layout)


def test_dataset_json_is_written_once_and_read_back(layout: Layout) -> None:
    with pytest.raises(UserError, match=r"dataset\.json: missing, so this is not a score dataset; run `make score`"):
        read_dataset(layout)
    write_dataset(layout, {"schema_version": 2, "a": 2, **PARTS})
    write_dataset(layout, {"schema_version": 2, "a": 3, **PARTS})
    assert read_dataset(layout) == {"schema_version": 2, "a": 2, **PARTS}
    assert json.loads(layout.dataset.read_text())["schema_version"] == read_version(layout) == 2


def test_dataset_json_that_is_lost_is_to_be_restored_not_scored_again(layout: Layout) -> None:
    write_receipt(layout, RECEIPT)
    with pytest.raises(UserError, match=r"dataset\.json: missing, though there are receipts; restore it"):
        read_dataset(layout)


@pytest.mark.parametrize("fingerprint", [None, [], 5, {}, *({**PARTS, part: None} for part in PARTS)])
def test_dataset_json_without_a_whole_fingerprint_is_refused(layout: Layout, fingerprint: Any) -> None:
    layout.dataset.write_bytes(seal({"schema_version": 2, "fingerprint": fingerprint}))
    with pytest.raises(UserError, match=r"dataset\.json: has no whole `fingerprint`; restore it"):
        read_dataset(layout)


@pytest.mark.parametrize("version", [0, 3, -1, 2.0, "2", True, None, [2]])
def test_a_schema_version_that_is_not_known_is_refused(layout: Layout, version: Any) -> None:
    layout.dataset.write_bytes(seal({"schema_version": version, "fingerprint": {"schema_version": version, **PARTS}}))
    with pytest.raises(UserError, match=r"dataset\.json: schema version .*reads \(1, 2\); use a newer one"):
        read_dataset(layout)


def test_dataset_json_of_version_2_is_never_read_without_its_seal(layout: Layout) -> None:
    for version in (1, 2):
        raw = {"schema_version": version, "fingerprint": {"schema_version": version, **PARTS}}
        plain, damaged = json.dumps(raw).encode(), seal(raw).replace(b"tokenizer", b"tokenizes")
        for content in (damaged, b"[", *([plain] if version == 2 else [])):
            layout.dataset.write_bytes(content)
            with pytest.raises(UserError, match=r"dataset\.json: cannot be trusted \(.*\); restore it from a copy"):
                read_dataset(layout)
        layout.dataset.write_bytes(plain if version == 1 else seal(raw))
        assert read_version(layout) == version


def test_complete_json_is_none_then_the_sorted_units_and_is_not_rewritten_needlessly(layout: Layout) -> None:
    assert read_complete(layout) is None
    write_complete(layout, ["b", "a"])
    assert read_complete(layout) == ["a", "b"]
    before = layout.complete.stat()
    write_complete(layout, ["a", "b"])
    assert layout.complete.stat().st_ino == before.st_ino
    write_complete(layout, ["a", "b", "c"])
    assert read_complete(layout) == ["a", "b", "c"]


@pytest.mark.parametrize("units", [None, "ab", {"a": 1}, [1], ["a", None], ["../a"], [["a"]]])
def test_complete_json_without_names_of_units_is_refused(layout: Layout, units: Any) -> None:
    layout.complete.write_bytes(seal({"units": units}))
    with pytest.raises(UserError, match=r"complete\.json: has no list of units; delete it and run .* anew"):
        read_complete(layout)
    for damaged in (seal({"units": units})[:-2], b'{"units": ["a"]}'):
        layout.complete.write_bytes(damaged)
        with pytest.raises(UserError, match=r"complete\.json: cannot be trusted .*; delete it and run .* anew"):
            read_complete(layout)


def test_data_of_version_1_are_verified_inspected_and_read(version_1: Layout, capsys: pytest.CaptureFixture) -> None:
    assert verify(version_1.root, progress=False) == []
    inspect(version_1.root, documents=1)
    assert "830" in capsys.readouterr().out
    shards = ScoreShards(version_1.root, partial=True)
    windows = [window for group in range(len(shards.group_sizes)) for window in shards.read(group)]
    assert len(windows) == 18 and sum(len(window.tokens) for window in windows) == 830
    assert {window.row for window in windows} == {-1}


def test_data_of_version_1_cannot_say_that_they_are_whole(version_1: Layout) -> None:
    with pytest.raises(UserError, match=r"train\.partial"):
        ScoreShards(version_1.root)


def test_receipts_of_two_versions_are_never_mixed(version_1: Layout, scores: Config, tmp_path: Path) -> None:
    new = Layout(Path(shutil.copytree(scores.score.output, tmp_path / "scores")))
    old_unit, new_unit = version_1.committed()[0], new.committed()[0]
    shutil.copy(version_1.receipt(old_unit), new.receipt(old_unit))
    shutil.copy(version_1.shard(old_unit), new.shard(old_unit))
    with pytest.raises(UserError, match=rf"{old_unit}\.json: cannot be trusted \(it holds no hash of itself\)"):
        ScoreShards(new.root, partial=True)
    shutil.copy(new.receipt(new_unit), version_1.receipt(new_unit))
    shutil.copy(new.shard(new_unit), version_1.shard(new_unit))
    with pytest.raises(UserError, match=rf"{new_unit}\.json: not a receipt"):
        ScoreShards(version_1.root, partial=True)
    assert any(new_unit in problem for problem in verify(version_1.root, progress=False))


def test_a_unit_of_version_1_among_new_ones_is_refused_though_it_is_sealed(
    version_1: Layout, scores: Config, tmp_path: Path
) -> None:
    new = Layout(Path(shutil.copytree(scores.score.output, tmp_path / "scores")))
    unit = version_1.committed()[0]
    for name in ("shard", "receipt", "quarantine"):
        shutil.copy(getattr(version_1, name)(unit), getattr(new, name)(unit))
    edit_sealed(new.receipt(unit))
    edit_sealed(new.complete, units=new.committed())
    with pytest.raises(UserError, match=r"schema_version: 2 stored, 1 now"):
        ScoreShards(new.root)
    assert any(f"{unit}.parquet: fingerprint differs" in problem for problem in verify(new.root, progress=False))

"""Damage of every kind, everywhere in a score dataset: verify finds it, training refuses it, nothing ends in a traceback."""

import io
import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from pipeline.inspect import inspect
from pipeline.verify import verify
from schemas.config import Config
from schemas.errors import UserError
from schemas.receipt import Layout
from schemas.shard import METADATA_KEY, Window, encode_shard, open_shard, read_group, shard_metadata, shard_schema
from tests.helpers import edit_sealed
from trainer.data import ScoreShards

VERSION_1 = Path(__file__).parents[1] / "data" / "version-1"
HOSTILE = "\x1b[2J\x1b]0;owned\x07[/] [red]\r\x9b31m\u202e\ud800"


@pytest.fixture
def layout(scores: Config, tmp_path: Path) -> Layout:
    return Layout(Path(shutil.copytree(scores.score.output, tmp_path / "scores")))


def committed_files(layout: Layout) -> list[Path]:
    return [path for path in sorted(layout.root.rglob("*")) if path.is_file() and not path.name.startswith(".")]


def problems(layout: Layout) -> list[str]:
    return verify(layout.root, progress=False)


def shown(path: Path) -> str:
    output = io.StringIO()
    inspect(path, None, 3, Console(file=output, width=160, force_terminal=True, color_system=None))
    return output.getvalue()


def read_everything(root: Path) -> list[tuple[object, ...]]:
    """What training would read, in a form that can be compared."""
    shards = ScoreShards(root)
    return [
        (window.doc_id, window.row, window.index, window.tokens.tobytes(), np.asarray(window.ref_loss).tobytes())
        for group in range(len(shards.group_sizes))
        for window in shards.read(group)
    ]


def flips(layout: Layout, count: int, seed: int) -> Iterator[tuple[Path, int]]:
    """Every kind of file in turn, a bit anywhere in it; a third of a shard's lie in its footer."""
    kinds: dict[str, list[Path]] = {}
    for path in committed_files(layout):
        kinds.setdefault(path.parent.name if path.parent != layout.root else path.name, []).append(path)
    assert set(kinds) == {"units", "receipts", "quarantine", "dataset.json", "complete.json"}
    rng = random.Random(seed)
    for number in range(count):
        path = rng.choice(kinds[sorted(kinds)[number % len(kinds)]])
        size = path.stat().st_size
        footer = int.from_bytes(path.read_bytes()[-8:-4], "little") if path.suffix == ".parquet" else size
        first = size - 8 - footer if path.suffix == ".parquet" and rng.random() < 1 / 3 else 0
        yield path, rng.randrange(8 * first, 8 * size)


def no_flip_passes(layout: Layout, count: int, seed: int) -> None:
    windows = read_everything(layout.root)
    for path, bit in flips(layout, count, seed):
        good = path.read_bytes()
        damaged = bytearray(good)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        found = problems(layout)
        assert any(str(path) in problem for problem in found), (path, bit)
        assert len(found) == 1, (path, bit, found)
        try:
            assert read_everything(layout.root) == windows, (path, bit)
            assert path.parent.name in ("quarantine", "units"), (path, bit)  # a flip that changes no value of a shard
        except UserError:
            pass
        path.write_bytes(good)
    assert problems(layout) == []


def test_verify_finds_every_flipped_bit_in_every_file(layout: Layout) -> None:
    no_flip_passes(layout, count=150, seed=0)


@pytest.mark.slow
def test_verify_finds_each_of_a_thousand_flipped_bits(layout: Layout) -> None:
    no_flip_passes(layout, count=1000, seed=1)


@pytest.mark.parametrize("keep", [0.0, 0.3, 0.999])
def test_every_file_that_is_cut_short_is_found_and_never_trained_on(layout: Layout, keep: float) -> None:
    for path in committed_files(layout):
        good = path.read_bytes()
        path.write_bytes(good[: int(keep * len(good))])
        assert any(str(path) in problem for problem in problems(layout)), path
        if path.parent.name != "quarantine":
            with pytest.raises(UserError):
                read_everything(layout.root)
        path.write_bytes(good)


def test_every_file_that_is_missing_is_found_and_named(layout: Layout) -> None:
    for path in committed_files(layout):
        good = path.read_bytes()
        path.unlink()
        assert any(path.stem in problem for problem in problems(layout)), path
        if path.parent.name != "quarantine":
            with pytest.raises(UserError):
                read_everything(layout.root)
        path.write_bytes(good)


@pytest.mark.parametrize("kind", ["shard", "receipt"])
def test_files_swapped_between_units_are_both_found(layout: Layout, kind: str) -> None:
    one, other = (getattr(layout, kind)(unit) for unit in layout.committed()[:2])
    first = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(first)
    text = "\n".join(problems(layout))
    assert str(one) in text and str(other) in text
    with pytest.raises(UserError):
        read_everything(layout.root)


@pytest.mark.parametrize("careful", [False, True])
def test_a_copy_of_a_unit_under_another_name_is_found_and_never_counted_twice(layout: Layout, careful: bool) -> None:
    unit = layout.committed()[0]
    shutil.copy(layout.shard(unit), layout.shard("copy"))
    shutil.copy(layout.receipt(unit), layout.receipt("copy"))
    if careful:  # the receipt says it is the copy's, and so does complete.json
        edit_sealed(layout.receipt("copy"), unit="copy")
        edit_sealed(layout.complete, units=layout.committed())
    assert any("copy" in problem for problem in problems(layout))
    with pytest.raises(UserError, match="copy"):
        read_everything(layout.root)


def test_a_unit_of_another_dataset_is_to_be_removed_or_scored_to_the_end(layout: Layout) -> None:
    unit = layout.committed()[0]
    edit_sealed(layout.complete, units=layout.committed()[1:])
    (problem,) = problems(layout)
    assert unit in problem and "run `make score` if shards were added" in problem
    layout.receipt(unit).unlink()
    (problem,) = problems(layout)
    assert str(layout.shard(unit)) in problem and problem.endswith("not committed (no receipt); delete it")


@pytest.mark.parametrize("name", ["units/a b.parquet", "receipts/..json", "receipts/[.json", "quarantine/a.txt"])
def test_what_is_no_file_of_a_unit_is_to_be_moved_away(layout: Layout, name: str) -> None:
    (layout.root / name).write_bytes(b"")
    found = problems(layout)
    assert found == [f"{layout.root / name}: does not belong there; move it away"]


def test_a_folder_or_a_pipe_in_the_place_of_a_shard_is_found_and_never_waited_for(layout: Layout) -> None:
    first, second = (layout.shard(unit) for unit in layout.committed()[:2])
    for path in (first, second):
        path.unlink()
    first.mkdir()
    os.mkfifo(second)
    text = "\n".join(problems(layout))
    assert f"{first}: missing, but it has a receipt" in text and f"{second}: missing" in text


def test_a_damaged_dataset_json_costs_no_receipt_in_any_version(layout: Layout, tmp_path: Path) -> None:
    old = Layout(Path(shutil.copytree(VERSION_1, tmp_path / "old")))
    for each in (layout, old):
        good = each.dataset.read_bytes()
        damages = (b"", good[:-9], good.replace(b"float32", b"float16"), b'{"fingerprint": null}', b"[" * 10_000)
        for damaged in damages:
            each.dataset.write_bytes(damaged)
            (problem,) = problems(each)
            assert str(each.dataset) in problem and "restore it from a copy" in problem and "delete" not in problem


def test_a_shard_of_other_settings_is_found_also_where_dataset_json_is_lost(layout: Layout) -> None:
    unit = layout.committed()[0]
    path, file = layout.shard(unit), open_shard(layout.shard(unit))
    metadata = shard_metadata(path, file)
    content = {"fingerprint": metadata.fingerprint | {"more": 1}, "unit": unit}
    path.write_bytes(encode_shard(read_group(path, file, 0), file.schema_arrow.remove_metadata(), content))
    from schemas.store import sha256_file

    edit_sealed(layout.receipt(unit), bytes=path.stat().st_size, sha256=sha256_file(path))
    layout.dataset.unlink()
    lost, other = problems(layout)
    assert "missing, though there are receipts; restore it" in lost
    assert str(path) in other and "more: nothing stored, 1 now" in other


@pytest.mark.parametrize(
    ("field", "value"), [("loss_sum", 1.0), ("documents", 1), ("quarantined", 9), ("loss_histogram", [1] * 9)]
)
def test_every_count_of_a_receipt_is_made_again(layout: Layout, field: str, value: object) -> None:
    edit_sealed(layout.receipt(layout.committed()[0]), **{field: value})
    assert any(field in problem for problem in problems(layout))


def write_shard(path: Path, doc_id: str = "x", metadata: bytes | None = None) -> Path:
    windows = [
        Window(doc_id=f"{doc_id}{i}", index=0, tokens=np.arange(9) + i, ref_loss=np.array([np.nan, *range(8)], "f2"))
        for i in range(30)
    ]
    path.write_bytes(encode_shard(windows, shard_schema(500, False), {"fingerprint": {}, "unit": path.stem}))
    if metadata is not None:
        table = pq.read_table(path)
        pq.write_table(table.replace_schema_metadata({METADATA_KEY: metadata}), path)
    return path


@pytest.mark.parametrize(
    "metadata",
    [
        b"", b"\xff\x00", b"null", b"[]", b"{}", b'{"fingerprint": {}}', b'{"fingerprint": [], "unit": "u"}',
        b'{"fingerprint": {}, "unit": 5}', b'{"fingerprint": {"a": NaN}, "unit": "u"}',
        b'{"fingerprint": {"a": ' + b"9" * 5000 + b'}, "unit": "u"}',
        b'{"fingerprint": ' + b'{"a":' * 900 + b"1" + b"}" * 900 + b', "unit": "u"}',
        b'{"fingerprint": ' + b"[" * 100_000 + b"]" * 100_000 + b', "unit": "u"}',
    ],
)  # fmt: skip
def test_hostile_metadata_are_one_message_that_names_the_shard(tmp_path: Path, metadata: bytes) -> None:
    path = write_shard(tmp_path / "u.parquet", metadata=metadata)
    with pytest.raises(UserError, match=r"u\.parquet: damaged metadata"):
        shard_metadata(path, open_shard(path))
    with pytest.raises(UserError, match=r"u\.parquet: damaged metadata"):
        shown(path)
    (problem,) = verify(path)
    assert "damaged metadata" in problem


def test_hostile_metadata_that_are_well_formed_are_shown_and_compared(tmp_path: Path) -> None:
    hostile = {"a": -(10**300), "b": HOSTILE, HOSTILE: {HOSTILE: [HOSTILE]}, "c": "x" * 100_000}
    path = write_shard(tmp_path / "u.parquet", metadata=json.dumps({"fingerprint": hostile, "unit": "u"}).encode())
    assert verify(path) == []
    no_control(shown(path))


def no_control(text: str) -> None:
    assert all(letter.isprintable() or letter in "\n\t" for letter in text), repr(text)


def test_nothing_in_a_shard_drives_the_terminal_or_is_markup(tmp_path: Path) -> None:
    folder = tmp_path / "\x1b[31m[/] [red]\n"
    folder.mkdir(parents=True)
    path = write_shard(folder / "u.parquet", doc_id=HOSTILE.replace("\ud800", ""))
    text = shown(path)
    no_control(text)
    assert "[/] [red]" in text
    table = pq.read_table(path)
    losses = pa.array([[0.5] * 9] * 30, table.schema.field("ref_loss").type)
    pq.write_table(
        table.set_column(table.schema.get_field_index("ref_loss"), table.schema.field("ref_loss"), losses), path
    )
    (problem,) = verify(path)
    assert "\n" not in problem and "[/] [red]" in problem
    no_control(problem)


@pytest.mark.parametrize("change", ["rename", "retype", "drop", "nullable", "add"])
def test_columns_that_are_not_a_score_shards_are_one_message(tmp_path: Path, change: str) -> None:
    path = write_shard(tmp_path / "u.parquet")
    table = pq.read_table(path)
    place = table.schema.get_field_index("tokens")
    made: dict[str, Callable[[], Any]] = {
        "rename": lambda: table.rename_columns({"tokens": "token"}),
        "retype": lambda: table.set_column(place, "tokens", pa.array([1] * 30)),
        "drop": lambda: table.drop_columns(["token_hash"]),
        "nullable": lambda: table.set_column(place, table.schema.field("tokens").with_nullable(True), table["tokens"]),
        "add": lambda: table.append_column("more", pa.array([1] * 30)),
    }
    pq.write_table(made[change]().replace_schema_metadata(table.schema.metadata), path)
    for call in (open_shard, shown):
        with pytest.raises(UserError, match=r"u\.parquet: its columns are not those of a score shard"):
            call(path)
    (problem,) = verify(path)
    assert "its columns" in problem


def test_random_bytes_in_footers_and_pages_are_a_message_or_change_nothing(tmp_path: Path) -> None:
    path = write_shard(tmp_path / "u.parquet")
    good = path.read_bytes()
    footer = int.from_bytes(good[-8:-4], "little")
    rng = random.Random(0)
    refused = 0
    for number in range(400):
        damaged = bytearray(good)
        first = len(good) - 8 - footer if number % 2 else 0
        for _ in range(rng.choice((1, 1, 4, 32))):
            damaged[rng.randrange(first, len(good))] = rng.randrange(256)
        path.write_bytes(damaged)
        try:
            file = open_shard(path)
            shard_metadata(path, file)
            for group in range(file.num_row_groups):
                read_group(path, file, group)
            shown(path)
        except UserError as error:
            refused += "u.parquet" in error.problem
        verify(path)
    assert refused > 200

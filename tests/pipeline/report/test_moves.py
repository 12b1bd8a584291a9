"""Dynamics on the page: shares beside the paper's, tokens with their figures, selections of three times."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.dynamics import Followed, Sample, encode
from pipeline.report.moves import dynamics_sections, read_moves, selection_sections
from schemas.errors import UserError
from schemas.models import open_tokenizer
from schemas.shard import Window


@pytest.fixture
def folder(tiny_model: Path, tmp_path: Path) -> Path:
    """A run's folder with what `tokensift dynamics` leaves there: 30 tokens under four models."""
    tokenizer = open_tokenizer(tiny_model, "base")
    tokens = np.array(tokenizer("<b>Let</b> $x$ be a root; then the sum of odd numbers is 144 & more")["input_ids"])[
        :31
    ]
    sample = Sample([Window("page <1>", 0, tokens, None)], [1], "corpus")
    rng = np.random.default_rng(0)
    losses = rng.uniform(1, 5, (4, len(tokens) - 1)).astype(np.float32)
    found = Followed(losses, rng.uniform(1, 5, len(tokens) - 1).astype(np.float32), 0.3)
    points = [{"model": f"step-{n}", "step": n, "tokens_seen": 1000 * n, "position": n} for n in range(4)]
    figures: dict[str, Any] = {"sample": "corpus", "windows": 1, "tokens": len(tokens) - 1, "checkpoints": points}
    run = tmp_path / "slm"
    run.mkdir()
    (run / "dynamics.json").write_text(json.dumps(figures | found.figures()))
    (run / "dynamics.parquet").write_bytes(encode(sample, found, tokenizer))
    return run


def test_shares_and_tokens_are_those_of_the_files(folder: Path) -> None:
    moves = read_moves(folder)
    assert moves.arm == "slm"
    html = "".join(section.html for section in dynamics_sections(moves))
    for name, paper in (("H→L", "26%"), ("L→L", "51%"), ("L→H", "12%"), ("H→H", "11%")):
        share = moves.figures["categories"][name]["share"]
        assert f"<td>{share:.0%}</td><td>{paper}</td>" in html
    row = moves.windows[0][0]
    assert f"{row['category']}, live {row['losses'][0]:.2f} → {row['losses'][2]:.2f} → {row['losses'][3]:.2f}" in html
    assert "<b>" not in html and "page &lt;1&gt;" in html


def test_each_times_selection_is_underlined(folder: Path) -> None:
    moves = read_moves(folder)
    (section,) = selection_sections(moves)
    blocks = section.html.split("<h4>")[1:]
    assert [block.split("</h4>")[0].split(", at the ")[1] for block in blocks] == ["start", "middle", "end"]
    for block, place in zip(blocks, (0, 1, 3), strict=True):
        assert block.count("class=kept") == sum(row["kept"][place] for row in moves.windows[0]) == 9
    agree = moves.figures["agreement"][0]
    assert (
        f"{agree[1]:.0%} are among them in the middle" in section.caption
        and f"{agree[3]:.0%} at the end" in section.caption
    )


def test_damage_is_named(folder: Path) -> None:
    (folder / "dynamics.json").write_text("{")
    with pytest.raises(UserError, match=r"dynamics\.json"):
        read_moves(folder)

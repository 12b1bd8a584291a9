"""Law 13 on real families: windows share rows only where that changes no loss, in scoring and in training."""

import re
from pathlib import Path

import pytest
import transformers

from benchmarks.families import TOLERANCE_NATS, WALK, page, walk

ROOT = Path(__file__).resolve().parents[2]
# One of each kind that once was silently wrong or needs another way: what the walk over all of them must say.
KINDS = {
    "llama": "varlen",
    "mistral": "varlen",  # sliding window
    "gemma2": "packed",  # soft cap
    "gpt2": "varlen",  # learned positions that are handed in; dropout in its config
    "opt": "varlen",  # learned positions; told of boundaries it shares rows
    "bloom": "alone",  # ALiBi
    "openai-gpt": "alone",
    "mamba": "alone",  # recurrent state
    "recurrent_gemma": "alone",
    "jamba": "alone",  # hybrid
    "bert": "refused",  # not causal at all
    "bert as decoder": "varlen",
    "phi3": "varlen",
    "phi3 with longrope beyond 5": "refused",  # the longest window of a batch changes the rope of all
}


def test_a_family_of_each_kind_shares_rows_has_its_own_or_is_refused_and_is_never_wrong() -> None:
    found = {verdict.family: verdict for verdict in walk(list(KINDS))}
    assert {family: verdict.way for family, verdict in found.items()} == KINDS, found
    assert all(verdict.nats <= TOLERANCE_NATS for verdict in found.values())
    assert "not causal" in found["bert"].why and not found["gemma2"].linear and found["llama"].linear


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_no_family_of_the_installed_transformers_is_silently_wrong() -> None:
    verdicts = list(walk(WALK))
    ways = [verdict.way for verdict in verdicts]
    assert "wrong" not in ways and ways.count("packed") > 50 and ways.count("alone") > 15
    assert page(verdicts).count("\n| ") == len(verdicts) + 1


def test_the_page_of_families_is_of_the_pinned_transformers_and_knows_no_wrong_one() -> None:
    text = (ROOT / "docs" / "families.md").read_text()
    assert f"transformers {transformers.__version__}" in text.replace("\n", " ")
    assert "**0 silently wrong**" in text and not re.search(r"^\| \S+ \| \S+ \| wrong", text, re.M)

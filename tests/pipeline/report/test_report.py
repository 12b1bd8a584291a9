"""The report tells the truth about the curves, loads nothing, and escapes whatever a document holds."""

import base64
import hashlib
import html
import json
import math
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from pipeline.dynamics import dynamics
from pipeline.experiment.cost import Cost, Work, first_reach
from pipeline.report.arms import (
    Arm,
    compute_caption,
    compute_curve,
    headline,
    ratio,
    read_arms,
    smooth,
)
from pipeline.report.build import bill_sections, build_report, contrast, origin
from pipeline.report.chart import short, ticks
from pipeline.report.page import SCRIPT
from pipeline.report.text import judge_documents
from schemas.config import Config, Part
from schemas.errors import UserError
from schemas.receipt import Layout, read_dataset, read_receipts
from schemas.shard import Window, encode_shard, open_shard, read_windows, shard_schema

STEP = 40_960
HOSTILE = '<script>alert("x")</script><img src="https://evil.example/x.png">'
SPEED = {"clm": 1.0, "random": 0.8, "slm": 2.5}


def losses_of(arm: str, steps: int = 40) -> list[tuple[float, float]]:
    """A plausible decay, as fast as the arm is."""
    return [
        (step * STEP, 2.4 + 2.1 * math.exp(-3.0 * SPEED[arm] * step / steps) + 0.02 * math.sin(step))
        for step in range(steps + 1)
    ]


def write_metrics(folder: Path, arm: str, steps: int = 40) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for step, (tokens, loss) in enumerate(losses_of(arm, steps)):
        rows.append({"kind": "eval", "step": step, "tokens_seen": tokens, "target_loss": loss})
        keep = 1.0 if arm == "clm" else 0.6
        gap = {"clm": 0.0, "random": 0.0, "slm": 0.9}[arm]
        wave = 0.05 * math.sin(7 * step)
        rows.append(
            {"kind": "train", "step": step + 1, "tokens_seen": tokens + STEP, "tokens_selected": (tokens + STEP) * keep,
             "loss_all": loss + 1, "loss_kept": loss + 1 + gap + wave, "tokens_per_second": 9_000 + 100 * step,
             "loss_dropped": None if arm == "clm" else loss + 1 - gap - wave, "keep": keep}
        )  # fmt: skip
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def experiment(scores: Config, tiny_model: Path, tmp_path: Path) -> Config:
    """Three finished arms with made curves, real scores, and one hostile document in the first shard."""
    raw = scores.model_dump(mode="json", exclude_none=True)
    raw["score"]["output"] = shutil.copytree(scores.score.output, tmp_path / "scores")
    raw["train"]["output"] = tmp_path / "train"
    raw["reference"] = {"corpus": raw["corpus"], "train": raw["train"] | {"output": tmp_path / "reference"}}
    config = Config.model_validate(raw)
    for arm in SPEED:
        write_metrics(tmp_path / "train" / arm, arm)
        shutil.copytree(tiny_model, tmp_path / "train" / arm / "final")
    write_metrics(tmp_path / "reference", "clm", steps=6)
    poison(Layout(config.score.output), tiny_model)
    return config


def poison(layout: Layout, model: Path) -> None:
    unit = next(iter(read_receipts(layout)))
    path = layout.shard(unit)
    windows = read_windows(open_shard(path).read())
    old = next(window for window in windows if len(window.tokens) >= 60)
    tokens = AutoTokenizer.from_pretrained(model)(HOSTILE, return_tensors="np")["input_ids"][0][:60]
    hostile = Window(HOSTILE, 0, tokens, old.ref_loss[: len(tokens)], old.ref_entropy[: len(tokens)])
    path.write_bytes(
        encode_shard([hostile, *windows], shard_schema(512, True), {"fingerprint": read_dataset(layout), "unit": unit})
    )


class Tags(HTMLParser):
    """Every tag and attribute of a page, its text, and its scripts."""

    def __init__(self, page: str):
        super().__init__()
        self.tags: set[str] = set()
        self.scripts: list[str] = []
        self.policy = ""
        self.attributes: set[str] = set()
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        if dict(attrs).get("http-equiv") == "Content-Security-Policy":
            self.policy = dict(attrs)["content"] or ""

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.cdata_elem == "script":
            self.scripts.append(data)


@given(
    losses=st.lists(st.floats(0.1, 10), min_size=2, max_size=30),
    gaps=st.lists(st.integers(1, 10**6), min_size=30, max_size=30),
    target=st.floats(0.1, 10),
)
def test_a_curve_is_above_the_target_until_it_first_reaches_it(
    losses: list[float], gaps: list[int], target: float
) -> None:
    tokens = [float(sum(gaps[:index])) for index in range(len(losses))]
    found = first_reach(list(zip(tokens, losses, strict=True)), target)
    if found is None:
        assert min(losses) > target
        return
    before = [loss for at, loss in zip(tokens, losses, strict=True) if at < found]
    assert all(loss > target for loss in before)
    after = next(index for index, at in enumerate(tokens) if at >= found)
    assert losses[after] <= target or math.isclose(found, tokens[after], rel_tol=1e-9)


@given(slope=st.floats(1e-6, 1e-3), share=st.floats(0, 1))
def test_on_a_straight_line_the_crossing_is_exact(slope: float, share: float) -> None:
    curve = [(x, 5.0 - slope * x) for x in (0.0, 300.0, 500.0, 1000.0)]
    found = first_reach(curve, 5.0 - slope * 1000 * share)
    assert found is not None and found == pytest.approx(1000 * share, rel=1e-3, abs=1e-2)


@given(factor=st.floats(1.1, 20))
def test_a_curve_that_runs_k_times_faster_has_speed_up_k(factor: float) -> None:
    def arm(speed: float) -> Arm:
        return Arm([(index * 100 / speed, 5.0 - index) for index in range(4)], [], True)

    assert ratio({"clm": arm(1), "slm": arm(factor)}, "slm") == pytest.approx(factor)


def test_what_never_reaches_the_target_has_no_first_reach() -> None:
    assert first_reach([(0, 3.0), (10, 2.5)], 2.0) is None
    assert first_reach([], 2.0) is None
    assert first_reach([(0, math.nan), (10, 1.0)], 2.0) == 10


def test_the_headline_says_who_reached_clm_and_who_did_not() -> None:
    arms = {name: Arm(losses_of(name), [], True) for name in SPEED}
    text = headline(arms)
    assert "SLM reached" in text and "× fewer" in text and "Random selection did not reach" in text
    worse = arms | {"clm": Arm([(0, 3.0), (100, 3.5)], [], True)}
    assert "no speed-up" in headline(worse)
    assert "nothing to compare" in headline({"slm": arms["slm"]})
    assert "Not finished: SLM" in headline(arms | {"slm": Arm(losses_of("slm"), [], False)})


def costing(reference: float, scoring: float, live: float, tokens: float) -> Arm:
    """An arm without a curve that took so many forwards for so many tokens."""
    cost = Cost(Work(reference), Work(scoring), Work(live), parameters=1)
    return Arm([], [{"tokens_seen": tokens}], True, cost)


def test_slm_alone_pays_for_the_reference_and_the_scores() -> None:
    paying = costing(reference=300, scoring=50, live=40, tokens=10)
    assert compute_curve(replace(paying, curve=[(0, 3.0), (10, 2.0)])) == [(350, 3.0), (390, 2.0)]
    assert compute_curve(replace(paying, cost=None)) == []
    arms = {"slm": paying}
    assert "starts at 350: scoring the corpus 50, training the reference 300" in compute_caption(arms)
    (bill,) = bill_sections(arms)
    assert "13.00×" in bill.html and f"{(40 + 350 / 3) / 30:.2f}×" in bill.html  # against three forwards a token


def test_a_compute_slow_down_is_told() -> None:
    def caption(reference: float) -> str:
        end = losses_of("clm")[-1][0]
        arms = {name: costing(reference * (name == "slm"), 10 * (name == "slm"), 3 * end, end) for name in SPEED}
        return compute_caption({name: replace(arm, curve=losses_of(name)) for name, arm in arms.items()})

    assert "does not pay" in caption(3e9)
    assert "less compute" in caption(30)
    assert "the reference was not trained here" in caption(0)


def test_smoothing_keeps_the_mean_and_leaves_out_what_is_missing() -> None:
    rows = [{"tokens_seen": index, "loss_kept": float(index), "loss_dropped": None} for index in range(160)]
    points = smooth(rows, "loss_kept")
    assert len(points) == 80 and points[0] == (0.5, 0.5)
    assert smooth(rows, "loss_dropped") == []


@given(low=st.floats(-100, 100), size=st.floats(1e-3, 1e12))
def test_ticks_are_few_and_within_the_axis(low: float, size: float) -> None:
    assume(low + size > low)
    found = ticks(low, low + size)
    assert 2 <= len(found) <= 8
    assert all(low - size * 1e-6 <= value <= low + size * (1 + 1e-6) for value in found)


def test_a_window_of_two_halves_has_more_contrast_than_an_even_one() -> None:
    assert contrast([True] * 32 + [False] * 32) > contrast([True, False] * 32) == 0


def test_counts_are_short() -> None:
    assert [short(n) for n in (0, 950, 12_345, 1_500_000, 15e9)] == ["0", "950", "12.3k", "1.5M", "15B"]


def test_the_page_loads_nothing_runs_its_own_script_alone_and_escapes_documents(experiment: Config) -> None:
    text = build_report(experiment).read_text()
    found = Tags(text)
    assert not found.tags & {"link", "img", "iframe", "object", "embed", "a", "base"}
    assert not found.attributes & {"src", "href", "srcset", "onerror", "onload", "action", "xlink:href"}
    assert "@import" not in text and "url(http" not in text
    assert "evil.example" in found.text and HOSTILE not in text
    # A browser runs what the policy's hash allows, and that is the one script of the page.
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    assert found.scripts == [SCRIPT] and f"script-src 'sha256-{digest}'" in found.policy
    assert "default-src 'none'" in found.policy


def test_the_page_is_complete_and_the_same_twice(experiment: Config) -> None:
    first = build_report(experiment).read_text()
    assert build_report(experiment).read_text() == first
    for part in (
        "Does it pay?",
        "What does it cost?",
        "What is selected?",
        "SLM reached",
        "Not a tuned comparison",
        "CLM, every token",
        "SLM, each of three runs",
        "forward-token equivalents",
        "SLM dropped",
        "random kept",
        "kept</span>",
    ):
        assert part in first
    assert first.count('class="text"') == 8


@pytest.mark.parametrize("name", ["curve.svg", "tokens.svg"])
def test_pictures_are_well_formed_and_load_nothing(experiment: Config, name: str) -> None:
    root = ElementTree.parse(build_report(experiment).with_name(name)).getroot()
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert not {key for element in root.iter() for key in element.attrib if "href" in key or key.startswith("on")}


def test_the_dynamics_of_any_run_and_the_models_accuracy_are_on_the_page(experiment: Config, scores: Config) -> None:
    run = experiment.train.output / "followed"
    whole = experiment.model_copy(
        update={"score": scores.score}
    )  # the fixture's own shard is not what its receipt says
    dynamics(whole, [experiment.base] * 3, False, 100, run)
    rows = [{"model": "runs/x/slm/final", "target_loss": 4.2, "acc": 0.3, "acc_stderr": 0.03, "acc_norm": 0.2,
             "acc_norm_stderr": 0.02, "chance": 0.25, "ranked": 200}]  # fmt: skip
    (experiment.train.output / "evaluation.json").write_text(json.dumps(rows))
    figure = {"value": 12.5, "stderr": 2.5, "rows": 8.0}
    suite = {"model": "runs/x/slm/final", "suite": "math9", "limit": None, "columns": {"GSM8K": figure}}
    (experiment.train.output / "suite-math9.json").write_text(json.dumps([suite]))
    text = build_report(experiment).read_text()
    for part in ("Few-shot tasks: math9", "Rho-1-Math 1B (15B)", "12.5 ± 2.5", '<td class="slm">slm</td><td>12.5'):
        assert part in text
    for part in ("losses move: followed", "Which tokens are learnt?", "at the start</h4>", "30.0% ± 3.0%", "gives 25%"):
        assert part in text


def test_a_page_whose_base_is_on_another_machine_counts_no_compute_and_says_so(experiment: Config) -> None:
    text = build_report(experiment.model_copy(update={"base": "nowhere/at-all"})).read_text()
    assert "Not counted: base or reference" in text and "SLM reached" in text


@pytest.mark.parametrize("arm", ["clm", "random", "slm"])
def test_a_missing_arm_is_left_out(experiment: Config, arm: str) -> None:
    shutil.rmtree(experiment.train.output / arm)
    assert f'class="{arm}">' not in build_report(experiment).read_text()


def test_an_experiment_without_held_out_text_still_has_a_page(experiment: Config) -> None:
    for arm in SPEED:
        path = experiment.train.output / arm / "metrics.jsonl"
        rows = [row for row in path.read_text().splitlines(keepends=True) if '"train"' in row]
        path.write_text("".join(rows))
    assert "give eval.target" in build_report(experiment).read_text()


def test_every_score_dataset_that_a_run_read_is_named_and_paid_for(experiment: Config) -> None:
    path = experiment.score.output
    parts = [Part(scores=[path], weight=2), Part(scores=[path, path], weight=1)]
    mixed = experiment.model_copy(update={"train": experiment.train.model_copy(update={"mixture": parts})})
    costs = [{name: arm.cost for name, arm in read_arms(one).items() if arm.cost} for one in (experiment, mixed)]
    assert costs[1]["slm"].scoring.forwards == 3 * costs[0]["slm"].scoring.forwards > 0
    assert costs[0]["clm"].before == Work()
    assert dict(origin(mixed))["scores"].count(str(path)) == 3
    twice = experiment.model_copy(update={"train": experiment.train.model_copy(update={"scores": [path, path]})})
    assert judge_documents(experiment) and not judge_documents(twice)


def test_no_arm_is_a_user_error(make_config: Callable[..., Config], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"train\.output"):
        build_report(make_config(tmp_path))


def browse(page: Path, profile: Path, *more: str) -> str:
    """What headless Chromium prints; skips the test where there is none."""
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if not chromium:
        pytest.skip("no Chromium")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run",
             "--disable-component-update", "--disable-sync", "--hide-scrollbars", f"--user-data-dir={profile}"]  # fmt: skip
    command = [chromium, *flags, *more, page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


@pytest.mark.browser
def test_a_browser_shows_the_page(experiment: Config, tmp_path: Path) -> None:
    page = build_report(experiment)
    dom = browse(page, tmp_path / "profile", "--dump-dom")
    assert "SLM reached" in dom and dom.count("<svg") == 2 * 3 and "alert(" not in dom.split("<body")[0]
    picture = tmp_path / "page.png"
    browse(page, tmp_path / "profile", f"--screenshot={picture}", "--window-size=1000,3600")
    assert picture.stat().st_size > 50_000


@pytest.mark.browser
def test_arrow_keys_lead_from_token_to_token(experiment: Config, tmp_path: Path) -> None:
    keys = """<script>for (const key of ["ArrowRight", "ArrowRight", "ArrowRight", "ArrowLeft"])
        document.querySelector(".text").dispatchEvent(new KeyboardEvent("keydown", {key}))</script></body>"""
    text = build_report(experiment).read_text()
    page = tmp_path / "pressed.html"  # without the policy, which would keep this script from running too
    page.write_text(re.sub(r"<meta http-equiv[^>]*>", "", text).replace("</body>", keys))
    dom = browse(page, tmp_path / "profile", "--dump-dom")
    spans = re.findall(r"<span[^>]*>", dom.split('<p class="text"')[1].split("</p>")[0])
    shown = dom.split("<output", 1)[1].split(">", 1)[1].split("</output>")[0]
    assert [number for number, span in enumerate(spans) if re.search(r'class="[^"]*at"', span)] == [1]
    title = re.search(r'title="([^"]*)"', spans[1])
    assert title and html.unescape(title.group(1)) == html.unescape(shown) and "excess" in shown

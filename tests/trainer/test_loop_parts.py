"""The loop and its parts by themselves: how long a run is, what it remembers, when it looks, saves and ends."""

import json
import os
import shutil
import signal
import threading
from dataclasses import replace
from importlib.metadata import version
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import trainer.loop
from schemas.errors import UserError
from schemas.fingerprint import model_fingerprint, tokenizer_fingerprint
from schemas.forward import decoder_layers
from schemas.lock import locked
from schemas.models import open_tokenizer
from tests.trainer.made import made
from tests.trainer.test_optimize import START, Two, run_of
from trainer.checkpoint import State
from trainer.live import Live
from trainer.loop import (
    FREE_SETTINGS,
    Stop,
    Stopped,
    advance,
    build,
    evaluate,
    figures,
    found,
    geometry_of,
    loop,
    origin_of,
    progress,
    save,
    train,
)
from trainer.mixture import Mixture
from trainer.parts import Snapshot, own
from trainer.ranks import ALONE, Ranks
from trainer.stream import Order, Step


@pytest.mark.parametrize(
    ("fields", "steps"),
    [({"tokens": 1000}, 8), ({"tokens": 1100}, 9), ({"tokens": 3}, 1), ({"tokens": 128}, 1), ({"tokens": 192}, 2)],
)
def test_a_run_of_so_many_tokens_takes_that_many_steps_one_at_least(fields, steps):
    run = run_of(epochs=None, tokens_per_step=128, **fields)
    geometry = geometry_of(run)
    assert [progress(run, step, 7, geometry) for step in range(steps + 2)] == [
        pytest.approx(min(1.0, step / steps)) for step in range(steps + 2)
    ]


@pytest.mark.parametrize(("epochs", "windows"), [(1, 12), (0.5, 6), (3, 36)])
def test_a_run_of_epochs_ends_when_so_many_windows_were_taken(epochs, windows):
    run = run_of(epochs=epochs)
    for position in (0, 1, windows // 2, windows - 1, windows, windows + 5):
        done = progress(run, 3, position, geometry_of(run, alone=True))
        assert done == pytest.approx(min(1.0, position / windows)) and (done < 1) == (position < windows)


def test_a_step_is_cut_into_rows_of_the_window_or_of_what_is_asked_one_at_least():
    cut = geometry_of(run_of(Ranks(1, 2, torch.device("cpu")), tokens_per_step=512, micro_rows=3), alone=True)
    assert (cut.rows, cut.row_tokens, cut.micro_rows, cut.rank, cut.world, cut.alone) == (8, 64, 2, 1, 2, True)
    cut = geometry_of(run_of(tokens_per_step=512, row_tokens=128))
    assert (cut.rows, cut.row_tokens, cut.micro_rows, cut.rank, cut.world, cut.alone) == (4, 128, 4, 0, 1, False)
    assert geometry_of(run_of(tokens_per_step=100)).rows == geometry_of(run_of(tokens_per_step=5)).rows == 1
    assert geometry_of(run_of(row_tokens=64)).row_tokens == 64
    with pytest.raises(UserError, match=r"train\.row_tokens: 63 is less than context\.window \(64\); raise it"):
        geometry_of(run_of(row_tokens=63))
    with pytest.raises(UserError, match=r"train\.shard_ranks"):
        geometry_of(run_of(Ranks(0, 4, torch.device("cpu")), tokens_per_step=512, shard_ranks=3))


def test_the_state_goes_on_by_what_the_step_took_and_keeps_what_the_run_was_made_of():
    state = State(4, 100, 1000, 600, {"base": "b"}, norms=[1.0], names={"base": "n"})
    step = Step([], position=131, tokens=70, padding=0.1)
    assert advance(state, step, 42, 2.5) == State(5, 131, 1070, 642, {"base": "b"}, [1.0, 2.5], {"base": "n"})


def test_a_row_says_how_far_the_run_is_how_fast_and_what_it_waited_for():
    state, step = State(5, 131, 1070, 642, {}), Step([], position=131, tokens=70, padding=0.125)
    row = figures(run_of(), state, step, 1e-3, seconds=2.0, waited=0.5)
    assert row.pop("peak_memory") > 1 << 20
    assert row == {"tokens_seen": 1070, "tokens_selected": 642, "position": 131, "learning_rate": 1e-3,
                   "tokens_per_second": 35.0, "data_wait": 0.25, "padding": 0.125, "epoch": 10}  # fmt: skip
    parts = Mixture([made([5] * 8), made([5] * 4, seed=1)], [3, 1])
    row = figures(run_of(source=parts), state, step, 1e-3, 2.0, 0.5)
    assert row["drawn"] == parts.drawn(131) and sum(row["drawn"]) == 131 and row["epoch"] == 10


class Rows:
    def __init__(self):
        self.rows = []

    def write(self, kind, step, values):
        self.rows.append((kind, step, values))


@pytest.mark.parametrize("dropout", [True, False])
def test_held_out_text_is_looked_at_without_dropout_and_training_goes_on_as_it_was(dropout):
    live, log, state = SimpleNamespace(model=nn.Linear(1, 1)), Rows(), State(3, 1, 77, 1, {})
    live.model.train(dropout)
    modes = []

    def look(given):
        modes.append((given is live, live.model.training))
        return {"loss": 2.0}

    evaluate(run_of(evaluate=look, dropout=dropout), live, log, state)
    evaluate(run_of(evaluate=look, dropout=dropout), live, None, state)
    evaluate(run_of(dropout=dropout), live, log, state)
    assert modes == [(True, False)] * 2 and live.model.training is dropout
    assert log.rows == [("eval", 3, {"tokens_seen": 77, "loss": 2.0})]


def test_a_step_is_saved_once_and_its_rows_are_durable_first():
    events = []
    saver = SimpleNamespace(last=3, save=lambda state: events.append(state.step))
    log = SimpleNamespace(sync=lambda: events.append("rows"))
    for step, kept in ((3, log), (4, log), (5, None)):
        save(saver, kept, State(step, 0, 0, 0, {}))
    assert events == ["rows", 4, 5]


def test_what_a_signal_asks_for_is_heard_while_the_block_runs_and_whoever_heard_before_hears_again():
    heard = []
    before = {name: signal.signal(name, lambda number, _frame: heard.append(number)) for name in ASKED}
    try:
        for name, status in ASKED.items():
            try:
                with Stop() as stop:
                    assert stop.status == 0
                    os.kill(os.getpid(), name)
                    os.kill(os.getpid(), name)  # torchrun hands it on
                    assert stop.status == status and not heard
            except KeyboardInterrupt:
                pytest.fail("the first signal left, or the second one soon after it")
            os.kill(os.getpid(), name)
            assert heard.pop() == name
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)


ASKED = {signal.SIGTERM: 143, signal.SIGINT: 130}


def test_a_run_in_another_thread_leaves_signals_to_the_main_one():
    handlers = [signal.getsignal(name) for name in ASKED]
    statuses = []

    def work():
        with Stop() as stop:
            statuses.append(stop.status)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert statuses == [0] and [signal.getsignal(name) for name in ASKED] == handlers


def test_a_second_signal_is_the_first_one_handed_on_for_three_seconds_and_leaves_at_once_after(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(trainer.loop.time, "monotonic", lambda: now[0])
    stop = Stop()
    try:
        stop._ask(signal.SIGTERM, None)
        now[0] += 3
        stop._ask(signal.SIGINT, None)
    except KeyboardInterrupt:
        pytest.fail("a signal left that is the first one, or the first one handed on")
    assert stop.status == 143
    now[0] += 0.1
    with pytest.raises(KeyboardInterrupt):
        stop._ask(signal.SIGINT, None)


def test_a_run_goes_on_from_its_final_model_else_its_newest_checkpoint_else_from_nothing(tmp_path, monkeypatch):
    run = replace(run_of(output=tmp_path / "x"), names={"base": "now"})
    assert found(run, {"a": 1}) == (None, State(0, 0, 0, 0, {"a": 1}, names={"base": "now"}))
    asked = []
    stored = State(3, 9, 5, 4, {"a": 1, "train": {}}, norms=[2.0], names={"base": "then"})
    monkeypatch.setattr(trainer.checkpoint, "load_state", lambda path, ranks: asked.append((path, ranks)) or stored)
    origin = {"a": 1, "train": {"skip": [[9, 12]]}}
    for name in ("checkpoints/step-0000003", "final"):
        (tmp_path / "x" / name).mkdir(parents=True)
        saved, state = found(run, origin, ALONE)
        assert saved == tmp_path / "x" / name and asked.pop() == (saved, ALONE)
        assert state == replace(stored, origin=origin, names={"base": "now"})
    with pytest.raises(UserError, match=r"final: cannot go on .*\n  a: 1 stored, 2 now"):
        found(run, origin | {"a": 2})


@pytest.mark.parametrize(
    ("fields", "ranked"),
    [({"objective": "slm"}, 8), ({"objective": "slm", "scope": "step"}, None), ({"objective": "clm"}, None)],
)
def test_law_14_a_run_is_made_of_its_base_data_context_versions_and_every_setting_that_is_not_free(
    tiny_model, fields, ranked
):
    two = Ranks(0, 2, torch.device("cpu"))
    run = run_of(two, base=tiny_model, tokens_per_step=8 * 64, micro_rows=4, **fields)
    origin = origin_of(run)
    assert origin["base"] == model_fingerprint(tiny_model) and origin["dataset"] == "made"
    assert origin["tokenizer"] is None and origin["context"] == {"window": 64, "bos": True, "eos": True}
    told = run.config.model_dump(mode="json")
    wanted = {name: told[name] for name in told if name not in FREE_SETTINGS}
    assert origin["train"] == wanted | ({"micro_rows x ranks": ranked} if ranked else {})
    assert origin["versions"] == {name: version(name) for name in ("torch", "transformers", "numpy")}
    tokenizer = open_tokenizer(tiny_model, "base")
    assert origin_of(replace(run, tokenizer=tokenizer))["tokenizer"] == tokenizer_fingerprint(tokenizer)
    assert json.loads(json.dumps(origin)) == origin  # it is compared after it was stored


def test_the_live_model_is_built_as_the_settings_say_and_goes_on_from_what_was_saved(tiny_model, tmp_path, monkeypatch):
    compiled = []
    monkeypatch.setattr(trainer.loop, "compile_live", compiled.append)
    live, optimizer = build(run_of(base=tiny_model, learning_rate=0.5, betas=(0.1, 0.2)), None)
    assert (live.opened.compute, live.kept, compiled) == (torch.float32, None, [])
    assert not any(getattr(layer, "gradient_checkpointing", False) for layer in decoder_layers(live.model))
    assert optimizer.param_groups[0]["lr"] == 0.5 and optimizer.param_groups[0]["betas"] == (0.1, 0.2)
    stored = load_file(tiny_model / "model.safetensors")
    parameters = dict(live.model.named_parameters())
    assert all(torch.equal(parameters[name], tensor) for name, tensor in stored.items() if name in parameters)
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.add_(1.0)
    snapshot = Snapshot()
    snapshot.take(own(live, optimizer, first=True))
    snapshot.write(tmp_path / "rank-00000.safetensors")
    again, _ = build(run_of(base=tiny_model, dtype="bfloat16", compile=True), tmp_path)
    assert again.opened.compute == torch.bfloat16 and compiled == [again] and again.kept is None
    assert build(run_of(base=tiny_model, backward="kept"), None)[0].kept is not None
    for name, parameter in again.model.named_parameters():
        assert torch.equal(parameter, parameters[name]) and parameter.dtype == torch.float32


@pytest.mark.parametrize("way", ["none", "selective", "full"])
def test_layers_run_again_in_the_way_that_is_asked_for(tiny_model, monkeypatch, way):
    asked = []
    monkeypatch.setattr(trainer.loop, "recompute", lambda module, how: asked.append((type(module).__name__, how)))
    build(run_of(base=tiny_model, recompute=way), None)
    assert asked == ([] if way == "none" else [("LlamaForCausalLM", way)])


def test_the_base_is_opened_for_the_window_the_device_and_the_dropout_of_the_run(tiny_model, monkeypatch):
    asked, real = [], trainer.loop.open_model
    monkeypatch.setattr(
        trainer.loop, "open_model", lambda *given, **named: asked.append((given, named)) or real(*given, **named)
    )
    build(run_of(base=tiny_model, dropout=True), None)
    named = {"compute": torch.float32, "device": torch.device("cpu"), "dropout": True}
    assert asked == [((tiny_model, "base", 64), named)]


class Ticking:
    """A clock that half a second passes between two looks at."""

    now = 0.0

    def perf_counter(self):
        self.now += 0.5
        return self.now


def gone_through(monkeypatch, state=START, ask=lambda step: 0, failed=lambda step: 0, log=True, spike=None, **fields):
    """Events of a loop of four steps of three windows each, whose steps are not computed, and the state it ends with."""
    events, asked, log = [], SimpleNamespace(status=0), Rows() if log else None
    saver = SimpleNamespace(last=state.step, failed=0, save=lambda state: events.append(("save", state.step)),
                            wait=lambda: events.append("written"))  # fmt: skip

    def step_taken(given, optimizer, step, config, state, rate):
        assert given is live and optimizer == "adamw" and config is run
        events.append(("step", state.step, step.position, round(rate, 9)))
        asked.status, saver.failed = ask(state.step + 1), failed(state.step + 1)
        found = {"selected": 7.0, "grad_norm": 2.5, "loss_all": 3.0}
        return found | ({"spike": ["w"]} if spike == state.step else {})

    def flops(tokens, selected, carried):
        return 1000 * tokens + 10 * selected + carried

    def look(live):
        events.append("look")
        return {"loss": 1.0}

    monkeypatch.setattr(trainer.loop, "optimize", step_taken)
    monkeypatch.setattr(
        trainer.loop, "matmul_peak", lambda compute, device: {(torch.float32, "cpu"): 100.0}[compute, device]
    )
    monkeypatch.setattr(
        trainer.loop.Weights, "of", lambda model: {live.model: SimpleNamespace(step_flops=flops)}[model]
    )
    monkeypatch.setattr(trainer.loop, "time", Ticking())
    if log:
        log.sync = lambda: events.append("rows")
    fields = {"checkpoint_every": 99, "learning_rate": 0.8, "schedule": "constant", "warmup": 0.0, **fields}
    run = replace(run_of(Two(0, 2, torch.device("cpu")), look, tokens_per_step=128, **fields),
                  report=lambda row, done: events.append(("report", row["step"], round(done, 9))))  # fmt: skip
    stream = iter([Step([], position, 20, 0.5) for position in range(state.position + 3, 99, 3)])
    live = SimpleNamespace(model=nn.Linear(1, 1), opened=SimpleNamespace(compute=torch.float32))
    profiler = SimpleNamespace(at=lambda step: events.append(("profile", step)))
    monkeypatch.setattr(Two, "greatest", lambda self, value: value, raising=False)
    try:
        end = loop(run, live, "adamw", stream, geometry_of(run), state, log, asked, saver, profiler)
    except Stopped as stopped:
        end = stopped
    return events, end, log.rows if log else None


def test_the_loop_ends_with_the_run_and_each_step_is_profiled_taken_and_reported(monkeypatch):
    events, end, rows = gone_through(monkeypatch)
    assert events == [
        event
        for step in range(1, 5)
        for event in (("profile", step), ("step", step - 1, 3 * step, 0.8), ("report", step, step / 4))
    ]
    assert end == State(4, 12, 80, 28, {}, norms=[2.5] * 4)
    assert [(kind, step) for kind, step, _ in rows] == [("train", step) for step in range(1, 5)]
    told = rows[1][2]
    assert told.pop("peak_memory") and told == {
        "grad_norm": 2.5, "loss_all": 3.0, "tokens_seen": 40, "tokens_selected": 14, "position": 6,
        "learning_rate": 0.8, "tokens_per_second": 20.0, "data_wait": 0.5, "padding": 0.5, "epoch": 0,
        "mfu": (20_000 + 70 + 20) / 200,
    }  # fmt: skip
    kept = gone_through(monkeypatch, backward="kept")[2]
    assert kept[1][2]["mfu"] == (20_000 + 70 + 7) / 200


def test_a_run_that_goes_on_ends_where_it_would_have_and_a_finished_one_takes_no_step(monkeypatch):
    events, end, _ = gone_through(monkeypatch, State(2, 6, 40, 14, {}), log=False)
    assert [event[1] for event in events if event[0] == "step"] == [2, 3] and end.position == 12
    assert gone_through(monkeypatch, State(4, 12, 80, 28, {}))[0] == []


def test_the_rate_of_a_step_is_that_of_its_middle(monkeypatch):
    events, *_ = gone_through(monkeypatch, schedule="wsd", decay=1.0)
    assert [event[3] for event in events if event[0] == "step"] == [
        pytest.approx(0.8 * (1 - m / 8)) for m in (1, 3, 5, 7)
    ]
    events, *_ = gone_through(monkeypatch, schedule="wsd", decay=1.0, epochs=None, tokens=512)
    assert [event[3] for event in events if event[0] == "step"] == [
        pytest.approx(0.8 * (1 - m / 8)) for m in (1, 3, 5, 7)
    ]


def test_held_out_text_is_looked_at_and_checkpoints_are_saved_every_so_many_steps(monkeypatch):
    events, _, rows = gone_through(monkeypatch, evaluate_every=2, checkpoint_every=3)
    assert [(kind, step) for kind, step, _ in rows if kind == "eval"] == [("eval", 2), ("eval", 4)]
    for unwanted in ("profile", "report"):
        events = [event for event in events if event[0] != unwanted]
    assert [event if isinstance(event, str) or event[0] == "save" else event[0] for event in events] == [
        "step", "step", "look", "step", "rows", ("save", 3), "step", "look"
    ]  # fmt: skip


def test_a_spike_is_written_down_with_its_windows_and_whether_it_was_skipped(monkeypatch):
    for fields, skipped in (({}, False), ({"skip_spikes": 3.0}, True)):
        rows = gone_through(monkeypatch, spike=1, **fields)[2]
        assert [row for row in rows if row[0] == "spike"] == [
            ("spike", 2, {"grad_norm": 2.5, "skipped": skipped, "windows": ["w"]})
        ]
        assert all("spike" not in row for _, _, row in rows) and [row[1] for row in rows] == [1, 2, 2, 3, 4]
    gone_through(monkeypatch, spike=1, log=False)


def test_a_run_that_is_stopped_saves_its_step_and_says_so_when_it_is_written(monkeypatch):
    events, stopped, _ = gone_through(monkeypatch, ask=lambda step: 143 * (step == 3))
    assert (stopped.code, stopped.step) == (143, 3) and events[-3:] == ["rows", ("save", 3), "written"]
    events, stopped, _ = gone_through(monkeypatch, failed=lambda step: step == 2)
    assert stopped.step == 2 and events[-1] == "written"


@pytest.fixture
def small(tiny_model, tmp_path):
    """`small(**fields)`: a run of four steps of 128 tokens, two windows a row, whose held-out loss counts its calls."""
    source, looks = made([30] * 16, size=4, columns=("ref_loss",)), []

    def make(ranks=ALONE, **fields):
        run = run_of(ranks, lambda live: looks.append(1) or {"loss": float(len(looks))}, source, tiny_model,
                     output=tmp_path / "run", tokens_per_step=128, learning_rate=1e-3, **fields)  # fmt: skip
        return replace(run, names={"base": "org/tiny"})

    return make


def rows_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_run_leaves_its_model_its_checkpoints_and_the_rows_of_its_steps_and_is_not_run_again(small, tmp_path):
    folder = tmp_path / "run"
    for leftover in (folder / ".tmp-final", folder / "checkpoints" / ".tmp-step-0000001"):
        leftover.mkdir(parents=True)
    final = train(small(checkpoint_every=3))
    assert final == folder / "final" and not list(folder.rglob(".tmp-*"))
    assert [path.name for path in sorted((folder / "checkpoints").iterdir())] == ["step-0000003", "step-0000004"]
    rows = rows_of(folder)
    assert [(row["kind"], row["step"]) for row in rows] == [
        ("model", 0), ("eval", 0), ("train", 1), ("train", 2), ("train", 3), ("train", 4), ("eval", 4)
    ]  # fmt: skip
    assert rows[0] == {"kind": "model", "step": 0, "isolation": "varlen", "linear_head": True}
    state = trainer.checkpoint.load_state(final)
    assert (state.step, state.position, state.tokens_seen, state.names) == (4, 16, 480, {"base": "org/tiny"})
    assert state.origin == origin_of(small(checkpoint_every=3))
    weights = (final / "model.safetensors").read_bytes()
    assert train(small()) == final and rows_of(folder) == rows
    for path in (final, folder / "checkpoints" / "step-0000004"):
        shutil.rmtree(path)
    train(small())
    assert (final / "model.safetensors").read_bytes() == weights
    again = rows_of(folder)
    assert [(row["kind"], row["step"]) for row in again] == [(row["kind"], row["step"]) for row in rows[:5]] + [
        ("model", 3), ("train", 4), ("eval", 4)
    ]  # fmt: skip
    assert again[6]["loss_all"] == rows[5]["loss_all"] and (folder / "tensorboard").exists()


def test_held_out_text_is_looked_at_once_where_the_last_step_is_one_of_those(small, tmp_path):
    train(small(evaluate_every=2))
    looks = [row["step"] for row in rows_of(tmp_path / "run") if row["kind"] == "eval"]
    train(replace(small(evaluate_every=3), config=small(evaluate_every=3).config.model_copy(
        update={"output": tmp_path / "other"})))  # fmt: skip
    assert looks == [0, 2, 4]
    assert [row["step"] for row in rows_of(tmp_path / "other") if row["kind"] == "eval"] == [0, 3, 4]


def test_a_run_of_so_many_tokens_ends_there_whatever_the_data_hold(small, tmp_path):
    train(small(epochs=None, tokens=300))
    assert [row["step"] for row in rows_of(tmp_path / "run") if row["kind"] == "train"] == [1, 2]


def test_a_run_reads_its_data_in_the_order_of_its_settings_as_its_model_can_take_them(small, monkeypatch):
    asked, real = [], trainer.loop.steps
    monkeypatch.setattr(trainer.loop, "steps", lambda *given: asked.append(given) or real(*given))
    monkeypatch.setattr(trainer.loop, "prove_compiled", lambda *given: asked.append(given))
    monkeypatch.setattr(trainer.loop, "compile_live", lambda live: None)
    run = small(objective="slm", seed=5, shuffle_groups=3, skip=[(2, 4)], checkpoint_every=2)
    train(run)
    order, geometry, position = asked.pop()
    assert order == Order(run.source, 5, 3, ("ref_loss",), [(2, 4)]) and position == 0
    assert geometry == geometry_of(run) and not asked
    for name in ("final", "checkpoints/step-0000004"):
        shutil.rmtree(run.config.output / name)
    train(run)
    assert asked.pop()[2] == 10  # two steps of four windows, and two that were skipped
    config = run.config.model_copy(update={"compile": True, "output": run.config.output / "compiled", "dropout": True})
    train(replace(run, config=config))
    proved, read = asked
    assert proved[1:] == (geometry, 64, ALONE, True) and isinstance(proved[0], Live) and read[1] == geometry


def test_windows_stand_alone_where_the_model_cannot_keep_them_apart(small, monkeypatch):
    asked, real, built = [], trainer.loop.steps, trainer.loop.build

    def apart(run, saved):
        live, optimizer = built(run, saved)
        live.opened = replace(live.opened, isolation="alone")
        return live, optimizer

    monkeypatch.setattr(trainer.loop, "build", apart)
    monkeypatch.setattr(trainer.loop, "steps", lambda *given: asked.append(given[1].alone) or real(*given))
    train(small())
    assert asked == [True]


def test_a_run_needs_its_columns_and_its_folder_to_itself_before_anything_is_made(small, tmp_path):
    bare = replace(small(objective="slm"), source=made([30] * 16, columns=()))
    with pytest.raises(UserError, match=r"train\.objective: slm needs the column `ref_loss`"):
        train(bare)
    folder = tmp_path / "run"
    assert not (folder / "metrics.jsonl").exists()
    with locked(folder, "training run"), pytest.raises(UserError, match="another training run is writing here"):
        train(small())


class Second(Two):
    """The second of two ranks that hold the same; notes what it is told and what it waits for."""

    said = ()

    def share(self, value):
        self.said.append(value)
        return self.origin

    def wait(self):
        self.said.append("waited")


def test_a_rank_that_is_not_the_first_takes_the_firsts_origin_and_leaves_files_to_it(small, tmp_path, monkeypatch):
    monkeypatch.setattr(Second, "said", said := [])
    monkeypatch.setattr(Two, "greatest", lambda self, value: value, raising=False)
    ranks = Second(1, 2, torch.device("cpu"))
    run = small(ranks)
    monkeypatch.setattr(Second, "origin", origin_of(run), raising=False)
    evaluated = []
    monkeypatch.setattr(
        trainer.loop, "build", lambda run, saved: (FakeBuilt(), torch.optim.SGD(FakeBuilt().parameters()))
    )
    monkeypatch.setattr(trainer.loop, "loop", lambda *given: evaluated.append(given[5:7]) or given[5])
    monkeypatch.setattr(trainer.loop, "save", lambda saver, log, state: evaluated.append(log))
    monkeypatch.setattr("trainer.saver.dist.new_group", lambda **named: None)
    leftover = tmp_path / "run" / ".tmp-final"
    leftover.mkdir(parents=True)
    with locked(tmp_path / "run", "training run"):  # by the first one
        assert train(run) == tmp_path / "run" / "final"
    assert said == [{}, "waited"] and evaluated == [(State(0, 0, 0, 0, Second.origin, names=run.names), None), None]
    assert leftover.exists() and not (tmp_path / "run" / "metrics.jsonl").exists()


class FakeBuilt(nn.Module):
    """As much of a live model as is asked for by a run whose steps are not taken."""

    def __init__(self):
        super().__init__()
        self.model, self.opened = nn.Linear(1, 1), SimpleNamespace(isolation="varlen", linear=True)


def test_a_run_writes_its_tokenizer_its_profile_and_its_log_and_no_checkpoint_twice(small, tiny_model, monkeypatch):
    told, shared, real, reading = [], [], trainer.loop.Log, trainer.loop.found

    def log_of(*given):
        told.append((given, real(given[0], given[1])))
        return told[-1][1]

    monkeypatch.setattr(trainer.loop, "Log", log_of)
    monkeypatch.setattr(trainer.loop, "found", lambda *given: shared.append(given[2:]) or reading(*given))
    run = replace(small(wandb="sift", profile=(2, 3)), tokenizer=open_tokenizer(tiny_model, "base"))
    run.source.index = shared.append
    folder, final = run.config.output, train(run)
    ((given, log),) = told
    assert given == (folder, 0, "sift", origin_of(run)["train"]) and log.file.closed and shared == [(ALONE,), ALONE]
    assert (final / "tokenizer.json").exists()
    (trace,) = folder.rglob("*.json.gz")
    assert trace.relative_to(folder).as_posix() == "profile/steps-2-3/rank-00000.json.gz"
    written = (folder / "checkpoints" / "step-0000004" / "state.json").stat().st_mtime_ns
    shutil.rmtree(final)
    train(run)
    assert (folder / "checkpoints" / "step-0000004" / "state.json").stat().st_mtime_ns == written

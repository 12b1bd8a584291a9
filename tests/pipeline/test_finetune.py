"""Fine-tuning as a user runs it: the verb, what it resumes to, what the model can say afterwards, held-out responses."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.demo.chats import build
from pipeline.evaluation.responses import ResponseLoss
from pipeline.finetune import finetune
from pipeline.train import train_live
from pipeline.verify import verify
from schemas.config import load_config
from schemas.conversation import TEMPLATES
from schemas.errors import UserError
from schemas.models import open_model, open_tokenizer
from schemas.receipt import Layout
from trainer.live import Live
from trainer.metrics import read_metrics


def said(ask, reply):
    return {"messages": [{"role": "user", "content": ask}, {"role": "assistant", "content": reply}]}


@pytest.fixture
def talks(make_config, corpus_tools, tmp_path):
    """A config over 60 conversations, of which three are none."""
    texts = [item["text"] for item in corpus_tools.make_documents(120, seed=8)]
    rows = [said("q" + texts[i][:40], "a" + texts[60 + i][:90]) for i in range(57)]
    rows += [{"messages": []}, said("why?", " "), {"text": "a page"}]
    corpus_tools.write_documents(tmp_path / "talks.jsonl", rows)
    corpus = {"paths": [str(tmp_path / "talks.jsonl")], "messages": "messages", "template": "problem", "id": None}
    config = make_config(
        tmp_path,
        {"train.objective": "clm", "score.max_quarantined": 0.2, "train.checkpoint_every": 2, "train.keep_every": 2},
    )
    return config.model_copy(update={"corpus": config.corpus.model_validate(corpus)})


def losses(folder):
    return [(row["step"], row["loss_kept"], row["grad_norm"]) for row in read_metrics(folder / "metrics.jsonl")
            if row["kind"] == "train"]  # fmt: skip


def test_finetune_needs_no_scores_resumes_to_the_same_losses_and_the_model_chats(talks, write_config, tmp_path):
    path = write_config(talks, tmp_path / "mine.yaml")
    command = [sys.executable, "-m", "pipeline.cli", "finetune", "-c", str(path)]

    def run():  # in processes alike: the number of threads is part of the arithmetic
        subprocess.run(command, check=True, capture_output=True, cwd=Path(__file__).resolve().parents[2])

    run()
    folder = talks.train.folder
    whole, weights = losses(folder), (folder / "final" / "model.safetensors").read_bytes()
    assert len(whole) > 3 and not Path(talks.score.output).exists()
    shutil.rmtree(folder / "final")  # as a kill after the second step would leave it
    for checkpoint in (folder / "checkpoints").glob("step-*"):
        if checkpoint.name > "step-0000002":
            shutil.rmtree(checkpoint)
    assert [path.name for path in (folder / "checkpoints").glob("step-*")] == ["step-0000002"]
    run()
    final = folder / "final"
    assert losses(folder) == whole and (final / "model.safetensors").read_bytes() == weights
    tokenizer = AutoTokenizer.from_pretrained(final)
    assert tokenizer.chat_template == TEMPLATES["problem"]
    assert "only what the assistant says" in (final / "README.md").read_text()
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "2 + 3?"}], tokenize=False)
    assert prompt == "<s>Problem: 2 + 3?\nAnswer:"


def test_slm_finetunes_on_scores_whose_bad_rows_cost_themselves_alone(talks, score_here):
    config = score_here(talks)
    assert verify(config.score.output, progress=False) == []
    layout = Layout(config.score.output)
    lines = [line for path in (layout.root / "quarantine").iterdir() for line in path.read_text().splitlines()]
    reasons = {json.loads(line)["reason"] for line in lines}
    assert len(lines) == 3
    assert reasons == {
        "`messages` holds nothing that an assistant said",
        "no `messages`, and no prompt with a response",
    }
    slm = config.model_copy(update={"train": config.train.model_copy(update={"objective": "slm", "keep": 0.5})})
    assert finetune(slm) == config.train.output / "slm" / "final"
    (row, *_) = [row for row in read_metrics(config.train.output / "slm" / "metrics.jsonl") if row["kind"] == "train"]
    assert abs(row["keep"] - 0.5) < 0.01 and row["tokens_selected"] < 0.4 * row["tokens_seen"]
    other = slm.model_copy(update={"corpus": slm.corpus.model_copy(update={"template": "tora"})})
    with pytest.raises(UserError, match="rendered by another chat template"):
        train_live(other)


def test_a_corpus_of_texts_is_not_finetuned_on(make_config, tmp_path):
    with pytest.raises(UserError, match=r"corpus\.messages.*missing"):
        finetune(make_config(tmp_path))


def test_the_loss_of_responses_is_that_of_labels_of_minus_100(talks, tiny_model, tmp_path):
    rows = [said("What is it?", "It is 4, as pebbles show."), {"prompt": "And then?", "response": "Nothing."}]
    (tmp_path / "held.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = open_tokenizer(tiny_model, "base")
    measure = ResponseLoss(tmp_path / "held.jsonl", tokenizer, talks)
    found = measure(Live(open_model(tiny_model, "base", 64)))["response_loss"]
    model, sums = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32), []
    for tokens, judged in zip(measure.windows, measure.judged, strict=True):
        labels = torch.from_numpy(np.where(judged, tokens, -100))[None]
        with torch.no_grad():
            mean = model(input_ids=torch.from_numpy(tokens)[None], labels=labels).loss
        sums.append((float(mean) * int(judged.sum()), int(judged.sum())))
    assert abs(found - sum(loss for loss, _ in sums) / sum(count for _, count in sums)) < 1e-4
    (tmp_path / "held.jsonl").write_text('{"messages": []}\n')
    with pytest.raises(UserError, match=r"held\.jsonl:1: `messages` holds nothing"):
        ResponseLoss(tmp_path / "held.jsonl", tokenizer, talks)


def test_the_demos_programs_print_the_answers_and_held_out_problems_are_no_training_ones(tmp_path, capsys):
    pytest.importorskip("reasoning_gym")
    from score_jobs.corpus import Document, corpus_documents

    made = build(tmp_path / "data", seed=1, scale=0.03)
    assert build(tmp_path / "again", seed=1, scale=0.03)["files"] == made["files"]
    config = load_config(Path("configs/finetune-demo.yaml"), {"root": str(tmp_path)})
    rows = [row for row in corpus_documents(config.corpus) if isinstance(row, Document)]
    assert len(rows) == 240
    for row in rows[:60]:
        _, trace = row.messages
        program, output = trace["content"].split("```python\n")[1].split("\n```\n```output\n")
        exec(program, {})
        answer = capsys.readouterr().out.strip()
        assert output == f"{answer}\n```\nThe answer is {answer}."
    asked = {row.messages[0]["content"] for row in rows}
    held = [json.loads(line) for line in config.eval.problems.read_text().splitlines()]
    assert held and not any(row["prompt"].removeprefix("Problem: ").removesuffix("\nAnswer:") in asked for row in held)

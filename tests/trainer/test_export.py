"""A checkpoint becomes the folder that transformers itself would have written, and whatever is not one is refused."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

from schemas.config import Train
from schemas.errors import UserError
from schemas.models import open_model
from trainer.checkpoint import State
from trainer.export import as_model, export_to
from trainer.live import Live
from trainer.optimizer import adamw
from trainer.ranks import Ranks
from trainer.saver import Saver

SHAPE = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "num_local_experts": 4,
}


def checkpoint_of(base, folder):
    """A checkpoint after one step of a run from `base`, and the model as it was then."""
    live = Live(open_model(base, "base", 32))
    config = Train(output=folder, epochs=1)
    optimizer = adamw(live.parameters(), config)
    for parameter in live.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    alone = Ranks(rank=0, world=1, device=torch.device("cpu"))
    with Saver(folder, live, None, optimizer, config, alone) as saver:
        saver.save(State(step=1, position=1, tokens_seen=1, tokens_selected=1, origin={}))
    return folder / "step-0000001", live.model


@pytest.fixture
def mixture(tmp_path):
    torch.manual_seed(3)
    MixtralForCausalLM(MixtralConfig(**SHAPE)).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.mark.parametrize("kind", ["tied", "mixture"])
def test_an_exported_model_has_the_files_tensors_and_losses_that_transformers_would_have_written(
    tiny_model, mixture, tmp_path, kind
):
    saved, model = checkpoint_of(tiny_model if kind == "tied" else mixture, tmp_path / "checkpoints")
    export_to(saved, tmp_path / "deep" / "exported")
    model.save_pretrained(tmp_path / "theirs")
    exported, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("deep/exported", "theirs"))
    assert exported.keys() == theirs.keys()
    assert all(torch.equal(exported[name], theirs[name]) for name in theirs)
    for name in ("config.json", "generation_config.json"):
        assert (tmp_path / "deep" / "exported" / name).read_text() == (tmp_path / "theirs" / name).read_text()
    opened, report = AutoModelForCausalLM.from_pretrained(tmp_path / "deep" / "exported", output_loading_info=True)
    assert not any(report.values())
    ids = torch.arange(2, 20)[None]
    assert torch.equal(opened.eval()(input_ids=ids).logits, AutoModelForCausalLM.from_pretrained(
        tmp_path / "theirs").eval()(input_ids=ids).logits)  # fmt: skip


def test_what_is_no_checkpoint_is_there_already_or_is_damaged_is_refused(tiny_model, tmp_path):
    saved, _ = checkpoint_of(tiny_model, tmp_path / "checkpoints")
    with pytest.raises(UserError, match="no checkpoint of a training run"):
        export_to(tiny_model, tmp_path / "exported")
    with pytest.raises(UserError, match="exists already; name a new folder"):
        export_to(saved, tiny_model)
    path = saved / "rank-00000.safetensors"
    whole = bytearray(path.read_bytes())
    whole[-1] ^= 1
    path.write_bytes(whole)
    with pytest.raises(UserError, match="not the bytes that were written"):
        export_to(saved, tmp_path / "exported")
    assert not (tmp_path / "exported").exists() and not list(tmp_path.glob(".tmp-*"))


def test_a_checkpoint_is_evaluated_as_its_model_and_opened_by_no_other_verb(tiny_model, tmp_path):
    saved, model = checkpoint_of(tiny_model, tmp_path / "checkpoints")
    with as_model(saved) as folder:
        same = open_model(folder, "model", 32).module.state_dict()
        assert all(torch.equal(same[name], tensor) for name, tensor in model.state_dict().items())
    assert not folder.exists()
    with as_model(tiny_model) as folder:
        assert folder == tiny_model
    with pytest.raises(UserError, match=r"step-0000001 is a checkpoint of a training run; .tokensift export. makes"):
        open_model(Path(saved), "score.model", 32)

"""What a step will hold, against a real model on the real device and a count by hand."""

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from transformers import AutoModelForCausalLM

from schemas.config import Train
from trainer.live import recompute
from trainer.memory import foretell, gathered, head, kept_by_autograd


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("again", [False, True])
def test_what_autograd_will_keep_is_what_it_keeps(tiny_model, compute, again):
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    if again:
        recompute(model)
    kept = {}
    with (
        saved_tensors_hooks(lambda t: kept.setdefault(t.data_ptr(), t), lambda t: t),
        torch.autocast("cpu", compute, enabled=compute != torch.float32),
    ):
        model.base_model(input_ids=torch.zeros(3, 40, dtype=torch.int64), use_cache=False)
    own = {parameter.data_ptr() for parameter in model.parameters()}
    real = sum(tensor.untyped_storage().nbytes() for where, tensor in kept.items() if where not in own)
    foretold, shape = kept_by_autograd(tiny_model, compute, 3, 40, sharded=False, again=again)
    assert foretold == pytest.approx(real, rel=0.02)
    assert (shape.parameters, shape.layers) == (model.num_parameters(), 2)


def test_parameters_gradients_moments_and_the_copy_are_shared_out_among_ranks(tiny_model):
    config = Train(output="x", epochs=1, dtype="float32")
    (shape, one), (_, four) = (foretell(tiny_model, config, 2, 64, world) for world in (1, 4))
    assert [one.parameters, one.gradients, one.moments, one.checkpoint_copy] == [
        times * 4 * shape.parameters for times in (1, 1, 2, 3)
    ]
    assert 4 * four.moments == pytest.approx(one.moments, abs=64)
    _, copies = foretell(tiny_model, config.model_copy(update={"shard_ranks": 2}), 2, 64, 4)
    assert 2 * copies.moments == pytest.approx(one.moments, abs=64)
    assert (one.gathered, four.gathered) == (0, gathered(shape, 4)) and four.head == one.head == head(shape, 4, 128)
    assert one.device == one.parameters + one.gradients + one.moments + one.activations + one.head


def test_running_layers_again_leaves_their_inputs_and_one_layers_tensors(tiny_model):
    config = Train(output="x", epochs=1, dtype="float32")
    kept, inputs = (kept_by_autograd(tiny_model, torch.float32, 2, 64, False, again)[0] for again in (False, True))
    _, memory = foretell(tiny_model, config.model_copy(update={"recompute": "full"}), 2, 64, 1)
    assert memory.activations == kept // 2 + inputs and inputs < kept / 2

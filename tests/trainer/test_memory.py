"""What a step will hold, against a real model on the real device and a count by hand."""

import weakref

import numpy as np
import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM

from schemas.batch import collate
from schemas.config import Train
from schemas.models import open_model
from trainer.live import Live, recompute
from trainer.memory import foretell, gathered, head, kept_by_autograd
from trainer.optimizer import adamw


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("again", ["none", "full"])
def test_what_autograd_will_keep_is_what_it_keeps(tiny_model, compute, again):
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    if again != "none":
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
    (shape, one), (_, four) = (foretell(tiny_model, config, 2, 64, world, micros=2) for world in (1, 4))
    assert [one.parameters, one.gradients, one.moments, one.checkpoint_copy] == [
        times * 4 * shape.parameters for times in (1, 1, 2, 3)
    ]
    assert 4 * four.moments == pytest.approx(one.moments, abs=64)
    _, copies = foretell(tiny_model, config.model_copy(update={"shard_ranks": 2}), 2, 64, 4)
    assert 2 * copies.moments == pytest.approx(one.moments, abs=64)
    assert (one.gathered, four.gathered) == (0, 4 * shape.rest) and four.head == one.head == head(shape, 4, 128)
    assert one.device == one.parameters + one.gradients + one.moments + one.activations + one.head


def test_running_layers_again_leaves_their_inputs_and_one_layers_tensors(tiny_model):
    config = Train(output="x", epochs=1, dtype="float32")
    kept, inputs = (kept_by_autograd(tiny_model, torch.float32, 2, 64, False, again)[0] for again in ("none", "full"))
    _, memory = foretell(tiny_model, config.model_copy(update={"recompute": "full"}), 2, 64, 1)
    assert memory.activations in (inputs, kept // 2 + inputs) and inputs < kept / 2


def test_a_steps_first_micro_batch_has_no_gradients_beside_its_activations_and_its_end_all_of_them(tiny_model):
    config = Train(output="x", epochs=1, dtype="float32")
    shape, at_head = foretell(tiny_model, config, 2, 64, 2)
    assert at_head.gradients == 0 and at_head.head and at_head.activations
    _, at_end = foretell(tiny_model, config, 1, 2, 2)  # hardly an activation
    assert (at_end.gradients, at_end.head, at_end.gathered) == (
        at_end.parameters,
        0,
        gathered(shape, 4, 2, not torch.cuda.is_available()),
    )


class Held(TorchDispatchMode):
    """Most bytes that tensors made meanwhile hold at a time; weights and what else was there before do not count."""

    now = most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {
            id(tensor.untyped_storage()) for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, torch.Tensor)
        }
        found = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(found):
            if isinstance(tensor, torch.Tensor) and id(storage := tensor.untyped_storage()) not in given:
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self.let_go, storage.nbytes())
        return found

    def let_go(self, size):
        self.now -= size


@pytest.mark.parametrize("again", ["none", "selective", "full"])
@pytest.mark.parametrize("micros", [1, 2])
def test_what_a_step_will_hold_at_most_is_what_a_count_of_every_tensor_of_a_real_one_finds(tiny_model, again, micros):
    config = Train(output="x", epochs=1, dtype="float32", recompute=again)
    live = Live(open_model(tiny_model, "base", 64))
    if again != "none":
        recompute(live.model, again)
    optimizer = adamw(live.parameters(), config)
    batch = collate([np.arange(64) + 5], [[0]])

    def step():
        for _ in range(micros):
            live(batch, lambda losses: losses > 6).loss_sum.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step()  # moments are made
    moments = sum(state[name].nbytes for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq"))
    with Held() as held:
        step()
    _, memory = foretell(tiny_model, config, 1, 64, 1, micros)
    parameters = sum(parameter.nbytes for parameter in live.parameters())
    assert memory.device == pytest.approx(parameters + moments + held.most, rel=0.15)


def test_selective_recomputation_keeps_less_than_none_and_more_than_full(tiny_model):
    none, selective, full = (
        kept_by_autograd(tiny_model, torch.float32, 2, 64, False, way)[0] for way in ("none", "selective", "full")
    )
    assert full < 0.7 * selective < 0.7 * 0.8 * none

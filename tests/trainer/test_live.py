"""The live model against the plain model and cross-entropy, whole and sharded."""

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.nn.functional import cross_entropy
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM

from schemas.batch import IGNORE, collate
from schemas.forward import decoder_layers, forward
from schemas.probe import prove
from trainer.live import Live, choose_none, parallelize, recompute

SHAPE = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "initializer_range": 0.3,
}
WINDOWS = [np.random.default_rng(n).integers(2, 40, size) for n, size in enumerate([9, 5, 11])]


def opened(kind="linear", compute=torch.float32):
    torch.manual_seed(1)
    if kind == "capped":
        model = Gemma2ForCausalLM(Gemma2Config(**SHAPE, final_logit_softcapping=2.0))
    else:
        model = LlamaForCausalLM(LlamaConfig(**SHAPE))
    return prove(model.eval(), compute, 16, "base")


def batch_of_windows():
    return collate(WINDOWS, [[0, 1], [2]], 16)


def choose_some(losses):
    """Every predicted token but those of the second column."""
    mask = ~torch.isnan(losses)
    mask[:, 1] = False
    return mask


def plain(model):
    """Losses of the packed batch, from a forward of each window alone, and where they stand."""
    losses = torch.full((2, 16), torch.nan)
    for window, (row, start) in zip(WINDOWS, [(0, 0), (0, 9), (1, 0)], strict=True):
        tokens = torch.from_numpy(window)
        logits = model(input_ids=tokens[None]).logits[0, :-1]
        losses[row, start : start + len(tokens) - 1] = cross_entropy(logits.float(), tokens[1:], reduction="none")
    return losses


@pytest.mark.parametrize("kind", ["linear", "capped"])
def test_losses_choice_sum_and_gradients_are_those_of_the_plain_model(kind):
    model = opened(kind)
    assert model.linear == (kind == "linear")
    live, batch, seen = Live(model), batch_of_windows(), []
    judged = live(batch, lambda losses: (seen.append(losses), choose_some(losses))[1])
    judged.loss_sum.backward()
    found = {name: parameter.grad.clone() for name, parameter in model.module.named_parameters()}
    model.module.zero_grad()
    losses = plain(model.module)
    mask = choose_some(losses.detach())
    losses[mask].sum().backward()
    torch.testing.assert_close(judged.losses, losses.detach(), equal_nan=True)
    torch.testing.assert_close(seen[0], judged.losses, equal_nan=True)
    assert torch.equal(torch.isnan(judged.losses), batch.targets == IGNORE)
    assert torch.equal(judged.mask, mask)
    assert not judged.losses.requires_grad and not seen[0].requires_grad and not judged.mask.requires_grad
    torch.testing.assert_close(judged.loss_sum.detach(), losses.detach()[mask].sum())
    for name, parameter in model.module.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-5)


def test_a_linear_head_multiplies_in_the_dtype_of_the_run_and_adds_up_in_float32():
    model = opened(compute=torch.bfloat16)
    live, batch = Live(model), batch_of_windows()
    with torch.no_grad():
        found = live(batch, choose_none).losses
        hidden = forward(model, batch)  # what is held here is the head alone
        weight = model.module.lm_head.weight
        logits = hidden.bfloat16().float() @ weight.bfloat16().float().T
        exact = hidden.float() @ weight.T
    predicted = batch.targets != IGNORE
    wanted, other = (
        cross_entropy(values[predicted], batch.targets[predicted], reduction="none") for values in (logits, exact)
    )
    assert found.dtype == torch.float32
    assert (found[predicted] - wanted).abs().max() < 1e-5 < (other - wanted).abs().max()


def test_evaluation_chooses_nothing():
    judged = Live(opened())(batch_of_windows(), choose_none)
    assert judged.mask.dtype == torch.bool and not judged.mask.any() and judged.loss_sum == 0


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
def test_layers_that_run_again_in_the_backward_keep_their_input_alone_and_change_no_bit(compute):
    gradients, kept = [], []
    for again in ("none", "full", "selective"):
        live = Live(opened(compute=compute))
        if again != "none":
            recompute(live.model, again)
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, sizes=sizes: (sizes.append(t.nbytes), t)[1], lambda t: t
        ):
            judged = live(batch_of_windows(), choose_some)
        judged.loss_sum.backward()
        gradients.append([parameter.grad for parameter in live.parameters()])
        kept.append(sum(sizes))
    assert all(torch.equal(one, two) and torch.equal(one, three) for one, two, three in zip(*gradients, strict=True))
    assert kept[1] < 0.5 * kept[0]


@pytest.fixture
def one_rank(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_a_model_of_one_rank_is_left_as_it_is():
    live = Live(opened())
    assert parallelize(live, None) is live and not any(isinstance(module, FSDPModule) for module in live.modules())


@pytest.mark.parametrize("shape", [(1,), (1, 1)])
@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
def test_a_sharded_model_has_a_unit_a_layer_float32_weights_and_the_gradients_of_the_whole_one(
    one_rank, compute, shape
):
    whole, live = Live(opened(compute=compute)), Live(opened(compute=compute))
    assert parallelize(live, init_device_mesh("cpu", shape, mesh_dim_names=("copy", "shard")[-len(shape) :])) is live
    units = [name for name, module in live.named_modules() if isinstance(module, FSDPModule)]
    assert units == ["", *(f"model.model.layers.{number}" for number in range(3))]
    batch = batch_of_windows()
    products = []
    live.model.model.layers[0].mlp.up_proj.register_forward_hook(lambda module, inputs, out: products.append(out.dtype))
    for model in (whole, live):
        judged = model(batch, choose_some)
        assert judged.losses.dtype == torch.float32
        judged.loss_sum.backward()
    assert products == [compute]
    # The head and the embeddings stay gathered between the forward and the backward of the kept rows.
    assert live._get_fsdp_state()._fsdp_param_group.post_forward_mesh_info is None
    tolerance = 1e-4 if compute == torch.float32 else 0.1
    for (name, one), (_, other) in zip(whole.named_parameters(), live.named_parameters(), strict=True):
        assert other.dtype == torch.float32
        assert (one.grad - other.grad.full_tensor()).norm() <= tolerance * one.grad.norm(), name


class Body(nn.Module):
    def __init__(self, *sizes):
        super().__init__()
        self.lists = nn.ModuleDict(
            {str(n): nn.ModuleList(nn.Identity() for _ in range(s)) for n, s in enumerate(sizes)}
        )

    @property
    def base_model(self):
        return self


def test_the_layers_are_the_longest_list_of_the_body():
    assert len(decoder_layers(Body(0, 2, 5, 3))) == 5
    assert not decoder_layers(Body()) and not decoder_layers(Body(0))

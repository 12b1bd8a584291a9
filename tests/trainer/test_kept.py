"""`train.backward: kept` against plain autograd in which tokens that are not trained on are context and nothing more."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.functional import cross_entropy, linear
from transformers import GPT2Config, GPT2LMHeadModel

from schemas import product
from schemas.errors import UserError
from schemas.forward import decoder_layers
from schemas.probe import prove
from tests.trainer import test_live
from tests.trainer.test_live import WINDOWS, batch_of_windows, choose_some
from trainer.kept import KeptRows, _multiply, carry_kept
from trainer.live import Live, parallelize, recompute


def opened(kind="linear", compute=torch.float32):
    """As the trainer opens it."""
    found = test_live.opened(kind, compute)
    if compute == torch.float32:
        product.install(found.module)
    return found


def choose_every_other(losses):
    """A mask that leaves out many, the first token of a window among them."""
    mask = ~torch.isnan(losses)
    mask[:, ::2] = False
    return mask


def detached(model, mask):
    """Have keys and values of tokens outside of `mask` [tokens] carry no gradient."""
    layers = [part for layer in model.model.layers for part in (layer.self_attn.k_proj, layer.self_attn.v_proj)]
    return [
        layer.register_forward_hook(lambda _module, _inputs, out: torch.where(mask[None, :, None], out, out.detach()))
        for layer in layers
    ]


def plain_gradients(model, choose):
    """Of the kept losses, from a forward of each window alone."""
    losses = torch.zeros(2, 16)
    for window, (row, start) in zip(WINDOWS, [(0, 0), (0, 9), (1, 0)], strict=True):
        losses[row, start + len(window) - 1 :] = torch.nan
        losses[row, start : start + len(window) - 1] = 0
    chosen = choose(losses)
    model.zero_grad()
    for window, (row, start) in zip(WINDOWS, [(0, 0), (0, 9), (1, 0)], strict=True):
        mask, tokens = chosen[row, start : start + len(window)].clone(), torch.from_numpy(window)
        mask[-1] = False  # the last token predicts nothing
        hooks = detached(model, mask)
        logits = model(input_ids=tokens[None]).logits[0, :-1]
        cross_entropy(logits, tokens[1:], reduction="none")[mask[:-1]].sum().backward()
        for hook in hooks:
            hook.remove()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("choose", [choose_some, choose_every_other])
@pytest.mark.parametrize("kind", ["linear", "capped"])
@pytest.mark.parametrize("again", ["none", "full"])
def test_gradients_are_those_of_a_model_to_which_dropped_tokens_are_context_alone(kind, choose, again):
    model = opened(kind)
    exact = plain_gradients(model.module, choose)
    live = Live(opened(kind), "kept")
    if again != "none":
        recompute(live.model, again)
    judged = live(batch_of_windows(), choose)
    judged.loss_sum.backward()
    for name, parameter in live.model.named_parameters():
        torch.testing.assert_close(parameter.grad, exact[name], rtol=1e-4, atol=1e-5, msg=name)
    whole = Live(opened(kind))
    other = whole(batch_of_windows(), choose)
    other.loss_sum.backward()
    assert torch.equal(judged.losses.nan_to_num(), other.losses.nan_to_num())
    # What is left out is no rounding.
    one, two = (m.model.model.layers[0].self_attn.v_proj.weight.grad for m in (live, whole))
    assert (one - two).norm() > 0.05 * two.norm()


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
def test_where_every_token_is_kept_they_are_the_full_ones(compute):
    def every(losses):
        return ~torch.isnan(losses)

    gradients = []
    for backward in ("full", "kept"):
        live = Live(opened(compute=compute), backward)
        live(batch_of_windows(), every).loss_sum.backward()
        gradients.append(dict(live.model.named_parameters()))
    for name, parameter in gradients[0].items():
        error = (parameter.grad - gradients[1][name].grad).norm()
        assert error <= (1e-5 if compute == torch.float32 else 0.02) * parameter.grad.norm(), name


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
def test_losses_are_to_the_bit_those_of_the_full_backward_with_and_without_gradients(compute):
    one, two = (Live(opened(compute=compute), backward) for backward in ("full", "kept"))
    for gradients in (True, False):
        with torch.set_grad_enabled(gradients):
            found, wanted = (live(batch_of_windows(), choose_some).losses for live in (two, one))
        assert torch.equal(found.nan_to_num(), wanted.nan_to_num())


def test_a_step_that_keeps_nothing_has_no_gradient():
    live = Live(opened(), "kept")
    live(batch_of_windows(), lambda losses: torch.zeros_like(losses, dtype=torch.bool)).loss_sum.backward()
    assert all(not parameter.grad.any() for parameter in live.parameters() if parameter.grad is not None)


def test_a_sharded_model_goes_back_as_the_whole_one(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        whole, live = Live(opened(), "kept"), Live(opened(), "kept")
        parallelize(live, init_device_mesh("cpu", (1,), mesh_dim_names=("shard",)))
        for model in (whole, live):
            model(batch_of_windows(), choose_every_other, 11).loss_sum.backward()
        for (name, one), (_, other) in zip(whole.named_parameters(), live.named_parameters(), strict=True):
            torch.testing.assert_close(one.grad, other.grad.full_tensor(), rtol=1e-5, atol=1e-6, msg=name)
    finally:
        dist.destroy_process_group()


def test_the_backward_of_a_layer_goes_over_kept_rows_alone():
    live = Live(opened(), "kept")
    judged = live(batch_of_windows(), choose_every_other)
    assert live.kept.tokens == judged.mask.numel() and len(live.kept.index) == judged.mask.sum()


def test_a_model_without_plain_linear_layers_is_refused():
    model = prove(
        GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=40)).eval(), torch.float32, 16, "base"
    )
    assert decoder_layers(model.module)
    with pytest.raises(
        UserError, match=r"train\.backward: kept: GPT2LMHeadModel has no plain linear layers; set it to full"
    ):
        carry_kept(model.module)


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [None, 6])
def test_a_layer_with_a_bias_goes_back_as_if_dropped_rows_had_no_gradient_and_forward_as_ever(compute, count):
    torch.manual_seed(4)
    layer, rows, upper = torch.nn.Linear(5, 7), torch.randn(2, 8, 5, requires_grad=True), torch.randn(2, 8, 7)
    mask = torch.zeros(2, 8, dtype=torch.bool)
    mask[0, [1, 2, 7]] = mask[1, [0, 3, 4]] = True
    plain = linear(rows, layer.weight, layer.bias)
    wanted = torch.autograd.grad(plain, (rows, *layer.parameters()), upper * mask[..., None])
    kept = KeptRows()
    with torch.autocast("cpu", compute, enabled=compute != torch.float32):
        found = _multiply(kept, rows, layer.weight, layer.bias)
        with torch.no_grad():
            assert torch.equal(found, _multiply(kept, rows, layer.weight, layer.bias))
    assert found.dtype == compute
    kept.set(mask, count)
    close = {"rtol": 1e-5, "atol": 1e-6} if compute == torch.float32 else {"rtol": 0.02, "atol": 0.05}
    torch.testing.assert_close(found.float(), plain, **close)
    gradients = torch.autograd.grad(found, (rows, *layer.parameters()), upper.to(compute))
    for gradient, one in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(gradient, one, **close)
    assert not gradients[0][~mask].any()


def test_rows_that_are_not_a_batchs_go_back_whole_and_what_needs_no_gradient_gets_none():
    layer, rows, kept = torch.nn.Linear(5, 7), torch.randn(3, 5), KeptRows()
    kept.set(torch.tensor([[True, False, False, True]]), None)  # of four tokens; these are the three of an expert
    upper = torch.randn(3, 7)
    wanted = torch.autograd.grad(linear(rows, layer.weight, layer.bias), layer.parameters(), upper)
    layer.weight.requires_grad_(True)
    found = torch.autograd.grad(_multiply(kept, rows, layer.weight, layer.bias), layer.parameters(), upper)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)
    layer.requires_grad_(False)
    rows.requires_grad_(True)
    _multiply(kept, rows, layer.weight, None).backward(upper)
    torch.testing.assert_close(rows.grad, upper @ layer.weight)
    assert layer.weight.grad is None and layer.bias.grad is None

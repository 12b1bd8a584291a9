"""Law 11: the kept-rows-only backward equals a masked cross-entropy."""

import pytest
import torch

import trainer.head
from trainer.head import KeptLoss


def masked_cross_entropy(hidden, weight, targets, mask):
    losses = torch.nn.functional.cross_entropy(hidden @ weight.T, targets, ignore_index=-100, reduction="none")
    return losses[mask].sum()


@pytest.mark.parametrize("they_fit", [True, False], ids=["kept", "projected again"])
@pytest.mark.parametrize("kept", [0.0, 0.3, 1.0])
def test_kept_rows_backward_equals_masked_cross_entropy(monkeypatch, they_fit, kept):
    torch.manual_seed(0)
    monkeypatch.setattr(trainer.head, "KEPT_BYTES", 1 << 30 if they_fit else 0)
    hidden, weight = torch.randn(2500, 16, requires_grad=True), torch.randn(97, 16, requires_grad=True)
    targets = torch.randint(0, 97, (2500,))
    targets[::7] = -100
    mask = (torch.rand(2500) < kept) & (targets != -100)
    expected = masked_cross_entropy(hidden, weight, targets, mask)
    wanted = torch.autograd.grad(expected * 0.125, (hidden, weight)) if mask.any() else None
    found, losses, returned = KeptLoss.apply(hidden, weight, targets, lambda losses: mask)
    got = torch.autograd.grad(found * 0.125, (hidden, weight))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)
    assert torch.equal(returned, mask)
    assert torch.equal(torch.isnan(losses), targets == -100)
    for one, other in zip(got, wanted or [torch.zeros_like(hidden), torch.zeros_like(weight)], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_dropped_rows_get_no_gradient():
    hidden, weight = torch.randn(10, 4, requires_grad=True), torch.randn(7, 4, requires_grad=True)
    mask = torch.arange(10) % 2 == 0
    KeptLoss.apply(hidden, weight, torch.randint(0, 7, (10,)), lambda losses: mask)[0].backward()
    assert not hidden.grad[~mask].any() and hidden.grad[mask].any()


def test_what_the_forward_keeps_in_bfloat16_costs_the_gradient_nothing_beside_its_products(monkeypatch):
    torch.manual_seed(0)
    hidden, weight = torch.randn(512, 64).bfloat16(), (torch.randn(997, 64) * 10 / 8).bfloat16()  # logits of 10
    targets = torch.where(torch.rand(512) < 0.5, (hidden.float() @ weight.float().T).argmax(1), 3)
    mask = torch.rand(512) < 0.6
    exact = [tensor.float().requires_grad_() for tensor in (hidden, weight)]
    wanted = torch.autograd.grad(masked_cross_entropy(*exact, targets, mask), exact)
    rounded = [tensor.clone().requires_grad_() for tensor in (hidden, weight)]
    for limit in (1 << 30, 0):
        monkeypatch.setattr(trainer.head, "KEPT_BYTES", limit)
        found = torch.autograd.grad(KeptLoss.apply(*rounded, targets, lambda losses: mask)[0], rounded)
        for one, other in zip(found, wanted, strict=True):
            assert float((one.float() - other).abs().max() / other.abs().max()) < 0.01


def test_the_choice_is_made_by_losses_that_are_a_cross_entropys_and_carry_no_gradient():
    hidden, weight = torch.randn(10, 4, requires_grad=True), torch.randn(7, 4, requires_grad=True)
    targets = torch.tensor([3, -100, 6, 0, 1, -100, 2, 5, 4, 0])
    seen = []

    def choose(losses):
        seen.append(losses)
        return losses > 1.0

    total, losses, mask = KeptLoss.apply(hidden, weight, targets, choose)
    expected = torch.nn.functional.cross_entropy(hidden @ weight.T, targets, ignore_index=-100, reduction="none")
    expected = torch.where(targets == -100, torch.nan, expected.detach())
    torch.testing.assert_close(seen[0], expected, equal_nan=True)
    torch.testing.assert_close(losses, expected, equal_nan=True)
    assert torch.equal(mask, expected > 1.0) and 0 < int(mask.sum()) < 8
    assert total.requires_grad and not losses.requires_grad and not mask.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("short", [0, 1])
def test_rows_are_projected_once_if_their_logits_fit_else_the_kept_ones_again_and_few_at_a_time(
    monkeypatch, dtype, short
):
    hidden = torch.randn(300, 8, dtype=dtype, requires_grad=True)
    weight = torch.randn(50, 8, dtype=dtype, requires_grad=True)
    sizes, real = [], trainer.head.project
    monkeypatch.setattr(trainer.head, "project", lambda rows, weight: (sizes.append(len(rows)), real(rows, weight))[1])
    monkeypatch.setattr(trainer.head, "CHUNK_TOKENS", 128)
    monkeypatch.setattr(trainer.head, "KEPT_BYTES", 300 * 50 * dtype.itemsize - short)
    mask = torch.arange(300) < 140
    KeptLoss.apply(hidden, weight, torch.zeros(300, dtype=torch.int64), lambda losses: mask)[0].backward()
    assert sizes == [128, 128, 44] + [128, 12] * short

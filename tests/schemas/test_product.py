"""Float32 products by oneDNN are those of float64 but for rounding, and only where nothing asks for more."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from schemas import product
from schemas.config import Score
from schemas.errors import UserError
from schemas.models import open_model
from score_jobs.engines.packed import PackedEngine


@pytest.mark.parametrize("shape", [(7, 5, 3), (1, 300, 64), (257, 65, 33), (0, 8, 8), (8, 8, 0)])
@pytest.mark.parametrize("biased", [True, False])
def test_a_product_is_that_of_float64_of_any_shape_also_of_rows_and_weights_that_are_views(
    shape: tuple[int, int, int], biased: bool
) -> None:
    torch.manual_seed(0)
    rows, columns, depth = shape
    left, weight = torch.randn(2, depth, rows).transpose(1, 2), torch.randn(depth, 2 * columns)[:, columns:].T
    bias = torch.randn(columns) if biased else None
    with torch.no_grad():
        found = product.product(left, weight, bias)
    expected = left.double() @ weight.double().T + (0 if bias is None else bias.double())
    assert found.dtype == torch.float32 and found.shape == (2, rows, columns)
    torch.testing.assert_close(found.double(), expected, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("wanted", [(True, True, True), (True, False, False), (False, True, False)])
def test_gradients_of_a_product_are_those_of_pytorchs_own_and_none_is_computed_that_nobody_asked_for(
    wanted: tuple[bool, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    exact, made = product._onednn, list[int]()
    monkeypatch.setattr(product, "_onednn", lambda *given: made.append(1) or exact(*given))
    torch.manual_seed(0)
    given = torch.randn(2, 9, 5).transpose(1, 2), torch.randn(7, 9), torch.randn(7)
    weights = torch.randn(2, 5, 7).transpose(0, 1).contiguous().transpose(0, 1)
    gradients = []
    for multiply in (product.product, torch.nn.functional.linear):
        leaves = [tensor.clone().requires_grad_(asked) for tensor, asked in zip(given, wanted, strict=True)]
        (multiply(*leaves) * weights).sum().backward()
        gradients.append([leaf.grad for leaf in leaves])
    for one, other in zip(*gradients, strict=True):
        assert (one is None) == (other is None)
        assert len(made) == 1 + wanted[0] + wanted[1]
        torch.testing.assert_close(one, other)


def test_other_dtypes_are_pytorchs_own() -> None:
    rows, weight = torch.randn(4, 3), torch.randn(5, 3)
    with torch.no_grad():
        for dtype in (torch.float64, torch.bfloat16):
            assert torch.equal(product.product(rows.to(dtype), weight.to(dtype)), rows.to(dtype) @ weight.to(dtype).T)


def test_a_product_of_float32_keeps_its_factors_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(product, "_narrow_factors", None)
    rows, weight = torch.randn(4, 64), torch.randn(5, 64)
    exact = (rows.double() @ weight.double().T).float()
    torch.testing.assert_close(product.project(rows, weight), exact, atol=1e-5, rtol=1e-5)


def test_the_dtype_of_autocast_is_what_it_computes_products_in_and_none_where_it_is_off_or_unknown() -> None:
    cpu, weight = torch.device("cpu"), torch.randn(3, 3)
    assert product.autocast_dtype(cpu) is None
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype):
            assert product.autocast_dtype(cpu) == (weight @ weight).dtype == dtype
            assert product.autocast_dtype(torch.device("meta")) is None
            with torch.autocast("cpu", enabled=False):
                assert product.autocast_dtype(cpu) is None


def test_a_layer_that_was_given_a_product_can_be_given_another() -> None:
    layer = nn.Linear(3, 4)
    assert product.install(layer, lambda *_: torch.zeros(1)) == 1 and layer(torch.ones(3)).tolist() == [0.0]
    assert product.install(layer) == 1 and layer(torch.ones(3)).shape == (4,)


def test_only_plain_linear_layers_that_nobody_changed_are_given_the_product(monkeypatch: pytest.MonkeyPatch) -> None:
    class Other(nn.Linear):
        pass

    changed = nn.Linear(3, 3)
    changed.forward = lambda input: input  # type: ignore[method-assign]
    layers = nn.ModuleList([nn.Linear(3, 4, bias=False), nn.Linear(3, 4), Other(3, 4), changed, nn.Bilinear(3, 3, 4)])
    assert product.install(layers) == 2
    seen: list[Any] = []
    monkeypatch.setattr(product, "product", lambda *given: seen.append(given))
    rows = torch.randn(2, 3)
    for layer in layers:
        layer(*(rows, rows) if isinstance(layer, nn.Bilinear) else (rows,))
    assert [given[1:] for given in seen] == [(layer.weight, layer.bias) for layer in layers[:2]]


def test_law_13_a_product_that_is_not_the_models_own_is_refused_when_it_is_opened(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = product._forward
    monkeypatch.setattr(product, "_forward", lambda *given: exact(*given) * 1.01)
    open_model(tiny_model, "base", 32, compute=torch.bfloat16)
    with pytest.raises(UserError, match=r"base: .* lets a window's losses depend on what else is in the batch"):
        open_model(tiny_model, "base", 32)


def test_an_engine_multiplies_by_onednn_in_float32_on_a_cpu_alone_and_its_receipts_say_so(tiny_model: Path) -> None:
    def engine(dtype: str) -> PackedEngine:
        return PackedEngine(
            tiny_model, 16, Score.model_validate({"model": "", "output": "", "dtype": dtype, "batch_tokens": 32}), "cpu"
        )

    for dtype, expected in (("float32", "onednn"), ("bfloat16", None)):
        found = engine(dtype)
        given = [layer for layer in found.model.module.modules() if "forward" in vars(layer)]
        assert bool(given) == bool(expected) and found.describe().get("product") == expected
        assert np.isfinite(found.score([np.arange(9)])[0].loss[1:]).all()
    assert not product.by_onednn(torch.float32, "cuda")

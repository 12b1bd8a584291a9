"""Decoder layers are compiled each for one shape, and run as written where that is asked."""

from typing import Any

import pytest
import torch
from torch import nn

from schemas.compiling import compile_layers, uncompiled


class Layer(nn.Module):
    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return rows * 2 + 1


class Body(nn.Module):
    """Two layers behind a list that is not theirs."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.Identity()])
        self.layers = nn.ModuleList([Layer(), Layer()])

    @property
    def base_model(self) -> "Body":
        return self

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return self.layers[1](self.layers[0](self.norms[0](rows)))


def test_a_layer_is_compiled_for_one_shape_after_another_and_for_none_while_it_is_uncompiled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[Any] = []

    def compiler(graph: Any, inputs: list[Any], **_: Any) -> Any:
        asked.append([tuple(given.shape) if isinstance(given, torch.Tensor) else "any size" for given in inputs])
        return graph.forward

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", compiler)
    torch._dynamo.reset()
    body = Body()
    compile_layers(body)
    with torch.no_grad():
        for tokens in (5, 7, 5):
            body(torch.randn(1, tokens, 4))
        assert asked == [[(1, 5, 4)], [(1, 7, 4)]]
        with uncompiled():
            rows = torch.randn(1, 9, 4)
            assert torch.equal(body(rows), (rows * 2 + 1) * 2 + 1)
    assert len(asked) == 2
    torch._dynamo.reset()

"""The float32 product on a CPU, by oneDNN where PyTorch itself asks MKL, whose widest kernels are for Intel's processors.

AMD EPYC, shapes of a 135M model: 245 to 260 GFLOP/s a core by oneDNN, 110 by MKL. Which one computes is a function of
PyTorch's build and of dtype and device, not of the processor: a dataset's workers may be of several makes. Weights stay
as they are: oneDNN reorders them a block at a time, which costs 4 % at a thousand rows and no memory.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear

NAME = "onednn"
Multiply = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]  # as `product`


def by_onednn(dtype: torch.dtype, device: str | torch.device) -> bool:
    """Whether products of this dtype are computed here by oneDNN, and not by what PyTorch would choose."""
    return dtype == torch.float32 and torch.device(device).type == "cpu" and torch.backends.mkldnn.is_available()


def product(rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`rows @ weight.T + bias`: rows [..., d], weight [n, d], bias [n]."""
    if weight.dtype != rows.dtype or not by_onednn(rows.dtype, rows.device) or not rows.numel():
        return linear(rows, weight, bias)
    if torch.is_grad_enabled():
        found: Any = _Product.apply(rows, weight, bias)
        return found
    return (_opaque if torch.compiler.is_compiling() else _onednn)(rows, weight, bias)


class _Product(torch.autograd.Function):
    """The same with gradients, which are products of the same kind."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None):  # type: ignore[override]
        ctx.save_for_backward(rows, weight)
        return product(rows, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor):  # type: ignore[override]
        rows, weight = ctx.saved_tensors
        of_rows, of_weight, of_bias = ctx.needs_input_grad
        flat = grad.flatten(0, -2)
        return (
            product(grad, weight.T) if of_rows else None,
            product(flat.T, rows.flatten(0, -2).T) if of_weight else None,
            flat.sum(0) if of_bias else None,
        )


def _onednn(rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")


# Inductor itself knows the operator only with weights that are reordered for good.
_opaque = torch.library.custom_op("tokensift::onednn", _onednn, mutates_args=())


@_opaque.register_fake
def _(rows: torch.Tensor, weight: torch.Tensor, _bias: Any) -> torch.Tensor:
    return rows.new_empty(*rows.shape[:-1], weight.shape[0])


def project(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`rows @ weight.T` in float32, summed in float32 by the product itself: rows [n, d], weight [m, d] to [n, m].

    Rounding logits to bfloat16 would cost up to 0.06 nats at a logit of 20.
    """
    if weight.dtype == torch.float32:
        return product(rows, weight)
    if rows.is_cuda:
        return torch.mm(rows, weight.T, out_dtype=torch.float32)
    with _narrow_factors():
        return rows.float() @ weight.float().T


@contextmanager
def _narrow_factors() -> Iterator[None]:
    """Float32 products on a CPU may round their factors to bfloat16: for such as hold bfloat16 values that is exact."""
    setting: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = setting.fp32_precision
    setting.fp32_precision = "bf16"
    try:
        yield
    finally:
        setting.fp32_precision = before


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype that autocast has products on a device computed in; None where it is off."""
    on = torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)
    return torch.get_autocast_dtype(device.type) if on else None


def install(module: nn.Module, multiply: Multiply = product) -> int:
    """Have a model's plain linear layers multiply so; layers of any other kind, and such as others changed, stay.

    Returns how many there are.
    """
    layers = [layer for layer in module.modules() if type(layer) is nn.Linear and _is_plain(layer)]
    for layer in layers:
        vars(layer)["forward"] = partial(_forward, layer, multiply)
    return len(layers)


def _is_plain(layer: nn.Linear) -> bool:
    forward = vars(layer).get("forward")
    return forward is None or getattr(forward, "func", None) is _forward


def _forward(layer: Any, multiply: Multiply, rows: torch.Tensor) -> torch.Tensor:
    return multiply(rows, layer.weight, layer.bias)

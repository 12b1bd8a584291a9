"""Compiled decoder layers, in both stages: how they are compiled, run as written, and what is said where that fails."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch._dynamo.exc import TorchDynamoException

from schemas.errors import UserError, first_line
from schemas.forward import decoder_layers


def compile_layers(module: Any) -> None:
    """Have each decoder layer compiled, for the one shape that its first batch has."""
    for layer in decoder_layers(module):
        layer.compile(dynamic=False)


def uncompiled() -> AbstractContextManager[Any]:
    """While it is entered, compiled layers run as they are written: for batches of other shapes."""
    return torch.compiler.set_stance("force_eager")


@contextmanager
def compiling(field: str) -> Iterator[None]:
    """While it is entered, layers that cannot be compiled are a UserError that names the config's `field`."""
    try:
        yield
    except TorchDynamoException as error:
        raise UserError(f"{field}: {first_line(error)}", "set it to false, or install a compiler") from error

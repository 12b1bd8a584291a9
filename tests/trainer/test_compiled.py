"""Compiled layers that are not the model, or let windows see each other, are refused before they take a step."""

from contextlib import contextmanager

import pytest
import torch

import trainer.compiled
from schemas.errors import UserError
from schemas.forward import decoder_layers
from schemas.models import open_model
from trainer.compiled import prove_compiled
from trainer.live import Live
from trainer.ranks import Ranks
from trainer.stream import Geometry

GEOMETRY = Geometry(rows=2, row_tokens=64, micro_rows=2)


@pytest.fixture
def live(tiny_model, monkeypatch):
    """`live(change, dtype)`: a model whose last layer, when "compiled", gives `change` of its output [rows, tokens, d]."""

    def make(change, compute=torch.float32):
        found = Live(open_model(tiny_model, "base", 32, compute=compute))
        layer, plain = decoder_layers(found.model)[-1], []

        @contextmanager
        def uncompiled():
            plain.append(True)
            yield
            plain.clear()

        def call(*arguments, **named):
            output = layer._call_impl(*arguments, **named)
            return output if plain else change(output)

        monkeypatch.setattr(trainer.compiled, "uncompiled", uncompiled)
        layer._compiled_call_impl = call
        return found

    return make


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
def test_layers_that_compute_what_they_say_are_taken(live, compute):
    prove_compiled(live(lambda output: output, compute), GEOMETRY, 32, Ranks(0, 1, torch.device("cpu")))


@pytest.mark.parametrize(
    "change",
    [
        lambda output: output * 1.5 + output.roll(1, 2),
        lambda output: output + 0.3 * output.mean(1, keepdim=True),  # windows of a row see each other
    ],
    ids=["other losses", "a leak"],
)
@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
def test_layers_that_compute_something_else_are_refused(live, change, compute):
    with pytest.raises(UserError, match=r"train\.compile: compiled layers give other losses"):
        prove_compiled(live(change, compute), GEOMETRY, 32, Ranks(0, 1, torch.device("cpu")))


def test_a_compiler_that_fails_is_a_users_error(live):
    def fail(_output):
        raise torch._dynamo.exc.Unsupported("no C++ compiler", None)

    with pytest.raises(UserError, match=r"train\.compile: no C\+\+ compiler.*install a compiler"):
        prove_compiled(live(fail), GEOMETRY, 32, Ranks(0, 1, torch.device("cpu")))

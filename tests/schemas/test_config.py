"""Config errors name the file and the field."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from schemas.config import load_config
from schemas.errors import UserError


def test_a_config_that_is_written_is_read_back_the_same(
    make_config: Callable, write_config: Callable, tmp_path: Path
) -> None:
    config = make_config(tmp_path)
    assert load_config(write_config(config, tmp_path / "c.yaml")) == config


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("train.keep", 1.5),
        ("train.kep", 0.5),
        ("score.dtype", "float16"),
        ("context.window", 1),
        ("score.workers", "many"),
        ("corpus.dataset", "both/given"),
        ("train.tokens", 100),
    ],
)
def test_a_wrong_field_is_named_together_with_its_file(
    make_config: Callable, write_config: Callable, tmp_path: Path, field: str, value: Any
) -> None:
    path = write_config(make_config(tmp_path), tmp_path / "mine.yaml")
    with pytest.raises(UserError) as caught:
        load_config(path, {field: value})
    message = str(caught.value)
    named = field.rpartition(".")[0] if field in ("corpus.dataset", "train.tokens") else field
    assert str(path) in message and f"`{named}`" in message


def test_overrides_reach_nested_fields(make_config: Callable, write_config: Callable, tmp_path: Path) -> None:
    path = write_config(make_config(tmp_path), tmp_path / "c.yaml")
    assert load_config(path, {"train.keep": 0.7}).train.keep == 0.7


@pytest.mark.parametrize("content", [None, "a: [", "- just\n- a list\n", ""])
def test_a_file_that_is_no_config_is_the_users_error_and_is_named(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "mine.yaml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=r"mine\.yaml"):
        load_config(path)

"""Which versions are installed, here and in another environment, as these say themselves."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from schemas import environment
from schemas.environment import installed
from schemas.errors import UserError

ASKED = ("torch", "no-such-package", "numpy")


@pytest.mark.parametrize("python", [None, Path(sys.executable)])
def test_versions_are_those_that_the_packages_name_and_what_is_not_installed_is_left_out(python: Path | None) -> None:
    assert installed(ASKED, python) == {"torch": torch.__version__, "numpy": np.__version__}


def test_another_pythons_packages_are_its_own(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path)], check=True)
    assert installed(ASKED, tmp_path / "bin" / "python") == {}


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        (None, "No such file"),
        ("exit 3", "exit status 3"),
        ("echo hello", "Expecting value"),
        ("exec sleep 60", "timed out"),
    ],
)
def test_what_is_no_python_is_named_with_the_field_and_the_way_to_one(
    script: str | None, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if reason == "timed out":
        monkeypatch.setattr(environment, "ASK_SECONDS", 0.1)
    python = tmp_path / "python"
    if script:
        python.write_text(f"#!/bin/sh\n{script}\n")
        python.chmod(0o755)
    with pytest.raises(UserError, match=rf"^score\.python: {python} .*({reason}).*; name the Python of.*make vllm"):
        installed(["torch"], python)

"""From outside the checkout: the wheel holds all that a command needs, and works in a folder that knows no source."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds what the wheel installs."""
    made = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "--wheel-dir", str(made), str(ROOT)], check=True)
    (wheel,) = made.glob("*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", str(made / "site"), str(wheel)], check=True)
    return made / "site"


def test_the_wheel_finds_its_shipped_configs_and_makes_the_demos_data_anywhere(installed: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(installed)}

    def tokensift(*arguments: str) -> str:
        code = f"import pipeline.cli as cli; assert cli.__file__.startswith({str(installed)!r}); cli.main()"
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    assert "data: " in tokensift("data", "--scale", "0.02")
    assert (tmp_path / "runs" / "demo" / "data" / "manifest.json").exists()
    assert "tokensift 0." in tokensift("--version")

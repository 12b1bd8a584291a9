"""`make mutants PATH=schemas/seal.py`: does a test fail for every small mistake that could be made in a module?

Runs mutmut in a copy of the tree on one module, or on each of a folder, against the tests that mirror it:
`trainer/head.py` against `tests/trainer/test_head.py`, or against those that `TESTS="..."` names (files, or tests as pytest
does); `NAMES="..."` mutates these functions and methods alone. Prints how many mutants were killed and the difference of
each that survived. mutmut leaves constants of a module and functions under a decorator as they are.
"""

import os
import shutil
import subprocess
import sys
from collections import Counter
from fnmatch import fnmatch
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COPY = ROOT / "build" / "mutants"
PACKAGES = ("schemas", "score_jobs", "trainer", "pipeline")
ALSO = ("tests", "configs", "docs", "README.md", "pyproject.toml")
CONFIG = """[mutmut]
source_paths=
  {package}
only_mutate=
  {module}
also_copy=
  {others}
pytest_add_cli_args=
  -p
  no:cacheprovider
  --hypothesis-seed=0
pytest_add_cli_args_test_selection=
  {tests}
use_git_change_detection=false
"""


def main() -> None:
    """Mutate the modules that the arguments name."""
    # As make's own variable PATH takes the place of the environment's.
    os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.defpath}"
    for name in sys.argv[1:]:
        path = ROOT / name
        for module in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            if module.name != "__init__.py":
                mutate(module.relative_to(ROOT))


def mutate(module: Path) -> None:
    """Run the mutants of one module and print what became of them."""
    tests = os.environ.get("TESTS", "").split() or [f"tests/{module.parent}/test_{module.name}"]
    if missing := [name for name in tests if not (ROOT / name.partition("::")[0]).exists()]:
        print(f"{module}: no {', '.join(missing)}; name its tests as in TESTS=tests/score_jobs/test_corpus.py")
        return
    shutil.rmtree(COPY, ignore_errors=True)
    COPY.mkdir(parents=True)
    for name in (*PACKAGES, *ALSO):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, COPY / name)
    others = [name for name in (*PACKAGES, *ALSO) if name != module.parts[0]]
    text = CONFIG.format(package=module.parts[0], module=module, others="\n  ".join(others), tests="\n  ".join(tests))
    (COPY / "setup.cfg").write_text(text)
    # As mutmut calls functions and methods.
    names = [f"*{kind}{name}__mutmut_*" for name in os.environ.get("NAMES", "").split() for kind in ("x_", "ǁ")]
    run = mutmut("run", "--max-children", "1", *names)
    lines = [line.strip().rpartition(": ") for line in mutmut("results", "--all", "true").splitlines() if ": " in line]
    lines = [line for line in lines if not names or any(fnmatch(line[0], name) for name in names)]
    counts = Counter(status for _, _, status in lines)
    if not counts or counts["not checked"]:
        sys.exit(f"{module}: its tests did not run through\n{run[-3000:]}")
    print(shown([name for name, _, status in lines if status not in ("killed", "timeout")]))
    killed = counts["killed"] + counts["timeout"]
    print(f"{module}: {killed} of {counts.total()} mutants killed ({killed / counts.total():.0%}), {dict(counts)}")


def mutmut(*arguments: str) -> str:
    """What mutmut says to a command."""
    return _said("-m", "mutmut", *arguments)


def shown(names: list[str]) -> str:
    """What happened to mutants, and the difference of each; by one process, since to start one takes a second."""
    return _said("-c", "import sys, mutmut.__main__ as m; [m.show.callback(name) for name in sys.argv[1:]]", *names)


def _said(*arguments: str) -> str:
    return subprocess.run(
        ["nice", sys.executable, *arguments], cwd=COPY, capture_output=True, text=True, check=False
    ).stdout


if __name__ == "__main__":
    main()

"""The demo's data, made from installed packages: no download, same bytes for same seed and versions.

The corpus stands for OpenWebMath: manual pages (docstrings of numpy, sympy, networkx) with page furniture,
and worked problems hidden between their sections: reasoning-gym's GSM templates and CHAMP's model-written
answers, right and wrong. The curated corpus holds right worked answers only. Test and validation text have templates and
CHAMP problems of their own, which occur nowhere else, and no 13 words of theirs in a row (`pipeline.demo.overlap`): a
learning rate is chosen on validation text, and what is claimed was measured on test text. The base model's pages come from
modules that are not in the corpus.
"""

import ast
import hashlib
import io
import json
import os
import random
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from pipeline.demo.choices import ranked_problems
from pipeline.demo.overlap import HeldOut
from schemas.config import Demo
from schemas.errors import UserError

PACKAGES = ("networkx", "numpy", "sympy")
SOURCES = (*PACKAGES, "champ-dataset", "reasoning-gym")
COLUMNS = ("url", "text", "date", "metadata")
SHARDS = 2
ZSTD_LEVEL = 9
TARGET_GSM, TARGET_CHAMP, EXACT_MATCH, RANKED = 120, 40, 40, 200
VALIDATION_GSM, VALIDATION_CHAMP = 60, 20
TEST_SHARE, VALIDATION_SHARE = 0.25, 0.15  # of templates and of CHAMP problems
GSM_SUFFIX = " Give the result as your final answer. Do not include units."
RECIPE = 8  # raise when other text is made, so that old folders are rebuilt
PAGE_BYTES = (800, 2_000, 5_000, 12_000)

Row = dict[str, Any]


class Sources:
    """The raw problems, split once by seed: `templates` and `problems` are what each kind of text may use."""

    def __init__(self, seed: int) -> None:
        """Read CHAMP's JSON and list reasoning-gym's templates; share each out by `split`."""
        from reasoning_gym.arithmetic.gsm_symbolic.gsm_symbolic import tasks_ok

        self.seed = seed
        rng = random.Random(f"{seed} split")
        path = metadata.distribution("champ-dataset").locate_file("champ_dataset/dataset_files/v0.json")
        self.champ: dict[str, Row] = json.loads(Path(str(path)).read_text(encoding="utf-8"))["problems"]
        self.templates = split(rng, [int(task) for task in tasks_ok])
        self.problems = split(rng, sorted(self.champ))

    def gsm(self, purpose: int, templates: set[Any]) -> Iterator[tuple[int, str, str, str]]:
        """Endless distinct (template, prompt, worked answer, number); another `purpose`, other items."""
        from reasoning_gym.arithmetic.gsm_symbolic.gsm_symbolic import GSMSymbolicDataset, GSMSymbolicDatasetConfig

        # An item is drawn from seed + index, so nearby seeds would repeat items; a billion apart they cannot.
        config = GSMSymbolicDatasetConfig(seed=(self.seed * 16 + purpose) * 10**9, size=100_000)
        made, seen = GSMSymbolicDataset(config), set()
        for index, template in enumerate(made.task_indices):
            if template in templates:
                item = made[index]
                prompt = ask(item["question"].removesuffix(GSM_SUFFIX))
                if prompt not in seen:
                    seen.add(prompt)
                    yield template, prompt, answer(item["metadata"]["answer_cot"]), item["answer"]

    def champ_outputs(self, rng: random.Random) -> dict[str, bool]:
        """Model-written solutions of training problems in random order; true if the result is the right number."""
        told: dict[str, bool] = {}
        for problem in sorted(self.problems.train):
            row = self.champ[problem]
            for setting, talk in sorted(row["conversations"].items()):
                said = [turn["text"] for turn in talk["messages"] if turn["role"].startswith("Model.") and turn["text"]]
                # Prompts of 5-Shot show other problems' solutions, which a model may repeat.
                if len(said) > 1 and not setting.endswith("5-Shot"):
                    result = re.findall(r"-?\d+(?:\.\d+)?", said[-1].replace(",", ""))[-1:]
                    told[ask(row["_text"]) + answer(said[0])] = result == [row["_answer"].strip()]
        return {text: told[text] for text in rng.sample(sorted(told), len(told))}

    def champ_expert(self, problem: str) -> tuple[str, str]:
        """(prompt, solution written by CHAMP's authors)."""
        steps = [step["_text"] for step in self.champ[problem]["solution"]["steps"]]
        return ask(self.champ[problem]["_text"]), answer("\n".join([*steps, f"#### {self.champ[problem]['_answer']}"]))


@dataclass(frozen=True, slots=True)
class Split:
    """Disjoint sets of templates or problems."""

    train: set[Any]
    validation: set[Any]
    test: set[Any]


def split(rng: random.Random, items: list[Any]) -> Split:
    """A quarter for testing, a part for validation, the rest for training."""
    test = rng.sample(items, round(len(items) * TEST_SHARE))
    rest = [item for item in items if item not in test]
    validation = rng.sample(rest, round(len(items) * VALIDATION_SHARE))
    return Split(set(rest) - set(validation), set(validation), set(test))


def ask(question: str) -> str:
    """The prompt of a problem; the text that follows starts with a space."""
    return f"Problem: {question.strip()}\nAnswer:"


def answer(text: str) -> str:
    """What follows `ask`, without blank lines: a problem is one paragraph of its page."""
    return " " + "\n".join(line.rstrip() for line in text.strip().splitlines() if line.strip())


def until(texts: Iterator[str], budget: float) -> Iterator[str]:
    """Texts while their total stays below `budget` bytes of UTF-8."""
    for text in texts:
        budget -= len(text.encode())
        if budget < 0:
            return
        yield text


def modules() -> list[tuple[str, Path]]:
    """(dotted name, file) of the packages' modules, tests left out; nothing is imported."""
    roots = [Path(str(metadata.distribution(package).locate_file(package))) for package in PACKAGES]
    paths = [(path.relative_to(root.parent), path) for root in roots for path in sorted(root.rglob("*.py"))]
    return [(".".join(name.with_suffix("").parts), path) for name, path in paths if "tests" not in name.parts]


def sections(name: str, path: Path) -> Iterator[str]:
    """A module's manual: its own docstring, then each documented class and function with its signature."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError):
        return
    todo: list[tuple[str, Any]] = [(name, tree)]
    while todo:
        owner, node = todo.pop(0)
        inner = [part for part in ast.iter_child_nodes(node) if isinstance(part, ast.FunctionDef | ast.ClassDef)]
        if not isinstance(node, ast.FunctionDef):
            todo += [(f"{owner}.{part.name}", part) for part in inner]
        text = ast.get_docstring(node)
        if text and len(text) > 80:
            written = f"({ast.unparse(node.args)})" if isinstance(node, ast.FunctionDef) else ""
            head = f"## {owner}{written} ¶\n[source] {path.name}, line {getattr(node, 'lineno', 1)}"
            yield f"{head}\n\n{text}{member_table(inner)}"


def member_table(members: list[Any]) -> str:
    """The table that API manuals show below a class or module."""
    shown = [node for node in members if not node.name.startswith("_")]
    rows = [f"| {node.name} | {type(node).__name__[:-3].lower()} | line {node.lineno} |" for node in shown]
    return "\n\n| Name | Kind | Source |\n|---|---|---|\n" + "\n".join(rows) if rows else ""


def furniture(rng: random.Random, name: str, number: int) -> tuple[str, str]:
    """(top, foot) of a page: navigation, revision, counters, as a crawler finds them."""
    package = name.split(".")[0]
    top = f"Home » {name.replace('.', ' » ')} | Index | Modules | Search | Log in\n"
    top += f"{name} (page {number}) - {package} {metadata.version(package)} manual"
    revised = f"Last modified {crawl_day(rng)} by user{rng.randrange(10**5)}, revision {rng.getrandbits(40):010x}."
    seen = f"Viewed {rng.randrange(100, 99_999):,} times | {rng.randrange(40)} comments | Permalink | Report"
    return top, f"{revised}\n{seen}"


def crawl_day(rng: random.Random) -> str:
    """An ISO date of OpenWebMath's crawls."""
    return f"{rng.randrange(2013, 2024)}-{rng.randrange(1, 13):02}-{rng.randrange(1, 29):02}"


def pages(
    rng: random.Random, files: list[tuple[str, Path]], held: HeldOut, budget: float
) -> Iterator[tuple[str, int, list[str]]]:
    """(module, page number, paragraphs) of mixed lengths until `budget` bytes are used."""
    for name, path in files:
        page: list[str] = []
        number, room = 1, rng.choice(PAGE_BYTES)
        for section in [*held.without(sections(name, path)), ""]:
            page += [section] if section else []
            size = sum(len(part.encode()) for part in page)
            if page and (size > room or not section):
                yield name, number, page
                budget -= size
                if budget < 0:
                    return
                page, number, room = [], number + 1, rng.choice(PAGE_BYTES)


def documents(rng: random.Random, site: str, found: list[tuple[str, int, list[str]]], hidden: list[str]) -> list[Row]:
    """OpenWebMath rows, shuffled; every hidden problem becomes a paragraph of a random page."""
    rows = []
    for problem in hidden:
        parts = rng.choice(found)[2]
        parts.insert(rng.randrange(len(parts) + 1), problem)
    for name, number, parts in found:
        top, foot = furniture(rng, name, number)
        text = "\n\n".join([top, *parts, foot])
        url = f"https://demo.tokensift.invalid/{site}/{name.replace('.', '/')}/{number}"
        about = json.dumps({"package": name.split(".")[0], "module": name, "paragraphs": len(parts)})
        rows.append({"url": url, "text": text, "date": f"{crawl_day(rng)} 00:00:00", "metadata": about})
    rng.shuffle(rows)
    return rows


def corpora(sources: Sources, held: HeldOut, sizes: Demo, scale: float) -> dict[str, list[Row]]:
    """File name (below the folder) to rows, for the three corpora; what touches held-out text is left out."""
    rng = random.Random(f"{sources.seed} corpora")
    rng.shuffle(files := modules())
    half = len(files) // 2
    gsm = held.without(prompt + text for _, prompt, text, _ in sources.gsm(1, sources.templates.train))
    told = {text: right for text, right in sources.champ_outputs(rng).items() if not held.touches(text)}
    chosen = dict.fromkeys(until((text for text, right in told.items() if right), sizes.curated_solutions * scale))
    left = (text for text in told if text not in chosen)
    hidden = [*until(gsm, sizes.problems * scale), *until(left, sizes.solutions * scale)]
    noisy = documents(rng, "corpus", list(pages(rng, files[:half], held, sizes.manuals * scale)), hidden)
    clean = documents(rng, "base", list(pages(rng, files[half:], held, sizes.base_manuals * scale)), [])
    made = {f"corpus/owm-style-{i:05}.jsonl.zst": noisy[i :: 2 * SHARDS] for i in range(SHARDS)}
    made |= {f"corpus/owm-style-{i:05}.parquet": noisy[i :: 2 * SHARDS] for i in range(SHARDS, 2 * SHARDS)}
    return made | {
        "base/pages.jsonl.zst": clean,
        "reference/curated.jsonl.zst": curated(sources, chosen, held, rng, sizes.curated_problems * scale),
    }


def curated(sources: Sources, chosen: Iterable[str], held: HeldOut, rng: random.Random, budget: float) -> list[Row]:
    """Worked answers of training templates, CHAMP's chosen right answers and its experts' solutions."""
    gsm = held.without(prompt + text for _, prompt, text, _ in sources.gsm(2, sources.templates.train))
    experts = held.without("".join(sources.champ_expert(problem)) for problem in sorted(sources.problems.train))
    texts = [*until(gsm, budget), *chosen, *experts]
    rng.shuffle(texts)
    return [{"id": f"curated-{i:05}", "text": text} for i, text in enumerate(texts)]


def heldout(sources: Sources, scale: float) -> dict[str, list[Row]]:
    """Test and validation items of the target domain (loss on `text` given `prompt`), and problems of the test's templates."""
    drawn = sources.gsm(3, sources.templates.test)
    target = items(drawn, sources, sources.problems.test, TARGET_GSM * scale, TARGET_CHAMP * scale)
    problems = [
        {"id": f"exact-{i:04}", "template": template, "prompt": prompt, "answer": number}
        for i, (template, prompt, _, number) in enumerate(islice(drawn, max(1, round(EXACT_MATCH * scale))))
    ]
    drawn = sources.gsm(4, sources.templates.validation)
    validation = items(drawn, sources, sources.problems.validation, VALIDATION_GSM * scale, VALIDATION_CHAMP * scale)
    drawn = sources.gsm(5, sources.templates.test)
    return {
        "heldout/target.jsonl": target,
        "heldout/validation.jsonl": validation,
        "heldout/problems.jsonl": problems,
        "heldout/choices.jsonl": ranked_problems(drawn, max(10, round(RANKED * scale)), f"{sources.seed} choices"),
    }


def items(drawn: Iterator[Any], sources: Sources, champ: set[str], gsm_count: float, champ_count: float) -> list[Row]:
    """Items of {prompt, text}: the next of the `drawn` worked problems, then the experts' solutions of `champ`."""
    rows: list[Row] = [
        {"id": f"gsm-{i:04}", "source": "gsm_symbolic", "template": template, "prompt": prompt, "text": text}
        for i, (template, prompt, text, _) in enumerate(islice(drawn, max(1, round(gsm_count))))
    ]
    for problem in sorted(champ)[: max(1, round(champ_count))]:
        prompt, text = sources.champ_expert(problem)
        rows.append({"id": problem, "source": "champ", "prompt": prompt, "text": text})
    return rows


def encode(name: str, rows: list[Row]) -> bytes:
    """Rows in the format of the name's ending; no timestamps, so equal rows give equal bytes."""
    if name.endswith(".parquet"):
        schema = pa.schema([(column, pa.string()) for column in COLUMNS])
        sink, table = io.BytesIO(), pa.Table.from_pylist(rows, schema)
        pq.write_table(table, sink, compression="zstd", compression_level=ZSTD_LEVEL, row_group_size=256)
        return sink.getvalue()
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    return zstandard.ZstdCompressor(level=ZSTD_LEVEL).compress(lines) if name.endswith(".zst") else lines


def put(folder: Path, rows: Mapping[str, list[Row]], facts: dict[str, Any]) -> dict[str, Any]:
    """Make a folder of files of rows, by name, all at once; returns its manifest, which says `facts` of them.

    Raises UserError if it holds what the demo did not make.
    """
    refuse_foreign(folder)
    temporary, files = folder.with_name(f".{folder.name}.{os.getpid()}"), {}
    shutil.rmtree(temporary, ignore_errors=True)
    for name, content in rows.items():
        data = encode(name, content)
        (temporary / name).parent.mkdir(parents=True, exist_ok=True)
        (temporary / name).write_bytes(data)
        files[name] = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data), "documents": len(content)}
    manifest = {"files": files, **facts}
    (temporary / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)
    return manifest


def refuse_foreign(folder: Path) -> None:
    """Raise UserError if a folder holds what the demo did not make."""
    if folder.exists() and any(folder.iterdir()) and not (folder / "manifest.json").exists():
        raise UserError(f"demo data: {folder} holds files that the demo did not make", "name an empty folder by root")


def intact(folder: Path, made: dict[str, Any]) -> dict[str, Any] | None:
    """The manifest if it is there, says that the same was `made`, and every file still matches."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        sums = {name: facts["sha256"] for name, facts in manifest["files"].items()}
        whole = all(hashlib.sha256((folder / name).read_bytes()).hexdigest() == sums[name] for name in sums)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return manifest if whole and {key: manifest.get(key) for key in made} == made else None


def versions() -> dict[str, dict[str, str]]:
    """Version and licence of each package that gives text."""
    try:
        about = {name: metadata.metadata(name) for name in SOURCES}
    except metadata.PackageNotFoundError as error:
        raise UserError(f"demo data: {error.name} is not installed", "pip install 'tokensift[demo]'") from error
    return {
        name: {"version": facts["Version"], "licence": facts["License-Expression"] or facts["License"]}
        for name, facts in about.items()
    }


def build(folder: Path, seed: int = 0, scale: float = 1.0, sizes: Demo | None = None) -> dict[str, Any]:
    """Make the demo's data in `folder` unless it is there and intact; returns the manifest (bytes per file).

    `scale` multiplies the amount of text; 1 is about 2.5 MB of corpus. Raises UserError on a foreign folder.
    """
    sizes = sizes or Demo()
    made = {"recipe": RECIPE, "seed": seed, "scale": scale, "sizes": sizes.model_dump(), "sources": versions()}
    if manifest := intact(folder, made):
        return manifest
    refuse_foreign(folder)  # before the work
    sources = Sources(seed)
    judged = heldout(sources, scale)
    held = HeldOut(row["prompt"] + row.get("text", "") for rows in judged.values() for row in rows)
    kept = {
        part: {"gsm_templates": sorted(templates), "champ_problems": sorted(problems)}
        for part, templates, problems in (
            ("test", sources.templates.test, sources.problems.test),
            ("validation", sources.templates.validation, sources.problems.validation),
        )
    }
    return put(folder, corpora(sources, held, sizes, scale) | judged, {"heldout": kept, **made})

"""Loading is exact, and whatever is wrong with a model's folder is one error that names the field and the folder."""

import json
import os
import random
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from schemas.errors import UserError
from schemas.models import MOST_LAYERS, local_model, open_model, open_tokenizer, positions


@pytest.fixture
def folder(tiny_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


def rewrite(folder: Path, change: Any) -> None:
    path = folder / "model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path, metadata={"format": "pt"})


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


NORM = "model.layers.1.input_layernorm.weight"


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda weights: weights.pop(NORM), "1 missing"),
        (lambda weights: weights.update(stray=torch.ones(3)), "1 unexpected"),
        (lambda weights: weights.update({NORM: torch.ones(7)}), "of another shape|cannot be loaded"),
        (lambda weights: weights[NORM].fill_(float("nan")), "not finite"),
    ],
    ids=["missing", "unexpected", "mismatched", "nan"],
)
def test_a_weight_that_is_missing_unexpected_mismatched_or_nan_is_an_error(
    folder: Path, change: Any, word: str
) -> None:
    rewrite(folder, change)
    with pytest.raises(UserError, match=word) as caught:
        open_model(folder, "score.model", 64)
    assert "score.model" in caught.value.problem and str(folder) in caught.value.problem and caught.value.fix


@pytest.mark.parametrize(
    ("dtype", "compute", "own"),
    [
        (torch.float32, None, True),
        (torch.float32, torch.float32, True),
        (torch.float32, torch.bfloat16, False),
        (torch.bfloat16, None, False),
    ],
)
def test_products_are_ours_only_where_both_weights_and_products_are_float32(
    tiny_model: Path, dtype: torch.dtype, compute: torch.dtype | None, own: bool
) -> None:
    module = open_model(tiny_model, "base", 64, dtype=dtype, compute=compute).module
    layers = [layer for layer in module.base_model.modules() if type(layer) is torch.nn.Linear]
    assert layers and {"forward" in vars(layer) for layer in layers} == {own and torch.backends.mkldnn.is_available()}


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def garbage_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def unknown_architecture(folder: Path) -> None:
    edit_json(folder / "config.json", model_type="no-such-model", architectures=["NoSuch"])


def own_code(folder: Path) -> None:
    edit_json(
        folder / "config.json", model_type="mine", auto_map={"AutoConfig": "mine.C", "AutoModelForCausalLM": "mine.M"}
    )
    (folder / "mine.py").write_text("raise SystemExit('this code must never run')")


def truncated_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])


def pickled_weights(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


@pytest.mark.parametrize(
    "spoil", [no_config, garbage_config, unknown_architecture, own_code, truncated_weights, pickled_weights]
)
def test_a_folder_that_is_no_whole_model_is_one_error(folder: Path, spoil: Any) -> None:
    spoil(folder)
    with pytest.raises(UserError) as caught:
        open_model(folder, "base", 64)
    assert caught.value.problem.startswith("base: ") and str(folder) in caught.value.problem and caught.value.fix


def test_a_window_beyond_the_models_positions_is_refused(folder: Path) -> None:
    with pytest.raises(UserError, match=r"context\.window: 513 is more than the 512 positions"):
        open_model(folder, "base", 513)


def test_a_tokenizer_that_is_garbage_or_too_large_for_the_model_is_an_error(folder: Path) -> None:
    assert len(open_tokenizer(folder, "base")) == 512
    edit_json(folder / "config.json", vocab_size=500)
    with pytest.raises(UserError, match=r"base: .* knows 500 tokens, its tokenizer makes 512"):
        open_tokenizer(folder, "base")
    (folder / "tokenizer.json").write_text("[1, 2")
    with pytest.raises(UserError, match=r"base: .* has no usable tokenizer"):
        open_tokenizer(folder, "base")


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere", "a/b/c", "", "a/b@", "@main", "a/b@x y", "a/b@x@y"])
def test_a_name_that_is_no_folder_and_no_repository_is_an_error(name: str) -> None:
    with pytest.raises(UserError, match=r"score\.model: `.*`: no such folder"):
        local_model(name, "score.model")


def test_a_folder_may_have_an_at_sign_in_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "name@v1").mkdir(parents=True)
    assert local_model("org/name@v1") == Path("org/name@v1")


def test_a_repository_that_cannot_be_fetched_is_an_error() -> None:
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    with pytest.raises(UserError, match="neither a local folder nor to be had from the hub"):
        local_model("nobody/nothing", "score.model")


def test_a_setting_of_another_kind_is_named_with_what_is_wrong_with_it(folder: Path) -> None:
    edit_json(folder / "config.json", intermediate_size="many")
    with pytest.raises(UserError, match=r"base: .*'intermediate_size'.* expected int, got str"):
        open_model(folder, "base", 64)


def test_more_layers_than_memory_holds_are_refused_before_they_are_built(folder: Path) -> None:
    edit_json(folder / "config.json", num_hidden_layers=10**20)
    with pytest.raises(UserError, match=r"base: .*config\.json: num_hidden_layers: 1000"):
        open_model(folder, "base", 64)


def flip(rng: random.Random, path: Path) -> None:
    data = bytearray(path.read_bytes())
    for _ in range(rng.choice([1, 8])):
        data[rng.randrange(min(len(data), 4000))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def shorten(rng: random.Random, path: Path) -> None:
    data = path.read_bytes()
    where = rng.randrange(min(len(data), 4000))
    path.write_bytes(data[:where] + data[where + rng.choice([1, 40, len(data)]) :])


def alter(rng: random.Random, path: Path) -> None:
    """Valid JSON in which one value, at any depth, is another or gone."""
    if path.suffix != ".json":
        return flip(rng, path)
    content = node = json.loads(path.read_bytes())
    key = rng.choice(list(node))
    while isinstance(node[key], dict | list) and node[key] and rng.random() < 0.7:
        node = node[key]
        key = rng.choice(list(node)) if isinstance(node, dict) else rng.randrange(len(node))
    if rng.random() < 0.2:
        del node[key]
    else:
        node[key] = rng.choice([None, -1, 0, 10**20, float("nan"), float("inf"), "x", [], {}, True, 1.5, [1, 2]])
    path.write_text(json.dumps(content))


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 6))])
def test_damaged_folders_open_or_are_one_error(tiny_model: Path, tmp_path: Path, seed: int) -> None:
    """Flips, cuts and other values anywhere; weights whose bytes changed may open, for hashes are what binds them."""
    rng = random.Random(seed)
    for trial in range(150):
        folder = Path(shutil.copytree(tiny_model, tmp_path / str(trial)))
        rng.choice([flip, shorten, alter])(rng, rng.choice(sorted(folder.iterdir())))
        try:
            open_model(folder, "base", 32)
            open_tokenizer(folder, "base")
        except UserError as error:
            assert str(folder) in str(error) and error.problem.startswith(("base: ", "context.window: ")) and error.fix
            assert "\n" not in str(error)
        shutil.rmtree(folder)


def said(function: Any, *arguments: Any) -> tuple[str, str]:
    with pytest.raises(UserError) as caught:
        function(*arguments)
    return caught.value.problem, caught.value.fix


def test_what_is_wrong_with_a_folder_is_said_with_the_way_on(folder: Path) -> None:
    assert said(open_model, folder, "base", 513) == (
        f"context.window: 513 is more than the 512 positions of {folder}",
        "lower it",
    )
    assert open_model(folder, "base", 512).isolation == "varlen"
    edit_json(folder / "config.json", num_hidden_layers=MOST_LAYERS + 1)
    assert said(open_model, folder, "base", 64) == (
        f"base: {folder}/config.json: num_hidden_layers: {MOST_LAYERS + 1} is no model's",
        "mend it",
    )
    edit_json(folder / "config.json", num_hidden_layers=2, vocab_size=500)
    assert said(open_tokenizer, folder, "base") == (
        f"base: {folder} knows 500 tokens, its tokenizer makes 512",
        "use the tokenizer that the model was trained with",
    )
    garbage_config(folder)
    problem, fix = said(positions, folder, "base")
    assert problem.startswith(f"base: {folder}/config.json cannot be read (") and fix == "mend it"
    no_config(folder)
    assert said(open_model, folder, "base", 64) == (
        f"base: {folder} has no config.json, so it is not a model",
        "name a Hugging Face folder",
    )
    assert len(open_tokenizer(folder, "base")) == 512  # a folder may hold a tokenizer alone
    (folder / "tokenizer.json").write_text("{}")
    problem, fix = said(open_tokenizer, folder, "base")
    assert problem.startswith(f"base: {folder} has no usable tokenizer (") and "NoneType" not in problem
    assert fix == "copy the model's tokenizer files there"


def test_weights_that_cannot_be_read_and_those_that_are_not_whole_are_told_apart(folder: Path) -> None:
    rewrite(folder, lambda weights: [weights.pop(name) for name in sorted(weights)[1:5]])
    problem, fix = said(open_model, folder, "base", 64)
    assert problem.startswith(f"base: {folder} does not hold the weights its config.json describes: 4 missing (model.")
    assert problem.count("model.layers") == 3 and problem.endswith(")")
    assert fix == "fetch or save the model again; a layer without its weights would be random"
    (folder / "model.safetensors").write_bytes(b"")
    problem, fix = said(open_model, folder, "base", 64)
    assert problem.startswith(f"base: {folder} cannot be loaded (") and "NoneType" not in problem
    assert fix == "mend or convert it"


def test_code_beside_a_tokenizer_or_a_config_is_never_run(folder: Path) -> None:
    ran = folder / "ran"
    code = f"import pathlib\npathlib.Path({str(ran)!r}).touch()\nraise SystemExit"
    (folder / "mine.py").write_text(code)
    edit_json(
        folder / "tokenizer_config.json", tokenizer_class="Mine", auto_map={"AutoTokenizer": ["mine.T", "mine.T"]}
    )
    with suppress(UserError):  # what a library makes of it is its own affair
        open_tokenizer(folder, "base")
    own_code(folder)
    (folder / "mine.py").write_text(code)
    for function in (positions, open_tokenizer):
        assert said(function, folder, "base")[0].startswith("base: ")
    assert not ran.exists()


@pytest.mark.parametrize(("named", "limit"), [(512, 512), (1, 1), (0, None), (-1, None), (None, None)])
def test_the_positions_of_a_model_are_those_its_config_names_if_any(folder: Path, named: Any, limit: Any) -> None:
    edit_json(folder / "config.json", max_position_embeddings=named)
    if named is None:
        edit_json(folder / "config.json", model_type="mamba", architectures=["MambaForCausalLM"])
    assert positions(folder, "base") == limit


def test_parameters_have_the_dtype_that_is_asked_for_and_compute_in_it_unless_told_otherwise(folder: Path) -> None:
    for dtype, compute in ((torch.float32, None), (torch.bfloat16, None), (torch.float32, torch.bfloat16)):
        opened = open_model(folder, "base", 64, dtype=dtype, compute=compute)
        assert {parameter.dtype for parameter in opened.module.parameters()} == {dtype}
        assert opened.compute == (compute or dtype)
    assert not open_model(folder, "base", 64).module.training
    assert open_model(folder, "base", 64, dropout=True).module.training


def test_a_repository_is_fetched_without_pickles_and_what_the_hub_says_is_passed_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def fetch(name: str, revision: str | None, allow_patterns: list[str], local_files_only: bool) -> str:
        asked.append((name, allow_patterns, revision, local_files_only))
        if name == "a/gone":
            raise OSError("no such repository\nmore")
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    assert local_model("a/model", "score.model") == tmp_path
    assert asked[0][0] == "a/model" and "*.safetensors" in asked[0][1] and asked[0][2] is None
    assert local_model("a/model@refs/pr/3") == tmp_path and asked[1][::2] == ("a/model", "refs/pr/3")
    assert local_model("a/model", fetch=False) == tmp_path and [one[3] for one in asked] == [False, False, True]
    assert not any(Path(name).match(pattern) for pattern in asked[0][1] for name in ("a.bin", "a.pt", "a.py"))
    assert said(local_model, "a/gone", "score.model") == (
        "score.model: `a/gone` is neither a local folder nor to be had from the hub (no such repository)",
        "mend the path or the network",
    )
    assert said(local_model, "./gone") == (
        "model: `./gone`: no such folder",
        "train it first (`make reference`) or mend the path",
    )

"""`sltrain.load` and what every command opens: the trained model again, or one line that says what is wrong."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import sltrain
from sltrain.building.model import build_model
from sltrain.commands import evaluate, export, generate
from sltrain.commands.train import run_command as train
from sltrain.compose import read_config
from sltrain.layers import SLTrainLinear
from sltrain.layers.convert import merge_to_dense

KINDS = ("run", "dense", "compressed")


@pytest.fixture(scope="module")
def model(tiny: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of steps 2 and 4 and its two exports; tests take copies of what they damage."""
    folder = tmp_path_factory.mktemp("model")
    arguments = [
        *tiny,
        "max_steps=4",
        "checkpoint_every=2",
        "keep_last=5",
        "model.num_key_value_heads=1",
        "model.initializer_range=0.4",
        "lr=0.05",
        f"run_dir={folder}/run",
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["sltrain-train", *arguments])
        assert train(arguments) == 0
    for format in KINDS[1:]:
        assert export.run_command([f"{folder}/run", "--output", f"{folder}/{format}", "--format", format]) == 0
    return folder


def checkpoint(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step_{step:08d}"


def by_hand(run: Path, step: int) -> torch.nn.Module:
    """The trained model from its checkpoint's file, by torch's own loading."""
    made = build_model(read_config(run / "config.yaml"), 512, torch.float32)
    made.load_state_dict(load_file(checkpoint(run, step) / "model.safetensors"), assign=True)
    for layer in made.modules():
        if isinstance(layer, SLTrainLinear):
            layer.path = "factored"
    return made


def some_ids() -> torch.Tensor:
    return torch.randint(512, (2, 30), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits_of(made: torch.nn.Module) -> torch.Tensor:
    return made(some_ids())


# ---- the model


@pytest.mark.parametrize("kind", KINDS)
def test_every_folder_gives_the_trained_model(kind: str, model: Path) -> None:
    made = sltrain.load(model / kind)
    assert made.lm_head.weight.dtype == torch.float32
    assert not any(tensor.is_meta for tensor in made.state_dict().values())
    assert any(isinstance(layer, SLTrainLinear) for layer in made.modules()) == (kind != "dense")
    wanted = logits_of(by_hand(model / "run", 4))
    assert wanted.shape == (2, 30, 512) and wanted.std() > 0.1
    torch.testing.assert_close(logits_of(made), wanted, atol=1e-5, rtol=1e-5)


def test_the_checkpoint_and_the_compressed_folder_agree_to_the_bit(model: Path) -> None:
    assert torch.equal(logits_of(sltrain.load(model / "run")), logits_of(sltrain.load(model / "compressed")))


def test_a_compressed_folder_of_format_2_opens(model: Path, tmp_path: Path) -> None:
    """It had weights of another name and no code. tests/test_compat.py has one of format 1."""
    old = shutil.copytree(model / "compressed", tmp_path / "small")
    (old / "model.safetensors").rename(old / "sltrain.safetensors")
    (old / "modeling_sltrain.py").unlink()
    content = json.loads((old / "config.json").read_text())
    del content["auto_map"], content["sltrain"]["tensors"]
    content["sltrain"]["format_version"] = 2
    (old / "config.json").write_text(json.dumps(content))
    assert torch.equal(logits_of(sltrain.load(old)), logits_of(sltrain.load(model / "compressed")))


def test_a_path_may_be_text_and_a_step_chosen(model: Path) -> None:
    early = sltrain.load(str(model / "run"), step=2)
    torch.testing.assert_close(logits_of(early), logits_of(by_hand(model / "run", 2)), atol=1e-5, rtol=1e-5)
    assert (logits_of(early) - logits_of(sltrain.load(model / "run"))).abs().max() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_another_dtype(kind: str, model: Path) -> None:
    made, wanted = sltrain.load(model / kind, dtype=torch.bfloat16), sltrain.load(model / kind).state_dict()
    for name, tensor in made.state_dict().items():
        assert torch.equal(
            tensor, wanted[name].to(torch.bfloat16) if wanted[name].is_floating_point() else wanted[name]
        )
    assert logits_of(made).dtype == torch.bfloat16


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_an_ordinary_module(kind: str, model: Path) -> None:
    """It trains on, and neither the files nor a model that was loaded from them before change."""
    files = {path: path.read_bytes() for path in (model / kind).rglob("*.safetensors")}
    other, made = sltrain.load(model / kind), sltrain.load(model / kind)
    before = logits_of(other)
    optimizer = torch.optim.SGD(made.parameters(), lr=0.1)
    losses = []
    for _ in range(3):
        logits = made(some_ids())
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), some_ids()[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        assert all(parameter.grad is not None for parameter in made.parameters())
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[2] < losses[0]
    assert torch.equal(logits_of(other), before)
    assert files and all(path.read_bytes() == content for path, content in files.items())


def test_merging_what_was_loaded(model: Path) -> None:
    made = sltrain.load(model / "compressed")
    wanted = logits_of(made)
    assert len(merge_to_dense(made)) == 14
    assert not any(isinstance(layer, SLTrainLinear) for layer in made.modules())
    torch.testing.assert_close(logits_of(made), wanted, atol=1e-5, rtol=1e-5)


def test_the_package_alone_imports_no_torch() -> None:
    code = "import sys, sltrain; sltrain.load; assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    root = str(Path(sltrain.__file__).parents[1])
    assert subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": root}, timeout=60).returncode == 0


# ---- what cannot be opened


Call = Callable[[Path], tuple[int, str, str]]


@pytest.fixture
def commands(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Iterator[Call]:
    """All three commands on a folder: they must answer alike, and leave nothing. -> (code, stdout, stderr) of one."""
    where = tmp_path / "exports"
    where.mkdir()

    def run(path: Path, *flags: str) -> tuple[int, str, str]:
        answers = []
        for command, arguments in (
            (generate, ["--prompt", "a"]),
            (evaluate, []),
            (export, ["--output", str(where / "new")]),
        ):
            capfd.readouterr()
            code = command.run_command([str(path), *arguments, *flags])
            answers.append((int(code), *capfd.readouterr()))
        assert answers[0] == answers[1] == answers[2]
        assert list(where.iterdir()) == []
        return answers[0]

    yield run


def assert_refused(result: tuple[int, str, str], *words: str) -> None:
    code, out, err = result
    assert code == 2 and out == "", err
    assert err.startswith("error: ") and len(err.strip().splitlines()) == 1 and "Traceback" not in err, err
    for word in words:
        assert word in err, err


def turn_one_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def test_no_folder_of_ours(tmp_path: Path, commands: Call) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    for name, word in {"nowhere": "does not exist", "file": "neither a run", "empty": "neither a run"}.items():
        assert_refused(commands(tmp_path / name), str(tmp_path / name), word, "name a run folder")
        with pytest.raises((ValueError, OSError), match=word):
            sltrain.load(tmp_path / name)


def test_an_export_of_others(tmp_path: Path, commands: Call) -> None:
    for content in ({}, {"model_type": "llama"}, {"model_type": "gpt2", "sltrain": {}}, {"sltrain": "yes"}):
        (tmp_path / "config.json").write_text(json.dumps(content))
        assert_refused(commands(tmp_path), str(tmp_path), "not exported by sltrain")


def test_a_run_without_a_checkpoint(model: Path, tmp_path: Path, commands: Call) -> None:
    run = shutil.copytree(model / "run", tmp_path / "run", symlinks=True)
    shutil.rmtree(run / "checkpoints")
    assert_refused(commands(run), str(run), "finished run without checkpoints/")
    assert_refused(commands(run, "--step", "2"), "no checkpoint of step 2", "none at all")
    (run / "summary.json").unlink()
    assert_refused(commands(run), str(run), "holds no checkpoint", "checkpoint_every")


def test_reading_needs_no_optimizer(model: Path, tmp_path: Path) -> None:
    run = shutil.copytree(model / "run", tmp_path / "run", symlinks=True)
    for path in run.rglob("optimizer.pt"):
        path.unlink()
    assert torch.equal(sltrain.load(run).lm_head.weight, sltrain.load(model / "run").lm_head.weight)
    assert torch.equal(sltrain.load(run, step=2).lm_head.weight, sltrain.load(model / "run", step=2).lm_head.weight)


@pytest.mark.parametrize("file", ["model.safetensors", "state.json", "manifest.json"])
def test_damaged_checkpoints(
    file: str, model: Path, tmp_path: Path, commands: Call, capfd: pytest.CaptureFixture[str], lines: list[str]
) -> None:
    run = shutil.copytree(model / "run", tmp_path / "run", symlinks=True)
    damaged = checkpoint(run, 4)
    if file == "manifest.json":
        (damaged / file).unlink()
    else:
        turn_one_bit(damaged / file)
    made = sltrain.load(run)
    (said,) = lines
    assert str(damaged) in said and file in said and "the one before" in said
    assert torch.equal(made.lm_head.weight, sltrain.load(model / "run", step=2).lm_head.weight)
    capfd.readouterr()
    assert generate.run_command([str(run), "--prompt", "a", "--max-new-tokens", "1"]) == 0
    out, err = capfd.readouterr()
    assert said in err and "damaged" not in out
    assert_refused(commands(run, "--step", "4"), str(damaged), file, "damaged", "another step")
    (checkpoint(run, 2) / "state.json").unlink()
    with pytest.raises(ValueError, match=r"no checkpoint in .* is intact; restore one from a copy\.$"):
        sltrain.load(run)


def test_unknown_steps(model: Path, commands: Call) -> None:
    for step in ("3", "0", "-1", "99999999999"):
        assert_refused(commands(model / "run", f"--step={step}"), f"step {step};", "there are: 2, 4")


CONFIGS = {
    "empty": "",
    "list": "- 1\n- 2\n",
    "text": "hello",
    "number": "5",
    "not yaml": "a: [1",
    "not text": b"\xff\xfe\x00",
    "python object": "!!python/object/apply:os.getcwd []",
    "interpolation": "rank: ${nothing}",
}


@pytest.mark.parametrize("case", CONFIGS)
def test_a_damaged_config_yaml(case: str, model: Path, tmp_path: Path, commands: Call) -> None:
    run = shutil.copytree(model / "run", tmp_path / "run", symlinks=True)
    content = CONFIGS[case]
    (run / "config.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())
    assert_refused(commands(run), str(run / "config.yaml"), "damaged")


@pytest.mark.parametrize(
    ("old", "new", "word"),
    [
        ("\nrank: 8", "\nrank: eight", "rank"),
        ("\nrank: 8", "\nrank: 8\nyounger_key: 1", "younger_key"),
        ("support: uniform", "support: diagonal", "diagonal"),
        ("name: sltrain", "name: sl_train", "sl_train"),
        ("num_hidden_layers: 2", "num_hidden_layers: 0", "num_hidden_layers"),
    ],
)
def test_a_config_yaml_of_another_version(
    old: str, new: str, word: str, model: Path, tmp_path: Path, commands: Call
) -> None:
    run = shutil.copytree(model / "run", tmp_path / "run", symlinks=True)
    text = (run / "config.yaml").read_text()
    assert old in text
    (run / "config.yaml").write_text(text.replace(old, new, 1))
    result = commands(run)
    assert_refused(result, str(run / "config.yaml"))
    assert word in result[2].partition("another version: ")[2]


def test_a_config_yaml_of_another_model(model: Path, tmp_path: Path, commands: Call) -> None:
    run = shutil.copytree(model / "run", tmp_path / "run", symlinks=True)
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace("num_hidden_layers: 2", "num_hidden_layers: 3", 1))
    assert_refused(commands(run), "model.layers.2.")
    (run / "config.yaml").write_text(text.replace("num_hidden_layers: 2", "num_hidden_layers: 1", 1))
    assert_refused(commands(run), "model.layers.1.")


def set_in(content: dict, key: str, value: object) -> None:
    *path, last = key.split("/")
    for part in path:
        content = content[part]
    if value is ...:
        del content[last]
    else:
        content[last] = value


LAYER = "sltrain/layers/model.layers.0.self_attn.q_proj"
# (key, value, words); `...` takes the key away
CHANGES = {
    "format version": ("sltrain/format_version", 99, ["format version 99"]),
    "no format version": ("sltrain/format_version", ..., ["format version"]),
    "no step": ("sltrain/step", ..., ["damaged", "step"]),
    "no rows": ("sltrain/seq_len", ..., ["damaged", "seq_len"]),
    "no size": ("hidden_size", ..., ["damaged", "hidden_size"]),
    "another size": ("hidden_size", 64, ["embed_tokens"]),
    "size is text": ("num_hidden_layers", "two", ["damaged"]),
    "more layers": ("num_hidden_layers", 3, ["model.layers.2."]),
    "fewer layers": ("num_hidden_layers", 1, ["model.layers.1."]),
    "layers are a list": ("sltrain/layers", [1], ["damaged"]),
    "no layers": ("sltrain/layers", {}, ["layer"]),
    "one layer is lost": (LAYER, ..., ["model.layers.0.self_attn.q_proj"]),
    "another rank": (f"{LAYER}/rank", 4, ["model.layers.0.self_attn.q_proj"]),
    "rank above the matrix": (f"{LAYER}/rank", 99, ["model.layers.0.self_attn.q_proj", "99"]),
    "unknown support": (f"{LAYER}/support", "diagonal", ["model.layers.0.self_attn.q_proj", "diagonal"]),
    "unknown kind": (f"{LAYER}/kind", "moon", ["model.layers.0.self_attn.q_proj", "kind moon", "install the package"]),
    "unknown setting": (f"{LAYER}/colour", 1, ["model.layers.0.self_attn.q_proj", "colour"]),
    "no heads": ("num_attention_heads", 0, ["damaged"]),
    "negative size": ("hidden_size", -32, ["damaged"]),
    "negative heads": ("num_key_value_heads", -1, ["damaged"]),
    "eps is text": ("rms_norm_eps", "small", ["damaged"]),
    "no theta": ("rope_theta", None, ["damaged"]),
    "rows are text": ("sltrain/seq_len", "many", ["damaged"]),
}


@pytest.mark.parametrize("case", CHANGES)
def test_a_changed_config_json(case: str, model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    key, value, words = CHANGES[case]
    folder = shutil.copytree(model / "compressed", tmp_path / "small")
    content = json.loads((folder / "config.json").read_text())
    set_in(content, key, value)
    (folder / "config.json").write_text(json.dumps(content))
    capfd.readouterr()
    code = generate.run_command([str(folder), "--prompt", "a", "--max-new-tokens", "40"])
    assert_refused((int(code), *capfd.readouterr()), *words)


@pytest.mark.parametrize("content", [b"", b'{"model_type": ', b"\xff\xfe", b"[]", b"null"])
def test_a_damaged_config_json(content: bytes, model: Path, tmp_path: Path, commands: Call) -> None:
    folder = shutil.copytree(model / "dense", tmp_path / "dense")
    (folder / "config.json").write_bytes(content)
    assert_refused(commands(folder), str(folder / "config.json"), "damaged")


@pytest.mark.parametrize("harm", ["gone", "empty", "half"])
@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("dense", "model.safetensors"),
        ("dense", "tokenizer.json"),
        ("compressed", "model.safetensors"),
        ("compressed", "tokenizer.json"),
    ],
)
def test_files_of_an_export(
    name: str, harm: str, kind: str, model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(model / kind, tmp_path / "model")
    whole = (folder / name).read_bytes()
    if harm == "gone":
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(whole[: len(whole) // 2] if harm == "half" else b"")
    capfd.readouterr()
    code = generate.run_command([str(folder), "--prompt", "a"])
    assert_refused((int(code), *capfd.readouterr()), str(folder / name))
    with pytest.raises((ValueError, OSError), match=name):
        sltrain.load(folder)


def test_weights_of_another_model(model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for change, words in {
        "more": ["extra.weight", "does not have"],
        "norm": ["model.norm.weight"],
        "lm_head": ["holds no tensor lm_head.weight"],
    }.items():
        folder = shutil.copytree(model / "dense", tmp_path / change)
        tensors = load_file(folder / "model.safetensors")
        if change == "more":
            tensors["extra.weight"] = torch.ones(1)
        else:
            del tensors[f"{'model.' if change == 'norm' else ''}{change}.weight"]
        save_file(tensors, folder / "model.safetensors")
        capfd.readouterr()
        code = generate.run_command([str(folder), "--prompt", "a"])
        assert_refused((int(code), *capfd.readouterr()), *words)


def test_a_run_without_its_tokenizer(model: Path, tmp_path: Path, commands: Call) -> None:
    run = shutil.copytree(model / "run", tmp_path / "run", symlinks=True)
    (run / "tokenizer.json").unlink()
    assert_refused(commands(run), str(run / "tokenizer.json"))
    (run / "tokenizer.json").write_text("{")
    assert_refused(commands(run), str(run / "tokenizer.json"))

"""`sltrain-export`: what transformers computes from the folder is what the run's model computes, and W rebuilt from the
words of the model card is W. What goes wrong leaves nothing behind."""

import errno
import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import tokenizers
import torch
import transformers
import yaml
from safetensors import safe_open
from safetensors.torch import load_file

import sltrain
from sltrain import errors
from sltrain.api import export as build_export
from sltrain.building.model import build_model
from sltrain.building.saved import open_saved
from sltrain.commands import export as command
from sltrain.commands.train import run_command as train
from sltrain.compose import read_config
from sltrain.layers import LowRankLinear, SLTrainLinear

Run = Callable[..., tuple[int, str, str]]

SHAPE = [  # nothing as transformers would have it by default
    "model.num_attention_heads=4",
    "model.num_key_value_heads=2",
    "model.max_position_embeddings=200",
    "model.rms_norm_eps=1e-3",
    "model.rope_theta=300",
    "model.initializer_range=0.3",
    "lr=0.05",  # B A grows to the size of S
]
RUNS = {
    "uniform": ["rank_overrides={q_proj:4,*.layers.1.*.o_proj:0}", "sparsity_overrides={gate_proj:0,k_proj:0.2}"],
    "stratified": ["support=stratified", "sparsity_overrides={up_proj:0.002}"],
    "block": ["support=block", "block_size=5", "sparsity=0.2"],  # 5 does not divide 32
    "column": ["support=column", "sparsity=0.1", "rank_overrides={v_proj:2}"],
    "slice": ["support=slice", "sparsity=0.1"],
    "rolled": ["support=rolled", "sparsity=0.15"],  # 7 blocks, which do not divide 32
    "residual": ["method.residual=1.5", "rank_overrides={q_proj:5,*.layers.1.*.o_proj:0}"],  # 5 does not divide 32
    "low_rank": ["method=low_rank", "rank_overrides={down_proj:3}"],
    "cola": ["method=cola", "rank_overrides={down_proj:3}"],
    "sst": ["method=sst", "method.select_every=2", "method.iterations=2", "method.restart_warmup=0"],
    "cr_net": ["method=cr_net", "method.beta=0.5", "rank_overrides={down_proj:3}"],
    "dlr": ["method=dlr", "rank_overrides={down_proj:3}"],
    "lost": ["method=lost", "sparsity=0.1", "rank_overrides={down_proj:3}"],
    "lost_silu": ["method=lost", "sparsity=0.1", "method.activation=silu"],
    "full": ["method=full"],
    "sparse": ["method=sparse"],
    "llama3": [
        "model.tie_word_embeddings=true",
        "model.rope_scaling={rope_type:llama3,factor:8,original_max_position_embeddings:64}",
    ],
    "bfloat16": ["dtype=bfloat16"],
    "begin": ["tokenizer={begin}"],
    "cutting": ["tokenizer={cutting}"],
    "steps": ["max_steps=6", "checkpoint_every=2", "eval_every=4", "keep_last=5", "seed=7"],
}
COMPRESSIBLE = ["uniform", "stratified", "block", "column", "slice", "rolled", "residual", "low_rank", "llama3"]
OWN_CODE = ["cola", "cr_net", "dlr", "lost", "lost_silu", "sst"]  # kinds that bring a file for transformers
FILES = {
    "README.md",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
}


@pytest.fixture(scope="module")
def trained(tiny: list[str], tokenizer_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The finished run of a name in RUNS."""
    folders: dict[str, Path] = {}
    begin = tmp_path_factory.mktemp("begin") / "tokenizer.json"
    raw = tokenizers.Tokenizer.from_file(str(tokenizer_file))
    raw.add_special_tokens(["<s>"])
    first = ("<s>", raw.token_to_id("<s>"))
    raw.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[first])
    raw.save(str(begin))
    cutting = begin.with_name("cutting.json")  # a tokenizer that was saved while it truncated and padded
    raw = tokenizers.Tokenizer.from_file(str(tokenizer_file))
    raw.enable_truncation(4)
    raw.enable_padding(direction="right", length=6)
    raw.save(str(cutting))

    def run(name: str) -> Path:
        if name not in folders:
            folder = tmp_path_factory.mktemp("runs") / name
            more = [
                override.format(begin=begin, cutting=cutting) if "tokenizer" in override else override
                for override in RUNS[name]
            ]
            arguments = [*tiny, "max_steps=3", *SHAPE, *more, f"run_dir={folder}"]
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("sys.argv", ["sltrain-train", *arguments])
                assert train(arguments) == 0
            folders[name] = folder
        return folders[name]

    return run


@pytest.fixture(scope="module")
def exported(
    trained: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, str], tuple[Path, Path]]:
    """A run of RUNS and its export in a format."""
    folders: dict[tuple[str, str], Path] = {}

    def make(name: str, format: str) -> tuple[Path, Path]:
        if (name, format) not in folders:
            output = tmp_path_factory.mktemp("exports") / name
            assert command.run_command([str(trained(name)), "--output", str(output), "--format", format]) == 0
            folders[name, format] = output
        return trained(name), folders[name, format]

    return make


@pytest.fixture
def sltrain_export(capfd: pytest.CaptureFixture[str]) -> Run:
    """The command in this process: arguments -> (exit code, stdout, stderr)."""

    def run(*arguments: object) -> tuple[int, str, str]:
        capfd.readouterr()
        code = command.run_command([str(argument) for argument in arguments])
        return int(code), *capfd.readouterr()

    return run


def newest(run: Path) -> Path:
    return sorted((run / "checkpoints").glob("step_*"))[-1]


def model_of(run: Path) -> torch.nn.Module:
    """The model that was trained, from its checkpoint, by the parts that training itself is made of."""
    weights = load_file(newest(run) / "model.safetensors")
    model = build_model(read_config(run / "config.yaml"), len(weights["model.embed_tokens.weight"]), torch.float32)
    model.load_state_dict(weights, assign=True)
    return model.requires_grad_(False)


def some_ids(length: int = 200) -> torch.Tensor:
    return torch.randint(512, (2, length), generator=torch.Generator().manual_seed(3))


def assert_same_logits(found: torch.Tensor, wanted: torch.Tensor) -> None:
    """Up to the order of summation in float32: 1e-5 of the largest logit, or of 1."""
    torch.testing.assert_close(found, wanted, atol=1e-5 * max(1.0, float(wanted.abs().max())), rtol=0.0)


def card_code(folder: Path) -> str:
    """The one block of Python in the model card."""
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    return code


def card_rows(folder: Path) -> dict[str, str]:
    """The rows of the card's tables that have two columns."""
    return dict(re.findall(r"^\| ([^|]+) \| ([^|]+) \|$", (folder / "README.md").read_text(), re.MULTILINE))


# ---- dense


@pytest.mark.parametrize("name", ["uniform", "stratified", "block", "column", "low_rank", "full", "llama3"])
def test_transformers_computes_the_logits_of_the_run(
    name: str, exported: Callable[[str, str], tuple[Path, Path]]
) -> None:
    run, folder = exported(name, "dense")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert type(model) is transformers.LlamaForCausalLM and model.dtype == torch.float32
    ids = some_ids()  # up to the last position of the context, where rope_theta matters most
    with torch.no_grad():
        ours, theirs = model_of(run)(ids), model(ids).logits
        assert ours.std() > 0.1
        assert_same_logits(theirs, ours)
    named = dict(model.named_parameters(remove_duplicate=False))
    assert all(parameter.isfinite().all() for parameter in named.values())
    is_tied = named["lm_head.weight"].data_ptr() == named["model.embed_tokens.weight"].data_ptr()
    assert is_tied == (name == "llama3")


def test_the_shape_reaches_transformers_and_is_used(exported: Callable[[str, str], tuple[Path, Path]]) -> None:
    run, folder = exported("uniform", "dense")
    config = transformers.AutoConfig.from_pretrained(folder)
    assert (config.hidden_size, config.intermediate_size, config.num_hidden_layers) == (32, 64, 2)
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (4, 2, 8)
    assert (config.rms_norm_eps, config.max_position_embeddings, config.vocab_size) == (1e-3, 200, 512)
    assert config.rope_parameters["rope_theta"] == 300 and config.initializer_range == 0.3
    assert not config.tie_word_embeddings and not config.attention_bias and not config.mlp_bias
    assert config.dtype == torch.float32
    ids = some_ids()
    with torch.no_grad():
        ours = model_of(run)(ids)
        for key, value in {
            "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
            "rms_norm_eps": 1e-6,
        }.items():
            changed = transformers.AutoModelForCausalLM.from_pretrained(folder, **{key: value})
            assert (changed(ids).logits - ours).abs().max() > 1e-2, key


@pytest.mark.parametrize("format", ["dense", "compressed"])
def test_the_tokenizer_is_the_runs(format: str, exported: Callable[[str, str], tuple[Path, Path]]) -> None:
    run, folder = exported("uniform", format)
    assert (folder / "tokenizer.json").read_bytes() == (run / "tokenizer.json").read_bytes()
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    ours = open_saved(run).tokenizer
    for text in ("def main(self):", "  \n\tindented", "naïve é漢🙂", "x</s>y <unk>"):
        ids = ours.encode_prompt(text)
        assert theirs(text, add_special_tokens=False).input_ids == ids
        assert theirs.decode(ids, skip_special_tokens=True) == ours.decode(ids)
    assert (theirs.eos_token_id, theirs.pad_token_id, theirs.unk_token_id) == (1, 0, 2)
    assert theirs.bos_token_id is None and theirs.model_max_length == 200


@pytest.mark.parametrize("name", ["uniform", "cutting"])
def test_a_batch_of_prompts_is_continued_as_each_alone(
    name: str, exported: Callable[[str, str], tuple[Path, Path]]
) -> None:
    """Read without a word about padding, from a tokenizer.json that itself truncated and padded as well."""
    run, folder = exported(name, "dense")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    prompts = ["def", "import os\nimport sys\nfrom pathlib import Path", "class Error(Exception):"]
    alone = [tokenizer(prompt, return_tensors="pt") for prompt in prompts]
    ours = open_saved(run).tokenizer
    assert [one.input_ids[0].tolist() for one in alone] == [ours.encode_prompt(prompt) for prompt in prompts]
    assert len({one.input_ids.shape[1] for one in alone}) == 3

    def continued(inputs: transformers.BatchEncoding) -> list[list[int]]:
        found = model.generate(**inputs, max_new_tokens=12, min_new_tokens=12, do_sample=False)
        return found[:, inputs.input_ids.shape[1] :].tolist()

    batch = continued(tokenizer(prompts, return_tensors="pt", padding=True))
    assert batch == [continued(one)[0] for one in alone] and len({tuple(row) for row in batch}) == 3


def test_generation_config(exported: Callable[[str, str], tuple[Path, Path]]) -> None:
    _, folder = exported("uniform", "dense")
    assert json.loads((folder / "generation_config.json").read_text()) == {
        "do_sample": False,
        "eos_token_id": 1,
        "pad_token_id": 0,
    }
    config = transformers.GenerationConfig.from_pretrained(folder)
    assert (config.do_sample, config.eos_token_id, config.pad_token_id) == (False, 1, 0)


def dense_by_hand(run: Path) -> dict[str, torch.Tensor]:
    """Every weight of the dense model, in float32, from the checkpoint."""
    weights = {
        name: value.float() if value.is_floating_point() else value
        for name, value in load_file(newest(run) / "model.safetensors").items()
    }
    model = build_model(read_config(run / "config.yaml"), 512, torch.float32)
    model.load_state_dict(weights, assign=True)
    dense = {name: value for name, value in weights.items() if name.rpartition(".")[2] == "weight"}
    for name, layer in model.named_modules():
        if isinstance(layer, SLTrainLinear | LowRankLinear):
            dense[f"{name}.weight"] = layer.dense_weight()
    return dense


@pytest.mark.parametrize(
    ("name", "dtype"), [("uniform", "float32"), ("uniform", "bfloat16"), ("bfloat16", "float32"), ("bfloat16", None)]
)
def test_weights_are_merged_in_float32_and_rounded_once(
    name: str, dtype: str | None, trained: Callable[[str], Path], tmp_path: Path, sltrain_export: Run
) -> None:
    run, output = trained(name), tmp_path / "model"
    code, out, err = sltrain_export(run, "--output", output, *(["--dtype", dtype] if dtype else []))
    assert code == 0 and not err, err
    expected = getattr(torch, dtype or "bfloat16")
    assert str(expected).removeprefix("torch.") in out
    found, wanted = load_file(output / "model.safetensors"), dense_by_hand(run)
    assert found.keys() == wanted.keys()
    for key, value in found.items():
        assert value.dtype == expected and torch.equal(value, wanted[key].to(expected)), key
    model = transformers.AutoModelForCausalLM.from_pretrained(output)
    assert model.dtype == expected
    assert card_rows(output)["weights here"] == f"dense, {str(expected).removeprefix('torch.')}"


def test_an_earlier_step_and_its_own_evaluation(
    trained: Callable[[str], Path], tmp_path: Path, sltrain_export: Run
) -> None:
    run = trained("steps")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    evaluations = {line["step"]: line for line in lines if line["event"] in ("eval", "final")}
    assert evaluations.keys() == {4, 6} and evaluations[4]["loss"] != evaluations[6]["loss"]
    for step in (2, 4, 6):
        output = tmp_path / str(step)
        code, out, _ = sltrain_export(run, "--output", output, "--step", step)
        assert code == 0 and f"step {step}" in out
        weights = load_file(run / f"checkpoints/step_{step:08d}" / "model.safetensors")
        found = load_file(output / "model.safetensors")
        assert torch.equal(found["model.embed_tokens.weight"], weights["model.embed_tokens.weight"])
        card = (output / "README.md").read_text()
        assert f"after {step} updates" in card and card_rows(output)["updates"].startswith(f"{step} of 8 rows; ")
        tokens = next(line["tokens"] for line in lines if line["event"] == "train" and line["step"] == step)
        assert f"{tokens:,} tokens" in card
        numbers = re.findall(r"^\| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", card, re.MULTILINE)
        results = huggingface_hub.ModelCard(card).data.eval_results
        assert [r.metric_value for r in results or []] == [round(evaluations[s]["perplexity"], 4) for s in {step} - {2}]
        if step == 2:
            assert not numbers and "This step was not evaluated." in card
            continue
        names = ("loss", "perplexity", "bits_per_byte")
        (row,) = numbers
        for number, key in zip(row, names, strict=True):
            assert abs(float(number) - evaluations[step][key]) < (6e-3 if "perplexity" in key else 6e-5), key
        assert f"On {evaluations[step]['eval_tokens']} validation tokens" in card and "not evaluated" not in card


def test_without_a_step_the_newest_intact_checkpoint(
    trained: Callable[[str], Path], tmp_path: Path, sltrain_export: Run
) -> None:
    run = shutil.copytree(trained("steps"), tmp_path / "run", symlinks=True)
    damage(newest(run) / "model.safetensors")
    code, out, err = sltrain_export(run, "--output", tmp_path / "model")
    assert code == 0 and not err
    assert f"{newest(run)} is damaged" in out and "the one before" in out and "step 4" in out
    assert json.loads((tmp_path / "model" / "config.json").read_text())["sltrain"]["step"] == 4
    code, _, err = sltrain_export(run, "--output", tmp_path / "other", "--step", 6)
    assert_refused(code, err, "step_00000006", "damaged")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "run"]


def damage(file: Path) -> None:
    """Turn one bit; the size stays."""
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


# ---- the folder


@pytest.mark.parametrize("format", ["dense", "compressed"])
def test_files_are_data_and_readable_as_the_umask_says(
    format: str, trained: Callable[[str], Path], tmp_path: Path, sltrain_export: Run
) -> None:
    before = os.umask(0o027)
    try:
        code, _, _ = sltrain_export(trained("uniform"), "--output", tmp_path / "model", "--format", format)
    finally:
        os.umask(before)
    assert code == 0
    code_files = {"dense": set(), "compressed": {"modeling_sltrain.py"}}[format]
    assert {path.name for path in (tmp_path / "model").iterdir()} == FILES | code_files
    for path in (tmp_path / "model").iterdir():
        assert path.stat().st_mode & 0o777 == 0o640, path
        start = path.read_bytes()[:8]
        assert not start.startswith((b"PK", b"\x80")), path  # torch.save, pickle
    assert (tmp_path / "model").stat().st_mode & 0o777 == 0o750
    with safe_open(tmp_path / "model" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize(
    ("name", "format"),
    [
        ("full", "dense"),
        ("low_rank", "dense"),
        ("low_rank", "compressed"),
        ("column", "compressed"),
        ("uniform", "dense"),
    ],
)
def test_the_card_has_the_runs_facts(name: str, format: str, exported: Callable[[str, str], tuple[Path, Path]]) -> None:
    run, folder = exported(name, format)
    card, rows = (folder / "README.md").read_text(), card_rows(folder)
    front = yaml.safe_load(card.split("---\n")[1])
    assert front["library_name"] == "transformers" and front["pipeline_tag"] == "text-generation"
    assert front.get("license") is None and "datasets" not in front  # nothing said, and no data set of the Hub
    assert {"llama", "sltrain"} <= set(front["tags"]) and ("custom_code" in front["tags"]) == (format == "compressed")
    summary, config = json.loads((run / "summary.json").read_text()), yaml.safe_load((run / "config.yaml").read_text())
    count = summary["num_parameters"]
    method = config["method"]["name"]
    assert f"# llama_tiny, pretrained with {method}\n" in card
    assert f"{count['total']:,} trained parameters" in card and f"on {summary['tokens']:,} tokens" in card
    groups = [f"{count[key]:,} {key.replace('_', '-')}" for key in ("dense", "low_rank", "sparse") if count[key]]
    assert rows["parameters"] == f"{count['total']:,} = {' + '.join(groups)}"
    assert rows["method"].startswith(method)
    assert ("rank 8, alpha 16" in rows["method"]) == (name != "full")
    assert (f"sparsity {config['sparsity']:g}, support {name}" in rows["method"]) == (method == "sltrain")
    assert rows["corpus"] == f"local, {config['path']}, tokenizer {config['tokenizer']}"
    assert rows["rows"] == "32 tokens, truncate_pad" and rows["seed"] == "42"
    assert rows["optimizer"] == "adamw, lr 0.05, weight decay 0"
    assert rows["weights here"] == f"{format}, float32"
    assert f"| {summary['loss']:.4f} | {summary['perplexity']:.2f} |" in card
    ((result,), index) = huggingface_hub.ModelCard(card).data.eval_results, front["model-index"]
    assert (result.metric_type, result.metric_value) == ("perplexity", round(summary["perplexity"], 4))
    assert result.dataset_type == "local" and front["metrics"] == ["perplexity"] and index[0]["name"] == "llama_tiny"
    assert "{{" not in card and "None" not in card and "Undefined" not in card


@pytest.mark.parametrize(
    "name",
    [
        "uniform",
        "begin",
    ],
)
def test_the_python_of_the_dense_card_runs(
    name: str,
    exported: Callable[[str, str], tuple[Path, Path]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run, folder = exported(name, "dense")
    monkeypatch.chdir(folder)
    names: dict = {}
    capsys.readouterr()
    exec(card_code(folder), names)
    assert capsys.readouterr().out.startswith("The history of")
    assert names["ids"][0].tolist() == open_saved(run).tokenizer.encode_prompt("The history of")


@pytest.mark.slow
def test_the_python_of_the_compressed_card_runs(
    exported: Callable[[str, str], tuple[Path, Path]], tmp_path: Path
) -> None:
    _, folder = exported("uniform", "compressed")
    done = subprocess.run(
        [sys.executable, "-c", card_code(folder)],
        cwd=folder,
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("The history of")


# ---- compressed


def rebuilt(tensors: dict[str, np.ndarray], settings: dict) -> np.ndarray:
    """W of one module, by what the model card says and nothing else."""
    A, B = tensors["A"], tensors["B"]
    num_rows, num_columns = B.shape[0], A.shape[1]
    W = np.zeros((num_rows, num_columns))
    if settings["rank"]:
        W += settings["alpha"] / settings["rank"] * (B.astype(np.float64) @ A.astype(np.float64))
    if settings["rank"] and "residual" in settings:
        times = -(-num_rows // settings["rank"])
        W += settings["residual"] / times**0.5 * A[[row // times for row in range(num_rows)]]
    if "support" not in settings:
        return W
    values, indices = tensors["values"], tensors["indices"]
    if not len(values):  # sparsity 0: `indices` is empty too, whatever the card's table says of uniform
        return W
    if settings["support"] == "uniform" and num_columns <= 65536:
        assert indices.dtype == np.uint16
        words = indices[: 2 * (num_rows + 1)].astype(np.int64)
        starts, columns = words[0::2] + 65536 * words[1::2], indices[2 * (num_rows + 1) :]
        assert starts[0] == 0 and starts[-1] == len(columns) == len(values)
        for row in range(num_rows):
            for i in range(starts[row], starts[row + 1]):
                W[row, columns[i]] += values[i]
    elif settings["support"] == "uniform":
        assert indices.dtype == np.int32
        for position, value in zip(indices, values, strict=True):
            W[position // num_columns, position % num_columns] += value
    elif settings["support"] == "stratified":
        n = len(values)
        assert indices.dtype == (np.uint8 if num_rows * num_columns <= 256 * n else np.int32)
        for i in range(n):
            position = i * num_rows * num_columns // n + int(indices[i])
            W[position // num_columns, position % num_columns] += values[i]
    elif settings["support"] == "block":
        side, used = settings["block_size"], 0
        for number in indices.tolist():
            block_row, block_column = divmod(number, -(-num_columns // side))
            for row in range(block_row * side, min((block_row + 1) * side, num_rows)):
                for column in range(block_column * side, min((block_column + 1) * side, num_columns)):
                    W[row, column] += values[used]
                    used += 1
        assert used == len(values)
    elif settings["support"] == "rolled":
        (offset, g), used = indices.tolist(), 0
        assert indices.dtype == np.int32
        for row in range(num_rows):
            k = next(k for k in range(g) if k * num_rows // g <= row < (k + 1) * num_rows // g)
            for column in range(k * num_columns // g, (k + 1) * num_columns // g):
                W[row, (column + offset) % num_columns] += values[used]
                used += 1
        assert used == len(values)
    else:
        assert settings["support"] in ("column", "slice") and indices.dtype == np.int32
        W[:, indices] += values.reshape(num_rows, len(indices))
    return W


@pytest.mark.parametrize("name", COMPRESSIBLE)
def test_the_words_of_the_card_rebuild_every_matrix(
    name: str, exported: Callable[[str, str], tuple[Path, Path]]
) -> None:
    run, folder = exported(name, "compressed")
    settings = json.loads((folder / "config.json").read_text())["sltrain"]["layers"]
    weights = {key: value.numpy() for key, value in load_file(folder / "model.safetensors").items()}
    wanted = dense_by_hand(run)
    assert len(settings) == 14
    for key, own in settings.items():
        tensors = {
            leaf: weights.pop(f"{key}.{leaf}") for leaf in ("A", "B", "values", "indices") if f"{key}.{leaf}" in weights
        }
        dense = wanted.pop(f"{key}.weight").numpy()
        np.testing.assert_allclose(rebuilt(tensors, own), dense, atol=1e-6, rtol=1e-5, err_msg=key)
        assert np.abs(dense).max() > 0.01
    assert weights.keys() == wanted.keys()  # and all others have transformers' names
    assert all(np.array_equal(weights[key], wanted[key].numpy()) for key in weights)


@pytest.mark.parametrize(
    ("num_rows", "num_columns", "sparsity", "kind", "block"),
    [
        (7, 65536, 0.001, "uniform", None),  # the most columns that uint16 numbers
        (3, 65537, 0.001, "uniform", None),
        (300, 400, 0.6, "uniform", None),  # more than 65,535 values: the high words of row starts
        (24, 50, 0.004, "stratified", None),  # 300 entries a stratum
        (20, 51, 0.3, "stratified", None),
        (17, 13, 0.3, "block", 4),
        (30, 44, 0.05, "column", None),
        (30, 44, 0.05, "slice", None),
        (31, 44, 0.15, "rolled", None),
    ],
)
def test_the_words_of_the_card_hold_for_every_kind_of_layer(
    num_rows: int, num_columns: int, sparsity: float, kind: str, block: int | None
) -> None:
    layer = SLTrainLinear(
        num_columns,
        num_rows,
        2,
        sparsity,
        3,
        support=kind,
        block_size=block,
        generator=torch.Generator().manual_seed(1),
    )
    torch.nn.init.normal_(layer.B, generator=torch.Generator().manual_seed(2))
    settings = {"rank": 2, "alpha": 3, "support": kind, "block_size": block}
    tensors = {key: value.detach().numpy() for key, value in layer.state_dict().items()}
    W = rebuilt(tensors, settings)
    assert np.count_nonzero(layer.values.detach()) > 0
    np.testing.assert_allclose(W, layer.dense_weight().numpy(), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", COMPRESSIBLE)
def test_the_compressed_model_computes_the_same_bits_and_is_smaller(
    name: str, exported: Callable[[str, str], tuple[Path, Path]]
) -> None:
    run, small = exported(name, "compressed")
    _, dense = exported(name, "dense")
    ids = some_ids(50)
    with torch.no_grad():
        assert torch.equal(sltrain.load(small)(ids), sltrain.load(run)(ids))
    ours, checkpoint = load_file(small / "model.safetensors"), load_file(newest(run) / "model.safetensors")
    assert ours.keys() == checkpoint.keys() and all(torch.equal(ours[key], checkpoint[key]) for key in ours)
    files = (small / "model.safetensors", dense / "model.safetensors")
    sizes = [file.stat().st_size for file in files]
    if name != "block":  # 20 % of small matrices beside a rank of a quarter: nothing is saved
        assert sizes[0] < sizes[1], sizes


def test_compressed_in_bfloat16_rounds_values_and_keeps_positions(
    trained: Callable[[str], Path], tmp_path: Path, sltrain_export: Run
) -> None:
    run = trained("uniform")
    code, _, _ = sltrain_export(run, "--output", tmp_path / "small", "--format", "compressed", "--dtype", "bfloat16")
    assert code == 0
    ours, checkpoint = load_file(tmp_path / "small/model.safetensors"), load_file(newest(run) / "model.safetensors")
    for key, value in checkpoint.items():
        wanted = value.to(torch.bfloat16) if value.is_floating_point() else value
        assert ours[key].dtype == wanted.dtype and torch.equal(ours[key], wanted), key
    assert sltrain.load(tmp_path / "small").lm_head.weight.dtype == torch.bfloat16


@pytest.fixture(scope="module")
def opened_by_strangers(
    exported: Callable[[str, str], tuple[Path, Path]], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict]:
    """What tests/without_sltrain.py finds in the compressed export of each run, and in one of several files."""
    folders = {name: exported(name, "compressed")[1] for name in [*COMPRESSIBLE, *OWN_CODE]}
    folders["shards"] = tmp_path_factory.mktemp("shards") / "model"
    build_export.export(open_saved(exported("uniform", "dense")[0]), folders["shards"], "compressed", None, 50_000)
    done = subprocess.run(
        [sys.executable, Path(__file__).parents[1] / "without_sltrain.py", *folders.values()],
        input=json.dumps(["def", "import os\nimport sys\nfrom pathlib import Path", "class Error(Exception):"]),
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HOME": str(tmp_path_factory.mktemp("hf_home")), "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
    return dict(zip(folders, map(json.loads, done.stdout.splitlines()), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", [*COMPRESSIBLE, *OWN_CODE, "shards"])
def test_transformers_opens_a_compressed_folder_without_sltrain(
    name: str, opened_by_strangers: dict[str, dict], exported: Callable[[str, str], tuple[Path, Path]]
) -> None:
    found, run_name = opened_by_strangers[name], "uniform" if name == "shards" else name
    run, folder = exported(run_name, "compressed")
    with torch.no_grad():
        wanted = model_of(run)(some_ids())
        few = model_of(run)(some_ids()[:, :3])
    assert wanted.std() > 0.1
    assert_same_logits(torch.tensor(found["logits"]), wanted)
    assert_same_logits(torch.tensor(found["first_logits"]), few)
    assert found["batch"] == found["alone"] == found["uncached"] and len({tuple(row) for row in found["batch"]}) == 3
    files = load_file(folder / "model.safetensors")
    assert found["bytes"] == sum(tensor.nbytes for tensor in files.values()), "no tensor besides the factors"


@pytest.mark.slow
@pytest.mark.parametrize("name", [*COMPRESSIBLE, *OWN_CODE])
def test_what_transformers_saves_again_opens_again(
    name: str, opened_by_strangers: dict[str, dict], exported: Callable[[str, str], tuple[Path, Path]]
) -> None:
    """By transformers and by sltrain, with the weights and the shape, rope_theta for one, that it had."""
    run, folder = exported(name, "compressed")
    assert opened_by_strangers[name]["logits_again"] == opened_by_strangers[name]["logits"]
    with torch.no_grad():
        ours = sltrain.load(f"{folder}_again")(some_ids())
        assert torch.equal(ours, sltrain.load(run)(some_ids()))


def test_a_kind_with_code_of_its_own_brings_it_and_is_not_merged(
    exported: Callable[[str, str], tuple[Path, Path]], tmp_path: Path, sltrain_export: Run
) -> None:
    run, folder = exported("cola", "compressed")
    assert {path.name for path in folder.iterdir()} - FILES == {"modeling_sltrain.py", "layer_cola.py"}
    assert "in `modeling_sltrain.py`, its projections in `layer_cola.py`" in (folder / "README.md").read_text()
    code, _, err = sltrain_export(run, "--output", tmp_path / "dense")
    assert code == 2 and "layers of kind cola are not one matrix each; use --format compressed" in err


def test_a_kind_without_code_says_so_and_names_the_way_to_transformers(
    trained: Callable[[str], Path], tmp_path: Path, sltrain_export: Run
) -> None:
    code, out, err = sltrain_export(trained("sparse"), "--output", tmp_path / "small", "--format", "compressed")
    assert code == 0 and not err
    (note,) = [line for line in out.splitlines() if line.startswith("note")]
    assert note == (
        "note       layers of kind sparse have no code for transformers: only sltrain.load opens it; --format dense"
        " makes one for transformers"
    )
    assert {path.name for path in (tmp_path / "small").iterdir()} == FILES
    card = (tmp_path / "small" / "README.md").read_text()
    assert "Only sltrain opens this folder: layers of kind sparse have no code for transformers." in card
    assert "--format dense`, of the run" in card and "trust_remote_code" not in card
    code, out, _ = sltrain_export(trained("sparse"), "--output", tmp_path / "dense", "--format", "dense")
    assert code == 0 and "no code" not in out and "Only sltrain" not in (tmp_path / "dense/README.md").read_text()


def test_the_code_of_a_compressed_folder_is_not_run_unasked(
    exported: Callable[[str, str], tuple[Path, Path]],
) -> None:
    """And without it transformers opens nothing, instead of a LLaMA with random projections."""
    _, folder = exported("uniform", "compressed")
    for auto in (transformers.AutoModelForCausalLM, transformers.AutoConfig):
        with pytest.raises(ValueError, match="trust_remote_code"):
            auto.from_pretrained(folder, trust_remote_code=False)


# ---- shards


def test_a_card_of_a_run_whose_perplexity_is_no_number(
    trained: Callable[[str], Path], tmp_path: Path, sltrain_export: Run
) -> None:
    """Beyond float64 it is null in summary.json."""
    run = shutil.copytree(trained("full"), tmp_path / "run", symlinks=True)
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps({**summary, "perplexity": None}))
    code, _, err = sltrain_export(run, "--output", tmp_path / "model")
    assert code == 0 and f"| {summary['loss']:.4f} |" in (tmp_path / "model" / "README.md").read_text(), err


@pytest.mark.parametrize("format", ["dense", "compressed"])
def test_a_large_model_is_written_in_shards(
    format: str, exported: Callable[[str, str], tuple[Path, Path]], tmp_path: Path
) -> None:
    run, whole = exported("uniform", format)
    folder = tmp_path / "model"
    build_export.export(open_saved(run), folder, format, None, max_shard_bytes=50_000)
    names = {path.name for path in folder.iterdir()} - FILES - {"modeling_sltrain.py"}
    count = len(names) - 1
    assert count >= 3 and names == {"model.safetensors.index.json"} | {
        f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)
    }
    ids = some_ids(20)
    with torch.no_grad():
        if format == "dense":
            models = [transformers.AutoModelForCausalLM.from_pretrained(path) for path in (whole, folder)]
            assert torch.equal(models[0](ids).logits, models[1](ids).logits)
        assert torch.equal(sltrain.load(whole)(ids), sltrain.load(folder)(ids))


# ---- what is refused, and what goes wrong


def assert_refused(code: int, err: str, *words: str) -> None:
    assert code == 2, err
    assert err.startswith("error: ") and len(err.strip().splitlines()) == 1 and "Traceback" not in err, err
    for word in words:
        assert word in err, err


BAD_FLAGS = {
    "no output": ([], ["--output"]),
    "unknown flag": (["--output", "{new}", "--fromat", "dense"], ["--fromat", "--help"]),
    "abbreviated flag": (["--out", "{new}"], ["--out", "--help"]),
    "unknown format": (["--output", "{new}", "--format", "gguf"], ["gguf", "compressed"]),
    "unknown dtype": (["--output", "{new}", "--dtype", "float16"], ["float16", "bfloat16"]),
    "step is no number": (["--output", "{new}", "--step", "last"], ["--step", "last"]),
    "license in words": (["--output", "{new}", "--license", "Apache 2"], ["'Apache 2'", "apache-2.0"]),
    "unknown step": (["--output", "{new}", "--step", "5"], ["step 5", "2, 4, 6"]),
    "output holds things": (["--output", "{full}"], ["{full}", "another"]),
    "output is a file": (["--output", "{full}/thesis.tex"], ["thesis.tex"]),
    "output below a file": (["--output", "{full}/thesis.tex/model"], ["thesis.tex"]),
    "output cannot be made": (["--output", "/proc/model"], ["/proc/model"]),
}


@pytest.mark.parametrize("case", BAD_FLAGS)
def test_bad_flags(case: str, trained: Callable[[str], Path], tmp_path: Path, sltrain_export: Run) -> None:
    full, new = tmp_path / "full", tmp_path / "new"
    full.mkdir()
    (full / "thesis.tex").write_text("years of work")
    flags, words = BAD_FLAGS[case]
    code, _, err = sltrain_export(trained("steps"), *(flag.format(full=full, new=new) for flag in flags))
    assert_refused(code, err, *(word.format(full=full) for word in words))
    assert [path.name for path in tmp_path.rglob("*")] == ["full", "thesis.tex"]


def test_nothing_to_compress(trained: Callable[[str], Path], tmp_path: Path, sltrain_export: Run) -> None:
    code, _, err = sltrain_export(trained("full"), "--output", tmp_path / "new", "--format", "compressed")
    assert_refused(code, err, "method=full", "--format dense")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("format", ["dense", "compressed"])
def test_export_of_an_export(
    format: str, exported: Callable[[str, str], tuple[Path, Path]], tmp_path: Path, sltrain_export: Run
) -> None:
    _, folder = exported("uniform", format)
    code, _, err = sltrain_export(folder, "--output", tmp_path / "new")
    assert_refused(code, err, str(folder), "export already")
    code, _, err = sltrain_export(folder, "--output", tmp_path / "new", "--step", 3)
    assert_refused(code, err, "step")
    assert list(tmp_path.iterdir()) == []


def test_an_empty_folder_is_taken(trained: Callable[[str], Path], tmp_path: Path, sltrain_export: Run) -> None:
    code, _, err = sltrain_export(trained("full"), "--output", tmp_path)
    assert code == 0, err
    assert {path.name for path in tmp_path.iterdir()} == FILES
    assert not list(tmp_path.parent.glob(f"{tmp_path.name}.partial*"))


def test_what_a_killed_export_left_is_no_obstacle(
    trained: Callable[[str], Path], tmp_path: Path, sltrain_export: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:  # SIGKILL cleans nothing
        patch.setattr(shutil, "rmtree", lambda *args, **kwargs: None)
        patch.setattr(build_export, "write_weights", stop_midway(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            sltrain_export(trained("full"), "--output", tmp_path / "model")
    (left,) = tmp_path.iterdir()
    monkeypatch.setattr("os.getpid", lambda: 1)  # another process
    code, _, err = sltrain_export(trained("full"), "--output", tmp_path / "model")
    assert code == 0, err
    assert set(tmp_path.iterdir()) == {tmp_path / "model", left}
    assert {path.name for path in (tmp_path / "model").iterdir()} == FILES


def test_a_folder_of_somebody_else_is_not_deleted(
    trained: Callable[[str], Path], tmp_path: Path, sltrain_export: Run
) -> None:
    (tmp_path / "model.partial").mkdir()
    (tmp_path / "model.partial" / "thesis.tex").write_text("years of work")
    sltrain_export(trained("full"), "--output", tmp_path / "model")
    assert (tmp_path / "model.partial" / "thesis.tex").exists()


@pytest.mark.parametrize("output", [".", ""])
def test_the_folder_one_stands_in(
    output: str, trained: Callable[[str], Path], tmp_path: Path, sltrain_export: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An empty folder is taken, or refused in words."""
    run = trained("full")
    monkeypatch.chdir(tmp_path)
    code, _, err = sltrain_export(run, "--output", output)
    assert "PosixPath" not in err
    if code:
        assert_refused(code, err, "name")


def test_nobody_reads_and_the_model_is_exported(
    trained: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class ClosedPipe(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr("sys.stdout", ClosedPipe())
    assert command.run_command([str(trained("full")), "--output", str(tmp_path / "model")]) == 0
    assert {path.name for path in (tmp_path / "model").iterdir()} == FILES


def stop_midway(error: BaseException) -> Callable[..., int]:
    """A write_weights that ends after its first tensors."""

    def write_weights(folder: Path, shapes: dict, make: Callable[[str], torch.Tensor], *args: object) -> int:
        (folder / "model.safetensors").write_bytes(make("lm_head.weight").numpy().tobytes())
        raise error

    return write_weights


@pytest.mark.parametrize("format", ["dense", "compressed"])
@pytest.mark.parametrize(
    ("error", "code"), [(OSError(errno.ENOSPC, "No space left on device"), 2), (RuntimeError("a fault of ours"), 1)]
)
def test_a_failed_export_leaves_nothing(
    error: Exception,
    code: int,
    format: str,
    trained: Callable[[str], Path],
    tmp_path: Path,
    sltrain_export: Run,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(build_export, "write_weights", stop_midway(error))
    found, out, err = sltrain_export(trained("uniform"), "--output", tmp_path / "model", "--format", format)
    assert found == code and str(error) in err and "done" not in out
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_export_leaves_nothing(
    trained: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(build_export, "write_weights", stop_midway(KeyboardInterrupt()))
    monkeypatch.setattr(errors.signal, "signal", lambda *args: None)
    monkeypatch.setattr("sys.argv", ["sltrain-export", str(trained("full")), "--output", str(tmp_path / "model")])
    capfd.readouterr()
    with pytest.raises(SystemExit) as ended:
        command.main()
    assert ended.value.code == 3
    assert capfd.readouterr().err == "interrupted; nothing was exported\n"
    assert list(tmp_path.iterdir()) == []


def wrong_merge(kind: str) -> Callable[[SLTrainLinear], torch.Tensor]:
    """dense_weight with a mistake in one matrix."""
    right = SLTrainLinear.dense_weight

    def dense_weight(layer: SLTrainLinear) -> torch.Tensor:
        W = right(layer)
        if layer.out_features > layer.in_features:  # gate_proj, up_proj
            if kind == "zero":
                W.zero_()
            elif kind == "nan":
                W[0, 0] = torch.nan
            elif kind == "scaled":
                W *= 1.02
            elif kind == "without S":
                W = layer.scale * layer.B @ layer.A
            else:
                W += 0.0001 * W.abs().max()
        return W

    return dense_weight


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("little", "float32"),
        ("zero", "float32"),
        ("nan", "float32"),
        ("nan", "bfloat16"),
        ("scaled", "bfloat16"),
        ("without S", "bfloat16"),
    ],
)
def test_a_model_that_differs_is_not_exported(
    kind: str,
    dtype: str,
    trained: Callable[[str], Path],
    tmp_path: Path,
    sltrain_export: Run,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(SLTrainLinear, "dense_weight", wrong_merge(kind))
    code, out, err = sltrain_export(trained("stratified"), "--output", tmp_path / "model", "--dtype", dtype)
    assert code != 0 and "is another one" in err and "done" not in out
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def small_weights(tiny: list[str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A run as its recipe starts it, whose logits are far below 1."""
    folder = tmp_path_factory.mktemp("small") / "run"
    arguments = [*tiny, "max_steps=1", "lr=1e-4", f"run_dir={folder}"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["sltrain-train", *arguments])
        assert train(arguments) == 0
    yield folder


def test_a_matrix_that_is_missing_in_bfloat16_is_noticed(
    trained: Callable[[str], Path], tmp_path: Path, sltrain_export: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SLTrainLinear, "dense_weight", wrong_merge("zero"))
    code, _, err = sltrain_export(trained("stratified"), "--output", tmp_path / "model", "--dtype", "bfloat16")
    assert code != 0 and "is another one" in err
    assert list(tmp_path.iterdir()) == []


def test_small_logits_are_compared_with_themselves(
    small_weights: Path, tmp_path: Path, sltrain_export: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, out, err = sltrain_export(small_weights, "--output", tmp_path / "right", "--dtype", "bfloat16")
    assert code == 0, err
    monkeypatch.setattr(SLTrainLinear, "dense_weight", wrong_merge("zero"))
    code, _, err = sltrain_export(small_weights, "--output", tmp_path / "wrong")
    assert code != 0 and "is another one" in err
    assert [path.name for path in tmp_path.iterdir()] == ["right"]

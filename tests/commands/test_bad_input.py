"""Bad input costs one or two lines that say what is wrong and what to change, exit code 2, and leaves nothing
behind."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pytest

Run = Callable[..., tuple[int, str, str]]

# (overrides added to a good command, words the message must hold)
CASES: dict[str, tuple[list[str], list[str]]] = {
    "unknown key": (["rnk=3"], ["rnk", "rank"]),
    "unknown nested key": (["optimizer.beta=3"], ["optimizer.beta", "optimizer.betas"]),
    "unknown option": (["method=sl_train"], ["method=sl_train", "method=sltrain"]),
    "wrong type": (["rank=abc"], ["rank=abc", "Integer"]),
    "float for a whole number": (["max_steps=null", "max_tokens=1e6"], ["max_tokens=1e6", "1_000_000"]),
    "negative rank": (["rank=-1"], ["rank=-1", "at least 0"]),
    "rank above the matrix": (["rank=33"], ["33", "32"]),
    "sparsity 1": (["sparsity=1"], ["sparsity=1.0", "below 1"]),
    "sparsity negative": (["sparsity=-0.1"], ["sparsity=-0.1"]),
    "nothing left": (["rank=0", "sparsity=0"], ["rank=0", "sparsity=0"]),
    "unknown support": (["support=diagonal"], ["support=diagonal", "uniform", "block"]),
    "unknown path": (["layer_path=fast"], ["layer_path=fast", "factored"]),
    "columns of nothing": (["support=column", "sparsity=0"], ["support=column", "sparsity=0", "uniform"]),
    "a diagonal of nothing": (["support=rolled", "sparsity=0"], ["support=rolled", "sparsity=0", "uniform"]),
    "a diagonal too fine": (["support=rolled", "sparsity=0.001"], ["q_proj", "support=rolled", "0.031"]),
    "blocks of nothing": (["support=block", "sparsity_overrides={q_proj:0}"], ["support=block", "q_proj=0"]),
    "no column": (["support=column", "sparsity=0.001"], ["q_proj", "support=column", "0.031"]),
    "block above the matrix": (["support=block", "block_size=64"], ["block_size=64", "32 x 32", "at most 32"]),
    "block above the sparsity": (["support=block", "block_size=16", "sparsity=0.03"], ["16 x 16", "smaller"]),
    "block size without blocks": (["block_size=4"], ["block_size=4", "support=block"]),
    "batch": (["micro_batch_size=3"], ["global_batch_size=8", "micro_batch_size=3", "2"]),
    "two budgets": (["max_tokens=1000"], ["max_steps=null max_tokens=1000"]),
    "no budget": (["max_steps=null"], ["max_steps=", "max_tokens="]),
    "learning rate": (["lr=-1"], ["lr=-1", "above 0"]),
    "learning rate nan": (["lr=nan"], ["lr=nan"]),
    "parametrization": (["parametrization=mup"], ["parametrization=mup", "paper, spectral"]),
    "parametrization of another method": (
        ["parametrization=spectral", "method=cola"],
        ["method=cola", "method=full, low_rank or sltrain", "parametrization=paper"],
    ),
    "parametrization of another optimizer": (
        ["parametrization=spectral", "optimizer=muon"],
        ["optimizer=muon", "optimizer=adamw"],
    ),
    "parametrization and start": (
        ["parametrization=spectral", "method=low_rank", "method.start=xavier"],
        ["method.start=xavier", "drop it"],
    ),
    "parametrization and residual": (["parametrization=spectral", "method.residual=1"], ["method.residual=1", "to 0"]),
    "parametrization and tied head": (
        ["parametrization=spectral", "model.tie_word_embeddings=true"],
        ["model.tie_word_embeddings=true", "to false"],
    ),
    "parametrization paper with a width": (
        ["parametrization.base_width=64"],
        ["base_width=64", "parametrization=spectral"],
    ),
    "parametrization without width": (
        ["parametrization=spectral", "parametrization.base_width=0"],
        ["base_width=0", "at least 1"],
    ),
    "schedule": (["schedule=step"], ["schedule=step", "wsd"]),
    "decay of another schedule": (["decay_steps=2"], ["decay_steps=2", "schedule=wsd", "cosine"]),
    "decay too long": (["schedule=wsd", "decay_steps=5"], ["decay_steps=5", "6 updates", "4 or less"]),
    "peak": (["peak_tflops=0"], ["peak_tflops=0", "above 0"]),
    "option of others": (["method=full", "method.activation=silu"], ["belongs to method=cola, ", "; full has gain"]),
    "padding": (["padding=left"], ["padding=left", "truncate_pad"]),
    "dtype": (["dtype=float16"], ["float16", "bfloat16"]),
    "row too long": (["seq_len=2048"], ["seq_len=2048", "max_position_embeddings"]),
    "pattern of no layer": (["rank_overrides={qq_proj:4}"], ["qq_proj", "q_proj"]),
    "text Hydra cannot parse": (["path=/a/[0-9].gz"], ["'path=\"/a/[0-9].gz\"'"]),
    "mapping in quotes": (['rank_overrides={"q":1}'], ["bare names"]),
    "no equals sign": (["rank"], ["key=value"]),
    "path matches nothing": (["path=/nowhere/*.gz"], ["/nowhere/*.gz"]),
    "path missing": (["path=null"], ["path="]),
    "tokenizer missing": (["tokenizer=/nowhere/tokenizer.json"], ["/nowhere/tokenizer.json"]),
    "tokenizer too large": (["model.vocab_size=100"], ["100", "512"]),
    "bpe without size": (["tokenizer=bpe:x"], ["bpe:x"]),
    "validation path": (["validation_path=/nowhere/*.gz"], ["/nowhere/*.gz"]),
    "heads": (["model.num_attention_heads=3"], ["num_attention_heads"]),
    "streams and text": (["data.shuffle_block=0"], ["data.shuffle_block=0"]),
    "required key": (["seed=null"], ["seed"]),
    "betas": (["optimizer.betas=[0.9]"], ["optimizer.betas"]),
    "no heads": (["model.num_attention_heads=0"], ["model.num_attention_heads=0"]),
    "path is a number": (["path=5"], ["path=5", "glob"]),
    "variable in single quotes": (["run_dir=$HOME/runs"], ["run_dir=$HOME/runs", "~", "single quotes"]),
    "variable of a path": (["path=[$DATA/a.gz]"], ["path=$DATA/a.gz", "single quotes"]),
    "variable with braces": (["run_dir=${HOME}/runs"], ["run_dir: Interpolation key 'HOME'", "${oc.env:NAME}"]),
    "variable that is not set": (["run_dir="], ["run_dir is empty"]),
    "several keys in one argument": (["rank=4 sparsity=0.1"], ["several keys in one argument"]),
    "seed of another world": (["seed=99999999999999999999"], ["seed=99999999999999999999", "2^63"]),
    "name too long": (["run_dir=" + "a" * 300], ["run_dir=aaa", "File name too long"]),
    "key with a plus": (["+rank=3"], ["rank", "drop the +"]),
    "another configuration": (["--config-dir=/nowhere"], ["drop --config-name"]),
    "run_dir is a file": (["run_dir=/etc/hostname"], ["/etc/hostname"]),
}


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        ("rank=33", "rank must be between 0 and 32"),
        ("micro_batch_size=3", "the nearest that fit: micro_batch_size=2, or global_batch_size=9"),
        ("support=column sparsity=0.001", "trains no column"),
        ("rank_overrides={qq:4}", "'qq' fits no replaced layer"),
        ("model.num_attention_heads=3", "num_attention_heads"),
        ("path=/nowhere/*.gz", "matches no file"),
        ("validation_path=/nowhere/*.gz", "matches no file"),
        ("run_dir=/etc/hostname/run", "run_dir=/etc/hostname/run cannot be created: /etc/hostname is a file"),
    ],
)
def test_what_needs_no_text_is_checked_before_a_tokenizer_is_trained(
    typed: str, words: str, tiny: list[str], tmp_path: Path, sltrain_train: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    code, out, err = sltrain_train(*tiny, "tokenizer=bpe:300", *typed.split())
    assert code == 2 and words in err and "training a byte-level BPE" not in out, out + err
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_the_system_refuses(tiny: list[str], sltrain_train: Run) -> None:
    code, _, err = sltrain_train(*tiny, "run_dir=/proc/nothing/run")
    assert code == 2 and "run_dir=/proc/nothing/run cannot be written: No such file or directory" in err


def test_a_cache_that_cannot_be_written_costs_a_note(
    tiny: list[str], tmp_path: Path, sltrain_train: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    for name in ("HOME", "XDG_CACHE_HOME", "TMPDIR"):
        monkeypatch.setenv(name, str(tmp_path / "file" / "folder"))
    run = [*tiny, "tokenizer=bpe:300", "max_steps=1", "warmup_steps=0", f"run_dir={tmp_path}/run"]
    code, out, err = sltrain_train(*run)
    assert code == 0 and "cannot be written (Not a directory); every new run will train its tokenizer" in out, err
    assert (tmp_path / "run" / "tokenizer.json").stat().st_size > 0


@pytest.mark.parametrize("case", CASES)
def test_bad_input(
    case: str, tiny: list[str], tmp_path: Path, sltrain_train: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides, words = CASES[case]
    monkeypatch.chdir(tmp_path)
    code, out, err = sltrain_train(*tiny, *overrides)
    assert code == 2, err
    assert err.startswith("error: ")
    assert len(err.strip().splitlines()) <= 2
    assert "Traceback" not in out + err
    for word in words:
        assert word in err
    assert list(tmp_path.iterdir()) == []


def test_no_model(sltrain_train: Run) -> None:
    code, _, err = sltrain_train()
    assert code == 2 and "llama_60m" in err and "experiment=quickstart" in err


def test_glob_in_a_sweep(tiny: list[str], sltrain_train: Run) -> None:
    code, _, err = sltrain_train("-m", *tiny, "model=glob(llama_t*)")
    assert code == 2 and "list the values" in err


def test_no_cuda(tiny: list[str], sltrain_train: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    code, _, err = sltrain_train(*tiny, "device=cuda")
    assert code == 2 and "device=cpu" in err


def test_no_compiler(tiny: list[str], sltrain_train: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler -O3")
    code, _, err = sltrain_train(*tiny, "compile=true")
    assert code == 2 and "no-such-compiler" in err and "drop compile=true" in err


def test_debug_shows_the_traceback(tiny: list[str], sltrain_train: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLTRAIN_DEBUG", "1")
    code, _, err = sltrain_train(*tiny, "rank=-1")
    assert code == 2 and "Traceback" in err and "error: rank=-1" in err


def test_folder_with_other_things_is_refused(tiny: list[str], tmp_path: Path, sltrain_train: Run) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    code, _, err = sltrain_train(*tiny, f"run_dir={tmp_path}")
    assert code == 2 and str(tmp_path) in err
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_corpus_without_a_document(tiny: list[str], tmp_path: Path, sltrain_train: Run) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    code, _, err = sltrain_train(*tiny, f"path={tmp_path}/empty.jsonl", f"run_dir={tmp_path}/run")
    assert code == 2 and "document" in err


def write_shard(path: Path, num_records: int) -> None:
    with gzip.open(path, "wt") as file:
        for i in range(num_records):
            file.write(json.dumps({"text": f"document number {i} of a small file, with a few words more"}) + "\n")


def test_damaged_data_is_left_out_or_stops(tiny: list[str], tmp_path: Path, sltrain_train: Run) -> None:
    write_shard(tmp_path / "a.json.gz", 400)
    whole = (tmp_path / "a.json.gz").read_bytes()
    (tmp_path / "b.json.gz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "c.jsonl").write_text('{"text": "a good line"}\n{"text": \n')
    overrides = [*tiny, f"path={tmp_path}/*.json*", "max_steps=60", "padding=pack"]
    code, out, err = sltrain_train(*overrides, f"run_dir={tmp_path}/skip")
    assert code == 0, err
    assert "b.json.gz is damaged after its record" in out and "c.jsonl:2" in out
    code, out, err = sltrain_train(*overrides, f"run_dir={tmp_path}/stop", "on_bad_data=stop")
    assert code == 2 and ("b.json.gz" in err or "c.jsonl:2" in err)

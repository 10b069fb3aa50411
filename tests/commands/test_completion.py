"""Tab completes what can be typed, and Hydra's own flags work."""

import subprocess
from collections.abc import Callable

import pytest

Run = Callable[..., tuple[int, str, str]]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("mo", "model="),
        ("optimizer=adam", "optimizer=adam8bit optimizer=adamw"),  # and not the schemas
        ("model=llama_60m spars", "sparsity= sparsity_overrides."),
        ("model=llama_60m lr=", "lr=0.003"),
        ("model=nothing ra", ""),
        ("--rank 6", ""),
    ],
)
def test_completion(line: str, words: str, sltrain_train: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMP_LINE", f"sltrain-train {line}")
    assert sltrain_train("-sc", "query=bash") == (0, "\n".join(words.split()) + "\n", "")


def test_installation_names_the_command(sltrain_train: Run) -> None:
    for shell in ("bash", "fish", "zsh"):
        code, out, _ = sltrain_train("-sc", f"install={shell}")
        assert code == 0 and "sltrain-train" in out
    code, _, err = sltrain_train("-sc", "install=csh")
    assert code == 2 and "install=bash, install=fish" in err


@pytest.mark.parametrize(
    ("typed", "answer"),
    [
        ("model=llama_60m --info", "optimizer/adamw_schema"),
        ("--info plugins", "BashCompletion"),
        ("model=llama_60m --cfg job", "rank: 128"),
    ],
)
def test_hydras_flags(typed: str, answer: str, start_process: "Callable[..., subprocess.Popen[str]]") -> None:
    process = start_process(*typed.split())  # Hydra changes the logging of a process
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, "") and answer in out


def test_dashes_and_wrong_flags(sltrain_train: Run) -> None:
    for typed, answer in {
        "--info nothing": "invalid choice: 'nothing'",
        "--rank 64": "type rank=64",
        "--learning-rate=1e-3": "type lr=1e-3",
        "--model llama_60m": "type model=llama_60m",
        "--bf16 --lr 1": "here it is dtype=bfloat16",
        "--nothing": "sltrain-train --help lists the keys",
    }.items():
        code, _, err = sltrain_train("model=llama_60m", *typed.split())
        assert code == 2 and err.startswith("error: ") and answer in err and len(err.splitlines()) == 1, err

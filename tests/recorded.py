"""What test_golden.py and test_compat.py share: small runs whose numbers are kept in files, and whether they recur.

The runs know the command alone, its overrides and the files of a run folder, nothing of the modules behind it; `train`
is the one function that calls it. They read a text and a tokenizer of 128 pieces that are files here, so that no
version of Python or of a library decides what is trained on; `python tests/recorded.py` made them, and would again.

The last bits of a float depend on the processor, the libraries and the compiler. `machine` names all of them: where it
is that of the file numbers must be equal, elsewhere only near.

Fed with a JSON object {name: overrides} on standard input, `python tests/recorded.py run` trains in a process of its
own, where the environment can be another, and prints {name: numbers}.
"""

import contextlib
import gzip
import io
import json
import math
import os
import platform
import random
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

TEXT_FOLDER = Path(__file__).parent / "compat" / "text"
TEXT = [  # relative names: with a run folder they are all that a configuration says of this machine
    "data=local",
    "path=text/corpus.jsonl.gz",
    "tokenizer=text/tokenizer.json",
    "data.shuffle_block=16",
    "data.holdout_every=10",
    "eval_tokens=400",
]
NUM_PIECES = 128
TOLERANCES = {"float32": 1e-3, "coarse": 5e-2}  # on another machine, relative; coarse: bfloat16 or 8-bit moments


def train(*overrides: str) -> tuple[int, str]:
    """Run `sltrain-train` with one thread, in the folder whose `text` the overrides name -> exit code and all that it
    printed."""
    from sltrain.commands.train import run_command

    said, threads, argv = io.StringIO(), torch.get_num_threads(), sys.argv
    torch.set_num_threads(1)
    sys.argv = ["sltrain-train"]
    try:
        with (
            contextlib.chdir(TEXT_FOLDER.parent),
            contextlib.redirect_stdout(said),
            contextlib.redirect_stderr(said),
        ):
            return int(run_command(list(overrides))), said.getvalue()
    finally:
        torch.set_num_threads(threads)
        sys.argv = argv


def numbers_of(run_dir: Path) -> dict[str, Any]:
    """Loss and gradient norm of every update, and the loss of the last evaluation."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    updates, (final,) = ([line for line in lines if line["event"] == event] for event in ("train", "final"))
    assert [line["step"] for line in updates] == list(range(1, len(updates) + 1))
    return {
        "loss": [line["loss"] for line in updates],
        "grad_norm": [line["grad_norm"] for line in updates],
        "final_loss": final["loss"],
    }


def train_anew(*overrides: str) -> dict[str, Any]:
    """The numbers of a run in a folder of its own, which does not stay."""
    with tempfile.TemporaryDirectory() as folder:
        code, said = train(*overrides, f"run_dir={folder}/run")
        assert code == 0, said
        return numbers_of(Path(folder, "run"))


def train_apart(recipes: Mapping[str, list[str]], **environment: str) -> dict[str, dict[str, Any]]:
    """The numbers of several runs in a process of their own: what is read from the environment is read once."""
    done = subprocess.run(
        [sys.executable, __file__, "run"],
        input=json.dumps(recipes),
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def machine() -> dict[str, Any]:
    """Everything that the bits of a run on a CPU depend on, as far as it is known."""
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        keys = ("vendor_id", "cpu family", "model", "model name", "stepping")
        lines = [line.partition(":") for line in Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()]
        model = ", ".join(value.strip() for key, _, value in lines if key.strip() in keys) or model
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": model,
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "threads": 1,
        "compiler": _compiler(),
        "bitsandbytes": version("bitsandbytes"),
    }


def _compiler() -> str | None:
    """What compiles the CPU kernel, by its first line; None: it is switched off, or there is no compiler."""
    if os.environ.get("SLTRAIN_CPU_KERNEL", "").lower() == "off":
        return None
    for command in (os.environ.get("CXX", ""), "g++", "clang++", "c++"):
        words = shlex.split(command)
        if words and shutil.which(words[0]):
            done = subprocess.run([*words, "--version"], capture_output=True, text=True)
            return done.stdout.partition("\n")[0]
    return None


def is_coarse(overrides: list[str]) -> bool:
    return not {"dtype=bfloat16", "optimizer=adam8bit", "precision=mixed"}.isdisjoint(overrides)


def differences(found: Any, wanted: Any, tolerance: float | None, name: str = "") -> list[str]:
    """In words, where two trees of numbers differ: at all if `tolerance` is None, else by more than that fraction of
    what is wanted."""
    if isinstance(wanted, dict):
        assert isinstance(found, dict) and found.keys() == wanted.keys(), (name, found)
        return [line for key in wanted for line in differences(found[key], wanted[key], tolerance, f"{name} {key}")]
    if isinstance(wanted, list):
        assert isinstance(found, list) and len(found) == len(wanted), (name, found)
        pairs = enumerate(zip(found, wanted, strict=True))
        return [line for i, (a, b) in pairs for line in differences(a, b, tolerance, f"{name}[{i}]")]
    is_same = found == wanted if tolerance is None else math.isclose(found, wanted, rel_tol=tolerance)
    return [] if is_same else [f"{name.strip()}: {found!r}, recorded {wanted!r}"]


def dump(tree: dict[str, Any], depth: int) -> str:
    """JSON with a line for each entry down to `depth`: floats as Python writes them, which is exact."""
    return _dump(tree, depth, "") + "\n"


def _dump(tree: Any, depth: int, margin: str) -> str:
    if depth == 0 or not isinstance(tree, dict):
        return json.dumps(tree, allow_nan=False)
    lines = [f"{margin} {json.dumps(key)}: {_dump(value, depth - 1, margin + ' ')}" for key, value in tree.items()]
    return "{\n" + ",\n".join(lines) + f"\n{margin}}}"


# ---- the text


def _documents(number: int) -> list[str]:
    """Sentences after a small grammar: a model of this size learns them within a few updates."""
    draw = random.Random(0).random  # its numbers are the same in every version of Python

    def one_of(words: str) -> str:
        choices = words.split()
        return choices[int(draw() * len(choices))]

    def noun() -> str:
        colour = one_of("red blue old small quiet") + " " if draw() < 0.4 else ""
        return f"{one_of('the a this every')} {colour}{one_of('river stone bird tower child garden letter engine')}"

    def sentence() -> str:
        verb = one_of("sees finds follows carries leaves paints remembers")
        place = f" {one_of('near under behind above')} {noun()}" if draw() < 0.5 else ""
        return f"{noun()} {verb} {noun()}{place}."

    return [" ".join(sentence() for _ in range(1 + int(draw() * 5))) for _ in range(number)]


def _write_text() -> None:
    import tokenizers

    texts = _documents(400)
    TEXT_FOLDER.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (TEXT_FOLDER / "corpus.jsonl.gz").write_bytes(gzip.compress(lines.encode(), mtime=0))
    # Byte-level, but without the bytes that never come: they would be most of so small a vocabulary.
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=NUM_PIECES, special_tokens=["<pad>", "</s>", "<unk>"], show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    assert tokenizer.get_vocab_size() == NUM_PIECES
    tokenizer.save(str(TEXT_FOLDER / "tokenizer.json"), pretty=False)


if __name__ == "__main__":
    if sys.argv[1:] == ["run"]:
        print(json.dumps({name: train_anew(*overrides) for name, overrides in json.load(sys.stdin).items()}))
    else:
        _write_text()

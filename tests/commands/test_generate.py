"""`sltrain-generate` writes the text that transformers' `generate` writes."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers

from sltrain import errors
from sltrain.api.generate import continue_text
from sltrain.commands import export
from sltrain.commands import generate as command
from sltrain.commands.train import run_command as train

Run = Callable[..., tuple[int, str, str]]

PROMPTS = ["def main(self):", "The history of", "é漢🙂 naïve", "  \n\tindent", "x", "</s>again"]
CONTEXT = 60


@pytest.fixture(scope="module")
def model(tiny: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run whose texts vary, and its two exports."""
    folder = tmp_path_factory.mktemp("model")
    arguments = [
        *tiny,
        "max_steps=3",
        "model.num_key_value_heads=1",
        "model.initializer_range=0.5",
        f"model.max_position_embeddings={CONTEXT}",
        "lr=0.05",
        f"run_dir={folder}/run",
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["sltrain-train", *arguments])
        assert train(arguments) == 0
    for format in ("dense", "compressed"):
        assert export.run_command([f"{folder}/run", "--output", f"{folder}/{format}", "--format", format]) == 0
    return {name: folder / name for name in ("run", "dense", "compressed")}


@pytest.fixture(scope="module")
def theirs(
    model: dict[str, Path],
) -> tuple[transformers.PreTrainedTokenizerBase, transformers.LlamaForCausalLM]:
    """What transformers makes of the export."""
    dense = model["dense"]
    return transformers.AutoTokenizer.from_pretrained(dense), transformers.AutoModelForCausalLM.from_pretrained(dense)


@pytest.fixture
def sltrain_generate(capfd: pytest.CaptureFixture[str]) -> Run:
    """The command in this process: arguments -> (exit code, stdout, stderr)."""

    def run(*arguments: object) -> tuple[int, str, str]:
        capfd.readouterr()
        code = command.run_command([str(argument) for argument in arguments])
        return int(code), *capfd.readouterr()

    return run


def greedy(theirs: tuple, prompt: str, count: int) -> tuple[list[int], str]:
    """Ids and text of transformers."""
    tokenizer, model = theirs
    inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=False, return_token_type_ids=False)
    ids = model.generate(**inputs, max_new_tokens=count)[0]
    return ids.tolist(), tokenizer.decode(ids, skip_special_tokens=True)


def test_greedy_text_is_transformers(model: dict[str, Path], theirs: tuple, sltrain_generate: Run) -> None:
    texts: set[str] = set()
    written: set[int] = set()
    for prompt in PROMPTS:
        ids, text = greedy(theirs, prompt, 20)
        code, out, err = sltrain_generate(model["run"], "--prompt", prompt, "--max-new-tokens", 20)
        assert code == 0 and out == text + "\n", err
        new = ids[len(theirs[0](prompt, add_special_tokens=False).input_ids) :]
        assert len(set(new)) >= 4, "weights that repeat one token prove nothing"
        written |= set(new)
        texts.add(text[len(prompt) :])
    assert len(texts) >= len(PROMPTS) - 1 and len(written) > 30


@pytest.mark.parametrize("flags", [[], ["--temperature", 1.3, "--top-k", 200, "--top-p", 0.98, "--seed", 5]])
def test_a_run_and_its_exports_write_the_same(flags: list, model: dict[str, Path], sltrain_generate: Run) -> None:
    outputs = [sltrain_generate(path, "--prompt", "class A", "--max-new-tokens", 30, *flags) for path in model.values()]
    assert [code for code, _, _ in outputs] == [0, 0, 0]
    assert len({out for _, out, _ in outputs}) == 1


def test_100_tokens_by_default_and_the_context_ends_it(
    model: dict[str, Path], theirs: tuple, sltrain_generate: Run
) -> None:
    prompt = "import os"
    length = len(theirs[0](prompt, add_special_tokens=False).input_ids)
    ids, text = greedy(theirs, prompt, CONTEXT - length)
    assert len(ids) == CONTEXT
    code, out, err = sltrain_generate(model["run"], "--prompt", prompt)
    assert code == 0 and out == text + "\n"
    assert f"context of {CONTEXT} tokens is full" in err and "trained on rows of 32 tokens" in err
    code, out, err = sltrain_generate(model["run"], "--prompt", prompt, "--max-new-tokens", CONTEXT - length)
    assert code == 0 and out == text + "\n" and "is full" not in err
    _, _, err = sltrain_generate(model["run"], "--prompt", prompt, "--max-new-tokens", 32 - length)
    assert err == ""
    _, _, err = sltrain_generate(model["run"], "--prompt", prompt, "--max-new-tokens", 33 - length)
    assert len(err.splitlines()) == 1 and "rows of 32 tokens" in err


def test_a_text_that_ends_at_once_is_told(
    model: dict[str, Path], sltrain_generate: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sltrain.api.generate.generate", lambda model, ids, room, eos_id, sampling: iter([eos_id]))
    code, out, err = sltrain_generate(model["run"], "--prompt", "import os", "--max-new-tokens", 5)
    assert (code, out) == (0, "import os\n") and err.strip().startswith("note: the model ends the text here; another")


def test_the_longest_prompt(model: dict[str, Path], theirs: tuple, sltrain_generate: Run) -> None:
    def count(text: str) -> int:
        return len(theirs[0](text, add_special_tokens=False).input_ids)

    texts = ["".join(chr(33 + i * i % 90) for i in range(length)) for length in range(200)]
    longest = next(text for text in texts if count(text) == CONTEXT - 1)
    code, out, _ = sltrain_generate(model["run"], "--prompt", longest)
    assert code == 0 and out == greedy(theirs, longest, 1)[1] + "\n"
    longer = next(text for text in texts if count(text) == CONTEXT)
    code, out, err = sltrain_generate(model["run"], "--prompt", longer)
    assert_refused(code, out, err, f"prompt has {CONTEXT} tokens", f"at most {CONTEXT}")


def test_pieces_come_one_by_one_and_make_the_text(model: dict[str, Path], theirs: tuple) -> None:
    for prompt in PROMPTS:
        pieces = list(continue_text(model["run"], prompt, max_new_tokens=20))
        ids, text = greedy(theirs, prompt, 20)
        assert "".join(pieces) == text and len(pieces) == len(ids) + 1
        assert sum(piece != "" for piece in pieces) > len(ids) / 2


def test_a_last_character_that_is_not_whole(model: dict[str, Path], theirs: tuple) -> None:
    """Its bytes are shown as transformers shows them, though the stream was still waiting for the rest."""
    tokenizer, _ = theirs
    found = 0
    for prompt in PROMPTS:
        ids, _ = greedy(theirs, prompt, 20)
        length = len(tokenizer(prompt, add_special_tokens=False).input_ids)
        for count in range(1, 21):
            text = tokenizer.decode(ids[: length + count], skip_special_tokens=True)
            if text.endswith("\ufffd") and found < 4:
                found += 1
                pieces = continue_text(model["dense"], prompt, max_new_tokens=count)
                assert "".join(pieces) == text
    assert found >= 2


def test_end_of_text_ends_it(model: dict[str, Path], theirs: tuple, tmp_path: Path, sltrain_generate: Run) -> None:
    """Of an export whose end-of-text token is one that it writes: the eleventh."""
    tokenizer, _ = theirs
    prompt = "def main(self):"
    ids, _ = greedy(theirs, prompt, 20)
    length = len(tokenizer(prompt, add_special_tokens=False).input_ids)
    eos = ids[length + 10]
    assert eos not in ids[:length] and tokenizer.decode([eos]).isprintable()
    text = (model["dense"] / "tokenizer.json").read_text()
    changed = tmp_path / "model"
    changed.mkdir()
    for file in model["dense"].iterdir():
        (changed / file.name).write_bytes(file.read_bytes())
    piece = tokenizer.convert_ids_to_tokens(eos)
    # </s> and this piece change places
    spec = json.loads(text)
    vocabulary = spec["model"]["vocab"]
    vocabulary["</s>"], vocabulary[piece] = eos, 1
    for token in spec["added_tokens"]:
        if token["content"] == "</s>":
            token["id"] = eos
    spec["added_tokens"].sort(key=lambda token: token["id"])
    (changed / "tokenizer.json").write_text(json.dumps(spec))
    code, out, err = sltrain_generate(changed, "--prompt", prompt, "--max-new-tokens", 20)
    end = ids.index(eos, length)
    assert code == 0 and out == tokenizer.decode(ids[:end], skip_special_tokens=True) + "\n"
    _, out, err = sltrain_generate(changed, "--prompt", prompt, "--max-new-tokens", 5000)
    assert out == tokenizer.decode(ids[:end], skip_special_tokens=True) + "\n" and "is full" not in err


def test_seeds(model: dict[str, Path], sltrain_generate: Run) -> None:
    def text(*flags: object) -> str:
        code, out, err = sltrain_generate(model["dense"], "--prompt", "a", "--max-new-tokens", 20, *flags)
        assert code == 0, err
        return out

    chance = ["--temperature", 1.5]
    assert text(*chance) == text(*chance, "--seed", 0)
    assert len({text(*chance, "--seed", seed) for seed in range(5)}) == 5
    assert text("--seed", 1) == text("--seed", 2) == text()
    assert text(*chance, "--top-k", 1, "--seed", 3) == text() == text(*chance, "--top-p", 1e-9, "--seed", 3)


@pytest.mark.parametrize("temperature", ["1e-39", "1e-50"])
def test_a_temperature_near_0(temperature: str, model: dict[str, Path], sltrain_generate: Run) -> None:
    flags = ["--prompt", "a", "--max-new-tokens", 10]
    code, out, err = sltrain_generate(model["run"], *flags, "--temperature", temperature)
    assert code == 0 and out == sltrain_generate(model["run"], *flags)[1], err


def test_a_reader_that_leaves_early_ends_it(
    model: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """As `| head -c 5` does."""
    reading, writing = os.pipe()
    os.close(reading)
    monkeypatch.setattr(errors.signal, "signal", lambda *args: None)
    monkeypatch.setattr("sys.argv", ["sltrain-generate", str(model["dense"]), "--prompt", "a"])
    monkeypatch.setattr("sys.stderr", sys.stderr)  # both are replaced
    monkeypatch.setattr("sys.stdout", os.fdopen(writing, "w"))
    with pytest.raises(SystemExit) as ended:
        command.main()
    assert ended.value.code == 0 and "rror" not in capfd.readouterr().err


# ---- what is refused


def assert_refused(code: int, out: str, err: str, *words: str) -> None:
    assert code == 2 and out == "", err
    assert err.startswith("error: ") and len(err.strip().splitlines()) == 1 and "Traceback" not in err, err
    for word in words:
        assert word in err, err


BAD_FLAGS = {
    "no prompt": ([], ["--prompt"]),
    "empty prompt": (["--prompt", ""], ["prompt"]),
    "long prompt": (["--prompt", "word " * 100], ["prompt has", f"at most {CONTEXT}", "shorten"]),
    "unknown flag": (["--prompt", "a", "--topk", "3"], ["--topk", "--help"]),
    "abbreviated flag": (["--prompt", "a", "--temp", "1"], ["--temp"]),
    "temperature below 0": (["--prompt", "a", "--temperature=-1"], ["temperature -1", "at least 0"]),
    "temperature nan": (["--prompt", "a", "--temperature", "nan"], ["temperature nan"]),
    "temperature inf": (["--prompt", "a", "--temperature", "inf"], ["temperature inf"]),
    "temperature no number": (["--prompt", "a", "--temperature", "hot"], ["--temperature", "hot"]),
    "top-k 0": (["--prompt", "a", "--temperature", "1", "--top-k", "0"], ["top-k 0", "at least 1"]),
    "top-k no whole number": (["--prompt", "a", "--temperature", "1", "--top-k", "1.5"], ["--top-k", "1.5"]),
    "top-p 0": (["--prompt", "a", "--temperature", "1", "--top-p", "0"], ["top-p 0"]),
    "top-p above 1": (["--prompt", "a", "--temperature", "1", "--top-p", "1.5"], ["top-p 1.5"]),
    "top-k without temperature": (["--prompt", "a", "--top-k", "3"], ["temperature"]),
    "no new tokens": (["--prompt", "a", "--max-new-tokens", "0"], ["max-new-tokens 0"]),
    "unknown step": (["--prompt", "a", "--step", "2"], ["step 2", "there are: 3"]),
    "unknown device": (["--prompt", "a", "--device", "tpu"], ["--device", "tpu"]),
}


@pytest.mark.parametrize("case", BAD_FLAGS)
def test_bad_flags(case: str, model: dict[str, Path], sltrain_generate: Run) -> None:
    flags, words = BAD_FLAGS[case]
    assert_refused(*sltrain_generate(model["run"], *flags), *words)


@pytest.mark.parametrize("format", ["dense", "compressed"])
def test_an_export_has_one_step(format: str, model: dict[str, Path], sltrain_generate: Run) -> None:
    result = sltrain_generate(model[format], "--prompt", "a", "--step", 3)
    assert_refused(*result, str(model[format]), "step")


def test_no_cuda(model: dict[str, Path], sltrain_generate: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, _, err = sltrain_generate(model["run"], "--prompt", "a", "--device", "cuda")
    assert code == 2 and "device=cpu" in err


@pytest.mark.parametrize("seed", [str(2**64), "-99999999999999999999"])
def test_a_seed_that_torch_does_not_take_is_named(seed: str, model: dict[str, Path], sltrain_generate: Run) -> None:
    result = sltrain_generate(model["run"], "--prompt", "a", "--temperature", 1, f"--seed={seed}")
    assert_refused(*result, "seed")


def test_a_prompt_that_is_no_text_is_named(model: dict[str, Path], sltrain_generate: Run) -> None:
    """What Python makes of a byte on the command line that is no UTF-8."""
    assert_refused(*sltrain_generate(model["run"], "--prompt", "caf\udcff"), "prompt")

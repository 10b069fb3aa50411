"""What a user is told of text and tokenizer that do not fit each other."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizers


@pytest.mark.parametrize(("unknown", "is_said"), [(0, False), (3, True)])
def test_text_that_the_tokenizer_cannot_write_is_named(
    unknown: int, is_said: bool, tmp_path: Path, tiny: list[str], sltrain_train: Callable[..., tuple[int, str, str]]
) -> None:
    """The run would learn to predict <unk>, at a perplexity that looks good."""
    vocabulary = {"<pad>": 0, "</s>": 1, "<unk>": 2, **{f"word{i}": 3 + i for i in range(40)}}
    raw = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    raw.save(str(tmp_path / "tokenizer.json"))
    texts = [" ".join(f"word{(i * j + i // 40) % 40}" for j in range(17)) + " \u6f22" * unknown for i in range(200)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    keys = [
        "max_steps=2",
        f"path={tmp_path}/a.jsonl",
        f"tokenizer={tmp_path}/tokenizer.json",
        f"run_dir={tmp_path}/run",
    ]
    code, out, err = sltrain_train(*(key for key in tiny if key.split("=")[0] not in ("path", "tokenizer")), *keys)
    assert code == 0, err
    # 17 words, 3 unknown ones and </s>
    assert ("14.3% of the tokens of the validation text are <unk>" in out + err) is is_said

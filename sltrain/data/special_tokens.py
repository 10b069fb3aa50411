"""Control tokens: which of a tokenizer's tokens end, pad and begin texts, and what happens where a text spells one.

A text that holds `</s>` or `<|endoftext|>` written out speaks about tokenizers, or is damaged; it does not end there.
So control tokens get names that no text holds before the tokenizer is built: they keep their ids, and what is written
out becomes ordinary pieces. The library's own switch, `encode_special_tokens`, is not enough: it concerns added tokens
alone, and a Unigram or word-level model has `</s>` in its own vocabulary too.

Which token does what is said by tokenizer_config.json beside the file (transformers' keys), or known from common names.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

PAD_NAMES = ("<pad>", "[PAD]", "<|pad|>", "<|padding|>", "<|finetune_right_pad_id|>")
EOS_NAMES = ("</s>", "<|endoftext|>", "<|end_of_text|>", "<eos>", "[EOS]", "<|im_end|>")
UNK_NAMES = ("<unk>", "[UNK]", "<|unk|>")
CONFIG_FILE = "tokenizer_config.json"
NAMED = ("eos_token", "pad_token", "unk_token")  # its keys that are read
AS_TEXT = "split_special_tokens"  # transformers' key for: control tokens written out in a text are plain text

_BEFORE, _AFTER = "\ufdd0", "\ufdd1"  # around hidden names; Unicode keeps both out of texts


def read_settings(folder: Path) -> dict[str, Any]:
    """The content of a folder's tokenizer_config.json; empty without one. Raises ValueError if it is damaged."""
    path = folder / CONFIG_FILE
    try:
        settings = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {' '.join(str(error).split())}; restore it, or remove it") from None
    if not isinstance(settings, dict):
        raise ValueError(f"{path} holds no JSON object; restore it, or remove it")
    return settings


def named_token(settings: Mapping[str, Any], key: str) -> str | None:
    """The token that tokenizer_config.json names under `eos_token` or another key: a string, or an object with it."""
    token = settings.get(key)
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else None


def control_tokens(spec: Mapping[str, Any], *also: str | None) -> set[str]:
    """The control tokens of a tokenizer.json: its special tokens, and those of its vocabulary that have a common name
    or are in `also`."""
    special = {token["content"] for token in spec.get("added_tokens", []) if token.get("special")}
    vocabulary = spec["model"].get("vocab", {})
    pieces = set(vocabulary) if isinstance(vocabulary, dict) else {piece for piece, _ in vocabulary}
    pieces |= {token["content"] for token in spec.get("added_tokens", [])}
    return special | pieces & {*PAD_NAMES, *EOS_NAMES, *UNK_NAMES, *also}


def hide(spec: dict[str, Any], tokens: set[str]) -> dict[str, Any]:
    """The tokenizer.json with other names for `tokens`, which no text can spell; ids are unchanged."""

    def name(token: str) -> str:
        return f"{_BEFORE}{token}{_AFTER}" if token in tokens else token

    model = dict(spec["model"])
    vocabulary = model.get("vocab", {})
    if isinstance(vocabulary, dict):
        model["vocab"] = {name(token): i for token, i in vocabulary.items()}
    else:
        model["vocab"] = [[name(token), score] for token, score in vocabulary]
    if model.get("unk_token"):
        model["unk_token"] = name(model["unk_token"])
    if model.get("merges"):
        pairs = ((merge, merge.split(" ", 1) if isinstance(merge, str) else merge) for merge in model["merges"])
        model["merges"] = [merge for merge, pair in pairs if not tokens & {*pair, "".join(pair)}]
    added = [
        {**token, "content": name(token["content"]), "normalized": False} if token["content"] in tokens else token
        for token in spec.get("added_tokens", [])
    ]
    return {**spec, "model": model, "added_tokens": added}


def shown(token: str) -> str:
    """The name of a token that `hide` may have given another."""
    return token.removeprefix(_BEFORE).removesuffix(_AFTER)

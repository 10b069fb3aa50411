"""Control tokens: which of a tokenizer's tokens end, pad and begin texts, and what happens where a text spells one.

A text that holds `</s>` or `<|endoftext|>` written out speaks about tokenizers, or is damaged; it does not end there.
So control tokens get names that no text holds before the tokenizer is built: they keep their ids, and what is written
out becomes ordinary pieces. The library's own switch, `encode_special_tokens`, is not enough: it concerns added tokens
alone, and a Unigram or word-level model has `</s>` in its own vocabulary too.

Which token does what is said by tokenizer_config.json beside the file (transformers' keys), or known from common names.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Roles:
    """The ids of a tokenizer that have a role in texts, all below `vocab_size`."""

    vocab_size: int  # ids of the model
    num_ids: int  # ids of the tokenizer's file; those from vocab_size on are sentinels, which become unk
    eos_id: int  # ends texts
    pad_id: int  # eos where there is none of its own
    unk_id: int | None
    eos_is_named: bool  # eos is not the one that the common names give


def choose_roles(
    ids: Mapping[str, int],
    special: set[int],
    name: str,
    vocab_size: int | None,
    settings: Mapping[str, Any],
    eos: str | None,
) -> Roles:
    """Which ids end and pad texts and stand for the unknown: those of the tokens that `eos` or tokenizer_config.json
    names, or else of the first common name that exists.

    Args:
        ids: the id of every token.
        special: the ids of control tokens, which the model may lack.
        name: what messages call the tokenizer.
        vocab_size: ids of the model; None: as many as the tokenizer has.
        settings: the content of tokenizer_config.json.

    Raises ValueError for a tokenizer that does not fit the model, or has nothing to end texts with.
    """
    num_ids = max(ids.values(), default=-1) + 1
    num_ordinary = max((i for i in ids.values() if i not in special), default=-1) + 1
    num_used = num_ids if vocab_size is None else vocab_size
    if num_ordinary > num_used:
        raise ValueError(
            f"tokenizer {name} has ids up to {num_ordinary - 1} but the model only {num_used}; "
            f"set model.vocab_size={num_ordinary} or use another tokenizer"
        )

    def find(names: tuple[str, ...], key: str) -> int | None:
        named = named_token(settings, key)
        names = names if named is None else (named, *names)
        return next((ids[token] for token in names if ids.get(token, num_used) < num_used), None)

    eos_id = find(EOS_NAMES, "eos_token") if eos is None else ids.get(eos)
    if eos is not None and (eos_id is None or eos_id >= num_used):
        raise ValueError(f"tokenizer_eos={eos}: tokenizer {name} has no such token among its {num_used} ids")
    if eos_id is None:
        raise ValueError(
            f"tokenizer {name} has no end-of-text token ({' '.join(EOS_NAMES)}), and nothing would separate "
            "documents; name one of its tokens: tokenizer_eos=TOKEN"
        )
    pad_id, unk_id = find(PAD_NAMES, "pad_token"), find(UNK_NAMES, "unk_token")
    if num_ids > num_used and unk_id is None:
        raise ValueError(
            f"tokenizer {name} has {num_ids} ids, the model {num_used}, and no <unk> for the others; "
            f"set model.vocab_size={num_ids}"
        )
    usual = next((ids[token] for token in EOS_NAMES if token in ids), None)
    return Roles(num_used, num_ids, eos_id, eos_id if pad_id is None else pad_id, unk_id, eos_id != usual)


def shown(token: str) -> str:
    """The name of a token that `hide` may have given another."""
    return token.removeprefix(_BEFORE).removesuffix(_AFTER)

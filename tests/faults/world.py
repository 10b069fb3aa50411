"""What the runs of a campaign train on: a text whose documents can be told apart, a tokenizer for it, and recipes.

Every document begins with a word of its own, d000 to d079, which is one token: the ids of a row say what it holds.
80 documents and 8 rows an update make an epoch of 10 updates (padding=truncate_pad: a row is a document).
"""

import gzip
import json
import random
from pathlib import Path

from .schedule import CHECKPOINT_EVERY, KEEP_LAST, MAX_STEPS
from .starts import HANG_TIMEOUT

NUM_DOCUMENTS, NUM_WORDS = 80, 120
SPECIAL = ["<pad>", "</s>", "<unk>"]
FIRST_DOCUMENT = len(SPECIAL)  # the token of d000
GLOBAL_BATCH = 8
EPOCH = NUM_DOCUMENTS // GLOBAL_BATCH  # updates, with a document a row

SHARDED = ["parallel=fsdp", "parallel.checkpoint=sharded"]  # every process writes a file of a checkpoint
RECIPES: dict[str, list[str]] = {
    "sltrain": ["method=sltrain", "padding=truncate_pad"],
    "dense": ["method=full", "padding=pack", "ema=0.9", "grad_clip=0.5"],
    "relora": [
        "method=relora",
        "method.merge_every=7",
        "method.warm_start=0.125",
        "method.merge_warmup=2",
        "padding=best_fit",
    ],
    "background": ["method=sltrain", "padding=truncate_pad", "checkpoint_async=true"],
    "fsdp": ["method=sltrain", "padding=truncate_pad", "parallel=fsdp"],
    "sharded": ["method=sltrain", "padding=truncate_pad", *SHARDED],
    "sharded_background": ["method=full", "padding=pack", "ema=0.9", "checkpoint_async=true", *SHARDED],
    "per_layer": ["method=sltrain", "padding=truncate_pad", "per_layer_update=true"],
}


def make_world(folder: Path) -> list[str]:
    """Write the text and its tokenizer into the folder, and return the overrides that all runs share."""
    folder.mkdir(parents=True, exist_ok=True)
    documents = _documents()
    lines = [json.dumps({"text": text}) + "\n" for text in documents]
    half = len(lines) // 2
    (folder / "train.0.jsonl").write_text("".join(lines[:half]))
    (folder / "train.1.jsonl.gz").write_bytes(gzip.compress("".join(lines[half:]).encode(), mtime=0))
    (folder / "validation.jsonl").write_text("".join(json.dumps({"text": text[5:]}) + "\n" for text in documents[:12]))
    _write_tokenizer(folder / "tokenizer.json")
    return [
        "model=llama_tiny",
        "model.hidden_size=32",
        "model.intermediate_size=64",
        "model.num_hidden_layers=2",
        "model.num_attention_heads=2",
        "rank=8",
        "data=local",
        f"path={folder}/train.*",
        f"validation_path={folder}/validation.jsonl",
        f"tokenizer={folder}/tokenizer.json",
        "data.shuffle_block=4",
        "seq_len=32",
        f"global_batch_size={GLOBAL_BATCH}",
        "micro_batch_size=2",
        f"max_steps={MAX_STEPS}",
        "warmup_steps=4",
        "log_every=1",
        "eval_every=10",
        "eval_tokens=300",
        f"checkpoint_every={CHECKPOINT_EVERY}",
        f"keep_last={KEEP_LAST}",
        f"hang_timeout={HANG_TIMEOUT}",
        "device=cpu",
    ]


def _documents() -> list[str]:
    rng = random.Random(0)
    words = [f"w{i:03d}" for i in range(NUM_WORDS)]
    return [f"d{i:03d} {' '.join(rng.choices(words, k=rng.randint(20, 200)))}" for i in range(NUM_DOCUMENTS)]


def _write_tokenizer(path: Path) -> None:
    """A vocabulary of whole words."""
    import tokenizers

    words = [*SPECIAL, *(f"d{i:03d}" for i in range(NUM_DOCUMENTS)), *(f"w{i:03d}" for i in range(NUM_WORDS))]
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.save(str(path))

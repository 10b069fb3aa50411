"""What `tokenizer=` names -> a Tokenizer (tokenizer.py): a tokenizer.json or the folder that holds it, a repository on
the Hugging Face Hub, or `bpe:SIZE`, trained on the corpus (bpe.py).

A tokenizer_config.json beside the file says which of its tokens have a role. Of a repository both files are downloaded,
once: what is in the Hub's cache is not asked for again.
"""

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from sltrain.data.bpe import trained_bpe
from sltrain.data.documents import DataError, NetworkError, Source
from sltrain.data.download import hub_error, probe
from sltrain.data.special_tokens import AS_TEXT, CONFIG_FILE, read_settings
from sltrain.data.tokenizer import Tokenizer

HUB_ALIASES = {"t5": "google-t5", "gpt2": "openai-community"}  # owners of names that were once written without one


def load_tokenizer(
    spec: str,
    vocab_size: int | None = None,
    source: Source | None = None,
    cache_dir: str | Path | None = None,
    *,
    holdout_every: int = 0,
    eos: str | None = None,
    on_bad_data: str = "skip",
    begun_with: dict[str, Any] | None = None,
) -> Tokenizer:
    """The tokenizer that `spec` names: a tokenizer.json or its folder, `bpe:SIZE`, or a name on the Hugging Face Hub.

    A tokenizer_config.json beside the file, and `eos`, say which tokens end and pad texts. `begun_with` is the content
    of that file in the folder of a run that goes on, which then counts instead; it is empty for a run of an earlier
    version. `bpe:SIZE` is trained on the documents of `source` that are not held out, and cached in `cache_dir`: call
    this on one rank first and on the others afterwards. Raises ValueError for a tokenizer that cannot be used,
    NetworkError if the Hub cannot be reached.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # otherwise a fork switches it off
    if spec.startswith("bpe:"):
        if source is None or cache_dir is None:
            raise ValueError(f"tokenizer={spec} needs a source to train on and a cache_dir")
        text, settings = trained_bpe(spec, source, Path(cache_dir), holdout_every), begun_with or {}
    else:
        path = _find_file(spec)
        settings = read_settings(path.parent) if begun_with is None else begun_with
        try:
            # Line ends unchanged: the run keeps the file as it is, but for the mark that some editors begin it with.
            text = path.read_bytes().decode("utf-8-sig")
        except UnicodeDecodeError:
            raise ValueError(f"tokenizer={spec} is not a tokenizer.json: {path} is not UTF-8 text") from None
        except OSError as error:
            raise ValueError(f"tokenizer={spec} cannot be read: {path}: {error.strerror}") from None
    tokenizer = Tokenizer(
        text,
        spec,
        vocab_size,
        settings=settings,
        eos=eos,
        controls_as_text=begun_with is None or bool(begun_with.get(AS_TEXT, False)),
        on_bad_data=on_bad_data,
    )
    if begun_with is None:
        tokenizer.probe()
    return tokenizer


def _find_file(spec: str) -> Path:
    """The tokenizer.json that `spec` names, on this machine or downloaded. It may not exist."""
    path = Path(spec).expanduser()
    if path.is_dir():
        path = path / "tokenizer.json"
    _refuse_other_formats(spec, path)
    looks_like_path = spec.endswith(".json") or spec.startswith((".", "~", "/")) or spec.count("/") > 1
    return path if path.exists() or looks_like_path else _fetch_from_hub(spec)


def _refuse_other_formats(spec: str, path: Path) -> None:
    """Raise ValueError for a SentencePiece model, or a folder with one or with vocab.json and no tokenizer.json."""
    others = [path] if path.suffix in (".model", ".vocab") else []
    if path.name == "tokenizer.json" and not path.exists():
        others = [other for pattern in ("*.model", "vocab.json") for other in path.parent.glob(pattern)]
    if others and others[0].exists():
        folder = others[0].parent
        raise ValueError(
            f"tokenizer={spec}: {others[0]} is not a tokenizer.json; convert it once, where transformers and "
            f'sentencepiece are installed: python -c "from transformers import AutoTokenizer as A; '
            f"A.from_pretrained('{folder}').save_pretrained('NEW')\", then use tokenizer=NEW/tokenizer.json"
        )


def _fetch_from_hub(spec: str) -> Path:
    """The tokenizer.json of a repository on the Hub, downloaded with its tokenizer_config.json unless it is in the
    Hub's cache on this machine."""
    from huggingface_hub import hf_hub_download, try_to_load_from_cache  # 0.3 s, for this case only
    from huggingface_hub.errors import EntryNotFoundError

    owner = HUB_ALIASES.get(spec.split("-")[0])
    repo = spec if "/" in spec or owner is None else f"{owner}/{spec}"
    try:
        cached = try_to_load_from_cache(repo, "tokenizer.json")
        if isinstance(cached, str):
            return Path(cached)
        probe(repo, "tokenizer.json")  # fails within seconds; hf_hub_download retries for minutes
        with suppress(EntryNotFoundError):  # a repository may lack it
            hf_hub_download(repo, CONFIG_FILE)
        return Path(hf_hub_download(repo, "tokenizer.json"))  # last: where it is, the other was asked for
    except Exception as error:  # the HTTP library's exception classes change between releases
        detail = hub_error(error, f"{repo}/tokenizer.json")
        if isinstance(detail, DataError):
            raise ValueError(
                f"tokenizer={spec} is neither a file here nor a repository with a tokenizer.json on the Hugging Face "
                f"Hub ({detail})"
            ) from None
        raise NetworkError(
            f"tokenizer={spec}: {detail}; check the connection, name a tokenizer.json, or use tokenizer=bpe:8192"
        ) from None

"""Opening a data set with the `datasets` library: a repository of the Hub, a folder of data files, or a folder that
`save_to_disk` wrote.

`datasets` knows the formats, the configurations and splits, the login and the caches. What it opens is pinned here: a
repository to a commit, files on this machine to their names and sizes, so that a run reads the same records after
every restart.
"""

import glob
import logging
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from sltrain.data.compression import split_ending
from sltrain.data.documents import DataError, NetworkError
from sltrain.data.download import hub_error, is_of_network
from sltrain.data.hf_json import forget_features, keep_column
from sltrain.data.records import FORMATS

logger = logging.getLogger(__name__)

DESCRIPTIONS = {"dataset_infos.json", "dataset_info.json", "state.json"}  # written by datasets beside data files
MANY_FILES = 100  # Parquet files are not cut into row groups from here on: that would take a request a file


@dataclass
class Opened:
    """One split of a data set, with the column that is read."""

    dataset: Any  # datasets.IterableDataset, or datasets.Dataset if all records are on this machine
    column: str
    identity: str  # words that name the exact records: equal identities, same records in the same order
    sizes: list[int]  # of its shards, in any common unit
    is_stream: bool  # records are read from the beginning of a shard, not at any position
    commit: str | None  # of a repository on the Hub; None: a folder on this machine


@dataclass
class Choice:
    """What to open."""

    repo: str  # OWNER/NAME, or a folder
    config: str | None
    split: str
    commit: str | None  # of a repository; None: a folder
    files: Any  # None, or globs inside the repository
    column: str
    streaming: bool  # False: convert everything to Arrow files in the cache of `datasets` first


def open_dataset(choice: Choice) -> Opened:
    """Open a split. Raises DataError for what does not exist or holds no text, NetworkError if the Hub cannot be
    reached."""
    folder = os.path.expanduser(choice.repo)
    try:
        if choice.commit is not None:
            return _open_files(choice, choice.repo, choice.commit)
        if any(os.path.exists(os.path.join(folder, name)) for name in ("dataset_dict.json", "state.json")):
            return _open_saved(choice, folder)
        return _open_files(choice, folder, None)
    except (DataError, NetworkError):
        raise
    except Exception as error:
        raise _opening_error(error, choice.repo, choice.commit is None) from error


def commit_of(repo: str, revision: str | None) -> str | None:
    """The commit that a branch or tag of a repository stands for now; None for a folder. Raises DataError or
    NetworkError."""
    if os.path.isdir(os.path.expanduser(repo)):
        return None
    if revision is not None and re.fullmatch("[0-9a-f]{40}", revision):
        return revision
    from huggingface_hub import HfApi

    try:
        return str(HfApi().dataset_info(repo, revision=revision, timeout=10).sha)
    except Exception as error:
        raise hub_error(error, repo) from None


def _open_files(choice: Choice, repo: str, commit: str | None) -> Opened:
    """Data files of a repository at a commit, or of a folder."""
    from datasets import Features, Value, load_dataset_builder
    from datasets.packaged_modules.json.json import Json

    builder = load_dataset_builder(repo, choice.config, data_files=choice.files, revision=commit)
    if choice.config is not None and choice.config not in builder.builder_configs:
        raise DataError(f"{repo} has no configurations to choose from; leave data.config out")
    files = {str(name): list(map(str, paths)) for name, paths in (builder.config.data_files or {}).items()}
    if commit is None and choice.files is None:
        _check_folder(repo, files)
    _check_split(choice, files)
    name = f"{builder.config.name}, {choice.split}"
    if commit is None:
        sizes = [os.path.getsize(path) for path in files[choice.split]]
        named = [os.path.relpath(path, repo) for path in files[choice.split]]
        name = f"{_digest(list(zip(named, sizes, strict=True)))}, {name}"
    else:
        sizes = []
        name = f"{repo}@{commit}, {_digest(files[choice.split])}, {name}"
    if not choice.streaming:
        builder.download_and_prepare()
        return _opened_table(choice, builder.as_dataset(choice.split), name, commit)
    dataset = builder.as_streaming_dataset(choice.split)
    is_json = isinstance(builder, Json)
    _check_column(choice, dataset, may_be_mixed=is_json)
    if is_json:
        keep_column(builder, choice.column)
        builder.info.features = Features({choice.column: Value("string")})
        dataset = builder.as_streaming_dataset(choice.split)
        forget_features(builder)
    elif hasattr(builder.config, "columns"):  # Parquet: the other columns need not be fetched
        builder.config.columns = [choice.column]
        builder.info.features = Features({choice.column: dataset.features[choice.column]})
        dataset = builder.as_streaming_dataset(choice.split)
    if dataset.num_shards < MANY_FILES:
        dataset = dataset.reshard()
    # Row groups of Parquet files, and the many files of large data sets, are about equal; a few files need not be.
    shards = sizes if len(sizes) == dataset.num_shards else [1] * dataset.num_shards
    return Opened(dataset, choice.column, f"{name}, {len(shards)} shards", shards, is_stream=True, commit=commit)


def _open_saved(choice: Choice, folder: str) -> Opened:
    """A folder that `save_to_disk` wrote, of one data set or of one for every split."""
    from datasets import load_from_disk

    if os.path.exists(os.path.join(folder, "dataset_dict.json")):
        _check_split(choice, sorted(path.parent.name for path in Path(folder).glob("*/state.json")))
        folder = os.path.join(folder, choice.split)
        dataset = load_from_disk(folder)
    else:
        dataset = load_from_disk(folder)
        _check_split(choice, [str(dataset.split or "train")])
    paths = [*(file["filename"] for file in dataset.cache_files), os.path.join(folder, "state.json")]
    sizes = [(os.path.relpath(path, folder), os.path.getsize(path)) for path in paths]
    return _opened_table(choice, dataset, _digest(sizes), None)


def _opened_table(choice: Choice, dataset: Any, name: str, commit: str | None) -> Opened:
    """Records that are on this machine, as one shard."""
    _check_column(choice, dataset)
    return Opened(dataset, choice.column, f"{name}, {len(dataset)} records", [1], is_stream=False, commit=commit)


def _check_split(choice: Choice, splits: Iterable[str]) -> None:
    if choice.split not in splits:
        raise DataError(f"{choice.repo} has no split {choice.split!r} but {', '.join(splits)}; choose one of them")


def _check_folder(folder: str, files: dict[str, list[str]]) -> None:
    """Raise DataError for a link to nothing; tell which data files are in none of the splits `files`: `datasets` takes
    the commonest format alone, and beside files called `train...` or `test...` no others."""
    read, left_out = {os.path.realpath(path) for paths in files.values() for path in paths}, []
    for path in _data_files(folder):
        if not os.path.exists(path):
            raise DataError(
                f"{path} is a link to {os.readlink(path)}, which does not exist; restore it, remove the link, or name "
                "what to read with data.files=GLOB"
            )
        if os.path.realpath(path) not in read and os.path.getsize(path):
            left_out.append(os.path.relpath(path, folder))
    if left_out:
        logger.warning(
            f"{folder}: datasets leaves out {', '.join(left_out[:3])}{' and others' if len(left_out) > 3 else ''}: it "
            f"takes one format, and splits ({', '.join(files)}) by names; name what to read with data.files=GLOB"
        )


def _data_files(folder: str) -> Iterator[str]:
    """The files of a folder whose names say that they hold text, and links; hidden ones not, as in datasets."""
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith((".", "__")))
        for name in sorted(names):
            path = os.path.join(parent, name)
            is_data = split_ending(name)[0].endswith((*FORMATS, ".tsv", ".ndjson", ".arrow"))
            if not name.startswith((".", "__")) and is_data and name not in DESCRIPTIONS:
                yield path


def _check_column(choice: Choice, dataset: Any, may_be_mixed: bool = False) -> None:
    """Raise DataError unless the column is there and holds strings; `may_be_mixed`: among other JSON values."""
    columns = dataset.features
    if columns is None:  # datasets knows them only when it has read
        columns = next(iter(dataset), {})
    if choice.column not in columns:
        raise DataError(
            f"{choice.repo} has no column {choice.column!r} but {', '.join(columns)}; set data.text_key to one of them"
        )
    kind = columns[choice.column]
    is_text = kind is None or isinstance(kind, str) or getattr(kind, "dtype", None) in ("string", "large_string")
    if not (is_text or (may_be_mixed and type(kind).__name__ == "Json")):
        raise DataError(
            f"{choice.repo}: column {choice.column!r} holds {kind}, not strings; set data.text_key to one of"
            f" {', '.join(columns)}"
        )


def _digest(content: object) -> str:
    return sha256(repr(content).encode()).hexdigest()[:32]


def _opening_error(error: Exception, repo: str, is_local: bool) -> DataError | NetworkError:
    """What an exception of `datasets` means, in one line."""
    from datasets.exceptions import DatasetGenerationError, DatasetsError

    if isinstance(error, DatasetGenerationError) and error.__cause__:  # which says only that there was an error
        error = error.__cause__ if isinstance(error.__cause__, Exception) else error
    text = " ".join(str(error).split())
    names = re.search(r"\[(.*?)\]", text)
    if names and ("Config name is missing" in text or text.startswith("BuilderConfig")):
        return DataError(f"{repo}: set data.config to one of its configurations {names[1]}")
    if "scripts are no longer supported" in text:
        return DataError(f"{repo} is a script, which datasets no longer runs; use a copy with data files")
    is_of_datasets = isinstance(error, ValueError | RuntimeError | NotImplementedError | DatasetsError)
    if is_local and glob.has_magic(repo):
        return DataError(
            f"{repo} cannot be opened: datasets takes [ ] * ? for a pattern; rename the folder ({text[:200]})"
        )
    if is_local or (is_of_datasets and not is_of_network(error)):
        return DataError(f"{repo} cannot be opened: {text[:300]}")
    if isinstance(error, FileNotFoundError) and not is_of_network(error):
        return DataError(f"{repo} cannot be opened: it has no data files that datasets reads")
    return hub_error(error, repo)

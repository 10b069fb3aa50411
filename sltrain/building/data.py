"""Configuration -> where text comes from, its tokenizer, the stream of training rows and the rows of evaluations."""

import logging
import os
import tempfile
from contextlib import nullcontext
from pathlib import Path

import torch

from sltrain.compose import read_config
from sltrain.config import TrainConfig
from sltrain.data.documents import Source
from sltrain.data.evaluation import EvalSet
from sltrain.data.load_tokenizer import load_tokenizer
from sltrain.data.mixed_evaluation import MixedEvalSet
from sltrain.data.mixture import Mixture, errors_of
from sltrain.data.rows import RowTensors, is_per_document
from sltrain.data.sources.local import LocalFiles
from sltrain.data.special_tokens import read_settings
from sltrain.data.stream import TrainStream
from sltrain.data.token_folder import TokenFiles
from sltrain.data.tokenizer import Tokenizer
from sltrain.engine.distributed import Ranks
from sltrain.runs.run_folder import RunFolder

logger = logging.getLogger(__name__)

MAX_UNKNOWN = 0.02  # of the tokens of validation text


def build_sources(config: TrainConfig) -> tuple[Source, Source | None]:
    """The training corpus, and the validation corpus if it is one of its own."""
    validation = build_validation_source(config)  # first: it opens faster
    return config.data.open_training(), validation


def build_validation_source(config: TrainConfig) -> Source | None:
    """What a run is evaluated on; None: documents held out of what it trains on."""
    if config.validation_path:
        return LocalFiles(
            config.validation_path,
            on_bad_data=config.on_bad_data,
            key="validation_path",
            text_key=getattr(config.data, "text_key", "text"),
        )
    return config.data.open_validation()


def build_tokenizer(config: TrainConfig, source: Source, ranks: Ranks, folder: RunFolder | None = None) -> Tokenizer:
    """The tokenizer: of a run that continues with the same name of it the run's own file. Rank 0 goes first: it may
    train or download, the others then find the result in the cache."""
    begun_with = read_settings(folder.path) if folder is not None and folder.has_checkpoint else None
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()) / "sltrain"
    except RuntimeError:  # a user without a home, in a container
        cache = Path(tempfile.gettempdir(), f"sltrain-{os.getuid()}")

    def load() -> Tokenizer:
        return load_tokenizer(
            _own_tokenizer(config, folder) or config.tokenizer,
            vocab_size=config.model.vocab_size,
            source=source,
            holdout_every=config.data.holdout_every,
            cache_dir=cache,
            eos=config.tokenizer_eos,
            on_bad_data=config.on_bad_data,
            begun_with=begun_with,
        )

    for part in _parts(source).values():
        if isinstance(part, TokenFiles) and config.tokenizer.startswith("bpe:"):
            raise ValueError(
                f"tokenizer={config.tokenizer} is trained on text, which {part.name} does not hold; leave it out"
            )
    loaded: list[Tokenizer] = []
    ranks.on_main(lambda: loaded.append(load()))
    return loaded[0] if loaded else load()


def _own_tokenizer(config: TrainConfig, folder: RunFolder | None) -> str | None:
    """The tokenizer.json in the folder of a run that continues; None if there is none, or another one is asked for."""
    if folder is None or not folder.has_checkpoint or not folder.tokenizer_file.exists():
        return None
    return str(folder.tokenizer_file) if read_config(folder.config_file).tokenizer == config.tokenizer else None


def build_data(
    config: TrainConfig,
    source: Source,
    validation: Source | None,
    tokenizer: Tokenizer,
    ranks: Ranks,
) -> tuple[TrainStream, EvalSet | MixedEvalSet]:
    """The endless stream of this rank's rows, and the fixed rows of every evaluation, read here and now: text that
    cannot be had must not end a run in its middle."""
    _check_tokenizer(source, tokenizer)
    stream = _training_stream(config, source, validation, tokenizer, ranks.rank, ranks.world_size)
    eval_set = build_eval_set(config, validation or source, validation is None, tokenizer, ranks)
    eval_set.read()
    _warn_of_unknown(eval_set, tokenizer)
    return stream, eval_set


def _training_stream(
    config: TrainConfig, source: Source, validation: Source | None, tokenizer: Tokenizer, rank: int, world_size: int
) -> TrainStream:
    return TrainStream(
        source,
        tokenizer,
        seq_len=config.seq_len,
        padding=config.padding,
        per_document=is_per_document(config.padding, config.attention),
        holdout_every=config.data.holdout_every if validation is None else 0,
        seed=config.seed,
        global_batch_size=config.global_batch_size,
        rank=rank,
        world_size=world_size,
        num_streams=config.data.num_streams,
        shuffle_block=config.data.shuffle_block,
        prefetch=2,
    )


def read_calibration(
    config: TrainConfig, source: Source, validation: Source | None, tokenizer: Tokenizer, ranks: Ranks
) -> RowTensors | None:
    """The first rows of the run's training text, as many as the method wants to see before it starts, the same on every
    rank and for every number of them; None if it wants none. A stream of their own gives them: that of the run does not
    move."""
    wanted = config.method.num_calibration_rows()

    def read() -> RowTensors:
        stream = _training_stream(config, source, validation, tokenizer, rank=0, world_size=1)
        try:
            batches = [next(stream) for _ in range(-(-wanted // config.global_batch_size))]
        finally:
            stream.close()
        ids, labels = (torch.cat([getattr(b, key) for b in batches])[:wanted] for key in ("input_ids", "labels"))
        positions = [batch.positions for batch in batches if batch.positions is not None]
        return RowTensors(ids, labels, torch.cat(positions)[:wanted] if positions else None)

    return ranks.on_main(read) if wanted else None


def _warn_of_unknown(eval_set: EvalSet | MixedEvalSet, tokenizer: Tokenizer) -> None:
    """Say if the tokenizer cannot write much of the text: the model would learn to predict its unknown token, at a
    perplexity that looks good."""
    if tokenizer.unk_id is None:
        return
    share = eval_set.share_of(tokenizer.unk_id)
    if share > MAX_UNKNOWN:
        logger.warning(
            f"{share:.1%} of the tokens of the validation text are {tokenizer.special_tokens()['unk_token']}, which "
            f"stands for what tokenizer {tokenizer.name} cannot write; another writes all of it, such as "
            "tokenizer=bpe:8192"
        )


def build_eval_set(
    config: TrainConfig, source: Source, is_held_out: bool, tokenizer: Tokenizer, ranks: Ranks
) -> EvalSet | MixedEvalSet:
    """The rows that evaluations of a run read, of all documents of `source` or of those held out of training (a
    mixture says it of each of its parts); the text is read at the first use."""
    _check_tokenizer(source, tokenizer)

    def new_set(source: Source, eval_tokens: int, holdout_every: int) -> EvalSet:
        return EvalSet(
            source,
            tokenizer,
            seq_len=config.seq_len,
            padding=config.padding,
            per_document=is_per_document(config.padding, config.attention),
            holdout_every=holdout_every,
            eval_tokens=eval_tokens,
            part=config.eval_part,
            batch_size=config.micro_batch_size,
            rank=ranks.rank,
            world_size=ranks.world_size,
        )

    if isinstance(source, Mixture):
        return MixedEvalSet(source, config.eval_tokens, new_set)
    return new_set(source, config.eval_tokens, config.data.holdout_every if is_held_out else 0)


def _check_tokenizer(source: Source, tokenizer: Tokenizer) -> None:
    """Raise ValueError if the source, or a part of it, holds ids of another tokenizer."""
    for name, part in _parts(source).items():
        if isinstance(part, TokenFiles):
            with errors_of(name) if isinstance(source, Mixture) else nullcontext():
                part.check_tokenizer(tokenizer)


def _parts(source: Source) -> dict[str, Source]:
    """The sources of a mixture by name; one alone under its own."""
    if not isinstance(source, Mixture):
        return {source.name: source}
    return {name: part.source for name, part in source.parts.items()}

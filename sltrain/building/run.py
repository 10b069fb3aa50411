"""Config -> a run that is ready to train: the order in which it is built.

What needs no text is checked first (checks.py), the folder too, and the weights to start from and the downstream tasks
are opened; then come the corpus, its tokenizer, the streams of text, and the model on the meta device. The run is
described and its memory planned before the folder is claimed: nothing is written until then, so invalid input leaves no
files. Finally memory is allocated, the optimizer built and the checkpoint loaded.
"""

import logging
from contextlib import ExitStack
from dataclasses import dataclass

from sltrain.building.checks import check_before_text, check_changed
from sltrain.building.data import build_data, build_sources, build_tokenizer, read_calibration
from sltrain.building.folder import claim_folder, find_folder
from sltrain.building.memory_guard import guard_memory
from sltrain.building.model import build_model, weight_dtype
from sltrain.building.phases import check_structures
from sltrain.building.start_from import open_start
from sltrain.building.start_text import describe
from sltrain.building.strategy import build_strategy, compare_ranks
from sltrain.building.support_from import open_support_source
from sltrain.building.tasks import open_tasks, task_evaluation
from sltrain.building.trainer import build_trainer
from sltrain.config import TrainConfig
from sltrain.engine.checkpoint import Checkpointer
from sltrain.engine.distributed import Ranks, pick_device
from sltrain.engine.trainer import Trainer
from sltrain.runs.run_folder import RunFolder

logger = logging.getLogger(__name__)


@dataclass
class Run:
    """A run that is ready to train; `trainer` is None when its folder holds a finished run.

    Leaving `resources` stops the stream's thread, the sinks and the process group, and releases the folder.
    """

    folder: RunFolder
    ranks: Ranks
    trainer: Trainer | None
    resources: ExitStack


def build_run(config: TrainConfig) -> Run:
    """Build everything a training run needs; what was opened is closed if that fails. Raises ValueError or OSError for
    what the user can fix."""
    with ExitStack() as resources:
        ranks = Ranks.start(pick_device(config.device), config.hang_timeout)
        resources.callback(ranks.stop)
        compare_ranks(config, ranks)
        ranks.everywhere(lambda: check_before_text(config, ranks))
        folder, is_finished = find_folder(config, ranks)
        trainer = None if is_finished else _build(config, folder, ranks, resources)
        run = Run(folder, ranks, trainer, resources.pop_all())
    return run


def _build(config: TrainConfig, folder: RunFolder, ranks: Ranks, resources: ExitStack) -> Trainer:
    begins = ranks.on_main(lambda: not folder.has_checkpoint)  # asked once: a shared folder may look older elsewhere
    start = ranks.everywhere(lambda: open_start(config) if begins else None)
    chosen = ranks.everywhere(lambda: open_support_source(config) if begins else None)
    tasks = ranks.everywhere(lambda: open_tasks(config, ranks))
    config.data.adopt(ranks.on_main(config.data.settled))
    source, validation = ranks.everywhere(lambda: build_sources(config))
    tokenizer = build_tokenizer(config, source, ranks, folder)
    model = ranks.everywhere(lambda: build_model(config, tokenizer.vocab_size, weight_dtype(config, ranks.device)))
    ranks.everywhere(lambda: check_structures(config, model))
    if start is not None:
        ranks.everywhere(lambda: start.check(model, config, tokenizer.json))
    if chosen is not None:
        ranks.everywhere(lambda: chosen.check(model, start))
    stream, eval_set = ranks.everywhere(lambda: build_data(config, source, validation, tokenizer, ranks))
    resources.callback(stream.close)
    if start is not None:
        start.text = read_calibration(config, source, validation, tokenizer, ranks)
    describe(config, model, source, tokenizer, eval_set, ranks)
    earlier = ranks.on_main(lambda: Checkpointer(folder.path, None).newest_state().get("parallel"))
    strategy = build_strategy(config, model, ranks, earlier)
    plan = ranks.everywhere(
        lambda: guard_memory(config, model, folder, strategy, lambda changed: check_changed(changed, ranks))
    )
    resources.callback(folder.release)
    claim_folder(folder, config, tokenizer, ranks)
    logger.info(f"run folder {folder.path}")
    trainer = build_trainer(config, folder, model, stream, eval_set, strategy, plan, start, chosen)
    if config.eval_tasks:
        trainer.tasks = task_evaluation(config, tasks, model, tokenizer, trainer.strategy)
    for sink in trainer.sinks:
        resources.callback(sink.close)
    if trainer.profile is not None:
        resources.callback(trainer.profile.close)
    return trainer

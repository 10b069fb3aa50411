"""What is checked before any text is read: a mistake costs the seconds until torch is there, and no tokenizer is
trained in vain.

The numbers alone were checked before torch was imported (config_checks.py, and each plug-in's `check`); this is
what needs torch, the model's shape, the machine or the number of processes. Globs are expanded right after it, when the
corpus is opened.
"""

import importlib.util
import os
import shlex
import shutil
import sys
from pathlib import Path

from sltrain.building.model import build_model, weight_dtype
from sltrain.building.phases import check_structures
from sltrain.building.strategy import check_parallel, check_sharding
from sltrain.building.tasks import check_package
from sltrain.building.trainer import check_updates_of
from sltrain.compose import TRAIN
from sltrain.config import TrainConfig
from sltrain.data.order import num_logical_streams
from sltrain.engine.distributed import Ranks
from sltrain.optim.build import members

ANY_VOCABULARY = 32_000  # ids, where the tokenizer will decide: no check depends on it


def check_before_text(config: TrainConfig, ranks: Ranks) -> None:
    """Raise ValueError, or OSError, for the first thing that is wrong."""
    check_settings(config, ranks)
    _check_run_dir(config, ranks)


def check_settings(config: TrainConfig, ranks: Ranks) -> None:
    """The same of what a run computes, wherever it is written."""
    for check in (
        _check_processes,  # they can share the model, and the batch divides among them
        _check_packages,  # what the optimizer, the tracker and tasks need is installed
        _check_updates,  # the ways of updating go together
        _check_compiler,  # torch.compile has a compiler
        _check_model,  # rank, sparsity, support, patterns and heads fit the shape, the optimizer takes parameters
    ):
        check(config, ranks)


def check_changed(config: TrainConfig, ranks: Ranks) -> None:
    """Raise ValueError if a run that was changed, with other values than were typed, would be refused."""
    TRAIN.validate(config)
    check_settings(config, ranks)


def _check_processes(config: TrainConfig, ranks: Ranks) -> None:
    check_parallel(config, ranks.world_size)
    check_batch(config, ranks.world_size)
    num_logical_streams(config.global_batch_size, config.data.num_streams)


def check_batch(config: TrainConfig, world_size: int) -> None:
    """Check that the global batch divides into the ranks' micro-batches. Raises ValueError, which names the nearest
    values that do."""
    whole, micro = config.global_batch_size, config.micro_batch_size
    if whole % (micro * world_size) == 0:
        return
    fits = [size for size in range(1, micro + 1) if whole % (size * world_size) == 0]
    counts = [count for count in range(1, whole + 1) if whole % (micro * count) == 0]
    choices = [f"micro_batch_size={fits[-1]}"] if fits else []
    if counts and world_size > 1:
        count = min(counts, key=lambda count: abs(count - world_size))
        choices.append(f"{count} process{'es' * (count > 1)}")
    multiple = max(round(whole / (micro * world_size)), 1) * micro * world_size
    choices.append(f"global_batch_size={multiple}")
    raise ValueError(
        f"global_batch_size={whole} is not a multiple of micro_batch_size={micro}"
        f" x {world_size} process{'es' * (world_size > 1)}; the nearest that fit: {', or '.join(choices)}"
    )


def _check_packages(config: TrainConfig, ranks: Ranks) -> None:
    for member in members(config.optimizer):
        member.check_package()
    if config.eval_tasks:
        check_package("eval_tasks")
    tracker = config.tracker.name
    if tracker != "none" and importlib.util.find_spec(tracker) is None:
        raise ValueError(f"tracker={tracker} needs {tracker}: run `pip install {tracker}`, or choose tracker=none")


def _check_updates(config: TrainConfig, ranks: Ranks) -> None:
    check_updates_of(config, weight_dtype(config, ranks.device))


def _check_compiler(config: TrainConfig, ranks: Ranks) -> None:
    if config.compile:
        _check_compiler_of("compile=true", ranks.device.type)


def _check_model(config: TrainConfig, ranks: Ranks) -> None:
    model = build_model(config, config.model.vocab_size or ANY_VOCABULARY, weight_dtype(config, ranks.device))
    check_structures(config, model)
    check_sharding(config, model, ranks.world_size)


def _check_run_dir(config: TrainConfig, ranks: Ranks) -> None:
    """The nearest folder that exists must be one that can be written to. What torchrun starts again needs a name, since
    a folder without one is a new one at every start."""
    if not ranks.is_main:
        return
    restarts = os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")
    if config.run_dir is None and restarts != "0":
        raise ValueError(
            f"run_dir=null: after each of up to {restarts} restarts the run would begin anew in another folder; set"
            " run_dir=outputs/NAME"
        )
    wanted = Path(config.run_dir or "outputs").expanduser()
    place = wanted.absolute()
    try:
        while not place.exists() and place != place.parent:
            place = place.parent
    except OSError as error:  # a name that is too long, a parent that may not be looked into
        raise ValueError(f"run_dir={wanted} cannot be created: {error.strerror}; choose another one") from error
    if not place.is_dir():
        raise ValueError(f"run_dir={wanted} cannot be created: {place} is a file; choose another one")
    if not os.access(place, os.W_OK | os.X_OK):
        raise ValueError(f"run_dir={wanted} cannot be written: {place} is read-only for you; choose another one")


def _check_compiler_of(text: str, device_type: str) -> None:
    """Raise ValueError if torch.compile, which `text` needs, has nothing to compile with on the device."""
    if device_type != "cpu":
        if importlib.util.find_spec("triton") is None:
            raise ValueError(
                f"{text} on a GPU needs Triton, which is not installed; pip install triton, or drop {text}"
            )
        return
    compiler = shlex.split(os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++"))[0]
    if shutil.which(compiler) is None:
        raise ValueError(
            f"{text} on a CPU needs a C++ compiler, and there is no {compiler} on the PATH; install it, name"
            f" another one in CXX, or drop {text}"
        )

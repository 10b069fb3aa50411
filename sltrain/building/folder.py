"""Config -> the folder of its run: found and checked before anything is built, claimed when everything is known."""

import dataclasses
import json
import socket
import time
from pathlib import Path

from sltrain.building.phases import phases_of
from sltrain.compose import read_config
from sltrain.config import CHANGEABLE_ON_RESUME, TrainConfig, num_steps, rate_schedule
from sltrain.data.special_tokens import CONFIG_FILE
from sltrain.data.tokenizer import Tokenizer
from sltrain.engine.actions import begun
from sltrain.engine.checkpoint import Checkpointer
from sltrain.engine.distributed import Ranks
from sltrain.engine.sealed_folder import write_atomically
from sltrain.runs.lock import owner_of
from sltrain.runs.run_folder import AnotherRun, RunFolder


def find_folder(config: TrainConfig, ranks: Ranks) -> tuple[RunFolder, bool]:
    """The run's folder and whether its run is finished, as rank 0 sees it. Nothing is written. Raises ValueError if it
    holds something else."""
    if config.run_dir is None:
        name = f"{time.strftime('%Y-%m-%d_%H-%M-%S')}_{config.model.name}_{config.method.name}"
        return RunFolder(Path("outputs", name), is_new=True), False
    folder = RunFolder(
        Path(config.run_dir).expanduser(), read_effective=lambda file: dataclasses.asdict(read_config(file))
    )

    def check() -> bool:
        try:
            folder.check(dataclasses.asdict(config), config.resume, CHANGEABLE_ON_RESUME)
        except AnotherRun as error:
            raise ValueError(f"{error}{_how_to_have_more(config, folder)}") from None
        if folder.has_progress:
            config.data.check_continues(read_config(folder.config_file).data)
            _check_budget(config, folder)
        return folder.is_finished and not folder.reopens

    def adopt() -> None:
        if folder.config_file.exists():
            config.data.adopt(read_config(folder.config_file).data)

    is_finished = ranks.on_main(check)
    ranks.everywhere(adopt)
    return folder, is_finished


def _how_to_have_more(config: TrainConfig, folder: RunFolder) -> str:
    """If `config` asks for more updates than the run in the folder has: how to have them, to follow a sentence."""
    before = read_config(folder.config_file)
    first, wanted = (num_steps(dataclasses.replace(c, extend=0)) for c in (before, config))
    if wanted <= num_steps(before):
        return ""
    longer = dataclasses.replace(before, extend=wanted - first)
    try:
        _check_budget(longer, folder)
    except ValueError as error:
        return f". extend={longer.extend} cannot add updates: {str(error).removeprefix(f'extend={longer.extend}: ')}"
    return f". For more updates: sltrain-train run_dir={folder.path} extend={longer.extend}"


def _check_budget(config: TrainConfig, folder: RunFolder) -> None:
    """Whether the run in the folder, with another `extend` than before, goes on as if it had had this budget from the
    beginning; a finished one then reopens. Raises ValueError if its updates so far would have been others."""
    before = read_config(folder.config_file)
    if config.extend == before.extend:
        return
    old, new = rate_schedule(before), rate_schedule(config)
    checkpoint, step = Checkpointer(folder.path, None).find_latest_step()
    if folder.is_finished and checkpoint is None:
        raise ValueError(f"extend={config.extend}: run_dir={folder.path} holds no checkpoint to go on from")
    if step > new.max_steps:
        raise ValueError(
            f"extend={config.extend} gives {new.max_steps:,} updates, and {step:,} are done; raise it (it counts from"
            " the first budget on)"
        )
    starts = [[(phase.name, phase.after) for phase in begun(phases_of(c), step)] for c in (before, config)]
    does_the_same = starts[0] == starts[1] and config.method.agrees(step, old.max_steps, new.max_steps)
    if not new.agrees(old, step) or not does_the_same:
        more = max(new.max_steps - step, 1)
        other = f"phases or actions (method={config.method.name})"
        if not new.agrees(old, step):
            other = f"learning rates (schedule={config.schedule})"
        raise ValueError(
            f"extend={config.extend}: with {new.max_steps:,} updates the {step:,} of run_dir={folder.path} would have"
            f" had other {other}; a new run from its weights:"
            f" sltrain-train init_from={folder.path} max_steps={more} run_dir={folder.path}_more"
        )
    folder.reopens = folder.is_finished


def claim_folder(folder: RunFolder, config: TrainConfig, tokenizer: Tokenizer, ranks: Ranks) -> None:
    """Make the folder this run's: see `RunFolder.claim`. Its path may get a suffix."""
    plain = dataclasses.asdict(config)

    def claim() -> Path:
        try:
            path = folder.claim(plain, config.resume, CHANGEABLE_ON_RESUME, tokenizer.json)
            if not folder.has_checkpoint:
                write_atomically(path / CONFIG_FILE, json.dumps(tokenizer.settings(), indent=2) + "\n")
            return path
        except OSError as error:
            raise ValueError(
                f"run_dir={folder.path} cannot be written: {error.strerror}; choose another one"
            ) from error

    folder.path = ranks.on_main(claim)
    check_shared(folder.path, ranks)


def check_shared(path: Path, ranks: Ranks, patience: float = 60.0) -> None:
    """Raise ValueError, on all ranks, if one does not see that rank 0 owns the folder: a run that continues reads its
    checkpoint on every rank. `patience`: seconds that a network file system may take to show it."""
    owner = ranks.on_main(lambda: owner_of(path))

    def look() -> None:
        deadline = time.monotonic() + patience
        while owner_of(path) != owner:
            if time.monotonic() > deadline:
                raise ValueError(
                    f"run_dir={path} is not the same folder on all machines: {socket.gethostname()} does not see what"
                    f" rank 0 ({owner[0] if owner else 'elsewhere'}) writes there; name a folder on a file system that"
                    " all share"
                )
            time.sleep(0.1)

    ranks.everywhere(look)

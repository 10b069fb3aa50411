"""Config -> the folder of its run: found and checked before anything is built, claimed when everything is known."""

import dataclasses
import time
from pathlib import Path

from sltrain.compose import read_config
from sltrain.config import CHANGEABLE_ON_RESUME, TrainConfig
from sltrain.engine.distributed import Ranks
from sltrain.runs.run_folder import RunFolder


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
        folder.check(dataclasses.asdict(config), config.resume, CHANGEABLE_ON_RESUME)
        return folder.is_finished

    return folder, ranks.on_main(check)


def claim_folder(folder: RunFolder, config: TrainConfig, tokenizer_json: str, ranks: Ranks) -> None:
    """Make the folder this run's: see `RunFolder.claim`. Its path may get a suffix."""
    plain = dataclasses.asdict(config)
    folder.path = ranks.on_main(lambda: folder.claim(plain, config.resume, CHANGEABLE_ON_RESUME, tokenizer_json))

"""What a configuration asks of the machine, of its compilers and of the number of processes."""

import importlib.util
import os
import shlex
import shutil
import sys

from sltrain.building.model import weight_dtype
from sltrain.building.trainer import check_updates_of
from sltrain.config import TrainConfig, check_batch
from sltrain.engine.distributed import Ranks


def check_machine(config: TrainConfig, ranks: Ranks) -> None:
    """Raise ValueError for what this machine, or this number of processes, cannot do."""
    check_batch(config, ranks.world_size)
    config.optimizer.check_package()
    check_updates_of(config, weight_dtype(config, ranks.device))
    candidates = {"compile=true": config.compile, f"optimizer={config.optimizer.name}": config.optimizer.compiles}
    for text in (text for text, does in candidates.items() if does):
        _check_compiler(text, ranks.device.type)
        return


def _check_compiler(text: str, device_type: str) -> None:
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

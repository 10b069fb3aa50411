"""Results -> TensorBoard: `tracker=tensorboard`, read by `tensorboard --logdir RUN/tensorboard`.

The scalars have the keys that Weights & Biases gets ("train/loss"), at the event's step. Each process that continues a
run adds a file, which begins with the step from which on earlier points no longer count: no step has two points.
"""

from pathlib import Path

from sltrain.engine.metrics import flat
from sltrain.events import Event


class TensorBoardSink:
    """Writes the numbers of events into `run_dir`/tensorboard.

    `step` is the one that the run continues from, 0 for a new one. Raises ValueError if tensorboard is missing.
    """

    def __init__(self, run_dir: Path, step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ValueError(
                "tracker=tensorboard needs tensorboard: run `pip install tensorboard`, or choose tracker=none."
            ) from error
        self._writer = SummaryWriter(str(Path(run_dir) / "tensorboard"), purge_step=step + 1)

    def log(self, event: Event) -> None:
        for key, value in flat(event).items():
            if isinstance(value, int | float) and not isinstance(value, bool):
                self._writer.add_scalar(key, value, event["step"])
        if event["event"] in ("checkpoint", "final", "stopped"):
            self._writer.flush()

    def close(self) -> None:
        self._writer.close()

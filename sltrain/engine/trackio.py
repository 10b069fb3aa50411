"""Results -> Trackio: `tracker=trackio`, shown by `trackio show`, or on a Space of the Hugging Face Hub.

Trackio (github.com/gradio-app/trackio) keeps the numbers on this machine, in TRACKIO_DIR (by default `trackio` in
HF_HOME), or sends them to a Space; it never raises while it logs. They have the keys that Weights & Biases gets
("train/loss"), at the event's step.

`run_dir/trackio_name` holds the run's name, so that a process which continues it continues the same Trackio run. Steps
that one before it had logged after the checkpoint are not logged again, as with Weights & Biases.
"""

import contextlib
import io
import logging
import secrets
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sltrain.engine.metrics import flat
from sltrain.engine.sealed_folder import write_atomically
from sltrain.events import Event
from sltrain.log import one_line

logger = logging.getLogger(__name__)


class TrackioSink:
    """Sends events to Trackio, to `space_id` (OWNER/NAME) if that is given.

    Raises ValueError if trackio is missing or refuses what it was given. Where it cannot begin for another reason, a
    warning says so, and nothing is sent: a tracker never ends a run.
    """

    def __init__(self, run_dir: Path, *, project: str, space_id: str | None, config: Mapping[str, Any]) -> None:
        try:
            import trackio
            from huggingface_hub.errors import LocalTokenNotFoundError
        except ImportError as error:
            raise ValueError(
                "tracker=trackio needs trackio: run `pip install trackio`, or choose tracker=none."
            ) from error
        self._run: Any = None
        self._last_step = -1  # what an earlier process logged last
        try:
            name = _run_name(Path(run_dir))
            with _silent():
                self._run = trackio.init(
                    project,
                    name=name,
                    space_id=space_id,
                    config=dict(config),
                    resume="allow",
                    embed=False,
                    auto_log_gpu=False,  # threads that measure what metrics.jsonl has
                    auto_log_cpu=False,
                )
        except (ValueError, LocalTokenNotFoundError) as error:
            raise ValueError(
                f"tracker=trackio: {one_line(error)}; change tracker.project or tracker.space_id, log in (hf auth"
                " login), or choose tracker=none."
            ) from error
        except Exception as error:
            logger.warning(f"tracker=trackio cannot begin ({one_line(error)}); its numbers are in metrics.jsonl alone")
            return
        self._last_step = getattr(self._run, "_next_step", 0) - 1
        where = f"https://huggingface.co/spaces/{space_id}" if space_id else f"`trackio show --project {project}`"
        logger.info(f"Trackio: run {name}, {where}")

    def log(self, event: Event) -> None:
        first = self._last_step + 1 if event["event"] == "train" else self._last_step  # its evaluation may be missing
        if self._run is not None and event["step"] >= first:
            self._run.log(flat(event), step=event["step"])

    def close(self) -> None:
        if self._run is None:
            return
        import trackio

        self._run = None
        try:
            with _silent():
                trackio.finish()
        except Exception as error:
            logger.warning(f"tracker=trackio could not finish ({one_line(error)})")


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Without the lines that Trackio prints, which break the progress bar."""
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        yield


def _run_name(run_dir: Path) -> str:
    """The name stored in the run folder, created on first use: that of the folder, made unique."""
    path = run_dir / "trackio_name"
    if path.exists() and (stored := path.read_text().strip()):
        return stored
    name = f"{run_dir.resolve().name}-{secrets.token_hex(3)}"
    write_atomically(path, f"{name}\n")
    return name

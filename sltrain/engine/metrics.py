"""Results -> numbers with units -> metrics.jsonl, the progress bar, W&B (TensorBoard: tensorboard.py).

The numbers and their units: events.py. Sinks exist on rank 0 only. metrics.jsonl is the reference: one event a line,
strict JSON (a number that is not finite is null). A run that resumes at step N first calls `rewrite_until(path, N)`, so
that the file has no step twice and no partial line.
"""

import contextlib
import json
import logging
import math
import os
import secrets
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, TextIO

from tqdm.auto import tqdm

from sltrain.engine.sealed_folder import write_atomically
from sltrain.events import Event, TaskNumbers, published_perplexity
from sltrain.log import in_notebook

logger = logging.getLogger(__name__)


class Sink(Protocol):
    """Where events go."""

    def log(self, event: Event) -> None: ...

    def close(self) -> None: ...


def safe_exp(loss: float) -> float:
    """exp(loss), infinite where that overflows."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


class Throughput:
    """Speed over one logging window: from one `read` to the next, the first from construction.

    with throughput.waiting(): batch = next(stream)
    with throughput.paused():  evaluate()
    throughput.add(num_tokens)
    numbers = throughput.read()
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._start = clock()
        self._waited = 0.0
        self._num_tokens = 0

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the seconds inside as waiting for data."""
        begin = self._clock()
        try:
            yield
        finally:
            self._waited += self._clock() - begin

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude the seconds inside (evaluating, saving), and any waiting in them, from the window."""
        begin, waited = self._clock(), self._waited
        try:
            yield
        finally:
            self._start += self._clock() - begin
            self._waited = waited

    def add(self, num_tokens: int) -> None:
        """Count tokens that were trained on."""
        self._num_tokens += num_tokens

    def read(self) -> Event:
        """End the window; return its tokens_per_second and data_wait_fraction (of this process's seconds)."""
        now = self._clock()
        seconds = now - self._start
        numbers: Event = {
            "tokens_per_second": self._num_tokens / seconds if seconds > 0 else 0.0,
            "data_wait_fraction": self._waited / seconds if seconds > 0 else 0.0,
        }
        self._start, self._waited, self._num_tokens = now, 0.0, 0
        return numbers


# ---- metrics.jsonl


def to_strict_json(event: Mapping[str, Any]) -> str:
    """JSON without NaN and infinities, which become null."""
    finite = json.loads(json.dumps(event), parse_constant=lambda constant: None)
    return json.dumps(finite, allow_nan=False)


class JsonlSink:
    """Appends events to a file, each with a single write; fsyncs after a checkpoint and at the end."""

    def __init__(self, path: Path) -> None:
        self._file = open(path, "ab", buffering=0)

    def log(self, event: Event) -> None:
        self._file.write(f"{to_strict_json(event)}\n".encode())
        if event["event"] in ("checkpoint", "final", "stopped"):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def rewrite_until(path: Path, step: int) -> int:
    """Keep the complete lines of events up to `step`, byte for byte and in order; return the number of lines dropped:
    later ones, damaged ones, and `final` and `stopped` ones, since the run continues. The file is replaced atomically;
    a missing one is not created."""
    path = Path(path)
    if not path.exists():
        return 0
    lines = [line for line in path.read_bytes().split(b"\n") if line.strip()]
    kept = [line for line in lines if _belongs(line, step)]
    write_atomically(path, b"".join(line + b"\n" for line in kept))
    return len(lines) - len(kept)


def _belongs(line: bytes, step: int) -> bool:
    try:
        event = json.loads(line)
    except ValueError:  # half a line, or bytes that are no UTF-8
        return False
    if not isinstance(event, dict) or not isinstance(event.get("step"), int):
        return False
    return event["step"] <= step and event.get("event") not in ("final", "stopped")


# ---- progress on the terminal


class ProgressBar:
    """A tqdm bar on standard error, or in a notebook; without a terminal, plain lines.

    Args:
        max_steps: updates of the whole run.
        first_step: updates done before this process.
        seconds_between_lines: least time between two plain lines.
    """

    def __init__(
        self,
        max_steps: int,
        first_step: int = 0,
        *,
        stream: TextIO | None = None,
        seconds_between_lines: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        is_widget = stream is None and in_notebook()
        self._stream: TextIO | None = stream or (sys.stdout if is_widget else sys.stderr)
        self._max_steps, self._first_step = max_steps, first_step
        self._seconds_between_lines, self._clock = seconds_between_lines, clock
        self._begin, self._last_line = clock(), -math.inf
        self._bar: tqdm[Any] | None = None
        # Some pseudo terminals report no columns: no bar can be drawn there.
        if is_widget or (
            self._stream and self._stream.isatty() and os.get_terminal_size(self._stream.fileno()).columns > 0
        ):
            form = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
            self._bar = tqdm(
                total=max_steps, initial=first_step, file=self._stream, bar_format=form, dynamic_ncols=True
            )

    def log(self, event: Event) -> None:
        if event["event"] == "train":
            self._show(event)
        elif event["event"] in ("eval", "final"):
            self._print(_evaluation_line(event))
            if event.get("tasks"):
                self._print(f"tasks at step {event['step']}: {task_text(event['tasks'])}")

    def _show(self, event: Event) -> None:
        step = event["step"]
        mfu = f"{100 * event['mfu']:.1f} % MFU, " if "mfu" in event else ""
        numbers = (
            f"loss {event['loss']:.3f}, perplexity {safe_exp(event['loss']):,.2f}, "
            f"{event['tokens_per_second']:,.0f} tok/s, {mfu}peak memory {event['peak_memory_bytes'] / 1e9:.2f} GB"
        )
        if self._bar is not None:
            self._bar.set_postfix_str(numbers, refresh=False)
            self._bar.update(step - self._bar.n)
            return
        now = self._clock()
        if now - self._last_line >= self._seconds_between_lines or step == self._max_steps:
            self._last_line = now
            rate = (now - self._begin) / max(step - self._first_step, 1)  # seconds a step, all included
            remaining = tqdm.format_interval((self._max_steps - step) * rate)
            self._print(f"step {step}/{self._max_steps}: {numbers}, {remaining} left")

    def _print(self, line: str) -> None:
        if self._bar is not None:
            self._bar.write(line, file=self._stream)
        elif self._stream is not None:
            with contextlib.suppress(OSError, ValueError):  # nobody reads it any more
                print(line, file=self._stream, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def _evaluation_line(event: Event) -> str:
    what = "final evaluation" if event["event"] == "final" else "evaluation"
    published = published_perplexity(event)
    return (
        f"{what} at step {event['step']}: loss {event['loss']:.4f}, perplexity {event['perplexity']:,.2f}"
        + (f" (counted as in the published tables: {published:,.2f})" if published is not None else "")
        + f", {event['bits_per_byte']:.4f} bits per byte, on {event['eval_tokens']:,} tokens"
        + _losses_of_sources(event)
    )


def _losses_of_sources(event: Event) -> str:
    """The loss of each source of a mixture, in parentheses; nothing for one source."""
    losses = {key.partition("/")[2]: value for key, value in event.items() if key.startswith("loss/")}
    return f" ({', '.join(f'{name} {loss:.4f}' for name, loss in losses.items())})" if losses else ""


def task_text(tasks: TaskNumbers, most: int = 8) -> str:
    """The numbers of tasks in one line, "piqa acc 0.5204 ± 0.0117, acc_norm 0.5310 ± 0.0116; ..."; of the first
    `most`."""
    texts = []
    for task, numbers in list(tasks.items())[:most]:
        errors = {key.replace("_stderr", "", 1): value for key, value in numbers.items() if "_stderr" in key}
        values = [
            f"{key} {value:{'.4f' if abs(value) < 1000 else '.5g'}}"
            + (f" ± {errors[key]:.4f}" if key in errors else "")
            for key, value in numbers.items()
            if "_stderr" not in key
        ]
        texts.append(f"{task} {', '.join(values)}")
    return "; ".join(texts) + (f"; and {len(tasks) - most} more" if len(tasks) > most else "")


def flat(event: Event) -> dict[str, Any]:
    """What an event holds, by the keys that trackers get: "train/loss", "eval/tasks/piqa/acc"."""

    def leaves(prefix: str, value: Any) -> Iterator[tuple[str, Any]]:
        if isinstance(value, Mapping):
            for key, inner in value.items():
                yield from leaves(f"{prefix}/{key}", inner)
        else:
            yield prefix, value

    return dict(leaves(event["event"], {key: value for key, value in event.items() if key not in ("event", "step")}))


# ---- Weights & Biases


class WandbSink:
    """Sends events to Weights & Biases, keys prefixed by the event ("train/loss"), at the event's step.

    `run_dir/wandb_id` holds the run's id, so a resumed run continues the same W&B run. Without a stored API key it
    records offline into `run_dir/wandb` and says so in one line; WANDB_MODE is respected. Raises ValueError if wandb is
    missing or refuses.
    """

    def __init__(self, run_dir: Path, *, project: str, entity: str | None, config: Mapping[str, Any]) -> None:
        try:
            import wandb
        except ImportError as error:
            raise ValueError("tracker=wandb needs wandb: run `pip install wandb`, or choose tracker=none.") from error
        try:
            mode: Any = wandb.setup().settings.mode
            if mode == "online" and not wandb.login(prompt=False):
                mode = "offline"
            self._run = wandb.init(
                project=project,
                entity=entity,
                id=_wandb_id(Path(run_dir)),
                name=Path(run_dir).name,
                dir=str(run_dir),
                config=dict(config),
                mode=mode,
                resume="allow" if mode == "online" else None,
                settings=wandb.Settings(silent=True, console="off"),  # its lines, or its capture of ours, break the bar
            )
        except wandb.Error as error:
            raise ValueError(
                f"tracker=wandb: {error}. Set WANDB_MODE=offline to record without its server, or choose tracker=none."
            ) from error
        if mode == "offline":
            logger.info(
                f"W&B: no API key or offline mode; recording in {run_dir}/wandb, upload it later with `wandb sync`."
            )
        elif mode == "online":
            logger.info(f"W&B: {self._run.url}")
        self._last_step = 0

    def log(self, event: Event) -> None:
        self._last_step = max(
            self._last_step, event["step"]
        )  # a checkpoint's line may be late: W&B drops what goes back
        self._run.log(flat(event), step=self._last_step)

    def close(self) -> None:
        self._run.finish()


def _wandb_id(run_dir: Path) -> str:
    """The id stored in the run folder, created on first use."""
    path = run_dir / "wandb_id"
    if path.exists() and (stored := path.read_text().strip()):
        return stored
    run_id = secrets.token_hex(4)
    write_atomically(path, f"{run_id}\n")
    return run_id

"""Every command as a function of Python values: the functions of `import sltrain`.

    run = sltrain.train("llama_tiny", data="stdlib", max_steps=200)
    run.outcome, run.final["perplexity"], run.generate("def ")

Errors that the caller can fix are raised as `sltrain.Error`. Only `train` shows its progress; everything else is logged
under "sltrain", which shows warnings unless the program configures logging.
"""

import logging
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sltrain.api.overrides import as_overrides
from sltrain.errors import raised_as_error
from sltrain.events import Event
from sltrain.log import ANY_RANK, PACKAGE, lines_on

if TYPE_CHECKING:
    import torch

    from sltrain.api.plan_table import Plan
    from sltrain.models.llama import LlamaForCausalLM
    from sltrain.reporting.rows import Row
    from sltrain.runs.run_record import RunRecord

logger = logging.getLogger(__name__)
PathOrRun = str | PathLike[str]  # of a run folder or an exported one; a `Run` is one too


@dataclass(frozen=True)
class Run(PathLike[str]):
    """A run folder: its metrics, how it ended, and its model.

    `sltrain.train` returns one; `sltrain.Run("outputs/my_run")` opens an existing one. It is accepted wherever a path
    is. Attributes read the folder each time, so a run that is still training shows its latest state.

    >>> run = sltrain.Run("outputs/example")
    >>> run.outcome, run.metrics[0]["event"], run.metrics[0]["step"]
    ('finished', 'train', 1)
    """

    folder: Path

    def __post_init__(self) -> None:
        object.__setattr__(self, "folder", Path(self.folder).expanduser())

    def __fspath__(self) -> str:
        return str(self.folder)

    @property
    @raised_as_error()
    def metrics(self) -> list[Event]:
        """The lines of metrics.jsonl, a dict each; sltrain/events.py lists keys and units. A non-finite loss is NaN."""
        return self._record().events

    @property
    @raised_as_error()
    def final(self) -> Event | None:
        """The last event of a finished run: validation loss and perplexity, memory, parameters. None until then."""
        return self._record().final

    @property
    @raised_as_error()
    def outcome(self) -> str:
        """How the run ended: finished, interrupted, diverged, out of memory or data lost; or that it has not: running,
        crashed, not started."""
        return self._record().status

    def _record(self) -> "RunRecord":
        from sltrain.api.report import nothing_at
        from sltrain.runs.run_record import is_run, read_run

        if not is_run(self.folder):
            raise ValueError(nothing_at(self.folder))
        return read_run(self.folder)

    @property
    def model(self) -> "LlamaForCausalLM":
        """The trained model at its newest checkpoint, on the CPU; `load` has options."""
        return load(self)

    def load(self, **options: Any) -> "LlamaForCausalLM":
        """The trained model: `sltrain.load`."""
        return load(self, **options)

    def generate(self, prompt: str, **options: Any) -> str:
        """Continue a text: `sltrain.generate`."""
        return generate(self, prompt, **options)

    def evaluate(self, path: str | Sequence[str] | None = None, **options: Any) -> dict[str, Any]:
        """The perplexity on any text: `sltrain.evaluate`."""
        return evaluate(self, path, **options)


@raised_as_error()
def train(model: str | Mapping[str, Any] | None = None, *, overrides: Sequence[str] = (), **keys: Any) -> Run:
    """Train one run, as `sltrain-train` does, and return it.

    Args:
        model: the name of a model, as in model=llama_60m; its recipe comes with it.
        keys: the keys of `sltrain-train` (`sltrain-train --help` lists them). Options of a group are a dict:
            data={"name": "local", "path": "/data/*.json.gz"}.
        overrides: more keys, written as they are typed: ["data.shuffle_block=16"].

    With run_dir=FOLDER, an unfinished run in that folder is continued and a finished one is returned unchanged; without
    `model`, with the keys that are in its config.yaml. With init_from=FOLDER a new run begins with weights that were
    trained before, at step 0; without `model`, with the keys of the run in that folder. Ctrl-C,
    or a notebook's stop button, stops after the current update: the run is saved, its outcome is "interrupted", and the
    same call with its run_dir continues it. A second Ctrl-C raises KeyboardInterrupt; the last checkpoint remains.
    (Python delivers signals to the main thread only: a run in another thread is not interrupted.)

    Progress goes to standard output, or to the program's own handlers if they show INFO; set the level of the logger
    "sltrain" to WARNING to hide it. Raises sltrain.Error if the run cannot start; what ends it later is its outcome.

    >>> run = sltrain.train("llama_tiny", data="stdlib", tokenizer="bpe:512", seq_len=32, max_steps=3,
    ...                     global_batch_size=4, micro_batch_size=4, eval_tokens=500, run_dir="outputs/example")
    model      llama_tiny, method sltrain: ...
    finished: outputs/example
    >>> run.outcome, run.final["step"]
    ('finished', 3)
    """
    from sltrain.compose import run_config

    config = run_config(as_overrides(_with_model(model, keys), overrides))
    from sltrain.api.train import train_run  # torch and the rest, seconds after the cheap checks

    with _progress():
        ended = train_run(config)
        if ended.data_error is not None:
            logger.warning(str(ended.data_error), extra=ANY_RANK)
        logger.info(ended.advice)
    return Run(ended.folder)


@raised_as_error()
def plan(model: str | Mapping[str, Any] | None = None, *, overrides: Sequence[str] = (), **keys: Any) -> "Plan":
    """The memory plan of a run, as `sltrain-plan` shows it: where every byte goes, and which cards it fits. No GPU is
    needed.

    Takes the arguments of `sltrain.train` and the keys of `sltrain-plan`: cards, reserve_gb, num_processes,
    paper_convention, measure. The result has `total_bytes`, `groups` (bytes by purpose), `table` (text), `columns`
    (this run, dense training, GaLore, published SLTrain) and `fits(column)`. Lists of values are typed, as in
    overrides=["optimizer=adamw,galore,scale"]: a column for each combination. Raises sltrain.Error.

    >>> plan = sltrain.plan("llama_60m", optimizer="adam8bit", cards=[24])
    >>> round(plan.total_bytes / 1e9, 2), plan.fits(plan.columns[0])
    (8.08, {'24GB': True})
    """
    from sltrain.api.plan_config import read_arguments

    settings, runs = read_arguments(as_overrides(_with_model(model, keys), overrides))
    from sltrain.api.plan import build_plan

    return build_plan(settings, runs)


@raised_as_error()
def load(
    path: PathOrRun,
    *,
    step: int | None = None,
    device: "str | torch.device" = "cpu",
    dtype: "torch.dtype | None" = None,
) -> "LlamaForCausalLM":
    """A trained model with its weights: from what `sltrain-export` wrote, dense or compressed, or from a run folder (at
    its newest intact checkpoint, or at `step`).

    It is an ordinary torch module, in the dtype it was saved in and with the arithmetic of its training, unless `dtype`
    says otherwise: input_ids (B, T) ->
    logits (B, T, V). `sltrain.merge_to_dense` makes its layers ordinary linears. Raises sltrain.Error for what cannot
    be opened.

    >>> model = sltrain.load("outputs/example")
    >>> model(torch.zeros(2, 5, dtype=torch.long)).shape
    torch.Size([2, 5, 512])
    """
    import torch

    from sltrain.building.saved import open_saved

    return open_saved(path, step).load(torch.device(device), dtype)


@raised_as_error()
def generate(
    model: PathOrRun,
    prompt: str,
    *,
    max_new_tokens: int = 100,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    step: int | None = None,
    device: str = "auto",
) -> str:
    """`prompt` and its continuation by a trained model; greedy at temperature 0. Raises sltrain.Error.

    >>> text = sltrain.generate("outputs/example", "def ", max_new_tokens=5)
    >>> text.startswith("def ")
    True
    """
    from sltrain.api.generate import continue_text

    pieces = continue_text(
        model,
        prompt,
        step=step,
        device=device,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
    )
    return "".join(pieces)


@raised_as_error()
def evaluate(
    model: PathOrRun,
    path: str | Sequence[str] | None = None,
    *,
    eval_tokens: int | None = None,
    batch_size: int | None = None,
    padding: str | None = None,
    tasks: Sequence[str] | None = None,
    limit: int | None = None,
    step: int | None = None,
    device: str = "auto",
) -> dict[str, Any]:
    """Loss, perplexity and bits per byte of a trained model on the files that a glob (or several) matches; by default
    on the run's own validation text. padding="pack" and "best_fit" read whole documents, "truncate_pad" the first row
    of each; by default as it was trained. With enough text there is also perplexity_galore_protocol, as published
    tables count (engine/evaluate.py).

    With `tasks`, names of downstream tasks of lm-eval or YAML files, no text is read: the result is
    {"tasks": {name: {"acc": ..., "acc_stderr": ...}}, "step": ...}, of the first `limit` documents of each task.
    Raises sltrain.Error.

    >>> sorted(sltrain.evaluate("outputs/example", eval_tokens=200))
    ['bits_per_byte', 'eval_tokens', 'loss', 'perplexity', 'step']
    """
    from sltrain.api.evaluate import evaluate_saved, evaluate_saved_tasks

    options: dict[str, Any] = {"step": step, "batch_size": batch_size, "device": device}
    if tasks is not None:
        if path is not None or eval_tokens is not None or padding is not None:
            raise ValueError("tasks read no text of yours; leave out path, eval_tokens and padding, or tasks")
        return evaluate_saved_tasks(model, [tasks] if isinstance(tasks, str) else tasks, limit=limit, **options)
    if limit is not None:
        raise ValueError(f"limit={limit} is for tasks; of text, eval_tokens limits what is read")
    globs = [path] if isinstance(path, str) else path
    return evaluate_saved(model, globs, eval_tokens=eval_tokens, padding=padding, **options)


@raised_as_error()
def export(
    run: PathOrRun,
    output: str | PathLike[str],
    *,
    format: str = "dense",
    dtype: "str | torch.dtype | None" = None,
    step: int | None = None,
    license: str | None = None,
    push: str | None = None,
    private: bool = False,
) -> Path:
    """Export a run's checkpoint to the folder `output`, and return that: for transformers, vLLM and lm-eval (dense), or
    small, for transformers with trust_remote_code and for `sltrain.load` (compressed). The files are verified against
    the trained model. `dtype` is float32 or bfloat16, by default the run's own; `license` goes into the model card.
    push="USER/NAME" uploads the folder to that repository of the Hugging Face Hub, created if need be. Raises
    sltrain.Error.

    >>> sltrain.export("outputs/example", "small", format="compressed")
    PosixPath('small')
    >>> type(sltrain.load("small").model.layers[0].self_attn.q_proj).__name__
    'SLTrainLinear'
    """
    from sltrain.api.export import export as write
    from sltrain.building.model import DTYPES
    from sltrain.building.saved import open_saved

    name = str(dtype).removeprefix("torch.")
    for key, value, choices in (("format", format, ("dense", "compressed")), ("dtype", name, ("None", *DTYPES))):
        if value not in choices:
            raise ValueError(f"{key}={value}: choose one of {', '.join(choices)}")
    folder = Path(output).expanduser()
    destination = None
    if push is not None:
        from sltrain.api.push import Destination

        destination = Destination(push, private)
    write(open_saved(run, step), folder, format, DTYPES.get(name), license=license)
    if destination is not None:
        destination.upload(folder)
    return folder


@raised_as_error()
def tokenize(
    output: str | PathLike[str], *, processes: int | None = None, overrides: Sequence[str] = (), **keys: Any
) -> Path:
    """Prepare the ids of a corpus once, as `sltrain-tokenize` does, in the folder `output`, and return that; training
    with data="tokens", path=output reads them.

    Args:
        processes: how many work at the same time; None: one for each CPU. With more than one, a script needs the usual
            `if __name__ == "__main__":` around the call.
        keys: those of `sltrain.train` that concern text: data, path, tokenizer, validation_path and so on.

    A call that was stopped is continued by the same call. Raises sltrain.Error.

    >>> sltrain.tokenize("tokens", data="stdlib", tokenizer="bpe:512", processes=1)
    PosixPath('tokens')
    """
    from sltrain.api.tokenize_config import read_arguments

    own: dict[str, Any] = {"output": output} if processes is None else {"output": output, "processes": processes}
    settings, config = read_arguments(as_overrides({**own, **keys}, overrides))
    from sltrain.api.tokenize import tokenize as write

    return write(settings, config)


@raised_as_error()
def report(
    paths: PathOrRun | Sequence[PathOrRun], output: str | PathLike[str] | None = None, best: str | None = None
) -> "list[Row]":
    """A row for each run at or below `paths`, finished or not, best first. With `output`, also writes the report page,
    its table and figures into that folder. `best="method"` keeps of each method its best run. Unreadable parts of runs
    are logged as warnings. Raises sltrain.Error if there is no run, or none has the key `best`.

    >>> [(row.name, row.status, row.step) for row in sltrain.report("outputs")]
    [('example', 'finished', 3)]
    """
    from sltrain.api.report import check_output, read_report, write_report

    several = [paths] if isinstance(paths, str | PathLike) else paths
    found = read_report([Path(path).expanduser() for path in several], best)
    if not found.rows:
        raise ValueError("; ".join(found.notes) or "no path is given; name a run folder, or one with runs below it")
    for note in found.notes:
        logger.warning(f"note: {note}")
    if output is not None:
        folder = Path(output).expanduser()
        check_output(folder)
        write_report(found, folder)
    return found.rows


@raised_as_error()
def bench(**keys: Any) -> dict[str, Any]:
    """Timings of a layer, an update or the data stream on this machine (what="layer", "step" or "data"), as
    `sltrain-bench` makes them; its keys are the arguments. The result has `rows`, `machine` and `settings`. Raises
    sltrain.Error.

    >>> found = sltrain.bench(what="layer", shapes=[[32, 32, 8]], tokens=8, candidates=["dense"], repeats=2)
    >>> found["rows"][0]["measured"]
    'dense'
    """
    from sltrain.benchmarks.settings import read_arguments

    config = read_arguments(as_overrides(keys))
    from sltrain.api.bench import measure

    return measure(config)[0]


def _with_model(model: str | Mapping[str, Any] | None, keys: Mapping[str, Any]) -> dict[str, Any]:
    return dict(keys) if model is None else {"model": model, **keys}


def _progress() -> AbstractContextManager[None]:
    """Shows log lines on standard output, unless the program's own handlers do."""
    is_shown = PACKAGE.hasHandlers() and PACKAGE.isEnabledFor(logging.INFO)
    return nullcontext() if is_shown else lines_on("stdout")

"""Downstream tasks by the LM Evaluation Harness (lm-eval), during training and of what was trained.

    eval_tasks=[piqa,hellaswag]            tasks and groups that the harness knows by name
    eval_tasks=[/data/my_task.yaml]        a task of one's own, as the harness describes it

The harness makes the questions and counts the answers; the model answers through task_model.py, as it is: with the
run's own tokenizer, no export, no second copy. Its numbers for a task are `{metric: value, metric_stderr: ...}`.

Whatever can be wrong with a task is found when it is opened, before any text is read: each is asked one document, which
a stand-in answers. A task that fails later, as a metric may for answers of another kind, or the model on some rank
for lack of memory, costs its numbers and a warning, not the run. The harness draws random numbers and prints; neither
reaches the run.
"""

import contextlib
import difflib
import importlib.util
import io
import logging
import os
import random
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sltrain.building.task_model import Prompt, TaskModel, Unanswered
from sltrain.config import TrainConfig
from sltrain.data.download import is_of_network
from sltrain.data.tokenizer import Tokenizer
from sltrain.engine.distributed import Ranks
from sltrain.engine.in_step import InStep, Stopped
from sltrain.engine.strategy import Strategy
from sltrain.events import TaskNumbers
from sltrain.log import first_line
from sltrain.models.generation import Sampling
from sltrain.models.llama import LlamaForCausalLM

logger = logging.getLogger(__name__)

SEED = 1234  # of the examples in a prompt, as lm-eval's own command has it
BOOTSTRAP = 1000  # samples, for the standard error of metrics that are no mean
MAX_NEW_TOKENS = 256  # of a generated answer, unless the task says otherwise


class Tasks:
    """Tasks that were opened: their documents are on this machine. For rank 0.

    Args:
        names: of tasks or groups, or paths of YAML files.
        limit: documents of each task that are asked, its first; None: all.
        key: what messages call `names`: eval_tasks, or --tasks.

    Raises ValueError, in one line, without lm-eval, and for a task that is unknown, whose data cannot be had, or that
    asks what a text model cannot answer.
    """

    def __init__(self, names: Sequence[str], limit: int | None, key: str = "eval_tasks") -> None:
        check_package(key)
        self.limit = limit
        with _undisturbed():
            self._loaded = _load(names, key)
            tasks = {name: task for part in self._loaded.values() for name, task in part["tasks"].items()}
            for name, task in tasks.items():
                _rehearse(name, task, key)
            self.sizes = {name: len(task.eval_docs) for name, task in tasks.items()}

    def describe(self) -> str:
        """The tasks and how many documents of each are asked."""
        counts = {name: size if self.limit is None else min(size, self.limit) for name, size in self.sizes.items()}
        first = [f"{name} {count:,}" for name, count in list(counts.items())[:8]]
        more = f" and {len(counts) - 8} more" if len(counts) > 8 else ""
        return f"{', '.join(first)}{more} document{'s' * (sum(counts.values()) != 1)}"

    def evaluate(self, model: TaskModel) -> TaskNumbers:
        """The numbers of every task and group, without those that failed. Raises Stopped as the model does."""
        found: TaskNumbers = {}
        for name, loaded in self._loaded.items():
            try:
                with _undisturbed() as aloud:
                    asked = replace(model, tell=aloud(partial(_tell, name)))
                    raw = _evaluate(_answering(asked), loaded, self.limit, BOOTSTRAP)
                found.update({task: numbers for task, own in raw.items() if (numbers := _numbers(own))})
            except Stopped:
                raise
            except Exception as error:  # of the harness, the task's own code, or the model on some rank
                if model.is_out_of_step:
                    raise
                reason = str(error) if isinstance(error, Unanswered) else _reason(error)
                logger.warning(f"task {name} could not be evaluated ({reason}); its numbers are left out")
        return found


def open_tasks(config: TrainConfig, ranks: Ranks) -> Tasks | None:
    """The tasks of a run, on rank 0; None elsewhere and if there are none. Raises ValueError as Tasks does."""
    if not (config.eval_tasks and ranks.is_main):
        return None
    tasks = Tasks(config.eval_tasks, config.eval_task_limit)
    logger.info(f"tasks      {tasks.describe()}, by lm-eval")
    return tasks


def task_evaluation(
    config: TrainConfig, tasks: Tasks | None, model: LlamaForCausalLM, tokenizer: Tokenizer, strategy: Strategy
) -> Callable[[Callable[[], bool]], TaskNumbers | None]:
    """What a trainer calls on every rank, with what says whether to stop: `evaluate_tasks` of its model. A pass of it
    has at most the positions of one in training."""
    own = tokenizer.copy()  # the stream's thread uses the other
    ranks, max_positions = strategy.ranks, config.micro_batch_size * config.seq_len

    def evaluate(should_stop: Callable[[], bool]) -> TaskNumbers | None:
        asked = TaskModel(model, own, ranks, max_positions, should_stop)
        if not strategy.is_sharded:
            return evaluate_tasks(tasks, asked)
        in_step = InStep(model.model, ranks, should_stop)
        with strategy.by_modules(model), in_step:
            return evaluate_tasks(tasks, replace(asked, in_step=in_step))

    return evaluate


def check_package(key: str) -> None:
    """Raise ValueError if lm-eval is not installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise ValueError(f"{key} needs lm-eval: run `pip install lm-eval`, or leave {key} out")


def evaluate_tasks(tasks: Tasks | None, model: TaskModel) -> TaskNumbers | None:
    """The numbers of the tasks, on every rank; `tasks` are None on ranks other than 0. None once some rank has been
    asked to stop."""
    was_training = model.model.training
    model.model.eval()
    found: list[TaskNumbers | None] = [{}]
    try:
        if tasks is None:
            model.serve()
        else:
            try:
                found = [tasks.evaluate(model)]
            except Stopped:
                found = [None]
            model.done()
    finally:
        model.model.train(was_training)
    return model.ranks.on_main(lambda: found[0])


def _tell(name: str, text: str) -> None:
    logger.info(f"task {name}: {text}")


# ---- the harness


def _load(names: Sequence[str], key: str) -> dict[str, Any]:
    """What lm-eval knows under each of these names, as its TaskManager gives it."""
    from lm_eval.tasks import TaskManager

    paths = {name: Path(name).expanduser() for name in names if name.endswith((".yaml", ".yml"))}
    for name, path in paths.items():
        if not path.is_file():
            raise ValueError(f"{key}: {name} is no file; name a YAML file of a task, or a task of lm-eval")
    manager = TaskManager(include_defaults=len(paths) < len(names))  # reading all of its tasks takes seconds
    known = manager.all_tasks
    for name in names:
        if name not in paths and name not in known:
            near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
            hint = f"did you mean {' or '.join(near)}?" if near else "`lm-eval ls tasks` lists them"
            raise ValueError(f"{key}: lm-eval knows no task {name!r}; {hint}")
    loaded = {}
    for name in dict.fromkeys(names):
        try:
            with _without_retries_shown():
                loaded[name] = manager.load([str(paths.get(name, name))])
        except Exception as error:  # of lm-eval, datasets, or the task's own code
            hint = "check its YAML file" if name in paths else "name another one"
            if is_of_network(error):
                hint = "check the connection, or copy a cache that holds its data (HF_HOME)"
            raise ValueError(f"{key}: task {name} cannot be opened ({_reason(error)}); {hint}") from error
        for task in loaded[name]["tasks"].values():
            if task.get_config("num_fewshot") is None:
                task.set_config(key="num_fewshot", value=0)
            task.set_fewshot_seed(seed=SEED)
    return loaded


def _rehearse(name: str, task: Any, key: str) -> None:
    """Ask one document, to find what is wrong with a task before it is needed."""
    try:
        _evaluate(_standing_in(), {"tasks": {name: task}}, 1, 0)
    except Exception as error:
        raise ValueError(f"{key}: task {name} cannot be asked ({_reason(error)}); name another one") from error


def _evaluate(lm: Any, loaded: Any, limit: int | None, bootstrap_iters: int) -> dict[str, dict[str, Any]]:
    from lm_eval.evaluator import evaluate

    found = evaluate(lm=lm, task_dict=loaded, limit=limit, bootstrap_iters=bootstrap_iters, log_samples=False)
    assert found is not None  # it has rank 0, whatever the rank of this process
    return found["results"]


def _answering(model: TaskModel) -> Any:
    """The model as lm-eval asks it."""
    from lm_eval.api.model import LM

    class Answering(LM):
        def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
            return list(model.likelihoods([request.args for request in requests]))

        def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
            return model.text_likelihoods([request.args[0] for request in requests])

        def generate_until(self, requests: list[Any]) -> list[str]:
            return model.continuations([_prompt(*request.args) for request in requests])

    return Answering()


def _standing_in() -> Any:
    """What answers without a model."""
    from lm_eval.api.model import LM

    class StandingIn(LM):
        def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
            return [(-1.0, False) for _ in requests]

        def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
            return [-1.0 for _ in requests]

        def generate_until(self, requests: list[Any]) -> list[str]:
            return ["" for _ in requests]

    return StandingIn()


def _prompt(text: str, options: dict[str, Any]) -> Prompt:
    """A request for text: the options are those of transformers' `generate`, of which a task sets a few."""
    until = options.get("until") or []
    temperature = float(options.get("temperature") or 0.0)
    if options.get("do_sample"):
        sampling = Sampling(temperature or 1.0, options.get("top_k") or None, options.get("top_p"), SEED)
    else:
        sampling = Sampling()
    ends = [until] if isinstance(until, str) else until
    num_new = int(options.get("max_gen_toks") or options.get("max_new_tokens") or MAX_NEW_TOKENS)
    return Prompt(text, tuple(end for end in ends if end), num_new, sampling)


def _numbers(raw: dict[str, Any]) -> dict[str, float]:
    """{"acc,none": 0.5, "alias": ...} -> {"acc": 0.5}; the name of a filter of answers stays in that of the metric."""
    names = {key: key.removesuffix(",none").replace(",", "/") for key in raw if "," in key}
    return {
        name: float(raw[key])
        for key, name in names.items()
        if isinstance(raw[key], int | float | np.number) and not isinstance(raw[key], bool)
    }


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {first_line(error)[:300]}"


# ---- what the harness must not do to a run


@contextlib.contextmanager
def _undisturbed() -> Iterator[Callable[[Callable[[str], None]], Callable[[str], None]]]:
    """Inside this context this thread prints nothing, except by what the yielded function makes of one that prints, and
    lm-eval starts no processes; afterwards Python, numpy and torch draw the random numbers that they would have
    drawn."""
    out, err = sys.stdout, sys.stderr

    def aloud(say: Callable[[str], None]) -> Callable[[str], None]:
        def said(text: str) -> None:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                say(text)

        return said

    before = os.environ.get("DISABLE_MULTIPROC")
    states = random.getstate(), np.random.get_state()
    os.environ["DISABLE_MULTIPROC"] = "1"  # lm-eval would fork for standard errors
    try:
        with (
            torch.random.fork_rng(),
            contextlib.redirect_stdout(_OtherThreads(out)),
            contextlib.redirect_stderr(_OtherThreads(err)),
        ):
            yield aloud
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        os.environ.pop("DISABLE_MULTIPROC") if before is None else os.environ.update(DISABLE_MULTIPROC=before)


@contextlib.contextmanager
def _without_retries_shown() -> Iterator[None]:
    """Inside this context huggingface_hub does not tell each request that it tries again."""
    hub = logging.getLogger("huggingface_hub")
    level = hub.level
    hub.setLevel(logging.ERROR)
    try:
        yield
    finally:
        hub.setLevel(level)


class _OtherThreads(io.TextIOBase):
    """Passes on what other threads write, and drops what the thread writes that made it."""

    def __init__(self, stream: Any) -> None:
        self._stream, self._thread = stream, threading.get_ident()

    def write(self, text: str) -> int:
        if threading.get_ident() != self._thread and self._stream is not None:
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        if self._stream is not None:
            self._stream.flush()

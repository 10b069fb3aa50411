"""The faults inside a process of a run. `install` is called in the process before the run begins, by the fork that
becomes it (starts.py) or by inject/sitecustomize.py; the package under test knows nothing of it.

An event is counted where the operating system sees it: Python's audit hooks report every file that is opened and every
rename, link, folder and deletion before it happens, os.fsync is wrapped, and RLIMIT_FSIZE ends a write in its middle,
inside libraries of other languages too. Updates are counted around `Trainer.train`. Each process keeps a journal, one
JSON line an event:

    {"begin": 5}                                     an update begins
    {"end": 5, "skipped": false, "rows": [...]}      it is done: [checksum, document tokens] of each row
    {"fired": 2, "effect": "kill", "step": 5}        a fault comes (its number in the orders)
    {"save": 4, "operations": [...]}                 file operations of a save, when a new save or the end follows
    {"total": 240}                                   file operations of the whole start, at its end
"""

import builtins
import errno
import functools
import importlib.abc
import importlib.machinery
import importlib.util
import io
import json
import os
import re
import resource
import signal
import sys
import time
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
# Audit event -> the places of its path and of the descriptor of the folder that the path is relative to.
EVENTS = {
    "os.mkdir": (0, 2),
    "os.rename": (1, 3),
    "os.symlink": (1, 2),
    "os.remove": (0, 1),
    "os.rmdir": (0, 1),
    "os.truncate": (0, None),
    "os.link": (1, 3),
}
TAKES_SPACE = {"open", "os.mkdir", "os.symlink", "os.link", "fsync"}
SAVE = re.compile(r"/step_(\d+)\.tmp$")
TRAINER = "sltrain.engine.trainer"

Orders = dict[str, Any]


def install(orders: Orders) -> "Hooks":
    """Arm the faults of `orders`: rank, journal (a file), run_dir, text (its folder), document_tokens (first and last)
    and faults, each as in schedule.py with a number of its own (`id`)."""
    heed_signals()
    hooks = Hooks(orders)
    hooks.install()
    return hooks


def heed_signals() -> None:
    """Give signals that this process was told to ignore their defaults: a shell that starts it in the background, and
    nohup, would have that passed on to the runs."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL if number != signal.SIGINT else signal.default_int_handler)


class Hooks:
    """The faults of one process."""

    def __init__(self, orders: Orders) -> None:
        self.run_dir = os.path.realpath(orders["run_dir"])
        self.text = os.path.realpath(orders["text"])
        self.document_tokens: Sequence[int] = orders["document_tokens"]
        self.pending: list[dict[str, Any]] = list(orders["faults"])
        self.journal = os.open(orders["journal"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        self.step = 0  # of the update that is being made or was made last
        self.total = 0  # file operations under run_dir
        self.save_step: int | None = None  # of the save that was begun last
        self.operations: list[str] = []  # of that save
        self.disk_is_full = False
        self.reads_fail = 0  # reads of text that are to fail

    def install(self) -> None:
        sys.addaudithook(self._audit)
        os.fsync = functools.partial(self._fsync, os.fsync)
        if any(fault["trigger"] == "read" for fault in self.pending):
            builtins.open = functools.partial(self._open, builtins.open)  # type: ignore[assignment]
        if any(fault["effect"] == "torn" for fault in self.pending):
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        after_import(TRAINER, self._wrap_trainer)

    def note(self, **event: Any) -> None:
        """Write an event into the journal, with one write."""
        os.write(self.journal, json.dumps(event).encode() + b"\n")

    def close(self) -> None:
        """Note the operations of the last save, and the number of all."""
        self._end_save()
        self.note(total=self.total)

    # ---- updates

    def _wrap_trainer(self, module: ModuleType) -> None:
        train = module.Trainer.train

        @functools.wraps(train)
        def counted(trainer: Any, update: Any) -> Any:
            self.step = trainer.step + 1
            self.note(begin=self.step)
            self._fire_due("update", "before")
            handles = self._arm_backward(trainer.model)
            result = train(trainer, update)
            for handle in handles:
                handle.remove()
            is_bad = bool(result.skipped or result.num_skipped_tensors)
            self.note(end=self.step, skipped=is_bad, rows=self._rows(update.batch.input_ids))
            self._fire_due("update", "after")
            return result

        module.Trainer.train = counted

    def _fire_due(self, trigger: str, at: str) -> None:
        for fault in list(self.pending):
            if fault["trigger"] == trigger and fault["at"] == at and self.step >= fault["step"]:
                self._fire(fault)
        for fault in self.pending:
            if fault["trigger"] == "read" and self.step > fault["step"] and not self.reads_fail:
                self.reads_fail = 1 if fault["effect"] == "read_once" else 10**9

    def _arm_backward(self, model: Any) -> list[Any]:
        """Hooks on the gradient in the middle of the model, for faults that come inside backward. Gradients of shards
        (DTensor) reach no hook: there it is the gradient of the loss, where backward begins."""
        due = [f for f in self.pending if (f["trigger"], f["at"]) == ("update", "backward") and self.step >= f["step"]]
        if not due:
            return []
        parameters = [p for p in model.parameters() if p.requires_grad]

        def come(gradient: Any) -> Any:
            for fault in [f for f in due if f in self.pending]:
                if fault["effect"] == "nan" and not gradient.any():
                    continue  # DDP orders its buckets by a backward pass of zeros, which updates nothing
                self._fire(fault)
                if fault["effect"] == "nan":
                    return gradient * float("nan")
            return None

        if any(type(p).__name__ == "DTensor" for p in parameters):
            return [_BackwardOfLoss(come)]
        return [parameters[len(parameters) // 2].register_hook(come)]

    def _rows(self, input_ids: Any) -> list[Any]:
        first, last = self.document_tokens
        rows = input_ids.tolist()
        return [[zlib.crc32(repr(row).encode()), [i for i in row if first <= i <= last]] for row in rows]

    # ---- file operations

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            if isinstance(flags, int) and flags & WRITING and isinstance(path, str | bytes):
                self._operation(event, _absolute(path, None))
        elif event in EVENTS:
            place, folder = EVENTS[event]
            if isinstance(arguments[place], str | bytes):
                self._operation(event, _absolute(arguments[place], None if folder is None else arguments[folder]))

    def _fsync(self, real: Callable[[int], None], descriptor: int) -> None:
        self._operation("fsync", os.readlink(f"/proc/self/fd/{descriptor}"))
        real(descriptor)

    def _operation(self, name: str, path: str) -> None:
        """Count an operation that is about to happen, and let the faults that are due there come."""
        if not path.startswith(self.run_dir):
            return
        if name == "os.mkdir" and (found := SAVE.search(path)):
            self._end_save()
            self.save_step = int(found[1])
            self._limit_bytes()
        if self.save_step is not None:
            self.operations.append(f"{name} {os.path.relpath(path, self.run_dir)}")
        self.total += 1
        for fault in list(self.pending):
            if self._is_due(fault):
                self._fire(fault)
        if self.disk_is_full and name in TAKES_SPACE:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)

    def _is_due(self, fault: dict[str, Any]) -> bool:
        if fault["trigger"] == "startup":
            return self.total > fault["at"]
        is_hit = self.save_step is not None and self.save_step >= fault["step"]
        return fault["trigger"] == "operation" and is_hit and len(self.operations) > fault["at"]

    def _limit_bytes(self) -> None:
        """Let files of a save that is to be torn end at a number of bytes."""
        for fault in list(self.pending):
            if fault["trigger"] == "bytes" and self.save_step is not None and self.save_step >= fault["step"]:
                resource.setrlimit(resource.RLIMIT_FSIZE, (fault["bytes"], resource.RLIM_INFINITY))
                self._fire(fault)

    def _end_save(self) -> None:
        if self.save_step is not None:
            self.note(save=self.save_step, operations=self.operations)
        self.operations, self.save_step = [], None

    # ---- reading text

    def _open(self, real: Callable[..., Any], file: Any, mode: str = "r", *more: Any, **options: Any) -> Any:
        if mode == "rb" and isinstance(file, str | Path) and os.path.realpath(file).startswith(self.text + "/train."):
            return io.BufferedReader(_Failing(real(file, mode, buffering=0), self), 4096)
        return real(file, mode, *more, **options)

    def before_read(self, name: str, at: int) -> None:
        """Raise what a failing disk gives, if a read of text is to fail. The beginning of a file is always read."""
        if self.reads_fail and at > 0:
            self.reads_fail -= 1
            for fault in [f for f in self.pending if f["trigger"] == "read"]:
                self._fire(fault)
            raise OSError(errno.EIO, os.strerror(errno.EIO), name)

    # ---- what a fault does

    def _fire(self, fault: dict[str, Any]) -> None:
        self.pending.remove(fault)
        effect = fault["effect"]
        operation = self.operations[-1] if fault["trigger"] == "operation" else None
        what = {"fired": fault["id"], "effect": effect, "step": self.step, "pid": os.getpid()}
        save = self.save_step if fault["trigger"] in ("operation", "bytes") else None
        self.note(**what, operation=operation, save=save, seconds=fault["detail"])
        if effect == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif effect == "signal":
            os.kill(os.getpid(), signal.Signals[fault["detail"]])
        elif effect in ("node", "hang", "slow"):  # the campaign ends all, ends them later, or lets this one go on
            os.kill(os.getpid(), signal.SIGSTOP)
        elif effect == "full":
            self.disk_is_full = True
        elif effect == "clock":
            real = time.time
            time.time = lambda: real() + fault["detail"]  # type: ignore[assignment]


class _BackwardOfLoss:
    """While it is in place, every `loss.backward()` begins with a hook on its gradient."""

    def __init__(self, hook: Callable[[Any], Any]) -> None:
        import torch

        self._tensor, self._real = torch.Tensor, torch.Tensor.backward
        real = self._real

        def backward(loss: Any, *arguments: Any, **options: Any) -> None:
            loss.register_hook(hook)
            real(loss, *arguments, **options)

        torch.Tensor.backward = backward  # type: ignore[method-assign]

    def remove(self) -> None:
        self._tensor.backward = self._real  # type: ignore[method-assign]


class _Failing(io.RawIOBase):
    """A file of text whose reads may fail."""

    def __init__(self, file: Any, hooks: Hooks) -> None:
        self._file, self._hooks = file, hooks

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, *where: Any) -> int:
        return int(self._file.seek(*where))

    def tell(self) -> int:
        return int(self._file.tell())

    def fileno(self) -> int:
        return int(self._file.fileno())

    def readinto(self, buffer: Any) -> int:
        self._hooks.before_read(self._file.name, self._file.tell())
        return int(self._file.readinto(buffer))

    def close(self) -> None:
        self._file.close()
        super().close()


def _absolute(path: str | bytes, folder: int | None) -> str:
    path = os.fsdecode(path)
    if folder is not None and folder >= 0 and not os.path.isabs(path):
        path = os.path.join(os.readlink(f"/proc/self/fd/{folder}"), path)
    parent, name = os.path.split(os.path.abspath(path))
    return os.path.join(os.path.realpath(parent), name)  # of a link itself, and not of what it leads to


def after_import(name: str, change: Callable[[ModuleType], None]) -> None:
    """Call `change` with the module of that name: now if it is imported already, else once it is."""
    if name in sys.modules:
        change(sys.modules[name])
        return
    sys.meta_path.insert(0, _Finder(name, change))


class _Finder(importlib.abc.MetaPathFinder):
    """Finds one module where it is, and has it changed once it was executed."""

    def __init__(self, name: str, change: Callable[[ModuleType], None]) -> None:
        self.name, self.change = name, change

    def find_spec(self, name: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        assert spec is not None and spec.loader is not None
        execute, change = spec.loader.exec_module, self.change

        def execute_and_change(module: ModuleType) -> None:
            execute(module)
            change(module)

        spec.loader.exec_module = execute_and_change  # type: ignore[method-assign]
        return spec

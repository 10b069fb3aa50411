"""Which rank hangs, found and said by the others.

Ranks wait for each other in every update. If one stops (its process is frozen, its GPU or file system does not answer,
its machine is cut off), the others would wait until the backend gives up after half an hour, and not know for whom.
So each rank tells, by a thread of its own and through the store by which torchrun's processes find each other:

    beat         a number that grows while the process runs
    at, number   what its main thread is at, and how many such things it has begun: all ranks begin the same ones
    collectives  how many operations of several ranks it has begun in it
    age          the seconds since its main thread moved
    patience     how much longer than the limit that may take: without end while text is read or a checkpoint written

A rank whose main thread waits reads what the others told, and ends the run when for `limit` seconds

    silent   a rank's beat has not grown, unless it waits for this one, which has patience,
    behind   or a living rank has not come as far as this one, has not moved, and its patience is over,
    stuck    or nobody is behind: all began the same collective, and it does not end.

Collectives are counted anew in each thing: in a save some ranks have fewer of them (parallel=hsdp).

Only differences of a rank's own clock are compared, so clocks of machines need not agree. A process that was itself
stopped, as by SLURM's suspend, begins to count anew.
"""

import json
import logging
import math
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import timedelta
from types import FrameType
from typing import Any

import torch.distributed as dist

from sltrain.log import ANY_RANK, write_line

logger = logging.getLogger(__name__)

EXIT_CODE = 6  # errors.ExitCode.RANK_LOST, which this part may not import
ENDLESS = math.inf  # patience
BESIDE = "beside training"  # description of a group in which threads work: nobody's main thread waits there


@dataclass
class Told:
    """What a rank tells of itself."""

    beat: int
    number: int
    collectives: int
    at: str  # "update 12"
    line: str  # the place in this package where its main thread is
    age: float  # seconds since its main thread moved
    patience: float  # seconds that this may take beyond the limit
    who: str  # host and process number

    @property
    def place(self) -> tuple[int, int]:
        """How far it has come."""
        return self.number, self.collectives


class Watch:
    """Tells what this rank is at, and ends the process when another one hangs.

    Args:
        limit: seconds without a sign; see the head of this file.
        connect: a client of the store that all ranks share.
        end: called with the line to print, or "" if another rank prints it.
        count: how many collectives this process has begun.
    """

    def __init__(
        self,
        rank: int,
        world_size: int,
        limit: float,
        connect: Callable[[], Any],
        end: Callable[[str], None] | None = None,
        count: Callable[[], int] | None = None,
    ) -> None:
        self.rank, self.world_size, self.limit = rank, world_size, limit
        self.period = min(limit / 10, max(10.0, world_size / 50))  # seconds between two beats
        self._connect, self._end, self._count = connect, end or _end_process, count or collectives_begun
        self._main = threading.get_ident()
        self._who = f"process {os.getpid()} on {socket.gethostname()}"
        self._at, self._patience, self._moved, self._begun = "the start", ENDLESS, time.monotonic(), 0
        self._start_of = 0, 0  # what the main thread is at: its number, and the collectives begun before
        self._beat = 0
        self._heard: dict[int, tuple[Told | None, float]] = {}  # of each other rank: what, and when its beat grew
        self._contact = time.monotonic()  # when the store last answered
        self._warned = 0.0
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=work, name=f"sltrain-watch-{name}", daemon=True)
            for name, work in (("talk", self._talk), ("judge", self._judge))
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """May be called twice."""
        self._stop.set()
        for thread in self._threads:  # one inside the store must not meet an interpreter that is torn down
            if thread.is_alive() and thread is not threading.current_thread():
                thread.join(1.0)

    def at(self, what: str, patience: float = 0.0) -> None:
        """The main thread begins something, which may take `patience` seconds more than the limit."""
        self._start_of = self._start_of[0] + 1, self._count()
        self._at, self._patience, self._moved = what, patience, time.monotonic()

    def tick(self) -> None:
        """The main thread goes on with the same."""
        self._moved = time.monotonic()

    def _age(self) -> float:
        """Seconds since the main thread moved: said so, or began another collective."""
        begun = self._count()
        if begun != self._begun:
            self._begun, self._moved = begun, time.monotonic()
        return time.monotonic() - self._moved

    def _told(self) -> Told:
        age, (number, collectives) = self._age(), self._place
        line = _line_of(sys._current_frames().get(self._main))
        return Told(self._beat, number, collectives, self._at, line, age, self._patience, self._who)

    @property
    def _place(self) -> tuple[int, int]:
        """As Told.place, of this rank."""
        number, before = self._start_of
        return number, self._begun - before

    def _talk(self) -> None:
        """Tell, and listen while the main thread waits. The store may block, or be gone."""
        store = None
        while not self._stop.is_set():
            try:
                store = store or self._connect()
                self._beat += 1
                store.set(f"watch/{self.rank}", json.dumps(asdict(self._told())))
                if self._age() > 2 * self.period:
                    self._listen(store)
                else:
                    self._heard.clear()
                self._contact = time.monotonic()
            except (RuntimeError, ValueError):
                store = None
            self._stop.wait(self.period)

    def _listen(self, store: Any) -> None:
        for rank in range(self.world_size):
            if rank == self.rank:
                continue
            key = f"watch/{rank}"
            told = Told(**json.loads(store.get(key))) if store.check([key]) else None
            before, since = self._heard.get(rank, (None, time.monotonic()))
            grew = told is not None and (before is None or told.beat != before.beat)
            self._heard[rank] = told, time.monotonic() if grew or rank not in self._heard else since

    def _judge(self) -> None:
        last = time.monotonic()
        while not self._stop.wait(self.period / 2):
            now = time.monotonic()
            if now - last > 5 * self.period:  # this process was stopped too
                self._moved = self._contact = now
                self._heard.clear()
            last = now
            if self._age() < self.limit:
                continue
            verdict = self.verdict(now)
            if verdict is not None and not self._stop.is_set():
                self._end(verdict if self._speaks() else "")
                return
            if verdict is None and now - self._warned > self.limit:
                self._warned = now
                self._warn(now)

    def verdict(self, now: float) -> str | None:
        """Why the run cannot go on, in a line; None while it can."""
        if now - self._contact >= self.limit:
            return self._line(
                f"the store of the run has not answered for {self.limit:g} s: the machine of rank 0 is gone, or this "
                "one is cut off"
            )
        heard = dict(self._heard)
        may_work = self._age() < self.limit + self._patience  # itself: in a save, for instance
        for rank, (told, since) in sorted(heard.items()):
            waits_for_this = told is not None and told.place > self._place and may_work
            if now - since >= self.limit and not waits_for_this:
                who = "it never joined" if told is None else told.who
                return self._line(
                    f"rank {rank} hangs ({who}): no sign of it for {self.limit:g} s, so its process is stopped, or its "
                    f"machine or network gone. It did not reach {self._here()}"
                )
        if len(heard) < self.world_size - 1:
            return None
        others = {rank: told for rank, (told, _) in heard.items() if told is not None}
        behind = {rank: told for rank, told in others.items() if told.place < self._place}
        if behind:
            rank, told = min(behind.items(), key=lambda item: item[1].place)
            if told.age < self.limit + told.patience:
                return None
            return self._line(
                f"rank {rank} hangs ({told.who}): it has been at {told.at} ({told.line}) for {told.age:.0f} s, and did "
                f"not reach {self._here()}"
            )
        ages = [(told.age, told.patience) for told in others.values()] + [(self._age(), self._patience)]
        if all(age >= self.limit + patience for age, patience in ages) and len(others) == len(heard):
            return self._line(
                f"all ranks are at {self._here()}, which has not ended for {self.limit:g} s: a GPU, or the network "
                "between machines, hangs"
            )
        return None

    def _here(self) -> str:
        """The collective in which this rank waits."""
        line = _line_of(sys._current_frames().get(self._main))
        return f"collective {self._place[1]:,} (of {self._at}; {line}), in which rank {self.rank} waits"

    def _line(self, why: str) -> str:
        return f"{why}. What was saved is kept: start the same command again (hang_timeout={self.limit:g})"

    def _speaks(self) -> bool:
        """Whether this rank prints the verdict: the first of those that wait."""
        waiting = [
            rank
            for rank, (told, since) in dict(self._heard).items()
            if told is not None and told.place >= self._place and time.monotonic() - since < self.limit
        ]
        return all(self.rank < rank for rank in waiting)

    def _warn(self, now: float) -> None:
        """Say for whom this rank waits that long, if it is the one to say so."""
        heard = dict(self._heard)  # the other thread may add to it
        busy = {rank: told for rank, (told, _) in heard.items() if told and told.place < self._place}
        if busy and self._speaks():
            rank, told = min(busy.items(), key=lambda item: item[1].place)
            if told.age < self.limit:
                return
            logger.warning(f"rank {rank} has been at {told.at} for {told.age:.0f} s; the others wait", extra=ANY_RANK)


def collectives_begun() -> int:
    """How many collective operations this process has begun, in all groups of main threads; 0 before there is one."""
    if not dist.is_initialized():
        return 0
    try:
        backends: dict[int, Any] = {
            id(backend): backend  # one backend may serve several kinds of device
            for group in list(dist.distributed_c10d._world.pg_map)
            if group.group_desc != BESIDE
            for backend in map(group._get_backend, group._device_types)
        }
        return sum(backend._get_sequence_number_for_group() for backend in backends.values())
    except RuntimeError:  # while a group is built or taken down
        return 0


def connect_to_store(timeout: float) -> Any:
    """A client of the store that torchrun, or rank 0 without it, keeps at MASTER_ADDR."""
    store = dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=False,
        wait_for_workers=False,
        timeout=timedelta(seconds=timeout),
    )
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return dist.PrefixStore(f"sltrain/{attempt}", store)


def _line_of(frame: FrameType | None) -> str:
    """The innermost place in this package, but for distributed.py, where every collective is."""
    package = os.path.dirname(os.path.dirname(__file__))
    while frame is not None:
        file = frame.f_code.co_filename
        if file.startswith(package) and not file.endswith(("distributed.py", "watch.py")):
            return f"{os.path.relpath(file, package)}:{frame.f_lineno}"
        frame = frame.f_back
    return "no line of sltrain"


def _end_process(line: str) -> None:
    """The main thread waits in C++ and cannot be woken: nothing but this ends the process."""
    if line:
        rank = os.environ.get("RANK", "0")
        write_line(f"{'' if rank == '0' else f'[rank {rank}] '}error: {line}", "stderr")
    else:
        time.sleep(1.0)  # torchrun ends all when the first ends: let the line come out
    os._exit(EXIT_CODE)

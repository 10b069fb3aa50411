"""A seed -> the faults of one run: what happens, at which counted event, to which process.

Events are counted (updates, file operations of a save, bytes of a file) and not timed, so that a seed means the same on
every machine. Half of the faults are drawn by the published weights, half by those of what nobody counts (rates.py).
"""

import random
from dataclasses import asdict, dataclass, field
from typing import Any

from .rates import UNCOUNTED_WEIGHTS, published_weights

MAX_STEPS, CHECKPOINT_EVERY, KEEP_LAST = 24, 4, 2
NUM_FAULTS = 5
# File operations of a save of one process, from the making of its folder to the deletion of older ones, and of a start
# before its first update; test_campaign.py counts them.
SAVE_OPERATIONS = 22
SHARE_OPERATIONS = 3  # of a process that writes a share alone: it asks for the folder, opens its file, and syncs it
STARTUP_OPERATIONS = 8
SIGNALS = ("SIGTERM", "SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1")

ENDS_THE_START = {"kill", "node", "hang", "signal", "full", "quota", "torn", "read_dead"}
AT_REST = ("truncated", "flipped", "leftover", "processes")  # done to the folder after a kill


@dataclass
class Fault:
    """One fault. `effect` is what hooks.py does when the event comes; `then` is done to the folder once the start has
    ended."""

    kind: str  # class of rates.py
    effect: str
    step: int  # the update at which it comes, or from which on a save may be hit
    trigger: str  # update, operation (of a save), bytes (of a save), startup, read
    at: Any = None  # before, backward or after an update; number of the operation; share of the file
    rank: int = 0  # modulo the number of processes
    detail: Any = None  # the signal; seconds; how damaged
    then: str | None = None

    @property
    def ends_the_start(self) -> bool:
        return self.effect in ENDS_THE_START

    def __str__(self) -> str:
        where = {"before": "before update", "backward": "in backward of update", "after": "after update"}
        what = f"{self.kind}: {self.detail if self.effect == 'signal' else self.effect}"
        if self.trigger == "update":
            place = f"{where[self.at]} {self.step}"
        elif self.trigger == "operation":
            place = f"at file operation {self.at} of the save of update {self.step} or later"
        elif self.trigger == "bytes":
            place = f"after {self.at:.0%} of the bytes of the save of update {self.step} or later"
        elif self.trigger == "startup":
            place = f"at file operation {self.at} of the start"
        else:
            place = f"at a read after update {self.step}"
        then = "" if self.then is None else f", then {self.then}" + ("" if self.detail is None else f" {self.detail}")
        return f"{what} {place}{f' on rank {self.rank}' if self.rank else ''}{then}"


@dataclass
class Schedule:
    """The faults of one run in the order in which they come."""

    seed: int
    recipe: str
    processes: int  # of the first start
    faults: list[Fault] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def draw(seed: int, recipes: list[str], most_processes: int = 2) -> Schedule:
    """The schedule of a seed. With `most_processes` = 1 every start has one process."""
    rng = random.Random(f"faults {seed}")
    schedule = Schedule(seed, rng.choice(recipes), 1)
    if rng.random() < 0.4:
        schedule.processes = min(2, most_processes)
    steps = sorted(rng.sample(range(1, MAX_STEPS), NUM_FAULTS))
    processes = schedule.processes
    for step in steps:
        fault = _draw_fault(rng, step, processes, most_processes)
        if schedule.recipe.startswith("sharded"):
            _move_to_a_share(rng, fault, processes)
        if fault.then == "processes":
            processes = fault.detail
        schedule.faults.append(fault)
    return schedule


def _draw_fault(rng: random.Random, step: int, processes: int, most_processes: int) -> Fault:
    while True:
        weights = published_weights() if rng.random() < 0.5 else UNCOUNTED_WEIGHTS
        kind = rng.choices(list(weights), list(weights.values()))[0]
        if kind in ("truncated", "flipped") and step < KEEP_LAST * CHECKPOINT_EVERY + 1:
            continue  # the only checkpoint there is: a run rightly refuses to start over
        if kind == "read" and step > 14:
            continue  # all text of the run may have been read
        if kind == "processes" and most_processes == 1:
            continue
        return _fault(rng, kind, step, processes)


def _move_to_a_share(rng: random.Random, fault: Fault, processes: int) -> None:
    """Let a fault of a save hit any of the processes that write it."""
    if fault.trigger in ("operation", "bytes"):
        fault.rank = rng.randrange(processes)
    if fault.trigger == "operation" and fault.rank:
        fault.at %= SHARE_OPERATIONS


def _fault(rng: random.Random, kind: str, step: int, processes: int) -> Fault:
    moment = rng.choice(("before", "backward", "after"))
    rank = rng.randrange(processes)
    if kind in ("process", "node", "hang", "slow"):
        effect = "kill" if kind == "process" else kind
        return Fault(kind, effect, step, "update", moment, rank, detail=0.7 if kind == "slow" else None)
    if kind == "signal":
        return Fault(kind, "signal", step, "update", moment, rank, detail=rng.choice(SIGNALS))
    if kind == "gradient":
        return Fault(kind, "nan", step, "update", "backward", rank)
    if kind == "clock":
        return Fault(kind, "clock", step, "update", "before", rank, detail=rng.choice((-86_400, 3_600, 400 * 86_400)))
    if kind == "save":
        effect = rng.choices(("kill", "node", "signal", "slow"), (6, 1, 2, 1))[0]
        detail = {"signal": rng.choice(SIGNALS), "slow": 0.7}.get(effect)
        return Fault(kind, effect, step, "operation", rng.randrange(SAVE_OPERATIONS), detail=detail)
    if kind == "torn":
        return Fault(kind, "torn", step, "bytes", round(rng.uniform(0.02, 0.98), 3))
    if kind == "full":
        if rng.random() < 0.5:
            return Fault(kind, "quota", step, "bytes", round(rng.uniform(0.02, 0.98), 3))
        return Fault(kind, "full", step, "operation", rng.randrange(SAVE_OPERATIONS // 2))
    if kind == "startup":
        return Fault(kind, "kill", step, "startup", rng.randrange(STARTUP_OPERATIONS))
    if kind == "read":
        return Fault(kind, rng.choice(("read_once", "read_dead")), step, "read", rank=rank)
    assert kind in AT_REST
    detail: Any = {"truncated": round(rng.random(), 3), "flipped": round(rng.random(), 3)}.get(kind)
    if kind == "processes":
        detail = rng.choice([n for n in (1, 2, 4) if n != processes])
    return Fault(kind, "kill", step, "update", moment, rank, detail, then=kind)

"""The goodput of large jobs by the same classes of faults, without training: simulated, and by the formula.

A job on N GPUs fails after an exponential time with mean M = 1 / (N r), r failures a GPU and time. It saves every T
seconds, which blocks training for t seconds, and needs R seconds to start again. Young (1974) and Daly (2006) choose

    T = sqrt(2 M t)        and the share of time that is lost is about  t / T + T / (2 M) + R / M.

The simulation draws the class of every fault by its published weight (rates.py): some lose nothing, some stand still
for long. Goodput is the share of time spent on updates that stay.
"""

import math
import random
from dataclasses import dataclass

from .rates import COSTS, FAILURES_PER_GPU_DAY, published_weights

DAY = 86_400.0
SIZES = (8, 64, 1_024)


@dataclass(frozen=True)
class Job:
    """A job as the prediction sees it; times in seconds."""

    gpus: int
    failures_per_gpu_day: float
    save_seconds: float = 30.0  # that a save blocks training
    restart_seconds: float = 300.0  # from the end of a start to the first update of the next

    @property
    def mean_time_between_faults(self) -> float:
        """Of all classes: SIGTERM comes on top of the failures."""
        return DAY / (self.gpus * self.failures_per_gpu_day * (1 + signals_per_failure()))

    @property
    def best_interval(self) -> float:
        """Seconds of training between two saves, sqrt(2 M t)."""
        return math.sqrt(2 * self.mean_time_between_faults * self.save_seconds)

    def formula(self) -> float:
        """First-order goodput with the best interval; every fault loses half an interval and a restart."""
        mean, interval = self.mean_time_between_faults, self.best_interval
        return 1 - self.save_seconds / interval - interval / (2 * mean) - self.restart_seconds / mean

    def simulate(self, seed: int, num_faults: int = 20_000, interval: float | None = None) -> float:
        """Goodput over so many faults, with a save after every `interval` seconds of training (best_interval)."""
        rng = random.Random(f"{seed} {self}")
        weights = published_weights()
        kinds = rng.choices(list(weights), list(weights.values()), k=num_faults)
        useful = total = 0.0
        since_save = 0.0  # seconds of training that the next fault may lose
        interval = interval or self.best_interval
        for kind in kinds:
            until_fault = rng.expovariate(1 / self.mean_time_between_faults)
            total += until_fault
            trained, since_save = _train(until_fault, since_save, interval, self.save_seconds)
            useful += trained
            cost = COSTS[kind]
            if not cost.ends_the_job:
                continue
            if cost.loses_updates:
                useful -= since_save
            else:
                total += self.save_seconds  # what was trained is saved at the end
            since_save = 0.0
            total += cost.wait_seconds + self.restart_seconds
        return useful / total


def _train(seconds: float, since_save: float, interval: float, save_seconds: float) -> tuple[float, float]:
    """Train and save in turn for so many seconds: (seconds of training, those of them, and of before, not saved)."""
    until_save = interval - since_save
    if seconds < until_save:
        return seconds, since_save + seconds
    rounds, rest = divmod(seconds - until_save, save_seconds + interval)
    trained = until_save + rounds * interval
    if rest < save_seconds:  # the fault comes during a save, which then does not count
        return trained, interval
    return trained + rest - save_seconds, rest - save_seconds


def signals_per_failure() -> float:
    """How many SIGTERM come for one failure."""
    share = published_weights()["signal"]
    return share / (1 - share)


def table(save_seconds: float, restart_seconds: float, seed: int = 0) -> str:
    """Goodput of jobs of SIZES at both published rates, in lines."""
    lines = [f"{'rate':<16} {'GPUs':>5} {'a fault every':>14} {'save every':>11} {'simulated':>10} {'formula':>8}"]
    for name, rate in FAILURES_PER_GPU_DAY.items():
        for gpus in SIZES:
            job = Job(gpus, rate, save_seconds, restart_seconds)
            simulated, formula = f"{job.simulate(seed):.2%}", f"{job.formula():.2%}"
            mean, interval = duration(job.mean_time_between_faults), duration(job.best_interval)
            lines.append(f"{name:<16} {gpus:>5} {mean:>14} {interval:>11} {simulated:>10} {formula:>8}")
    return "\n".join(lines)


def duration(seconds: float) -> str:
    """ "2.5 h": in the largest unit of which there is one."""
    for unit, size in (("days", DAY), ("h", 3_600.0), ("min", 60.0)):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"

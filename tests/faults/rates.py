"""How often training jobs fail, and of what, as published; and the classes of faults that a schedule draws from.

Llama 3 (arXiv 2407.21783, table 5): 419 unexpected interruptions in 54 days on 16,384 H100, 4.7e-4 a GPU and day.
Meta's A100 clusters (arXiv 2410.21680): a mean time to failure of 7.9 h with 1,024 GPUs, 3.0e-3 a GPU and day.
"""

from dataclasses import dataclass

FAILURES_PER_GPU_DAY = {"Llama 3 (H100)": 419 / 54 / 16_384, "Meta RSC (A100)": 24 / 7.9 / 1_024}

# Table 5 of Llama 3, by what a process sees of it; planned maintenance left out.
LLAMA3_CAUSES = {
    "process": {"GPU": 148, "HBM": 72, "software": 54, "SRAM": 19, "GPU processor": 17, "thermal": 6},
    "node": {"host maintenance": 32, "NIC": 7, "power": 3, "other": 10},
    "hang": {"switch or cable": 35, "watchdog": 7},
    "gradient": {"silent data corruption": 6},
    "read": {"disk": 3},
}


def published_weights() -> dict[str, float]:
    """The share of each class among unexpected interruptions, plus SIGTERM (a job's time limit, a shared cluster) at a
    tenth of all; they sum to 1."""
    counts = {name: float(sum(causes.values())) for name, causes in LLAMA3_CAUSES.items()}
    counts["signal"] = 0.1 * sum(counts.values())
    total = sum(counts.values())
    return {name: count / total for name, count in counts.items()}


# What tables of failures do not count, because a job that survives it, or loses a checkpoint by it, files no report.
UNCOUNTED_WEIGHTS = {
    "save": 4.0,  # killed, or asked to stop, between two operations of a save
    "torn": 1.0,  # killed in the middle of a write
    "full": 2.0,  # the disk fills during a save
    "truncated": 1.0,  # a file of the newest checkpoint ends early
    "flipped": 1.0,  # a bit of it differs
    "leftover": 1.0,  # remains of saves that were killed
    "clock": 1.0,  # the time of day jumps
    "slow": 1.0,  # a process stands still for a while
    "startup": 1.0,  # killed before the first update of a start
    "processes": 2.0,  # the next start has another number of processes
    "read": 1.0,  # a read error in the middle of a shard
}


@dataclass(frozen=True)
class Cost:
    """What a fault of a class costs in the predicted run: seconds that the job stands still before it is started again,
    whether updates since the last save are lost, and whether it ends the job at all."""

    wait_seconds: float
    loses_updates: bool = True
    ends_the_job: bool = True


# The restart itself is timed apart. A hang lasts until the timeout of collectives, a dead node until a spare is found.
COSTS = {
    "process": Cost(0.0),
    "node": Cost(120.0),
    "hang": Cost(600.0),
    "gradient": Cost(0.0, loses_updates=False, ends_the_job=False),
    "read": Cost(0.0, loses_updates=False),
    "signal": Cost(0.0, loses_updates=False),
}

"""The learning rate over a run, as a factor of its peak: linear warmup, then one of four shapes.

    n updates, the first w of them warmup, m = min_lr_ratio, p = (k - w) / (n - w)

    update k <= w     k / w
    afterwards
      cosine          m + (1 - m) (1 + cos(pi p)) / 2
      linear          m + (1 - m) (1 - p)
      wsd             1 up to update n - d, then m + (1 - m) (n - k) / d: warmup, stable, decay (MiniCPM, arXiv
                      2404.06395) with a linear decay of d updates (arXiv 2405.18392), by default a tenth of the run
      constant        1; m is not used

Steps count updates from 1. So the first update already moves the weights, the peak is reached at update `warmup_steps`
and the minimum at the very last one. The published code gives update k the factor of k - 1 (PyTorch's LambdaLR): its
first update has learning rate zero and is lost, and its last one stays a hair above the minimum.
"""

import math
from dataclasses import dataclass

SCHEDULES = ("cosine", "linear", "wsd", "constant")


@dataclass(frozen=True)
class RateSchedule:
    """The factor of every update of a run; 0 <= warmup_steps < max_steps, 1 <= decay_steps <= max_steps - warmup_steps.

    `decay_steps` is read by wsd alone.
    """

    name: str  # one of SCHEDULES
    max_steps: int
    warmup_steps: int
    min_lr_ratio: float
    decay_steps: int = 1

    def factor(self, step: int) -> float:
        """Factor of the peak learning rate for update `step`, 1 <= step <= max_steps."""
        n, w, m = self.max_steps, self.warmup_steps, self.min_lr_ratio
        assert 1 <= step <= n and 0 <= w < n, (step, self)
        if step <= w:
            return step / w
        if self.name == "constant" or (self.name == "wsd" and step <= n - self.decay_steps):
            return 1.0
        if self.name == "wsd":
            return m + (1.0 - m) * ((n - step) / self.decay_steps)
        progress = (step - w) / (n - w)
        if self.name == "linear":
            return m + (1.0 - m) * (1.0 - progress)
        return m + (1.0 - m) * 0.5 * (1.0 + math.cos(math.pi * progress))

    def agrees(self, other: "RateSchedule", steps: int) -> bool:
        """Whether the first `steps` updates have the same factors in both, bit for bit."""
        if not steps <= min(self.max_steps, other.max_steps):
            return False
        return all(self.factor(step) == other.factor(step) for step in range(1, steps + 1))


def effective_warmup(warmup_steps: int, max_steps: int) -> tuple[int, str | None]:
    """The warmup of a run of `max_steps` updates, and one line for the user if it is not `warmup_steps`: a warmup that
    does not end before the run becomes a tenth of the run, the share in the paper's recipes."""
    if warmup_steps < max_steps:
        return warmup_steps, None
    shortened = max_steps // 10
    return shortened, f"warmup_steps={warmup_steps} does not fit into {max_steps} steps: {shortened} instead (a tenth)"


def default_decay(warmup_steps: int, max_steps: int) -> int:
    """A tenth of the run, at least one update and no more than there are after the warmup."""
    return max(1, min(max_steps // 10, max_steps - warmup_steps))

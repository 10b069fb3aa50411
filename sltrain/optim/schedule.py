"""The learning rate over a run, as a factor of its peak: linear warmup, then half a cosine down to `min_lr_ratio`.

    step k <= warmup:   k / warmup
    afterwards:         min + (1 - min) * (1 + cos(pi * (k - warmup) / (max_steps - warmup))) / 2

Steps count updates from 1. So the first update already moves the weights, the peak is reached at update `warmup_steps`
and the minimum at the very last one. The published code gives update k the factor of k - 1 (PyTorch's LambdaLR): its
first update has learning rate zero and is lost, and its last one stays a hair above the minimum.
"""

import math


def warmup_cosine(step: int, max_steps: int, warmup_steps: int, min_lr_ratio: float) -> float:
    """Factor of the peak learning rate for update `step`; 1 <= step <= max_steps, 0 <= warmup_steps < max_steps."""
    assert 1 <= step <= max_steps and 0 <= warmup_steps < max_steps, (step, warmup_steps, max_steps)
    if step <= warmup_steps:
        return step / warmup_steps
    progress = (step - warmup_steps) / (max_steps - warmup_steps)
    return min_lr_ratio + (1.0 - min_lr_ratio) * 0.5 * (1.0 + math.cos(math.pi * progress))


def effective_warmup(warmup_steps: int, max_steps: int) -> tuple[int, str | None]:
    """The warmup of a run of `max_steps` updates, and one line for the user if it is not `warmup_steps`: a warmup that
    does not end before the run becomes a tenth of the run, the share in the paper's recipes."""
    if warmup_steps < max_steps:
        return warmup_steps, None
    shortened = max_steps // 10
    return shortened, f"warmup_steps={warmup_steps} does not fit into {max_steps} steps: {shortened} instead (a tenth)"

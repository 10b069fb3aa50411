"""How long processes of a planned run wait for each other: bytes they send in an update, beside its arithmetic.

Equations are in planning/traffic.py. `bandwidth=` is what one process can send, in GB/s, while it receives as much; on
several machines that of the slowest link that its ring crosses, shared by the processes that use it: 8 GPUs on one
400 Gbit/s card have 6.25 each.
"""

from sltrain.api.plan_columns import plan_device, planned_model
from sltrain.api.plan_config import PlanConfig
from sltrain.building.memory import sharding_of, update_shape, whole_bytes
from sltrain.config import TrainConfig
from sltrain.planning.traffic import Traffic, compute_seconds, plan_traffic


def traffic_lines(config: TrainConfig, plan: PlanConfig) -> tuple[list[str], dict[str, float]]:
    """The communication of a run with several processes: as lines, and as numbers in bytes and seconds."""
    model, device = planned_model(config), plan_device(config)
    sharding = sharding_of(config, plan.num_processes)
    shape = update_shape(config, device, model, plan.num_processes, sharding)
    whole = 0 if sharding is None else whole_bytes(config, model, sharding.num_shards)
    traffic = plan_traffic(model, shape, plan.num_processes, whole)
    numbers = {
        "all_gather_forward_bytes": traffic.gather_forward,
        "all_gather_backward_bytes": traffic.gather_backward,
        "reduce_scatter_bytes": traffic.reduce_scatter,
        "all_reduce_bytes": traffic.all_reduce,
        "whole_tensors_bytes": traffic.whole_tensors,
        "total_bytes": traffic.total,
    }
    line = f"an update sends {traffic.total / 1e9:.2f} GB from each process ({_parts(traffic)})"
    if plan.bandwidth is None:
        return [f"{line}; bandwidth= (GB/s a process) says how long that takes"], numbers
    seconds = numbers["seconds"] = traffic.seconds(plan.bandwidth)
    line += f": {seconds:.3g} s at bandwidth={plan.bandwidth:g} GB/s"
    if config.peak_tflops is None:
        return [f"{line}; peak_tflops= (of the card) compares it with the arithmetic"], numbers
    arithmetic = numbers["compute_seconds"] = compute_seconds(model, shape, config.peak_tflops)
    share = seconds / arithmetic
    verdict = (
        f"{share:.0%} of it, which can be hidden behind it"
        if share < 1
        else f"{share:.1f} times as long, so communication decides the speed"
    )
    line += (
        f"; its arithmetic takes {arithmetic:.3g} s at peak_tflops={config.peak_tflops:g}: communication is {verdict}"
    )
    return [line], numbers


def _parts(traffic: Traffic) -> str:
    parts = {
        "all-gather forward": traffic.gather_forward,
        "all-gather backward": traffic.gather_backward,
        "reduce-scatter": traffic.reduce_scatter,
        "all-reduce": traffic.all_reduce,
        "whole tensors for the optimizer": traffic.whole_tensors,
    }
    return ", ".join(f"{name} {size / 1e9:.2f}" for name, size in parts.items() if size)

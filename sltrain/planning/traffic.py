"""What the processes of a run send each other in an update, and how long that takes beside its arithmetic.

A rank sends, and receives, of S bytes over n ranks (ring algorithms, as nccl-tests counts bus bandwidth,
github.com/NVIDIA/nccl-tests/blob/master/doc/PERFORMANCE.md):

    all-gather of S, reduce-scatter of S   (n - 1) / n S          all-reduce of S   2 (n - 1) / n S

    ddp    all-reduce of the gradients, once an update
    fsdp   all-gather of all weights in forward, and of the decoder layers again in backward; reduce-scatter of the
           gradients: each micro-batch
    hsdp   the same over the ranks of one replica, and an all-reduce of a shard over the replicas
    both   where the optimizer works on whole tensors (engine/owners.py), of S bytes in all: rows of weight and gradient
           to the owner, and of the weight back, 3 (n - 1) / n^2 S, once an update

    seconds of communication   bytes / bandwidth
    seconds of arithmetic      FLOPs / peak: 6 a multiply-add, with activation checkpointing 8 in decoder layers

Both are lower bounds, and they overlap: what is less than the arithmetic can be hidden behind it. Evaluation, counters
and checkpoints are not counted.
"""

import dataclasses
from dataclasses import dataclass

from sltrain.models.llama import LlamaForCausalLM
from sltrain.planning.flops import attention_multiply_adds, linear_multiply_adds
from sltrain.planning.sharding import Sharding
from sltrain.planning.stages import UpdateShape


@dataclass(frozen=True)
class Traffic:
    """Bytes that one rank sends in an update, by what for; it receives as many."""

    gather_forward: float = 0.0
    gather_backward: float = 0.0
    reduce_scatter: float = 0.0
    all_reduce: float = 0.0
    whole_tensors: float = 0.0  # to their owners and back

    @property
    def total(self) -> float:
        return sum(dataclasses.astuple(self))

    def seconds(self, bandwidth: float) -> float:
        """At least so long; `bandwidth` in 1e9 bytes a second that a rank can send while it receives."""
        return self.total / (bandwidth * 1e9)


def plan_traffic(model: LlamaForCausalLM, shape: UpdateShape, num_processes: int, whole_bytes: int = 0) -> Traffic:
    """The traffic of an update of `shape` on each of `num_processes`, where tensors of `whole_bytes` are updated as a
    whole. Works on the meta device."""
    if shape.sharding is None:
        gradients = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
        return Traffic(all_reduce=2 * _share(num_processes) * gradients)
    of_weights = _sharded(model, shape.sharding, shape.num_micro_batches)
    n = shape.sharding.num_shards
    return dataclasses.replace(of_weights, whole_tensors=3 * _share(n) / n * whole_bytes)


def _sharded(model: LlamaForCausalLM, sharding: Sharding, num_micro_batches: int) -> Traffic:
    layers = [p for layer in model.model.layers for p in layer.parameters()]
    again = sharding.gathered_bytes(layers) if sharding.reshards else 0
    gathered = sharding.gathered_bytes(model.parameters())
    reduced = sharding.reduced_bytes(model.parameters())
    times = num_micro_batches if sharding.reduces_each else 1
    share = _share(sharding.num_shards)
    return Traffic(
        gather_forward=num_micro_batches * share * gathered,
        gather_backward=num_micro_batches * share * again,
        reduce_scatter=times * share * reduced,
        all_reduce=times * 2 * _share(sharding.replicas) * reduced / sharding.num_shards,
    )


def _share(number: int) -> float:
    return (number - 1) / number


def compute_seconds(model: LlamaForCausalLM, shape: UpdateShape, peak_tflops: float) -> float:
    """At least so long does a rank's arithmetic of an update take, on a device with this peak. Raises ValueError for a
    layer that cannot count its work."""
    config = model.config
    layers = sum(map(linear_multiply_adds, model.model.layers))
    layers += attention_multiply_adds(config.num_hidden_layers, config.hidden_size, shape.seq_len)
    again = 2 * layers if model.model.activation_checkpointing else 0
    flops = 6 * (layers + linear_multiply_adds(model.lm_head)) + again
    return flops * shape.num_rows * shape.num_micro_batches / (peak_tflops * 1e12)

"""The bytes of a run at the moment when most are in use: what is always there, and the highest of an update's stages.

stages.py has the equations of one process with whole weights, sharded_stages.py those of weights in shards. Not
included: memory of the driver and the libraries, and what an allocator loses by rounding.
"""

from dataclasses import dataclass, replace

from sltrain.models.llama import LlamaForCausalLM
from sltrain.planning.accounting import stored_bytes
from sltrain.planning.sharded_stages import ShardedParts
from sltrain.planning.stages import BETWEEN_UPDATES, STAGES, Groups, Parts, UpdateShape

GROUPS = (
    "dense_weights low_rank_weights sparse_values indices optimizer_state gradients ddp_buckets gathered_weights"
    " reduce_buffers activations logits temporaries"
).split()
NUM_STORED = 4  # of these are stored in the model


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes at the moment when most are in use."""

    groups: dict[str, int]  # name -> bytes: those of GROUPS, and between them other groups of `stored_bytes`
    stage: str  # of an update, one of STAGES
    phase: str = ""  # of the run (engine/actions.py), where it has several

    @property
    def total_bytes(self) -> int:
        return sum(self.groups.values())


def plan_memory(
    model: LlamaForCausalLM,
    shape: UpdateShape,
    optimizer_state: int,
    stored: dict[str, int] | None = None,
    update_temporaries: int = 0,
    action_temporaries: int = 0,
    action_passes: bool = False,
) -> MemoryPlan:
    """The plan for a model on any device, meta included. Raises ValueError for a layer of unknown kind.

    `optimizer_state` are the optimizer's bytes, `update_temporaries` what it allocates during an update, and
    `action_temporaries` what an action between updates does, which `action_passes` a micro-batch through the model or
    does not; `stored` are the stored bytes of another layout than the
    model's own (published.py).
    """
    parts = (Parts if shape.sharding is None else ShardedParts)(model, shape, update_temporaries)
    always = {**(stored or stored_bytes(model)), "optimizer_state": optimizer_state}
    stages = {name: parts.stage(name) for name in STAGES}
    if action_passes:
        stages["action"] |= _pass(model, shape)
    stages["action"]["temporaries"] += action_temporaries
    highest = max(STAGES, key=lambda name: sum(stages[name].values()))
    at_peak = {**always, **stages[highest]}
    others = [name for name in always if name not in GROUPS]
    names = [*GROUPS[:NUM_STORED], *others, *GROUPS[NUM_STORED:]]
    return MemoryPlan({name: at_peak.get(name, 0) for name in names}, highest)


def _pass(model: LlamaForCausalLM, shape: UpdateShape) -> Groups:
    """The highest moment of one micro-batch, forward and backward, whose gradients are dropped as they come."""
    parts = Parts(model, replace(shape, num_micro_batches=1, per_layer_update=True, uses_ddp=False), 0)
    moments = [parts.stage(name) for name in STAGES if name not in ("update", *BETWEEN_UPDATES)]
    highest = max(moments, key=lambda moment: sum(moment.values()))
    return {name: highest[name] for name in ("gradients", "activations", "logits", "temporaries")}

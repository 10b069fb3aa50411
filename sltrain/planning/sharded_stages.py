"""The stages of an update where each rank holds a shard of the weights, and gathers one decoder layer after the other.

    G_i  a layer's weights, gathered            R_i  the buffer in which its gradients are summed
    g_i  its gradients, as backward gives them  s_i  a rank's shard of them, once summed
    root: embedding, last norm and head, gathered from the beginning of forward to the end of backward; g likewise

    always              shards of weights, optimizer state; buffers whole                            (sharding.py)
    a gather            G_i in the order of ranks, then G_i as parameters; the former is freed when the next gather has
                        begun (forward), or at once (backward)
    loss                G_root + G_L, the buffer of the last layer's gather
    layer i backward    G_root + G_i + G_(i-1), which is fetched early; R_(i+1), not freed before the next sum;
                        g of the head, the layer's so far, and s_j of all layers above
    layer i is summed   G_root + G_(i-1) + R_i + g_i + g of the head + s_j of layers from i on
    root is summed      R_root + g_root + s of everything
    optimizer step      s of everything

With per-layer updates s_i is gone when layer i is updated, beside R_i. With replicas PyTorch keeps s_j, in the dtype of
the sum, until backward is over, and nothing is gone before. With several micro-batches s of everything waits for the
last one, or, where only the last one is summed, g of everything. Where gathered weights stay after forward, those of
all layers below are there too, and nothing is fetched. On a CPU gloo gathers into a second buffer; its threads may free
one a little later, which is not counted. Source: FSDPParamGroup and foreach_reduce in torch 2.13, measured by
tests/planning/test_sharded_plan.py. Temporaries and activations are those of whole weights (stages.py).
"""

from sltrain.models.llama import DecoderLayer, LlamaForCausalLM
from sltrain.planning.stages import BETWEEN_UPDATES, Groups, Parts, UpdateShape


class ShardedParts(Parts):
    """The terms of the stages, in bytes, for `shape.sharding`."""

    def __init__(self, model: LlamaForCausalLM, shape: UpdateShape, update_temporaries: int = 0) -> None:
        super().__init__(model, shape, update_temporaries)
        assert shape.sharding is not None
        self.sharding = sharding = shape.sharding
        self.on_gloo = shape.device_type == "cpu"
        units = [list(layer.parameters()) for layer in self.layers]
        inside = {p for unit in units for p in unit}
        root = [p for p in model.parameters() if p not in inside]
        self.gathered = list(map(sharding.gathered_bytes, units))
        self.reduced = list(map(sharding.reduced_bytes, units))
        self.whole = list(map(sharding.whole_gradient_bytes, units))
        self.shards = list(map(sharding.gradient_shard_bytes, units))
        self.rounded = list(map(sharding.rounded_bytes, units))
        self.root_gathered, self.root_reduced = sharding.gathered_bytes(root), sharding.reduced_bytes(root)
        self.root_whole = sharding.whole_gradient_bytes(root)
        self.waiting, self.root_waiting = list(map(sharding.waiting_bytes, units)), sharding.waiting_bytes(root)
        self.root_shards = sharding.gradient_shard_bytes(root)

    def update_stages(self) -> list[str]:
        """Where the optimizer works; of per-layer updates that is a moment of its own, see `_updated`."""
        return [] if self.shape.per_layer_update else ["update"]

    def stage(self, name: str) -> Groups:
        """Bytes by group in one of STAGES at its highest moment, besides what is always there."""
        return max(self._moments(name), key=lambda moment: sum(moment.values()))

    def _moments(self, name: str) -> list[Groups]:
        last = len(self.layers) - 1
        if name == "first layer backward":
            return [moment for i in {last, max(last - 1, 0)} for moment in self._layer(i)]
        if name == "last layer backward":
            return [moment for i in {min(1, last), 0} for moment in self._layer(i)]
        if name == "embedding backward":
            return self._root()
        alone = super().stage(name)
        between = name in BETWEEN_UPDATES
        head = self.head_whole if name.startswith("head") else 0
        gradients = 0 if between else self._finished(last) + head
        if name == "update":
            gradients = 0 if self.shape.per_layer_update else sum(self.shards) + self.root_shards
        gathered = self.root_gathered + (self.gathered[last] if self.sharding.reshards else sum(self.gathered))
        if name == "task answers":
            layers = 2 * max(self.gathered) if self.sharding.reshards else sum(self.gathered)
            gathered = self.root_gathered + layers
        elif name in ("update", "action"):
            gathered = 0
        return [{**alone, "gradients": gradients, "gathered_weights": gathered, "reduce_buffers": 0}]

    @property
    def adds_in_place(self) -> bool:
        """Whether gradients are added to those that wait from the micro-batches before."""
        return self.shape.num_micro_batches > 1 and not self.sharding.reduces_each and self.waiting == self.whole

    @property
    def head_whole(self) -> int:
        """Bytes of the head's whole gradient."""
        return self.head_gradient // self.weight_element * (self.sharding.gathered_element or self.weight_element)

    def _layer(self, i: int) -> list[Groups]:
        """In the backward of layer i, and when its gradients are summed."""
        layer = self.layers[i]
        after = self.layers[i + 1] if i + 1 < len(self.layers) else None
        passed: DecoderLayer | None = after if after is not None and after.takes else None
        temporary, new = self._peak(layer, passed)
        fetched = self.gathered[i - 1] if i > 0 and self.sharding.reshards else 0
        kept = self.root_gathered + (0 if self.sharding.reshards else sum(self.gathered[:i]))
        gradients = self._finished(i) + (0 if self.adds_in_place else self.head_whole)
        together = self.computed_with(i) if self.sharding.reshards else range(i, i + 1)
        waiting = self.reduced[i + 1] if after is not None else 0
        fetches = {
            "activations": self.inputs_at(i),
            "temporaries": self.hidden,
            "gradients": gradients,
            "gathered_weights": kept + self.gathered[i] + fetched * (2 if self.on_gloo else 1),
            "reduce_buffers": waiting,
        }
        inside = {
            "activations": self.kept_at(i),
            "temporaries": temporary,
            "gradients": gradients + new,
            "gathered_weights": kept + sum(self.gathered[j] for j in together) + fetched,
            "reduce_buffers": waiting,
        }
        summed = {
            "activations": self.kept_at(i - 1) if i > 0 else self.inputs,
            "temporaries": self.hidden + self.rounded[i],
            "gradients": gradients + (0 if self.adds_in_place else self.whole[i]) + self.shards[i],
            "gathered_weights": kept + fetched,
            "reduce_buffers": self.reduced[i],
        }
        return [self._in_order(moment) for moment in (fetches, inside, summed, *self._updated(summed, self.whole[i]))]

    def _root(self) -> list[Groups]:
        """When the embedding's gradient comes, and when those of the root are summed."""
        alone = super().stage("embedding backward")
        root = 0 if self.adds_in_place else self.root_whole
        gradients = self._finished(-1) + root + (self.head_whole if self.is_tied else 0)
        arrives = {
            **alone,
            "gradients": gradients,
            "gathered_weights": self.root_gathered,
            "reduce_buffers": self.reduced[0],
        }
        summed = {
            **alone,
            "activations": 0,
            "gradients": self._finished(-1) + root + self.root_shards,
            "gathered_weights": 0,
            "reduce_buffers": self.root_reduced,
        }
        return [self._in_order(moment) for moment in (arrives, summed, *self._updated(summed, root))]

    def _updated(self, summed: Groups, whole: int) -> list[Groups]:
        """With per-layer updates, when the optimizer works: whole gradients are gone then."""
        if not self.shape.per_layer_update:
            return []
        gradients = summed["gradients"] - (0 if self.adds_in_place else whole)
        return [{**summed, "gradients": gradients, "temporaries": summed["temporaries"] + self.update_temporaries}]

    def _finished(self, i: int) -> int:
        """Bytes of gradients that exist while layer i (-1: the root) is in backward, besides its own."""
        sums = sum(self.reduced[i + 1 :]) // self.sharding.num_shards if self.sharding.replicas > 1 else 0
        above = 0 if self.shape.per_layer_update else sum(self.shards[i + 1 :])
        if self.shape.num_micro_batches > 1 and self.sharding.reduces_each:
            if self.shape.per_layer_update and self.shape.num_micro_batches == 2:  # the second frees those of the first
                return max(sum(self.shards[i + 1 :]), sum(self.shards[: i + 1]) + self.root_shards + sums)
            return sum(self.shards) + self.root_shards + sums
        if not any(self.rounded):  # gradients are views of the sums
            above = max(above, sums)
        else:
            above += sums
        if self.shape.num_micro_batches > 1:
            return sum(self.waiting[: i + 1]) + self.root_waiting + above
        return above

    def _in_order(self, moment: Groups) -> Groups:
        return {"logits": 0, "ddp_buckets": 0, **moment}

"""Where every byte of training goes, before anything is allocated.

    N = B T rows of a micro-batch, e bytes a number (of an activation), D hidden size, I feed-forward size, H heads, G
    key/value heads of size d, V vocabulary, L layers; "kept": from forward to backward

    always           weights, indices of S, optimizer state
    kept, a layer    e N (6 D + 2 G d + 2 I)    both norms' inputs and outputs, q, k, v, the attention's output; gate
                                                and up
                     4 N (2 + H)                the norms' divisors, the softmax's
                     and the `footprint` of projections: N r e of each factored or low-rank one
                     with activation checkpointing e N D, the layer's input; the rest for one layer at a time, with
                     another e N I for the product of gate and up
                     where projections recompute (method=cola method.recompute=true) 2 e N D + 8 N and their
                     footprint alone; in backward the rest for one half of one layer at a time
                     where a layer takes outputs of the one before (models/projections.py) e N (3 D + G d) more: of q,
                     k, o and down; v, gate and up are there already. Such layers are recomputed several at a time, and
                     all that goes from one segment to the next is kept
                     with attention=document e B T^2, the mask of all layers, and 8 B T d of rotary tables
    loss             what models/loss.py keeps, a chunk of logits, and the gradient of the head
    gradients        ordinary: all of them at the end of backward. Per-layer update: the largest that exist at once.
                     Gradients that wait for the next micro-batch, and DDP's buckets, exist all the time.
    mixed precision  weights, gradients and moments of 4 bytes, e = 2; weights and their gradients exist as bfloat16
                     too, inside one call (the layers' `footprint`s, the loss)
                     The former are not in the buckets: DDP moves them there in the last backward.
    task answers     with eval_tasks, without gradients: N = the longest row that the model reads, however small a
                     micro-batch is; e N max(12 D, 3 D + 4 I) for one layer, and where the model writes text the keys
                     and values of all layers, 2 e L N G d

Memory rises and falls within an update; `STAGES` are the moments at which it can be highest, and the plan is the
highest of them. Not included: memory of the driver and the libraries, and what an allocator loses by rounding. Rows are
counted as if none were padded.
"""

import itertools
from dataclasses import dataclass
from typing import Any

from torch import nn

from sltrain.layers.base import Footprint, Rows, footprint, gradient_bytes
from sltrain.models.llama import PROJECTIONS, DecoderLayer, LlamaForCausalLM
from sltrain.models.loss import default_chunk_rows, keeps_logit_gradients
from sltrain.planning.sharding import Sharding

STAGES = (
    "loss",
    "head backward",
    "head update",  # inside backward, with per-layer updates
    "first layer backward",
    "last layer backward",
    "embedding backward",
    "update",
    "action",  # between updates, without gradients
    "task answers",  # of eval_tasks, between updates
)
BETWEEN_UPDATES = STAGES[-2:]
Groups = dict[str, int]  # what bytes are for -> how many


@dataclass(frozen=True)
class UpdateShape:
    """The properties of an update on one rank that its memory depends on."""

    batch_size: int  # sequences of a micro-batch
    seq_len: int
    num_micro_batches: int = 1
    per_layer_update: bool = False
    uses_ddp: bool = False
    device_type: str = "cuda"
    has_kernel: bool = False  # whether products with S run through the CPU kernel
    per_document: bool = False  # attention=document
    task_rows: int = 0  # positions of the largest pass of eval_tasks; 0: there are none
    sharding: Sharding | None = None  # how the weights are divided over ranks; None: each has all of them

    @property
    def num_rows(self) -> int:
        return self.batch_size * self.seq_len


class Parts:
    """The terms of the stages, in bytes; `update_temporaries` are those of the optimizer while it works."""

    def __init__(self, model: LlamaForCausalLM, shape: UpdateShape, update_temporaries: int = 0) -> None:
        self.shape, self.config, self.update_temporaries = shape, model.config, update_temporaries
        embedding, head = model.model.embed_tokens, model.lm_head
        self.element, self.weight_element = model.compute_dtype.itemsize, head.weight.element_size()
        self.is_mixed = self.element < self.weight_element
        head_size = model.model.head_size
        self.document_bytes = (
            shape.per_document
            * shape.num_rows
            * (self.element * shape.seq_len + 2 * 4 * head_size + 8 * shape.num_micro_batches)
        )  # mask, rotary tables, positions
        self.checkpointing = model.model.activation_checkpointing
        self.hidden = self.element * shape.num_rows * model.config.hidden_size  # one (N, D)
        self.wide = self.element * shape.num_rows * model.config.intermediate_size  # one (N, I)
        self.vocabulary_size = head.out_features
        self.all_gradients = gradient_bytes(model)
        self.is_tied = not isinstance(head, nn.Linear)
        self.head_gradient = gradient_bytes(embedding if self.is_tied else head)
        self.embedding_gradient = gradient_bytes(embedding)
        self._of_layers([[layer for layer, _ in segment] for segment in model.model.segments()])

    def _of_layers(self, segments: list[list[DecoderLayer]]) -> None:
        """The terms of the decoder layers, of which those of a segment are recomputed together."""
        layers = [layer for segment in segments for layer in segment]
        self.layers, self.segments, self.num_layers = layers, segments, len(layers)
        self.projected = max(map(self._projections, layers)) if self.shape.task_rows else 0
        own = {layer: self._kept(layer) for layer in layers}
        taken = {layer: self._taken(layer, *PROJECTIONS) for layer in layers}
        more = {layer: self._taken(layer, "q_proj", "k_proj", "o_proj", "down_proj") for layer in layers}
        self.all_kept = sum(own.values()) + sum(more.values())
        self.kept_alone = [own[layer] + more[layer] for layer in layers]
        self.segment_inputs = [self.hidden + taken[segment[0]] for segment in segments]
        self.inputs_kept = sum(self.segment_inputs)
        recomputed = [sum(own[layer] + more[layer] for layer in segment) - more[segment[0]] for segment in segments]
        self.recomputed, self.segment_kept = recomputed, max(recomputed)
        self.top_peak = max((self._peak(layer, None) for layer in layers), key=sum)
        # While backward goes through the first segment, activations go and gradients come: most at one of its ends.
        first = segments[0] if self.checkpointing else segments[0][:1]
        ends = [(own[first[0]], 0), (recomputed[0], sum(map(gradient_bytes, first[1:])))]
        self.bottom_kept, self.bottom_missing = max(ends[: len(first)], key=lambda end: end[0] - end[1])
        after = [*layers[1:], None]
        if after[0] is not None and after[0].takes:  # what it passes on makes the MLP's backward the peak: attention's
            self.bottom_missing += gradient_bytes(first[0].self_attn)  # gradients come later
        if first[0].recomputes:  # so little is kept that the peak comes early: before nearly all of its gradients
            self.bottom_missing += gradient_bytes(first[0]) - gradient_bytes(first[0].mlp.down_proj)
        self.bottom_peak = max((self._peak(*pair) for pair in zip(first, after, strict=False)), key=sum)

    def _taken(self, layer: DecoderLayer, *names: str) -> int:
        """Bytes of the layer before's outputs of these projections that the layer takes."""
        projections: dict[str, Any] = {**layer.self_attn._modules, **layer.mlp._modules}
        sizes: list[int] = [projections[name].out_features for name in layer.takes if name in names]
        return sum(sizes) * self.element * self.shape.num_rows

    def _footprints(self, layer: DecoderLayer, num_rows: int | None = None) -> list[Footprint]:
        """Of q, k, v together; o; gate and up together; down. None: for the rows of a micro-batch."""
        attention, mlp = layer.self_attn, layer.mlp
        together = (
            [attention.q_proj, attention.k_proj, attention.v_proj],
            [attention.o_proj],
            [mlp.gate_proj, mlp.up_proj],
            [mlp.down_proj],
        )
        rows = Rows(self.shape.num_rows if num_rows is None else num_rows, self.element, self.shape.has_kernel)
        return [footprint(layers, rows) for layers in together]

    def _kept(self, layer: DecoderLayer) -> int:
        """Bytes that one decoder layer keeps, besides outputs of the layer before."""
        attention, num_rows = layer.self_attn, self.shape.num_rows
        projections = sum(each.kept for each in self._footprints(layer))
        if layer.recomputes:
            return (4 if layer.keeps_normed else 2) * self.hidden + 4 * num_rows * 2 + projections
        kept = 6 * self.hidden + (2 + layer.mlp.keeps_product) * self.wide + 2 * self._keys(layer)
        return kept + 4 * num_rows * (2 + attention.num_heads) + projections

    def _keys(self, layer: DecoderLayer) -> int:
        """Bytes of a layer's keys, one (N, G d)."""
        return self.element * self.shape.num_rows * layer.self_attn.num_kv_heads * layer.self_attn.head_size

    def _peak(self, layer: DecoderLayer, after: DecoderLayer | None) -> tuple[int, int]:
        """Temporaries and new gradients at the peak of one layer's backward. `after` is the layer after it, if that has
        passed on gradients of the outputs that it took."""
        if layer.recomputes:
            temporary, gradients = max(self._again(layer), key=sum)
            return self.hidden + temporary, gradients
        _, _, gate_up, down = self._footprints(layer)
        product = 0 if layer.mlp.keeps_product else self.wide  # recomputed
        passed = [self._taken(layer, *names) for names in (["down_proj"], ["gate_proj", "up_proj"])]
        waiting = [0 if after is None else self._taken(after, *PROJECTIONS[:number]) for number in (7, 6, 4)]
        # Beside the gradient of the residual stream:
        moments = [
            # down_proj computes the gradient of the product
            (product + self.wide + down.temporary + passed[0] + waiting[0], down.gradients),
            # the gradient of the gate and silu(gate) are allocated, the product is freed
            (product + 2 * self.wide + passed[0] + waiting[1], 0),
            # gate and up are freed too
            (product + self.hidden - self.wide + gate_up.temporary + sum(passed) + waiting[2], gate_up.gradients),
        ]
        temporary, gradients = max(moments, key=sum)
        return self.hidden + temporary, gradients

    def _again(self, layer: DecoderLayer) -> list[tuple[int, int]]:
        """Temporaries and new gradients in backward of a layer that computes again what is wide, beside the gradient of
        the residual stream."""
        qkv, o, gate_up, down = self._footprints(layer)
        attended = 2 * self.hidden + 2 * self._keys(layer)  # q, k, v and the attention's output
        return [
            (4 * self.wide + down.temporary, down.gradients),  # gate, up, their product, its gradient
            (5 * self.wide, 0),  # gate, up, the gradients of their product and of the gate, silu(gate)
            (2 * self.wide + self.hidden + gate_up.temporary, gate_up.gradients),  # gradients of gate and up
            (attended + self.hidden + o.temporary, o.gradients),
            (2 * attended, 0),  # and their gradients
            (attended + self.hidden + qkv.temporary, qkv.gradients),
        ]

    def _projections(self, layer: DecoderLayer) -> int:
        """The most that the projections of a layer take in a pass of eval_tasks besides their results."""
        return max(part.kept + part.temporary for part in self._footprints(layer, self.shape.task_rows))

    def _task_answers(self) -> int:
        """Bytes of a pass of eval_tasks: one layer's, beside the cache of all."""
        shape, c = self.shape, self.config
        if not shape.task_rows:
            return 0
        one_number = self.element * shape.task_rows
        kv_size = c.hidden_size * (c.num_key_value_heads or c.num_attention_heads) // c.num_attention_heads
        layer = max(12 * c.hidden_size, 3 * c.hidden_size + 4 * c.intermediate_size)
        return one_number * (layer + 2 * self.num_layers * kv_size) + self.projected

    @property
    def inputs(self) -> int:
        """Bytes of what an update reads and builds once for all layers."""
        shape = self.shape
        return (
            32 * shape.num_rows * shape.num_micro_batches + self.document_bytes
        )  # ids, labels, targets, places: int64

    def computed_with(self, i: int) -> range:
        """The layers up to i that are recomputed in one piece with it and not yet through with their backward."""
        if not self.checkpointing:
            return range(i, i + 1)
        return range(sum(map(len, self.segments[: self._segment_of(i)])), i + 1)

    def inputs_at(self, i: int) -> int:
        """As `kept_at`, before anything is recomputed."""
        if not self.checkpointing:
            return self.kept_at(i)
        return self.inputs + sum(self.segment_inputs[: self._segment_of(i) + 1])

    def _segment_of(self, i: int) -> int:
        """The number of layer i's segment."""
        return next(n for n, end in enumerate(itertools.accumulate(map(len, self.segments))) if end > i)

    def kept_at(self, i: int) -> int:
        """Bytes of activations, inputs included, when the backward of layer i begins."""
        if not self.checkpointing:
            return self.inputs + sum(self.kept_alone[: i + 1])
        return self.inputs_at(i) + self.recomputed[self._segment_of(i)] - self.hidden

    def update_stages(self) -> list[str]:
        """Where the optimizer works."""
        if not self.shape.per_layer_update:
            return ["update"]
        return ["embedding backward"] if self.is_tied else ["head update", "embedding backward"]

    def stage(self, name: str) -> Groups:
        """Bytes by group in one of STAGES, besides what is always there."""
        shape, every, head, embedding = self.shape, self.all_gradients, self.head_gradient, self.embedding_gradient
        (top_temporary, top), (bottom_temporary, bottom) = self.top_peak, self.bottom_peak
        kept = self.inputs_kept if self.checkpointing else self.all_kept
        kept += self.inputs
        top_kept = kept + (self.segment_kept - self.hidden if self.checkpointing else 0)  # its input is in `kept`
        bottom_kept = self.bottom_kept + self.document_bytes
        kept += 2 * self.hidden + 4 * shape.num_rows  # the last norm's input and output
        loss, loss_backward, loss_temporary = self._loss()
        waiting = head if self.is_tied else 0  # the head's part, until the embedding's is there
        others = every - embedding - bottom - self.bottom_missing + waiting
        cast = self.hidden // self.element * self.weight_element if self.is_mixed else 0  # the embedding's (N, D)
        activations, logits, temporaries, new, finished = {  # the last two: gradients
            "loss": (kept, loss, 0, 0, 0),
            "head backward": (kept, loss_backward, loss_temporary, head, 0),
            "head update": (kept, self.hidden, 0, head, 0),
            "first layer backward": (top_kept, 0, top_temporary, top, head),
            "last layer backward": (bottom_kept, 0, bottom_temporary, bottom, others),
            "embedding backward": (self.hidden + cast, 0, 0, embedding, every - embedding + waiting),
            "update": (0, 0, 0, 0, every),
            "action": (0, 0, 0, 0, 0),
            "task answers": (self._task_answers(), 0, 0, 0, 0),
        }[name]
        in_backward = waiting if name.endswith(("layer backward", "embedding backward")) else 0
        if shape.num_micro_batches > 1 and name not in BETWEEN_UPDATES:
            finished = every + in_backward  # of the micro-batches before
        elif shape.per_layer_update or shape.uses_ddp:
            finished = in_backward  # the others are applied, or in DDP's buckets
        return {
            "ddp_buckets": every if shape.uses_ddp else 0,
            "gradients": finished + new,
            "activations": activations,
            "logits": logits,
            "temporaries": temporaries + (self.update_temporaries if name in self.update_stages() else 0),
        }

    def _loss(self) -> tuple[int, int, int]:
        """Bytes while the loss is computed, with a chunk of logits; in its backward, with the gradient of the last
        norm's output; and temporaries there. The head's gradient counts as a gradient when backward returns it."""
        num_rows, rounds = self.shape.num_rows, self.element < 4  # a narrower dtype is computed in float32, and rounded
        weight = self.hidden // num_rows * self.vocabulary_size  # W in the dtype of h, or the product dlogits^T h
        cast = weight if self.is_mixed else 0
        chunk_rows = min(num_rows, default_chunk_rows(self.vocabulary_size, self.shape.device_type))
        chunk = chunk_rows * self.vocabulary_size * (8 + self.element * rounds)  # the product, in float32; log-softmax
        if self.head_gradient > 0 and keeps_logit_gradients(
            num_rows, self.config.hidden_size, self.element, self.weight_element
        ):
            kept = 2 * self.hidden + num_rows * self.vocabulary_size * self.element
            return kept + chunk + cast, kept + self.hidden, cast
        accumulated = self.head_gradient // self.weight_element * 4
        forward = self.hidden + accumulated + cast + max(chunk, weight * rounds if self.head_gradient else 0)
        return forward, self.hidden + self.head_gradient + self.hidden, 0

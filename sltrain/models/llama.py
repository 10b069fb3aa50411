"""The LLaMA decoder (Touvron et al., arXiv 2302.13971), with transformers' parameter names and rotary layout.

A state dict of this model is one of transformers.LlamaForCausalLM, and the logits are the same, so either loads the
other's checkpoints. A tied head (LLaMA 3.2) has no tensor of its own, here and in transformers' files.

    B sequences, T positions, N rows of x, D hidden size, V vocabulary, H query heads, G key/value heads (G divides H),
    d = D / H

    x = embed(ids)                                                (N, D)
    per layer:  x += attention(norm(x));  x += down(silu(gate(norm(x))) * up(norm(x)))
    logits = head(norm(x))                                        (N, V)

Sequences are padded on the right: in causal attention no real position sees a pad, so no mask is needed. Where a row
holds several documents, the position of each token in its document may be given: a token then sees those of its own
document only, as if that were alone in a row. This takes a mask of B T^2 numbers, the same in all layers.

Positions that cannot affect the loss are skipped: everything except attention works row by row, so x is (N, D), one row
per kept position (B T by default), and attention alone spreads the rows over (B, T). Loss and gradients stay the same.
In a bfloat16 model the norms, the softmax, the rotary tables and the loss are computed in float32.

Where every projection of a layer wants it (`recompute`, models/projections.py), h = hidden(x) of each is kept beside
the two residual streams, and the rest of the layer, which is wide, is computed again in backward:

    kept   x -> norm, hidden   h_q h_k h_v -> output, rotate, attention, hidden   h_o -> output, +x
    kept   x -> norm, hidden   h_gate h_up -> output, swiglu, hidden              h_down -> output, +x

In mixed precision (`compute_dtype`) the model computes as one of that dtype whose weights are its own float32 ones,
rounded in every forward pass; their gradients are float32.
"""

import hashlib
import math
from collections.abc import Collection
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sltrain.config import ModelConfig, RopeScaling
from sltrain.models.cache import KeyValueCache
from sltrain.models.fused import recomputed, rms_norm, swiglu
from sltrain.models.loss import chunked_cross_entropy_sum
from sltrain.models.projections import Outputs, Passing, are_recomputed, hidden_of, output_of, taking_previous
from sltrain.numeric import IGNORED_LABEL

DRAWN_AT_ONCE = 2**22  # random numbers
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def is_projection(name: str, module: nn.Module) -> bool:
    """Whether `module` is an attention or MLP projection, which the paper replaces; not the head."""
    return isinstance(module, nn.Linear) and name.rpartition(".")[2] in PROJECTIONS


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight; mean and division in float32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


@dataclass
class Grid:
    """The (B, T) grid of positions, and the places of the N rows of x in it."""

    num_sequences: int
    num_positions: int
    rows: Tensor | None  # (N,) int64, the position b T + t of each row, ascending; None: all B T
    cos: Tensor  # (T, 1, d), see rotary_tables; (B, T, 1, d) with positions in documents
    sin: Tensor
    mask: Tensor | None = None  # (B, 1, T, T), added to the scores of attention; None: causal
    cache: KeyValueCache | None = None  # of the positions before these

    def spread(self, x: Tensor, head_size: int) -> Tensor:
        """x (N, heads * d) -> (B, T, heads, d), zero at skipped positions."""
        if self.rows is not None:
            # index_put_, because index_copy_ would keep x for backward
            x = x.new_zeros(self.num_sequences * self.num_positions, x.shape[1]).index_put_((self.rows,), x)
        return x.view(self.num_sequences, self.num_positions, -1, head_size)

    def collect(self, x: Tensor) -> Tensor:
        """x (B, T, heads, d) -> (N, heads * d)."""
        return take_rows(x.reshape(self.num_sequences * self.num_positions, -1), self.rows)


def take_rows(x: Tensor, rows: Tensor | None) -> Tensor:
    """The given rows of x, or all."""
    return x if rows is None else x.index_select(0, rows)


def inverse_wavelengths(head_size: int, theta: float, scaling: RopeScaling, device: torch.device) -> Tensor:
    """The angle by which each pair (i, i + d/2) of a head turns from one position to the next, (d/2,) float32:
    theta^(-2i/d), which rope_type=llama3 divides by `factor` where the wavelength, 2 pi / angle, is long, and by a
    number between 1 and `factor` where it is medium (transformers' rule)."""
    angles = 1.0 / theta ** (torch.arange(0, head_size, 2, device=device, dtype=torch.float32) / head_size)
    if scaling.rope_type == "default":
        return angles
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    turns = scaling.original_max_position_embeddings * angles / (2 * math.pi)  # in the longest row of before
    kept = ((turns - low) / (high - low)).clamp(0, 1)  # 1: short wavelengths; 0: long ones
    return kept * angles + (1 - kept) * angles / scaling.factor


def rotary_tables(
    num_positions: int, head_size: int, theta: float, scaling: RopeScaling, device: torch.device, first: int = 0
) -> tuple[Tensor, Tensor]:
    """Cosines and sines, each (T, 1, d) float32, of the positions from `first` on: position t turns each pair by t
    times its angle. The sines of the first half are negative, as `rotate` needs them.

    Recomputed in every forward pass, once for all layers: that costs nothing, and a buffer would be garbage after
    `to_empty` and limit T.
    """
    positions = torch.arange(first, first + num_positions, device=device, dtype=torch.float32)
    angles = positions[:, None] * inverse_wavelengths(head_size, theta, scaling, device)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([cos, cos], dim=1)[:, None], torch.cat([-sin, sin], dim=1)[:, None]


def document_mask(positions: Tensor, dtype: torch.dtype) -> Tensor:
    """What attention=document adds to the scores, (B, 1, T, T): 0 where a token sees another, -inf elsewhere, from the
    positions (B, T) of tokens in their documents. A document begins where the position is 0."""
    documents = (positions == 0).cumsum(1)
    is_seen = (documents[:, :, None] == documents[:, None]).tril_()
    return torch.zeros(is_seen.shape, dtype=dtype, device=positions.device).masked_fill_(~is_seen, -torch.inf)[:, None]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply the rotary tables (T, 1, d) or (B, T, 1, d) to x (B, T, heads, d)."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin).to(x.dtype)


def again_in_backward(function: Any, *inputs: Any) -> Any:
    """function(*inputs), of which nothing but the inputs is kept for backward."""
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)


class Attention(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.num_kv_heads = config.num_key_value_heads or self.num_heads
        self.head_size = config.hidden_size // self.num_heads
        kv_size = self.num_kv_heads * self.head_size
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor, grid: Grid, passing: Passing) -> Tensor:
        q, k, v = passing.project(x, self, "q_proj", "k_proj", "v_proj")
        return passing.project(self.attend(q, k, v, grid), self, "o_proj")[0]

    def between(self, q: Tensor, k: Tensor, v: Tensor, grid: Grid) -> Tensor:
        """The narrow h of o_proj from those of q_proj, k_proj and v_proj."""
        q, k, v = output_of(self.q_proj, q), output_of(self.k_proj, k), output_of(self.v_proj, v)
        return hidden_of(self.o_proj, self.attend(q, k, v, grid))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, grid: Grid) -> Tensor:
        """q (N, H d), k and v (N, G d) -> (N, H d)."""
        q, k, v = (grid.spread(y, self.head_size) for y in (q, k, v))
        q, k = rotate(q, grid.cos, grid.sin), rotate(k, grid.cos, grid.sin)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # q (B, H, T, d); k, v (B, G, T, d)
        if grid.cache is not None:
            k, v = grid.cache.extend(self, k, v)
        shares_kv = self.num_kv_heads != self.num_heads
        is_causal = grid.mask is None and k.shape[2] == q.shape[2]  # otherwise one new position, which sees all others
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=grid.mask, is_causal=is_causal, enable_gqa=shares_kv
        )  # (B, H, T, d)
        return grid.collect(y.transpose(1, 2))


class MLP(nn.Module):
    """`keeps_product`: under activation checkpointing, which recomputes the whole layer anyway."""

    def __init__(self, config: ModelConfig, keeps_product: bool) -> None:
        super().__init__()
        self.keeps_product = keeps_product
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor, passing: Passing) -> Tensor:
        gate, up = passing.project(x, self, "gate_proj", "up_proj")
        product = swiglu(gate, up)
        if self.keeps_product or torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return passing.project(product, self, "down_proj")[0]
        with recomputed(product, swiglu, gate, up):
            return passing.project(product, self, "down_proj")[0]

    def between(self, gate: Tensor, up: Tensor) -> Tensor:
        """The narrow h of down_proj from those of gate_proj and up_proj."""
        return hidden_of(self.down_proj, swiglu(output_of(self.gate_proj, gate), output_of(self.up_proj, up)))


class DecoderLayer(nn.Module):
    def __init__(self, config: ModelConfig, activation_checkpointing: bool) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MLP(config, keeps_product=activation_checkpointing)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.keeps_normed = activation_checkpointing

    def forward(self, x: Tensor, grid: Grid, passing: Passing | None = None) -> Tensor:
        passing = passing or Passing()
        if torch.is_grad_enabled() and self.recomputes:
            return self._from_hidden(x, grid)
        x = x + self.self_attn(self.input_layernorm(x), grid, passing)
        return x + self.mlp(self.post_attention_layernorm(x), passing)

    def _from_hidden(self, x: Tensor, grid: Grid) -> Tensor:
        """As `forward`, keeping x, x behind the attention, and h of each projection."""
        attention, mlp = self.self_attn, self.mlp
        q, k, v = self._hidden(x, self.input_layernorm, attention.q_proj, attention.k_proj, attention.v_proj)
        x = x + output_of(attention.o_proj, again_in_backward(attention.between, q, k, v, grid))
        gate, up = self._hidden(x, self.post_attention_layernorm, mlp.gate_proj, mlp.up_proj)
        return x + output_of(mlp.down_proj, again_in_backward(mlp.between, gate, up))

    def _hidden(self, x: Tensor, norm: RMSNorm, *projections: nn.Module) -> list[Tensor]:
        """h of each projection of norm(x), which is not kept: a norm is cheap. Under activation checkpointing it is,
        for the one layer in backward, since the hooks of `recomputed` would hide x from those of the checkpoint."""
        normed = norm(x)
        again = nullcontext() if self.keeps_normed or torch.compiler.is_compiling() else recomputed(normed, norm, x)
        with again:
            return [hidden_of(projection, normed) for projection in projections]

    @property
    def recomputes(self) -> bool:
        """Whether the narrow h of every projection is kept instead of what is wide."""
        attention, mlp = self.self_attn, self.mlp
        read_x = attention.q_proj, attention.k_proj, attention.v_proj, mlp.gate_proj, mlp.up_proj
        return are_recomputed(*read_x, attention.o_proj, mlp.down_proj)

    @property
    def takes(self) -> tuple[str, ...]:
        """The projections that take the output of the same one in the layer before (models/projections.py)."""
        return taking_previous(self.self_attn, self.mlp)


# Successive decoder layers, each with the projections whose outputs the next one takes.
Segment = list[tuple[DecoderLayer, tuple[str, ...]]]


def run_layers(segment: Segment, x: Tensor, grid: Grid, previous: Outputs) -> tuple[Tensor, Outputs]:
    """The layers of a segment, as if they were one."""
    for layer, wanted in segment:
        passing = Passing(previous, wanted)
        x = layer(x, grid, passing)
        previous = passing.outputs
    return x, previous


class LlamaModel(nn.Module):
    """Ids (B, T) -> normed hidden states (N, D) of the given rows, or of all B T. With a cache the ids continue its
    positions, one at a time after the first pass."""

    def __init__(
        self, config: ModelConfig, vocab_size: int, activation_checkpointing: bool, compute_dtype: torch.dtype | None
    ) -> None:
        super().__init__()
        self.activation_checkpointing = activation_checkpointing
        self.compute_dtype = compute_dtype
        self.head_size = config.hidden_size // config.num_attention_heads
        self.rope = (config.rope_theta, config.rope_scaling)
        # As nn.Embedding's own start, which on meta imports the compiler (a second).
        drawn = torch.empty(vocab_size, config.hidden_size)
        if not drawn.is_meta:
            drawn.normal_()
        self.embed_tokens = nn.Embedding.from_pretrained(drawn, freeze=False)
        self.layers = nn.ModuleList(
            DecoderLayer(config, activation_checkpointing) for _ in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def enter(
        self,
        input_ids: Tensor,
        rows: Tensor | None = None,
        cache: KeyValueCache | None = None,
        positions: Tensor | None = None,
    ) -> tuple[Tensor, Grid]:
        """What the first decoder layer is called with."""
        B, T = input_ids.shape
        first = 0 if cache is None else cache.num_positions
        assert first == 0 or T == 1, "a cache is filled in one pass, then extended by one position at a time"
        cos, sin = rotary_tables(T, self.head_size, *self.rope, input_ids.device, first)
        x = self.embed_tokens(take_rows(input_ids.flatten(), rows))
        x = x if self.compute_dtype is None else x.to(self.compute_dtype)
        grid = Grid(B, T, rows, cos, sin, cache=cache)
        if positions is not None:
            grid.cos, grid.sin, grid.mask = cos[positions], sin[positions], document_mask(positions, x.dtype)
        return x, grid

    def forward(
        self,
        input_ids: Tensor,
        rows: Tensor | None = None,
        cache: KeyValueCache | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        x, grid = self.enter(input_ids, rows, cache, positions)
        previous: Outputs = {}
        for segment in self.segments():
            if self.activation_checkpointing and torch.is_grad_enabled():
                x, previous = checkpoint(
                    run_layers, segment, x, grid, previous, use_reentrant=False, preserve_rng_state=False
                )
            else:
                x, previous = run_layers(segment, x, grid, previous)
        if cache is not None:
            cache.num_positions += input_ids.shape[1]
        return self.norm(x)

    def segments(self) -> list[Segment]:
        """The layers in order, those together that are recomputed together: one, or about the root of their number
        where layers take outputs of the one before. These are kept between two segments beside x, (5 D + 2 I) numbers a
        row, nearly all that a layer keeps without recomputation."""
        layers: list[Any] = list(self.layers)
        wanted = [layer.takes for layer in layers[1:]] + [()]
        size = math.isqrt(len(layers)) if any(wanted) else 1
        ends = range(len(layers) % size or size, len(layers) + 1, size)
        return [list(zip(layers, wanted, strict=True))[max(end - size, 0) : end] for end in ends]


class TiedHead(nn.Module):
    """The head that is the embedding's matrix, hidden (..., D) -> logits (..., V). It has no tensor of its own, so the
    matrix is counted, moved, saved and updated once."""

    def __init__(self, embedding: nn.Embedding) -> None:
        super().__init__()
        self._embedding = (embedding,)  # in a tuple: no submodule

    @property
    def embedding(self) -> nn.Embedding:
        return self._embedding[0]

    @property
    def weight(self) -> Tensor:
        return self.embedding.weight

    @property
    def out_features(self) -> int:
        return self.embedding.num_embeddings

    def forward(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.weight)


class LlamaForCausalLM(nn.Module):
    """The decoder with its head. `activation_checkpointing` keeps only each layer's input and recomputes the layer in
    backward. `compute_dtype` is that of mixed precision, None otherwise; `z_loss` as in models/loss.py. Call
    `init_weights` after construction. Raises ValueError for a configuration without a vocabulary size or whose heads do
    not fit its hidden size."""

    def __init__(
        self,
        config: ModelConfig,
        activation_checkpointing: bool = False,
        compute_dtype: torch.dtype | None = None,
        z_loss: float = 0.0,
    ) -> None:
        super().__init__()
        self.config, self.z_loss = config, z_loss
        vocab_size = _check(config)
        self.model = LlamaModel(config, vocab_size, activation_checkpointing, compute_dtype)
        if config.tie_word_embeddings:
            self.lm_head: nn.Linear | TiedHead = TiedHead(self.model.embed_tokens)
        else:
            self.lm_head = nn.Linear(config.hidden_size, vocab_size, bias=False)

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        rows: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """Logits (B, T, V); or, given labels (B, T), the sum of the cross-entropies of positions 1 .. T-1 in nats, 0-d
        float32.

        Labels are aligned with input_ids (position t is predicted from positions before t); -100 marks a position
        without a target. `rows` (N,) int64 are the positions b T + t to compute, ascending; they must include all
        positions before a target in its sequence. Other positions have no logits, which are then (N, V), and no loss.
        `positions` (B, T) int64 are those of tokens in their documents, each 0 where a document begins; a token then
        sees its own document only. None: a row is one document.
        """
        with self.arithmetic(input_ids.device.type):
            hidden = self.model(input_ids, rows, positions=positions)  # (N, D)
            if labels is None:
                logits = self.lm_head(hidden)
                return logits if rows is not None else logits.view(*input_ids.shape, -1)
            targets = F.pad(labels[:, 1:], (0, 1), value=IGNORED_LABEL)  # position t predicts t + 1
            targets = take_rows(targets.flatten(), rows)
            return chunked_cross_entropy_sum(hidden, self.lm_head.weight, targets, z_loss=self.z_loss)

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype of activations: that of the weights, unless mixed precision has another."""
        return self.model.compute_dtype or self.lm_head.weight.dtype

    def arithmetic(self, device_type: str) -> AbstractContextManager[Any]:
        """The context in which it computes: autocast in mixed precision. Casts of weights are not cached, since each is
        used once: activation checkpointing can free them."""
        if self.model.compute_dtype is None:
            return nullcontext()
        return torch.autocast(device_type, self.model.compute_dtype, cache_enabled=False)

    @torch.no_grad()
    def init_weights(self, seed: int, modules: Collection[nn.Module] | None = None) -> None:
        """Fill every parameter and buffer, or the own ones of these modules: norms 1, embeddings, head and dense
        projections normal(0, initializer_range) or as their `starts` say, replaced projections by their
        `reset_parameters(generator)`. Each module has a generator seeded by (seed, its name) and draws on the CPU in
        float32, so the values do not depend on build order, rank, device or dtype."""
        for name, module in self.named_modules():
            if modules is not None and module not in modules:
                continue
            digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest, "little"))
            if isinstance(module, RMSNorm):
                module.weight.fill_(1)
            elif isinstance(module, nn.Linear | nn.Embedding):
                usual = self.config.initializer_range * getattr(module, "gain", 1.0)
                std = getattr(module, "starts", {}).get("weight", usual)
                for piece in module.weight.view(-1).split(DRAWN_AT_ONCE):  # no float32 copy of the whole
                    drawn = torch.empty(len(piece), dtype=torch.float32, device="cpu")
                    piece.copy_(drawn.normal_(0, std, generator=generator))
            elif hasattr(module, "reset_parameters"):
                module.reset_parameters(generator)
            else:
                assert not list(module.parameters(recurse=False)), f"{name} is not initialized"


def _check(config: ModelConfig) -> int:
    """The vocabulary size. Raises ValueError for a shape that cannot be built."""
    if config.vocab_size is None:
        raise ValueError(f"model {config.name} has no vocabulary size: set model.vocab_size, or take the tokenizer's")
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads or config.num_attention_heads
    if config.hidden_size % (2 * heads):
        raise ValueError(
            f"model.hidden_size {config.hidden_size} must be an even multiple of num_attention_heads {heads}"
        )
    if heads % kv_heads:
        raise ValueError(f"model.num_key_value_heads {kv_heads} must divide num_attention_heads {heads}")
    return config.vocab_size

"""The LLaMA decoder (Touvron et al., arXiv 2302.13971), with transformers' parameter names and rotary layout.

A state dict of this model IS one of transformers.LlamaForCausalLM with an untied head, and the logits are the same, so
checkpoints go either way without a converter.

    B rows, T positions, D hidden size, V vocabulary, H query heads, G key/value heads (G divides H), d = D / H, F
    feed-forward size

    x = embed(ids)                                                (B, T, D)
    per layer:  x += attention(norm(x));  x += down(silu(gate(norm(x))) * up(norm(x)))
    logits = head(norm(x))                                        (B, T, V)

Rows are padded on the right: causal attention never looks at a pad from a real position, so no mask is needed. In a
bfloat16 model the norms, the softmax, the rotary tables and the loss are computed in float32.
"""

import hashlib

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sltrain.config import ModelConfig
from sltrain.models.loss import IGNORE, chunked_cross_entropy_sum

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def is_projection(name: str, module: nn.Module) -> bool:
    """Whether `module` is an attention or MLP projection: what the paper replaces. Never embeddings, norms or the
    head."""
    return isinstance(module, nn.Linear) and name.rpartition(".")[2] in PROJECTIONS


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight; the mean and the division in float32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        exact = x.to(torch.promote_types(x.dtype, torch.float32))
        exact = exact * torch.rsqrt(exact.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * exact.to(x.dtype)


def rotary_tables(num_positions: int, head_size: int, theta: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines, each (T, d) float32: position t turns the pair (i, i + d/2) by the angle t / theta^(2i/d).

    Made anew in every forward pass, once for all layers: T x d numbers cost nothing, and a buffer of them would be
    garbage after `to_empty` and limit T.
    """
    inverse_frequency = 1.0 / theta ** (torch.arange(0, head_size, 2, device=device, dtype=torch.float32) / head_size)
    angles = torch.arange(num_positions, device=device, dtype=torch.float32)[:, None] * inverse_frequency
    angles = torch.cat([angles, angles], dim=1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply the rotary tables (T, d) to x (B, heads, T, d)."""
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat([-second, first], dim=-1) * sin).to(x.dtype)


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

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        B, T, D = x.shape
        q = self.q_proj(x).view(B, T, self.num_heads, self.head_size).transpose(1, 2)  # (B, H, T, d)
        k = self.k_proj(x).view(B, T, self.num_kv_heads, self.head_size).transpose(1, 2)  # (B, G, T, d)
        v = self.v_proj(x).view(B, T, self.num_kv_heads, self.head_size).transpose(1, 2)  # (B, G, T, d)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        shares_kv = self.num_kv_heads != self.num_heads
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=shares_kv)  # (B, H, T, d)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, D))


class MLP(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class LlamaModel(nn.Module):
    """Ids (B, T) -> normed hidden states (B, T, D)."""

    def __init__(self, config: ModelConfig, vocab_size: int, activation_checkpointing: bool) -> None:
        super().__init__()
        self.activation_checkpointing = activation_checkpointing
        self.head_size = config.hidden_size // config.num_attention_heads
        self.rope_theta = config.rope_theta
        self.embed_tokens = nn.Embedding(vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed_tokens(input_ids)
        cos, sin = rotary_tables(input_ids.shape[1], self.head_size, self.rope_theta, input_ids.device)
        for layer in self.layers:
            if self.activation_checkpointing and torch.is_grad_enabled():
                x = checkpoint(layer, x, cos, sin, use_reentrant=False)
            else:
                x = layer(x, cos, sin)
        return self.norm(x)


class LlamaForCausalLM(nn.Module):
    """The decoder with its head. `activation_checkpointing` keeps only each layer's input and computes the layer again
    in backward.

    Construction leaves torch's default values; call `init_weights`. Raises ValueError for a configuration without a
    vocabulary or whose heads do not fit its hidden size.
    """

    def __init__(self, config: ModelConfig, activation_checkpointing: bool = False) -> None:
        super().__init__()
        self.config = config
        vocab_size = _check(config)
        self.model = LlamaModel(config, vocab_size, activation_checkpointing)
        self.lm_head = nn.Linear(config.hidden_size, vocab_size, bias=False)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Tensor:
        """Logits (B, T, V); or, given labels (B, T), the sum of the cross-entropies of positions 1 .. T-1 in nats, 0-d
        float32.

        Labels are aligned with input_ids (position t is predicted from positions before t); -100 marks a position
        without a target.
        """
        hidden = self.model(input_ids)  # (B, T, D)
        if labels is None:
            return self.lm_head(hidden)
        targets = F.pad(labels[:, 1:], (0, 1), value=IGNORE)  # position t predicts t + 1, the last one nothing
        return chunked_cross_entropy_sum(hidden.flatten(0, 1), self.lm_head.weight, targets.flatten())

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Fill every parameter and buffer: norms 1, embeddings, head and dense projections normal(0,
        initializer_range), and whatever was put in a projection's place by its own `reset_parameters(generator)`.

        Each module draws from a generator of its own, seeded by (seed, its name), on the CPU in float32, and copies. So
        the values do not depend on build order, rank, device or dtype.
        """
        for name, module in self.named_modules():
            generator = _named_generator(seed, name)
            if isinstance(module, RMSNorm):
                module.weight.fill_(1)
            elif isinstance(module, nn.Linear | nn.Embedding):
                drawn = torch.empty(module.weight.shape, dtype=torch.float32, device="cpu")
                module.weight.copy_(drawn.normal_(0, self.config.initializer_range, generator=generator))
            elif hasattr(module, "reset_parameters"):
                module.reset_parameters(generator)
            else:
                assert not list(module.parameters(recurse=False)), f"nobody initialises {name}"


def _named_generator(seed: int, name: str) -> torch.Generator:
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))


def _check(config: ModelConfig) -> int:
    """The vocabulary's size. Raises ValueError for a shape that cannot be built."""
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

"""A LLaMA whose projections are kept as they were trained, in a part of a dense model's memory.

This file lies in a compressed export of sltrain (arXiv 2406.02214) and needs torch and transformers alone:

    model = transformers.AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)

Everything but the projections is transformers' own LLaMA. config.json describes each projection under "sltrain":
`layers` holds its kind and settings, `tensors` the sizes of its S. KINDS says which class a kind is; kinds that are not
in this file come from files beside it. Weights come from the folder; a model made from the configuration alone has no
positions of S and cannot be used.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM


class SLTrainLlamaConfig(LlamaConfig):
    """LlamaConfig with the key `sltrain`."""

    model_type = "sltrain_llama"
    base_model_tp_plan = {}  # the factors have no plan for tensor parallelism


class SLTrainLinear(nn.Module):
    """y = x W^T + bias, W = (alpha / rank) B A + S; x (..., in_features) -> (..., out_features).

    Few rows of x go through A, B and the entries of S; for many, W is composed for the time of the call. `layer` is the
    entry of `layers` in config.json, `tensors` that of `tensors` (None: no S). With a residual in `layer` y has
    residual / sqrt(K) times the numbers of x A^T besides, each of them K = ceil(out / rank) times (arXiv 2606.28932).
    """

    def __init__(self, in_features: int, out_features: int, bias: bool, layer: dict, tensors: dict | None) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        rank = layer["rank"]
        self.scale = layer["alpha"] / rank if rank else 0.0
        self.times = -(-out_features // rank) if rank else 1
        self.residual = layer.get("residual", 0.0) / self.times**0.5 if rank else 0.0
        self.support, self.block_size = layer.get("support"), layer.get("block_size")
        self.A = nn.Parameter(torch.empty(rank, in_features))
        self.B = nn.Parameter(torch.empty(out_features, rank))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None
        self.num_values = 0
        if tensors is not None:
            self.num_values = tensors["values"]
            self.values = nn.Parameter(torch.empty(self.num_values))
            indices = torch.empty(tensors["indices"], dtype=getattr(torch, tensors["dtype"]))
            self.register_buffer("indices", indices)

    def forward(self, x: Tensor) -> Tensor:
        num_rows = x.numel() // self.in_features
        if num_rows * self.num_values > self.in_features * self.out_features:
            return F.linear(x, self.dense_weight(), self.bias)
        z = F.linear(x, self.A)
        y = F.linear(self.scale * z, self.B, self.bias)
        if self.residual:
            y = y + self.residual * z.repeat_interleave(self.times, -1)[..., : self.out_features]
        if self.num_values:
            positions = self.positions()
            exact = torch.promote_types(y.dtype, torch.float32)  # of sums over a row of S
            products = x[..., positions % self.in_features].to(exact) * self.values.to(exact)
            y = y.to(exact).index_add(-1, positions // self.in_features, products).to(y.dtype)
        return y

    def dense_weight(self) -> Tensor:
        """W, (out_features, in_features)."""
        weight = (self.scale * self.B) @ self.A
        if self.residual:
            weight += self.residual * self.A.repeat_interleave(self.times, 0)[: self.out_features]
        if self.num_values:
            weight.view(-1).index_add_(0, self.positions(), self.values.to(weight.dtype))
        return weight

    def positions(self) -> Tensor:
        """Where each value lies in W, read row by row: (num_values,) int64, distinct."""
        return getattr(self, f"_{self.support}")(self.indices.long())

    def _uniform(self, indices: Tensor) -> Tensor:
        """Row starts as int32 in two uint16 words each, low word first, then the columns; or positions as they are."""
        if self.indices.dtype != torch.uint16:
            return indices
        words = 2 * (self.out_features + 1)
        low, high = indices[:words].view(-1, 2).unbind(1)
        counts = (low + 65536 * high).diff()
        return torch.repeat_interleave(counts, output_size=self.num_values) * self.in_features + indices[words:]

    def _stratified(self, indices: Tensor) -> Tensor:
        """Offsets in equal strata of the flattened matrix."""
        strata = torch.arange(self.num_values, device=indices.device)
        return strata * (self.out_features * self.in_features) // self.num_values + indices

    def _block(self, indices: Tensor) -> Tensor:
        """Block numbers; values block after block, each row by row, without what overhangs the matrix."""
        size, num_columns = self.block_size, -(-self.in_features // self.block_size)
        inner = torch.arange(size, device=indices.device)
        rows = (indices // num_columns * size)[:, None, None] + inner[:, None]
        columns = (indices % num_columns * size)[:, None, None] + inner
        inside = (rows < self.out_features) & (columns < self.in_features)
        return (rows * self.in_features + columns)[inside]

    def _column(self, indices: Tensor) -> Tensor:
        """Column numbers; values row by row."""
        rows = torch.arange(self.out_features, device=indices.device)
        return (rows[:, None] * self.in_features + indices).flatten()

    _slice = _column

    def _rolled(self, indices: Tensor) -> Tensor:
        """Offset and g: a block diagonal of g blocks, so many columns to the right; values row by row."""
        (offset, g), sides = indices.tolist(), (self.out_features, self.in_features)
        rows, columns = (torch.arange(g + 1, device=indices.device) * side // g for side in sides)
        inner = [torch.arange(-(-side // g), device=indices.device) for side in sides]
        rows, columns = rows[:, None, None], columns[:, None, None]
        at_row, at_column = rows[:-1] + inner[0][:, None], columns[:-1] + inner[1]
        inside = (at_row < rows[1:]) & (at_column < columns[1:])
        return (at_row * self.in_features + (at_column + offset) % self.in_features)[inside]

    def extra_repr(self) -> str:
        sizes = f"in_features={self.in_features}, out_features={self.out_features}, rank={len(self.A)}"
        return f"{sizes}, values={self.num_values}" + (f", support={self.support}" if self.num_values else "")


KINDS = {"sltrain": SLTrainLinear, "low_rank": SLTrainLinear}


class SLTrainLlamaForCausalLM(LlamaForCausalLM):
    """transformers' LlamaForCausalLM, with a layer of KINDS in place of each linear that `config.sltrain` names."""

    config_class = SLTrainLlamaConfig

    def __init__(self, config: SLTrainLlamaConfig) -> None:
        super().__init__(config)
        for name, layer in config.sltrain["layers"].items():
            linear, (parent, _, child) = self.get_submodule(name), name.rpartition(".")
            sizes = (linear.in_features, linear.out_features, linear.bias is not None)
            trained = KINDS[layer["kind"]](*sizes, layer, config.sltrain["tensors"].get(name))
            setattr(self.get_submodule(parent), child, trained)
        for name in config.sltrain["layers"]:
            projection = self.get_submodule(name)
            if hasattr(projection, "follow"):  # it reads what the same projection one decoder layer before gives
                before = (str(int(part) - 1) if part.isdigit() else part for part in name.split("."))
                projection.follow(self.get_submodule(".".join(before)))
                self.supports_gradient_checkpointing = False

"""Text generation: a model reads the prompt once, then each picked token.

    logits (V,) of the last position  ->  temperature, top-k, top-p  ->  one id

in transformers' order and meaning. Temperature 0 is greedy: the likeliest id, not random. Ids are drawn on the CPU, so
that a seed gives the same text wherever the logits are the same.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from sltrain.models.cache import KeyValueCache
from sltrain.models.llama import LlamaForCausalLM


@dataclass
class Sampling:
    """How the next id is picked. Raises ValueError for values outside their range."""

    temperature: float = 0.0  # 0: greedy; 1: the model's own distribution; above: flatter
    top_k: int | None = None  # only the k likeliest
    top_p: float | None = None  # only the likeliest whose probabilities add up to at least this
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(
                f"temperature {self.temperature:g}: must be a finite number, at least 0 (0 is greedy, 1 as trained)"
            )
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top-k {self.top_k}: must be at least 1, the number of ids to choose from")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top-p {self.top_p:g}: must be above 0 and at most 1, a probability")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed {self.seed}: must be between 0 and 2^63 - 1")
        if self.temperature == 0 and (self.top_k or self.top_p):
            raise ValueError("top-k and top-p have no effect at temperature 0, which is greedy; set temperature 1")


def pick(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """One id from logits (V,). Raises ValueError if they are not finite."""
    scores = logits.cpu().double()  # float32 overflows for very small temperatures
    if not scores.isfinite().all():
        raise ValueError("the model's logits are not finite: its weights diverged; use an earlier step")
    if sampling.temperature == 0:
        return int(scores.argmax())
    scores = (scores - scores.max()) / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < len(scores):
        scores = scores.masked_fill(scores < scores.topk(sampling.top_k).values[-1], -torch.inf)
    probabilities = scores.softmax(0)
    if sampling.top_p is not None and sampling.top_p < 1:
        ordered, order = probabilities.sort(descending=True)
        before = ordered.cumsum(0) - ordered  # of all likelier ids together
        probabilities = probabilities.index_fill(0, order[before >= sampling.top_p], 0.0)
    return int(torch.multinomial(probabilities, 1, generator=generator))


@torch.no_grad()
def generate(
    model: LlamaForCausalLM, prompt: list[int], max_new_tokens: int, eos_id: int, sampling: Sampling
) -> Iterator[int]:
    """Yield up to `max_new_tokens` ids that continue `prompt`, the last one `eos_id` if the model ended the text. The
    caller ensures that both fit the model's context."""
    generator = torch.Generator().manual_seed(sampling.seed)
    cache = KeyValueCache()
    device = model.lm_head.weight.device
    ids = torch.tensor([prompt], device=device)
    for _ in range(max_new_tokens):
        with model.arithmetic(device.type):
            hidden = model.model(ids, cache=cache)  # (T, D)
            logits = model.lm_head(hidden[-1])
        token = pick(logits, sampling, generator)
        yield token
        if token == eos_id:
            return
        ids = torch.tensor([[token]], device=device)

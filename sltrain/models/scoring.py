"""How likely a model finds given continuations: what multiple-choice tasks and the perplexity of whole texts ask.

    context c, continuation y of n ids        log p(y | c) = sum_i log softmax(logits)[y_i]

with the logits of the position before y_i. A continuation is greedy if every y_i has the highest logit, so that it is
what the model would write at temperature 0. Where both together are longer than the model reads, the beginning of the
context is dropped. A text that is longer than the model reads is scored in windows: each id once, with as much context
as fits.

Rows of similar length share a batch and are padded on the right, where causal attention does not see the pads. Hidden
states are computed for real positions only, logits only for those before a scored id, a chunk at a time.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sltrain.models.llama import LlamaForCausalLM
from sltrain.models.loss import default_chunk_rows


class Passage(NamedTuple):
    """Ids of which the last `num_scored` are scored, given those before them. At least one id comes before."""

    ids: list[int]
    num_scored: int


class Likelihood(NamedTuple):
    """What a model finds about a continuation."""

    log_probability: float  # nats
    is_greedy: bool


def passage(context: list[int], continuation: list[int], longest: int) -> Passage:
    """`continuation` after `context` for a model that reads `longest` ids; both hold at least one."""
    ids = (context + continuation)[-(longest + 1) :]
    return Passage(ids, min(len(continuation), len(ids) - 1))


def windows(first: int, ids: list[int], longest: int) -> Iterator[Passage]:
    """Passages that score each of `ids` once, the first given `first` alone, for a model that reads `longest` ids."""
    ids = [first, *ids]
    for begin in range(1, len(ids), longest):
        end = min(begin + longest, len(ids))
        yield Passage(ids[max(end - longest - 1, 0) : end], end - begin)


def batches(passages: Sequence[Passage], max_positions: int) -> list[list[int]]:
    """The numbers of the passages, dealt into batches of similar length, the longest first, each of at most
    `max_positions` positions with its pads, or of one passage."""
    order = sorted(range(len(passages)), key=lambda number: -len(passages[number].ids))
    dealt: list[list[int]] = []
    for number in order:
        if dealt and (len(dealt[-1]) + 1) * (len(passages[dealt[-1][0]].ids) - 1) <= max_positions:
            dealt[-1].append(number)
        else:
            dealt.append([number])
    return dealt


@torch.no_grad()
def score(model: LlamaForCausalLM, passages: Sequence[Passage]) -> list[Likelihood]:
    """The likelihood of each passage, all computed as one batch."""
    device = model.lm_head.weight.device
    lengths = [len(item.ids) - 1 for item in passages]  # the last id is predicted, not read
    longest = max(lengths)
    padded = [item.ids[:-1] + [0] * (longest - length) for item, length in zip(passages, lengths, strict=True)]
    rows = [number * longest + t for number, length in enumerate(lengths) for t in range(length)]
    targets = [item.ids[-item.num_scored :] for item in passages]
    ends = torch.tensor(lengths).cumsum(0).tolist()
    picked = [row for end, own in zip(ends, targets, strict=True) for row in range(end - len(own), end)]
    with model.arithmetic(device.type):
        hidden = model.model(torch.tensor(padded, device=device), torch.tensor(rows, device=device))  # (N, D)
        scores, hits = _scores(model, hidden[torch.tensor(picked, device=device)], [i for own in targets for i in own])
    sizes = [len(own) for own in targets]
    return [
        Likelihood(float(own.sum()), bool(hit.all()))
        for own, hit in zip(scores.split(sizes), hits.split(sizes), strict=True)
    ]


def _scores(model: LlamaForCausalLM, hidden: Tensor, targets: list[int]) -> tuple[Tensor, Tensor]:
    """log softmax(logits)[target] of each row, (M,) float64, and whether that is the highest logit, (M,) bool; on the
    CPU."""
    device = hidden.device
    wanted = torch.tensor(targets, device=device)
    scores, hits = [], []
    size = default_chunk_rows(model.lm_head.out_features, device.type)
    for rows, ids in zip(hidden.split(size), wanted.split(size), strict=True):
        logits = model.lm_head(rows).float()  # (m, V)
        own = logits.gather(1, ids[:, None])[:, 0]
        scores.append((own - logits.logsumexp(1)).double().cpu())
        hits.append((logits.argmax(1) == ids).cpu())
    return torch.cat(scores), torch.cat(hits)

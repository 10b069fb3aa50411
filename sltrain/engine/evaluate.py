"""Validation loss, token-weighted over all ranks.

    perplexity = exp(sum of token losses / number of predicted tokens)

`perplexity_galore_protocol` follows the harness of the published tables: each rank adds up the mean losses of its n
batches but divides by n + 1, and the ranks' results are averaged. It reads about 2 % low at n = 180 and far lower at
small n (commands leave it out there: `events.published_perplexity`), so it compares only with a table made with the
same batches: the paper's number of ranks and sequences a batch (micro_batch_size), and 10M tokens. `bits_per_byte` does
not depend on the tokenizer: the same sum of losses, in bits, over the UTF-8 bytes of the predicted tokens.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import nn

from sltrain.engine.distributed import Ranks
from sltrain.engine.metrics import safe_exp
from sltrain.engine.micro_batch import make_micro_batch
from sltrain.events import Event
from sltrain.log import Pace
from sltrain.numeric import IGNORED_LABEL


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Iterable[Any],
    ranks: Ranks,
    should_stop: Callable[[], bool] = lambda: False,
    sources: Sequence[str] = (),
    in_step: bool = False,
) -> Event | None:
    """Validation numbers of `model` (a micro-batch's tensors -> summed token loss), equal on all ranks. Each rank has
    its own batches, any number of them, as data/evaluation.py makes them. `sources` are the names that batches of a
    mixture may have as their `source`: loss and tokens of each are then among the numbers. `in_step`: the model needs
    all ranks in every forward pass; those without a batch left make passes that do not count.

    None if `should_stop` became true on some rank. Raises ValueError if no rank has a token to predict.
    """
    training = model.training
    model.eval()
    # loss sum, targets, bytes, sum of batch means, batches, ranks that stopped, ranks with a batch
    totals = torch.zeros(7, dtype=torch.float64)
    by_source = torch.zeros(len(sources), 2, dtype=torch.float64)  # loss sum, targets
    usable = ((batch, count) for batch in batches if (count := _num_targets(batch)) > 0)
    for batch, num_targets in _in_step(usable, model, ranks, should_stop) if in_step else usable:
        if not in_step and should_stop():
            break
        loss_sum = float(model(*make_micro_batch(batch.input_ids, batch.labels, ranks.device, batch.positions)))
        totals += torch.tensor(
            [loss_sum, num_targets, batch.num_bytes, loss_sum / num_targets, 1, 0, 0], dtype=torch.float64
        )
        if sources:
            by_source[sources.index(batch.source)] += totals.new_tensor([loss_sum, num_targets])
    model.train(training)
    totals[5] = should_stop()
    totals[3] /= totals[4] + 1  # each rank averages over its own batches
    totals[6] = totals[4] > 0
    loss_sum, num_targets, num_bytes, galore_losses, _, num_stopped, num_ranks = ranks.sum_(totals).tolist()
    if sources:
        ranks.sum_(by_source)
    if num_stopped:
        return None
    if num_targets == 0:
        raise ValueError("the validation data holds no token to predict; name other text (validation_path in training)")
    loss = loss_sum / num_targets
    return {
        "loss": loss,
        "perplexity": safe_exp(loss),
        "perplexity_galore_protocol": safe_exp(galore_losses / num_ranks),
        "bits_per_byte": loss_sum / math.log(2) / max(num_bytes, 1),
        "eval_tokens": int(num_targets),
        "eval_processes": int(num_ranks),
        **_of_sources(sources, by_source.tolist()),
    }


def _num_targets(batch: Any) -> int:
    return int((batch.labels[:, 1:] != IGNORED_LABEL).sum())


def _in_step(
    batches: Iterator[tuple[Any, int]], model: nn.Module, ranks: Ranks, should_stop: Callable[[], bool]
) -> Iterator[tuple[Any, int]]:
    """These batches, until all ranks are out of theirs or one of them stops; a rank without one makes a pass of two
    tokens for each that the others make."""
    two = torch.zeros(1, 2, dtype=torch.int64)
    while True:
        batch = next(batches, None)
        num_left, num_stopped = ranks.sum([int(batch is not None), int(should_stop())])
        if num_stopped or not num_left:
            return
        if batch is None:
            model(*make_micro_batch(two, two, ranks.device))
        else:
            yield batch


def counted(eval_set: Any) -> Iterator[Any]:
    """The batches of this rank, while a line now and then says how many of all ranks' tokens are predicted, as if every
    rank had as many and were as fast."""
    total, num_batches = eval_set.num_targets, len(eval_set)
    pace = Pace("evaluated", "tokens", total)
    for number, batch in enumerate(eval_set, 1):
        yield batch
        pace.at(round(total * number / num_batches))


def _of_sources(sources: Sequence[str], sums: list[list[float]]) -> Event:
    """The numbers of each source of a mixture, from its sum of token losses and its number of predicted tokens."""
    numbers: dict[str, Any] = {}
    for name, (loss_sum, num_targets) in zip(sources, sums, strict=True):
        numbers[f"loss/{name}"] = loss_sum / num_targets if num_targets else math.nan
        numbers[f"eval_tokens/{name}"] = int(num_targets)
    return cast(Event, numbers)

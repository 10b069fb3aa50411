"""A saved model and a prompt -> text, piece by piece as it comes."""

import logging
from collections.abc import Iterator
from os import PathLike

from sltrain.building.saved import open_saved
from sltrain.engine.distributed import pick_device
from sltrain.models.generation import Sampling, generate

logger = logging.getLogger(__name__)


def continue_text(
    path: str | PathLike[str],
    prompt: str,
    *,
    step: int | None = None,
    device: str = "auto",
    max_new_tokens: int = 100,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
) -> Iterator[str]:
    """Yield the pieces of the text that begins with `prompt`: together they are what the tokenizer makes of all ids.

    Ends at end-of-text, after `max_new_tokens`, or where the model's context is full. Raises ValueError or OSError.
    """
    sampling = Sampling(temperature, top_k, top_p, seed)
    if max_new_tokens < 1:
        raise ValueError(f"max-new-tokens {max_new_tokens}: must be at least 1")
    saved = open_saved(path, step)
    ids = saved.tokenizer.encode_prompt(prompt)
    num_read = len(ids)
    room = saved.context - len(ids)
    if room < 1:
        raise ValueError(f"the prompt has {len(ids):,} tokens, the model reads at most {saved.context:,}; shorten it")
    if len(ids) + min(max_new_tokens, room) > saved.seq_len:
        logger.info(f"note: trained on rows of {saved.seq_len:,} tokens; what lies beyond, the model has never seen")
    model = saved.load(pick_device(device), num_rows=1)

    text_of, told = saved.tokenizer.text_stream(), 0
    for token in ids:
        piece = text_of(token)
        told += len(piece)
        yield piece
    for token in generate(model, ids, min(max_new_tokens, room), saved.tokenizer.eos_id, sampling):
        ids.append(token)
        piece = text_of(token)
        told += len(piece)
        yield piece
    yield saved.tokenizer.decode(ids)[told:]  # a character that never became whole
    if len(ids) == num_read + 1 and ids[-1] == saved.tokenizer.eos_id:
        logger.info(
            "\nnote: the model ends the text here; another prompt, or a temperature above 0, may have it write on"
        )
    if max_new_tokens > room and ids[-1] != saved.tokenizer.eos_id:
        logger.info(f"\nnote: the model's context of {saved.context:,} tokens is full")

"""What a downstream task asks of a model, as text: how likely continuations are, and what it writes.

    likelihoods        log p(continuation | context), and whether it is what the model would write
    text_likelihoods   log p(text), each token once
    continuations      text that the model writes after a prompt

Text becomes ids as in training, without the token that ends documents. A continuation's ids are those that the context
does not have: ids(context + continuation) after the first len(ids(context)); spaces at the end of the context belong to
the continuation, as most tokenizers join them to the next word. A text without context follows the token that begins
documents, or else the one that ends them, which is what stands before a document in packed rows. These are the rules of
the LM Evaluation Harness (github.com/EleutherAI/lm-evaluation-harness), so its numbers for an export are the same.

Rank 0 holds the questions and asks; the other ranks `serve`. What is asked is dealt to all ranks in batches that do not
depend on their number, so neither do the answers. An error of one rank is told to all, who stay in step.
"""

import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch

from sltrain.data.tokenizer import Tokenizer
from sltrain.engine.distributed import Ranks
from sltrain.engine.in_step import InStep, Stopped
from sltrain.log import Pace, first_line
from sltrain.models.generation import Sampling, generate
from sltrain.models.llama import LlamaForCausalLM
from sltrain.models.scoring import Likelihood, Passage, batches, passage, score, windows

logger = logging.getLogger(__name__)
T = TypeVar("T")


class Unanswered(Exception):
    """Some rank could not answer; the message says which and why. All ranks are still in step."""


class Prompt(NamedTuple):
    """A text to be continued, until one of the texts `until` appears or the model ends it."""

    text: str
    until: tuple[str, ...]
    max_new_tokens: int
    sampling: Sampling


class _Failure(NamedTuple):
    """What a rank gives instead of answers."""

    reason: str


@dataclass
class TaskModel:
    """A model and its tokenizer on every rank; the methods that ask are for rank 0, and raise Stopped once
    `should_stop` is true on some rank, Unanswered if an error kept some rank from answering."""

    model: LlamaForCausalLM
    tokenizer: Tokenizer
    ranks: Ranks
    max_positions: int  # of a batch, pads included
    should_stop: Callable[[], bool] = lambda: False
    tell: Callable[[str], None] = logger.info  # shows how far the answers are
    in_step: InStep | None = None  # of a model in shards

    @property
    def is_out_of_step(self) -> bool:
        """Whether an error came in the middle of a pass for which other ranks wait: nothing can be asked any more."""
        return self.in_step is not None and self.in_step.is_inside

    @property
    def longest(self) -> int:
        """Ids that the model reads at most."""
        return self.model.config.max_position_embeddings

    def likelihoods(self, pairs: Sequence[tuple[str, str]]) -> list[Likelihood]:
        """Of each (context, continuation)."""
        return self._score([passage(*self.split(*pair), self.longest) for pair in pairs])

    def text_likelihoods(self, texts: Sequence[str]) -> list[float]:
        """The log probability of each text, in nats."""
        parts = [list(windows(self._first, self._ids(text), self.longest)) for text in texts]
        scores = iter(self._score([window for part in parts for window in part]))
        return [sum(next(scores).log_probability for _ in part) for part in parts]

    def continuations(self, prompts: Sequence[Prompt]) -> list[str]:
        """What the model writes after each prompt."""
        return [text for (text,) in self._deal([[prompt] for prompt in prompts])]

    def split(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """The ids of a context and those of its continuation, each at least one."""
        stripped = context.rstrip()
        before = self._ids(stripped)
        whole = self._ids(context + continuation) or [self.tokenizer.eos_id]
        cut = min(len(before), len(whole) - 1)  # a tokenizer may join both into one id
        return [*self.tokenizer.prefix, *whole[:cut]] or [self._first], whole[cut:]

    def serve(self) -> None:
        """On a rank other than 0: work on what rank 0 asks, until it is done."""
        while (jobs := self.ranks.on_main(lambda: None)) is not None:
            self._share(jobs)

    def done(self) -> None:
        """On rank 0: nothing more is asked."""
        if self.ranks.world_size > 1:
            self.ranks.on_main(lambda: None)

    def _score(self, passages: list[Passage]) -> list[Likelihood]:
        dealt = batches(passages, self.max_positions)
        answers = self._deal([[passages[number] for number in batch] for batch in dealt])
        numbers = [number for batch in dealt for number in batch]
        found = dict(zip(numbers, (own for part in answers for own in part), strict=True))
        return [found[number] for number in range(len(passages))]

    def _deal(self, jobs: list[Any]) -> list[Any]:
        """What all ranks make of the jobs, in their order."""
        if not jobs:
            return []
        shares = self._share(self.ranks.on_main(lambda: jobs) if self.ranks.world_size > 1 else jobs)
        if failed := [share for share in shares if isinstance(share, _Failure)]:
            raise Unanswered(failed[0].reason)
        parts = [share for share in shares if isinstance(share, list)]
        if len(parts) < len(shares):
            raise Stopped
        return [parts[number % len(parts)][number // len(parts)] for number in range(len(jobs))]

    def _share(self, jobs: list[Any]) -> list["list[Any] | _Failure | None"]:
        """Every rank's answers to its own jobs; None if it was asked to stop. An error must not take a rank away from
        the others, which wait for its answers: it is told like an answer."""
        own: list[Any] | _Failure | None
        try:
            own = self._answers(jobs)
        except Stopped:
            own = None
        except Exception as error:
            if self.is_out_of_step:
                raise
            where = f"rank {self.ranks.rank}: " if self.ranks.world_size > 1 else ""
            own = _Failure(f"{where}{type(error).__name__}: {first_line(error)[:300]}")
        if isinstance(own, _Failure) and self.ranks.device.type == "cuda":
            torch.cuda.empty_cache()  # outside `except`: the error keeps the tensors of its frames
        if self.in_step is not None:
            self.in_step.finish()
        return self.ranks.gather(own)

    def _answers(self, jobs: list[Any]) -> list[Any] | None:
        """This rank's answers to its share of the jobs; None once it is asked to stop."""
        rank, world_size = self.ranks.rank, self.ranks.world_size
        own, num_done, total = list[Any](), 0, sum(map(len, jobs))
        pace = Pace("answered", "requests", total, self.tell)
        for job in jobs[rank::world_size]:
            if self.should_stop():
                return None
            own.append(score(self.model, job) if isinstance(job[0], Passage) else [self._continue(*job)])
            num_done += len(job)
            pace.at(min(num_done * world_size, total))  # as if all ranks were as fast
        return own

    def _continue(self, prompt: Prompt) -> str:
        num_new = min(prompt.max_new_tokens, self.longest - 1)
        ids = [*self.tokenizer.prefix, *self._ids(prompt.text)][-(self.longest - num_new) :] or [self._first]
        written: list[int] = []
        text = ""
        with suppress(ValueError):  # of weights that diverged: the evaluation shows it, and what is left is no text
            for token in generate(self.model, ids, num_new, self.tokenizer.eos_id, prompt.sampling):
                written.append(token)
                text = self.tokenizer.decode(written)
                if ends := [text.index(end) for end in prompt.until if end in text]:
                    return text[: min(ends)]
        return text

    @property
    def _first(self) -> int:
        """What stands before a text without context."""
        return self.tokenizer.prefix[0] if self.tokenizer.prefix else self.tokenizer.eos_id

    def _ids(self, text: str) -> list[int]:
        """The ids of a text alone, without those that begin and end documents."""
        return self.tokenizer.encode_batch([text])[0][len(self.tokenizer.prefix) : -1].tolist()

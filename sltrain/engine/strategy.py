"""How the processes of a run share the tensors of its model. Step, checkpoint and log know this interface alone.

    parallel=   held by each process                           gradients                               file
    single      everything; it is the only one                 its own                                 this one
    ddp         everything (torch's DistributedDataParallel)   averaged inside backward                this one
    fsdp        a share of every tensor (fully_shard)          averaged, each process gets its share   sharded.py
    hsdp        fsdp in groups that are copies of each other   the same, and averaged over groups      sharded.py

Buffers (the indices of S) are whole everywhere. `auto` is one of these when the run begins (building/strategy.py).

An update asks a strategy for three things, in this order:

    with strategy.accumulating(wrapped, is_last): loss.backward()     no communication before it is needed
    strategy.gradients(model)                                         what this process holds of the averages
    strategy.whole_norms(norms)                                       from the norms of shares to those of tensors

and what looks at whole tensors (a norm in the log, a checkpoint) asks for `whole` or `for_checkpoint`. The optimizer
updates `named_parameters`: on a process with shares these are plain tensors, so that it need not know of shards.
"""

import gc
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from sltrain.engine.actions import Stateful
from sltrain.engine.checkpoint_files import Contents
from sltrain.engine.distributed import Ranks
from sltrain.numeric import is_stand_in

MicroBatch = tuple[Tensor | None, ...]


class Strategy:
    """The interface, as it is where every process holds whole tensors.

    Args:
        ranks: the processes.
    """

    name: str
    is_sharded: ClassVar[bool] = False  # whether forward passes communicate, so that all ranks must make as many
    savers: Ranks | None = None  # the ranks, if each writes its share of a checkpoint, over a group of their own

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks

    # ---- building

    def shard(
        self,
        model: nn.Module,
        units: Sequence[nn.Module],
        prepare: Callable[[Collection[nn.Module]], None] = lambda modules: None,
    ) -> None:
        """Cut a model: each of `units` is gathered as one, and what lies outside of them. `prepare(modules)` gives the
        own tensors of modules memory and values right before they are cut. Does nothing where tensors stay whole."""

    def agree(self, model: nn.Module) -> None:
        """Make the values of the model the same on all ranks: those of rank 0."""
        self.ranks.send_from_main((*model.parameters(), *model.buffers()))

    def named_parameters(self, model: nn.Module) -> Iterable[tuple[str, nn.Parameter]]:
        """What the optimizer of this rank updates, by the names of the model. After `gradients` their `grad` is set."""
        return model.named_parameters()

    def wrap(self, model: nn.Module) -> nn.Module:
        """What to call in a forward pass of training."""
        return model

    def release(self) -> None:
        """Before the model is wrapped anew, and nothing refers to what `wrap` returned."""

    def bucket_bytes(self, model: nn.Module) -> int:
        """Bytes held between updates besides weights and optimizer state, once it is wrapped."""
        return 0

    # ---- an update

    def prepare(self, wrapped: nn.Module, micro_batch: MicroBatch) -> None:
        """Before the first update, of which this is a micro-batch."""

    def accumulating(self, wrapped: nn.Module, is_last: bool) -> AbstractContextManager[None]:
        """The context of forward and backward of one micro-batch, the update's last one or not."""
        return nullcontext()

    def gradients(self, model: nn.Module) -> list[nn.Parameter]:
        """The parameters of `named_parameters` that have a gradient, with what this rank holds of it: in the same order
        and number on every rank."""
        return [parameter for parameter in model.parameters() if parameter.grad is not None]

    def whole_norms(self, norms: list[Tensor]) -> list[Tensor]:
        """From the norm of each of `gradients` as this rank holds it to that of the whole gradient; 0-d tensors."""
        return norms

    def anywhere(self, flags: list[bool]) -> list[bool]:
        """A flag of each parameter, of what this rank holds -> of the whole parameter."""
        return flags

    def after_forward(self, model: nn.Module) -> None:
        """After forward passes without a backward."""

    def by_modules(self, model: nn.Module) -> AbstractContextManager[None]:
        """The context in which modules of a model may be called by themselves instead of all of it, without backward;
        decoder layers by all ranks together."""
        return nullcontext()

    # ---- whole tensors

    def part(self, tensor: Tensor) -> tuple[Tensor, slice | None]:
        """What this rank holds of a parameter of the model, as a plain tensor that shares its memory, and which rows
        of it these are; None: all, and it is held whole."""
        return tensor, None

    def whole(self, module: nn.Module) -> AbstractContextManager[Any]:
        """The context in which the parameters of a module are whole, to be read, on all ranks: all of them enter it
        together. Take a layer, not a model."""
        return nullcontext()

    def for_checkpoint(
        self, step: int, model: nn.Module, objects: Mapping[str, Stateful], state: Mapping[str, Any]
    ) -> Contents:
        """What rank 0 writes into a checkpoint, see `Contents.of`: whole tensors, the same with any strategy; or, with
        `savers`, what this rank does. All ranks call it."""
        return Contents.of(step, model, objects, state)

    def from_checkpoint(self, objects: Mapping[str, Stateful]) -> Mapping[str, Stateful]:
        """What takes the state of a checkpoint in place of these objects."""
        return objects


class Single(Strategy):
    """parallel=single: the only process."""

    name = "single"


class Replicated(Strategy):
    """parallel=ddp: every process holds the whole model."""

    name = "ddp"
    _has_ordered_buckets = False

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model in DDP, which averages gradients over ranks during backward. It does not send buffers: these are
        equal from the start, see `agree`."""
        buffers = [name for name, _ in model.named_buffers()]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, buffers)
        device = self.ranks.device
        device_ids = [device.index] if device.type == "cuda" else None
        self._has_ordered_buckets = False
        sends = not any(map(is_stand_in, model.parameters()))  # DDP cannot; the others are equal as well
        return DistributedDataParallel(model, device_ids=device_ids, gradient_as_bucket_view=True, init_sync=sends)

    def release(self) -> None:
        gc.collect()  # DDP is part of a reference cycle, and holds hooks and buckets as long as it lives

    def bucket_bytes(self, model: nn.Module) -> int:
        """DDP keeps all gradients in buckets."""
        return sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)

    def prepare(self, wrapped: nn.Module, micro_batch: MicroBatch) -> None:
        """Let DDP order its buckets, which it does by the first backward, before the first update. The place of a
        gradient in its bucket decides in which order three or more ranks are summed, and hence the last bits: a run
        that continues must sum as one that was never stopped."""
        if not self._has_ordered_buckets:
            (wrapped(*micro_batch) * 0).backward()
            self._has_ordered_buckets = True

    def accumulating(self, wrapped: nn.Module, is_last: bool) -> AbstractContextManager[None]:
        """One all-reduce an update: before the last micro-batch backward adds to the local gradients. Of a bare model,
        whose optimizer sums them, there is none."""
        return nullcontext() if is_last or not isinstance(wrapped, DistributedDataParallel) else wrapped.no_sync()


def whole_strategy(ranks: Ranks) -> Strategy:
    """The strategy of whole tensors for so many processes."""
    return Single(ranks) if ranks.world_size == 1 else Replicated(ranks)

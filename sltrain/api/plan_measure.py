"""`sltrain-plan measure=true`: three updates of the real model on random tokens, and the most bytes of tensors in the
last, on the machine it runs on."""

from typing import Any

import torch

from sltrain.building.model import allocate, build_model
from sltrain.building.phases import Live, live_actions
from sltrain.building.trainer import build_step, build_updates, check_updates_of, stateful_optimizer
from sltrain.config import TrainConfig
from sltrain.engine.actions import Schedule
from sltrain.engine.checkpoint_files import Contents
from sltrain.engine.distributed import Ranks
from sltrain.engine.memory import averages_bytes, free_bytes, held_by, tensor_peak
from sltrain.engine.micro_batch import make_micro_batch
from sltrain.engine.snapshot import HostCopy
from sltrain.engine.strategy import Single
from sltrain.layers import set_paths

NUM_UPDATES = 3  # the first makes the optimizer's state, the last is measured


def check_free(planned_bytes: int, device: torch.device) -> None:
    """Raise ValueError if what is to be measured does not fit into the memory that is free."""
    free = free_bytes(device)
    if free is not None and planned_bytes > free:
        raise ValueError(
            f"measure=true would need {planned_bytes / 1e9:,.2f} GB on {device}, where {free / 1e9:,.2f} are free;"
            " make micro_batch_size smaller, and global_batch_size with it"
        )


def measure(config: TrainConfig, device: torch.device, dtype: torch.dtype) -> int:
    """The peak of tensor bytes in one update of the real model on random tokens."""
    config.optimizer.check_package()
    check_updates_of(config, dtype)
    strategy = Single(Ranks(0, 1, device))
    assert config.model.vocab_size is not None
    model = build_model(config, config.model.vocab_size, dtype)
    set_paths(model, config.layer_path, config.micro_batch_size * config.seq_len, device)
    allocate(model, device)
    model.init_weights(config.seed)
    optimizer = build_updates(config, model, strategy)
    step = build_step(config, model, optimizer, strategy)
    vocab = model.lm_head.out_features
    source = torch.Generator().manual_seed(config.seed)

    def update() -> Any:
        num_micro_batches = max(1, config.global_batch_size // config.micro_batch_size)
        shape = (config.micro_batch_size, config.seq_len)
        rows = [torch.randint(vocab, shape, generator=source) for _ in range(num_micro_batches)]
        places = [torch.arange(config.seq_len).expand(shape)] if config.attention == "document" else []
        micro_batches = [make_micro_batch(ids, ids, device, *places) for ids in rows]
        return step.run(micro_batches, sum(ids.numel() for ids in rows))

    for _ in range(NUM_UPDATES - 1):
        update()
    optimizer.zero_grad()
    schedule, host = Schedule(live_actions(config, model, Live(optimizer))), HostCopy()
    if config.checkpoint_async:
        objects = {"optimizer": stateful_optimizer(optimizer, model), **schedule.stateful()}
        host.take(Contents.of(NUM_UPDATES - 1, model, objects, {}))
    held = held_by(model, optimizer) + averages_bytes(schedule.actions) + host.nbytes
    _, peak = tensor_peak(update, held, device)
    return peak

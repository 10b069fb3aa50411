"""The plan of weights in shards against PyTorch's own fully_shard: bytes held, and the highest point of an update.
Second source: torch's profiler, and the storages of its DTensors.

Peaks are measured over PyTorch's fake group, whose collectives send nothing: gloo's threads free a layer's buffer when
they come to it, on a busy machine an update later, and the peak would be theirs.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from sltrain.building.memory import optimizer_state_bytes, plan_model, update_shape, update_temporaries, whole_bytes
from sltrain.building.model import allocate, allocate_own, build_model, weight_dtype
from sltrain.building.trainer import build_updates
from sltrain.compose import TRAIN, compose_config
from sltrain.config import TrainConfig
from sltrain.engine.distributed import Ranks
from sltrain.engine.memory import bytes_of, held_by, tensor_peak
from sltrain.engine.micro_batch import make_micro_batch
from sltrain.engine.sharded import Settings, Sharded
from sltrain.layers.cost import set_paths
from sltrain.models.llama import LlamaForCausalLM
from sltrain.planning.memory_plan import GROUPS, NUM_STORED
from sltrain.planning.sharding import Sharding, local_shape, padded_numel
from sltrain.planning.traffic import Traffic, compute_seconds, plan_traffic

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SMALL = (
    "model=llama_60m data=stdlib device=cpu model.num_hidden_layers=3 model.vocab_size=1000 seq_len=64"
    " model.hidden_size=256 model.intermediate_size=688 rank=64 global_batch_size=2 micro_batch_size=2"
).split()


def config_of(overrides: str) -> TrainConfig:
    return compose_config([*SMALL, *overrides.split()], TRAIN)


def model_of(config: TrainConfig, device: torch.device = CPU) -> LlamaForCausalLM:
    assert config.model.vocab_size is not None
    model = build_model(config, config.model.vocab_size, weight_dtype(config, CPU))
    set_paths(model, config.layer_path, config.micro_batch_size * config.seq_len, device)
    return model


def local_bytes(tensors: Iterable[Tensor]) -> int:
    storages = {}
    for tensor in tensors:
        local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
        storages[local.untyped_storage().data_ptr()] = local.untyped_storage().nbytes()
    return sum(storages.values())


def shard(model: LlamaForCausalLM, sharding: Sharding) -> None:
    """As PyTorch's manual does it: each layer, and the rest."""
    sizes = (sharding.num_shards,) if sharding.replicas == 1 else (sharding.replicas, sharding.num_shards)
    names = ("replicas", "shards")[-len(sizes) :]
    mesh = init_device_mesh("cpu", sizes, mesh_dim_names=names)
    reduced = torch.float32 if sharding.reduced_element == 4 else None
    policy = MixedPrecisionPolicy(reduce_dtype=reduced)
    for module in (*model.model.layers, model):
        reshards = sharding.reshards and module is not model
        fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=reshards)


@contextmanager
def one_rank_of(world_size: int, rank: int) -> Iterator[None]:
    """A process group in which the other ranks do not exist."""
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def measure(config: TrainConfig, world_size: int, sharding: Sharding) -> tuple[int, int]:
    """Bytes held between updates, and the peak of tensors in one."""
    model = model_of(config)
    allocate(model, CPU)
    model.init_weights(0)
    shard(model, sharding)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    number = max(1, config.global_batch_size // config.micro_batch_size // world_size)
    size = (config.micro_batch_size, config.seq_len)

    def update() -> None:
        for i in range(number):
            ids = torch.randint(model.lm_head.out_features, size)
            model.set_requires_gradient_sync(sharding.reduces_each or i + 1 == number)  # type: ignore[operator]
            (model(*make_micro_batch(ids, ids, CPU)) * 1e-3).backward()
        optimizer.step()
        optimizer.zero_grad()

    update()
    state = (value for values in optimizer.state.values() for value in values.values())
    held = local_bytes([*model.parameters(), *model.buffers(), *state])
    return held, tensor_peak(update, held, CPU)[1]


ON_TWO = [
    ("", Sharding(2)),
    ("activation_checkpointing=true dtype=bfloat16", Sharding(2)),
    ("method=full", Sharding(2)),
    ("global_batch_size=12", Sharding(2)),
    ("global_batch_size=12", Sharding(2, reduces_each=False)),
    ("dtype=bfloat16", Sharding(2, reduced_element=4)),
    ("method=full", Sharding(2, reshards=False)),
]
ON_FOUR = [
    ("activation_checkpointing=true support=stratified", Sharding(4)),
    ("model.vocab_size=1001 rank=63 dtype=bfloat16", Sharding(4)),  # no length is a multiple of 4
    ("method=full", Sharding(2, replicas=2)),
]


@pytest.mark.parametrize(
    ("num_ranks", "overrides", "sharding"), [(2, *case) for case in ON_TWO] + [(4, *case) for case in ON_FOUR]
)
def test_every_rank_takes_what_the_plan_says(num_ranks: int, overrides: str, sharding: Sharding) -> None:
    config = config_of(overrides)
    plan = plan_model(config, model_of(config), CPU, num_ranks, sharding)
    others = set(GROUPS[NUM_STORED:]) - {"optimizer_state"}
    planned = sum(size for name, size in plan.groups.items() if name not in others)
    largest = 0
    for rank in (0, num_ranks - 1):  # the last has the least rows
        with one_rank_of(num_ranks, rank):
            held, peak = measure(config, num_ranks, sharding)
        assert peak == pytest.approx(plan.total_bytes, rel=0.03), plan
        largest = max(largest, held)
    assert largest == planned


def measure_turns(ranks: Ranks, config: TrainConfig) -> tuple[int, int]:
    """Bytes of an optimizer's state here, and what its update takes besides what is there before it."""
    model, strategy = model_of(config), Sharded(ranks, Settings())
    strategy.shard(model, list(model.model.layers), lambda modules: allocate_own(modules, CPU))
    optimizer = build_updates(config, model, strategy)
    named = strategy.named_parameters(model)

    def held() -> int:
        for _, local in named:
            local.grad = torch.randn_like(local)
        return held_by(model, optimizer, strategy) + bytes_of(
            local.grad for _, local in named if local.grad is not None
        )

    for _, local in named:
        torch.nn.init.normal_(local)
    held()
    optimizer.step()
    state = held_by(model, optimizer, strategy) - held_by(model, torch.optim.SGD(model.parameters()), strategy)
    before = held()
    _, peak = tensor_peak(optimizer.step, before, CPU)
    return state, peak - before


def test_an_owner_takes_what_the_plan_says(on_two_ranks: Callable[..., list[Any]]) -> None:
    """Modules are dealt whole, seven of a layer to two owners; both factors of one are there while it is updated. What
    muon's own steps take is planned for more nearly square matrices."""
    overrides = "model.hidden_size=64 model.intermediate_size=172 model.num_hidden_layers=1 rank=16 method=low_rank"
    config = config_of(f"{overrides} optimizer=muon")
    found = on_two_ranks(lambda ranks: measure_turns(ranks, config))
    model = model_of(config)
    planned = update_temporaries(config, model, CPU, 2)
    assert max(state for state, _ in found) == optimizer_state_bytes(config, model, 2)
    assert 2 * 4 * 16 * (172 + 64) < max(taken for _, taken in found) <= planned


# ---- counts


@pytest.mark.parametrize("shape", [(10,), (7, 3), (2, 5), (0,), (143,)])
def test_a_shard_is_what_torch_chunks(shape: tuple[int, ...]) -> None:
    chunks = torch.empty(shape).chunk(4)
    assert local_shape(shape, 4) == tuple(chunks[0].shape)
    assert padded_numel(shape, 4) == 4 * chunks[0].numel() >= math.prod(shape)


def test_a_quarter_of_the_weights_and_all_positions() -> None:
    config = config_of("model.hidden_size=512 model.intermediate_size=1024 rank=64 model.vocab_size=4000")
    alone = plan_model(config, model_of(config), CUDA, 1)
    shared = plan_model(config, model_of(config), CUDA, 4, Sharding(4))
    assert shared.groups["indices"] == alone.groups["indices"] > 0
    for group in ("dense_weights", "low_rank_weights", "sparse_values", "optimizer_state"):
        assert shared.groups[group] == pytest.approx(alone.groups[group] / 4, rel=1e-3)
    assert shared.groups["gathered_weights"] > 0 == alone.groups["gathered_weights"]


# ---- what is sent


class Counted:
    """Bytes that a rank gives and takes in the collectives of an update, counted as they are called."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sent: dict[str, float] = {}
        import torch.distributed.fsdp._fully_shard._fsdp_collectives as collectives

        for name in ("all_gather_single", "reduce_scatter_single", "all_reduce"):
            original = getattr(collectives.dist, name)
            monkeypatch.setattr(collectives.dist, name, self.counting(name, original))

    def counting(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            tensors = [value for value in (*args, *options.values()) if isinstance(value, Tensor)]
            largest = max(tensor.numel() * tensor.element_size() for tensor in tensors)
            n = torch.distributed.get_world_size(options.get("group"))
            factor = 2 if name == "all_reduce" else 1
            self.sent[name] = self.sent.get(name, 0) + factor * (n - 1) / n * largest
            return original(*args, **options)

        return call


@pytest.mark.parametrize(
    ("overrides", "sharding"),
    [
        ("global_batch_size=8", Sharding(2)),
        ("global_batch_size=8", Sharding(2, reduces_each=False, reshards=False)),
        ("dtype=bfloat16", Sharding(1, replicas=2, reduced_element=4)),
    ],
)
def test_the_traffic_is_what_torch_asks_for(
    overrides: str, sharding: Sharding, on_two_ranks: Callable[..., list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(f"{overrides} model.num_hidden_layers=2 model.hidden_size=64 model.intermediate_size=129 rank=7")

    def count(ranks: Ranks) -> dict[str, float]:
        model = model_of(config)
        allocate(model, CPU)
        model.init_weights(0)
        shard(model, sharding)
        counted = Counted(monkeypatch)
        number = config.global_batch_size // config.micro_batch_size // 2 or 1
        for i in range(number):
            ids = torch.randint(1000, (2, 64))
            model.set_requires_gradient_sync(sharding.reduces_each or i + 1 == number)  # type: ignore[operator]
            model(*make_micro_batch(ids, ids, CPU)).backward()
        return counted.sent

    sent = on_two_ranks(count)[0]
    model = model_of(config)
    planned = plan_traffic(model, update_shape(config, CPU, model, 2, sharding), 2)
    assert planned.gather_forward + planned.gather_backward == sent.get("all_gather_single", 0)
    assert planned.reduce_scatter == sent.get("reduce_scatter_single", 0)
    assert planned.all_reduce == sent.get("all_reduce", 0)
    assert planned.total > 0


def test_whole_tensors_travel_to_their_owners_and_back(
    on_two_ranks: Callable[..., list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On average over ranks, as owners have about as many elements."""
    config = config_of("method=full optimizer=muon model.num_hidden_layers=2 model.hidden_size=64 parallel=fsdp")

    def count(ranks: Ranks) -> int:
        model, strategy = model_of(config), Sharded(ranks, Settings())
        allocate(model, CPU)
        model.init_weights(0)
        strategy.shard(model, list(model.model.layers))
        optimizer = build_updates(config, model, strategy)
        for _, parameter in strategy.named_parameters(model):
            parameter.grad = torch.ones_like(parameter)
        sent = 0
        gather, scatter = torch.distributed.gather, torch.distributed.scatter

        def gathered(tensor: Tensor, *args: Any, group_dst: int, **options: Any) -> None:
            nonlocal sent
            sent += tensor.nbytes if ranks.rank != group_dst else 0
            gather(tensor, *args, group_dst=group_dst, **options)

        def scattered(tensor: Tensor, *args: Any, group_src: int, **options: Any) -> None:
            nonlocal sent
            sent += tensor.nbytes if ranks.rank == group_src else 0  # the other rank's rows are as many
            scatter(tensor, *args, group_src=group_src, **options)

        monkeypatch.setattr(torch.distributed, "gather", gathered)
        monkeypatch.setattr(torch.distributed, "scatter", scattered)
        optimizer.step()
        return sent

    model = model_of(config)
    shape, whole = update_shape(config, CPU, model, 2, Sharding(2)), whole_bytes(config, model, 2)
    planned = plan_traffic(model, shape, 2, whole).whole_tensors
    assert sum(on_two_ranks(count)) / 2 == planned > 0


def test_ddp_sends_the_gradients_twice_less_a_share() -> None:
    config = config_of("global_batch_size=16")
    model = model_of(config)
    gradients = sum(p.numel() * 4 for p in model.parameters())
    planned = plan_traffic(model, update_shape(config, CUDA, model, 4), 4)
    assert planned == Traffic(all_reduce=1.5 * gradients)
    assert planned.seconds(bandwidth=2) == planned.total / 2e9


def test_recomputation_takes_a_third_more_in_the_layers() -> None:
    def seconds(overrides: str) -> float:
        config = config_of(f"{overrides} method=full global_batch_size=8")
        model = model_of(config)
        return compute_seconds(model, update_shape(config, CUDA, model, 2), peak_tflops=1e-3)

    h, i, tokens = 256, 688, 2 * 2 * 64
    layers, head = 3 * (4 * h * h + 3 * h * i + h * 65), 1000 * h
    assert seconds("") == pytest.approx(6 * (layers + head) * tokens / 1e9)
    assert seconds("activation_checkpointing=true") == pytest.approx((8 * layers + 6 * head) * tokens / 1e9)

"""Config -> benchmark: the one file that sees every room and what `sltrain-bench` measures in them."""

import dataclasses
import importlib.util
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sltrain.bench_config import CANDIDATES, BenchConfig
from sltrain.benchmarks.alone import Died, run_alone
from sltrain.benchmarks.calibrate import Probe, measure_prices, price_table
from sltrain.benchmarks.data import (
    NUM_STREAMS,
    ROUNDS,
    SHUFFLE_BLOCK,
    data_table,
    document_by_document,
    measure_throughput,
    measure_waiting,
)
from sltrain.benchmarks.layer import Case, layer_tables, measure_layers
from sltrain.benchmarks.machine import describe_machine, machine_line, memory_bytes
from sltrain.benchmarks.published import PublishedLinear
from sltrain.benchmarks.step import (
    Alone,
    StepCandidate,
    Stepper,
    attention_multiply_adds,
    guessed_seconds,
    measure_steps,
    run_alone_in_here,
    step_table,
    those_that_fit,
)
from sltrain.benchmarks.timing import product_task, run_once, stopwatch
from sltrain.build_data import build_sources, build_tokenizer
from sltrain.build_model import allocate, build_model, pick_dtype
from sltrain.config import MethodConfig, ModelConfig, TrainConfig
from sltrain.data.sources import Source
from sltrain.data.stream import TrainStream
from sltrain.data.tokenizer import Tokenizer
from sltrain.engine.distributed import Ranks, pick_device
from sltrain.engine.memory import PeakMemory
from sltrain.engine.step import train_step
from sltrain.layers import cpu_kernel
from sltrain.layers.convert import replace_linears
from sltrain.layers.cost import COSTS, PASSES, choose_path, machine_kind, set_paths
from sltrain.layers.linear import FactoredLinear, LowRankLinear, SLTrainLinear
from sltrain.models.accounting import count_parameters
from sltrain.models.llama import is_projection
from sltrain.optim.build import build_optimizer

Say = Callable[[str], None]
SEED = 42
LAYER_SPARSITY = 0.03  # the paper's, from 60M to 1B
LAYER_ALPHA = 16  # has no influence on time
FEW_ROWS = 16  # of x, where a layer's work is to make W dense
SMALL_VOCAB = 4096  # for models without a vocabulary of their own: what experiment=quickstart gives them
STEP_ORDER = (  # what matters most comes first: time may not suffice for all
    "full uniform block transformers_published transformers checkpointing"
).split()
LEAST_STEPS = 3
NUM_PRODUCTS = 8  # timed as one, beside updates that take so much longer
PADDINGS = ("truncate_pad", "pack")


@dataclass
class Result:
    """What a benchmark found."""

    rows: list[dict[str, Any]]
    text: str  # for people


@dataclass
class Bench:
    """A benchmark, its machine, and the time by which it should be done."""

    config: BenchConfig
    train: TrainConfig | None  # what=step and what=data: the run whose parts are measured
    device: torch.device
    dtype: torch.dtype
    deadline: float  # of time.monotonic
    say: Say  # one line of progress

    def run(self) -> Result:
        """Measure. Raises ValueError for what the user can mend."""
        torch.manual_seed(SEED)
        return {"layer": run_layer, "step": run_step, "data": run_data}[self.config.what](self)

    @property
    def machine(self) -> dict[str, Any]:
        """What the numbers depend on besides the code."""
        kernel = cpu_kernel.status() or "ready" if self.device.type == "cpu" else None
        return {**describe_machine(self.device, self.dtype), "cpu_kernel": kernel}

    @property
    def machine_line(self) -> str:
        """The same for people."""
        return machine_line(self.machine)


def build_bench(config: BenchConfig, train: TrainConfig | None, say: Say) -> Bench:
    """Raises ValueError for a device that is not there."""
    device = pick_device(config.device)
    return Bench(config, train, device, pick_dtype(config.dtype, device), time.monotonic() + config.time_limit_s, say)


# what=layer


def run_layer(bench: Bench) -> Result:
    """Every candidate on every shape."""
    config = bench.config
    if config.calibrate:
        return run_calibration(bench)
    names = config.candidates or list(CANDIDATES["layer"])
    cases = [layer_case(bench, names, *shape) for shape in config.shapes]
    rows = measure_layers(
        cases,
        config.tokens,
        device=bench.device,
        dtype=bench.dtype,
        repeats=config.repeats,
        deadline=bench.deadline,
        say=bench.say,
    )
    return Result(rows, layer_tables(rows))


def layer_case(bench: Bench, names: list[str], out_features: int, in_features: int, rank: int) -> Case:
    """The candidates of one shape. Raises ValueError for a sparsity or block size that it cannot have."""
    config = bench.config
    sparsity = config.sparsity or LAYER_SPARSITY
    like: dict[str, Any] = {"device": bench.device, "dtype": bench.dtype}
    made: dict[tuple[str, str], nn.Module] = {}

    def sltrain(support: str, path: str | None) -> nn.Module:
        layer = SLTrainLinear(
            in_features,
            out_features,
            rank,
            sparsity,
            LAYER_ALPHA,
            support=support,
            block_size=config.block_size if support == "block" else None,
            **like,
        )
        sizes = (layer.out_features, layer.in_features, rank, layer.support.num_nonzero)
        layer.path = path or choose_path(config.tokens, *sizes, support, machine_kind(bench.device, bench.dtype))
        return made.setdefault((support, layer.path), layer)

    def make(name: str) -> nn.Module:
        if name == "dense":
            return nn.Linear(in_features, out_features, bias=False, **like)
        if name == "low_rank":
            return LowRankLinear(in_features, out_features, rank, LAYER_ALPHA, **like)
        if name == "published":
            return PublishedLinear(in_features, out_features, rank, sparsity, LAYER_ALPHA, **like)
        support, _, path = name.partition("_")
        return sltrain(support, path or None)

    try:
        modules = {name: make(name) for name in names}
    except ValueError as error:
        raise ValueError(f"{out_features}x{in_features}: {error}") from error
    for module in modules.values():
        leave_zero(module)
    paths = {name: module.path for name, module in modules.items() if isinstance(module, SLTrainLinear)}
    num_nonzero = int(sparsity * out_features * in_features)
    return Case(out_features, in_features, rank, num_nonzero, modules, paths)


def run_calibration(bench: Bench) -> Result:
    """The prices of cost.py on every shape, measured beside used. Raises ValueError as `layer_case` does."""
    config = bench.config
    rows = measure_prices(
        [probe for shape in config.shapes for probe in probes(bench, *shape)],
        config.tokens,
        device=bench.device,
        dtype=bench.dtype,
        repeats=config.repeats,
        deadline=bench.deadline,
        say=bench.say,
    )
    return Result(rows, price_table(rows))


def probes(bench: Bench, out_features: int, in_features: int, rank: int) -> list[Probe]:
    """A layer for each price: S alone, and W made dense for few rows of x."""
    config = bench.config
    costs = COSTS[machine_kind(bench.device, bench.dtype)]

    def layer(rank: int, support: str, path: str) -> SLTrainLinear:
        made = SLTrainLinear(
            in_features,
            out_features,
            rank,
            config.sparsity or LAYER_SPARSITY,
            LAYER_ALPHA,
            support=support,
            block_size=config.block_size if support == "block" else None,
            path=path,
            device=bench.device,
            dtype=bench.dtype,
        )
        leave_zero(made)
        return made

    shape = {"out_features": out_features, "in_features": in_features}
    found = []
    for price, support in (("entry", "uniform"), ("block_entry", "block"), ("column_entry", "column")):
        module, rows = layer(0, support, "factored"), config.tokens
        count = 3 * rows * module.num_sparse
        found.append(Probe(price, getattr(costs, price), module, **shape, num_rows=rows, known=0, count=count))
    entries = out_features * in_features
    known, count = (3 * FEW_ROWS + 4 * rank) * entries, PASSES * entries
    composed = layer(rank, "uniform", "composed")
    found.append(
        Probe("weight_pass", costs.weight_pass, composed, **shape, num_rows=FEW_ROWS, known=known, count=count)
    )
    return found


@torch.no_grad()
def leave_zero(module: nn.Module) -> None:
    """Training starts at B = 0 and leaves it at once; no product should be timed on zeros."""
    B = getattr(module, "B", None)
    if isinstance(B, nn.Parameter):
        B.normal_(0, 0.02)


# what=step


def run_step(bench: Bench) -> Result:
    """Every candidate's update of the same model. Raises ValueError for a recipe the model cannot have."""
    config, train = bench.config, bench.train
    assert train is not None
    names = config.candidates or STEP_ORDER
    if config.candidates is None and importlib.util.find_spec("transformers") is None:
        bench.say("transformers is not installed: without it nothing of it is compared")
        names = [name for name in names if not name.startswith("transformers")]
    candidates = [step_candidate(bench, name) for name in names]

    sizes = (config.batch * config.seq_len, train.model.intermediate_size, train.model.hidden_size)
    product = product_task(*sizes, bench.device, bench.dtype, times=NUM_PRODUCTS)
    product_multiply_adds = NUM_PRODUCTS * sizes[0] * sizes[1] * sizes[2]
    least = len(candidates) if config.candidates else LEAST_STEPS
    seconds = min(run_once(product, stopwatch(bench.device)) for _ in range(5))
    guess = guessed_seconds(product_multiply_adds / seconds)
    candidates = those_that_fit(candidates, guess, bench.deadline - time.monotonic(), least, bench.say)
    rows = measure_steps(
        candidates,
        random_ids(bench),
        product,
        product_multiply_adds,
        memory_bytes=memory_bytes(bench.device),
        repeats=config.repeats,
        deadline=bench.deadline,
        least=least,
        say=bench.say,
    )
    return Result(rows, step_table(rows))


def random_ids(bench: Bench) -> Tensor:
    """Full rows (batch, seq_len) of random ids: no padding, which would be work that is left out."""
    generator = torch.Generator().manual_seed(SEED)
    shape = (bench.config.batch, bench.config.seq_len)
    return torch.randint(vocab_size(bench), shape, generator=generator).to(bench.device)


def vocab_size(bench: Bench) -> int:
    assert bench.train is not None
    return bench.train.model.vocab_size or SMALL_VOCAB


def train_config(bench: Bench, name: str) -> TrainConfig:
    """The run that a candidate stands for; for those of transformers, the one of the same mathematics."""
    assert bench.train is not None
    method = {"full": "full", "transformers": "full", "low_rank": "low_rank"}.get(name, "sltrain")
    support = name if name in ("stratified", "block", "column") else "uniform"
    return dataclasses.replace(
        bench.train,
        method=MethodConfig(method),
        support=support,
        block_size=bench.config.block_size if support == "block" else None,
        activation_checkpointing=name == "checkpointing",
    )


def step_candidate(bench: Bench, name: str) -> StepCandidate:
    """A candidate and what is known of it without memory. Raises ValueError for a recipe the model cannot have, and for
    transformers where it is not installed."""
    if name.startswith("transformers") and importlib.util.find_spec("transformers") is None:
        raise ValueError(f"candidates: {name} needs transformers: run `pip install transformers`, or leave it out")
    config = train_config(bench, name)
    model = build_model(config, vocab_size(bench), bench.dtype)
    path = None
    if config.method.name == "sltrain" and name != "transformers_published":
        num_rows = bench.config.batch * bench.config.seq_len
        paths = set_paths(model, config.layer_path, num_rows, bench.device)
        path = " ".join(sorted(set(paths.values())))
    num_parameters = count_parameters(model)["total"]
    return StepCandidate(
        name,
        build=partial(build_stepper, bench, name),
        measure_alone=partial(measure_alone, bench, name),
        multiply_adds=update_multiply_adds(model, config, bench.config.batch, bench.config.seq_len),
        num_parameters=num_parameters,
        state_bytes=4 * num_parameters * bench.dtype.itemsize,
        path=path,
    )


def update_multiply_adds(model: nn.Module, config: TrainConfig, rows: int, tokens: int) -> int:
    """Multiply-adds that the products of an update must do, by the method's mathematics, not by how it is computed."""
    layers = head = 0
    for name, module in model.named_modules():
        if isinstance(module, FactoredLinear):
            layers += module.rank * (module.in_features + module.out_features) + module.num_sparse
        elif isinstance(module, nn.Linear):
            work = module.in_features * module.out_features
            head, layers = (head + work, layers) if name == "lm_head" else (head, layers + work)
    attention = attention_multiply_adds(rows, tokens, config.model.hidden_size, config.model.num_hidden_layers)
    forward = rows * tokens * layers + attention
    passes = 4 if config.activation_checkpointing else 3
    return passes * forward + 3 * rows * tokens * head


def measure_alone(bench: Bench, name: str) -> Alone:
    """What a candidate needs in a process of its own. Raises ValueError if it was killed."""
    try:
        return run_alone(_alone_in_here, bench.config, bench.train, name)
    except Died as error:
        raise ValueError(
            f"{name} did not survive ({error}): probably too little memory; lower batch or seq_len, or leave it out"
        ) from error


def _alone_in_here(config: BenchConfig, train: TrainConfig, name: str) -> Alone:
    bench = build_bench(config, train, lambda line: None)
    if name.startswith("transformers"):
        import transformers  # noqa: F401  (part of what is resident, and seconds that are not the model's)
    memory = PeakMemory(bench.device)
    return run_alone_in_here(partial(build_stepper, bench, name), random_ids(bench), memory.peak_bytes)


def build_stepper(bench: Bench, name: str) -> Stepper:
    """A model with memory and values, its optimizer, and the update that `sltrain-train` makes; transformers' models
    get the plain loop of their users, with the same optimizer."""
    config = train_config(bench, name)
    if name.startswith("transformers"):
        model: nn.Module = transformers_model(bench, config)
    else:
        ours = build_model(config, vocab_size(bench), bench.dtype)
        allocate(ours, bench.device)
        ours.init_weights(SEED)
        set_paths(ours, config.layer_path, bench.config.batch * bench.config.seq_len, bench.device)
        model = ours
    for module in model.modules():
        leave_zero(module)
    optimizer = build_optimizer(
        model.named_parameters(),
        name="adamw",
        lr=1e-4,
        betas=(0.9, 0.999),
        eps=1e-8,
        weight_decay=0.0,
        device=bench.device,
    )
    ranks = Ranks(rank=0, world_size=1, device=bench.device)

    def update(ids: Tensor) -> object:
        if not name.startswith("transformers"):
            return train_step(model, optimizer, [(ids, ids)], ids.shape[0] * (ids.shape[1] - 1), ranks)
        optimizer.zero_grad(set_to_none=True)
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        return loss.item()

    return Stepper(model, update)


def transformers_model(bench: Bench, config: TrainConfig) -> nn.Module:
    """transformers' LLaMA of the same shape, its projections dense or as published."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape: ModelConfig = config.model
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab_size(bench),
            hidden_size=shape.hidden_size,
            intermediate_size=shape.intermediate_size,
            num_hidden_layers=shape.num_hidden_layers,
            num_attention_heads=shape.num_attention_heads,
            num_key_value_heads=shape.num_key_value_heads or shape.num_attention_heads,
            max_position_embeddings=shape.max_position_embeddings,
            rms_norm_eps=shape.rms_norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},
            tie_word_embeddings=False,
        )
    )

    def make(name: str, linear: nn.Linear) -> nn.Module:
        return PublishedLinear(linear.in_features, linear.out_features, config.rank, config.sparsity, config.alpha)

    if config.method.name == "sltrain":
        replace_linears(model, is_projection, make)
    module: nn.Module = model
    return module.to(bench.device, bench.dtype)


# what=data


def run_data(bench: Bench) -> Result:
    """Throughput of the training stream beside tokenizing document by document, and the waiting of a fast consumer."""
    config, train = bench.config, bench.train
    assert train is not None
    if config.path:
        train = dataclasses.replace(train, data=dataclasses.replace(train.data, name="local"), path=config.path)
    train = dataclasses.replace(train, tokenizer=config.tokenizer)
    source, _ = build_sources(train, bench.say)
    streams: list[TrainStream] = []

    def stream(padding: str, num_streams: int, shuffle_block: int) -> Iterator[int]:
        streams.append(build_stream(bench, train, source, padding, num_streams, shuffle_block))
        return (batch.num_tokens for batch in streams[-1])

    try:
        json = build_bench_tokenizer(bench, train, source).json
        rows = measure_throughput(
            document_by_document(endless_texts(source), json, train.seq_len, train.global_batch_size),
            {f"stream, {padding}": stream(padding, NUM_STREAMS, SHUFFLE_BLOCK) for padding in PADDINGS},
            rounds=config.repeats or ROUNDS,
            say=bench.say,
        )
        num_parameters = count_parameters(build_model(train, vocab_size(bench), bench.dtype))["total"]
        for padding in PADDINGS:
            rows.append(
                measure_waiting(
                    f"training of {train.model.name}, {padding}",
                    stream(padding, train.data.num_streams, train.data.shuffle_block),
                    positions_per_batch=train.global_batch_size * train.seq_len,
                    num_parameters=num_parameters,
                    say=bench.say,
                )
            )
    finally:
        for open_stream in streams:
            open_stream.close()
    text = data_table(rows)
    return Result([{"measured": row.pop("what"), "ratio_to_dense": None, **row} for row in rows], text)


def build_stream(
    bench: Bench, train: TrainConfig, source: Source, padding: str, num_streams: int, shuffle_block: int
) -> TrainStream:
    """The stream of a run on one process, with a tokenizer, and so a memory of words, of its own."""
    return TrainStream(
        source,
        build_bench_tokenizer(bench, train, source),
        seed=SEED,
        seq_len=train.seq_len,
        padding=padding,
        global_batch_size=train.global_batch_size,
        num_streams=num_streams,
        shuffle_block=shuffle_block,
        on_event=lambda line: None,  # a small corpus begins again and again
        prefetch=2,
    )


def build_bench_tokenizer(bench: Bench, train: TrainConfig, source: Source) -> Tokenizer:
    return build_tokenizer(train, source, Ranks(rank=0, world_size=1, device=bench.device), bench.say)


def endless_texts(source: Source) -> Iterator[str]:
    """The texts of a corpus, again and again."""
    while True:
        for shard in range(source.num_shards):
            for document in source.documents(shard):
                yield document.text

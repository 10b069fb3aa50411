"""`sltrain-bench what=step`: one update of a model, by every method and by transformers."""

import dataclasses
import importlib.util
import time
from functools import partial

import torch
from torch import Tensor, nn

from sltrain.api.bench import SEED, Bench, Result, build_bench, leave_zero, vocab_size
from sltrain.api.bench_config import BenchConfig
from sltrain.benchmarks.alone import Died, run_alone
from sltrain.benchmarks.machine import memory_bytes
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
from sltrain.building.model import allocate, build_model
from sltrain.compose import with_plugin
from sltrain.config import ModelConfig, TrainConfig
from sltrain.engine.distributed import Ranks
from sltrain.engine.memory import PeakMemory
from sltrain.engine.step import OrdinaryStep
from sltrain.layers.convert import replace_linears
from sltrain.layers.cost import set_paths
from sltrain.layers.linear import FactoredLinear
from sltrain.models.llama import is_projection
from sltrain.optim.build import build_optimizer
from sltrain.optim.kinds.adamw import AdamWOptions
from sltrain.planning.accounting import count_parameters

STEP_ORDER = (  # what matters most comes first: time may not suffice for all
    "full uniform block transformers_published transformers checkpointing"
).split()
LEAST_STEPS = 3
NUM_PRODUCTS = 8  # timed as one, beside updates that take so much longer


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


def train_config(bench: Bench, name: str) -> TrainConfig:
    """The run that a candidate stands for; for those of transformers, the one of the same mathematics."""
    assert bench.train is not None
    method = {"full": "full", "transformers": "full", "low_rank": "low_rank"}.get(name, "sltrain")
    support = name if name in ("stratified", "block", "column") else "uniform"
    config = dataclasses.replace(
        bench.train,
        support=support,
        block_size=bench.config.block_size if support == "block" else None,
        activation_checkpointing=name == "checkpointing",
    )
    return with_plugin(config, "method", method)


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
        AdamWOptions(name="adamw"),
        lr=1e-4,
        weight_decay=0.0,
        device=bench.device,
    )
    step = OrdinaryStep(model, optimizer, Ranks(rank=0, world_size=1, device=bench.device))

    def update(ids: Tensor) -> object:
        if not name.startswith("transformers"):
            return step.run([(ids, ids)], ids.shape[0] * (ids.shape[1] - 1))
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

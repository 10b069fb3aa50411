"""Config and model -> Trainer: memory and values for the model, its optimizer and learning rate, what a checkpoint
remembers, and where metrics go."""

import dataclasses
import itertools
import logging
from collections.abc import Callable, Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from sltrain import kernels
from sltrain.affine import CodedTensor
from sltrain.building.model import allocate, allocate_own, precision_name
from sltrain.building.parametrization import Scale, scales
from sltrain.building.phases import Live, change_until, live_actions, phases_of
from sltrain.building.start_from import Start
from sltrain.building.support_from import SupportSource
from sltrain.config import TrainConfig, num_steps, rate_schedule
from sltrain.data.evaluation import EvalSet
from sltrain.data.mixed_evaluation import MixedEvalSet
from sltrain.data.stream import TrainStream
from sltrain.engine.actions import Phase, Schedule, Stateful, begun, generator_for
from sltrain.engine.checkpoint import Checkpointer
from sltrain.engine.distributed import Ranks
from sltrain.engine.memory import PeakMemory, RunMemory
from sltrain.engine.metrics import JsonlSink, ProgressBar, Sink, WandbSink, rewrite_until
from sltrain.engine.micro_batch import Feed
from sltrain.engine.profile import Profile
from sltrain.engine.saving import Saves
from sltrain.engine.step import OrdinaryStep, PerLayerStep, UpdateStep
from sltrain.engine.stop import StopRequest
from sltrain.engine.strategy import Strategy
from sltrain.engine.tensorboard import TensorBoardSink
from sltrain.engine.trackio import TrackioSink
from sltrain.engine.trainer import Progress, Trainer
from sltrain.events import Event
from sltrain.layers.base import ReplacedLinear
from sltrain.layers.cost import machine_kind, set_paths
from sltrain.methods.advice import weight_norms
from sltrain.models.llama import LlamaForCausalLM
from sltrain.optim.build import build_optimizer, check_updates, set_learning_rate
from sltrain.optim.named_state import OptimizerState, rebuild_optimizer
from sltrain.optim.per_layer import PerLayerUpdate, UpdateInsideBackward
from sltrain.optim.schedule import effective_warmup
from sltrain.parameters import ParamInfo
from sltrain.planning.accounting import count_parameters, stored_bytes
from sltrain.planning.flops import Utilisation, peak_tflops
from sltrain.planning.memory_plan import MemoryPlan
from sltrain.planning.roles import parameters_of
from sltrain.runs.run_folder import RunFolder

logger = logging.getLogger(__name__)


def build_trainer(
    config: TrainConfig,
    folder: RunFolder,
    model: LlamaForCausalLM,
    stream: TrainStream,
    eval_set: EvalSet | MixedEvalSet,
    strategy: Strategy,
    plan: MemoryPlan | None,
    start: Start | None = None,
    chosen: SupportSource | None = None,
) -> Trainer:
    """Give the model memory and values, those of the newest checkpoint if there is one, else those of `start`, with S
    where `chosen` says, and all it needs to train."""
    ranks = strategy.ranks
    memory = RunMemory(PeakMemory(ranks.device), None if plan is None else plan.total_bytes)
    checkpointer = Checkpointer(folder.path, config.keep_last, together=strategy.savers)
    checkpoint, step = ranks.on_main(checkpointer.find_latest_step)
    change_until(config, model, step)
    give_memory(config, model, strategy, is_new=checkpoint is None, start=start, chosen=chosen)
    live = Live(build_updates(config, model, strategy), strategy.ranks.sum_)
    schedule = Schedule(
        live_actions(config, model, live, strategy.named_parameters(model)),
        phases_of(config),
        config.seed,
        agree=lambda: strategy.agree(model),
    )
    objects = {"optimizer": stateful_optimizer(live.optimizer, model), **schedule.stateful()}
    saved: dict[str, Any] = {}
    if checkpoint is not None:
        saved = ranks.everywhere(lambda: restore(checkpointer, checkpoint, model, objects, stream, strategy))
        if strategy.is_sharded:  # indices come from a file that each process has read
            strategy.agree(model)
        ranks.on_main(lambda: folder.write_config(dataclasses.asdict(config)))
        ranks.on_main(lambda: checkpointer.clean(checkpoint))
        _tell_resumed(step, checkpoint, stream)
    progress = Progress(**saved.get("progress", {}))
    arithmetic = fix_arithmetic(config, model, saved.get("arithmetic", {}), ranks.device)
    compiled = compile_model(model, strategy) if config.compile else model
    trainer = Trainer(
        model=compiled,
        update_step=build_step(config, compiled, live.optimizer, strategy),
        schedule=schedule,
        objects=objects,
        feed=Feed(stream, ranks, StopRequest(), config.micro_batch_size, saved.get("stream", {})),
        eval_set=eval_set,
        strategy=strategy,
        saves=Saves(checkpointer, ranks, config.checkpoint_async, progress.step),
        sinks=ranks.everywhere(lambda: build_sinks(config, folder, progress.step) if ranks.is_main else []),
        memory=memory,
        set_learning_rate=learning_rate_setter(config, live),
        model_metrics=lambda: weight_norms(model, strategy.whole),
        speed_metrics=build_utilisation(config, model, ranks).numbers,
        final_metrics=partial(final_numbers, config, model, memory),
        progress=progress,
        built_with={
            "arithmetic": arithmetic,
            "parallel": {"name": strategy.name, "num_processes": ranks.world_size},
        },
        profile=build_profile(config, folder, progress.step, ranks),
    )
    schedule.enter = partial(enter_phase, config, model, trainer, live)
    return trainer


def give_memory(
    config: TrainConfig,
    model: LlamaForCausalLM,
    strategy: Strategy,
    is_new: bool,
    start: Start | None,
    chosen: SupportSource | None = None,
) -> None:
    """Give a model on the meta device memory, and its first values if the run `is_new`: otherwise every value comes
    from a checkpoint. Of a model in shards a process holds one decoder layer whole at a time, or all of it where its
    first values need that: weights that were trained before, positions chosen by such, and phases that begin at
    once."""
    ranks, layers = strategy.ranks, list(model.model.layers)
    needs_whole = is_new and (start is not None or chosen is not None or bool(begun(phases_of(config), 0)))
    if strategy.is_sharded and not needs_whole:

        def prepare(modules: Collection[nn.Module]) -> None:
            ranks.everywhere(lambda: allocate_own(modules, ranks.device))
            if is_new:
                model.init_weights(config.seed, modules)
                own = (module.parameters(recurse=False) for module in model.modules() if module in modules)
                ranks.send_from_main(itertools.chain.from_iterable(own))  # a factorization differs between machines

        strategy.shard(model, layers, prepare)
        if is_new:
            strategy.agree(model)
        return
    ranks.everywhere(lambda: allocate(model, ranks.device))
    if is_new:
        begin(config, model, start, chosen, strategy)
    strategy.shard(model, layers)


def begin(
    config: TrainConfig,
    model: LlamaForCausalLM,
    start: Start | None,
    chosen: SupportSource | None,
    strategy: Strategy,
) -> None:
    """Give a new run its first values, the same on all ranks: random ones by the seed, those of phases that begin at
    once, chosen positions of S, and over them the weights that were trained before."""
    model.init_weights(config.seed)
    for phase in begun(phases_of(config), 0):
        phase.start(model, generator_for(config.seed, phase.name, 0))
    if chosen is not None:
        chosen.choose(model, strategy.ranks)
    if start is not None:
        start.fill(model, strategy.ranks, config.micro_batch_size)
    # It is whole here, also one that will be cut.
    strategy.ranks.send_from_main((*model.parameters(), *model.buffers()))


def compile_model(model: LlamaForCausalLM, strategy: Strategy) -> nn.Module:
    """The model as torch.compile makes it in its first pass; of one in shards each decoder layer, which is gathered
    before it and dropped after it."""
    if not strategy.is_sharded:
        return cast(nn.Module, torch.compile(model))
    for layer in model.model.layers:
        layer.compile()
    return model


def final_numbers(config: TrainConfig, model: LlamaForCausalLM, memory: RunMemory) -> Event:
    """What the final line says of the run besides its evaluation."""
    return {
        "dtype": precision_name(model.lm_head.weight.dtype, model.compute_dtype),
        "peak_memory_measure": memory.process.measure,
        "num_parameters": count_parameters(model),
        "index_bytes": stored_bytes(model)["indices"],
        **({} if config.init_from is None else {"init_from": config.init_from}),
    }


def enter_phase(
    config: TrainConfig,
    model: LlamaForCausalLM,
    trainer: Trainer,
    live: Live,
    phase: Phase,
    generator: torch.Generator,
) -> None:
    """Give a running model the structure of a phase, and the trainer an optimizer for it, with the state of what
    stays."""
    logger.info(f"phase      {phase.name} begins after update {phase.after:,}")
    trainer.update_step.close()
    phase.change(model)
    phase.start(model, generator)
    if phase.decomposes:
        trainer.strategy.agree(model)
    live.optimizer = rebuild_updates(config, model, trainer.strategy, live.optimizer)
    trainer.update_step = build_step(config, trainer.model, live.optimizer, trainer.strategy)
    before = {name: kept.state_dict() for name, kept in trainer.schedule.stateful().items()}
    trainer.schedule.actions = live_actions(config, model, live, trainer.strategy.named_parameters(model))
    after = trainer.schedule.stateful()
    for name in before.keys() & after.keys():
        after[name].load_state_dict(before[name])
    trainer.objects = {"optimizer": stateful_optimizer(live.optimizer, model), **after}
    trainer.measure_anew()
    chosen = trainer.built_with["arithmetic"]
    trainer.built_with["arithmetic"] = fix_arithmetic(config, model, chosen, trainer.ranks.device)


def _tell_resumed(step: int, checkpoint: Path, stream: TrainStream) -> None:
    """Log where the run goes on, and with which mixture if its weights were changed."""
    logger.info(f"resume     from step {step:,} ({checkpoint})")
    if stream.old_weights is None:
        return
    old, new = stream.old_weights, stream.weights
    changes = [f"{name} {old[name]:g} -> {new[name]:g}" for name in new if old[name] != new[name]]
    logger.info(
        f"note       the weights of data.mix change after update {step:,}: {', '.join(changes)}; evaluations follow"
        " where no eval_weight is set"
    )


def restore(
    checkpointer: Checkpointer,
    checkpoint: Path,
    model: nn.Module,
    objects: Mapping[str, Stateful],
    stream: TrainStream,
    strategy: Strategy,
) -> dict[str, Any]:
    """Set model, objects and stream to a checkpoint; return everything else that it holds."""
    state = checkpointer.load(checkpoint, model, strategy.from_checkpoint(objects), strategy.part)
    stream.load_state_dict(state["stream"])
    return state


def fix_arithmetic(
    config: TrainConfig, model: LlamaForCausalLM, saved: dict[str, Any], device: torch.device
) -> dict[str, Any]:
    """Choose how each W x is computed, as it was `saved` before if that knows the layer, say so, and return what to
    save."""
    num_rows = config.micro_batch_size * config.seq_len
    paths = set_paths(model, config.layer_path, num_rows, device, saved.get("layer_paths"))
    for path, how in (("factored", "through A, B and S"), ("composed", "through a dense W, built on the way")):
        count = sum(chosen == path for chosen in paths.values())
        if count:
            logger.info(f"layers     {count} of {len(paths)} {path}: W x is computed {how}")
    machine = machine_kind(device, model.compute_dtype) if paths else None
    if machine and (saved.get("machine") or machine) != machine:
        logger.info(
            f"note       this run was started on {saved['machine']} and continues on {machine}: not bit for bit"
        )
    if paths and device.type == "cpu" and (reason := kernels.status()) is not None:
        logger.info(f"note       {reason}")
    return {"layer_paths": paths, "machine": machine}


def check_updates_of(config: TrainConfig, dtype: torch.dtype) -> None:
    """Whether the ways of updating go together. Raises ValueError."""
    check_updates(
        dtype=dtype,
        per_layer_update=config.per_layer_update,
        grad_clip=config.grad_clip,
        stochastic_rounding=config.stochastic_rounding,
    )


def build_updates(config: TrainConfig, model: nn.Module, strategy: Strategy) -> torch.optim.Optimizer:
    """The optimizer; with per_layer_update, one that works inside backward."""
    ranks = strategy.ranks
    build = partial(
        build_optimizer,
        options=config.optimizer,
        lr=config.lr,
        weight_decay=config.weight_decay,
        device=ranks.device,
        stochastic_rounding=config.stochastic_rounding,
        seed=config.seed,
        infos=parameters_of(model),
        group_options=partial(group_options, config, scales(config, model)),
        in_codes=held_in_codes(model),
    )
    if strategy.is_sharded:
        from sltrain.building.sharded_updates import build_on_shards  # as `build_strategy` imports it

        return build_on_shards(config, model, cast(Any, strategy), build)
    optimizer = build(strategy.named_parameters(model))
    if not config.per_layer_update:
        return optimizer
    return PerLayerUpdate(
        optimizer,
        parameters=model.parameters(),
        reduce_grad=ranks.sum_ if ranks.world_size > 1 else None,
        grad_clip_per_parameter=config.grad_clip_per_parameter,
    )


def held_in_codes(model: nn.Module) -> dict[nn.Parameter, CodedTensor]:
    """What holds the values of parameters that stand for codes."""
    layers = (module for module in model.modules() if isinstance(module, ReplacedLinear))
    return {parameter: held for layer in layers for parameter, held in layer.held_in_codes().items()}


def group_options(config: TrainConfig, scales: Mapping[str, Scale], parameter: ParamInfo) -> dict[str, float]:
    """Optimizer settings of one parameter that differ from the run's: the method's, the parametrization's by name, and
    `lr_scale` of its role."""
    options = config.method.group_options(parameter)
    if parameter.name in scales:
        options = {**options, "lr_scale": scales[parameter.name].rate * options.get("lr_scale", 1.0)}
    scale = config.lr_scale.get(parameter.role)
    return options if scale is None else {**options, "lr_scale": scale * options.get("lr_scale", 1.0)}


def rebuild_updates(
    config: TrainConfig, model: nn.Module, strategy: Strategy, old: torch.optim.Optimizer
) -> torch.optim.Optimizer:
    """What `build_updates` makes for a model whose parameters have changed, with the state that `old`, the optimizer of
    the model as it was, has of parameters that are still there. `old` is of no use afterwards."""
    return rebuild_optimizer(old, lambda: build_updates(config, model, strategy))


def stateful_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module) -> OptimizerState:
    """The optimizer of the bare model as a checkpoint holds it."""
    return OptimizerState(optimizer, [name for name, _ in model.named_parameters()])


def build_step(
    config: TrainConfig, model: nn.Module, optimizer: torch.optim.Optimizer, strategy: Strategy
) -> UpdateStep:
    """What makes an update of the model with what `build_updates` returned. All ranks call it together."""
    if isinstance(optimizer, UpdateInsideBackward):
        return PerLayerStep(model, optimizer, strategy)
    return OrdinaryStep(model, optimizer, strategy, config.grad_clip, config.grad_clip_per_parameter)


def learning_rate_setter(config: TrainConfig, live: Live) -> Callable[[int], float]:
    """A function that sets the learning rate of a step and returns it."""
    rates = rate_schedule(config)
    _, shortened = effective_warmup(config.warmup_steps, rates.max_steps)
    if shortened:
        logger.info(f"note       {shortened}")

    def set_rate(step: int) -> float:
        rate = config.lr * rates.factor(step) * config.method.lr_factor(step, rates.max_steps)
        set_learning_rate(live.optimizer, rate)
        return rate

    return set_rate


def build_utilisation(config: TrainConfig, model: LlamaForCausalLM, ranks: Ranks) -> Utilisation:
    """What turns tokens a second into the device's TFLOPS, and into a share of its peak where that is known."""
    peak = config.peak_tflops or peak_tflops(ranks.device, model.compute_dtype)
    return Utilisation(model, config.seq_len, ranks.world_size, peak)


def build_profile(config: TrainConfig, folder: RunFolder, step: int, ranks: Ranks) -> Profile | None:
    """What records the updates of profile_steps, on rank 0 of a run that continues from `step`; None: nothing to
    record."""
    if config.profile_steps is None:
        return None
    first, last = config.profile_steps
    if step >= last:
        logger.info(f"note       profile_steps=[{first},{last}] is over at step {step:,}: nothing is recorded")
        return None
    return Profile(folder.path, first, last, ranks.device) if ranks.is_main else None


def build_sinks(config: TrainConfig, folder: RunFolder, step: int) -> list[Sink]:
    """Where rank 0 sends metrics; metrics.jsonl is first cut back to the step that the run continues from."""
    rewrite_until(folder.metrics_file, step)
    sinks: list[Sink] = [JsonlSink(folder.metrics_file)]
    if logger.isEnabledFor(logging.INFO):
        sinks.append(ProgressBar(num_steps(config), step))
    if config.tracker.name == "wandb":
        sinks.append(
            WandbSink(
                folder.path,
                project=config.tracker.project,
                entity=config.tracker.entity,
                config=dataclasses.asdict(config),
            )
        )
    if config.tracker.name == "trackio":
        sinks.append(
            TrackioSink(
                folder.path,
                project=config.tracker.project,
                space_id=config.tracker.space_id,
                config=dataclasses.asdict(config),
            )
        )
    if config.tracker.name == "tensorboard":
        sinks.append(TensorBoardSink(folder.path, step))
    return sinks

"""The schema of a training run: every key a person can set, its type, unit and scope.

Hydra composes conf/ over these dataclasses, so an unknown key or a wrong type is refused while the configuration is
composed, and the code below the command sees plain Python objects, never a DictConfig. Values that are the same for
every run (the protocol) live in conf/train.yaml; values that belong to a model size (the recipe) in conf/model/*.yaml.

The method, the optimizer and the source of text are plug-ins (registry.py): each is a dataclass of its own, with the
keys under `method.`, `optimizer.` and `data.` as fields and what it does as methods. `config.method` is that object.

Checks that need only these numbers are in `validate` and in each plug-in's `check`; checks that need the model, the
corpus or the machine are in building/. Nothing here imports torch.
"""

import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from sltrain.data.sources.base import SourceConfig
from sltrain.methods.base import Method
from sltrain.methods.sltrain import SUPPORTS
from sltrain.optim.kinds.base import OptimizerConfig
from sltrain.optim.schedule import SCHEDULES, RateSchedule, default_decay, effective_warmup
from sltrain.parameters import ROLES

ROPE_TYPES = ("default", "llama3")


@dataclass
class RopeScaling:
    """Slower rotation of the pairs of a head whose wavelength is long, for rows longer than a model was trained on
    (fields as in transformers' rope_scaling; the values are LLaMA 3.1's)."""

    rope_type: str = "default"  # default: rope_theta alone; llama3: the rule of LLaMA 3.1
    factor: float = 8.0  # a wavelength that is too long is stretched by this
    low_freq_factor: float = 1.0  # too long: above original_max_position_embeddings / this
    high_freq_factor: float = 4.0  # short enough to stay: below original_max_position_embeddings / this
    original_max_position_embeddings: int = 8192  # longest row of the training before


@dataclass
class ModelConfig:
    """Shape of a LLaMA decoder (names as in transformers.LlamaConfig)."""

    name: str = MISSING
    hidden_size: int = MISSING
    intermediate_size: int = MISSING
    num_hidden_layers: int = MISSING
    num_attention_heads: int = MISSING
    num_key_value_heads: int | None = None  # None: as many as attention heads
    vocab_size: int | None = None  # ids the embedding holds; None: the size of the tokenizer
    max_position_embeddings: int = 1024  # longest row the exported model promises to read
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling = field(default_factory=RopeScaling)
    tie_word_embeddings: bool = False  # whether the head is the embedding's matrix
    initializer_range: float = 0.02  # standard deviation of embeddings, head and dense projections


@dataclass
class TrackerConfig:
    """Where metrics go besides metrics.jsonl."""

    name: str = MISSING  # none, wandb, tensorboard or trackio
    project: str = "sltrain"  # of wandb and trackio
    entity: str | None = None  # of wandb
    space_id: str | None = None  # of trackio: a Space of the Hub (OWNER/NAME); None: on this machine


@dataclass
class TrainConfig:
    """One training run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    method: Method = field(default_factory=Method)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    data: SourceConfig = field(default_factory=SourceConfig)
    tracker: TrackerConfig = field(default_factory=TrackerConfig)

    # W = (alpha / rank) B A + S: a recipe's values, read by the methods that have these options
    rank: int = MISSING  # inner size of B A; 0: S alone
    sparsity: float = MISSING  # the paper's delta: fraction of S that is trained (0.03 = 3 %); 0: B A alone
    alpha: float = MISSING  # the low-rank product is scaled by alpha / rank
    support: str = MISSING  # entries of S: uniform (the paper), stratified, block or column
    block_size: int | None = None  # support=block: side of a block; None: the largest that gives the sparsity
    layer_path: str = MISSING  # how W x is computed: auto, composed (dense W built on the way) or factored
    rank_overrides: dict[str, int] = field(default_factory=dict)  # module-name pattern -> rank
    sparsity_overrides: dict[str, float] = field(default_factory=dict)  # module-name pattern -> sparsity

    # Data
    path: Any = None  # data=local: a glob or a list of globs; data=tokens: the folder
    repo: str | None = None  # data=hf: a data set on the Hub (OWNER/NAME), or a folder with one
    config: str | None = None  # data=hf: its configuration (subset); None: the only one
    split: str | None = None  # data=hf: its split; None: train
    validation_path: Any = None  # a glob or a list of globs; None: the corpus's validation split, or a held-out part
    tokenizer: str = MISSING  # tokenizer.json, Hub name, bpe:SIZE to train one; auto: data's, init_from's or t5-base
    tokenizer_eos: str | None = None  # its token that ends documents; None: by tokenizer_config.json or common names
    padding: str = MISSING  # truncate_pad: one document a row; pack: rows without gaps; best_fit: whole documents
    attention: str = MISSING  # full: a token sees all before it in its row; document: those of its document only
    seq_len: int = MISSING  # tokens a row
    on_bad_data: str = MISSING  # skip or stop

    # Budget and batch
    global_batch_size: int = MISSING  # sequences an update, all ranks together
    micro_batch_size: int = MISSING  # sequences a forward pass, on one rank
    max_steps: int | None = None  # updates
    max_tokens: int | None = None  # positions (rows x seq_len); set exactly one of the two
    extend: int = 0  # updates beyond that budget; a run may go on where its learning rates so far stay the same

    # Optimization
    lr: float = MISSING  # peak learning rate
    lr_scale: dict[str, float] = field(default_factory=dict)  # role of a parameter (parameters.py) -> factor of lr
    schedule: str = MISSING  # of the learning rate after warmup: cosine, linear, wsd (constant, then decay) or constant
    min_lr_ratio: float = MISSING  # final learning rate over peak
    warmup_steps: int = MISSING  # updates
    decay_steps: int | None = None  # schedule=wsd: updates of the final linear decay; None: a tenth of the run
    weight_decay: float = MISSING  # decoupled (AdamW); norms and biases never decay
    z_loss: float = MISSING  # times the mean squared logsumexp of the logits, added to the loss (1e-4 is usual)
    ema: float | None = None  # share of averaged weights an update keeps (0.999); evaluations and exports use these
    grad_clip: float | None = None  # global gradient norm; None: no clipping
    grad_clip_per_parameter: float | None = None  # norm of each parameter's gradient by itself; None: no clipping
    per_layer_update: bool = MISSING  # update each parameter inside backward and free its gradient at once
    stochastic_rounding: bool = MISSING  # round bfloat16 updates up or down at random, right on average
    moments_dtype: str = MISSING  # optimizer=adamw: auto (as the weights), or float32 for bfloat16 weights too

    # Cadence; 0: never
    log_every: int = MISSING  # updates between train lines
    eval_every: int = MISSING  # updates between evaluations
    eval_tokens: int = MISSING  # predicted tokens an evaluation reads, all ranks together
    eval_tasks: list[str] = field(default_factory=list)  # downstream tasks of lm-eval, by name or YAML file
    eval_task_limit: int | None = None  # documents of each task that are asked; None: all
    checkpoint_every: int = MISSING  # updates between checkpoints
    keep_last: int = MISSING  # checkpoints kept
    peak_tflops: float | None = (
        None  # TFLOPS a device can do, of which mfu is a share; None: a known card's in bfloat16
    )
    profile_steps: list[int] | None = None  # [first,last] update that torch's profiler records, into the run folder

    # The machine
    seed: int = MISSING  # of weights, supports and the order of the data
    dtype: str = MISSING  # auto, float32 or bfloat16: weights, gradients and optimizer moments
    precision: str = MISSING  # pure: arithmetic in dtype; mixed: in bfloat16, on float32 weights, gradients and moments
    device: str = MISSING  # auto, cpu or cuda
    compile: bool = MISSING  # torch.compile
    activation_checkpointing: bool = MISSING  # keep each decoder layer's input only, recompute the rest in backward
    memory_guard: bool = MISSING  # refuse to start what does not fit into the memory that is free

    # The run folder
    init_from: str | None = None  # begin at step 0 with the weights of a run, an export, or a transformers LLaMA
    run_dir: str | None = None  # None: a new folder under outputs/; alone it continues the run in it
    resume: str = MISSING  # auto: continue what run_dir holds; never: refuse a folder that holds a run


CHOICES = {
    "tracker.name": ("none", "wandb", "tensorboard", "trackio"),
    "model.rope_scaling.rope_type": ROPE_TYPES,
    "support": SUPPORTS,
    "layer_path": ("auto", "composed", "factored"),
    "padding": ("truncate_pad", "pack", "best_fit"),
    "schedule": SCHEDULES,
    "attention": ("full", "document"),
    "on_bad_data": ("skip", "stop"),
    "dtype": ("auto", "float32", "bfloat16"),
    "precision": ("pure", "mixed"),
    "moments_dtype": ("auto", "float32"),
    "device": ("auto", "cpu", "cuda"),
    "resume": ("auto", "never"),
}
CHOICE_HINTS = {"precision": "bfloat16 weights are dtype=bfloat16, float32 throughout is dtype=float32"}
AT_LEAST = {
    "model.hidden_size": 2,
    "model.intermediate_size": 1,
    "model.num_hidden_layers": 1,
    "model.num_attention_heads": 1,
    "model.num_key_value_heads": 1,
    "model.vocab_size": 3,
    "model.rope_scaling.factor": 1,
    "model.rope_scaling.original_max_position_embeddings": 1,
    "rank": 0,
    "block_size": 1,
    "seq_len": 2,
    "global_batch_size": 1,
    "micro_batch_size": 1,
    "warmup_steps": 0,
    "decay_steps": 1,
    "extend": 0,
    "weight_decay": 0,
    "log_every": 0,
    "eval_every": 0,
    "eval_tokens": 1,
    "eval_task_limit": 1,
    "checkpoint_every": 0,
    "keep_last": 1,
    "seed": 0,
}
ABOVE_ZERO = (
    "lr alpha max_steps max_tokens grad_clip grad_clip_per_parameter peak_tflops model.rms_norm_eps model.rope_theta"
    " model.initializer_range model.rope_scaling.low_freq_factor model.rope_scaling.high_freq_factor"
).split()
# Keys that a resumed run may change: they concern the machine, the folder and the log, not what is computed. The corpus
# that `path` or `repo` names is compared by its fingerprint, the tokenizer by content; building/folder.py checks
# `extend`, and sources/mix.py what of data.mix may change.
CHANGEABLE_ON_RESUME = (
    "run_dir resume extend tracker path data.path repo data.repo data.commit data.mix data.settled_entries"
    " validation_path tokenizer on_bad_data data.on_bad_data data.delete_after_use log_every eval_every eval_tokens"
    " eval_tasks eval_task_limit checkpoint_every keep_last micro_batch_size device compile activation_checkpointing"
    " layer_path memory_guard per_layer_update peak_tflops profile_steps"
).split()

# Keys of earlier versions that a run's config.yaml may hold, with the value that means today's behaviour. A run with
# another value cannot be continued.
RETIRED_KEYS: dict[str, Any] = {"accumulation": "hold"}


def get_key(config: Any, key: str) -> Any:
    """The value of a dotted key."""
    for part in key.split("."):
        config = getattr(config, part)
    return config


def validate(config: TrainConfig) -> None:
    """Check everything that the numbers alone decide. Raises ValueError naming the key, its value and what to
    change."""
    for key, choices in CHOICES.items():
        if get_key(config, key) not in choices:
            hint = f" ({CHOICE_HINTS[key]})" if key in CHOICE_HINTS else ""
            raise ValueError(f"{key}={get_key(config, key)}: choose one of {', '.join(choices)}{hint}")
    for key, least in AT_LEAST.items():
        number = get_key(config, key)
        if number is not None and not number >= least:
            raise ValueError(f"{key}={number}: must be at least {least}")
    for key in ABOVE_ZERO:
        value = get_key(config, key)
        if value is not None and not 0 < value < float("inf"):
            raise ValueError(f"{key}={value}: must be a number above 0")
    for role, scale in config.lr_scale.items():
        if role not in ROLES:
            raise ValueError(
                f"lr_scale={{{role}: {scale:g}}}: no parameter has this role; choose of {', '.join(ROLES)}"
            )
        if not 0 < scale < float("inf"):
            raise ValueError(f"lr_scale={{{role}: {scale:g}}}: must be a number above 0")
    if config.ema is not None and not 0 < config.ema < 1:
        raise ValueError(f"ema={config.ema}: must be above 0 and below 1 (0.999 averages some 1,000 updates), or null")
    if config.per_layer_update and config.method.acts_before_step():
        raise ValueError(
            f"per_layer_update=true updates each weight inside backward, and method={config.method.name} acts between"
            " backward and the optimizer's step; set per_layer_update=false"
        )
    if not 0 <= config.z_loss < float("inf"):
        raise ValueError(f"z_loss={config.z_loss}: must be a number of at least 0 (1e-4 is usual; 0 is none)")
    if config.seed >= 2**63:
        raise ValueError(f"seed={config.seed}: must be below 2^63")
    if not 0 <= config.min_lr_ratio <= 1:
        raise ValueError(f"min_lr_ratio={config.min_lr_ratio}: must be between 0 and 1 (0.1 ends at a tenth of lr)")
    config.optimizer.check()
    config.method.check()
    if config.ema is not None and (reason := config.method.against_ema()) is not None:
        raise ValueError(
            f"ema={config.ema} averages B and A each by itself, and method={config.method.name} {reason}; set ema=null"
        )
    if config.optimizer.whole_update and not config.method.multiplies_factors():
        raise ValueError(
            f"optimizer={config.optimizer.name} is for factors whose product B A is W, and those of"
            f" method={config.method.name} are blocks; set optimizer=muon or adamw"
        )
    if config.method.changes_vectors() and not config.optimizer.keeps_whole_moments(config.stochastic_rounding):
        raise ValueError(
            f"method={config.method.name} changes the moments of single rows and columns, which"
            f" optimizer={config.optimizer.name} holds in another form; set optimizer=adamw"
        )
    longest = config.model.max_position_embeddings
    if config.seq_len > longest:
        raise ValueError(
            f"seq_len={config.seq_len} is above model.max_position_embeddings={longest};"
            " lower the one or raise the other"
        )
    if config.attention == "document" and config.padding == "truncate_pad":
        raise ValueError(
            "attention=document is for padding=pack or best_fit;"
            f" with padding={config.padding} a row holds one document anyway"
        )
    _validate_rope(config.model.rope_scaling)
    _validate_update(config)
    _validate_precision(config)
    rate_schedule(config)
    _validate_profile(config)
    for key in ("path", "validation_path"):
        globs = get_key(config, key)
        if globs is not None and not all(
            isinstance(glob, str) for glob in (globs if isinstance(globs, list) else [globs])
        ):
            raise ValueError(
                f"{key}={globs}: must be a glob, or a list of them as in {key}=[/a/*.json.gz,/b/*.json.gz]"
            )
    _validate_names_of_files(config)
    if config.path and not hasattr(config.data, "path"):
        raise ValueError(f"path is set, but data={config.data.name} does not read it; add data=local, or drop path")
    for key in ("repo", "config", "split"):
        if get_key(config, key) is not None and getattr(config.data, key, None) != get_key(config, key):
            raise ValueError(
                f"{key}={get_key(config, key)} is set, but data={config.data.name} does not read it; add data=hf, or"
                f" drop {key}"
            )
    if config.validation_path and hasattr(config.data, "mix"):
        raise ValueError(
            f"validation_path={config.validation_path} is for one corpus; with data=mix each source has its own, as in"
            " data.mix.wiki.validation_path=GLOB (and `sltrain-eval RUN --path GLOB` measures on any other text)"
        )
    config.data.check()


def _validate_names_of_files(config: TrainConfig) -> None:
    """Refuse what a shell was meant to replace."""
    for key in ("run_dir", "tokenizer", "path", "validation_path"):
        value = get_key(config, key)
        for name in value if isinstance(value, list) else [value]:
            if name == "":
                raise ValueError(f"{key} is empty: is the variable set that it was typed with? Give a name, or drop it")
            if name is not None and re.search(r"(^|/)\$[{\w]", name) and not os.path.exists(name):
                raise ValueError(
                    f"{key}={name}: $ is not replaced here; let the shell do it, without single quotes, or write ~ for"
                    " your home"
                )


def _validate_update(config: TrainConfig) -> None:
    if config.grad_clip is not None and config.grad_clip_per_parameter is not None:
        raise ValueError(
            f"grad_clip={config.grad_clip:g} and grad_clip_per_parameter={config.grad_clip_per_parameter:g} are both"
            " set; keep one (a model's recipe may set grad_clip: type grad_clip=null)"
        )
    for key in ("per_layer_update", "stochastic_rounding"):
        if config.optimizer.whole_update and get_key(config, key):
            raise ValueError(
                f"{key}=true works on one tensor at a time, and optimizer={config.optimizer.name} needs A and B"
                " together; drop one of the two (muon, scale, apollo_mini and adamw go with both)"
            )
    if config.per_layer_update and config.compile:
        raise ValueError(
            "per_layer_update=true with compile=true frees no gradient early: the compiled backward makes all of them"
            " before it returns; drop one of the two"
        )


def _validate_profile(config: TrainConfig) -> None:
    steps, max_steps = config.profile_steps, num_steps(config)
    if steps is not None and not (len(steps) == 2 and 1 <= steps[0] <= steps[1] <= max_steps):
        raise ValueError(
            f"profile_steps=[{','.join(map(str, steps))}]: give the first and the last update to record, as in [10,12],"
            f" from 1 to the {max_steps:,} of the run"
        )


def _validate_rope(scaling: RopeScaling) -> None:
    if not scaling.low_freq_factor < scaling.high_freq_factor:
        raise ValueError(
            f"model.rope_scaling.low_freq_factor={scaling.low_freq_factor:g} must be below"
            f" high_freq_factor={scaling.high_freq_factor:g} (1 and 4 are usual)"
        )


def _validate_precision(config: TrainConfig) -> None:
    if config.precision == "mixed" and config.dtype == "bfloat16":
        raise ValueError(
            "precision=mixed computes in bfloat16 on float32 weights, and dtype=bfloat16 asks for bfloat16 weights;"
            " drop one of the two"
        )
    if config.precision == "mixed" and config.stochastic_rounding:
        raise ValueError(
            "stochastic_rounding=true rounds bfloat16 weights, and precision=mixed keeps them in float32, where nothing"
            " is rounded; drop one of the two"
        )
    if config.moments_dtype != "auto" and not hasattr(config.optimizer, "moments_dtype"):
        raise ValueError(
            f"moments_dtype={config.moments_dtype} is for optimizer=adamw, and optimizer={config.optimizer.name} has"
            " moments of its own kind; drop one of the two"
        )


def folder_of(path: str) -> Path:
    """The run folder or export that `path` names, or of which it names a checkpoint (RUN/checkpoints/step_00001000)."""
    folder = Path(path).expanduser()
    return folder.parents[1] if folder.parent.name == "checkpoints" else folder


def default_tokenizer(init_from: str | None) -> str:
    """What tokenizer=auto means: a model's weights come with its tokenizer, a new one has the paper's."""
    return "t5-base" if init_from is None else str(folder_of(init_from) / "tokenizer.json")


class NoBudget(ValueError):
    """The configuration does not say how long to train."""


def num_steps(config: TrainConfig) -> int:
    """Updates of the run, `extend` included. Raises ValueError unless exactly one of max_steps and max_tokens is
    set."""
    if config.max_steps is not None and config.max_tokens is not None:
        raise ValueError(
            f"max_steps={config.max_steps} and max_tokens={config.max_tokens} are both set;"
            f" type max_steps=null max_tokens={config.max_tokens}"
            f" or max_tokens=null max_steps={config.max_steps} (a model's recipe sets max_steps)"
        )
    if config.max_steps is not None:
        return config.max_steps + config.extend
    if config.max_tokens is None:
        raise NoBudget("no budget: set max_steps=UPDATES, or max_tokens=POSITIONS")
    return -(-config.max_tokens // (config.global_batch_size * config.seq_len)) + config.extend


def rate_schedule(config: TrainConfig) -> RateSchedule:
    """The learning rate of every update, as a factor of `lr`. Raises ValueError as `num_steps`, and for a decay that
    the run has no room for."""
    max_steps, decay = num_steps(config), config.decay_steps
    warmup, _ = effective_warmup(config.warmup_steps, max_steps)
    if decay is not None and config.schedule != "wsd":
        raise ValueError(
            f"decay_steps={decay} is for schedule=wsd, and schedule is {config.schedule}; drop one of them"
        )
    if decay is not None and decay > max_steps - warmup:
        raise ValueError(
            f"decay_steps={decay} does not fit: of {max_steps} updates {warmup} are warmup; set decay_steps to"
            f" {max_steps - warmup} or less"
        )
    decay = default_decay(warmup, max_steps) if decay is None else decay
    return RateSchedule(config.schedule, max_steps, warmup, config.min_lr_ratio, decay)


def check_batch(config: TrainConfig, world_size: int) -> None:
    """Check that the global batch divides into the ranks' micro-batches. Raises ValueError."""
    per_pass = config.micro_batch_size * world_size
    if config.global_batch_size % per_pass:
        fits = [m for m in range(1, config.micro_batch_size + 1) if config.global_batch_size % (m * world_size) == 0]
        hint = (
            f"the largest micro_batch_size that fits is {fits[-1]}" if fits else f"make it a multiple of {world_size}"
        )
        raise ValueError(
            f"global_batch_size={config.global_batch_size} is not a multiple of"
            f" micro_batch_size={config.micro_batch_size}"
            f" x {world_size} process{'es' * (world_size > 1)}; {hint}"
        )

"""The schema of a training run: every key a person can set, its type, unit and scope.

Hydra composes conf/ over these dataclasses, so an unknown key or a wrong type is refused while the configuration is
composed, and the code below the command sees plain Python objects, never a DictConfig. Values that are the same for
every run (the protocol) live in conf/train.yaml; values that belong to a model size (the recipe) in conf/model/*.yaml.

The method, the optimizer and the source of text are plug-ins (registry.py): each is a dataclass of its own, with the
keys under `method.`, `optimizer.` and `data.` as fields and what it does as methods. `config.method` is that object.

Checks that need only these values are in config_checks.py and in each plug-in's `check`. Nothing here imports torch.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from sltrain.data.sources.base import SourceConfig
from sltrain.methods.base import Method
from sltrain.optim.kinds.base import OptimizerConfig
from sltrain.optim.schedule import RateSchedule, default_decay, effective_warmup

ROPE_TYPES = ("default", "llama3")
EVAL_PARTS = ("all", "a", "b")


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
class ParallelConfig:
    """How the processes of a run share the tensors of its model (engine/strategy.py)."""

    name: str = "auto"  # auto, single, ddp, fsdp or hsdp; auto: ddp while the plan fits a device, else fsdp
    replicas: int | None = None  # hsdp: copies of the model, each in shards; None: one a machine
    param_dtype: str = "auto"  # fsdp, hsdp: of gathered weights, and so of arithmetic; auto: as the weights
    reduce_dtype: str = "float32"  # fsdp, hsdp: in which gradients are averaged over processes; auto: their own
    reshard_after_forward: bool = True  # fsdp, hsdp: a layer's weights are gathered in backward again
    reduce_every: str = "micro_batch"  # fsdp, hsdp: micro_batch (shares of gradients are held), or update (whole ones)
    checkpoint: str = "whole"  # fsdp, hsdp: whole (rank 0 gathers and writes all), or sharded (each writes its share)


@dataclass
class ParametrizationConfig:
    """The rule for starts and learning rates of tensors (building/parametrization.py)."""

    name: str = "paper"  # paper: starts as each method says, one rate; spectral: both by the shape of each layer
    base_width: int | None = None  # spectral: inputs of the dense layer that initializer_range and lr are meant for


@dataclass
class TrainConfig:
    """One training run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    method: Method = field(default_factory=Method)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    data: SourceConfig = field(default_factory=SourceConfig)
    tracker: TrackerConfig = field(default_factory=TrackerConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    parametrization: ParametrizationConfig = field(default_factory=ParametrizationConfig)

    # W = (alpha / rank) B A + S: a recipe's values, read by the methods that have these options
    rank: int = MISSING  # inner size of B A; 0: S alone
    sparsity: float = MISSING  # the paper's delta: fraction of S that is trained (0.03 = 3 %); 0: B A alone
    alpha: float = MISSING  # the low-rank product is scaled by alpha / rank
    support: str = MISSING  # entries of S: uniform (the paper), stratified, block, column, slice, rolled or topk
    support_from: str | None = None  # support=topk: the run or export whose weights choose the positions of S
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
    moments_dtype: str = MISSING  # adamw, galore, ...: auto (as the weights), or float32 for bfloat16 weights too

    # Cadence; 0: never
    log_every: int = MISSING  # updates between train lines
    eval_every: int = MISSING  # updates between evaluations
    eval_tokens: int = MISSING  # predicted tokens an evaluation reads, all ranks together
    eval_part: str = MISSING  # of the validation documents: all, or every second one: a (the first, ...) or b
    eval_tasks: list[str] = field(default_factory=list)  # downstream tasks of lm-eval, by name or YAML file
    eval_task_limit: int | None = None  # documents of each task that are asked; None: all
    checkpoint_every: int = MISSING  # updates between checkpoints
    keep_last: int = MISSING  # checkpoints kept
    checkpoint_async: bool = MISSING  # write them while training goes on, from a copy in host memory
    peak_tflops: float | None = None  # TFLOPS a device can do, of which mfu is a share; None: by a table of cards
    profile_steps: list[int] | None = None  # [first,last] update that torch's profiler records, into the run folder

    # The machine
    seed: int = MISSING  # of weights, supports and the order of the data
    dtype: str = MISSING  # auto, float32 or bfloat16: weights, gradients and optimizer moments
    precision: str = MISSING  # pure: arithmetic in dtype; mixed: in bfloat16, on float32 weights, gradients and moments
    device: str = MISSING  # auto, cpu or cuda
    compile: bool = MISSING  # torch.compile
    activation_checkpointing: bool = MISSING  # keep each decoder layer's input only, recompute the rest in backward
    hang_timeout: float = MISSING  # seconds after which a process that hangs ends the run and is named; 0: never
    memory_guard: bool = MISSING  # refuse to start what does not fit into the memory that is free

    # The run folder
    init_from: str | None = None  # begin at step 0 with the weights of a run, an export, or a transformers LLaMA
    run_dir: str | None = None  # None: a new folder under outputs/; alone it continues the run in it
    resume: str = MISSING  # auto: continue what run_dir holds; never: refuse a folder that holds a run


# Keys that a resumed run may change: they concern the machine, the folder and the log, not what is computed. The corpus
# that `path` or `repo` names is compared by its fingerprint, the tokenizer by content; building/folder.py checks
# `extend`, and sources/mix.py what of data.mix may change.
CHANGEABLE_ON_RESUME = (
    "run_dir resume extend tracker parallel path data.path repo data.repo data.commit data.mix data.settled_entries"
    " validation_path tokenizer on_bad_data data.on_bad_data data.delete_after_use log_every eval_every eval_tokens"
    " eval_part eval_tasks eval_task_limit checkpoint_every keep_last checkpoint_async micro_batch_size device compile"
    " activation_checkpointing layer_path hang_timeout memory_guard per_layer_update peak_tflops profile_steps"
    " method.recompute"
).split()

# Keys of earlier versions that a run's config.yaml may hold, with the value that means today's behaviour. A run with
# another value cannot be continued.
RETIRED_KEYS: dict[str, Any] = {"accumulation": "hold"}


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

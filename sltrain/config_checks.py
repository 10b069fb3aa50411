"""What the values of a run decide alone: whether each is possible, and whether they go together.

`validate` sees a composed configuration before torch is imported, so a mistake costs a second. It goes from one key to
several: choices and limits of single keys, each plug-in's own `check`, what method, optimizer and the way of updating
say of each other, then rows, precision, the learning rate and the corpus. Checks that need the model, the corpus or the
machine are in building/. Nothing here imports torch.
"""

import os
import re
from collections.abc import Iterator
from typing import Any

from sltrain.config import EVAL_PARTS, ROPE_TYPES, RopeScaling, TrainConfig, num_steps, rate_schedule
from sltrain.methods import sltrain
from sltrain.methods.regrow import LAST
from sltrain.optim.kinds.adamw import AdamOptions
from sltrain.optim.schedule import SCHEDULES
from sltrain.parameters import ROLES

CHOICES = {
    "tracker.name": ("none", "wandb", "tensorboard", "trackio"),
    "parallel.name": ("auto", "single", "ddp", "fsdp", "hsdp"),
    "parallel.param_dtype": ("auto", "float32", "bfloat16"),
    "parallel.reduce_dtype": ("auto", "float32", "bfloat16"),
    "parallel.reduce_every": ("micro_batch", "update"),
    "parallel.checkpoint": ("whole", "sharded"),
    "parametrization.name": ("paper", "spectral"),
    "model.rope_scaling.rope_type": ROPE_TYPES,
    "support": sltrain.CHOICES,
    "layer_path": ("auto", "composed", "factored"),
    "padding": ("truncate_pad", "pack", "best_fit"),
    "eval_part": EVAL_PARTS,
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
    "hang_timeout": 0,
    "parallel.replicas": 1,
    "parametrization.base_width": 1,
    "seed": 0,
}
ABOVE_ZERO = (
    "lr alpha max_steps max_tokens grad_clip grad_clip_per_parameter peak_tflops model.rms_norm_eps model.rope_theta"
    " model.initializer_range model.rope_scaling.low_freq_factor model.rope_scaling.high_freq_factor"
).split()


class NotTogether(ValueError):
    """Each of two values is possible, but not both of them."""


def get_key(config: Any, key: str) -> Any:
    """The value of a dotted key."""
    for part in key.split("."):
        config = getattr(config, part)
    return config


def validate(config: TrainConfig) -> None:
    """Check everything that the values alone decide. Raises ValueError naming the key, its value and what to
    change."""
    _check_limits(config)
    _check_rates(config)
    _check_parametrization(config)
    config.optimizer.check()
    config.method.check()
    if config.init_from is None and (reason := config.method.against_random_start()) is not None:
        raise ValueError(reason)
    check_together(config)
    _check_rows(config)
    _check_rope(config.model.rope_scaling)
    _check_precision(config)
    rate_schedule(config)
    _check_profile(config)
    _check_names_of_files(config)
    _check_support_from(config)
    _check_corpus(config)
    config.data.check()


def check_together(config: TrainConfig) -> None:
    """Raise NotTogether if method, optimizer and the way of updating exclude each other."""
    for reason in _disagreements(config):
        raise NotTogether(reason)


def _disagreements(config: TrainConfig) -> Iterator[str]:
    """Why method, optimizer and the way of updating do not go together, a line each."""
    method, optimizer = config.method, config.optimizer
    if config.per_layer_update and method.acts_before_step():
        yield (
            f"per_layer_update=true updates each weight inside backward, and method={method.name} acts between"
            " backward and the optimizer's step; set per_layer_update=false"
        )
    if config.ema is not None and (reason := method.against_ema()) is not None:
        yield f"ema={config.ema} averages each tensor by itself, and method={method.name} {reason}; set ema=null"
    if config.parametrization.name == "spectral":
        yield from _against_spectral(config)
    if optimizer.whole_update and not method.multiplies_factors():
        yield (
            f"optimizer={optimizer.name} is for factors whose product B A is W, and those of"
            f" method={method.name} are blocks; set optimizer=muon or adamw"
        )
    if method.changes_vectors() and not optimizer.keeps_whole_moments(config.stochastic_rounding):
        yield (
            f"method={method.name} changes the moments of parts of a tensor, which"
            f" optimizer={optimizer.name} holds in another form; set optimizer=adamw"
        )
    if (every := getattr(method, "regrow_every", 0)) > LAST * num_steps(config):
        yield (
            f"method.regrow_every={every} is beyond three quarters of the {num_steps(config):,} updates, after which"
            " nothing moves; set it lower, or drop it"
        )
    if config.grad_clip is not None and config.grad_clip_per_parameter is not None:
        yield (
            f"grad_clip={config.grad_clip:g} and grad_clip_per_parameter={config.grad_clip_per_parameter:g} are both"
            " set; keep one (a model's recipe may set grad_clip: type grad_clip=null)"
        )
    for key in ("per_layer_update", "stochastic_rounding"):
        if optimizer.whole_update and get_key(config, key):
            yield (
                f"{key}=true works on one tensor at a time, and optimizer={optimizer.name} needs A and B"
                " together; drop one of the two (muon, scale, apollo_mini and adamw go with both)"
            )
    if config.per_layer_update and config.compile:
        yield (
            "per_layer_update=true with compile=true frees no gradient early: the compiled backward makes all of them"
            " before it returns; drop one of the two"
        )
    own = getattr(optimizer, "moments_dtype", "moments of its own kind")
    if config.moments_dtype not in ("auto", own):
        yield (
            f"moments_dtype={config.moments_dtype} is for optimizers that take it, as adamw and galore do, and"
            f" optimizer={optimizer.name} has {own}{'' if own.endswith('kind') else ' ones'}; drop one of the two"
        )


def _against_spectral(config: TrainConfig) -> Iterator[str]:
    """Why parametrization=spectral has no starts and rates for this run, a line each."""
    name, remedy = "parametrization=spectral", "or set parametrization=paper"
    if (reason := config.method.against_spectral()) is not None:
        yield f"{name}: {reason}, {remedy}"
    if not isinstance(config.optimizer, AdamOptions):
        yield (
            f"{name} gives tensors the rates of Adam's steps, and optimizer={config.optimizer.name} makes others; set"
            f" optimizer=adamw or adam8bit, {remedy}"
        )
    if config.model.tie_word_embeddings:
        yield (
            f"{name} starts and trains the head unlike the embedding, and model.tie_word_embeddings=true makes them one"
            f" matrix; set it to false, {remedy}"
        )


def _check_limits(config: TrainConfig) -> None:
    """The tables of single keys above."""
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
    if config.seed >= 2**63:
        raise ValueError(f"seed={config.seed}: must be below 2^63")


def _check_rates(config: TrainConfig) -> None:
    """Rates and shares of the optimization, each by itself."""
    for role, scale in config.lr_scale.items():
        if role not in ROLES:
            raise ValueError(
                f"lr_scale={{{role}: {scale:g}}}: no parameter has this role; choose of {', '.join(ROLES)}"
            )
        if not 0 < scale < float("inf"):
            raise ValueError(f"lr_scale={{{role}: {scale:g}}}: must be a number above 0")
    if config.ema is not None and not 0 < config.ema < 1:
        raise ValueError(f"ema={config.ema}: must be above 0 and below 1 (0.999 averages some 1,000 updates), or null")
    if not 0 <= config.z_loss < float("inf"):
        raise ValueError(f"z_loss={config.z_loss}: must be a number of at least 0 (1e-4 is usual; 0 is none)")
    if not 0 <= config.min_lr_ratio <= 1:
        raise ValueError(f"min_lr_ratio={config.min_lr_ratio}: must be between 0 and 1 (0.1 ends at a tenth of lr)")


def _check_parametrization(config: TrainConfig) -> None:
    name, width = config.parametrization.name, config.parametrization.base_width
    if name == "paper" and width is not None:
        raise ValueError(
            f"parametrization.base_width={width} is for parametrization=spectral, and it is paper; drop one of the two"
        )
    if name == "spectral" and width is None:
        raise ValueError("parametrization=spectral needs parametrization.base_width, a width such as 128")


def _check_rows(config: TrainConfig) -> None:
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


def _check_rope(scaling: RopeScaling) -> None:
    if not scaling.low_freq_factor < scaling.high_freq_factor:
        raise ValueError(
            f"model.rope_scaling.low_freq_factor={scaling.low_freq_factor:g} must be below"
            f" high_freq_factor={scaling.high_freq_factor:g} (1 and 4 are usual)"
        )


def _check_precision(config: TrainConfig) -> None:
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


def _check_profile(config: TrainConfig) -> None:
    steps, max_steps = config.profile_steps, num_steps(config)
    if steps is not None and not (len(steps) == 2 and 1 <= steps[0] <= steps[1] <= max_steps):
        raise ValueError(
            f"profile_steps=[{','.join(map(str, steps))}]: give the first and the last update to record, as in [10,12],"
            f" from 1 to the {max_steps:,} of the run"
        )


def _check_names_of_files(config: TrainConfig) -> None:
    """Globs are text, and hold nothing that a shell was meant to replace."""
    for key in ("path", "validation_path"):
        globs = get_key(config, key)
        if globs is not None and not all(
            isinstance(glob, str) for glob in (globs if isinstance(globs, list) else [globs])
        ):
            raise ValueError(
                f"{key}={globs}: must be a glob, or a list of them as in {key}=[/a/*.json.gz,/b/*.json.gz]"
            )
    for key in ("run_dir", "tokenizer", "path", "validation_path", "support_from"):
        value = get_key(config, key)
        for name in value if isinstance(value, list) else [value]:
            if name == "":
                raise ValueError(f"{key} is empty: is the variable set that it was typed with? Give a name, or drop it")
            if name is not None and re.search(r"(^|/)\$[{\w]", name) and not os.path.exists(name):
                raise ValueError(
                    f"{key}={name}: $ is not replaced here; let the shell do it, without single quotes, or write ~ for"
                    " your home"
                )


def _check_support_from(config: TrainConfig) -> None:
    if config.support_from is not None and not hasattr(config.method, "support_from"):
        raise ValueError(
            f"support_from={config.support_from} is for method=sltrain, and method={config.method.name} has no such S;"
            " drop support_from, or type support_from=null"
        )


def _check_corpus(config: TrainConfig) -> None:
    """Keys of a corpus are set for a source that reads them."""
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

"""Every configuration composes over the schema, and every recipe builds on the meta device with the published number
of parameters."""

import re
from dataclasses import asdict, fields
from pathlib import Path

import pytest
import torch
import yaml
from hydra import compose, initialize_config_dir

import sltrain
from sltrain.building.model import build_model
from sltrain.compose import PLUGINS, TRAIN, compose_config, conf_dir, read_config, register_schema, to_train_config
from sltrain.compose.earlier import run_config
from sltrain.config import (
    RETIRED_KEYS,
    ModelConfig,
    ParallelConfig,
    ParametrizationConfig,
    TrackerConfig,
    TrainConfig,
    num_steps,
)
from sltrain.config_checks import validate
from sltrain.methods.sltrain import SUPPORTS
from sltrain.planning.accounting import count_parameters
from sltrain.runs.run_folder import RunFolder

MODELS = sorted(path.stem for path in (conf_dir() / "model").glob("*.yaml"))
EXPERIMENTS = sorted(path.stem for path in (conf_dir() / "experiment").glob("*.yaml"))
# SLTrain (arXiv 2406.02214), Tables 2 and 4 and appendix: parameters in millions, and the published protocol's
# numbers by size.
PAPER = {
    "llama_60m": (43.5, 128, 32, 0.03, 3e-3, 11_000, 1_100),
    "llama_130m": (96.6, 256, 16, 0.03, 3e-3, 22_000, 2_200),
    "llama_350m": (194.3, 256, 16, 0.03, 3e-3, 65_000, 6_500),
    "llama_1b": (645.6, 512, 8, 0.03, 3e-3, 140_000, 10_000),
    "llama_7b": (3144.7, 1024, 8, 0.05, 5e-4, 150_000, 15_000),
}


def composed(*overrides: str) -> TrainConfig:
    register_schema()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return to_train_config(compose("train", list(overrides)))


@pytest.mark.parametrize("name", PAPER)
def test_bare_model_is_the_papers_run(name: str) -> None:
    config = composed(f"model={name}")
    validate(config)
    millions, rank, alpha, sparsity, lr, steps, warmup = PAPER[name]
    assert (config.rank, config.alpha, config.sparsity, config.lr) == (rank, alpha, sparsity, lr)
    assert (num_steps(config), config.warmup_steps, config.global_batch_size, config.seq_len) == (
        steps,
        warmup,
        512,
        256,
    )
    assert (config.weight_decay, config.min_lr_ratio, config.seed) == (0, 0.1, 42)
    assert (config.method.name, config.data.name, config.tokenizer, config.padding) == (
        "sltrain",
        "c4",
        "t5-base",
        "truncate_pad",
    )
    assert len(config.data.revision or "") == 40
    count = count_parameters(build_model(config, 32_000, torch.bfloat16))
    assert count["total"] / 1e6 == pytest.approx(millions, abs=0.06)  # 130M: 96.546, which the paper prints as 96.6


def test_llama3_has_the_published_number_of_parameters() -> None:
    """Of meta-llama/Llama-3.2-1B, its tied head counted once."""
    config = composed("model=llama3_1b", "method=full", "max_steps=1")
    assert count_parameters(build_model(config, 128_256, torch.bfloat16))["total"] == 1_235_814_400


@pytest.mark.parametrize("model", MODELS)
def test_every_model_builds(model: str) -> None:
    built = build_model(composed(f"model={model}", "max_steps=1"), 32_000, torch.bfloat16)
    assert all(tensor.is_meta for tensor in built.parameters())
    assert count_parameters(built)["sparse"] > 0


@pytest.mark.parametrize("model", ["llama_60m", "llama_7b"])
def test_every_support_has_nearly_the_same_size(model: str) -> None:
    uniform, *others = (
        count_parameters(build_model(composed(f"model={model}", f"support={kind}"), 32_000, torch.bfloat16))["sparse"]
        for kind in SUPPORTS
    )
    assert others == pytest.approx([uniform] * 5, rel=0.06)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_composes_and_builds(name: str) -> None:
    config = composed(f"experiment={name}")
    validate(config)
    build_model(config, config.model.vocab_size or 4096, torch.float32)
    header = (conf_dir() / "experiment" / f"{name}.yaml").read_text()
    for field in ("Source:", "Command:", "Cost:", "Result"):
        assert f"# {field}" in header, f"the header of {name}.yaml does not state its {field}"


def test_the_best_recipe_is_what_its_study_measured() -> None:
    study = yaml.safe_load((conf_dir() / "study" / "recipes.yaml").read_text())
    typed = [*study["common"], "data=stdlib"]
    assert composed(*typed, "recipe=best") == composed(*typed, *study["candidates"]["clipped"]["overrides"])
    assert composed(*typed, "recipe=paper") == composed(*typed)


def test_command_line_wins_over_recipe_and_experiment() -> None:
    config = composed("experiment=paper_60m", "rank=64", "sparsity=0.01", "optimizer=adam8bit")
    assert (config.rank, config.sparsity, config.optimizer.name, config.model.name) == (
        64,
        0.01,
        "adam8bit",
        "llama_60m",
    )


def test_max_tokens_counts_positions_and_rounds_up() -> None:
    config = composed("model=llama_60m", "max_steps=null", f"max_tokens={512 * 256 * 3 + 1}")
    assert num_steps(config) == 4
    config.extend = 3
    assert num_steps(config) == 7


def test_overrides_of_single_layers_reach_the_model() -> None:
    config = composed("model=llama_60m", "rank_overrides={q_proj:16}", "sparsity_overrides={*.layers.0.*:0.1,mlp:0}")
    model = build_model(config, 32_000, torch.float32)
    assert model.model.layers[3].self_attn.q_proj.rank == 16
    assert model.model.layers[3].self_attn.k_proj.rank == 128
    assert model.model.layers[3].mlp.up_proj.values.numel() == 0


def test_every_key_of_the_schema_is_read_somewhere() -> None:
    """By the code, or by a plug-in whose defaults refer to it."""
    code = "".join(path.read_text() for path in Path(sltrain.__file__).parent.rglob("*.py"))
    defaults = "".join(path.read_text() for path in conf_dir().rglob("*.yaml"))
    schemas: list[type] = [TrainConfig, ModelConfig, TrackerConfig, ParallelConfig, ParametrizationConfig]
    for registry in PLUGINS.values():
        schemas += [registry.load(name) for name in registry.names()]
    for schema in schemas:
        for item in fields(schema):
            is_read = re.search(
                rf"\b(config|c|self|shape|run|data|tracker|parallel|parametrization)\.{item.name}\b", code
            )
            assert is_read or f"${{{item.name}}}" in defaults, f"{schema.__name__}.{item.name}"


def saved(config: TrainConfig, folder: Path, **changes: object) -> Path:
    """config.yaml as a run writes it; a change to `...` takes the key away."""
    content = {**asdict(config), **changes}
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in content.items() if value is not ...}, sort_keys=False))
    return path


@pytest.mark.parametrize(
    "overrides",
    [
        ["model=llama_60m"],
        ["model=llama_tiny", "method=full", "data=local", "path=[/a/*.gz,/b/*.gz]", "max_steps=null", "max_tokens=99"],
        ["model=llama_tiny", "rank_overrides={q_proj:16,*.layers.0.*:4}", "sparsity_overrides={mlp:0}", "grad_clip=1"],
        ["experiment=quickstart"],
    ],
)
def test_a_saved_configuration_comes_back(overrides: list[str], tmp_path: Path) -> None:
    config = composed(*overrides)
    found = read_config(saved(config, tmp_path))
    assert found == config and asdict(found) == asdict(config)
    assert type(found) is TrainConfig and type(found.model) is ModelConfig
    assert type(found.rank_overrides) is dict and isinstance(found.path, list | str | None)


def test_a_key_younger_than_the_run_has_its_default(tmp_path: Path) -> None:
    """That of conf/train.yaml, which is what the run was made with; not that of a recipe."""
    config = composed("model=llama_60m", "support=block")
    found = read_config(saved(config, tmp_path, support=..., padding=..., tokenizer=..., block_size=...))
    assert (found.support, found.padding, found.tokenizer, found.block_size) == (
        "uniform",
        "truncate_pad",
        "t5-base",
        None,
    )
    assert found.rank == config.rank


@pytest.mark.parametrize("value", ["hold", "fold"])
def test_a_retired_key_of_a_saved_configuration_is_left_out(value: str, tmp_path: Path) -> None:
    """What was trained with it can be opened, whatever its value; whether it can be continued, the run folder says."""
    config = composed("model=llama_60m")
    assert read_config(saved(config, tmp_path, accumulation=value)) == config


def test_what_a_removed_optimizer_trained_is_opened_and_not_continued(tmp_path: Path) -> None:
    config = composed("model=llama_60m", "optimizer=adamw")
    removed = {"name": "adam4bit", "betas": [0.9, 0.95], "eps": 1e-8}  # as its runs have it
    file = saved(config, tmp_path, optimizer=removed)
    found = read_config(file)
    assert asdict(found) == {**asdict(config), "optimizer": {**removed, "moments_dtype": "auto"}}
    gone = "optimizer=adam4bit does not exist any more; take optimizer=scale, or .*both need less memory"
    for texts in (["model=llama_60m", "optimizer=adam4bit"], [f"run_dir={tmp_path}", "optimizer=adam4bit"]):
        with pytest.raises(ValueError, match=f"^{gone}$"):
            run_config(texts)
    for key in ("run_dir", "init_from"):
        with pytest.raises(ValueError, match=f"^{tmp_path} cannot continue, .*init_from={tmp_path}.*{gone}$"):
            run_config([f"{key}={tmp_path}"])
    assert run_config([f"init_from={tmp_path}", "optimizer=scale"]).optimizer.name == "scale"
    folder = RunFolder(tmp_path, read_effective=lambda path: asdict(read_config(path)))
    folder.summary_file.write_text("{}")
    with pytest.raises(ValueError, match="holds another run: optimizer.name was 'adam4bit', is now 'adamw'"):
        folder.check(asdict(config), "auto", ["run_dir", "optimizer.betas"])


def test_a_retired_key_cannot_be_typed() -> None:
    for key in RETIRED_KEYS:
        with pytest.raises(ValueError, match=f"unknown key '{key}'"):
            compose_config(["model=llama_60m", f"{key}={RETIRED_KEYS[key]}"], TRAIN)


def test_a_key_without_a_default_is_missed(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"config\.yaml is damaged, or of another version: .*rank"):
        read_config(saved(composed("model=llama_60m"), tmp_path, rank=...))


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"colour": 1}, "colour"),
        ({"rank": -1}, "rank=-1"),
        ({"max_tokens": 5}, "max_tokens"),
        ({"model": {"name": "x", "wings": 2}}, "wings"),
        ({"data": None}, "data"),
        ({"rank": "many"}, "rank"),
        ({"lr": [1]}, "lr"),
    ],
)
def test_a_saved_configuration_that_is_wrong(changes: dict, word: str, tmp_path: Path) -> None:
    path = saved(composed("model=llama_60m"), tmp_path, **changes)
    with pytest.raises(ValueError, match="damaged, or of another version") as caught:
        read_config(path)
    message = str(caught.value)
    assert message.startswith(str(path)) and len(message.splitlines()) == 1
    assert word in message.partition("another version: ")[2]


@pytest.mark.parametrize("content", [b"", b"- 1", b"text", b"a: [1", b"\xff\xfe", b"!!python/object:os.x {}"])
def test_a_file_that_is_no_configuration(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_bytes(content)
    with pytest.raises(ValueError, match=r"config\.yaml is damaged"):
        read_config(tmp_path / "config.yaml")
    with pytest.raises(OSError, match="nothing"):
        read_config(tmp_path / "nothing.yaml")


@pytest.mark.parametrize("key", ["method.name=full", "optimizer.name=adam8bit", "data.name=stdlib"])
def test_a_plug_in_is_chosen_by_its_group_only(key: str) -> None:
    group, _, name = key.replace(".name", "").partition("=")
    with pytest.raises(ValueError, match=f"choose with {group}={name}"):
        compose_config(["model=llama_tiny", "max_steps=1", key], TRAIN)


def test_a_mapping_among_a_plug_ins_options_can_be_typed() -> None:
    for typed in ("method.rank_overrides={q_proj:4}", "method.rank_overrides.q_proj=4", "rank_overrides={q_proj:4}"):
        config = compose_config(["model=llama_tiny", "max_steps=1", typed], TRAIN)
        assert config.method.columns()["rank"] == config.rank and config.method.rank_overrides == {"q_proj": 4}


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        ("method.alpha=-1", "method.alpha=-1.0: must be a number above 0"),
        ("method.rank=-3", "method.rank=-3: must be at least 0"),
        ("support=block method.block_size=0", "method.block_size=0: must be at least 1"),
        ("data=local path=/x data.on_bad_data=foo", "data.on_bad_data=foo: choose one of skip, stop"),
        ("data=local data.path=3", "data.path=3: must be a glob"),
        ("method=full support=bogus", "support=bogus: choose one of uniform"),
    ],
)
def test_options_of_plug_ins_are_checked_before_anything_starts(typed: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        compose_config(["model=llama_tiny", "max_steps=1", *typed.split()], TRAIN)

"""What is typed without a model means the run in run_dir, or the one that init_from names."""

from pathlib import Path

import pytest
import yaml

from sltrain.compose import TRAIN, compose_config, read_config, run_config
from sltrain.config import TrainConfig

TYPED = (
    "model=llama_tiny data=local path=/a/*.gz rank=8 max_steps=30 tokenizer=bpe:512 rank_overrides={q_proj:4}".split()
)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A folder with the config.yaml that a run writes."""
    from dataclasses import asdict

    folder = tmp_path / "run"
    folder.mkdir()
    config = compose_config([*TYPED, f"run_dir={folder}", "resume=never"], TRAIN)
    (folder / "config.yaml").write_text(yaml.safe_dump(asdict(config), sort_keys=False))
    return folder


def test_the_folder_alone_gives_what_the_run_was_made_with(run: Path) -> None:
    config = run_config([f"run_dir={run}"])
    assert config == read_config(run / "config.yaml")
    assert config == compose_config([*TYPED, f"run_dir={run}", "resume=never"], TRAIN)


def test_what_is_typed_comes_last_and_options_follow_their_keys(run: Path) -> None:
    config = run_config(
        ["keep_last=5", "path=[/b/*.gz,/c/*.gz]", "tracker=wandb", "tracker.project=mine", f"run_dir={run}"]
    )
    assert (config.keep_last, config.tracker.name, config.tracker.project) == (5, "wandb", "mine")
    assert config.path == vars(config.data)["path"] == ["/b/*.gz", "/c/*.gz"]
    config = run_config(["rank=16", "rank_overrides={k_proj:2}", f"run_dir={run}"])  # refused later, by the run folder
    assert vars(config.method)["rank"] == config.rank == 16
    assert vars(config.method)["rank_overrides"] == {"q_proj": 4, "k_proj": 2} == config.rank_overrides
    apart = run_config(["method.alpha=5", f"run_dir={run}"])
    assert (vars(apart.method)["alpha"], apart.alpha) == (5, 16)


def test_a_new_run_from_weights_takes_over_everything_but_the_folder(run: Path) -> None:
    config = run_config([f"init_from={run}", "method=full", "max_steps=5"])
    assert (config.init_from, config.run_dir, config.resume, config.extend) == (str(run), None, "auto", 0)
    assert (config.method.name, config.max_steps, config.path) == ("full", 5, "/a/*.gz")
    assert config.tokenizer == f"{run}/tokenizer.json", "its own: bpe:512 of another corpus would be another one"
    at_step = run_config([f"init_from={run}/checkpoints/step_00000010", "tokenizer=gpt2", "run_dir=/nowhere"])
    assert (at_step.tokenizer, at_step.run_dir, at_step.rank) == ("gpt2", "/nowhere", 8)


def test_a_run_is_read_where_its_data_set_is_not(tmp_path: Path) -> None:
    """Its model can be loaded and exported there, and it continues with the folder's new name."""
    from dataclasses import asdict

    (tmp_path / "text").mkdir()
    config = compose_config(["model=llama_tiny", "data=hf", f"repo={tmp_path / 'text'}"], TRAIN)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(asdict(config)))
    (tmp_path / "text").rename(tmp_path / "moved")
    assert read_config(tmp_path / "config.yaml") == config
    moved = run_config([f"run_dir={tmp_path}", f"repo={tmp_path / 'moved'}"])
    assert vars(moved.data)["repo"] == f"{tmp_path / 'moved'}"


def test_a_commit_is_taken_over_for_the_same_corpus_only(tmp_path: Path) -> None:
    from dataclasses import asdict

    began_with, another = "c" * 40, "d" * 40
    typed = ["model=llama_tiny", "data=hf", "repo=some/text", f"data.commit={began_with}"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(asdict(compose_config(typed, TRAIN))))

    def commit(*typed: str) -> str | None:
        found = {vars(run_config([f"{key}={tmp_path}", *typed]).data)["commit"] for key in ("init_from", "run_dir")}
        assert len(found) == 1
        return found.pop()

    assert commit() == commit("split=test") == began_with
    assert commit("repo=other/text") is commit("data.revision=newer") is None, "the old one would be read, or not exist"
    assert commit(f"data.commit={another}") == commit("repo=other/text", f"data.commit={another}") == another


def test_another_source_does_not_inherit_the_corpus(tmp_path: Path) -> None:
    from dataclasses import asdict

    config = compose_config(["model=llama_tiny", "data=hf", "repo=some/text", "config=en"], TRAIN)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(asdict(config)))
    local = run_config([f"init_from={tmp_path}", "data=local", "path=/a/*.gz"])
    assert (local.repo, local.config, local.path, vars(local.data)["path"]) == (None, None, "/a/*.gz", "/a/*.gz")
    assert run_config([f"init_from={tmp_path}", "data=hf"]).repo == "some/text"


def test_a_model_or_an_experiment_means_conf(run: Path) -> None:
    config: TrainConfig = run_config(["model=llama_60m", f"init_from={run}"])
    assert (config.rank, config.tokenizer) == (128, f"{run}/tokenizer.json")
    assert run_config(["model=llama_60m"]).tokenizer == "t5-base"
    assert run_config(["experiment=quickstart", f"run_dir={run}"]).max_steps == 200


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        (["run_dir=/nowhere"], ["/nowhere holds no run to continue", "model=NAME", "llama_60m"]),
        (["run_dir=RUN", "rnk=3"], ["unknown key 'rnk'", "rank"]),
        (["run_dir=RUN", "keep_last=many"], ["keep_last=many", "Integer"]),
        (["run_dir=RUN", "keep_last=0"], ["keep_last=0", "at least 1"]),
        (["run_dir=RUN", "data.block=1"], ["data.block"]),
        (["run_dir=RUN", "tracker=mlflow"], ["tracker=mlflow does not exist", "wandb"]),
        (["run_dir=RUN", "recipe=best"], ["recipe=best is for a run that takes its keys", "add model=NAME"]),
        (["run_dir=RUN", "method=sl"], ["method=sl does not exist", "sltrain"]),
        (["run_dir=RUN", "keep_last=1,2"], ["-m"]),
        (["run_dir=RUN", "extend=-1"], ["extend=-1", "at least 0"]),
        (["run_dir=RUN", "data.repo=x"], ["data.repo"]),
        (["run_dir=RUN/config.yaml"], ["run_dir=RUN/config.yaml is a file"]),
        (["init_from=RUN/config.yaml"], ["RUN/config.yaml is a file", "folder of a run"]),
        (["init_from=RUN/.."], ["RUN/.. holds no run", "add model=NAME", "llama_60m"]),
        (["init_from=RUN/nothing", "run_dir=/nowhere"], ["RUN/nothing: there is no such folder"]),
    ],
)
def test_mistakes_cost_one_line(typed: list[str], words: list[str], run: Path) -> None:
    with pytest.raises(ValueError) as caught:
        run_config([text.replace("RUN", str(run)) for text in typed])
    assert "\n" not in str(caught.value)
    for word in words:
        assert word.replace("RUN", str(run)) in str(caught.value)


@pytest.mark.parametrize("key", ["run_dir", "init_from"])
def test_what_it_means_is_shown_without_running_it(run: Path, key: str, capfd: pytest.CaptureFixture[str]) -> None:
    from dataclasses import asdict

    from sltrain.commands.train import run_command

    typed = [f"{key}={run}", "lr=0.5"]
    assert run_command([*typed, "--cfg", "job"]) == 0
    assert yaml.safe_load(capfd.readouterr().out) == asdict(run_config(typed))
    assert run_command([*typed, "--cfg", "job", "--package", "method.rank"]) == 0
    assert capfd.readouterr().out == "8\n"
    for flags in (["--cfg", "hydra"], ["--info", "defaults"], ["--cfg", "job", "--package", "nothing"]):
        assert run_command([*typed, *flags]) == 2
        assert flags[-1] in capfd.readouterr().err
    assert list(run.iterdir()) == [run / "config.yaml"]


def test_a_damaged_folder_and_the_folder_of_a_sweep_are_named(run: Path, tmp_path: Path) -> None:
    (run / "config.yaml").write_text("model: {name: ")
    with pytest.raises(ValueError, match="config.yaml is damaged"):
        run_config([f"run_dir={run}"])
    (tmp_path / "multirun.yaml").write_text("")
    with pytest.raises(ValueError, match="holds a sweep; continue it with -m: sltrain-train -m run_dir="):
        run_config([f"run_dir={tmp_path}"])

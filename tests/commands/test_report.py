"""`sltrain-report` over real and hand-written run folders, and what it says to mistakes."""

import csv
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import yaml

import sltrain
from sltrain.api.report import _computed, as_json, read_report, read_rows, write_report
from sltrain.commands.flags import make_parser
from sltrain.commands.report import run_command
from sltrain.reporting.table import text_table

Answer = tuple[int, str, str]
Report = Callable[..., Answer]

CONFIG = """
model: {name: tiny}
method: {name: sltrain}
rank: 8
sparsity: 0.03
alpha: 8.0
padding: pack
seq_len: 32
max_steps: 20
"""
LINES = [
    {"event": "train", "step": 10, "tokens": 640, "wall_seconds": 1.0, "loss": 6.0, "tokens_per_second": 640.0},
    {"event": "train", "step": 20, "tokens": 1280, "wall_seconds": 2.0, "loss": 5.0, "tokens_per_second": 640.0},
]
FINAL = {
    **{"event": "final", "step": 20, "tokens": 1280, "wall_seconds": 2.5, "loss": 5.0, "perplexity": 148.4},
    **{"perplexity_galore_protocol": 90.0, "bits_per_byte": 2.0, "eval_tokens": 500, "peak_memory_bytes": 10**9},
    **{"peak_memory_measure": "peak resident size", "num_parameters": {"total": 12345}},
}


def make_run(folder: Path, final: dict[str, Any] | None = FINAL) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(CONFIG)
    (folder / "tokenizer.json").write_text("{}")
    (folder / ".lock").write_text(f"process 1 on {os.uname().nodename}\n")
    lines = [*LINES, *([final] if final else [])]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if final:
        (folder / "summary.json").write_text(json.dumps(final))
    return folder


@pytest.fixture
def report(capfd: pytest.CaptureFixture[str]) -> Report:
    """Run `sltrain-report`: arguments -> (exit code, stdout, stderr)."""

    def run(*arguments: str | Path) -> Answer:
        capfd.readouterr()
        code = run_command([str(argument) for argument in arguments])
        out, err = capfd.readouterr()
        return int(code), out, err

    return run


def test_a_real_run_and_one_cut_short(
    sltrain_train: Callable[..., Answer], tiny: list[str], tmp_path: Path, report: Report
) -> None:
    for method in ("sltrain", "low_rank"):
        code, _, err = sltrain_train(*tiny, f"method={method}", "eval_every=3", f"run_dir={tmp_path}/{method}")
        assert code == 0, err
    summary = json.loads((tmp_path / "sltrain" / "summary.json").read_text())
    # The other as if it had been killed before its last evaluation.
    cut = tmp_path / "low_rank"
    parameters = json.loads((cut / "summary.json").read_text())["num_parameters"]["total"]
    lines = (cut / "metrics.jsonl").read_text().splitlines(keepends=True)
    newest = [json.loads(line) for line in lines if json.loads(line)["event"] == "eval"][-1]
    (cut / "metrics.jsonl").write_text("".join(line for line in lines if '"final"' not in line))
    (cut / "summary.json").unlink()

    code, out, err = report(tmp_path, "--json")
    assert code == 0 and err.splitlines()[-1] == f"page: {tmp_path}/report/report.html"
    rows = {row["name"]: row for row in json.loads(out)}
    done, died = rows["sltrain"], rows["low_rank"]
    for key in ("perplexity", "bits_per_byte", "loss", "tokens", "wall_seconds", "step"):
        assert done[key] == summary[key], key
    assert done["perplexity_galore_protocol"] is None  # of a few batches
    assert (done["status"], died["status"]) == ("finished", "crashed")
    assert done["num_parameters"] == summary["num_parameters"]["total"] and done["rank"] == 8
    assert died["num_parameters"] == parameters  # counted anew, on meta
    assert died["perplexity"] == newest["perplexity"] and died["evaluated_step"] == newest["step"]
    assert done["group"] == died["group"] == "" and done["tokenizer_hash"] == died["tokenizer_hash"] is not None
    assert sorted(path.name for path in (tmp_path / "report").iterdir()) == sorted(
        ["report.html", "table.csv", "table.md", "loss_tokens.png", "loss_time.png", "memory.png"]
    )
    with open(tmp_path / "report" / "table.csv") as file:
        assert {row["name"]: float(row["perplexity"]) for row in csv.DictReader(file)} == {
            name: row["perplexity"] for name, row in rows.items()
        }

    code, out, _ = report(tmp_path)  # its own folder is no run and disturbs nothing
    assert code == 0 and out.splitlines()[-1].startswith("page: ") and len(out.splitlines()) >= 4
    (name,) = [line for line in out.splitlines() if line.startswith("low_rank")]
    assert f"{newest['perplexity']:,.2f} @{newest['step']}" in name


def test_paths_from_several_places(tmp_path: Path, report: Report) -> None:
    make_run(tmp_path / "laptop" / "sweep" / "a")
    make_run(tmp_path / "cluster" / "sweep" / "b", {**FINAL, "perplexity": 100.0})
    code, out, _ = report(tmp_path / "laptop", tmp_path / "cluster", tmp_path / "cluster" / "sweep", "--json")
    assert code == 0 and [row["name"] for row in json.loads(out)] == ["sweep/b", "sweep/a"]
    assert (tmp_path / "laptop" / "report" / "report.html").exists()


def test_names_that_two_places_share_are_told_apart(tmp_path: Path) -> None:
    roots = [make_run(tmp_path / place / "a").parent for place in ("one", "two")]
    assert {row.name for row in read_rows(roots)[0]} == {"one/a", "two/a"}
    roots += [make_run(tmp_path / "deep" / "one" / "a").parent]
    assert {row.name for row in read_rows(roots)[0]} == {str(root / "a") for root in roots}


def test_the_best_run_of_each_value(tmp_path: Path, report: Report) -> None:
    for method, factor, perplexity in (("a", 1, 30.0), ("a", 2, 20.0), ("b", 1, 25.0), ("b", 2, 40.0)):
        run = make_run(tmp_path / f"{method}{factor}", {**FINAL, "perplexity": perplexity})
        with open(run / "config.yaml", "a") as file:
            file.write(f"lr_scale: {{factor: {factor}}}\n")
        (run / "config.yaml").write_text((run / "config.yaml").read_text().replace("name: sltrain", f"name: {method}"))
    code, out, err = report(tmp_path, "--best", "method")
    assert code == 0 and "note: Of 4 runs these are the best for each method, by perplexity." in err
    assert [line.split()[0] for line in out.splitlines()[1:3]] == ["a2", "b1"] and "b2" not in out
    assert "lr_scale.factor" in out.splitlines()[0]
    page = (tmp_path / "report" / "report.html").read_text()
    assert "the best for each method" in page and ">b1<" in page and ">b2<" not in page and "Memory and" in page
    code, out, _ = report(tmp_path, "--best", "method, lr_scale.factor", "--json")
    assert code == 0 and [row["best_of"] for row in json.loads(out)] == ["a, 2", "b, 1", "a, 1", "b, 2"]
    assert [row.name for row in sltrain.report(tmp_path, best="lr_scale.factor")] == ["a2", "b1"]
    code, out, err = report(tmp_path, "--best", "colour")
    assert code == 2 and out == "" and len(err.splitlines()) == 1
    assert "best of colour" in err and "lr_scale.factor" in err


def test_a_run_called_report_is_no_place_for_a_report(tmp_path: Path, report: Report) -> None:
    make_run(tmp_path / "report")
    code, out, _ = report(tmp_path)
    assert code == 0 and out.splitlines()[-1] == f"page: {tmp_path}/report_of_runs/report.html"


def test_a_run_itself_may_be_named(tmp_path: Path, report: Report, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path / "a")
    monkeypatch.chdir(run)
    code, out, _ = report(".")
    assert code == 0 and out.splitlines()[1].startswith("a ")
    assert (run / "report" / "report.html").exists()


def test_runs_of_a_study_are_left_out_in_a_line(tmp_path: Path, report: Report) -> None:
    make_run(tmp_path / "studies" / "x" / "runs" / "dense_trial-1_seed-1")
    (tmp_path / "studies" / "x" / "ledger.jsonl").write_text("")
    words = f"Runs of studies are left out ({tmp_path}/studies/x): a study has a page, sltrain-report --study FOLDER"
    assert report(tmp_path) == (2, "", f"error: {words}\n")
    make_run(tmp_path / "run")
    code, out, err = report(tmp_path)
    assert code == 0 and "dense_trial-1" not in out and f"note: {words}\n" in err
    assert "dense_trial-1" in report(tmp_path / "studies" / "x")[1]


def test_a_bad_path_is_named_and_the_others_reported(tmp_path: Path, report: Report) -> None:
    make_run(tmp_path / "runs" / "a")
    (tmp_path / "empty").mkdir()
    code, out, err = report(tmp_path / "nowhere", tmp_path / "empty", tmp_path / "runs")
    assert code == 0 and "148.40" in out
    assert f"{tmp_path}/nowhere does not exist" in err and f"{tmp_path}/empty holds no run" in err
    assert not (tmp_path / "nowhere").exists() and (tmp_path / "runs" / "report").is_dir()


@pytest.mark.parametrize(
    ("path", "words"),
    [("nowhere", "does not exist"), ("empty", "holds no run"), ("empty/file", "is a file")],
)
def test_without_any_run_it_says_so_and_answers_2(tmp_path: Path, report: Report, path: str, words: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "file").touch()
    code, out, err = report(tmp_path / path)
    assert code == 2 and out == "" and len(err.splitlines()) == 1
    assert err.startswith(f"error: {tmp_path}/{path}") and words in err
    assert [entry.name for entry in tmp_path.rglob("*")] == ["empty", "file"]


@pytest.mark.parametrize("arguments", [[], ["--jso", "x"], ["x", "--output"], ["x", "--spam=1"]])
def test_a_mistake_in_the_arguments_is_one_line(report: Report, arguments: list[str]) -> None:
    code, out, err = report(*arguments)
    assert code == 2 and out == "" and len(err.splitlines()) == 1 and "sltrain-report --help" in err


def test_help_shows_examples_and_every_argument(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run_command(["--help"])
    out = capfd.readouterr().out
    assert ended.value.code == 0 and "sltrain-report outputs/a /mnt/cluster/b" in out
    assert all(flag in out for flag in ("--output DIR", "--json", "--best KEYS", "--spectrum", "--layers", "--steps"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path, report: Report) -> None:
    run = make_run(tmp_path / "a")
    run.chmod(0o555)
    code, out, err = report(run)
    assert code == 2 and out == "" and "--output" in err


def test_an_output_that_is_a_file_is_named(tmp_path: Path, report: Report) -> None:
    make_run(tmp_path / "a")
    (tmp_path / "file").touch()
    code, _, err = report(tmp_path, "--output", tmp_path / "file")
    assert code == 2 and len(err.splitlines()) == 1 and f"{tmp_path}/file" in err and "--output" in err


def test_figures_of_an_earlier_report_do_not_stay(tmp_path: Path) -> None:
    make_run(tmp_path / "runs" / "a")
    out = tmp_path / "out"
    out.mkdir()
    for name in ("heat_map_7.png", "heat_map_8.png", "mine.png"):
        (out / name).write_text("")
    (out / "report.html").write_text('<meta name="sltrain-report" content="table.md heat_map_7.png ../runs">')
    page = write_report(read_report([tmp_path / "runs"]), out)
    assert page == out / "report.html" and page.exists() and (tmp_path / "runs").exists()
    assert not (out / "heat_map_7.png").exists(), "the earlier report's"
    assert (out / "heat_map_8.png").exists() and (out / "mine.png").exists()


def test_damage_is_noted_on_stderr_and_in_the_page(tmp_path: Path, report: Report) -> None:
    run = make_run(tmp_path / "a")
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"event": "tr')
    code, out, err = report(tmp_path)
    note = "a: metrics.jsonl: line 4 is damaged and skipped"
    assert code == 0 and f"note: {note}" in err and note not in out
    assert note in (tmp_path / "report" / "report.html").read_text()


def test_the_page_says_how_it_was_made(tmp_path: Path, report: Report) -> None:
    make_run(tmp_path / "my runs" / "a")
    report(tmp_path / "my runs")
    page = (tmp_path / "my runs" / "report" / "report.html").read_text()
    assert f"sltrain-report &#39;{tmp_path}/my runs&#39;" in page


def test_an_unfinished_run_of_another_version_has_a_dash_and_a_note(tmp_path: Path) -> None:
    make_run(tmp_path / "a", final=None)
    rows, notes = read_rows([tmp_path])
    assert rows[0].status == "crashed" and rows[0].num_parameters is None
    assert any("parameters cannot be counted" in note for note in notes)
    assert len(text_table(rows).splitlines()) == 2


def test_a_name_that_is_no_text_is_still_a_row(tmp_path: Path) -> None:
    make_run(Path(os.fsdecode(os.fsencode(tmp_path) + b"/runs/\xff\n")))
    found = read_report([tmp_path / "runs"])
    assert found.rows[0].name == "??"
    assert write_report(found, tmp_path / "out").exists()


def test_settings_are_those_that_decide_what_is_computed(tmp_path: Path) -> None:
    make_run(tmp_path / "a")
    config = yaml.safe_load((tmp_path / "a" / "config.yaml").read_text())
    config |= {"model": {"name": "tiny"}, "rank_overrides": {"k_proj": 4}, "path": "/a/x.gz", "device": "cpu"}
    (tmp_path / "a" / "config.yaml").write_text(yaml.safe_dump(config))
    settings = read_rows([tmp_path])[0][0].settings
    assert (settings["model.name"], settings["rank_overrides.k_proj"], settings["path"]) == ("tiny", "4", "/a/x.gz")
    assert "device" not in settings


def test_json_is_strict_and_holds_every_field(tmp_path: Path) -> None:
    make_run(tmp_path / "a", {**FINAL, "loss": None, "perplexity": None})
    rows, _ = read_rows([tmp_path])
    assert math.isnan(rows[0].perplexity or 0.0)
    (row,) = json.loads(as_json(rows), parse_constant=pytest.fail)
    assert row.keys() == asdict(rows[0]).keys() and row["perplexity"] is None and row["num_parameters"] == 12345


def test_rows_of_finished_runs_need_neither_torch_nor_matplotlib(tmp_path: Path) -> None:
    make_run(tmp_path / "a")
    code = (
        "import sys; from pathlib import Path; from sltrain.api.report import read_rows\n"
        "from sltrain.reporting.table import text_table\n"
        f"print(text_table(read_rows([Path({str(tmp_path)!r})])[0]))\n"
        "sys.exit(', '.join({'torch', 'matplotlib', 'jinja2'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "148.40" in done.stdout


# ---- flags.py


def test_a_parser_raises_instead_of_printing(capsys: pytest.CaptureFixture[str]) -> None:
    parser = make_parser("sltrain-thing", "What it does.\n\n    sltrain-thing x    an example")
    parser.add_argument("--number", type=int)
    with pytest.raises(ValueError, match=r"invalid int value: 'x'; sltrain-thing --help"):
        parser.parse_args(["--number", "x"])
    with pytest.raises(ValueError, match="--num"):
        parser.parse_args(["--num", "1"])
    assert parser.parse_args(["--number", "3"]).number == 3
    assert capsys.readouterr() == ("", "")
    assert "    sltrain-thing x    an example" in parser.format_help()


def test_the_spectrum_of_a_run_is_on_its_page(
    tiny: list[str], tmp_path: Path, sltrain_train: Callable[..., tuple[int, str, str]], report: Report
) -> None:
    assert sltrain_train(*tiny, "max_steps=2", "warmup_steps=0", f"run_dir={tmp_path}/run")[0] == 0
    code, out, err = report(tmp_path / "run", "--spectrum", "--layers", "q_proj")
    page = (tmp_path / "run" / "report" / "report.html").read_text()
    assert code == 0 and "energy in S" in out, err
    assert "Spectrum of run" in page and "model.layers.1.self_attn.q_proj" in page and "up_proj" not in page
    assert "energy in S, all" in page, "the table by kind"
    assert page.count("<img ") == len(list((tmp_path / "run" / "report").glob("*.png"))) > 2
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run" / "report").iterdir()}
    code, out, err = report(tmp_path / "run", "--spectrum", "--steps", "7")
    assert code == 2 and "no checkpoint of step 7; there are: 2" in err and "page" not in out
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "run" / "report").iterdir()}
    assert report(tmp_path / "run")[0] == 0
    assert not [path.name for path in (tmp_path / "run" / "report").iterdir() if "spectrum" in path.name]


@pytest.mark.parametrize(
    ("arguments", "said"), [(("--layers", "q_proj"), "add --spectrum"), (("b", "--spectrum"), "name one run folder")]
)
def test_what_the_spectrum_is_of(tmp_path: Path, report: Report, arguments: tuple[str, ...], said: str) -> None:
    code, _, err = report(make_run(tmp_path / "a"), *arguments)
    assert code == 2 and said in err


def test_files_of_others_are_not_written_over(tmp_path: Path, report: Report) -> None:
    run, mine = make_run(tmp_path / "run"), tmp_path / "mine"
    mine.mkdir()
    for name in ("table.csv", "memory.png", "energy.csv", "spectrum_12_2.png", "heat_map_7.png", "report.html"):
        (mine / name).write_text("mine")
        code, out, err = report(run, "--output", mine)
        assert code == 2 and out == "" and str(mine / name) in err
        assert [path.name for path in mine.iterdir()] == [name] and (mine / name).read_text() == "mine"
        (mine / name).unlink()
    before = sorted(path.name for path in run.iterdir())
    code, _, err = report(run, "--output", run, "--spectrum")
    assert code == 2 and "is a run folder" in err and sorted(path.name for path in run.iterdir()) == before
    (tmp_path / "link").symlink_to(run)
    for place in (
        run / "checkpoints",
        run / "checkpoints" / "step_00000002" / "a" / "b",
        tmp_path / "link" / "checkpoints",
    ):
        code, _, err = report(run, "--output", place)
        assert code == 2 and "a model's files" in err and not place.exists()
    (mine / "config.json").write_text("{}")
    assert report(run, "--output", mine)[0] == 2
    (mine / "config.json").unlink()
    (mine / "notes.csv").write_text("mine")
    assert report(run, "--output", mine)[0] == report(run, "--output", mine)[0] == 0  # its own it may
    assert (mine / "notes.csv").read_text() == "mine"


def test_nobody_reads_the_table_and_the_page_is_written(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    process = subprocess.Popen(
        [sys.executable, "-m", "sltrain.commands.report", str(run)], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()  # as `| true`
    assert process.stderr.read() == b"" and process.wait() == 0
    assert (run / "report" / "report.html").exists()


def test_options_that_differ_from_a_key_of_the_same_name_are_settings() -> None:
    config = {"rank": 32, "lr": 0.1, "path": None, "method": {"name": "new", "rank": 8}, "optimizer": {"rank": 64}}
    assert _computed(config) == {
        "rank": "32", "lr": "0.1", "path": "None", "method.name": "new", "method.rank": "8", "optimizer.rank": "64",
    }  # fmt: skip
    assert "method.rank" not in _computed({**config, "method": {"name": "new", "rank": 32}})

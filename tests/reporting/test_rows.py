"""A run's lines become one row."""

import math
import statistics
from typing import Any

import pytest

from sltrain.reporting.rows import Row, make_curve, make_row, printable

CONFIG: dict[str, Any] = {
    "model": {"name": "llama_tiny"},
    "method": {"name": "sltrain"},
    "data": {"name": "local"},
    "rank": 16,
    "sparsity": 0.05,
    "alpha": 8.0,
    "lr": 0.003,
    "padding": "pack",
    "seq_len": 32,
    "global_batch_size": 4,
    "max_steps": 300,
    "max_tokens": None,
    "validation_path": "/data/wiki/val.*.gz",
    "run_dir": "/outputs/a",
}
TRAIN = [
    {"event": "train", "step": step, "tokens": 128 * step, "loss": 9.0 - step, "tokens_per_second": speed}
    for step, speed in ((1, 10.0), (2, 500.0), (3, 700.0), (4, 400.0))
]
EVAL = {"event": "eval", "step": 3, "loss": 3.5, "perplexity": 33.1, "bits_per_byte": 1.6, "eval_tokens": 999}
FINAL = {**EVAL, "event": "final", "step": 4, "perplexity": 30.0, "peak_memory_bytes": 5, "wall_seconds": 7.5}


def row_of(config: dict[str, Any] = CONFIG, **given: Any) -> Row:
    arguments: dict[str, Any] = {"train": TRAIN, "newest_eval": EVAL, "final": None, "last": TRAIN[-1]}
    arguments |= {"tokenizer_hash": "t", "num_parameters": 7, "settings": {}, **given}
    return make_row("run", "crashed", config, **arguments)


def test_an_unfinished_run_is_told_by_its_newest_lines() -> None:
    row = row_of(last={"event": "stopped", "step": 5, "tokens": 640, "wall_seconds": 9.0})
    assert (row.step, row.tokens, row.wall_seconds, row.max_steps) == (5, 640, 9.0, 300)
    assert (row.perplexity, row.evaluated_step, row.eval_tokens) == (33.1, 3, 999)
    assert row.tokens_per_second == statistics.median([500.0, 700.0, 400.0])
    assert (row.size, row.method, row.lr, row.num_parameters) == ("llama_tiny", "sltrain", 0.003, 7)


def test_utilisation_is_the_median_without_the_first_line() -> None:
    train = [{**line, "mfu": line["tokens_per_second"] / 1000} for line in TRAIN]
    assert row_of(train=train).mfu == 0.5 and row_of().mfu is None


def test_a_final_line_goes_before_the_newest_evaluation() -> None:
    row = row_of(final=FINAL, last=FINAL)
    assert (row.perplexity, row.evaluated_step, row.wall_seconds, row.peak_memory_bytes) == (30.0, 4, 7.5, 5)


@pytest.mark.parametrize(
    ("published", "true", "shown"),
    [(27.0, 30.0, 27.0), (26.9, 30.0, None), (170.0, 29048.0, None), (math.nan, 30.0, None), (27.0, math.nan, None)],
)
def test_the_published_convention_on_few_batches_is_left_out(
    published: float, true: float, shown: float | None
) -> None:
    final = FINAL | {"perplexity_galore_protocol": published, "perplexity": true}
    assert row_of(final=final, last=final).perplexity_galore_protocol == shown


def test_a_method_says_itself_which_options_it_has() -> None:
    row = row_of({**CONFIG, "method": {"name": "new", "rank": 4, "merge_every": 9, "patterns": {"q": 1}}})
    assert (row.rank, row.sparsity, row.alpha, row.support) == (4, None, None, None)
    assert row.options == {"merge_every": 9}
    unknown = row_of({**CONFIG, "method": {"name": "new"}})
    assert (unknown.rank, unknown.sparsity, unknown.alpha) == (None, None, None)


@pytest.mark.parametrize(
    ("method", "used"),
    [("full", (None, None, None)), ("low_rank", (16, None, 8.0)), ("sltrain", (16, 0.05, 8.0))],
)
def test_a_method_shows_only_what_it_uses(method: str, used: tuple[Any, ...]) -> None:
    row = row_of({**CONFIG, "method": {"name": method}})
    assert (row.rank, row.sparsity, row.alpha) == used


@pytest.mark.parametrize(
    ("line", "measure"),
    [
        ({"peak_memory_bytes": 5, "peak_memory_measure": "peak resident size"}, "process"),
        ({"peak_memory_bytes": 5, "peak_memory_measure": "cuda max_memory_allocated"}, "tensors"),
        ({"peak_memory_bytes": 5, "peak_memory_reserved_bytes": 6}, "tensors"),
        ({"peak_memory_bytes": 5, "peak_memory_reserved_bytes": None}, "process"),
        ({}, None),
    ],
)
def test_whose_peak_the_memory_is(line: dict[str, Any], measure: str | None) -> None:
    assert row_of(final={**EVAL, **line}).peak_memory_measure == measure


def test_a_budget_in_positions_is_counted_in_updates_rounded_up() -> None:
    assert row_of({**CONFIG, "max_steps": None, "max_tokens": 4 * 32 * 10 + 1}).max_steps == 11


@pytest.mark.parametrize("damaged", [{}, {"model": 3, "method": [], "rank": "x", "lr": math.nan}, {"rank": 10**400}])
def test_a_configuration_of_anything_is_no_error(damaged: dict[str, Any]) -> None:
    row = row_of(damaged, train=[], newest_eval=None, last=None)
    assert row.method is None and row.rank is None and row.lr is None and row.step is None


def recipe_of(path: Any = None, **settings: str) -> str:
    return row_of({**CONFIG, "path": path}, settings={"alpha": "8", "path": str(path), **settings}).recipe


def test_the_recipe_is_every_setting_but_rank_and_sparsity() -> None:
    assert recipe_of() == recipe_of(rank="1", sparsity="0.5") != recipe_of(alpha="16")
    assert row_of(settings={}).recipe == ""


def test_of_the_corpus_a_recipe_holds_what_names_it() -> None:
    assert recipe_of("/a/wiki.*.gz") == recipe_of("/b/wiki.*.gz") != recipe_of("/a/novels.*.gz")
    paths = ["/a/wiki/*.gz", ["/a/x.gz", "/a/y.gz"], ["/a/z.gz", "/a/y.gz"], "/a/code/**/*.gz", "/b/code/**/*.gz"]
    recipes = [recipe_of(path) for path in paths]
    assert len(set(recipes)) == 4 and recipes[3] == recipes[4]


def test_the_dtype_is_that_of_the_weights_once_it_is_known() -> None:
    config = {**CONFIG, "dtype": "auto"}
    assert row_of(config).dtype is None and row_of({**CONFIG, "dtype": "float32"}).dtype == "float32"
    assert row_of(config, final={**FINAL, "dtype": "bfloat16"}).dtype == "bfloat16"


def test_old_lines_without_a_clock_still_draw_against_tokens() -> None:
    curve = make_curve(TRAIN, [EVAL], {**FINAL, "tokens": 512})
    assert [(point.tokens, point.wall_seconds, point.loss) for point in curve.train][-1] == (512, None, 5.0)
    assert [point.tokens for point in curve.evals] == [512]  # the other has no tokens


def test_printable_keeps_one_line_that_can_be_written() -> None:
    assert printable("a\nb\x1b[31m\udcffé") == "a?b?[31m?é"
    printable("\udcff\n").encode()


def test_the_bytes_of_the_evaluated_text_are_found_again() -> None:
    num_bytes, tokens, loss = 138_221, 40_005, 4.8505229204
    bits = loss * tokens / math.log(2) / num_bytes
    row = row_of(final={**FINAL, "loss": loss, "eval_tokens": tokens, "bits_per_byte": bits})
    assert row.eval_bytes == num_bytes
    assert row_of(final={**FINAL, "loss": math.nan}).eval_bytes is None


def test_a_peak_is_that_of_all_processes_of_a_run() -> None:
    train = [{**TRAIN[0], "peak_memory_bytes": 9, "peak_tensor_bytes": 4}, {**TRAIN[1], "peak_memory_bytes": 7}]
    row = row_of(train=train, final=FINAL)  # the last process saw 5
    assert (row.peak_memory_bytes, row.peak_tensor_bytes) == (9, 4)


def test_a_finished_run_is_as_far_as_its_summary_says() -> None:
    row = row_of(final={**FINAL, "tokens": 512}, last=TRAIN[1])  # a log that was cut
    assert (row.step, row.tokens, row.wall_seconds) == (4, 512, 7.5)


def test_any_learning_rate_is_shown() -> None:
    assert row_of({**CONFIG, "lr": 1e30}).lr == 1e30
    assert row_of({**CONFIG, "lr": math.inf}).lr is None


def test_the_numbers_of_tasks_are_read_and_what_is_none_is_left_out() -> None:
    tasks = {"piqa": {"acc": 0.5, "acc_stderr": 0.1, "acc_norm": None}, "odd": 3}
    assert row_of(final=FINAL | {"tasks": tasks}, last=FINAL).tasks == {"piqa acc": 0.5}
    assert row_of(final=FINAL | {"tasks": [1]}, last=FINAL).tasks == {}

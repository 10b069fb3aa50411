"""A function in a process of its own answers, fails, or dies."""

import math
import os

import pytest

from sltrain.benchmarks.alone import Died, run_alone


def test_the_result_comes_back_from_another_process() -> None:
    assert run_alone(os.getpid) != os.getpid()


def test_its_error_is_raised_here() -> None:
    with pytest.raises(ValueError, match="math domain|nonnegative"):
        run_alone(math.sqrt, -1)


def test_a_process_that_ends_without_an_answer() -> None:
    with pytest.raises(Died, match="exit code 3"):
        run_alone(os._exit, 3)

"""Which signals stop a run, and when a second one ends it at once."""

import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

import pytest

from sltrain.engine import sealed_folder
from sltrain.engine.stop import StopRequest
from sltrain.engine.trainer import Trainer
from sltrain.errors import ExitCode, Interrupted
from sltrain.signals import stop_signals

Run = Callable[..., tuple[int, str, str]]
SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2]


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS)
def test_each_is_a_request_unless_it_is_ignored(number: signal.Signals) -> None:
    with StopRequest() as stop:
        assert not stop.is_set
        signal.raise_signal(number)
        assert stop.signal_name == number.name
    signal.signal(number, signal.SIG_IGN)  # as nohup starts a program, for SIGHUP
    with StopRequest() as stop:
        signal.raise_signal(number)
        assert not stop.is_set


def test_a_program_keeps_the_signals_that_it_handles() -> None:
    """submitit requeues a job of a sweep on SIGUSR2."""
    received = []

    def requeue(number: int, frame: FrameType | None) -> None:
        received.append(number)

    signal.signal(signal.SIGUSR2, requeue)
    assert signal.SIGUSR2 not in stop_signals()
    with StopRequest() as stop:
        signal.raise_signal(signal.SIGUSR2)
    assert received == [signal.SIGUSR2] and not stop.is_set


def test_only_a_second_ctrl_c_ends_it_at_once_and_never_a_save() -> None:
    with StopRequest() as stop:
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGTERM, signal.SIGINT):
            signal.raise_signal(number)
        assert stop.signal_name == "SIGTERM"
        with stop.shielded():
            signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


# ---- in a run


def twice_ctrl_c() -> None:
    signal.raise_signal(signal.SIGINT)
    signal.raise_signal(signal.SIGINT)


def steps_saved(run_dir: Path) -> list[str]:
    return [path.name for path in sorted(run_dir.glob("checkpoints/step_*"))]


def test_twice_during_a_save_waits_for_it(
    tiny: list[str], tmp_path: Path, sltrain_train: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = sealed_folder.write_sealed

    def impatient(*arguments: object) -> None:
        twice_ctrl_c()
        real(*arguments)

    monkeypatch.setattr("sltrain.engine.checkpoint.write_sealed", impatient)
    code, out, _ = sltrain_train(*tiny, "checkpoint_every=2", f"run_dir={tmp_path}/run")
    assert code == ExitCode.INTERRUPTED and "interrupted (SIGINT); saved at step 2" in out
    assert steps_saved(tmp_path / "run") == ["step_00000002"]


@pytest.mark.parametrize(("every", "words"), [(0, "nothing was saved"), (2, "step 2 is saved")])
def test_twice_between_saves_says_what_is_saved(
    every: int, words: str, tiny: list[str], tmp_path: Path, sltrain_train: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Trainer.log

    def impatient(self: Trainer, *arguments: object) -> None:
        real(self, *arguments)
        if self.step == 3:
            twice_ctrl_c()

    monkeypatch.setattr(Trainer, "log", impatient)
    with pytest.raises(Interrupted, match=words) as ended:
        sltrain_train(*tiny, f"checkpoint_every={every}", f"run_dir={tmp_path}/run")
    assert ended.value.code == (ExitCode.INTERRUPTED if every else ExitCode.NOTHING_SAVED)
    assert steps_saved(tmp_path / "run") == ["step_00000002"] * bool(every)


def test_once_before_the_first_update(
    tiny: list[str], tmp_path: Path, sltrain_train: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = [*tiny, f"run_dir={tmp_path}/run"]
    with monkeypatch.context() as patched:
        patched.setattr("sltrain.building.run.describe", lambda *arguments: signal.raise_signal(signal.SIGINT))
        with pytest.raises(Interrupted, match="nothing was saved") as ended:
            sltrain_train(*run)
    assert ended.value.code == ExitCode.NOTHING_SAVED and not (tmp_path / "run").exists()
    real = Trainer.next_update

    def early(self: Trainer) -> object:
        signal.raise_signal(signal.SIGTERM)
        return real(self)

    monkeypatch.setattr(Trainer, "next_update", early)
    code, out, _ = sltrain_train(*run)
    assert code == ExitCode.NOTHING_SAVED and "nothing was saved, as no update was made yet" in out

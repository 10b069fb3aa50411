"""When actions happen, in which order, and with which random numbers."""

import torch
from torch import nn

from sltrain.engine.actions import Action, Phase, Schedule, at, begun, every, generator_for


def test_every_and_at() -> None:
    assert [step for step in range(1, 10) if every(3)(step)] == [3, 6, 9]
    assert not any(every(0)(step) for step in range(1, 10))
    assert [step for step in range(1, 10) if at(2, 7)(step)] == [2, 7]


def test_a_phase_begins_before_the_actions_of_its_step() -> None:
    log: list[tuple[str, int]] = []
    actions = [Action(name, every(2), lambda moment, name=name: log.append((name, moment.step))) for name in ("b", "a")]
    phase = Phase("late", 4, lambda model: None)
    schedule = Schedule(actions, [phase], enter=lambda phase, generator: log.append((phase.name, phase.after)))
    for step in range(1, 6):
        assert schedule.is_due(step) == (step in (2, 4))
        schedule.run(step)
    assert log == [("b", 2), ("a", 2), ("late", 4), ("b", 4), ("a", 4)]


def test_random_numbers_depend_on_seed_name_and_step_alone() -> None:
    drawn = {
        (seed, name, step): torch.rand(4, generator=generator_for(seed, name, step)).tolist()
        for seed in (0, 1)
        for name in ("merge", "prune")
        for step in (1, 2)
    }
    assert len({tuple(numbers) for numbers in drawn.values()}) == 8
    assert drawn[0, "merge", 2] == torch.rand(4, generator=generator_for(0, "merge", 2)).tolist()


def test_an_action_gets_the_generator_of_its_step() -> None:
    drawn: list[list[float]] = []
    action = Action("merge", at(3), lambda moment: drawn.append(torch.rand(2, generator=moment.generator).tolist()))
    Schedule([action], seed=7).run(3)
    assert drawn == [torch.rand(2, generator=generator_for(7, "merge", 3)).tolist()]


def test_phases_that_have_begun_come_in_their_order() -> None:
    phases = [Phase(str(after), after, lambda model: None) for after in (5, 0, 3)]
    assert [[phase.after for phase in begun(phases, step)] for step in (0, 2, 3, 9)] == [[0], [0], [0, 3], [0, 3, 5]]


def test_only_actions_with_state_are_kept() -> None:
    pool = nn.Linear(2, 2)
    actions = [Action("switch", every(1), lambda moment: None, state=pool), Action("merge", every(1), print)]
    assert Schedule(actions).stateful() == {"action/switch": pool}


def test_every_rank_gets_the_model_of_rank_0_after_what_decomposes() -> None:
    log: list[str] = []
    actions = [Action("qr", at(2), lambda moment: log.append("qr"), decomposes=True), Action("draw", at(2), print)]
    schedule = Schedule(actions, agree=lambda: log.append("agree"))
    for step in (1, 2, 3):
        schedule.run(step)
    assert log == ["qr", "agree"]


def test_an_action_reads_the_micro_batches_of_its_update() -> None:
    read: list[object] = []
    schedule = Schedule([Action("look", at(2), lambda moment: read.append(moment.inputs()))])
    for step in (1, 2):
        schedule.run(step, lambda step=step: [(torch.tensor(step),)])  # type: ignore[misc]
    assert read == [[(torch.tensor(2),)]]

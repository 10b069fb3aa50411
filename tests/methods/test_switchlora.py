"""SwitchLoRA: its updates against a rewrite of the authors' algorithm with their lists of candidates, what an exchange
leaves as it is, who is frozen, how often, and refusals."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from small_run import Adam, SmallRun, batch, leaf, method_of
from torch import Tensor

from sltrain.engine.actions import generator_for
from sltrain.layers.kinds.switchlora import SwitchLoRALinear
from sltrain.optim.named_state import named_state

Train = Callable[..., tuple[int, str, str]]
OFTEN = {"rank": 5, "switch_every": 4, "switch_decay": 1.0, "freeze": 2}


class Published:
    """One layer as the authors hold it: all candidates of a factor in a list, the trained ones by their places in it,
    those that wait by a count, and where the next exchange begins."""

    def __init__(self, layer: SwitchLoRALinear) -> None:
        rank = self.rank = layer.rank
        self.W0, self.scale = layer.W0.detach().clone(), 1.0 / rank
        self.A, self.B = leaf(layer.A), leaf(layer.B)
        count = self.count = layer.candidates
        trained_B = [(i - rank // 2) % rank for i in range(rank)]  # columns by age, the oldest at rank // 2
        order = sorted(range(rank), key=lambda column: trained_B[column])
        self.pool_A = [row.clone() for row in (*layer.spare_A, *layer.A.detach())]
        self.pool_B = [column.clone() for column in (*layer.spare_B, *layer.B.detach().t()[order])]
        self.place_A = list(range(count - rank, count))
        self.place_B = [count - rank + age for age in trained_B]
        self.wait_A, self.wait_B = [0] * rank, [0] * rank
        self.next_A, self.next_B = 0, rank // 2

    @property
    def weight(self) -> Tensor:
        return self.W0 + self.scale * self.B @ self.A

    def switch(self, wanted: int, freeze: int) -> None:
        """One exchange; counterparts of new vectors wait from here on."""
        fixed_A, fixed_B = (sum(wait > 0 for wait in waits) for waits in (self.wait_A, self.wait_B))
        room = min((self.next_A - fixed_A - self.next_B) % self.rank, (self.next_B - fixed_B - self.next_A) % self.rank)
        number = min(wanted, room, self.count - self.rank)
        for factor in "AB":
            place, pool = (self.place_A, self.pool_A) if factor == "A" else (self.place_B, self.pool_B)
            first = self.next_A if factor == "A" else self.next_B
            begin = place[first - 1] + 1
            for i in range(number):
                index, chosen = (first + i) % self.rank, (begin + i) % self.count
                with torch.no_grad():
                    own = self.A[index] if factor == "A" else self.B[:, index]
                    old, new = own.clone(), pool[chosen]
                    other = self.B[:, index] if factor == "A" else self.A[index]
                    change = torch.outer(other, old - new) if factor == "A" else torch.outer(old - new, other)
                    self.W0 += self.scale * change
                    pool[place[index]] = old
                    own.copy_(new)
                place[index] = chosen
                (self.wait_B if factor == "A" else self.wait_A)[index] = freeze
        self.next_A, self.next_B = (self.next_A + number) % self.rank, (self.next_B + number) % self.rank


def rewritten(run: SmallRun, options: dict[str, float]) -> list[list[Tensor]]:
    """The dense W of both layers after each of 20 updates. Only the second moments differ from the authors' algorithm:
    they stay."""
    layers = [Published(layer) for layer in run.model.layers]  # type: ignore[arg-type]
    adam, found = Adam(), []
    for step in range(1, 21):
        x, target = batch(step)
        W1, W2 = (layer.weight for layer in layers)
        (torch.tanh(x @ W1.t()) @ W2.t() - target).square().mean().backward()
        for layer in layers:
            assert layer.A.grad is not None and layer.B.grad is not None
            for i in range(layer.rank):
                layer.A.grad[i] *= layer.wait_A[i] == 0
                layer.B.grad[:, i] *= layer.wait_B[i] == 0
        adam.step({f"{i}{key}": getattr(layer, key) for i, layer in enumerate(layers) for key in "AB"}, 0.01)
        draws = torch.rand(2, generator=generator_for(7, "switch", step)).tolist()
        for number, (layer, draw) in enumerate(zip(layers, draws, strict=True)):
            layer.wait_A, layer.wait_B = ([max(0, w - 1) for w in waits] for waits in (layer.wait_A, layer.wait_B))
            before = [list(layer.wait_A), list(layer.wait_B)]
            rate = 0.3 ** ((step + 1) / (options["switch_decay"] * 20))
            layer.switch(int(layer.rank / (options["switch_every"] / rate) + draw), int(options["freeze"]))
            for key, waits, old in (("A", layer.wait_A, before[0]), ("B", layer.wait_B, before[1])):
                count, m, v = adam.state[f"{number}{key}"]
                for i in range(layer.rank):
                    if waits[i] > old[i]:
                        (m[i] if key == "A" else m[:, i]).zero_()
        found.append([layer.weight.detach() for layer in layers])
    return found


@pytest.mark.parametrize("per_layer", [False, True])
@pytest.mark.parametrize("candidates", [None, 7])
def test_twenty_updates_are_those_of_the_authors(candidates: int | None, per_layer: bool) -> None:
    """In float64, to 1e-9 relative."""
    method = method_of("switchlora", **OFTEN, candidates=candidates)
    run, fresh = (SmallRun(method, max_steps=20, per_layer=per_layer) for _ in range(2))
    for wanted in rewritten(fresh, OFTEN):
        run.update()
        for weight, other in zip(run.weights(), wanted, strict=True):
            torch.testing.assert_close(weight, other, rtol=1e-9, atol=1e-12)
    assert all(int(layer.num_switched) >= 10 for layer in run.model.layers)  # type: ignore[arg-type, call-overload]


def test_an_exchange_changes_vectors_and_not_the_function() -> None:
    torch.manual_seed(0)
    layer = SwitchLoRALinear(70, 50, 8, alpha=1.0, bias=True)
    x, before, A, B, spare = torch.randn(6, 70), layer.dense_weight(), *(
        tensor.detach().clone() for tensor in (layer.A, layer.B, layer.spare_A)
    )  # fmt: skip
    y = layer(x)
    columns, rows = layer.switch(3, freeze=5)
    assert (layer.dense_weight() - before).norm() <= 1e-6 * before.norm()
    torch.testing.assert_close(layer(x), y, rtol=1e-5, atol=1e-5)
    assert columns.tolist() == [0, 1, 2] and rows.tolist() == [4, 5, 6]
    assert torch.equal(layer.A[:3], spare[:3]) and torch.equal(layer.spare_A[:3], A[:3])
    assert torch.equal(layer.A[3:], A[3:]) and torch.equal(layer.spare_B[:3], B.t()[4:7])
    assert layer.rest_B.tolist() == [5, 5, 5, 0, 0, 0, 0, 0] and layer.rest_A.tolist() == [0, 0, 0, 0, 5, 5, 5, 0]
    assert len(layer.switch(3, freeze=5)[0]) == 1  # more would reach vectors that still wait
    assert len(layer.switch(3, freeze=5)[0]) == 0


def test_counterparts_wait_for_as_many_updates_with_no_first_moment() -> None:
    """Counterparts of what is exchanged after update 1 move again in update 4."""
    run = SmallRun(method_of("switchlora", rank=5, switch_every=5, switch_decay=1e6, freeze=2), max_steps=9)
    run.update()
    layer = run.model.layers[0]
    assert isinstance(layer, SwitchLoRALinear) and layer.rest_B.tolist() == [2, 0, 0, 0, 0]
    state = named_state(run.live.optimizer)["state"]["layers.0.B"]
    assert not state["exp_avg"][:, 0].any() and state["exp_avg"][:, 1:].any() and state["exp_avg_sq"][:, 0].any()
    columns = [layer.B.detach().clone()]
    for _ in range(3):
        run.update()
        columns.append(layer.B.detach().clone())
    still = [torch.equal(a[:, 0], b[:, 0]) for a, b in zip(columns, columns[1:], strict=False)]
    assert still == [True, True, False]


def test_a_vector_comes_back_as_it_was_trained() -> None:
    layer = SwitchLoRALinear(12, 10, 4, alpha=1.0)  # 6 spare ones
    first = layer.A[0].detach().clone()
    for _ in range(10):
        layer.pass_update()
        layer.switch(1, freeze=0)
    assert int(layer.num_switched) == 10 and not any(torch.equal(row, first) for row in layer.spare_A)
    assert any(torch.equal(row, first) for row in layer.A)


def test_exchanges_become_rarer_as_the_paper_says() -> None:
    method = method_of("switchlora", rank=128)
    assert method.expected(128, 0, 10_000) == pytest.approx(3.2, rel=0.01)  # type: ignore[attr-defined]
    assert method.expected(128, 999, 10_000) == pytest.approx(0.3 * 128 / 40)  # type: ignore[attr-defined]


def test_the_start_is_dense_and_the_product_has_the_variance_of_linear() -> None:
    torch.manual_seed(0)
    layer = SwitchLoRALinear(400, 200, 64, alpha=1.0, init_std=0.02)
    assert layer.dense_weight().std().item() == pytest.approx(0.02, rel=0.02)
    product = layer.scale * layer.B @ layer.A
    assert product.std().item() == pytest.approx((3 * 400) ** -0.5, rel=0.1)
    gain = 3**-0.25
    assert layer.A.std().item() == pytest.approx((200**0.5 * 64 / 400**1.5) ** 0.25 * gain, rel=0.02)
    assert layer.spare_B.std().item() == pytest.approx((64 / (400 * 200) ** 0.5) ** 0.25 * gain, rel=0.02)


def test_it_starts_from_a_dense_matrix_as_that_matrix() -> None:
    weight = torch.randn(30, 40)
    layer = SwitchLoRALinear.from_dense(weight, torch.Generator().manual_seed(0), rank=4, alpha=1.0, candidates=9)
    torch.testing.assert_close(layer.dense_weight(), weight)
    assert layer.num_trained == 4 * 70 and layer.multiply_adds() == 30 * 40 + 4 * 70
    assert layer.spare_A.shape == (5, 40) and layer.spare_B.shape == (5, 30)


def test_without_exchanges_it_is_lora() -> None:
    """As with nothing to exchange for."""
    never = SmallRun(method_of("switchlora", rank=5, switch_every=0, candidates=5), 10)
    alone = SmallRun(method_of("switchlora", rank=5, candidates=5), 10)
    start = [layer.W0.clone() for layer in never.model.layers]  # type: ignore[union-attr, operator]
    for _ in range(10):
        never.update()
        alone.update()
    assert all(map(torch.equal, never.weights(), alone.weights()))
    assert all(torch.equal(layer.W0, W0) for layer, W0 in zip(never.model.layers, start, strict=True))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("rank=1", "method=switchlora needs rank above 1, and rank is 1"),
        ("rank=40", "rank must be between 0 and 32"),
        ("method.candidates=4", "candidates=4 are fewer than rank=8"),
        ("method.candidates=0", "method.candidates=0: must be at least 1"),
        ("method.switch_every=-1", "method.switch_every=-1.0: must be at least 0"),
        ("method.switch_every=9", "method.switch_every=9 is less than twice method.freeze=5"),
        ("method.switch_decay=0", "method.switch_decay=0.0: must be a number above 0"),
        ("method.alpha=-1", "method.alpha=-1.0: must be a number above 0"),
        ("ema=0.9", "ema=0.9 averages each tensor by itself, and method=switchlora"),
        ("optimizer=adam8bit", "which optimizer=adam8bit holds in another form; set optimizer=adamw"),
        ("optimizer=adafactor", "which optimizer=adafactor holds in another form; set optimizer=adamw"),
        ("optimizer=dct_adamw", "which optimizer=dct_adamw holds in another form; set optimizer=adamw"),
        ("optimizer=apollo", "which optimizer=apollo holds in another form; set optimizer=adamw"),
    ],
)
def test_what_cannot_be_is_one_line(typed: str, said: str, tiny: list[str], sltrain_train: Train) -> None:
    code, _, err = sltrain_train(*tiny, "method=switchlora", *typed.split())
    assert code == 2 and said in err and len(err.splitlines()) == 1, err


@pytest.mark.slow
def test_a_run_is_not_extended_whose_exchanges_would_have_been_others(
    tiny: list[str], sltrain_train: Train, tmp_path: Path
) -> None:
    code, _, err = sltrain_train(*tiny, "method=switchlora", "schedule=constant", f"run_dir={tmp_path}/run")
    assert code == 0, err
    code, _, err = sltrain_train(f"run_dir={tmp_path}/run", "extend=4")
    assert code == 2 and "other phases or actions (method=switchlora)" in err and len(err.splitlines()) == 1

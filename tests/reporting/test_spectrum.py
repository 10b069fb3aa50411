"""Singular values against NumPy's of the dense matrices and against planted ones; figures by what they draw."""

import io
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from sltrain.reporting.spectrum import Energy, Spectrum, product_singular_values, singular_values
from sltrain.reporting.spectrum_figures import (
    LINES,
    MAX_PANELS,
    draw_energy,
    draw_spectra,
    energy_figure,
    spectrum_figure,
)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def with_values(values: list[float], out: int, inner: int) -> Tensor:
    """A matrix (out, inner) with these singular values, the others 0."""
    left, _ = torch.linalg.qr(torch.randn(out, len(values), generator=generator(), dtype=torch.float64))
    right, _ = torch.linalg.qr(torch.randn(inner, len(values), generator=generator(), dtype=torch.float64))
    return left @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ right.t()


@pytest.mark.parametrize("shape", [(7, 7), (5, 12), (12, 5), (1, 6)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_singular_values_are_numpys(shape: tuple[int, int], dtype: torch.dtype) -> None:
    matrix = torch.randn(shape, generator=generator()).to(dtype)
    expected = np.linalg.svd(matrix.double().numpy(), compute_uv=False)
    np.testing.assert_allclose(singular_values(matrix).numpy(), expected, rtol=1e-12)


@pytest.mark.parametrize(("out", "rank", "inner"), [(9, 3, 14), (14, 3, 9), (9, 9, 14), (6, 1, 6), (6, 0, 4)])
def test_a_product_has_the_values_of_the_dense_matrix(out: int, rank: int, inner: int) -> None:
    B, A = torch.randn(out, rank, generator=generator()), torch.randn(rank, inner, generator=generator())
    dense = np.linalg.svd(B.double().numpy() @ A.double().numpy(), compute_uv=False)
    values = product_singular_values(B, A)
    assert len(values) == rank
    np.testing.assert_allclose(values.numpy(), dense[:rank], rtol=1e-11)


def test_noise_of_rounding_is_zero() -> None:
    matrix = with_values([5.0, 2.0, 1e-6], 20, 30)
    assert singular_values(matrix)[:3].tolist() == pytest.approx([5, 2, 1e-6], rel=1e-8)
    assert singular_values(matrix)[3:].tolist() == [0.0] * 17
    B, A = torch.ones(20, 4), torch.ones(4, 30)  # rank 1
    assert product_singular_values(B, A).tolist() == pytest.approx([math.sqrt(20 * 30) * 4, 0, 0, 0])
    assert product_singular_values(B, A)[1:].count_nonzero() == 0
    assert singular_values(torch.zeros(3, 4)).tolist() == [0, 0, 0]


def test_planted_low_rank_and_sparse_parts_are_found_again() -> None:
    """L in the upper left corner and a diagonal S elsewhere do not touch: the values of W are those of both."""
    B, A = torch.zeros(30, 3), torch.zeros(3, 40)
    B[:10] = with_values([9.0, 8.0, 7.0], 10, 3).float()
    A[:, :10] = torch.linalg.qr(torch.randn(10, 3, generator=generator())).Q.t()
    S = torch.zeros(30, 40)
    S[range(10, 30), range(10, 30)] = torch.linspace(0.1, 0.5, 20)
    spectrum = Spectrum(singular_values(B @ A + S), product_singular_values(B, A), singular_values(S))
    assert spectrum.rank == 3
    assert spectrum.low_rank is not None and spectrum.low_rank.tolist() == pytest.approx([9, 8, 7], rel=1e-5)
    tail = sorted(torch.linspace(0.1, 0.5, 20).tolist(), reverse=True)
    assert spectrum.whole[:23].tolist() == pytest.approx([9, 8, 7, *tail], rel=1e-5)
    assert spectrum.cliff == pytest.approx(7 / 0.5, rel=1e-5)
    assert singular_values(S).count_nonzero() == 20


@pytest.mark.parametrize(
    ("values", "rank", "cliff"),
    [
        ([4.0, 2.0, 0.5, 0.25], 2, 4.0),
        ([4.0, 2.0, 0.5, 0.25], 1, 2.0),
        ([4.0, 2.0, 0.0, 0.0], 2, math.inf),
        ([4.0, 0.0, 0.0, 0.0], 2, math.nan),
        ([4.0, 2.0, 0.5, 0.25], 4, math.nan),
        ([4.0, 2.0, 0.5, 0.25], 0, math.nan),
    ],
)
def test_cliff(values: list[float], rank: int, cliff: float) -> None:
    spectrum = Spectrum(torch.tensor(values), torch.ones(rank))
    assert spectrum.cliff == pytest.approx(cliff, nan_ok=True)


def test_a_dense_matrix_has_no_cliff() -> None:
    spectrum = Spectrum(torch.tensor([2.0, 1.0]))
    assert math.isnan(spectrum.cliff) and spectrum.rank is None


@pytest.mark.parametrize(
    ("values", "effective", "numerical"),
    [
        ([3.0, 3.0, 3.0, 0.0, 0.0], 3.0, 3),
        ([2.0, 1.0, 1.0], 2**1.5, 3),  # the entropy of (1/2, 1/4, 1/4) is 1.5 bits
        ([0.0, 0.0], 0.0, 0),
    ],
)
def test_ranks(values: list[float], effective: float, numerical: int) -> None:
    spectrum = Spectrum(torch.tensor(values, dtype=torch.float64))
    assert spectrum.effective_rank == pytest.approx(effective)
    assert spectrum.numerical_rank == numerical


def test_energy_share() -> None:
    assert Energy(3.0, 1.0).sparse_share == 0.25
    assert math.isnan(Energy(0.0, 0.0).sparse_share)


# ---- figures


def spectrum(rank: int = 4, size: int = 12) -> Spectrum:
    tail = torch.linspace(0.5, 0.1, size, dtype=torch.float64)
    head = torch.linspace(9, 5, rank, dtype=torch.float64)
    return Spectrum(torch.cat([head, tail[rank:]]), head, tail)


def png_size(png: bytes) -> tuple[int, int]:
    from PIL import Image

    with Image.open(io.BytesIO(png)) as image:
        image.load()
        return image.size


def test_a_panel_draws_the_three_spectra_and_the_rank() -> None:
    own = spectrum()
    axes = spectrum_figure({("q_proj", 3): own}).axes
    assert [panel.get_title() for panel in axes] == ["q_proj, layer 3"]
    whole, low_rank, sparse, rank = axes[0].get_lines()
    for line, values in ((whole, own.whole), (low_rank, own.low_rank), (sparse, own.sparse)):
        assert values is not None
        assert list(line.get_xdata()) == list(range(1, len(values) + 1))
        assert list(line.get_ydata()) == values.tolist()
    assert list(rank.get_xdata()) == [4, 4]
    assert axes[0].get_yscale() == "log"


def test_lines_differ_in_print_too() -> None:
    for key in ("color", "linestyle"):
        assert len({style[key] for style in LINES.values()}) == len(LINES)


def test_panels_are_rows_of_kinds_and_share_their_axes() -> None:
    places = [(kind, depth) for kind in ("q_proj", "down_proj") for depth in (0, 4, 7)]
    figure = spectrum_figure({place: spectrum() for place in places})
    figure.draw_without_rendering()
    boxes = [panel.get_position() for panel in figure.axes]
    assert len(boxes) == 6
    assert len({round(box.y0, 3) for box in boxes[:3]}) == 1 and boxes[3].y1 < boxes[0].y0
    assert [round(box.x0, 3) for box in boxes[:3]] == [round(box.x0, 3) for box in boxes[3:]]
    assert len({(panel.get_xlim(), panel.get_ylim()) for panel in figure.axes}) == 1


def test_zeros_and_the_steep_end_do_not_stretch_the_axis() -> None:
    values = torch.linspace(2, 1, 200, dtype=torch.float64)
    values[-2:] = torch.tensor([1e-12, 0.0])
    figure = spectrum_figure({("q_proj", 0): Spectrum(values)})
    low, high = figure.axes[0].get_ylim()
    assert 0.5 < low < 1 and 2 < high < 4
    assert math.isnan(figure.axes[0].get_lines()[0].get_ydata()[-1])
    cut, whole = (draw_spectra(1, {("q_proj", 0): Spectrum(v)})[0].caption for v in (values, values[:-2]))
    assert "below" in cut and "below" not in whole


def test_a_matrix_of_zeros_is_drawn() -> None:
    zeros = torch.zeros(4, dtype=torch.float64)
    (picture,) = draw_spectra(0, {("q_proj", 0): Spectrum(zeros, zeros[:2], zeros)})
    assert png_size(picture.png)[0] > 500


def test_text_stays_inside_and_apart() -> None:
    places = [(kind, depth) for kind in ("gate_proj", "down_proj", "up_proj") for depth in (10, 11, 12, 13)]
    figure = spectrum_figure({place: spectrum(1000, 4096) for place in places[:-1]})
    figure.canvas.draw()
    frame = figure.bbox.extents
    texts = [panel.title for panel in figure.axes] + [figure._supxlabel, figure._supylabel]
    for panel in figure.axes:
        low, high = panel.get_xlim()
        texts += [label for label in panel.get_xticklabels() if low <= label.get_position()[0] <= high]
        low, high = panel.get_ylim()
        texts += [label for label in panel.get_yticklabels() if low <= label.get_position()[1] <= high]
    boxes = [text.get_window_extent() for text in texts if text.get_visible() and text.get_text()]
    boxes += [legend.get_window_extent() for legend in figure.legends]
    assert len(boxes) > 20
    for i, box in enumerate(boxes):
        assert box.x0 >= frame[0] and box.y0 >= frame[1] and box.x1 <= frame[2] and box.y1 <= frame[3]
        assert not any(box.overlaps(other) for other in boxes[:i])


def test_many_layers_become_several_figures() -> None:
    few = {("q_proj", depth): spectrum() for depth in range(2)}
    (picture,) = draw_spectra(70, few)
    assert picture.file_name == "spectrum_70.png" and png_size(picture.png)[0] > 500
    assert "70" in picture.title and "q_proj, layer 1" in picture.alt
    many = {("q_proj", depth): spectrum() for depth in range(MAX_PANELS + 1)}
    first, second = draw_spectra(70, many)
    assert (first.file_name, second.file_name) == ("spectrum_70.png", "spectrum_70_2.png")
    assert png_size(first.png)[1] > 2 * png_size(second.png)[1]


def test_captions_say_which_parts_there_are() -> None:
    own = spectrum()
    captions = [
        draw_spectra(1, {("q_proj", 0): one})[0].caption
        for one in (own, Spectrum(own.whole, own.low_rank), Spectrum(own.whole))
    ]
    assert ["cliff" in caption for caption in captions] == [True, False, False]
    assert ["low-rank" in caption for caption in captions] == [True, True, False]


def test_energy_has_a_panel_a_step_and_a_line_a_kind() -> None:
    shares = {step: {"q_proj": [(0, 0.1 * step), (1, 0.2)], "up_proj": [(0, 0.3), (1, math.nan)]} for step in (1, 2, 3)}
    figure = energy_figure(shares)
    assert [panel.get_title() for panel in figure.axes] == ["step 1", "step 2", "step 3"]
    for step, panel in zip(shares, figure.axes, strict=True):
        lines = panel.get_lines()
        assert [line.get_label() for line in lines] == ["q_proj", "up_proj"]
        assert list(lines[0].get_ydata()) == [0.1 * step, 0.2]
        assert lines[0].get_color() != lines[1].get_color() and lines[0].get_marker() != lines[1].get_marker()
    assert 0.3 < figure.axes[0].get_ylim()[1] < 0.4
    picture = draw_energy(shares)
    assert picture.file_name == "energy.png" and png_size(picture.png)[0] > 500 and "1, 2, 3" in picture.alt


def test_the_users_style_is_left_alone() -> None:
    import matplotlib

    with matplotlib.rc_context({"font.size": 3, "axes.facecolor": "red"}):
        styled = draw_spectra(1, {("q_proj", 0): spectrum()})[0].png
        assert matplotlib.rcParams["font.size"] == 3
    assert styled == draw_spectra(1, {("q_proj", 0): spectrum()})[0].png

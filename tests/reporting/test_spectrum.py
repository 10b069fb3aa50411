"""Numbers of spectra by hand, tables as text, figures by what they draw."""

import io
import math

import pytest
import torch

from sltrain.reporting.spectrum import (
    LINES,
    MAX_PANELS,
    Found,
    Spectrum,
    draw_energy,
    draw_spectra,
    energy_csv,
    energy_figure,
    spectrum_csv,
    spectrum_figure,
)


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
    spectrum = Spectrum(values, {"BA": [1.0] * rank}, rank)
    assert spectrum.cliff == pytest.approx(cliff, nan_ok=True)


def test_a_dense_matrix_has_no_cliff() -> None:
    spectrum = Spectrum([2.0, 1.0])
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
    spectrum = Spectrum(values)
    assert spectrum.effective_rank == pytest.approx(effective)
    assert spectrum.numerical_rank == numerical


def test_energy_share() -> None:
    name, other = "model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"
    found = Found(3, {}, {name: {"low_rank": 3.0, "sparse": 1.0}, other: {"low_rank": 0.0, "sparse": 0.0}})
    assert found.share(name) == 0.25 and math.isnan(found.share(other)) and math.isnan(found.share("unknown"))
    assert energy_csv([found]).splitlines()[:2] == [
        "step,layer,projection,depth,low_rank_energy,sparse_energy,sparse_share",
        f"3,{name},up_proj,0,3.0,1.0,0.25",
    ]
    assert energy_csv([Found(3, {}, {})]) == ""


def test_other_parts_have_their_columns_and_rows() -> None:
    name = "model.layers.0.mlp.up_proj"
    spectrum = Spectrum([3.0, 1.0], {"W0": [2.0, 1.0], "BA": [1.5]}, 1)
    found = Found(3, {name: spectrum}, {name: {"low_rank": 2.0, "sparse": 1.0, "dense": 5.0}})
    assert [line.split(",")[2:] for line in spectrum_csv([found]).splitlines()[1:]] == [
        ["W", "1", "3.0"],
        ["W", "2", "1.0"],
        ["W0", "1", "2.0"],
        ["W0", "2", "1.0"],
        ["BA", "1", "1.5"],
    ]
    head, line = energy_csv([found]).splitlines()
    assert head.endswith("low_rank_energy,sparse_energy,dense_energy,sparse_share") and line.endswith(
        "2.0,1.0,5.0,0.125"
    )


# ---- figures


def spectrum(rank: int = 4, size: int = 12) -> Spectrum:
    tail = torch.linspace(0.5, 0.1, size, dtype=torch.float64).tolist()
    head = torch.linspace(9, 5, rank, dtype=torch.float64).tolist()
    return Spectrum([*head, *tail[rank:]], {"BA": head, "S": tail}, rank)


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
    for line, values in ((whole, own.whole), (low_rank, own.parts["BA"]), (sparse, own.parts["S"])):
        assert list(line.get_xdata()) == list(range(1, len(values) + 1))
        assert list(line.get_ydata()) == values
    assert list(rank.get_xdata()) == [4, 4]
    assert axes[0].get_yscale() == "log"


def test_a_part_of_another_name_has_a_line_of_its_own() -> None:
    (axes,) = spectrum_figure({("q_proj", 0): Spectrum([3.0, 2.0], {"W0": [2.5, 2.0], "BA": [1.0]}, 1)}).axes
    labels = [line.get_label() for line in axes.get_lines()]
    assert labels[:3] == ["W", "W0", "(alpha / rank) BA"]
    (legend,) = axes.figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["W", "(alpha / rank) BA", "W0", "rank 1"]


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
    values = [*torch.linspace(2, 1, 198, dtype=torch.float64).tolist(), 1e-12, 0.0]
    figure = spectrum_figure({("q_proj", 0): Spectrum(values)})
    low, high = figure.axes[0].get_ylim()
    assert 0.5 < low < 1 and 2 < high < 4
    assert math.isnan(figure.axes[0].get_lines()[0].get_ydata()[-1])
    cut, whole = (draw_spectra(1, {("q_proj", 0): Spectrum(v)})[0].caption for v in (values, values[:-2]))
    assert "below" in cut and "below" not in whole


def test_a_matrix_of_zeros_is_drawn() -> None:
    zeros = [0.0] * 4
    (picture,) = draw_spectra(0, {("q_proj", 0): Spectrum(zeros, {"BA": zeros[:2], "S": zeros}, 2)})
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
        for one in (
            own,
            Spectrum(own.whole, {"BA": own.parts["BA"]}, own.rank),
            Spectrum(own.whole),
            Spectrum(own.whole, {"W0": own.whole, "BA": own.parts["BA"]}, own.rank),
        )
    ]
    assert ["cliff" in caption for caption in captions] == [True, False, False, False]
    assert ["low-rank" in caption for caption in captions] == [True, True, False, True]
    assert ["all are 0" in caption for caption in captions] == [False, True, False, False]


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

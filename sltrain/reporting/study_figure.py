"""The picture of a study: each candidate's perplexity over the reference's, with its interval and its seeds."""

import math

from sltrain.reporting.drawing import BLUE, GREY, MAX_LABEL, WIDTH, Picture, new_figure, our_style, to_picture
from sltrain.reporting.study import Results
from sltrain.reporting.table import elide

FILE = "study.png"


def draw_ratios(results: Results) -> Picture | None:
    """A row for each candidate with an interval; None if there is none, or the reference is not done."""
    reference = results.protocol.reference
    names = [name for name in results.runs if name != reference] if reference in results.runs else []
    found = {name: results.against(name, reference) for name in names}
    found = {name: own for name, own in found.items() if all(math.isfinite(end) for end in own.interval)}
    if not found:
        return None
    with our_style():
        figure, axes = new_figure(WIDTH, 1.0 + 0.32 * len(found))
        axes.axvline(1, color=GREY, linewidth=1)
        for row, (name, own) in enumerate(found.items()):
            low, high = own.interval
            axes.plot([low, high], [row, row], color=BLUE, linewidth=2, solid_capstyle="butt")
            axes.plot(own.ratio, row, "o", color=BLUE, markersize=6)
            pairs = zip(results.losses(name), results.losses(reference), strict=True)
            axes.plot([math.exp(a - b) for a, b in pairs], [row] * len(results.losses(name)), "|", color=GREY)
        axes.set_yticks(range(len(found)), [elide(name, MAX_LABEL) for name in found])
        axes.set_ylim(len(found) - 0.5, -0.5)
        axes.grid(visible=False, axis="y")
        axes.set_xlabel(f"perplexity over that of {reference}")
        caption = "Ratios of perplexities with their 95 % intervals; strokes are single seeds. Left of 1 is better."
        alt = f"Perplexity of each candidate over that of {reference}, with intervals"
        return to_picture(figure, FILE, f"Over {reference}", caption, alt)

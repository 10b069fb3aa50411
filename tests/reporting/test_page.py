"""The page is whole in itself, valid, and escapes what a folder holds."""

import base64
from html.parser import HTMLParser

from sltrain.reporting.comparison import arrange, comparison
from sltrain.reporting.drawing import Picture
from sltrain.reporting.figures import draw_all
from sltrain.reporting.page import render_page
from sltrain.reporting.rows import Row
from sltrain.reporting.table import shown

VOID = {"meta", "img", "br", "hr", "link", "input"}
EVIL = '"><script>alert(1)</script><b>&amp;'


class Page(HTMLParser):
    """Elements and text of a page; wrong nesting is an error."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[tuple[str, str]] = []
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.text.append((self.open[-1], " ".join(data.split())))

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def make_page(rows: list[Row]) -> Page:
    pictures = draw_all(rows, {})
    html = render_page(rows, [f"note {EVIL}"], pictures, "2026-01-31 12:00 UTC", f"sltrain-report '{EVIL}'")
    assert html.startswith("<!DOCTYPE html>")
    return Page(html)


def make_rows() -> list[Row]:
    rows = [
        Row(
            f"{EVIL}{i}",
            status,
            method=EVIL,
            perplexity=10.0 + i,
            loss=2.0,
            bits_per_byte=1.0 + i,
            peak_memory_bytes=10**9,
            tokenizer_hash=str(i % 2),
        )
        for i, status in enumerate(["finished", "running", "diverged"])
    ]
    return arrange(rows)


def test_nothing_comes_from_elsewhere() -> None:
    page = make_page(make_rows())
    for tag, attributes in page.elements:
        assert tag not in {"script", "link", "iframe", "object", "base"}
        assert not any(name.startswith("on") for name in attributes)
        for name in ("src", "href", "srcset", "action"):
            assert (attributes.get(name) or "data:image/png;base64,").startswith("data:image/png;base64,")
    styles = "".join(text for tag, text in page.text if tag == "style")
    assert styles and "url(" not in styles and "@import" not in styles


def test_figures_are_in_the_page_byte_for_byte_with_alt_text() -> None:
    rows = make_rows()
    images = make_page(rows).all("img")
    pictures: list[Picture] = draw_all(rows, {})
    assert len(images) == len(pictures) > 0
    for image, picture in zip(images, pictures, strict=True):
        assert base64.b64decode((image["src"] or "").partition(",")[2]) == picture.png
        assert image["alt"] == picture.alt and int(image["width"] or 0) > 300 < 2 * int(image["height"] or 0)


def test_the_page_has_every_cell_note_and_sentence_as_text() -> None:
    rows = make_rows()
    page = make_page(rows)
    texts = [text for _, text in page.text]
    for row in rows:
        for column in shown(rows):
            assert column.cell(row) in texts
    assert f"note {EVIL}" in texts and comparison(rows) in texts and comparison(rows)
    assert any(text.startswith("sltrain-report '") for text in texts)
    assert any("2026-01-31 12:00 UTC" in text for text in texts)
    assert any("n + 1" in text for text in texts)


def test_a_status_is_coloured_and_worded() -> None:
    page = make_page(make_rows())
    classes = [attributes["class"] for attributes in page.all("span")]
    assert classes == ["status good", "status live", "status bad"]
    assert [text for tag, text in page.text if tag == "span"] == ["finished", "running", "diverged"]


def test_the_page_fits_a_phone() -> None:
    (viewport,) = [meta for meta in make_page(make_rows()).all("meta") if meta.get("name") == "viewport"]
    assert "width=device-width" in (viewport["content"] or "")

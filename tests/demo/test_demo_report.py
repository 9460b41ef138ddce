"""The page and the tables show report.json, all of it and nothing else, without outside help."""

from __future__ import annotations

import base64
import copy
import io
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import demo_sample as sample
import pytest
from rich.console import Console

from sparsekit.demo import picture
from sparsekit.demo.report import QUICK_NOTE, html, show, tables

PNG = b"\x89PNG\r\n\x1a\n not really a picture"


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, child in items:
            yield from leaves(child, (*path, key))
    else:
        yield path, value


def figures() -> list[tuple[Any, ...]]:
    """Every leaf that is a figure; `shape` and `sparse` are shown as text and as colour."""
    return [
        path
        for path, value in leaves(sample.report())
        if isinstance(value, int | float) and not isinstance(value, bool)
    ]


class Text(HTMLParser):
    """The visible text of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.parts: list[str] = []
        self._hidden = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._hidden = tag == "style"

    def handle_endtag(self, tag: str) -> None:
        self._hidden = False

    def handle_data(self, data: str) -> None:
        if not self._hidden:
            self.parts.append(data)


@pytest.mark.parametrize("path", figures(), ids=lambda path: ".".join(map(str, path)))
def test_every_figure_of_the_json_is_on_the_page(path: tuple[Any, ...]) -> None:
    report = sample.report()
    parent = report
    for key in path[:-1]:
        parent = parent[key]
    before = Text(html(report, PNG)).parts
    parent[path[-1]] = parent[path[-1]] * 7
    assert Text(html(report, PNG)).parts != before


def test_every_figure_on_the_page_comes_from_the_json() -> None:
    """With all figures of the JSON alike, no other number is left on the page."""
    report = sample.report()
    for path in figures():
        parent = report
        for key in path[:-1]:
            parent = parent[key]
        parent[path[-1]] = 0
    strings = {str(value) for _, value in leaves(report) if isinstance(value, str)}
    # Names, and what is fixed by definition: recall@1, recall@10, float32, SHA-256, 120 characters.
    allowed = set(re.findall(r"\d+", " ".join(strings))) | {"1", "10", "32", "256", "120"}
    for part in Text(html(report, PNG)).parts:
        for number in re.findall(r"\d+", part):
            assert set(number) == {"0"} or number in allowed, part


def test_the_page_refers_to_nothing_outside() -> None:
    page = html(sample.report(), PNG)
    assert not re.search(r"https?://|//[a-z]|<link|<script|@import|url\(", page)
    sources = re.findall(r'\b(?:src|href)="([^"]*)"', page)
    assert sources == ["data:image/png;base64," + base64.b64encode(PNG).decode()]


def test_text_is_escaped() -> None:
    report = sample.report()
    report["layers"][0]["reason"] = "<b>1 < 2</b> & [bold]x[/bold]"
    assert "&lt;b&gt;1 &lt; 2&lt;/b&gt; &amp; [bold]x[/bold]" in html(report, PNG)
    buffer = io.StringIO()
    show(report, Console(file=buffer, width=300))
    assert "<b>1 < 2</b> & [bold]x[/bold]" in buffer.getvalue()


def test_a_quick_run_says_so() -> None:
    report = sample.report()
    assert QUICK_NOTE not in html(report, PNG)
    report["quick"] = True
    assert QUICK_NOTE in html(report, PNG)
    buffer = io.StringIO()
    show(report, Console(file=buffer, width=300))
    assert QUICK_NOTE in buffer.getvalue()


def test_a_skipped_engine_keeps_its_row_and_reason() -> None:
    page = html(sample.report(), PNG)
    assert "skipped: not installed" in page


def test_the_screen_shows_the_same_cells_as_the_page() -> None:
    report = sample.report()
    buffer = io.StringIO()
    show(report, Console(file=buffer, width=300))
    screen, page = buffer.getvalue(), "\n".join(Text(html(report, PNG)).parts)
    for table in tables(report):
        for row in table.rows:
            for cell in row:
                assert cell in screen
                assert cell in page


def test_losses_are_marked_as_such() -> None:
    latency = tables(sample.report())[1:3]
    assert latency[0].marks == ["", "", "", "win", "win"]
    assert latency[1].marks == ["", "", "loss"]
    (layers,) = (table for table in tables(sample.report()) if table.title == "Layers")
    assert layers.marks == ["win", "win", "win", "loss", ""]


def test_an_unequal_reload_is_not_hidden() -> None:
    report = sample.report()
    assert "NOT equal" in html(report, PNG)
    report["fresh_process"]["equal"] = True
    assert "NOT equal" not in html(report, PNG)


@pytest.mark.parametrize("quick", [False, True])
def test_the_picture_renders(tmp_path: Path, quick: bool) -> None:
    report = sample.report() | {"quick": quick}
    before = copy.deepcopy(report)
    picture.draw(report, tmp_path / "picture.png")
    data = (tmp_path / "picture.png").read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = (int.from_bytes(data[i : i + 4], "big") for i in (16, 20))
    assert width >= 1200
    assert height >= 800
    assert report == before


def test_the_picture_is_made_where_no_layer_was_timed(tmp_path: Path) -> None:
    report = sample.report()
    report["layers"] = report["layers"][-1:]
    picture.draw(report, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000

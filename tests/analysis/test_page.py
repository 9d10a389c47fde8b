"""The report as a reader's browser shows it: nothing is fetched, everything is drawn, the keyboard suffices."""

from __future__ import annotations

import csv
import html
import json
import math
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from analysis.report import write_report
from tests.analysis.contrast import contrast, luminance
from tests.analysis.synthetic_run import Plan, write_run

READY = "html[data-plots=drawn][data-table=ready]"
ARMS = {
    "adamw": (0.03, 0.031, 0.032, 0.033, 0.034),
    "soap": (0.02, 0.021, math.inf, 0.023, 0.024),
    "muon": (0.024, 0.0245, 0.026, 0.025, 0.0233),
}
TRIALS = 2 * 3 * (12 + 5)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    plan = Plan(
        arms=ARMS,
        workloads=("ethanol-nequip", "ethanol-allegro"),
        trials_per_arm=12,
        sentinels=8,
        force_fractions={"ethanol-allegro": 0.3},
    )
    run = write_run(tmp_path_factory.mktemp("page") / "my run", plan)
    write_report(run)
    return run / "report"


def test_commands_of_the_page_can_be_copied_into_a_shell(report: Path) -> None:
    text = html.unescape((report / "index.html").read_text(encoding="utf-8"))
    assert f"tunebench export {shlex.quote(str(report.parent))} --workload ethanol-nequip -o config.yaml" in text
    assert "'" in shlex.quote(str(report.parent))


class Opened:
    """A page and everything that it complained of or asked for."""

    def __init__(self, browser: Any, file: Path, **context: Any) -> None:
        self.heard: list[str] = []
        self.context = browser.new_context(**context)
        self.page = self.context.new_page()
        self.page.on("console", lambda message: self.heard.append(f"{message.type}: {message.text}"))
        self.page.on("pageerror", lambda error: self.heard.append(f"error: {error}"))
        self.page.on("request", lambda request: self.heard.append(f"request: {request.url}"))
        self.page.goto(file.as_uri())
        self.page.wait_for_selector(READY, timeout=60_000)

    @property
    def own_request(self) -> str:
        return f"request: {self.page.url}"


@pytest.fixture(scope="module")
def opened(chromium: Any, report: Path) -> Iterator[Opened]:
    """The light page on a desktop."""
    found = Opened(chromium, report / "index.html", viewport={"width": 1280, "height": 900}, color_scheme="light")
    yield found
    found.context.close()


def rows(page: Any) -> list[list[str]]:
    script = "rows => rows.map(row => [...row.cells].map(cell => cell.textContent))"
    found: list[list[str]] = page.eval_on_selector_all("#trials-table tbody tr", script)
    return found


def told(page: Any) -> str:
    return str(page.text_content("#trials-told"))


def test_it_opens_without_an_error_and_asks_for_nothing_but_itself(opened: Opened) -> None:
    assert opened.heard == [opened.own_request]


def test_every_plot_is_drawn_with_marks_and_axes(opened: Opened, report: Path) -> None:
    drawn = opened.page.eval_on_selector_all(
        ".plot", "plots => plots.map(plot => [plot.dataset.chart, plot.querySelectorAll('.trace').length])"
    )
    names = {file.stem for file in (report / "figures").glob("*.svg")}
    assert {name for name, _ in drawn} == names
    assert {"profiles", "labels-ethanol-nequip", "ethanol-nequip-best-of-n"} <= names
    assert all(traces > 0 for _, traces in drawn), drawn


def test_plots_hold_the_numbers_of_their_csv_files(opened: Opened, report: Path) -> None:
    """Every finite point of the table is a point of the page's plot, and the other way round."""
    for file in (report / "tables" / "figures").glob("*.csv"):
        with file.open(encoding="utf-8") as stream:
            table = [row for row in csv.DictReader(stream) if row["kind"] != "bars"]
        places = [(float(row["x"]), float(row["y"])) for row in table]
        wanted = {(f"{x:.6g}", f"{y:.6g}") for x, y in places if math.isfinite(x) and math.isfinite(y)}
        plotted = opened.page.evaluate(
            """name => document.querySelector(`[data-chart="${name}"]`).data
              .filter(trace => trace.type === 'scatter' && trace.hoverinfo !== 'skip')
              .flatMap(trace => [...trace.x].map((x, place) => [x, trace.y[place]]))
              .filter(([x, y]) => x !== null && y !== null)""",
            file.stem,
        )
        assert {(f"{x:.6g}", f"{y:.6g}") for x, y in plotted} == wanted, file.stem


def test_the_table_searches_filters_and_sorts(opened: Opened) -> None:
    page = opened.page
    assert told(page) == f"1 to 25 of {TRIALS} trials"
    page.fill("#trials-search", "diverged finite")
    page.locator("#trials-told", has_text="in all").wait_for()
    assert all("loss is not finite" in row[5] for row in rows(page))
    page.click("#trials-clear")
    page.select_option("#trials-optimizer", label="soap")
    page.select_option("#trials-stage", label="confirm")
    assert told(page) == f"1 to 10 of 10 trials ({TRIALS} in all)"
    page.click("#trials-table th button >> text=objective")
    assert page.get_attribute("#trials-table th:nth-child(4)", "aria-sort") == "ascending"
    shown = [row[3] for row in rows(page)]
    assert shown[:8] == sorted(shown[:8], key=float)
    assert shown[8:] == ["–", "–"]  # noqa: RUF001
    page.click("#trials-table th button >> text=objective")
    assert [row[3] for row in rows(page)][:8] == shown[:8][::-1]
    page.click("#trials-clear")
    page.click("#trials-last")
    assert told(page) == f"{TRIALS - TRIALS % 25 + 1} to {TRIALS} of {TRIALS} trials"
    assert page.is_disabled("#trials-next")
    page.click("#trials-first")


def test_the_keyboard_reaches_and_does_everything(chromium: Any, report: Path) -> None:
    found = Opened(chromium, report / "index.html", viewport={"width": 1280, "height": 900})
    page = found.page
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the answer"
    page.keyboard.press("Enter")
    page.focus("#trials-table th:nth-child(3) button")
    page.keyboard.press("Enter")
    page.keyboard.press("Space")
    assert page.get_attribute("#trials-table th:nth-child(3)", "aria-sort") == "descending"
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"
    unnamed = page.eval_on_selector_all(
        "button, input, select, [role=img], [role=region]",
        """parts => parts.filter(part => !part.closest('.modebar') && !(part.textContent.trim()
          || part.getAttribute('aria-label') || part.labels?.length)).map(part => part.outerHTML)""",
    )
    assert unnamed == []
    found.context.close()


def test_copy_takes_the_whole_config(chromium: Any, report: Path) -> None:
    found = Opened(chromium, report / "index.html", permissions=["clipboard-read", "clipboard-write"])
    found.page.click("summary >> nth=0")
    found.page.click("button[data-copies] >> nth=0")
    found.page.wait_for_selector("text=Copied.")
    copied = found.page.evaluate("navigator.clipboard.readText()")
    assert copied.startswith("trainer:\n  max_steps: 240")
    assert "_target_: tunebench.optim." in copied
    found.context.close()


def colours(page: Any) -> dict[str, str]:
    found: dict[str, str] = page.evaluate(
        """() => { const of = (part, name) => getComputedStyle(part)[name];
          const plot = document.querySelector('[data-chart$="-learning"]');
          return { page: of(document.body, 'backgroundColor'), ink: of(document.body, 'color'),
            soft: of(document.querySelector('.status'), 'color'), link: of(document.querySelector('main a'), 'color'),
            axis: of(plot.querySelector('.xtick text'), 'fill'),
            line: of(plot.querySelector('.js-line'), 'stroke') }; }"""
    )
    return found


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_both_themes_can_be_read(chromium: Any, report: Path, scheme: str) -> None:
    found = Opened(chromium, report / "index.html", color_scheme=scheme)
    seen = colours(found.page)
    assert (luminance(seen["page"]) < 0.1) == (scheme == "dark")
    for name in ("ink", "soft", "link", "axis"):
        assert contrast(seen[name], seen["page"]) >= 4.5, (name, seen)
    assert contrast(seen["line"], seen["page"]) >= 3.0
    found.context.close()


def test_the_button_changes_the_theme_of_page_and_plots(chromium: Any, report: Path) -> None:
    found = Opened(chromium, report / "index.html", color_scheme="light")
    before = colours(found.page)
    for _ in range(2):  # auto, light, dark
        found.page.click("#theme")
    after = colours(found.page)
    assert found.page.text_content("#theme") == "Theme: dark"
    assert all(before[name] != after[name] for name in ("page", "ink", "axis", "line"))
    assert found.heard == [found.own_request]
    found.context.close()


def test_a_narrow_page_does_not_scroll_sideways(chromium: Any, report: Path) -> None:
    found = Opened(chromium, report / "index.html", viewport={"width": 390, "height": 800})
    assert found.page.evaluate("document.documentElement.scrollWidth") <= 390
    found.context.close()


def test_print_opens_what_is_folded_and_fits_the_paper(chromium: Any, report: Path) -> None:
    found = Opened(chromium, report / "index.html", color_scheme="dark")
    found.page.evaluate("dispatchEvent(new Event('beforeprint'))")
    found.page.emulate_media(media="print")
    assert found.page.eval_on_selector_all("details", "parts => parts.every(part => part.open)")
    assert luminance(colours(found.page)["page"]) > 0.9
    widths = found.page.eval_on_selector_all(".plot .main-svg", "plots => plots.map(plot => plot.clientWidth)")
    assert max(widths) <= 680
    grid = found.page.evaluate("getComputedStyle(document.querySelector('.plot .ygrid, .plot .xgrid')).stroke")
    assert luminance(grid) > 0.5
    assert found.page.is_hidden("nav")
    assert found.page.pdf().startswith(b"%PDF")
    found.context.close()


def test_a_hundred_thousand_trials_open(chromium: Any, report: Path, tmp_path: Path) -> None:
    """The same page with its trials repeated: only a page of rows is ever in the document."""
    from analysis.page import pack
    from tests.analysis.test_command import packed

    text = (report / "index.html").read_text(encoding="utf-8")
    trials = packed(text, "trials")
    times = 100_000 // TRIALS + 1
    many = {name: part * times if isinstance(part, list) else part for name, part in trials.items()}
    file = tmp_path / "many.html"
    before = re.search(r'id="packed-trials">([^<]*)<', text)
    assert before is not None
    file.write_text(text.replace(before.group(1), pack(json.dumps(many))), encoding="utf-8")
    found = Opened(chromium, file)
    assert told(found.page) == f"1 to 25 of {TRIALS * times} trials"
    found.page.click("#trials-table th button >> text=objective")
    found.page.fill("#trials-search", "soap confirm")
    found.page.locator("#trials-told", has_text="in all").wait_for()
    assert len(rows(found.page)) == 25
    found.context.close()

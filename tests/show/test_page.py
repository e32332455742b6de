"""Guarantee: the page of a run is one file that needs nothing beside it, says what it shows in words too, and is the
same for the same run; nothing in it depends on where the run's folders lie.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from minipuzzle.architecture.quantities import format_gib
from minipuzzle.show.page.charts import frontier_chart, race_chart
from minipuzzle.show.page.facts import read_run
from minipuzzle.show.page.page import render_page
from tests.support.cli import run_cli
from tests.support.tiny_models import write_tiny_checkpoint

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
TEXT = "What is measured can be mended, and what is cut can be measured. " * 60


class Elements(HTMLParser):
    """Every element with its attributes, every text with what it stands in, and what is opened and never closed."""

    EMPTY = frozenset({"meta", "link", "br", "img", "hr", "input"})

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.open: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: Sequence[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Sequence[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data: str) -> None:
        if self.open and data.strip():
            self.texts.append((self.open[-1], data.strip()))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model cut, exported and evaluated, whose folders have names that HTML would take for tags."""
    root = tmp_path_factory.mktemp("run")
    model = write_tiny_checkpoint(root / "model", pattern="M-M*-M*-", intermediate_size=512)
    (root / "text.txt").write_text(TEXT, encoding="utf-8")
    data = ["--data", root / "text.txt"]
    sizes = ["--samples", 4, "--sequence-length", 32]
    for arguments in (
        ["prune", model, "--memory", "90%", *data, *sizes, "-o", root / "cut <b>"],
        ["export", root / "cut <b>", "--fp8", *data, *sizes, "-o", root / "deploy"],
        ["evaluate", root / "deploy", "--against", model, *data, "--sequence-length", 32, "-o", root / "measured"],
    ):
        result = run_cli(*arguments)
        assert result.exit_code == 0, result.output
    return root


@pytest.fixture(scope="module")
def page(run: Path) -> str:
    return render_page(read_run([run / "cut <b>", run / "deploy", run / "measured"]))


def test_the_page_needs_nothing_beside_it_and_is_small(page: str) -> None:
    elements = Elements(page)
    assert elements.open == []
    sources = [
        of[name] for _, of in elements.found for name in ("src", "href", "xlink:href", "data", "action") if name in of
    ]
    assert sources
    assert all(source is not None and source.startswith(("#", "data:")) for source in sources)
    assert "http://" not in page and "https://" not in page and "url(http" not in page and "@import" not in page
    assert len(page.encode()) < 1_000_000


def test_every_picture_is_described_and_every_name_is_given_once(page: str) -> None:
    elements = Elements(page)
    pictures = [of for tag, of in elements.found if tag == "svg"]
    titles = dict.fromkeys(text for tag, text in elements.texts if tag == "title")
    assert len(pictures) > 6
    assert all(of["role"] == "img" and of["viewbox"] for of in pictures)
    assert len(titles) == len(pictures) + 1  # the page's own
    assert all(
        of["aria-label"] for tag, of in elements.found if str(of.get("class")).split()[0] == "cell" and "role" in of
    )
    names = [str(of["id"]) for _, of in elements.found if "id" in of]
    assert sorted(set(names)) == sorted(names)
    pointed_at = {name for _, of in elements.found for name in str(of.get("aria-labelledby") or "").split()}
    pointed_at |= set(re.findall(r"url\(#([^)]+)\)", page))
    assert pointed_at <= set(names)


def test_sections_say_what_the_steps_found(run: Path, page: str) -> None:
    elements = Elements(page)
    headings = [text for tag, text in elements.texts if tag == "h2"]
    expected = [
        "Architecture",
        "Memory",
        "Scores",
        "Candidates",
        "Compensation",
        "Quality",
        "Verified",
        "How it was made",
    ]
    assert headings == expected
    words = "\n".join(text for _, text in elements.texts)
    record = json.loads((run / "cut <b>" / "minipuzzle.json").read_text())
    for model in (record["results"]["source"], record["results"]["model"]):
        assert format_gib(model["memory_bytes"]) in words
    dropped = set(range(8)) - set(record["results"]["kept_layers"])
    gone = [of for _, of in elements.found if of.get("class") == "cell gone"]
    assert len(gone) == len(dropped)
    measured = json.loads((run / "measured" / "quality.json").read_text())["text"]
    assert f"{measured['kl']:.4g} ± {1.96 * measured['kl_error']:.2g}" in words
    assert "cut <b>: " in words  # a name, not a tag
    assert "minipuzzle prune model --memory 90% --data text.txt" in words


def test_the_same_run_gives_the_same_bytes_wherever_it_lies(run: Path, page: str, tmp_path: Path) -> None:
    copy = shutil.copytree(run, tmp_path / "elsewhere")
    folders = [copy / name for name in ("cut <b>", "deploy", "measured")]
    assert render_page(read_run(folders)) == page
    assert str(run) not in page
    assert str(run.parent) not in page


def test_each_output_has_a_page_that_knows_the_steps_before_it(run: Path) -> None:
    for name, verbs in (("cut <b>", "prune"), ("deploy", "prune, export"), ("measured", "prune, export")):
        text = (run / name / "report.html").read_text(encoding="utf-8")
        assert f"made by {verbs}." in text, name


def test_a_page_replaces_only_a_page(run: Path, tmp_path: Path) -> None:
    target = tmp_path / "page.html"
    target.write_text("mine")
    assert run_cli("report", run / "deploy", "-o", target, "--overwrite").exit_code == 1
    assert target.read_text() == "mine"
    target.unlink()
    for extra in ([], ["--overwrite"]):
        result = run_cli("report", run / "deploy", "-o", target, *extra, "--json")
        assert json.loads(result.stdout)["num_bytes"] == target.stat().st_size
    assert run_cli("report", tmp_path).exit_code == 1  # neither a record nor a model


def test_a_model_of_others_has_a_page_too(run: Path) -> None:
    text = render_page(read_run([run / "model"]))
    assert [t for tag, t in Elements(text).texts if tag == "h2"] == ["Architecture", "Memory"]


def test_races_and_frontiers_are_drawn_with_their_figures() -> None:
    finalists = [
        {"before": {"kl": 0.5}, "rounds": [{"tokens": 1000, "kl": 0.25}], "is_winner": False},
        {"before": {"kl": 0.75}, "rounds": [{"tokens": 1000, "kl": 0.125}], "is_winner": True},
    ]
    assert "2: 0.7500 to 0.1250" in race_chart(finalists).alt
    assert "finalist 2 (winner)" in race_chart(finalists).svg
    points: list[dict[str, float | None]] = [
        {"budget_bytes": 2**30, "memory_bytes": None, "quality": None},
        {"budget_bytes": 2**31, "memory_bytes": 2**31, "quality": 0.5},
    ]
    assert frontier_chart(points).alt == "2 budgets, 1 of which something fits. 2 GiB: 0.5"


PROBE = """<script>
var seen = { errors: window.problems, pictures: [], wide: document.documentElement.scrollWidth - innerWidth };
document.querySelectorAll("svg").forEach(function (each) {
  var box = each.getBoundingClientRect(); seen.pictures.push([box.width, box.height]);
});
var first = document.querySelector(".cell"); first.focus();
first.dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowRight", bubbles: true }));
seen.tip = getComputedStyle(document.activeElement, "::after").content;
seen.paper = getComputedStyle(document.body).backgroundColor;
document.body.textContent = "SEEN" + JSON.stringify(seen) + "NEES";
</script></body>"""
LISTEN = '<head><script>window.problems = []; addEventListener("error", e => problems.push(e.message));</script>'


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here (apt install chromium)")
def test_a_browser_draws_every_picture_without_an_error(page: str, tmp_path: Path) -> None:
    """On a phone and on a desk, by day and by night."""
    watched = page.replace("<head>", LISTEN, 1).replace("</body>", PROBE)
    (tmp_path / "page.html").write_text(watched, encoding="utf-8")
    papers = set()
    for width, scheme in ((500, 0), (1200, 1)):  # 0: dark
        seen = seen_by_browser(tmp_path / "page.html", tmp_path / f"profile{width}", width, scheme)
        assert seen["errors"] == []
        assert all(min(size) > 40 for size in seen["pictures"])
        assert seen["wide"] <= 0, "the page scrolls sideways"
        assert seen["tip"].startswith('"layer 1')
        papers.add(seen["paper"])
    assert len(papers) == 2


def seen_by_browser(path: Path, profile: Path, width: int, scheme: int) -> dict[str, Any]:
    """What the script at the end of a page saw."""
    command = [str(CHROMIUM), "--headless=new", "--no-sandbox", "--disable-gpu", f"--window-size={width},900"]
    command += [f"--user-data-dir={profile}", f"--blink-settings=preferredColorScheme={scheme}", "--dump-dom"]
    done = subprocess.run([*command, path.as_uri()], capture_output=True, text=True, timeout=120, check=True)
    found: dict[str, Any] = json.loads(
        done.stdout.split("SEEN")[-1].split("NEES")[0].replace("&gt;", ">").replace("&lt;", "<")
    )
    return found

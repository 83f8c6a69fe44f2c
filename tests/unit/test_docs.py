"""The documents as a site: its navigation, its pages' shape, and that what they show is what is."""

from __future__ import annotations

import importlib.util
import re
import sys
import warnings
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest
import yaml

import relinear

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))


class Loader(yaml.SafeLoader):
    """mkdocs.yml names Python functions by tags; they are left out here."""


Loader.add_multi_constructor("tag:yaml.org,2002:python/", lambda loader, suffix, node: None)
CONFIG = yaml.load((ROOT / "mkdocs.yml").read_text(), Loader=Loader)


def tool(name: str) -> Any:
    """A script of docs/tools as a module."""
    spec = importlib.util.spec_from_file_location(name, DOCS / "tools" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def navigation(entry: Any) -> list[str]:
    """The pages below an entry of the navigation, in order."""
    if isinstance(entry, str):
        return [entry]
    return [page for part in (entry.values() if isinstance(entry, dict) else entry) for page in navigation(part)]


def text_of(page: str) -> str:
    """A page without its blocks of code."""
    return re.sub(r"```.*?```", "", (DOCS / page).read_text(encoding="utf-8"), flags=re.DOTALL)


def test_every_page_is_in_the_navigation_once():
    assert sorted(navigation(CONFIG["nav"])) == PAGES, "mkdocs.yml: nav lists every page, by hand"


def test_sections_stand_in_their_order():
    sections = [next(iter(entry)) for entry in CONFIG["nav"]]
    assert sections == ["Home", "Tutorials", "How-to", "Reference", "Explanation", "Results", "Decisions"]
    for entry in CONFIG["nav"][1:]:
        ((section, pages),) = entry.items()
        assert {page.split("/")[0] for page in navigation(pages)} == {section.lower()}


def test_no_page_is_an_orphan():
    """On GitHub there is no navigation: a reader who starts at index.md can reach every page by links."""
    seen, waiting = set(), ["index.md"]
    while waiting:
        page = waiting.pop()
        if page in seen or not page.endswith(".md"):
            continue
        seen.add(page)
        for target in re.findall(r"\]\((?!https?:|#)([^)#\s]+)", text_of(page)):
            path = (DOCS / page).parent.joinpath(target).resolve()
            if path.is_relative_to(DOCS):
                waiting.append(path.relative_to(DOCS).as_posix())
    assert sorted(set(PAGES) - seen) == [], "link them from docs/index.md"


@pytest.mark.parametrize("page", PAGES)
def test_lists_are_lists_on_the_site_too(page):
    """GitHub forgives a list right after a line of text, and items indented by two; the site's Markdown does not."""
    previous, wrong = "", []
    for line in text_of(page).splitlines():
        if (
            re.match(r"([-*]|\d+\.) ", line)
            and previous.strip()
            and not re.match(r"\s*([-*]|\d+\.) |\s|#|<!--", previous)
        ):
            wrong.append(line)
        if re.match(r" {1,3}([-*]|\d+\.) ", line) and not re.match(r" {1,3}\S", previous):
            wrong.append(line)
        previous = line
    assert wrong == []


def test_the_site_fetches_nothing():
    assert CONFIG["theme"]["font"] is False
    assert "repo_url" not in CONFIG, "the theme would ask api.github.com for stars"
    assert not [page for page in PAGES if "```mermaid" in (DOCS / page).read_text()], "mermaid comes from a CDN"


def test_warnings_stop_the_build():
    makefile = (ROOT / "Makefile").read_text()
    assert "mkdocs build --strict" in makefile and "--quiet $(ARGS)" not in makefile, (
        "--quiet hides what --strict counts"
    )
    assert "part docs make docs" in (ROOT / ".ci" / "run").read_text()
    assert {"anchors", "not_found"} <= {key for key, value in CONFIG["validation"]["links"].items() if value == "warn"}


def test_every_public_name_has_its_place():
    page = (DOCS / "reference" / "python.md").read_text()
    described = set(re.findall(r"^::: relinear\.(\S+)", page, re.MULTILINE))
    for name in set(relinear.__all__) - {"__version__"}:
        module, attribute = relinear._PUBLIC[name]
        assert f"{module}.{attribute}" in described, name


@pytest.mark.parametrize("page", ["one-gpu.md", "eight-gpus.md", "several-nodes.md"])
def test_tutorials_show_what_their_commands_print(page):
    written = (DOCS / "tutorials" / page).read_text(encoding="utf-8")
    assert tool("tutorials").filled(page) == written, "fill them in anew: python docs/tools/tutorials.py"


def texts(path: Path) -> list[str]:
    """All text of an SVG, in order."""
    return [text.strip() for text in ElementTree.parse(path).getroot().itertext() if text.strip()]


def test_figures_are_drawn_from_today_s_numbers(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # matplotlib and a machine without its fonts
        drawn = tool("figures").main(tmp_path)
    committed = DOCS / "explanation" / "figures"
    assert sorted(path.name for path in drawn) == sorted(path.name for path in committed.iterdir())
    for path in drawn:
        assert texts(path) == texts(committed / path.name), "draw them anew: python docs/tools/figures.py"


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path, monkeypatch):
    pytest.importorskip("mkdocs", reason="needs the [docs] extra")
    import subprocess

    monkeypatch.setenv("NO_MKDOCS_2_WARNING", "1")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    foreign = re.compile(r'<(?:script|link|img|iframe)[^>]+(?:src|href)="(?:https?:)?//')
    built = list((tmp_path / "site").rglob("*.html"))
    assert len(built) >= len(PAGES)
    assert [path.name for path in built if foreign.search(path.read_text(encoding="utf-8"))] == []
    assert 'id="relinear.recipes.runner.convert"' in (tmp_path / "site/reference/python.html").read_text()

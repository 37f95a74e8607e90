"""What the pages show is what the project has."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import portico

from .conftest import ROOT, SNIPPETS

DOCS = ROOT / "docs"
PAGES = sorted(path for path in DOCS.rglob("*.md") if "_build" not in path.parts)
PROSE = [*PAGES, *sorted(ROOT.glob("*.md"))]


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def blocks(path: Path, language: str) -> Iterator[str]:
    """The fenced blocks of a language in a page."""
    pattern = rf"^```{language}\n(.*?)^```$"
    for match in re.finditer(pattern, path.read_text(), re.MULTILINE | re.DOTALL):
        yield match[1]


def test_every_snippet_is_shown_on_a_page() -> None:
    """A file that no page includes is one that nobody reads."""
    text = "".join(path.read_text() for path in PAGES)
    included = set(re.findall(r"snippets/(\S+)", text))
    files = {str(path.relative_to(SNIPPETS)) for path in SNIPPETS.rglob("*.*")}
    assert {name for name in files if "__pycache__" not in name} == included


@pytest.mark.parametrize("page", PROSE, ids=name_of)
def test_code_on_a_page_is_a_file_that_tests_run(page: Path) -> None:
    files = {path.read_text() for path in SNIPPETS.glob("*.py")}
    assert [block for block in blocks(page, "python") if block not in files] == []


def test_every_public_name_has_an_entry_in_the_reference() -> None:
    text = "".join(path.read_text() for path in (DOCS / "reference").glob("*.md"))
    pattern = r"^\.\. auto(?:class|exception|function|data|module):: (?:portico\.)?(\w+)$"
    entries = set(re.findall(pattern, text, re.MULTILINE))
    assert set(portico.__all__) - entries == set()


@pytest.mark.parametrize("page", PROSE, ids=name_of)
def test_every_make_target_that_a_page_names_exists(page: Path) -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    named = re.findall(r"(?:`|^\$ )make ([a-z-]+)", page.read_text(), re.MULTILINE)
    assert [target for target in named if target not in targets] == []

"""The finished pages: complete, offline, and readable by everyone."""

import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import nbformat
import pytest

from tests.conftest import ROOT

pytestmark = pytest.mark.slow
CHAPTERS = sorted(path.stem for path in (ROOT / "notebooks").glob("[0-9][0-9]_*.py"))
LOADED = {  # tags that make a browser fetch something, and the attribute that says what
    "script": ("src",), "img": ("src", "srcset"), "iframe": ("src",), "source": ("src", "srcset"),
    "video": ("src",), "audio": ("src",), "embed": ("src",), "object": ("data",),
}  # fmt: skip
FETCHING_RELATIONS = {
    "stylesheet",
    "preload",
    "preconnect",
    "icon",
    "modulepreload",
    "dns-prefetch",
}


class Page(HTMLParser):
    """The tags of a page, in order."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.text = path.read_text(encoding="utf-8")
        self.feed(self.text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, {key: value or "" for key, value in attrs}))

    def loads(self) -> list[str]:
        found = [a.get(key, "") for tag, a in self.tags for key in LOADED.get(tag, ())]
        found += [
            a.get("href", "")
            for tag, a in self.tags
            if tag == "link" and set(a.get("rel", "").split()) & FETCHING_RELATIONS
        ]
        return [address for address in found if address]


@pytest.fixture(scope="module")
def book(smoke_run) -> Path:
    return smoke_run / "book"


@pytest.fixture(scope="module")
def pages(book) -> dict[str, Page]:
    found = {str(path.relative_to(book)): path for path in book.rglob("*.html")}
    return {name: Page(path) for name, path in found.items() if not name.startswith("_static")}


def test_every_page_is_there(pages):
    expected = {"index", "glossary", "bibliography", "run_times", "404", "search", "genindex"}
    expected |= {f"notebooks/{chapter}" for chapter in CHAPTERS}
    assert {f"{name}.html" for name in expected} <= set(pages)


def test_no_page_loads_anything_from_elsewhere(pages):
    outside = {
        name: [a for a in page.loads() if re.match(r"(https?:)?//", a)]
        for name, page in pages.items()
    }
    assert {name: addresses for name, addresses in outside.items() if addresses} == {}


def test_no_style_loads_anything_from_elsewhere(book):
    pattern = re.compile(
        r"@import\s+(?:url\()?['\"]?(?:https?:)?//|url\(\s*['\"]?(?:https?:)?//[^)]*\)"
    )
    outside = {str(p.name): pattern.findall(p.read_text("utf-8")) for p in book.rglob("*.css")}
    assert {name: hits for name, hits in outside.items() if hits} == {}


def test_what_pages_load_is_there(pages, book):
    for name, page in pages.items():
        if name == "404.html":  # served from any depth, so its addresses begin at the site's root
            continue
        for address in page.loads():
            if not address.startswith(("data:", "about:")):
                file = (page.path.parent / re.split(r"[?#]", address)[0]).resolve()
                assert file.is_file(), f"{name} loads {address}"


def test_mathematics_is_served_by_the_book(pages, book):
    assert (book / "_static" / "mathjax" / "tex-svg.js").stat().st_size > 1_000_000
    with_maths = [page for page in pages.values() if 'class="math' in page.text]
    assert with_maths
    for page in with_maths:
        assert any("mathjax/tex-svg.js" in address for address in page.loads())


def test_there_is_one_search_field(pages):
    for name, page in pages.items():
        forms = [a for tag, a in page.tags if tag == "form" and "bd-search" in a.get("class", "")]
        assert len(forms) == (2 if name == "search.html" else 1), name  # one is behind Ctrl+K
        assert page.text.count("search-button-field") == 1, name


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_a_chapter_opens_in_colab_as_a_notebook(pages, chapter):
    links = [a["href"] for tag, a in pages[f"notebooks/{chapter}.html"].tags if "href" in a]
    assert any(
        "colab" in link and link.endswith(f"/blob/main/notebooks/{chapter}.ipynb") for link in links
    )


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_the_bootstrap_and_the_injected_parameters_are_hidden(pages, chapter):
    text = pages[f"notebooks/{chapter}.html"].text
    assert "TWO_LATENTS_ADDRESS" not in text
    assert "# Parameters" not in text


def test_every_picture_has_a_text_for_those_who_cannot_see_it(pages):
    for name, page in pages.items():
        pictures = [a for tag, a in page.tags if tag == "img" and "_images/" in a.get("src", "")]
        for picture in pictures:
            alt = picture.get("alt", "")
            assert alt and not alt.endswith((".png", ".svg")), f"{name}: {picture['src']}"


def test_solutions_are_folded(pages, smoke_run):
    for chapter in CHAPTERS:
        path = smoke_run / "executed" / f"{chapter}.ipynb"
        cells = nbformat.read(path, as_version=4).cells
        solutions = sum("solution" in cell.metadata.get("tags", []) for cell in cells)
        assert pages[f"notebooks/{chapter}.html"].text.count("Show the solution") == solutions


def test_the_run_times_page_tells_each_chapter_and_the_machine(pages):
    text = pages["run_times.html"].text
    assert "smoke" in text
    assert "cores" in text
    for chapter in CHAPTERS:
        assert f"{chapter}.html" in text


def test_the_landing_page_says_what_matters(pages):
    text = pages["index.html"].text
    assert "Not for clinical use" in text
    assert "the_idea" in text
    assert "How to cite" in text


def test_no_role_or_formula_is_left_raw(pages):
    raw = re.compile(r"\{(?:term|cite:[a-z]+|numref|eq|glue:[a-z]+)\}`|\{\{\s*\w+\s*\}\}")
    for name, page in pages.items():
        body = re.sub(r"<(script|pre|code)\b.*?</\1>", "", page.text, flags=re.DOTALL)
        assert raw.findall(body) == [], name


def test_every_citation_key_is_cited_or_explained(book):
    keys = re.findall(r"^@\w+\{(\w+),", (ROOT / "book/references.bib").read_text(), re.MULTILINE)
    assert len(keys) == len(set(keys))
    assert len(re.findall(r'class="citation', (book / "bibliography.html").read_text())) >= len(
        keys
    )


@pytest.mark.skipif(not shutil.which("chromium"), reason="chromium is not installed")
@pytest.mark.parametrize("page", ["index", *(f"notebooks/{chapter}" for chapter in CHAPTERS)])
def test_a_page_is_as_wide_as_a_phone_and_has_no_empty_header(book, tmp_path, page):
    """Frames of a phone's and of a desk's width show the page, and tell its size."""
    outer = tmp_path / "outer.html"
    address = f"file://{book / page}.html"
    outer.write_text(
        f"<iframe src='{address}' width=390 height=800></iframe>"
        f"<iframe src='{address}' width=1400 height=800></iframe>"
        "<script>onload = () => setTimeout(() => {"
        "const [phone, desk] = [...document.querySelectorAll('iframe')].map(f => f.contentDocument);"
        "const header = desk.querySelector('.bd-header');"
        "document.title = `WIDTH ${phone.documentElement.scrollWidth}`"
        " + ` HEADER ${header ? header.offsetHeight : 0}`; }, 1500)</script>"
    )
    done = subprocess.run(
        [
            "chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-web-security",
            "--allow-file-access-from-files", f"--user-data-dir={tmp_path / 'profile'}",
            "--virtual-time-budget=6000", "--dump-dom", f"file://{outer}",
        ],
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    measured = re.search(r"<title>WIDTH (\d+) HEADER (\d+)", done.stdout)
    assert measured, done.stdout[-500:] + done.stderr[-500:]
    width, header = map(int, measured.groups())
    assert width <= 390
    assert header == 0

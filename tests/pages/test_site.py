"""The site that `make docs` builds: links, formulas, and pages in a browser."""

import contextlib
import functools
import html.parser
import http.server
import json
import os
import pathlib
import re
import shutil
import subprocess
import threading
import urllib.parse

import pytest

ROOT = pathlib.Path(__file__).parents[2]
SITE = ROOT / "out" / "site"
PAGES = sorted(path.relative_to(SITE).as_posix() for path in SITE.rglob("*.html"))

pytestmark = pytest.mark.skipif(not PAGES, reason="make docs builds the site")


class Page(html.parser.HTMLParser):
    """Collects links, fetched files, anchors, images, formulas and glossary links of a page."""

    def __init__(self, path: pathlib.Path) -> None:
        super().__init__()
        self.links, self.fetched, self.ids, self.images, self.formulas = [], [], set(), [], 0
        self.terms = []
        self.feed(path.read_text())

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        if tag == "a" and found.get("href"):
            self.links.append(found["href"])
            if found.get("class") == "term":
                self.terms.append(found["href"].partition("#")[2])
        if tag in ("script", "img", "iframe") and found.get("src"):
            self.fetched.append(found["src"])
        if tag == "link" and "stylesheet" in found.get("rel", ""):
            self.fetched.append(found["href"])
        if tag == "img":
            self.images.append(found)
        self.formulas += tag == "math"
        self.ids.update(value for key, value in attrs if key in ("id", "name") and value)


@functools.cache
def page(path):
    return Page(path)


def target(source, link):
    """The file and the anchor of a link, `None` for a link to another site."""
    parts = urllib.parse.urlsplit(link)
    if parts.scheme or parts.netloc:
        return None
    found = (source.parent / urllib.parse.unquote(parts.path)) if parts.path else source
    if parts.path.startswith("/"):
        found = SITE / parts.path.lstrip("/")
    return (found / "index.html" if found.is_dir() else found), urllib.parse.unquote(parts.fragment)


@pytest.mark.parametrize("name", PAGES)
def test_no_dead_link(name):
    source, dead = SITE / name, []
    for link in page(source).links + page(source).fetched:
        where = target(source, link)
        if where is None:
            continue
        path, anchor = where
        known = path.suffix != ".html" or not anchor or not path.exists()
        if not path.exists() or not (known or anchor in page(path).ids):
            dead.append(link)
    assert not dead


@pytest.mark.parametrize("name", PAGES)
def test_nothing_is_fetched_from_elsewhere(name):
    fetched = [link for link in page(SITE / name).fetched if not link.startswith("data:")]
    assert [link for link in fetched if target(SITE / name, link) is None] == []


def test_formulas_are_rendered():
    for path in (ROOT / "docs").glob("*.md"):
        built = SITE / path.stem / "index.html" if path.stem != "index" else SITE / "index.html"
        assert page(built).formulas == path.read_text().count("$$") // 2, path.name
        shown = re.sub(r"<(code|pre).*?</\1>", "", built.read_text(), flags=re.DOTALL)
        assert "$$" not in shown, path.name
        text = re.sub(r"```.*?```|`[^`]*`|\$\$.*?\$\$", "", path.read_text(), flags=re.DOTALL)
        assert "$" not in text, path.name
    assert page(SITE / "theory" / "index.html").formulas > 0


def test_words_of_the_glossary_are_links_where_they_first_occur():
    entries = set(re.findall(r"^## (.+)$", (ROOT / "docs/glossary.md").read_text(), re.MULTILINE))
    entries = {entry.lower().replace(" ", "-") for entry in entries}
    terms = {name: page(SITE / name).terms for name in PAGES}
    assert entries == {term for found in terms.values() for term in found}
    assert [name for name, found in terms.items() if len(found) > len(set(found))] == []
    assert {"group", "radius", "angle"} <= set(terms["which/index.html"])
    assert terms["glossary/index.html"] == []


@pytest.mark.parametrize(
    ("words", "name"),
    [
        ("LoRA", "fine_tuning/"),
        ("pretrained", "fine_tuning/"),
        ("fine-tuning", "fine_tuning/"),
        ("freeze", "fine_tuning/"),
        ("bf16", "precision/"),
        ("warmup", "coming_from_adam/"),
        ("learning rate", "coming_from_adam/"),
        ("QK norm", "groups/"),
        ("checkpoint", "fine_tuning/"),
    ],
)
def test_search_knows_the_words_of_users(words, name):
    index = json.loads((SITE / "search/search_index.json").read_text())
    separator = index["config"]["separator"]
    pages = [each for each in index["docs"] if each["location"].startswith(name)]
    found = " ".join(f"{each['title']} {each['text']}" for each in pages)
    tokens = re.split(separator, re.sub(r"<[^>]+>", " ", found.lower()))
    for word in re.split(separator, words.lower()):
        assert any(token.startswith(word) for token in tokens), word


@pytest.mark.parametrize("name", PAGES)
def test_images_have_words(name):
    assert [found for found in page(SITE / name).images if not found.get("alt")] == []


def test_rules_in_tables_can_be_copied():
    for name in PAGES:
        assert not re.search(r"<td[^>]*>[^\n]*\\\|", (SITE / name).read_text()), name
    assert '(.*fc)/(kernel|bias)"' in (SITE / "groups/index.html").read_text()


def test_figures_are_links_to_their_files():
    for name in PAGES:
        sources = [found["src"] for found in page(SITE / name).images]
        files = {source for source in sources if not source.startswith("data:")}
        assert files <= set(page(SITE / name).links), name
    assert page(SITE / "language/index.html").images


def test_links_of_the_readme():
    text = (ROOT / "README.md").read_text()
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = link.partition("#")
        if "://" in link:
            continue
        assert (ROOT / path).exists(), link
        if anchor:
            built = SITE / path.removeprefix("docs/").removesuffix(".md") / "index.html"
            assert anchor in page(built).ids, link


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@contextlib.contextmanager
def served():
    handler = functools.partial(Quiet, directory=SITE)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)


@pytest.mark.skipif(BROWSER is None, reason="no browser is here")
@pytest.mark.parametrize(
    "name", ["", "theory/", "which/", "tutorials/transformer/", "reference/groups/"]
)
def test_no_error_in_a_browser(name, tmp_path):
    """A browser reports no errors on a page, with access to the site itself only."""
    with served() as address:
        done = subprocess.run(
            [
                BROWSER,
                "--headless",
                "--no-sandbox",
                "--disable-gpu",
                f"--user-data-dir={tmp_path}",
                "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
                "--enable-logging=stderr",
                "--virtual-time-budget=5000",
                "--dump-dom",
                f"{address}/{name}",
            ],
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
            env=os.environ,
        )
    assert "</html>" in done.stdout
    said = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert said == []

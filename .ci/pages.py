"""MkDocs hooks: formulas, links and figures of the tutorials, and links to the glossary.

Formulas become MathML, which browsers render without scripts or fonts. In tutorials, links to
source files become links to their pages, and figures get the title of their section as their
description. A figure is a link to its file, which a phone shows in full size. The first
occurrence of each glossary term on a page becomes a link to its entry.
"""

import html
import pathlib
import posixpath
import re
from typing import Any

from latex2mathml.converter import convert

FORMULA = re.compile(r'<div class="arithmatex">\\\[(.*?)\\\]</div>', re.DOTALL)
FIGURE = re.compile(r'<h\d[^>]*>([^<]*)|alt="No description has been provided for this image"')
CELL = re.compile(r"<td.*?</td>", re.DOTALL)
IMAGE = re.compile(r'<img [^>]*src="(?!data:)([^"]+)"[^>]*>')
# The anchors of the glossary's entries, with the forms of their terms.
TERMS = {
    "effective-learning-rate": "effective learning rates?",
    "radially-invariant": "radially invariant",
    "angle": "(?<!right )angles?",
    "group": "groups?",
    "joint": "joint|jointly",
    "mask": "masks?",
    "project": "projected|projects",
    "radial": "radial",
    "radius": "radius|radii",
    "retract": "retracts?|retracted|retraction",
    "tangent": "tangent",
    "transport": "transports?|transported",
}
TERM = re.compile(rf"\b(?:{'|'.join(f'({forms})' for forms in TERMS.values())})\b", re.IGNORECASE)
# A tag, or the text between two tags.
PART = re.compile(r"<!--.*?-->|<(/?)(\w+)[^>]*>|[^<]+", re.DOTALL)
NO_TERMS = {"a", "code", "pre", "math", "script", "style", *(f"h{k}" for k in range(1, 7))}
LINK = re.compile(r'href="(?!\w+:|/)([^"#]+\.(?:md|py))(#[^"]*)?"')


def on_page_content(content: str, page: Any, files: Any, **_: Any) -> str:
    """Changes the HTML of a page. MkDocs calls this for each page."""

    def link(found: re.Match[str]) -> str:
        source = posixpath.normpath(posixpath.join(posixpath.dirname(page.file.src_uri), found[1]))
        target = files.get_file_from_path(source)
        if target is None:
            raise FileNotFoundError(f"{page.file.src_uri}: no page {source} for a link to it")
        return f'href="{target.url_relative_to(page.file)}{found[2] or ""}"'

    def formula(found: re.Match[str]) -> str:
        return f'<div class="formula">{convert(html.unescape(found[1]), display="block")}</div>'

    heading = ""

    def figure(found: re.Match[str]) -> str:
        nonlocal heading
        if found[1] is not None:
            heading = found[1]
            return found[0]
        return f'alt="Figure of the section: {heading}"'

    content = LINK.sub(link, FIGURE.sub(figure, FORMULA.sub(formula, content)))
    # In Markdown's tables a bar is written with a backslash, which Python-Markdown keeps in code.
    content = CELL.sub(lambda found: found[0].replace(r"\|", "|"), content)
    content = IMAGE.sub(r'<a href="\1">\g<0></a>', content)
    glossary = files.get_file_from_path("glossary.md")
    if page.file.src_uri in (glossary.src_uri, "changelog.md"):
        return content
    return with_terms(content, glossary.url_relative_to(page.file))


def with_terms(content: str, glossary: str) -> str:
    """Turns the first occurrence of each glossary term in the HTML into a link to its entry."""
    left, inside = set(TERMS), 0

    def term(found: re.Match[str]) -> str:
        name = list(TERMS)[found.lastindex - 1] if found.lastindex else ""
        if name not in left:
            return found[0]
        left.remove(name)
        return f'<a class="term" href="{glossary}#{name}">{found[0]}</a>'

    def part(found: re.Match[str]) -> str:
        nonlocal inside
        if found[2] in NO_TERMS:
            inside += -1 if found[1] else 1
        return TERM.sub(term, found[0]) if not inside and found[0][0] != "<" else found[0]

    return PART.sub(part, content)


def on_config(config: Any) -> Any:
    """Puts the version into the footer of each page."""
    text = (
        pathlib.Path(config.config_file_path).parent / "spherical_optax/__init__.py"
    ).read_text()
    found = re.search(r'__version__ = "(.*)"', text)
    assert found
    config.copyright = f"Version {found[1]}"
    return config

"""What MkDocs and its plugins leave undone: formulas, and links and images of the tutorials.

Formulas become MathML, which browsers render without scripts or fonts. Links of notebooks to pages
by their files become links to these pages, and their figures get the words of the section.
"""

import html
import pathlib
import posixpath
import re
from typing import Any

from latex2mathml.converter import convert

FORMULA = re.compile(r'<div class="arithmatex">\\\[(.*?)\\\]</div>', re.DOTALL)
FIGURE = re.compile(r'<h\d[^>]*>([^<]*)|alt="No description has been provided for this image"')
LINK = re.compile(r'href="(?!\w+:|/)([^"#]+\.(?:md|py))(#[^"]*)?"')


def on_page_content(content: str, page: Any, files: Any, **_: Any) -> str:
    """Called by MkDocs with the HTML of each page."""

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

    return LINK.sub(link, FIGURE.sub(figure, FORMULA.sub(formula, content)))


def on_config(config: Any) -> Any:
    """The version at the foot of each page."""
    text = (
        pathlib.Path(config.config_file_path).parent / "spherical_optax/__init__.py"
    ).read_text()
    found = re.search(r'__version__ = "(.*)"', text)
    assert found
    config.copyright = f"Version {found[1]}"
    return config

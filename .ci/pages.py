"""What MkDocs and its plugins leave undone: formulas, and links of the tutorials.

Formulas become MathML, which browsers render without scripts or fonts. Links of notebooks to pages
by their files become links to these pages.
"""

import html
import posixpath
import re
from typing import Any

from latex2mathml.converter import convert

FORMULA = re.compile(r'<div class="arithmatex">\\\[(.*?)\\\]</div>', re.DOTALL)
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
        return convert(html.unescape(found[1]), display="block")

    return LINK.sub(link, FORMULA.sub(formula, content))

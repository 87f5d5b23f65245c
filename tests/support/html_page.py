"""Tags and pictures of an HTML page."""

from __future__ import annotations

import base64
import io
from html.parser import HTMLParser

import numpy as np
from PIL import Image

VOID = ("meta", "br", "input", "img")


def pixels_of_uri(uri: str) -> np.ndarray:
    """Pixels [height, width, 3] of a picture in the page."""
    head, content = uri.split(",")
    assert head == "data:image/webp;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(content))).convert("RGB"))


class Page(HTMLParser):
    """Parser that collects the tags of a page and fails on a closing tag that does not match the last opened one."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def all(self, tag: str) -> list[dict[str, str | None]]:
        """Attributes of every tag with that name."""
        return [attributes for name, attributes in self.tags if name == tag]

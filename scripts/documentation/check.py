"""Checks a built site as a browser sees it: dead links and anchors, missing alt texts, files from other hosts."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

# The attribute of each tag whose address a browser fetches by itself. People follow <a href>.
FETCHED = {"script": "src", "img": "src", "link": "href", "iframe": "src", "source": "src", "video": "src"}
_NOT_FETCHED = {"canonical", "next", "prev", "search", "index", "author"}  # the `rel` of a <link> that is not fetched


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.fetched: list[str] = []
        self.without_alt: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = {name: value or "" for name, value in attrs}
        self.anchors |= {attributes[name] for name in ("id", "name") if name in attributes}
        if tag == "a" and "href" in attributes:
            self.links.append(attributes["href"])
        if tag in FETCHED and FETCHED[tag] in attributes and not set(attributes.get("rel", "").split()) & _NOT_FETCHED:
            self.fetched.append(attributes[FETCHED[tag]])
        if tag == "img" and not attributes.get("alt"):
            self.without_alt.append(attributes.get("src", ""))


def problems(site: Path) -> list[str]:
    """A line for each problem; empty if there is none."""
    pages = {file.resolve(): _parsed(file) for file in sorted(site.rglob("*.html"))}
    lines = [] if pages else [f"{site}: there is no page"]
    for file, page in pages.items():
        where = file.relative_to(site.resolve())
        lines += [f"{where}: a picture without alt text: {source}" for source in page.without_alt]
        lines += [f"{where}: fetched from another host: {url}" for url in page.fetched if _is_remote(url)]
        local = [link for link in page.links + page.fetched if not _is_remote(link)]
        lines += [f"{where}: {link} leads nowhere" for link in local if not _leads_somewhere(link, file, pages)]
    for sheet in sorted(site.rglob("*.css")):
        text = sheet.read_text()
        if any(f"url({quote}{scheme}" in text for quote in ("", "'", '"') for scheme in ("http", "//")):
            lines.append(f"{sheet.relative_to(site)}: fetches from another host")
    return lines


def _parsed(file: Path) -> _Page:
    page = _Page()
    page.feed(file.read_text(encoding="utf-8"))
    return page


def _is_remote(url: str) -> bool:
    parts = urlsplit(url)
    return bool(parts.netloc) or parts.scheme not in ("", "data")


def _leads_somewhere(link: str, file: Path, pages: dict[Path, _Page]) -> bool:
    parts = urlsplit(link)
    if parts.scheme == "data":
        return True
    target = (file.parent / unquote(parts.path)).resolve() if parts.path else file
    anchor = unquote(parts.fragment)
    if anchor and target in pages:
        return anchor in pages[target].anchors
    return target.is_file()

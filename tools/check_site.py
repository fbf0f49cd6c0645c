# SPDX-License-Identifier: Apache-2.0
"""Looks whether every link of the built documentation that stays within it leads to a page and a place there."""

import sys
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from typing import override
from urllib.parse import unquote, urlsplit


class Page(HTMLParser):
    """What a page refers to, and the places in it that can be referred to."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.targets: set[str] = set()
        self.places: set[str] = set()
        self.feed(path.read_text(encoding="utf-8"))

    @override
    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.targets |= {given[name] or "" for name in ("href", "src") if name in given}
        self.places |= {given[name] or "" for name in ("id", "name") if name in given}


@cache
def _page(path: Path) -> Page:
    return Page(path)


def dead_links(site: Path) -> list[str]:
    """Return a line for each link of a site that leads nowhere.

    Args:
        site: Directory of the HTML files.
    """
    dead = []
    for path in sorted(site.rglob("*.html")):
        if "_modules" in path.relative_to(site).parts:
            continue  # Sphinx's copies of sources: their way back knows one module's name for an object, we have two
        for target in sorted(_page(path).targets):
            link = urlsplit(target)
            if link.scheme or link.netloc:
                continue
            aim = (path.parent / unquote(link.path)).resolve() if link.path else path.resolve()
            aim = aim / "index.html" if aim.is_dir() else aim
            lost = not aim.exists() or (
                link.fragment and aim.suffix == ".html" and unquote(link.fragment) not in _page(aim).places
            )
            if lost:
                dead.append(f"{path.relative_to(site)}: {target}")
    return dead


def main() -> None:
    """Print the dead links of the directory given, and fail if there is one."""
    site = Path(sys.argv[1])
    if not (site / "index.html").exists():
        sys.exit(f"The site must have an index.html, got none in {site}. Build it first with make docs.")
    dead = dead_links(site)
    print("\n".join(dead) or f"No dead link in {len(list(site.rglob('*.html')))} pages.")
    sys.exit(bool(dead))


if __name__ == "__main__":
    main()

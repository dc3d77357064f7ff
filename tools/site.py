"""What mkdocs asks while it makes the site (`make docs`): pages that are not in docs/, and links
that fit the site. The pages themselves keep the links that they have in the repository."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

sys.path.insert(0, str(Path(__file__).parent))
import reference  # it is next to this file, which mkdocs loads by its path

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"

# Pages at the root of the repository, by their names on the site.
PAGES = {
    "index.md": ROOT / "README.md",
    "contributing.md": ROOT / "CONTRIBUTING.md",
    "changelog.md": ROOT / "CHANGELOG.md",
    "security.md": ROOT / "SECURITY.md",
}


def _target(path: Path, page: str) -> str | None:
    """Where a link to a file leads on the site, from a page; None for a file that is not there."""
    names = {source: name for name, source in PAGES.items()}
    if path in names:
        name = names[path]
    elif path.is_relative_to(DOCS):
        name = path.relative_to(DOCS).as_posix()
    else:
        return None
    return os.path.relpath(name, Path(page).parent)


def relinked(text: str, source: Path, page: str) -> str:
    """The text of a page whose links are relative to `source`, its file in the repository. Links
    to files that are no pages become their text."""

    def replace(match: re.Match[str]) -> str:
        words, path, anchor = match[1], match[2], match[3] or ""
        if "://" in path or not path:
            return match[0]
        file = (source.parent / path).resolve()
        if not file.exists():
            return match[0]  # mkdocs tells
        target = _target(file, page)
        return words if target is None else f"[{words}]({target}{anchor})"

    # An image may be what is linked.
    image_or_text = r"(?:!\[[^\]]*\]\([^)]*\)|[^\[\]])*"
    link = rf"\[({image_or_text})\]\(([^)#\s]*)(#[^)\s]*)?\)"
    image = re.compile(r"!\[([^\]]*)\]\(([^)#\s]*)(#[^)\s]*)?\)")
    parts = re.split(r"(^```.*?^```$)", text, flags=re.MULTILINE | re.DOTALL)
    for i in range(0, len(parts), 2):  # between blocks of code
        images = image.sub(lambda m: "!" + replace(m), parts[i])
        parts[i] = re.sub(link, replace, images)
    return "".join(parts)


def on_files(files: Files, config: Any) -> Files:
    """Adds the pages that are not in docs/."""
    for name, source in PAGES.items():
        text = relinked(source.read_text(), source, name)
        files.append(File.generated(config, name, content=text))
    for module in reference.MODULES:
        text = reference.python_page(module)
        files.append(File.generated(config, f"reference/{module}.md", content=text))
    text = reference.cpp_page(ROOT / "libnatten" / "include" / "natten")
    files.append(File.generated(config, "reference/cpp.md", content=text))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    if page.file.abs_src_path is None or not Path(page.file.abs_src_path).is_relative_to(DOCS):
        return markdown
    return relinked(markdown, Path(page.file.abs_src_path), page.file.src_uri)

"""Makes the site of files that also read well where they lie: the README is its first page, and what pages link to
elsewhere in the repository comes along.

Pages link to `../README.md`, `../benchmarks/results/table.csv` and the like. On the site the README is `index.md`,
CONTRIBUTING.md is `contributing.md`, and other files lie in `files/`, under their own paths. A folder becomes a page
with its files.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parent.parent
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md"}
_LINK = re.compile(r"(\]\()([^)\s#]+)(#[^)\s]*)?(\))")


def on_files(files: Any, config: Any) -> Any:
    """Add the pages, and the files that pages link to."""
    pages = {name: (ROOT / name).read_text(encoding="utf-8") for name in PAGES}
    linked = {target for name, text in pages.items() for target in _targets(text, ROOT)}
    for path in sorted((ROOT / "docs").glob("*.md")):
        linked |= {*_targets(path.read_text(encoding="utf-8"), path.parent)}
    for name, text in pages.items():
        files.append(File.generated(config, PAGES[name], content=_moved(text, ROOT)))
    for target in sorted(linked):
        path = ROOT / target
        if path.is_dir():
            inside = sorted(
                p.relative_to(ROOT) for p in path.rglob("*") if p.is_file() and "__pycache__" not in p.parts
            )
            for file in inside:
                _add(files, config, file.as_posix())
            lines = [f"- [{file.relative_to(target)}]({file.relative_to(target)})" for file in inside]
            text = f"# {target}\n\n" + "\n".join(line.replace(".md)", ".md.txt)") for line in lines)
            files.append(File.generated(config, f"files/{target}/index.md", content=text))
        else:
            _add(files, config, target)
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Have the links of a page lead to where the site has things."""
    source = page.file.src_uri
    if source in PAGES.values() or source.startswith(("files/", "notebooks/")):
        return markdown
    return _moved(markdown, ROOT / "docs")


def _targets(text: str, folder: Path) -> list[str]:
    """What a page links to outside docs/, as paths from the root."""
    paths = [(folder / match[2]).resolve() for match in _LINK.finditer(text) if ":" not in match[2]]
    inside = [path.relative_to(ROOT).as_posix() for path in paths if path.is_relative_to(ROOT) and path.exists()]
    return [path for path in inside if path not in PAGES and not path.startswith("docs")]


def _moved(text: str, folder: Path) -> str:
    """A page's text with its links as the site has them."""

    def move(match: re.Match[str]) -> str:
        path = (folder / match[2]).resolve()
        if ":" in match[2] or not path.is_relative_to(ROOT) or not path.exists():
            return match[0]
        name = path.relative_to(ROOT).as_posix()
        target = PAGES.get(name) or (name.removeprefix("docs/") if name.startswith("docs/") else _site_path(name))
        return f"{match[1]}{target}{match[3] or ''}{match[4]}"

    return _LINK.sub(move, text)


def _site_path(name: str) -> str:
    """Where a file or folder of the repository lies on the site."""
    if (ROOT / name).is_dir():
        return f"files/{name}/index.md"
    return f"files/{name}.txt" if name.endswith(".md") else f"files/{name}"  # its text, not a page of the site


def _add(files: Any, config: Any, name: str) -> None:
    uri = f"files/{name}.txt" if name.endswith(".md") else f"files/{name}"
    if files.get_file_from_path(uri) is None:
        files.append(File.generated(config, uri, content=(ROOT / name).read_bytes()))


def on_post_page(output: str, page: Any, config: Any) -> str:
    """Have the links of a notebook lead to pages; mkdocs looks at those of Markdown files alone."""
    if not page.file.src_uri.startswith("notebooks/"):
        return output
    return re.sub(r'(href="\.\./[\w-]+)\.md', r"\1.html", output)

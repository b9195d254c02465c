"""MkDocs hooks: notebooks as pages, and links to files outside docs/.

A notebook becomes a Markdown page of its cells. A link to a source file becomes a link to a page
that shows the file, so that the site works without the repository and without a network.
"""

import json
import os
import pathlib
import posixpath
import re

from mkdocs.structure.files import File, Files

ROOT = pathlib.Path(__file__).parents[2]
DOCS = ROOT / "docs"
LINK = re.compile(r"\]\(([^)\s#]+)(#[^)\s]*)?\)")
LANGUAGES = {".py": "python", ".sh": "bash", ".yaml": "yaml", ".md": "markdown", "": "text"}


def notebook_to_markdown(text: str) -> str:
    """Convert a notebook to Markdown, with code in fences."""
    parts = []
    for cell in json.loads(text)["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
    return "\n\n".join(parts) + "\n"


def outside(link: str, page: str) -> pathlib.Path | None:
    """Return the target of a page's relative link if it is outside docs/, else None."""
    if re.match(r"[a-z]+:|/", link):
        return None
    target = pathlib.Path(os.path.normpath(DOCS / posixpath.dirname(page) / link))
    inside = target.is_relative_to(DOCS) or not target.is_relative_to(ROOT)
    return None if inside or not target.exists() else target


def source_page(target: pathlib.Path) -> str:
    """Return the name of the page that shows a file."""
    return f"source/{target.relative_to(ROOT).as_posix()}.md"


def show(target: pathlib.Path) -> str:
    """Make a page that shows a file or lists a folder."""
    name = target.relative_to(ROOT).as_posix()
    if target.is_dir():
        text, language = "\n".join(sorted(p.name for p in target.iterdir())), "text"
    else:
        text, language = target.read_text(), LANGUAGES.get(target.suffix, "text")
    return f"---\nsearch:\n  exclude: true\n---\n\n# {name}\n\n~~~~{language}\n{text}\n~~~~\n"


def on_files(files: Files, config) -> Files:
    """Add the pages of notebooks and of linked files."""
    linked = set()
    for file in list(files):
        if file.src_uri.endswith(".ipynb"):
            files.remove(file)
            page = file.src_uri.removesuffix(".ipynb") + ".md"
            content = notebook_to_markdown(file.content_string)
            files.append(File.generated(config, page, content=content))
    for file in list(files):
        if file.src_uri.endswith(".md"):
            links = [match[1] for match in LINK.finditer(file.content_string)]
            linked |= {outside(link, file.src_uri) for link in links} - {None}
    for target in sorted(linked):
        files.append(File.generated(config, source_page(target), content=show(target)))
    return files


def on_page_markdown(markdown: str, page, config, files: Files) -> str:
    """Redirect links to notebooks and to files outside docs/ to their pages."""
    here = page.file.src_uri
    if here.startswith("source/"):
        return markdown

    def lead(match: re.Match) -> str:
        target = outside(match[1], here)
        if target is not None:
            return f"]({posixpath.relpath(source_page(target), posixpath.dirname(here))})"
        return match[0].replace(".ipynb", ".md")

    return LINK.sub(lead, markdown)


def on_config(config):
    """Replace notebooks in the navigation by their pages."""

    def renamed(part):
        if isinstance(part, list):
            return [renamed(p) for p in part]
        if isinstance(part, dict):
            return {name: renamed(p) for name, p in part.items()}
        return part.replace(".ipynb", ".md")

    config.nav = renamed(config.nav)
    return config

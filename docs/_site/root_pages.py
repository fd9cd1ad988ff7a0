"""
Pages of the site that are files elsewhere in the repository: the README is its front page.

Links lead to the same files in both places; here they are written as they are from the site.
"""

import re
from pathlib import Path

from mkdocs.structure.files import File


ROOT = Path(__file__).parents[2]
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
NOTEBOOKS = "examples/notebooks/"


def on_files(files, config):
    notebooks = [path.relative_to(ROOT).as_posix() for path in sorted((ROOT / NOTEBOOKS).glob("*.ipynb"))]
    pages = PAGES | {path: path.removeprefix("examples/") for path in notebooks}
    for source, page in pages.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown, page, config, files):
    for source, name in PAGES.items():
        markdown = re.sub(rf"\]\((\.\./)?{re.escape(source)}", f"]({name}", markdown)
    markdown = re.sub(rf"\]\((\.\./)?{NOTEBOOKS}", "](notebooks/", markdown)
    if page.file.src_uri in PAGES.values():
        markdown = markdown.replace("](docs/", "](")
    return markdown

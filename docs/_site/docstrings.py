"""
The docstrings of the package as Markdown for the API page.

They are written as those of Hugging Face's libraries: `Args:` with the type of each argument in parentheses, references
as [`~trl.GRPOTrainer`], `> Parameters that control ...` between the fields of a configuration. No parser of mkdocstrings
reads these, nor keeps the shapes that are part of the types.
"""

import re
from collections.abc import Callable

import griffe


logger = griffe.get_logger(__name__)

SECTIONS = {
    "Args": "Arguments",
    "Parameters": "Fields",
    "Attributes": "Attributes",
    "Raises": "Raises",
    "Returns": "Returns",
    "Yields": "Yields",
    "Example": "Example",
    "Examples": "Examples",
}
HEADER = re.compile(rf"^({'|'.join(SECTIONS)}):$")
# `name (type): text` or `name: text`, and for errors `` `ValueError`: text ``.
ITEM = re.compile(r"^(?P<name>\w+|\[?`[^`]+`\]?)(?: \((?P<type>.*?)\))?:(?: (?P<text>.*))?$")
REFERENCE = re.compile(r"\[`(~?)([\w.]+)`\](?![(\[])")


def to_markdown(docstring: str, resolve: Callable[[str], str | None]) -> str:
    """
    A docstring as Markdown, its sections as definition lists.

    Args:
        docstring (`str`): Docstring without its indentation.
        resolve (`Callable`): Gives the path of an object of the package by the name that a reference has, and `None` for
            one of another library.
    """
    lines, blocks = docstring.splitlines(), []
    while lines:
        line = lines.pop(0)
        if line == "> [!NOTE]":
            blocks.append("!!! note\n")
            while lines and lines[0].startswith("> "):
                text = lines.pop(0).removeprefix("> ")
                opens_list = text.startswith("- ") and not blocks[-1].startswith("    - ")
                blocks += [""] * opens_list + [f"    {text}"]
            continue
        if not (header := HEADER.match(line)):
            blocks.append(line)
            continue
        body = []
        while lines and (not lines[0] or lines[0].startswith(" ")):
            body.append(lines.pop(0))
        indent = min((len(text) - len(text.lstrip()) for text in body if text), default=0)
        body = [text[indent:] for text in body]
        blocks += ["", f"**{SECTIONS[header[1]]}**", ""]
        blocks += body if header[1] in ("Returns", "Yields", "Example", "Examples") else definitions(body)
    text = "\n".join(blocks).replace("```python\n>>>", "```pycon\n>>>")

    def link(reference: re.Match) -> str:
        name = reference[2]
        path = resolve(name)
        return f"`{name}`" if path is None else f"[`{path.rpartition('.')[2]}`][{path}]"

    return REFERENCE.sub(link, text)


def definitions(body: list[str]) -> list[str]:
    """Items of a section as a definition list, other lines at their level as paragraphs between its parts."""
    lines, marker = [], ""  # what the first line of a definition begins with
    for line in body:
        if line.startswith("> "):
            lines += ["", f"*{line[2:]}*", ""]
        elif item := ITEM.match(line):
            name = item["name"] if "`" in item["name"] else f"`{item['name']}`"
            lines += ["", f"{name} ({item['type']})" if item["type"] else name]
            marker = ":   "
            if item["text"]:
                lines, marker = [*lines, marker + item["text"]], ""
        elif not line or line.startswith(" "):
            lines.append(marker + line.strip() if marker else line)
            marker = ""
        elif lines and lines[-1]:  # a paragraph goes on
            lines.append(line)
        else:
            lines += ["", line]
    return lines


class HuggingFaceDocstrings(griffe.Extension):
    """Rewrites all docstrings of a package once it is loaded."""

    def on_package(self, *, pkg: griffe.Module, **kwargs) -> None:
        objects = list(walk(pkg))
        paths = [found.path for found in objects]

        def resolve(name: str) -> str | None:
            library = name.partition(".")[0]
            if library in ("accelerate", "datasets", "torch", "transformers", "trl"):
                return None
            for ending in (name, name.rpartition(".")[2]):
                matches = [path for path in paths if path.endswith(f".{ending}")]
                if matches:
                    return matches[0]
            logger.warning("A docstring refers to `%s`, which is not there.", name)
            return None

        for found in objects:
            if found.docstring is not None:
                found.docstring.value = to_markdown(found.docstring.value, resolve)


def walk(parent: griffe.Object):
    """An object and everything that it defines itself."""
    yield parent
    for member in parent.members.values():
        if not member.is_alias:
            yield from walk(member)

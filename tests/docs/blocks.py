"""What the documents contain: code blocks under a marker, tables under a heading, commands."""
import pathlib
import re

ROOT = pathlib.Path(__file__).resolve().parents[2]


def code_block(document, marker):
    """The text of the fenced block that follows `<!-- test: marker -->` in a Markdown file of the repository."""
    text = (ROOT / document).read_text()
    found = re.search(rf"<!-- test: {re.escape(marker)} -->\n```\w*\n(.*?)```", text, re.DOTALL)
    assert found, f"{document} has no code block marked {marker!r}"
    return found[1]


def table(document, heading):
    """The rows of the first table under a heading, as dicts by column."""
    text = (ROOT / document).read_text()
    assert f"\n{heading}\n" in text, f"{document} has no heading {heading!r}"
    section = re.split(r"\n## ", text.split(f"\n{heading}\n", 1)[1], maxsplit=1)[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    assert len(lines) > 2, f"{document}: no table under {heading!r}"
    cells = [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in lines]
    return [dict(zip(cells[0], row)) for row in cells[2:]]

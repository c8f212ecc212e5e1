"""Keep the pages within :data:`WIDTH` columns: ``python docs/wrap.py [--check]``.

Paragraphs and list items with a longer line are broken anew; a table with a cell of more than :data:`CELL` becomes a
list.  Code, links and tables below a line ``<!-- made by ... -->`` stay as they are.  A page without long lines is not
touched.
"""

from __future__ import annotations

import re
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

__all__ = ["CELL", "WIDTH", "pages", "too_long", "wrapped"]

WIDTH = 128
CELL = 180
_ROOT = Path(__file__).resolve().parents[1]
_FENCE = re.compile(r"^\s*(```|~~~)")
_ITEM = re.compile(r"^(\s*)([*+-]|\d+\.)(\s+)")
_OTHER = re.compile(r"^\s*(#|<|!\[|\[[^\]]+\]: |>|---|===|\|)")
_BREAKABLE = ("text", "item", "table")
_STICKY = "\0"  # a space at which no line may end
_MARKER = re.compile(r" (?=([*+#>=|-]|\d+\.)( |$))")  # what would begin a list, a heading or a table


def pages() -> list[Path]:
    """Those written by hand."""
    found = [*_ROOT.glob("*.md"), *(_ROOT / "docs").rglob("*.md")]
    return sorted(path for path in found if "reference" not in path.relative_to(_ROOT).parts)


def too_long(text: str) -> list[int]:
    """Numbers of lines that :func:`wrapped` would break."""
    return [number for number, line, kind in _kinds(text) if kind in _BREAKABLE and _is_long(line, kind)]


def wrapped(text: str) -> str:
    """The page again; the same if it is within the width."""
    out: list[str] = []
    block: list[str] = []
    last = ""

    def flush() -> None:
        if last in _BREAKABLE and any(_is_long(line, last) for line in block):
            block[:] = _as_list(block) if last == "table" else _broken(block)
        out.extend(block)
        block.clear()

    for _, line, kind in _kinds(text):
        goes_on = last == "item" and kind == "text"
        if not goes_on and (kind != last or kind in ("item", "code", "other", "blank")):
            flush()
            last = kind
        block.append(line)
    flush()
    return "\n".join(out) + "\n"


def _is_long(line: str, kind: str) -> bool:
    if kind == "table":
        return any(len(cell) > CELL for cell in _cells(line))
    return len(line) > WIDTH and " " in line.strip()


def _kinds(text: str) -> Iterator[tuple[int, str, str]]:
    """Line numbers, lines and what each is: code, blank, table, item (its first line), other (never broken) or text."""
    fenced = made = False
    hanging, before = 0, "blank"
    for number, line in enumerate(text.splitlines(), 1):
        indent = len(line) - len(line.lstrip())
        item = _ITEM.match(line)
        if _FENCE.match(line):
            fenced = not fenced
            kind = "code"
        elif fenced:
            kind = "code"
        elif not line.strip():
            kind = "blank"
        elif before in ("blank", "code") and indent >= hanging + 4:
            kind = "code"
        elif line.lstrip().startswith("|") and before not in ("text", "item"):
            kind = "made" if made else "table"
        elif item:
            kind, hanging = "item", len(item[0])
        elif _OTHER.match(line):
            kind = "other"
        else:
            kind = "text"
        if kind in ("text", "other", "table", "code") and indent == 0 and before == "blank":
            hanging = 0
        made = line.startswith("<!-- made by ") or (made and kind in ("blank", "made"))
        before = kind
        yield number, line, kind


def _broken(lines: list[str]) -> list[str]:
    first = lines[0]
    item = _ITEM.match(first)
    start = item[0] if item else first[: len(first) - len(first.lstrip())]
    words = " ".join(line.strip() for line in [first[len(start) :], *lines[1:]])
    words = re.sub(r"`[^`]+`", lambda m: m[0].replace(" ", _STICKY) if len(m[0]) < WIDTH // 2 else m[0], words)
    words = _MARKER.sub(_STICKY, words)
    result = textwrap.wrap(
        words,
        WIDTH,
        initial_indent=start,
        subsequent_indent=" " * len(start),
        break_long_words=False,
        break_on_hyphens=False,
    )
    return [line.replace(_STICKY, " ") for line in result]


def _as_list(rows: list[str]) -> list[str]:
    indent = rows[0][: len(rows[0]) - len(rows[0].lstrip())]
    header, _, *body = (_cells(row) for row in rows)
    result: list[str] = []
    for first, *others in body:
        named = zip(header[1:], others, strict=False)
        said = [cell if len(header) == 2 or not name else f"_{name}_: {cell}" for name, cell in named if cell]
        head = first if first.startswith(("`", "**", "[")) or not first else f"**{first}**"
        line = f"{indent}* {head}{': ' if head and said else ''}{'; '.join(said)}"
        result += _broken([line])
    return result


def _cells(row: str) -> list[str]:
    cells = re.split(r"(?<!\\)\|", row.strip().removeprefix("|").removesuffix("|"))
    return [cell.strip().replace("\\|", "|") for cell in cells]


def main() -> int:
    """Rewrite; with ``--check`` only name what is too long, exit status 1."""
    status = 0
    for path in pages():
        text = path.read_text(encoding="utf-8")
        if "--check" in sys.argv[1:]:
            for number in too_long(text):
                print(f"{path.relative_to(_ROOT)}:{number}: longer than {WIDTH} columns: python docs/wrap.py")
                status = 1
        elif (new := wrapped(text)) != text:
            path.write_text(new, encoding="utf-8")
            print(path.relative_to(_ROOT))
    return status


if __name__ == "__main__":
    sys.exit(main())

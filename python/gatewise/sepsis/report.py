"""The report: one HTML page that needs nothing else, and beside it the tables as CSV and the figures as PNG and SVG.

`Page` is built block by block, and each block is rendered as it is added: what fails, fails before anything is
written.
"""

from __future__ import annotations

import base64
import csv
import fnmatch
import html
import io
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..layers import write_whole
from . import figures

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INDEX = "index.html"
FOLDERS = {"tables": ("*.csv",), "figures": ("*.png", "*.svg")}
KEPT = "models"  # the study's own folder: left alone
# The report of 0.1, and what a killed process leaves of a file: deleted when a report is written.
STALE = ("table.csv", "roc_pr.png", "calibration.png", "learning_curves.png", "patient.png", f"{INDEX}.*.tmp")
PHONE = 600  # CSS pixels up to which the narrow form of a figure is shown
VECTOR = 150_000  # bytes up to which a picture goes into the page as SVG; else as PNG
MISSING = "–"

Draw = Callable[..., "Figure"]


class Page:
    """A report in the making.

    page = Page("Sepsis, hour by hour", ["What this is."])
    page.section("Memory", ["An RNN forgets exponentially."])
    page.figure("memory", partial(figures.memory, groups), "Influence of the past.", "Two panels of curves: ...")
    page.table("auroc", rows, "Area under the ROC curve.", formats={"seconds": ".1f"})
    page.write("report")

    All text is escaped; an address (https://...) in it becomes a link.
    """

    def __init__(self, title: str, lead: Iterable[str] = ()) -> None:
        self.title = title
        self.files: dict[str, bytes] = {}
        self._lead = [_paragraph(text) for text in lead]
        self._chapters: list[tuple[str, str]] = []  # anchor, title
        self._body: list[str] = []
        self._shown = {"table": 0, "figure": 0}

    # -- blocks ----------------------------------------------------------------------------------------------

    def section(self, title: str, paragraphs: Iterable[str] = ()) -> None:
        """Begins a chapter; what is added next stands in it."""
        anchor = f"chapter-{len(self._chapters) + 1}"
        self._body += ["</section>"] if self._chapters else []
        self._chapters.append((anchor, title))
        self._body.append(f'<section aria-labelledby="{anchor}">\n<h2 id="{anchor}">{_text(title)}</h2>')
        self.text(*paragraphs)

    def text(self, *paragraphs: str) -> None:
        self._body += [_paragraph(text) for text in paragraphs]

    def items(self, entries: Iterable[str]) -> None:
        """A list."""
        self._body.append("<ul>\n" + "\n".join(f"<li>{_text(entry)}</li>" for entry in entries) + "\n</ul>")

    def command(self, text: str) -> None:
        """What to type, as it is."""
        self._body.append(f"<pre><code>{html.escape(text)}</code></pre>")

    def table(
        self,
        name: str,
        rows: Sequence[Mapping[str, Any]],
        caption: str,
        note: str = "",
        formats: Mapping[str, str] | None = None,
    ) -> None:
        """A table, and tables/NAME.csv with its numbers unrounded.

        Args:
            rows: dicts of the same columns; the first column is what a row is about. None is an empty field. Columns
                "x low" and "x high" beside one "x" are its interval, and in the page one column with it.
            formats: column -> format; else ",", or ".3f" of a float.

        Raises:
            ValueError: no rows, rows of other columns, or a name taken or unfit for a file.
        """
        if not rows or any(list(row) != list(rows[0]) for row in rows):
            raise ValueError(f"table {name}: expected one or more rows, all with the columns of the first")
        self._add(f"tables/{_fit(name)}.csv", _csv(rows))
        number = self._count("table")
        columns = _shown(rows, formats or {})
        wordy = {column for row in rows for column, value in row.items() if isinstance(value, str)}
        words = [' class="words"' if column in wordy else "" for column in columns]
        head = "".join(f'<th scope="col"{kind}>{_text(column)}</th>' for kind, column in zip(words, columns))
        lines = []
        for first, *others in zip(*columns.values()):
            cells = "".join(f"<td{kind}>{_text(text)}</td>" for kind, text in zip(words[1:], others))
            lines.append(f'<tr><th scope="row">{_text(first)}</th>{cells}</tr>')
        body = "\n".join(lines)
        self._body.append(
            f'<div class="box" tabindex="0" role="region" aria-labelledby="{number}">\n<table>\n'
            f'<caption id="{number}">{_text(_numbered(number, caption))}</caption>\n'
            f"<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table>\n</div>"
        )
        if note:
            self._body.append(f'<p class="note">{_text(note)}</p>')

    def figure(self, name: str, draw: Draw, caption: str, alt: str) -> None:
        """A figure: figures/NAME.png and .svg, and in the page in two forms, of which a narrow window shows the narrow.

        Args:
            draw: called as draw(width=inches), twice; `functools.partial` of a function of `figures`.
            alt: what the figure shows, for who cannot see it.

        Raises:
            ValueError: no alt, or a name taken or unfit for a file. What `draw` raises.
        """
        if not alt:
            raise ValueError(f"figure {name}: expected an alt text; got none")
        wide, narrow = draw(width=figures.WIDE), draw(width=figures.NARROW)
        for form in ("png", "svg"):
            self._add(f"figures/{_fit(name)}.{form}", figures.save(wide, form))
        number = self._count("figure")
        self._body.append(
            f'<figure id="{number}">\n<picture>'
            f'<source media="(max-width: {PHONE}px)" srcset="{_inline(narrow)}" {_size(narrow)}>'
            f'<img src="{_inline(wide)}" {_size(wide)} alt="{html.escape(alt)}"></picture>\n'
            f"<figcaption>{_text(_numbered(number, caption))}</figcaption>\n</figure>"
        )

    def _count(self, kind: str) -> str:
        self._shown[kind] += 1
        return f"{kind}-{self._shown[kind]}"

    def _add(self, path: str, content: bytes) -> None:
        if path in self.files:
            raise ValueError(f"{path}: expected a name of its own; there is one already")
        self.files[path] = content

    # -- the whole -------------------------------------------------------------------------------------------

    def html(self) -> str:
        """The page: no script, and nothing that is loaded from elsewhere."""
        links = "\n".join(f'<li><a href="#{anchor}">{_text(title)}</a></li>' for anchor, title in self._chapters)
        body = [
            f"<header>\n<h1>{_text(self.title)}</h1>", *self._lead, "</header>",
            f'<nav aria-label="Chapters">\n<ol>\n{links}\n</ol>\n</nav>' if len(self._chapters) > 1 else "",
            "<main>", *self._body, "</section>" if self._chapters else "", "</main>",
        ]  # fmt: skip
        return (
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f"<title>{html.escape(self.title)}</title>\n<style>{CSS}</style>\n</head>\n<body>\n"
            + "\n".join(filter(None, body))
            + "\n</body>\n</html>\n"
        )

    def write(self, folder: str | Path) -> Path:
        """Writes the report and returns its folder.

        File by file, each whole or not at all, the page last; then what an earlier report left is deleted. `models`
        stays as it is.

        Raises:
            FileExistsError: the folder holds something that is no report.
        """
        folder = Path(folder)
        check_folder(folder)
        page = self.html().encode()
        for part in FOLDERS:
            (folder / part).mkdir(parents=True, exist_ok=True)
        for path, content in {**self.files, INDEX: page}.items():
            write_whole(folder / path, content)
        earlier = [path for part in ("", *FOLDERS) for path in (folder / part).iterdir() if path.is_file()]
        for file in earlier:
            if file.relative_to(folder).as_posix() not in {*self.files, INDEX}:
                file.unlink()
        return folder


def check_folder(folder: Path) -> None:
    """Raises FileExistsError when a report would delete anything that is not part of a report."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise FileExistsError(f"{folder}: expected a folder to write the report to; it is a file")
    strangers = sorted(path.relative_to(folder).as_posix() for path in _strangers(folder))
    if strangers:
        raise FileExistsError(
            f"{folder}: expected an empty folder or an earlier report to replace; it holds {strangers[0]}"
        )


def _strangers(folder: Path) -> Iterator[Path]:
    for path in folder.iterdir():
        if path.is_dir() and path.name in FOLDERS:
            ours = [one for pattern in FOLDERS[path.name] for one in (pattern, f"{pattern}.*.tmp")]
            yield from (file for file in path.iterdir() if file.is_dir() or not _is(file.name, ours))
        elif not (path.name == KEPT if path.is_dir() else _is(path.name, (INDEX, *STALE))):
            yield path


def _is(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


# -- words, numbers, pictures --------------------------------------------------------------------------------

ADDRESS = re.compile(r"(https?://[^\s<>\"'()]*[^\s<>\"'().,;:])")


def _text(text: str) -> str:
    """Escaped, addresses made links."""
    parts = [html.escape(part) for part in ADDRESS.split(text)]  # every second one is an address
    parts[1::2] = [f'<a href="{part}">{part}</a>' for part in parts[1::2]]
    return "".join(parts)


def _paragraph(text: str) -> str:
    return f"<p>{_text(text)}</p>"


def _numbered(number: str, caption: str) -> str:
    """table-3 and its caption -> "Table 3. The caption"."""
    return f"{number.replace('-', ' ').capitalize()}. {caption}"


def _shown(rows: Sequence[Mapping[str, Any]], formats: Mapping[str, str]) -> dict[str, list[str]]:
    """column -> its fields as text, with the ends of an interval in the column of their value."""
    columns = {column: [_number(row[column], formats.get(column)) for row in rows] for column in rows[0]}
    for column in rows[0]:
        ends = f"{column} low", f"{column} high"
        if all(end in columns for end in ends):
            low, high = ([_number(row[end], formats.get(column)) for row in rows] for end in ends)
            columns[column] = [
                value if MISSING in (a, b) else f"{value} ({a} to {b})"
                for value, a, b in zip(columns[column], low, high)
            ]
            del columns[ends[0]], columns[ends[1]]
    return columns


def _number(value: Any, form: str | None) -> str:
    if value is None or (isinstance(value, (float, np.floating)) and math.isnan(value)):
        return MISSING
    if isinstance(value, (float, np.floating)):
        return format(value, form or ".3f").replace("inf", "∞")
    if isinstance(value, (int, np.integer)) and not isinstance(value, bool):
        return format(value, form or ",")
    return str(value)


def _csv(rows: Sequence[Mapping[str, Any]]) -> bytes:
    file = io.StringIO()
    writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue().encode()


def _fit(name: str) -> str:
    if not re.fullmatch(r"[a-z0-9_]+", name):
        raise ValueError(f"name: expected small letters, digits and _, for a file; got {name!r}")
    return name


def _size(figure: Figure) -> str:
    """Both forms of a picture are shown in the size of the figure, and the page has its room before it is drawn."""
    width, height = 96 * figure.get_size_inches()
    return f'width="{width:.0f}" height="{height:.0f}"'


def _inline(figure: Figure) -> str:
    """The figure as the address of an image: as SVG, sharp at any size, where that is not too long."""
    content, kind = figures.save(figure, "svg"), "svg+xml"
    if len(content) > VECTOR:
        content, kind = figures.save(figure, "png"), "png"
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


CSS = """
:root { color-scheme: light dark; --ink: #1b1b1b; --soft: #595959; --paper: #ffffff; --rule: #cccccc; --band: #f3f3f3;
  --link: #005a9c; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e4e4; --soft: #a8a8a8; --paper: #17191c; --rule: #4a4a4a; --band: #222529; --link: #7db8e8; } }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; text-size-adjust: 100%; }
body { margin: 0 auto; max-width: 70rem; padding: 1rem 1rem 4rem; background: var(--paper); color: var(--ink);
  font: 1.0625rem/1.55 system-ui, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; overflow-wrap: break-word; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 1rem 0; }
h2 { font-size: 1.4rem; line-height: 1.25; margin: 3rem 0 .75rem; padding-top: .75rem;
  border-top: 1px solid var(--rule); }
p, li { max-width: 44rem; }
header p { font-size: 1.125rem; }
a { color: var(--link); }
nav ol { padding-left: 1.5rem; }
pre { overflow-x: auto; padding: .75rem 1rem; background: var(--band); font-size: .9rem; line-height: 1.4; }
figure { margin: 1.75rem 0; }
figure img { display: block; max-width: 100%; height: auto; background: #ffffff; }
figcaption, caption { font-size: .95rem; line-height: 1.4; text-align: left; padding: .5rem 0; }
figcaption { max-width: 44rem; }
.note { margin-top: .5rem; font-size: .95rem; line-height: 1.4; color: var(--soft); }
.box { overflow-x: auto; margin-top: 1.75rem; }
.box:focus-visible { outline: 2px solid var(--link); }
table { border-collapse: collapse; font-size: .85rem; line-height: 1.35; font-variant-numeric: tabular-nums; }
caption { max-width: min(44rem, calc(100vw - 2rem)); }
th, td { padding: .3rem .5rem; text-align: right; vertical-align: top; white-space: nowrap; }
thead th { vertical-align: bottom; white-space: normal; border-bottom: 2px solid var(--ink); }
tbody tr { border-bottom: 1px solid var(--rule); }
th:first-child { text-align: left; padding-left: 0; position: sticky; left: 0; background: var(--paper); }
tbody th { font-weight: 500; }
.words { text-align: left; }
td.words { white-space: normal; min-width: 8rem; }
@media (max-width: 600px) {
  tbody th { white-space: normal; }
  h1 { font-size: 1.6rem; } }
@media print {
  :root { --ink: #000000; --soft: #333333; --paper: #ffffff; --rule: #999999; --link: #000000; }
  body { max-width: none; padding: 0; font-size: 10.5pt; }
  nav { display: none; }
  h2, caption { break-after: avoid; }
  figure, tr { break-inside: avoid; }
  .box { overflow: visible; }
  table { font-size: 8.5pt; }
}
"""

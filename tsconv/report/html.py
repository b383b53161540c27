"""What the pages of reports are made with: templates, and figures as elements of a page."""

from __future__ import annotations

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from tsconv.report.style import Plot
from tsconv.report.tables import percent, printable


def environment(*folders: Path) -> Environment:
    """Of the templates in `folders` and here. Texts are printed as HTML shows them, whatever they hold: escaped, and
    without characters that it forbids."""
    found = Environment(
        loader=FileSystemLoader([*folders, Path(__file__).parent]),
        autoescape=True,
        finalize=lambda value: printable(value) if type(value) is str else value,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    found.filters |= {"percent": percent, "thousands": "{:,}".format}
    return found


def shown(plot: Plot) -> dict[str, str]:
    """The figure for a template; matplotlib has escaped its texts."""
    svg = plot.svg[plot.svg.index("<svg") :].strip()
    element = Markup('<svg role="img" aria-label="{}"').format(plot.title) + Markup(svg.removeprefix("<svg"))
    return {"title": plot.title, "caption": plot.caption, "svg": element}

"""The page of a report: one HTML file that needs nothing else, neither script nor network."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from tsconv import __version__
from tsconv.report.style import Plot
from tsconv.report.summary import StatsSummary
from tsconv.report.tables import Table, percent, printable, tables

GENERATOR = "tsconv profile"  # in the page's <meta name="generator">: how a page of ours is known again

_STYLE = """
:root { color-scheme: light dark; --ink: #1c2024; --dim: #5c646c; --back: #fff; --card: #f5f6f8; --line: #d8dce0; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e8ea; --dim: #a2a9b0; --back: #15181b; --card: #1f2327; --line: #3a4046; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 72rem; padding: 2rem 1.2rem 4rem; background: var(--back); color: var(--ink);
  font: 16px/1.5 system-ui, "Segoe UI", "DejaVu Sans", sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .3rem; }
h2 { font-size: 1.2rem; margin: 2.6rem 0 .4rem; }
p, figcaption { max-width: 48rem; }
.dim, figcaption { color: var(--dim); font-size: .9rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1rem; margin: 1rem 0; font-size: .92rem; }
dt { color: var(--dim); } dd { margin: 0; }
code { font: .88em ui-monospace, "DejaVu Sans Mono", monospace; }
.tiles { display: flex; flex-wrap: wrap; gap: .7rem; margin: 1.4rem 0; padding: 0; list-style: none; }
.tiles li { background: var(--card); border: 1px solid var(--line); border-radius: 8px;
  padding: .6rem .9rem; min-width: 9rem; }
.tiles b { display: block; font-size: 1.45rem; line-height: 1.25; font-weight: 600; }
.tiles span { color: var(--dim); font-size: .85rem; }
figure { margin: 0; }
figure > div { background: #fff; border: 1px solid var(--line); border-radius: 8px; padding: .8rem; margin: .6rem 0; }
figure svg { display: block; max-width: 100%; height: auto; margin: 0 auto; }
.table { overflow: auto; max-height: 36rem; border: 1px solid var(--line); border-radius: 8px; }
table { border-collapse: collapse; font-size: .86rem; font-variant-numeric: tabular-nums; width: 100%;
  overflow-wrap: normal; }
th, td { text-align: right; padding: .22rem .6rem; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { position: sticky; top: 0; background: var(--card); font-weight: 600; }
.word { text-align: left; white-space: normal; min-width: 6rem; overflow-wrap: anywhere; }
tr:last-child td { border-bottom: 0; }
@media print {
  :root { --ink: #000; --dim: #444; --back: #fff; --card: #f0f0f0; --line: #bbb; color-scheme: light; }
  body { max-width: none; padding: 0; font-size: 10pt; }
  .table { overflow: visible; max-height: none; border: 0; }
  table { font-size: 7pt; } th { position: static; } th, td { padding: .1rem .25rem; white-space: normal; }
  .word { min-width: 0; }
  thead { display: table-header-group; } tr, figure, .tiles li { break-inside: avoid; } h2 { break-after: avoid; }
}
"""


def page(summary: StatsSummary, plots: Sequence[Plot], title: str | None = None) -> str:
    """The report as one HTML document.

    Args:
        summary: its numbers.
        plots: its figures, of the same statistics.
        title: of the page; None: the model's name.
    """
    subject = summary.subject
    heading = title or f"Activations of {subject.name or 'a model without a name'}"
    texts, *others = tables(summary)
    body = [
        f"<h1>{_text(heading)}</h1>",
        '<p class="dim">Which neurons of a dReLU model are on, how often, and on what text'
        " (<cite>Turbo Sparse</cite>, arXiv 2406.05955).</p>",
        _provenance(summary),
        _tiles(summary),
        _table(texts),
        *(_plot(plot) for plot in plots),
        *(_table(table) for table in others),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="generator" content="{GENERATOR} {__version__}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_text(heading)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(body)
        + "\n</body>\n</html>\n"
    )


def _text(text: str) -> str:
    """`text` as HTML shows it, whatever it holds."""
    return escape(printable(text))


def _provenance(summary: StatsSummary) -> str:
    subject = summary.subject
    experts = f", {subject.n_expert} experts, {subject.n_expert_used} per token" if subject.n_expert else ""
    function = {
        "predictor": "predictor: the activations of the model with its predictor's mask",
        "exact": "exact: every neuron computed, no predictor",
    }[subject.sparsity]
    rows = {
        "model": _text(subject.name),
        "fingerprint": f"<code>{_text(subject.fingerprint)}</code>",
        "shape": f"{subject.n_layer} layers, n_embd {subject.n_embd:,}, n_ff {subject.n_ff:,}{experts}",
        "sparsity": function,
        "tokens": f"{summary.n_tokens:,}",
        "made by": f"tsconv {_text(__version__)}",
    }
    return "<dl>" + "".join(f"<dt>{name}</dt><dd>{value}</dd>" for name, value in rows.items()) + "</dl>"


def _tiles(summary: StatsSummary) -> str:
    overall = summary.overall
    never = sum(layer.concentration.never for layer in summary.layers)
    neurons = sum(layer.concentration.neurons for layer in summary.layers)
    tiles = [(overall.active, "of the neurons are active"), (overall.gate_positive, "have gate > 0")]
    if summary.has_predictor:
        tiles.append((overall.predicted, "are predicted"))
        tiles.append((overall.recall, "of the active are predicted (recall)"))
        tiles.append((overall.precision, "of the predicted are active (precision)"))
    tiles.append((never / neurons, "were never active"))
    items = "".join(
        f"<li><b>{percent(share)}{'' if share is None else ' %'}</b><span>{escape(label)}</span></li>"
        for share, label in tiles
    )
    return f'<ul class="tiles">{items}</ul>'


def _plot(plot: Plot) -> str:
    svg = plot.svg[plot.svg.index("<svg") :]
    svg = svg.replace("<svg", f'<svg role="img" aria-label="{escape(plot.title)}"', 1)
    return (
        f"<h2>{escape(plot.title)}</h2>\n<figure><div>{svg.strip()}</div>\n"
        f"<figcaption>{escape(plot.caption)}</figcaption></figure>"
    )


def _table(table: Table) -> str:
    head = "".join(_cell("th", text, i in table.left) for i, text in enumerate(table.header))
    rows = "\n".join(
        "<tr>" + "".join(_cell("td", text, i in table.left) for i, text in enumerate(row)) + "</tr>"
        for row in table.rows
    )
    return (
        f'<h2>{escape(table.title)}</h2>\n<p class="dim">{escape(table.note)}</p>\n'
        f'<div class="table" tabindex="0"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}\n</tbody>\n'
        "</table></div>"
    )


def _cell(tag: str, text: str, word: bool) -> str:
    kind = ' class="word"' if word else ""
    return f"<{tag}{kind}>{_text(text)}</{tag}>"

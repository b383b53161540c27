"""The numbers of a report against the samples they come from; its page, figures and folder."""

from __future__ import annotations

import dataclasses
import io
import itertools
import math
import os
import re
import resource
import subprocess
import sys
import xml.etree.ElementTree as ET
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from support import TESTS
from support.sampled_stats import EDGES, Sample, sampled
from tsconv.errors import OutputError
from tsconv.report import figures
from tsconv.report.figures import NAMES
from tsconv.report.summary import CURVE, Activity, Concentration, hot_size, labels, summarise_stats
from tsconv.report.tables import tables
from tsconv.report.write import PAGE, check_writable, write_report
from tsconv.stats.counts import Counts, Source, Stats

CASES = [
    {"n_expert": n_expert, "sparsity": sparsity, "n_texts": n_texts, "seed": seed}
    for seed, (n_expert, sparsity, n_texts) in enumerate(itertools.product((0, 4), ("predictor", "exact"), (1, 3)))
]


@pytest.fixture(params=CASES, ids=lambda case: "-".join(map(str, case.values())))
def case(request: pytest.FixtureRequest) -> tuple[Stats, list[Sample]]:
    return sampled(**request.param)


# ---- numbers, from their definitions


def share(some: Iterable[object], of: Iterable[object]) -> float | None:
    count, whole = len(list(some)), len(list(of))
    return count / whole if whole else None


def expected_activity(samples: list[Sample], sparsity: str) -> dict[str, float | None]:
    active = [s for s in samples if s.active]
    predicted = [s for s in samples if s.predicted]
    found = [s for s in predicted if s.active]
    numbers = {
        "tokens": len({(s.text, s.token, s.layer, s.ffn) for s in samples}),
        "gate_positive": share((s for s in samples if s.gate > 0), samples),
        "up_positive": share((s for s in samples if s.up > 0), samples),
        "active": share(active, samples),
        "predicted": share(predicted, samples),
        "predicted_gate": share((s for s in predicted if s.gate > 0), samples),
        "predicted_active": share(found, samples),
        "recall": share(found, active),
        "precision": share(found, predicted),
    }
    of_predictor = ("predicted", "predicted_gate", "predicted_active", "recall", "precision")
    return numbers | (dict.fromkeys(of_predictor) if sparsity == "exact" else {})


def check_activity(found: Activity, samples: list[Sample], stats: Stats) -> None:
    assert dataclasses.asdict(found) == expected_activity(samples, stats.subject.sparsity)


def activations(samples: list[Sample]) -> Counter[tuple[int, int]]:
    """(FFN, neuron) -> how often it was active."""
    return Counter((s.ffn, s.neuron) for s in samples if s.active)


def hottest(counts: Counter[tuple[int, int]]) -> list[tuple[int, int]]:
    """The fewest neurons that make 80 %, added one by one; equally active ones in the checkpoint's order."""
    whole, taken = sum(counts.values()), 0
    chosen: list[tuple[int, int]] = []
    for neuron in sorted(counts, key=lambda neuron: (-counts[neuron], neuron)):
        if taken >= whole * 8 / 10:
            break
        chosen.append(neuron)
        taken += counts[neuron]
    return chosen


def check_concentration(found: Concentration, samples: list[Sample], neurons: int) -> None:
    counts = activations(samples)
    assert (found.neurons, found.never) == (neurons, neurons - len(counts))
    assert found.hot == (pytest.approx(len(hottest(counts)) / neurons) if counts else None)


def test_activity(case: tuple[Stats, list[Sample]]) -> None:
    stats, samples = case
    summary = summarise_stats(stats)
    assert summary.n_tokens == len({(s.text, s.token) for s in samples})
    check_activity(summary.overall, samples, stats)
    for n, layer in enumerate(summary.layers):
        check_activity(layer.activity, [s for s in samples if s.layer == n], stats)
    for i, text in enumerate(summary.texts):
        check_activity(text.activity, [s for s in samples if s.text == i], stats)


def test_experts(case: tuple[Stats, list[Sample]]) -> None:
    stats, samples = case
    for n, layer in enumerate(summarise_stats(stats).layers):
        assert len(layer.experts) == stats.subject.n_expert
        of_layer = [s for s in samples if s.layer == n]
        calls = {(s.text, s.token, s.ffn) for s in of_layer}
        shares = []
        for e, expert in enumerate(layer.experts):
            of_expert = [s for s in of_layer if s.ffn == e]
            check_activity(expert.activity, of_expert, stats)
            check_concentration(expert.concentration, of_expert, stats.subject.n_ff)
            shares.append(sum(call[2] == e for call in calls) / len(calls))
            assert expert.routed == pytest.approx(shares[-1])
        if shares:
            entropy = -sum(p * math.log(p) for p in shares if p) / math.log(len(shares))
            assert layer.routing_entropy == pytest.approx(entropy)
        else:
            assert layer.routing_entropy is None


def test_expert_without_tokens() -> None:
    idle = summarise_stats(sampled(n_expert=4)[0]).layers[0].experts[3]
    assert idle.routed == 0
    assert set(dataclasses.asdict(idle.activity).values()) == {0, None}
    assert idle.concentration == Concentration(11, 11, None)


def test_concentration_and_curve(case: tuple[Stats, list[Sample]]) -> None:
    stats, samples = case
    neurons = stats.subject.n_ffn * stats.subject.n_ff
    for n, layer in enumerate(summarise_stats(stats).layers):
        of_layer = [s for s in samples if s.layer == n]
        check_concentration(layer.concentration, of_layer, neurons)
        counts = sorted(activations(of_layer).values(), reverse=True) + [0] * neurons
        for at, found in zip(CURVE, layer.curve, strict=True):
            whole = math.floor(at * neurons + 1e-9)  # and a part of the next neuron
            expected = sum(counts[:whole]) + (at * neurons - whole) * counts[whole]
            assert found == pytest.approx(expected / sum(counts), abs=1e-12)


def test_hot_size_at_the_boundary() -> None:
    """80 of 100 is 80 %, 79 of 99 is less, nothing is none."""
    assert hot_size(np.array([5, 80, 15])) == 1
    assert hot_size(np.array([79, 20, 1])) == 2
    assert hot_size(np.array([10] * 10)) == 8
    assert hot_size(np.array([0, 0])) is None


def test_quantiles_within_a_bin(case: tuple[Stats, list[Sample]]) -> None:
    stats, samples = case
    for n, layer in enumerate(summarise_stats(stats).layers):
        of_layer = [s for s in samples if s.layer == n]
        for name, values in (
            ("gate", [abs(s.gate) for s in of_layer]),
            ("up", [abs(s.up) for s in of_layer]),
            ("combined", [s.product for s in of_layer]),
        ):
            spread = layer.spreads[name]
            there = sorted(value for value in values if value >= EDGES[0])
            assert spread.values == len(values)
            assert spread.below == pytest.approx(1 - len(there) / len(values))
            assert spread.above == 0
            for quantile, found in ((0.5, spread.median), (0.9, spread.p90), (0.99, spread.p99)):
                exact = there[math.ceil(quantile * len(there)) - 1]
                k = bisect_right(EDGES, exact)
                assert found is not None and abs(found - exact) <= EDGES[k] - EDGES[k - 1]


def test_quantiles_beyond_the_bins() -> None:
    stats, _ = sampled(n_layer=1)
    histograms = stats.parts[0].counts.histograms
    histograms[:] = 0
    histograms[0, 0, -1] = 7
    histograms[0, 1, 0] = 7
    gate, up, combined = (summarise_stats(stats).layers[0].spreads[name] for name in ("gate", "up", "combined"))
    assert (gate.above, gate.median, gate.p99) == (1, 4096, 4096)
    assert (up.below, up.median, up.p99) == (1, None, None)
    assert (combined.values, combined.below, combined.median) == (0, None, None)


def test_overlaps(case: tuple[Stats, list[Sample]]) -> None:
    stats, samples = case
    summary = summarise_stats(stats)
    n_texts = len(stats.parts)
    assert [(o.first, o.second) for o in summary.overlaps] == list(itertools.combinations(range(n_texts), 2))
    for overlap in summary.overlaps:
        for n in range(stats.subject.n_layer):
            a, b = (
                activations([s for s in samples if (s.layer, s.text) == (n, text)])
                for text in (overlap.first, overlap.second)
            )
            hot_a, hot_b = set(hottest(a)), set(hottest(b))
            assert overlap.jaccard[n] == pytest.approx(len(hot_a & hot_b) / len(hot_a | hot_b))
            assert overlap.second_covered[n] == pytest.approx(sum(b[i] for i in hot_a) / sum(b.values()))
            assert overlap.first_covered[n] == pytest.approx(sum(a[i] for i in hot_b) / sum(a.values()))


def test_a_text_overlaps_itself() -> None:
    stats, _ = sampled(seed=5)
    (part,) = stats.parts
    twin = dataclasses.replace(part, source=Source("twin", "", "", 16, "q4_0"))
    (overlap,) = summarise_stats(Stats(stats.subject, (part, twin))).overlaps
    assert overlap.jaccard == (1, 1)
    assert all(share is not None and share >= 0.8 for share in (*overlap.second_covered, *overlap.first_covered))


def empty(n_expert: int, n_texts: int = 1) -> Stats:
    """Statistics that have seen nothing."""
    stats, _ = sampled(n_expert=n_expert, n_texts=n_texts)
    parts = (dataclasses.replace(part, n_tokens=0, counts=Counts.zeros(stats.subject)) for part in stats.parts)
    return Stats(stats.subject, tuple(parts))


def test_nothing_counted() -> None:
    summary = summarise_stats(empty(4, 2))
    assert summary.overall == Activity(0, *[None] * 8)
    assert summary.layers[0].curve == () and summary.layers[0].routing_entropy is None
    assert summary.overlaps[0].jaccard == (None, None)
    assert "nan" not in str(summary.as_dict()).lower()


def test_labels_tell_texts_apart() -> None:
    first = Source("wiki", "en", "", 512, "q4_0")
    assert labels([first]) == ["wiki"]
    assert labels([first, Source("c4", "en", "", 512, "q4_0")]) == ["wiki", "c4"]
    assert labels([first, dataclasses.replace(first, config="de")]) == ["wiki en", "wiki de"]
    several = [first, dataclasses.replace(first, chunk=64), dataclasses.replace(first, outtype="f16")]
    assert len(set(labels(several))) == 3


# ---- the page and its figures


class Page(HTMLParser):
    """Checks that every tag is closed in order, and gathers what the page loads, shows and names."""

    VOID = frozenset({"meta", "br", "link", "img", "input", "hr"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: Counter[str] = Counter()
        self.loads: list[str] = []
        self.ids: Counter[str] = Counter()
        self.tables: list[list[list[str]]] = []
        self.styles: list[str] = []
        self.shown: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        for name, value in attrs:
            assert not name.startswith("on")
            if name in ("src", "href", "xlink:href", "data", "action", "srcset", "poster"):
                self.loads.append(value or "")
            if name == "id":
                self.ids[value or ""] += 1
            if name == "style":
                self.styles.append(value or "")
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "style":
            self.styles.append(data)
            return
        self.shown.append(data)
        if self.open and self.open[-1] in ("td", "th"):
            self.tables[-1][-1][-1] += data


def check_page(path: Path) -> Page:
    """A page that is well-formed and loads nothing: no script, no address, no import."""
    page = Page(path.read_text(encoding="utf-8"))
    assert not {"script", "link", "img", "iframe", "object", "embed", "base"} & set(page.tags)
    assert all(re.match(r"#|data:image/png;base64,", load) for load in page.loads)
    assert not re.search(r"@import|url\((?!#)", "\n".join(page.styles))
    assert set(page.ids.values()) <= {1}
    assert {load[1:] for load in page.loads if load[0] == "#"} <= set(page.ids)
    return page


def expected_names(stats: Stats) -> list[str]:
    names = ["sparsity", "distributions", "concentration"]
    names += ["predictor"] if stats.subject.sparsity == "predictor" else []
    names += ["routing"] if stats.subject.n_expert else []
    return names + (["overlap"] if len(stats.parts) > 1 else [])


def check_report(stats: Stats, directory: Path) -> Page:
    written = write_report(stats, directory)
    names = expected_names(stats)
    assert set(names) <= set(NAMES)
    assert {path.name for path in written} == {PAGE, *(f"{n}.{kind}" for n in names for kind in ("svg", "png"))}
    assert sorted(os.listdir(directory)) == sorted(path.name for path in written)
    assert written[0] == directory / PAGE
    for name in names:
        root = ET.parse(directory / f"{name}.svg").getroot()
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        assert len(list(root.iter("{http://www.w3.org/2000/svg}path"))) > 5
        with Image.open(io.BytesIO((directory / f"{name}.png").read_bytes())) as image:
            image.load()
            assert min(image.size) > 300
            colours = image.convert("RGB").getcolors(maxcolors=1 << 20)
        assert colours is not None and len(colours) > 20
    page = check_page(directory / PAGE)
    assert page.tags["svg"] == len(names)
    return page


@pytest.mark.parametrize(
    ("n_expert", "sparsity", "n_texts"), [(0, "predictor", 3), (0, "exact", 1), (4, "predictor", 2), (4, "exact", 3)]
)
def test_report(n_expert: int, sparsity: str, n_texts: int, tmp_path: Path) -> None:
    stats, _ = sampled(n_expert, sparsity, n_texts)
    page = check_report(stats, tmp_path / "new" / "report")
    expected = [[list(table.header), *map(list, table.rows)] for table in tables(summarise_stats(stats))]
    assert page.tables == expected
    shown = "".join(page.shown)
    for part in (stats.subject.name, stats.subject.fingerprint, *(part.source.dataset for part in stats.parts)):
        assert part in shown


@pytest.mark.parametrize(("n_layer", "n_expert"), [(1, 0), (1, 1), (60, 70)])
def test_report_of_unusual_shapes(n_layer: int, n_expert: int, tmp_path: Path) -> None:
    check_report(sampled(n_expert, n_texts=2, n_layer=n_layer, n_ff=3, n_tokens=2)[0], tmp_path)


@pytest.mark.parametrize(("n_expert", "n_texts"), [(0, 1), (4, 3)])
@pytest.mark.filterwarnings("error")
def test_report_of_nothing(n_expert: int, n_texts: int, tmp_path: Path) -> None:
    check_report(empty(n_expert, n_texts), tmp_path)


def lines(figure: Figure, panel: int = 0) -> dict[str, list[float]]:
    """Label -> y of the lines of one panel."""
    return {str(line.get_label()): list(line.get_ydata()) for line in figure.axes[panel].lines}


def test_figures_show_the_numbers() -> None:
    stats, _ = sampled(n_expert=4, n_texts=2, n_layer=3)
    summary = summarise_stats(stats)
    layers = summary.layers
    drawn = lines(figures.sparsity(summary)) | lines(figures.predictor(summary))
    for label, field in (
        ("gate > 0", "gate_positive"),
        ("up > 0", "up_positive"),
        ("active: both", "active"),
        ("predicted", "predicted"),
        ("predicted and active", "predicted_active"),
        ("recall", "recall"),
        ("precision", "precision"),
    ):
        assert drawn[label] == pytest.approx([100 * getattr(layer.activity, field) for layer in layers])
    (overlap,) = summary.overlaps
    assert lines(figures.overlap(summary))["Jaccard index"] == pytest.approx([100 * x for x in overlap.jaccard])
    (mesh,) = figures.routing(summary).axes[0].collections
    assert mesh.get_array().tolist() == [
        pytest.approx([100 * expert.routed for expert in layer.experts]) for layer in layers
    ]
    curves = [line for line in figures.concentration(summary).axes[0].lines if len(line.get_ydata()) == len(CURVE)]
    assert [line.get_ydata().tolist() for line in curves] == [
        pytest.approx([100 * y for y in layer.curve]) for layer in layers
    ]


def test_heat_maps_of_many_texts() -> None:
    summary = summarise_stats(sampled(n_texts=3)[0])
    jaccard, covered = (axes.collections[0].get_array() for axes in figures.overlap(summary).axes[:2])
    for overlap in summary.overlaps:
        a, b = overlap.first, overlap.second
        assert jaccard[a, b] == jaccard[b, a] == pytest.approx(50 * sum(overlap.jaccard))
        assert covered[a, b] == pytest.approx(50 * sum(overlap.second_covered))
        assert covered[b, a] == pytest.approx(50 * sum(overlap.first_covered))
    assert all(jaccard.mask[i, i] and covered.mask[i, i] for i in range(3))


def test_distributions_are_densities() -> None:
    """Under each line, over log2 of the magnitude, lie all values that are not below the bins."""
    stats, _ = sampled(n_layer=2)
    widths = np.log2(np.array(EDGES[1:]) / EDGES[:-1])
    for axes in figures.distributions(stats).axes[:3]:
        assert [float((line.get_ydata() * widths).sum()) for line in axes.lines] == pytest.approx([100, 100])


HOSTILE = [
    "<script>alert(1)</script>",
    "\"'><img src=http://example.org/x onerror=alert(1)>",
    "&lt;b&gt; ]]> --> <!-- </text></svg></table>",
    "$\\frac{1}{$ {braces} %s \x1b[31m\x00\n\u202e 日本語 \U0001f600",
    "x" * 5000,
]


def renamed(stats: Stats, names: list[str]) -> Stats:
    subject = dataclasses.replace(stats.subject, name=names[0], fingerprint=names[1])
    parts = (
        dataclasses.replace(part, source=Source(name, name, name, 16, name))
        for part, name in zip(stats.parts, names, strict=True)
    )
    return Stats(subject, tuple(parts))


def test_names_cannot_do_harm(tmp_path: Path) -> None:
    stats, _ = sampled(n_texts=5, n_ff=5, n_tokens=4)
    check_report(renamed(stats, HOSTILE), tmp_path)


@pytest.mark.parametrize("names", [HOSTILE[:2], HOSTILE[2:4]], ids=["html", "xml"])
def test_two_names_and_a_title_cannot_do_harm(names: list[str], tmp_path: Path) -> None:
    """Two texts are drawn with their names in a legend, more in a heat map."""
    stats, _ = sampled(n_texts=2, n_ff=5, n_tokens=4)
    write_report(renamed(stats, names), tmp_path, title=HOSTILE[0])
    assert HOSTILE[0] in check_page(tmp_path / PAGE).shown
    ET.parse(tmp_path / "overlap.svg")


def test_the_same_report_twice(tmp_path: Path) -> None:
    stats, _ = sampled(n_expert=4, n_texts=2)
    first, second = ([p.read_bytes() for p in write_report(stats, tmp_path / name)] for name in ("a", "b"))
    assert first == second


def test_settings_of_matplotlib_are_left_alone(tmp_path: Path) -> None:
    """In a process of its own: no pyplot, no setting changed, and a user's own setting neither used nor lost."""
    code = (
        "import sys, matplotlib, pathlib; from support.sampled_stats import sampled\n"
        "from tsconv.report.write import write_report\n"
        "def settings(): return {k: matplotlib.rcParams[k] for k in matplotlib.rcParams if k != 'backend'}\n"
        "matplotlib.rcParams['font.size'] = 31; before = settings()\n"
        "write_report(sampled()[0], pathlib.Path(sys.argv[1]))\n"
        "assert settings() == before and 'matplotlib.pyplot' not in sys.modules\n"
    )
    path = os.pathsep.join([str(TESTS), *sys.path])
    env = os.environ | {"PYTHONPATH": path}
    subprocess.run([sys.executable, "-W", "error", "-c", code, str(tmp_path / "a")], check=True, env=env, timeout=600)
    write_report(sampled()[0], tmp_path / "b")
    assert (tmp_path / "a" / "sparsity.svg").read_bytes() == (tmp_path / "b" / "sparsity.svg").read_bytes()


# ---- the folder


def refused(directory: Path, *parts: str) -> None:
    """Neither the check nor the report gets through, and both leave everything as it was."""
    top = next(path for path in (directory, *directory.parents) if path.is_dir())
    before = sorted(top.iterdir()) if top.name else []
    for attempt in (check_writable, lambda directory: write_report(sampled()[0], directory)):
        with pytest.raises(OutputError) as caught:
            attempt(directory)
        for part in (str(directory), *parts):
            assert part in str(caught.value)
        assert "\n" not in str(caught.value)
        assert (sorted(top.iterdir()) if top.name else []) == before


def test_a_file_in_its_place(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    refused(tmp_path / "file", "Not a directory")
    refused(tmp_path / "file" / "below", "Not a directory")
    assert (tmp_path / "file").read_text() == "mine"
    refused(tmp_path / "made" / ("n" * 300), "File name too long")


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs /proc, where nobody can make files")
def test_unwritable() -> None:
    for directory in (Path("/proc/self/fdinfo"), Path("/proc/self/fdinfo/report")):
        with pytest.raises(OutputError, match="no report can be written here"):
            check_writable(directory)
        with pytest.raises(OutputError, match="no report can be written here"):
            write_report(sampled()[0], directory)


def test_check_leaves_nothing(tmp_path: Path) -> None:
    check_writable(tmp_path / "a" / "b")
    check_writable(tmp_path)
    assert os.listdir(tmp_path) == []


def test_files_of_others_are_kept(tmp_path: Path) -> None:
    for name in (PAGE, "overlap.png"):
        path = tmp_path / name
        path.write_text("<!DOCTYPE html><title>mine</title>")
        with pytest.raises(OutputError, match=re.escape(f"{path}: not a file of a report")):
            check_writable(tmp_path)
        with pytest.raises(OutputError):
            write_report(sampled()[0], tmp_path)
        assert os.listdir(tmp_path) == [name]
        path.unlink()
    (tmp_path / "notes.txt").write_text("mine")
    write_report(sampled()[0], tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_an_older_report_is_replaced(tmp_path: Path) -> None:
    assert (tmp_path / "routing.svg") in write_report(sampled(n_expert=4, n_texts=2)[0], tmp_path)
    check_report(sampled(sparsity="exact")[0], tmp_path)
    (tmp_path / "sparsity.svg").unlink()
    (tmp_path / "sparsity.svg").mkdir()
    before = sorted(tmp_path.iterdir())
    with pytest.raises(OutputError, match=r"sparsity\.svg"):
        write_report(sampled()[0], tmp_path)
    assert sorted(tmp_path.iterdir()) == before


@pytest.fixture
def small_files_only() -> Iterator[None]:
    """No file can grow beyond 60 kB; the page and some pictures need more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.usefixtures("small_files_only")
def test_a_file_that_cannot_grow(tmp_path: Path) -> None:
    """The system refuses in the middle of the writing: nothing of the new report stays, everything of the old one."""
    for directory, left in ((tmp_path / "new" / "report", []), (tmp_path / "there", ["notes.txt"])):
        if left:
            directory.mkdir()
            (directory / "notes.txt").write_text("mine")
        with pytest.raises(OutputError, match="File too large"):
            write_report(sampled()[0], directory)
        assert not (tmp_path / "new").exists()
        assert not left or os.listdir(directory) == left

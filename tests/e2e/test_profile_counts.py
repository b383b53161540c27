"""`tsconv profile` counts what PyTorch counts: every neuron of the shipped checkpoints, f32 and f16, dense and MoE, in
chunks of any size, merged in any order. The counting here is written from the formulas, on checkpoints/reference.py."""

from __future__ import annotations

import itertools
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from reference import Reference

import tsconv
from support import CHECKPOINTS, tiny
from tsconv.commands import profile as profiling
from tsconv.stats import file as stats_file
from tsconv.stats.collect import collect
from tsconv.stats.counts import COUNTS, HISTOGRAMS, N_BINS, Stats, bin_edges

NAMES = ["tiny-turbosparse-mistral", "tiny-turbosparse-mixtral"]
TEXT_BYTES = 6000
# f32 sums in another order differ by less than this part of the sum of the terms' sizes; what is nearer to 0 than that
# may be counted either way.
NEAR = 3e-6


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "calibration.txt"
    path.write_bytes((CHECKPOINTS / "heldout.txt").read_bytes()[:TEXT_BYTES])
    return path


@cache
def tokens_of(name: str, text: Path) -> list[int]:
    model = tsconv.load(tiny.converted(name, "f32"), n_threads=1)
    tokens = model.tokenize(text.read_bytes(), add_bos=False, special=False)
    model.close()
    return tokens


def in_chunks(tokens: list[int], chunk: int) -> list[list[int]]:
    """Chunks that begin with token 1, the begin-of-text token of both checkpoints; the rest is dropped."""
    step = chunk - 1
    return [[1, *tokens[i : i + step]] for i in range(0, len(tokens) - step + 1, step)]


class Expected:
    """Counts of the reference over some chunks, int64: tokens [layer, ffn]; `plain` [count, layer, ffn, neuron], and
    `sure` and `possible`, which leave out or add the values within NEAR of 0.

    Attributes:
        magnitudes: sorted, [layer][histogram].
        undecided: whether a predictor's logit was near 0: f32 sums in another order may then give another mask, and
            all that follows from it.
    """

    def __init__(self, model: Reference, chunks: list[list[int]], sparsity: str) -> None:
        c = model.config
        shape = (len(COUNTS), c.n_layer, max(1, c.n_expert), c.n_ff)
        self.tokens = np.zeros(shape[1:3], np.int64)
        self.plain, self.sure, self.possible = (np.zeros(shape, np.int64) for _ in range(3))
        self.undecided = False
        seen: list[list[list[torch.Tensor]]] = [[[] for _ in HISTOGRAMS] for _ in range(c.n_layer)]
        inputs: dict[int, torch.Tensor] = {}
        position = {id(f): (n, e) for n, block in enumerate(model.model.layers) for e, f in enumerate(block.ffns)}
        hooks = [
            ffn.register_forward_pre_hook(lambda ffn, args: inputs.__setitem__(id(ffn), args[0]))
            for block in model.model.layers
            for ffn in block.ffns
        ]

        def relative(linear, x):
            """The product, and that over the sum of the sizes of its terms."""
            product = linear(x)
            return product, product / (x.abs() @ linear.weight.abs().T)

        def probe(ffn, p, gate, h, logit):
            n, e = position[id(ffn)]
            x = inputs[id(ffn)]
            (gate, gate_margin), (up, up_margin) = relative(ffn.gate_proj, x), relative(ffn.up_proj, x)
            on = torch.full_like(gate, torch.inf)
            if sparsity == "predictor":
                on = relative(ffn.predictor.fc2, ffn.predictor.fc1(p).clamp(min=0))[1]
                self.undecided |= bool((on.abs() < NEAR).any())
            both = torch.minimum(gate_margin, up_margin)
            self.tokens[n, e] += len(gate)
            margins = (gate_margin, up_margin, both, on, torch.minimum(on, gate_margin), torch.minimum(on, both))
            for k, margin in enumerate(margins):
                self.plain[k, n, e] += (margin > 0).sum(0).numpy()
                self.sure[k, n, e] += (margin > NEAR).sum(0).numpy()
                self.possible[k, n, e] += (margin > -NEAR).sum(0).numpy()
            for kind, value in enumerate((gate.abs(), up.abs(), gate.clamp(min=0) * up.clamp(min=0))):
                seen[n][kind].append(value.flatten())

        with torch.no_grad():
            for piece in chunks:
                model(torch.tensor(piece)[None], sparsity == "predictor", probe)
        for hook in hooks:
            hook.remove()
        self.magnitudes = [[torch.cat(values).sort().values.double().numpy() for values in kinds] for kinds in seen]


@cache
def reference(name: str) -> Reference:
    return Reference.load(CHECKPOINTS / name)


@cache
def expected(name: str, text: Path, chunk: int, sparsity: str = "predictor") -> Expected:
    return Expected(reference(name), in_chunks(tokens_of(name, text), chunk), sparsity)


def profile(model: Path, text: Path, outfile: Path, **options) -> Stats:
    result = profiling.profile(model, str(text), outfile, n_threads=2, **options)
    assert result.stopped is None
    return stats_file.load(outfile)


def assert_same(stats: Stats, want: Expected) -> None:
    """Equal, but for the values that are near 0."""
    found = stats.total.neurons
    assert (stats.total.tokens == want.tokens).all()
    exact = want.sure == want.possible
    print(f"{(found != want.plain).sum()} of {found.size} counts differ; {exact.mean():.3%} leave no choice")
    assert exact.mean() > 0.97
    assert (found[exact] == want.plain[exact]).all()
    assert ((want.sure <= found) & (found <= want.possible)).all()


def assert_nearly_same(stats: Stats, want: Expected, limit: float, limit_of_tokens: float = 0.0) -> None:
    """Each count summed over the neurons, and neuron by neuron: `limit` of the sum may be elsewhere.

    limit_of_tokens: the same for the experts' tokens, where the attention's kernels, which differ between processors,
    round their activations: a router's choice between two experts can hang on that.
    """
    assert np.abs(stats.total.tokens - want.tokens).sum() <= limit_of_tokens * want.tokens.sum()
    for k, count in enumerate(COUNTS):
        error = np.abs(stats.total.neurons[k] - want.plain[k]).sum() / want.plain[k].sum()
        print(f"{count}: {error:.2e} of {want.plain[k].sum()} differ")
        assert error <= limit


@pytest.mark.sanitized
@pytest.mark.parametrize("chunk", [64, 33, 7])
@pytest.mark.parametrize("name", NAMES)
def test_f32_exactly(name, chunk):
    """Chunks in which no mask hangs on the order of f32 sums: every count is the reference's."""
    text = (CHECKPOINTS / "heldout.txt").read_bytes()[: 100 * chunk]
    model = tsconv.load(tiny.converted(name, "f32"), n_threads=2)
    chunks = in_chunks(model.tokenize(text, add_bos=False, special=False), chunk)
    decided = [piece for piece in chunks if not Expected(reference(name), [piece], "predictor").undecided]
    print(f"{len(decided)} of {len(chunks)} chunks")
    assert len(decided) >= 2
    result = collect(model, decided, source=("held-out", "", ""), chunk=chunk)
    assert result.stopped is None
    assert_same(result.stats, Expected(reference(name), decided, "predictor"))
    model.close()


@pytest.mark.parametrize("name", NAMES)
def test_f32_exactly_without_mask(tmp_path, text, name):
    """Exact sparsity: no mask, and every neuron counts as predicted."""
    stats = profile(tiny.converted(name, "f32"), text, tmp_path / "s.gguf", chunk=256, sparsity="exact")
    assert_same(stats, expected(name, text, 256, "exact"))
    assert (stats.total.of("predicted") == stats.total.tokens[:, :, None]).all()


@pytest.mark.parametrize("chunk", [512, 97])
@pytest.mark.parametrize("name", NAMES)
def test_f32_from_a_file(tmp_path, text, name, chunk):
    stats = profile(tiny.converted(name, "f32"), text, tmp_path / "s.gguf", chunk=chunk)
    assert_nearly_same(stats, expected(name, text, chunk), 1e-4)
    (part,) = stats.parts
    assert part.n_chunks == len(in_chunks(tokens_of(name, text), chunk))
    assert part.n_tokens == part.n_chunks * chunk
    assert (part.source.dataset, part.source.chunk, part.source.outtype) == (text.name, chunk, "f32")


@pytest.mark.parametrize("name", NAMES)
def test_f16(tmp_path, text, name):
    stats = profile(tiny.converted(name, "f16", "f16"), text, tmp_path / "s.gguf", chunk=256)
    assert_nearly_same(stats, expected(name, text, 256), 0.005, limit_of_tokens=0.005)


@pytest.mark.parametrize("name", NAMES)
def test_histograms(tmp_path, text, name):
    """Cumulatively, as values on an edge may fall on either side of it."""
    stats = profile(tiny.converted(name, "f32"), text, tmp_path / "s.gguf", chunk=256, sparsity="exact")
    edges = np.append(bin_edges(), np.inf)
    assert len(edges) == N_BINS
    for layer, kinds in enumerate(expected(name, text, 256, "exact").magnitudes):
        for kind, values in enumerate(kinds):
            below = stats.total.histograms[layer, kind].cumsum()
            slack = np.where(np.isfinite(edges), 1e-4 * (1 + edges), 0)
            assert (np.searchsorted(values, edges - slack) <= below).all()
            assert (below <= np.searchsorted(values, edges + slack, side="right")).all()
            assert below[-1] == len(values)


@pytest.mark.parametrize("name", NAMES)
def test_reordered_model(tmp_path, text, name):
    """Statistics are in the checkpoint's order, whatever the model's."""
    plain = profile(tiny.converted(name, "f32"), text, tmp_path / "plain.gguf", chunk=256)
    hot = tsconv.reorder(tiny.converted(name, "f32"), tmp_path / "plain.gguf", tmp_path / "hot.gguf").model
    stats = profile(hot, text, tmp_path / "hot.stats.gguf", chunk=256)
    assert_nearly_same(stats, expected(name, text, 256), 1e-4)
    assert stats.subject == plain.subject


@pytest.mark.parametrize("name", NAMES)
def test_merged_in_any_order(tmp_path, text, name):
    """Three texts, merged in every order and grouping: the same bytes, and the sums of what each counts alone."""
    whole = text.read_text()
    cuts = [0, len(whole) // 3, 2 * len(whole) // 3, len(whole)]
    files = []
    for i in range(3):
        piece = tmp_path / f"{i}.txt"
        piece.write_text(whole[cuts[i] : cuts[i + 1]])
        files.append(tmp_path / f"{i}.gguf")
        profile(tiny.converted(name, "f32"), piece, files[i], chunk=64)
    merged = []
    for k, order in enumerate(itertools.permutations(files)):
        merged.append(profiling.merge(order, tmp_path / f"all-{k}.gguf").outfile.read_bytes())
    pair = profiling.merge(files[1:], tmp_path / "pair.gguf").outfile
    merged.append(profiling.merge([pair, files[0]], tmp_path / "grouped.gguf").outfile.read_bytes())
    assert len(set(merged)) == 1
    alone = [stats_file.load(file) for file in files]
    total = stats_file.load(tmp_path / "all-0.gguf").total
    for field in ("tokens", "neurons", "histograms"):
        assert (getattr(total, field) == sum(getattr(stats.total, field) for stats in alone)).all()


def test_same_source_twice_is_one_part(tmp_path, text):
    """Two seeds of one text: one part, whose counts are the sum."""
    model = tiny.converted()
    a = profile(model, text, tmp_path / "a.gguf", chunk=64, seed=1)
    b = profile(model, text, tmp_path / "b.gguf", chunk=64, seed=2, merge_with=[tmp_path / "a.gguf"])
    (part,) = b.parts
    assert part.seeds == (1, 2)
    assert part.n_tokens == 2 * a.parts[0].n_tokens
    again = profile(model, text, tmp_path / "c.gguf", chunk=64, seed=2)
    assert (b.total.neurons == a.total.neurons + again.total.neurons).all()

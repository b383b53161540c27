"""The solver of `tsconv place` against every placement there is, its budgets and its lower bound."""

from __future__ import annotations

import dataclasses
import itertools
import time

import numpy as np
import pytest

from support.workloads import MACHINES, EveryPlacement, held, layer_held, seconds_of, total_bytes, uniform, workload
from tsconv.errors import TsconvError
from tsconv.placement import frontier
from tsconv.placement.cost import Layer, Rates, Workload
from tsconv.placement.file import CPU, GPU, LayerPlacement
from tsconv.placement.frontier import pooled, undominated
from tsconv.placement.search import Chain, Options, best_prices, search
from tsconv.placement.solve import Problem, Solution, solve

GIB = 1 << 30
REFUSED = "budgets do not hold|does not fit|cannot be divided"


def budgets(rng: np.random.Generator, total: int) -> list[tuple[int, int]]:
    """0, tiny, everything, and between."""
    some = [(int(total * a), int(total * b)) for a, b in rng.random((4, 2))]
    tight = [(v, int(total - v * rng.random())) for v, _ in some]
    return [(0, 0), (0, total), (0, total - 1), (1, total), (total, total), (total, 0), (total, 60), *some, *tight]


def check_sizes(work: Workload, found: Solution, vram: int, ram: int) -> None:
    """Within the budgets to the byte, by the second calculation, and prefixes that exist."""
    sizes = held(work, found.layers, found.output)
    assert sizes == (found.estimate.vram, found.estimate.ram)
    assert sizes[0] <= vram
    assert sizes[1] <= ram
    for layer, place in zip(work.layers, found.layers, strict=True):
        assert len(place.gpu) == len(place.ram) == len(layer.heat)
        for g, m in zip(place.gpu, place.ram, strict=True):
            assert 0 <= g <= g + m <= layer.heat.shape[1]


def check_against_all(work: Workload, rates: Rates, rng: np.random.Generator) -> None:
    every = EveryPlacement(work, rates)
    n_found = 0
    for vram, ram in budgets(rng, total_bytes(work)):
        least = every.least(vram, ram)
        if not np.isfinite(least):
            with pytest.raises(TsconvError, match=REFUSED):
                solve(work, rates, vram, ram)
            continue
        n_found += 1
        found = solve(work, rates, vram, ram)
        assert found.estimate.seconds == pytest.approx(least, rel=1e-12, abs=0)
        assert found.optimal
        assert found.gap == 0
        check_sizes(work, found, vram, ram)
        assert seconds_of(work, rates, found.layers, found.output) == pytest.approx(least, rel=1e-12, abs=0)
    assert n_found >= 2  # everything in RAM, and more


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("shape", [(2, 1, 4), (3, 1, 3), (2, 2, 3)])
def test_finds_the_best_of_all(machine: str, shape: tuple[int, int, int]) -> None:
    rng = np.random.default_rng([len(machine), *shape])
    for predictor, hot_first in ((True, True), (False, True), (True, False)):
        check_against_all(workload(rng, *shape, predictor, hot_first), MACHINES[machine], rng)


@pytest.mark.parametrize(
    ("shape", "machine"), [((3, 2, 4), "no disk"), ((2, 3, 4), "no disk"), ((2, 1, 6), "slow GPU")]
)
def test_finds_the_best_of_more(shape: tuple[int, int, int], machine: str) -> None:
    rng = np.random.default_rng(7)
    check_against_all(workload(rng, *shape), MACHINES[machine], rng)


def test_tied_output_and_many_seeds() -> None:
    for seed in range(12):
        rng = np.random.default_rng(seed)
        work = workload(rng, 2, 1, 3)
        work = dataclasses.replace(work, output_ram=int(rng.integers(0, 3)))  # the matrix is the token embeddings
        check_against_all(work, MACHINES["near GPU"], rng)


@pytest.fixture
def coarse(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small models are solved as large ones are: on a grid, the rest filled up."""
    monkeypatch.setattr(frontier, "COMPLETE", 0)
    monkeypatch.setattr(frontier, "GRID_PAIRS", 8)
    monkeypatch.setattr(frontier, "GRID", 8)


@pytest.mark.usefixtures("coarse")
@pytest.mark.parametrize("machine", MACHINES)
def test_lower_bound_on_a_grid(machine: str) -> None:
    """The bound is below the best of all placements, what is found is not, and says truly how far off it may be."""
    rates = MACHINES[machine]
    for seed, hot_first in itertools.product(range(3), (True, False)):
        rng = np.random.default_rng([seed, hot_first])
        work = workload(rng, 2, 2, 3, hot_first=hot_first)
        every = EveryPlacement(work, rates)
        for vram, ram in budgets(rng, total_bytes(work)):
            least = every.least(vram, ram)
            if not np.isfinite(least):
                continue
            try:
                found = solve(work, rates, vram, ram)
            except TsconvError:  # a grid may miss the few placements that fit
                continue
            assert found.lower_bound <= least * (1 + 1e-12)
            assert least <= found.estimate.seconds * (1 + 1e-12)
            assert least >= found.estimate.seconds * (1 - found.gap) * (1 - 1e-12)
            check_sizes(work, found, vram, ram)


def random_budgets_hold(n: int) -> int:
    """`n` random workloads, machines and budgets; returns how many could be placed."""
    placed = 0
    for seed in range(n):
        rng = np.random.default_rng(1000 + seed)
        shape = (int(rng.integers(1, 7)), int(rng.integers(1, 5)), int(rng.integers(2, 60)))
        work = workload(rng, *shape, bool(rng.integers(2)), bool(rng.integers(2)))
        rates = list(MACHINES.values())[int(rng.integers(len(MACHINES)))]
        vram, ram = (int(total_bytes(work) * share) for share in rng.random(2) * 1.1)
        try:
            found = solve(work, rates, vram, ram)
        except TsconvError:
            continue
        placed += 1
        check_sizes(work, found, vram if rates.has_gpu else 0, ram)
        assert found.lower_bound <= found.estimate.seconds
        expected = seconds_of(work, rates, found.layers, found.output)
        assert found.estimate.seconds == pytest.approx(expected, rel=1e-12)
    return placed


@pytest.mark.usefixtures("coarse")
def test_budgets_hold_on_a_grid() -> None:
    assert random_budgets_hold(80) > 20


def test_budgets_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frontier, "COMPLETE", 400)  # some enumerated, others on a grid
    assert random_budgets_hold(60) > 15


def test_lower_bound_is_positive() -> None:
    """Also where the prices that are best on the grid bound nothing: no file may hold a negative time."""
    rates = MACHINES["GPU slower than CPU"]
    work = workload(np.random.default_rng(0), 4, 2, 59)
    total = total_bytes(work)
    for share in (0.2, 0.5, 0.8):
        found = solve(work, rates, int(share * total), int(0.45 * total))
        assert 0 < found.lower_bound <= found.estimate.seconds


@pytest.mark.parametrize("machine", ["balanced", "slow GPU", "far GPU", "near GPU"])
def test_more_memory_is_never_slower(machine: str) -> None:
    rates = MACHINES[machine]
    work = workload(np.random.default_rng(3), 3, 1, 5)
    total = total_bytes(work)
    cpu_only = seconds_of(work, rates, uniform(work, CPU), CPU)
    for ram in (total // 2, total):
        seconds = [_seconds(work, rates, vram, ram) for vram in range(0, total + 80, 40)]
        assert all(a >= b * (1 - 1e-12) for a, b in itertools.pairwise(seconds))
        assert seconds[0] > seconds[-1]
    assert _seconds(work, rates, 0, total) == pytest.approx(cpu_only, rel=1e-12)
    for vram in (0, total // 4):
        seconds = [_seconds(work, rates, vram, ram) for ram in range(0, total + 80, 40)]
        assert all(a >= b * (1 - 1e-12) for a, b in itertools.pairwise(seconds))
        assert seconds[0] > seconds[-1]


def _seconds(work: Workload, rates: Rates, vram: int, ram: int) -> float:
    try:
        return solve(work, rates, vram, ram).estimate.seconds
    except TsconvError:
        return np.inf


def test_everything_on_the_gpu_where_that_is_best() -> None:
    rates = MACHINES["balanced"]
    work = workload(np.random.default_rng(5), 3, 2, 4)
    needed = held(work, uniform(work, GPU), GPU)[0]
    found = solve(work, rates, needed, total_bytes(work))
    assert list(found.layers) == uniform(work, GPU)
    assert found.output == GPU
    assert found.estimate.seconds == pytest.approx(seconds_of(work, rates, uniform(work, GPU), GPU), rel=1e-12)
    less = solve(work, rates, needed - 1, total_bytes(work))
    assert less.estimate.seconds > found.estimate.seconds


def test_fastest_is_not_the_most_reads_covered() -> None:
    """The GPU's memory could hold most reads, but it would become the slower one of both."""
    rates = Rates(1.0, 1.0, 9.0, 0.8, 0.0, 0.0, True, True)
    heat = np.array([[8.0, 7, 6, 5, 4, 3, 2, 1]])
    layer = Layer(40, 0, 0.0, 0, 0.0, 10, heat)
    work = Workload((layer, layer), 4, 1, 4, False, 10, 1.0, 30, 30)
    vram = 130
    found = solve(work, rates, vram, 10_000)

    def covered(places: list[LayerPlacement]) -> float:
        return sum(float(heat[0, : place.gpu[0]].sum()) for place in places)

    greedy = max(
        (
            [LayerPlacement(CPU, CPU, (a,), (8 - a,)), LayerPlacement(CPU, CPU, (b,), (8 - b,))]
            for a in range(9)
            for b in range(9)
            if 10 * (a + b) <= vram
        ),
        key=covered,
    )
    assert covered(greedy) > covered(list(found.layers))
    assert held(work, greedy, CPU)[0] <= vram
    assert found.estimate.seconds < 0.95 * seconds_of(work, rates, greedy, CPU)


def test_what_ram_is_left_goes_to_the_hottest_on_disk() -> None:
    """Even where the GPU is waited for and the disk costs nothing that counts."""
    rates = Rates(1.0, 1.0, 2.0, 1.0, 0.0, 0.0, True, True)
    heat = np.array([[9.0, 1, 0.1, 0.1, 0.1]])
    work = Workload((Layer(0, 0, 0.0, 0, 0.0, 10, heat),), 4, 1, 4, False, 0, 0.0, 0, 0)
    found = solve(work, rates, 10, 35)
    assert sum(found.layers[0].ram) == 3


def test_refuses_what_does_not_fit() -> None:
    work = workload(np.random.default_rng(0), 2, 1, 4)
    total = total_bytes(work)
    needed = total - sum(layer.heat.size * layer.neuron_bytes for layer in work.layers)
    for rates, vram, ram in (
        (MACHINES["balanced"], 0, needed - 1),
        (MACHINES["no GPU"], 10**9, needed - 1),
        (MACHINES["balanced"], 10**9, work.embedding_bytes - 1),
        (MACHINES["neither"], 0, total - 1),
        (MACHINES["no disk"], 5, total - 6),
    ):
        with pytest.raises(TsconvError, match=REFUSED) as error:
            solve(work, rates, vram, ram)
        assert "\n" not in str(error.value)
    assert solve(work, MACHINES["no GPU"], 10**9, needed).estimate.vram == 0


@pytest.mark.parametrize("machine", [name for name, rates in MACHINES.items() if rates.has_disk])
@pytest.mark.parametrize("hot_first", [True, False])
def test_bound_of_a_layer(machine: str, hot_first: bool) -> None:
    """It is what docs/placement.md says, minimised over all lengths, and no real split of the layer is below it."""
    rates = MACHINES[machine]
    for seed in range(40):
        rng = np.random.default_rng(seed)
        work = workload(rng, 1, 2, 4, hot_first=hot_first)
        layer = work.layers[0]
        size, total, n = layer.neuron_bytes, float(layer.heat.sum()), layer.n_neurons
        vram = int(rng.integers(0, n * size + 1)) if rates.has_gpu else 0
        problem = Problem(work, rates, vram, total_bytes(work) - 1)
        prices = tuple((rng.random(2) * rng.choice([0, 0.1, 1, 8], 2)).tolist())
        found = problem.relaxed_neurons(layer, problem.hot[0], prices)

        slopes = sorted(np.concatenate([pooled(ffn) for ffn in layer.heat]).tolist(), reverse=True)
        expected = np.full(3, np.inf)
        for k in range(min(n, vram // size) + 1):
            kind = frontier.NONE if k == 0 else frontier.ALL if k == n else frontier.SPLIT
            for end in range(k, n + 1):
                disk = sum(slopes[end:]) * (rates.disk - rates.random)
                cpu = sum(slopes[k:]) * rates.random + disk
                balanced = (total * rates.random + disk) * rates.gpu / (rates.gpu + rates.random) if k else 0
                seconds = total * rates.gpu if k == n else max(cpu, balanced)
                cost = seconds + size * (prices[0] * k + prices[1] * (end - k))
                expected[kind] = min(expected[kind], cost)
        np.testing.assert_allclose(found, expected, rtol=1e-12)

        covered = [np.concatenate(([0.0], np.cumsum(ffn))) for ffn in layer.heat]
        ends = list(itertools.combinations_with_replacement(range(5), 2))
        for (a, b), (c, d) in itertools.product(ends, ends):
            k = a + c
            if k * size > vram:
                continue
            on_gpu, kept = covered[0][a] + covered[1][c], covered[0][b] + covered[1][d]
            cpu = (kept - on_gpu) * rates.random + (total - kept) * rates.disk
            cost = max(on_gpu * rates.gpu, cpu) + size * (prices[0] * k + prices[1] * (b - a + d - c))
            kind = frontier.NONE if k == 0 else frontier.ALL if k == n else frontier.SPLIT
            assert found[kind] <= cost * (1 + 1e-12)


def random_chain(rng: np.random.Generator) -> Chain:
    def options() -> Options:
        n = int(rng.integers(0, 7))
        return Options(rng.integers(0, 20, n), rng.integers(0, 20, n) * int(rng.integers(2)), rng.random(n) * 10)

    stages = [(options(), options()) for _ in range(int(rng.integers(1, 5)))]
    return Chain(stages, float(rng.random() * 3), int(rng.integers(0, 60)), int(rng.integers(0, 60)))


def fastest(chain: Chain) -> float:
    """Of all ways, inf where there is none."""
    ways = [(0, 0, 0, 0.0)]  # device, VRAM, RAM, seconds
    for stage in chain.stages:
        ways = [
            (a, v + int(o.vram[k]), r + int(o.ram[k]), t + float(o.seconds[k]) + chain.move * (a != device))
            for device, v, r, t in ways
            for a, o in enumerate(stage)
            for k in range(len(o.vram))
        ]
    return min((t for _, v, r, t in ways if v <= chain.vram and r <= chain.ram), default=np.inf)


def test_search_prunes_nothing_that_is_faster() -> None:
    n_found = 0
    for seed in range(200):
        rng = np.random.default_rng(seed)
        chain = random_chain(rng)
        least = fastest(chain)
        prices, bound = best_prices(chain, (2.0, 2.0))
        assert bound <= least * (1 + 1e-12)
        for prices_used in (prices, (0.0, 0.0), tuple(rng.random(2).tolist())):
            for below in (np.inf, least * (1 + 1e-9)):
                way, exhaustive = search(chain, prices_used, below, None, 100_000)
                assert exhaustive
                if not np.isfinite(least):
                    assert way is None
                    continue
                n_found += 1
                assert way is not None
                assert way.seconds == pytest.approx(least, rel=1e-12)
                moves = sum(a != b for (a, _), (b, _) in itertools.pairwise([(0, 0), *way.picks]))
                options = [stage[a] for stage, (a, _) in zip(chain.stages, way.picks, strict=True)]
                used = [(o.vram[k], o.ram[k], o.seconds[k]) for o, (_, k) in zip(options, way.picks, strict=True)]
                vram, ram, seconds = map(sum, zip(*used, strict=True))
                assert vram <= chain.vram
                assert ram <= chain.ram
                assert seconds + moves * chain.move == pytest.approx(least, rel=1e-12)
        assert search(chain, prices, least * (1 - 1e-12), None, 100_000)[0] is None
        limited, _ = search(chain, prices, np.inf, 2, 2)
        assert limited is None or limited.seconds >= least * (1 - 1e-12)
    assert n_found > 500


def test_prices_reach_the_best_bound() -> None:
    """Against a scan of the price plane."""
    for seed in range(25):
        rng = np.random.default_rng(seed)
        chain = random_chain(rng)
        found = best_prices(chain, (2.0, 2.0))[1]
        if not np.isfinite(found):
            continue
        for v, r in itertools.product(np.linspace(0, 2, 41), repeat=2):
            best = {0: 0.0, 1: np.inf}
            for stage in chain.stages:
                costs = [(o.seconds + v * o.vram + r * o.ram).min(initial=np.inf) for o in stage]
                best = {a: min(best[s] + chain.move * (s != a) for s in (0, 1)) + costs[a] for a in (0, 1)}
            assert found >= min(best.values()) - v * chain.vram - r * chain.ram - 1e-6


def test_pooled_is_the_least_concave_majorant() -> None:
    for seed in range(40):
        rng = np.random.default_rng(seed)
        heat = rng.integers(0, 6, int(rng.integers(1, 30))).astype(float)
        covered = np.concatenate(([0.0], np.cumsum(heat)))
        # the highest chord over each position
        expected = [
            max(
                covered[i] + (covered[j] - covered[i]) * (x - i) / max(1, j - i)
                for i in range(x + 1)
                for j in range(x, len(covered))
            )
            for x in range(len(covered))
        ]
        found = pooled(heat)
        assert (np.diff(found) <= 1e-12).all()
        np.testing.assert_allclose(np.cumsum(found), expected[1:], rtol=1e-12, atol=1e-12)


def test_undominated_by_definition() -> None:
    for seed in range(60):
        rng = np.random.default_rng(seed)
        n = int(rng.integers(0, 40))
        points = rng.integers(0, 6, (n, 3)) * [1, int(rng.integers(2)), 1]
        kept = undominated(points[:, 0], points[:, 1], points[:, 2].astype(float))
        expected = {tuple(p) for p in points.tolist() if not any((q <= p).all() and (q != p).any() for q in points)}
        assert sorted(map(tuple, points[kept].tolist())) == sorted(expected)


def power_law(n_layer: int, n_ffn: int, n_ff: int, used: int) -> Workload:
    """TurboSparse-Mixtral-47B's sizes in Q4_0, heats that fall with a power of the rank."""
    rng = np.random.default_rng(0)
    row = 2304
    predictor = int(1024 * (4096 + n_ff) * 0.5625)
    layers = []
    for _ in range(n_layer):
        frequency = (np.arange(n_ff) + 20.0) ** -0.9
        frequency = np.minimum(1, frequency / frequency.mean() * rng.uniform(0.05, 0.25))
        share = rng.dirichlet(np.full(n_ffn, 30.0)) * used
        heat = -np.sort(-frequency * share[:, None] * 3 * row * rng.uniform(0.8, 1, (n_ffn, n_ff)), axis=1)
        layers.append(Layer(23_724_032, 1 << 24, 1 << 23, n_ffn * predictor, used * predictor, 3 * row, heat))
    output = 107_536_384
    return Workload(tuple(layers), 4 * 4096, n_ff // 8 * used, 4 * 32000, True, 73_728_000, 2304, output, output)


def test_mixtral_size() -> None:
    """`pytest -s -k mixtral_size` prints the time it takes."""
    work = power_law(32, 8, 14336, 2)
    rates = Rates(1 / 38.4e9, 1 / 34.6e9, 1 / 0.35e9, 1 / 616e9, 1 / 12.6e9, 1e-5, True, True)
    for vram, ram in ((9 * GIB, 60 * GIB), (9 * GIB, 16 * GIB)):
        began = time.perf_counter()
        found = solve(work, rates, vram, ram)
        print(
            f"\n{vram / GIB:g} GiB of VRAM, {ram / GIB:g} of RAM: {1e3 * found.estimate.seconds:.2f} ms per token, "
            f"gap {100 * found.gap:.4f} %, solved in {time.perf_counter() - began:.1f} s"
        )
        check_sizes(work, found, vram, ram)
        assert found.gap < 1e-3
        assert sum(layer_held(*pair)[0] for pair in zip(work.layers, found.layers, strict=True)) > 0.99 * vram - 1.1e8

"""Generated weights whose FFNs are as active as a trained TurboSparse model's, for any layer and any input tokens.

The residual of a token is  p = (c, ..., c, v): the first coordinates hold a constant, which no layer adds to, and the
others are random, of variance 1. Layers add so little to v that its distribution stays. So every row w of a matrix that
reads p has a product that is normal over the tokens: its mean is set by the row's first weights, its standard deviation
is |w| of the others.

Neuron i shall be active with probability p_i, where the p_i follow a power law. Its hidden variable is
z_i = (C_i . s) / sd, of variance 1, where s_k is the sum of the coordinates of v whose number is k modulo m, and C is
random [n_ff, m]. With one threshold t_i, which p_i determines:

    up_i x   ~  z_i - t_i                                  sharp: up > 0 is nearly z_i > t_i
    gate_i x ~  r (z_i - t_i) + sqrt(1 - r^2) (e_i + k)    e_i independent of z_i: gate > 0 for more neurons than up
    logit_i  ~  f(z_i) - t_i                               what a predictor of rank 2m and some can know

All is linear in s, and the predictor's hidden units are relu(b + s_k) and relu(b - s_k), whose difference is nearly
linear in s_k, as b makes most of them positive. Where it is not, and by the rounding of the weights, the predictor
errs as a trained one does.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from functools import cache
from math import prod

import numpy as np
import numpy.typing as npt

from tsconv.bench.synthetic import Shape, to_bf16

Floats = npt.NDArray[np.float64]
Bits = npt.NDArray[np.uint16]

# Frequencies min(CAP, A q^-EXPONENT) of the neurons at the share q of all, most frequent first: at a mean of 10 % a
# third of the neurons makes 80 % of the activations, and two tokens share 37 % of their neurons.
EXPONENT, CAP = 1.1, 0.8
GATE_SHARE = 0.8  # r: the share of the coordinates that gate's rows have in common with up's is their correlation
GATE_MARGIN = 0.7  # k: gate > 0 for 90 % of the predicted neurons, and for a quarter of all
HIDDEN_BIAS = 1.25  # b in standard deviations of s_k: 89 % of the hidden units are positive
CONSTANT = 2.0  # c: the weights that read it then are about as large as the others, as blocks of q4_K need
BLOCK = 32  # weights that read constants fill blocks of their own, of equal values, which q4_0 keeps
# Standard deviation of what attention and FFN of a layer each add to v. It is not taken into account: the 32nd layer
# activates 10.3 % of its neurons where the first activates 10.0 %.
ADDED = 0.01
ROUNDING = 0.065  # of q4_0: error of uniformly distributed weights, relative to their standard deviation

BYTE_SD = 256 / math.sqrt(12)  # of i + 1/2, int8 i
PIECE = 1 << 20  # weights made at a time
CHUNK = 1 << 18  # np.take works through a copy of its indices in 64 bits: small enough for the L2 cache
FFN = re.compile(r"(.*\.(?:mlp|experts\.\d+)\.)(\w+)\.(?:(\w+)\.)?weight")
MATRICES = {"gate_proj": "gate", "w1": "gate", "up_proj": "up", "w3": "up"}


def frequencies(active: float, n: int) -> Floats:
    """Share of the tokens for which each of `n` neurons is active, falling, with mean `active` (0..CAP)."""
    law = ((np.arange(n) + 0.5) / n) ** -EXPONENT
    low, high = 0.0, CAP
    for _ in range(64):
        factor = (low + high) / 2
        low, high = (factor, high) if np.minimum(CAP, factor * law).mean() < active else (low, factor)
    return np.minimum(CAP, high * law)


def thresholds(probabilities: npt.ArrayLike) -> Floats:
    """t with P(logit > 0, gate > 0, up > 0) = probability."""
    return np.interp(np.asarray(probabilities, np.float64), *_probability_of_threshold())


@cache
def _probability_of_threshold() -> tuple[Floats, Floats]:
    """Rising P(logit > 0, gate > 0, up > 0), and t: the three are independent given z, and z is normal."""
    z = np.linspace(-6, 6, 1201)
    density = np.exp(-(z**2) / 2)
    t = np.linspace(4, -4, 801)[:, None]
    slope, clipping = hidden_pair()
    of_fc2 = ROUNDING * math.sqrt(2 * _relu_square(HIDDEN_BIAS)) / slope
    gate = _cdf(GATE_SHARE / math.sqrt(1 - GATE_SHARE**2) * (z - t) + GATE_MARGIN)
    all_three = _cdf((z - t) / math.hypot(clipping, of_fc2)) * gate * _cdf((z - t) / ROUNDING)
    return all_three @ (density / density.sum()), t[:, 0]


def hidden_pair() -> tuple[float, float]:
    """f(s) = relu(b + s) - relu(b - s) of normal s as slope * (s + error): the slope, and the error's sd.

    f is 2 s for |s| < b, else sign(s) (b + |s|): E s f = E f' = 1 + P(|s| < b).
    """
    b = HIDDEN_BIAS
    inside, edge = 2 * float(_cdf(b)) - 1, 2 * b * math.exp(-b * b / 2) / math.sqrt(2 * math.pi)
    square = 4 * (inside - edge) + (1 - inside + edge) + 2 * edge + b * b * (1 - inside)
    return 1 + inside, math.sqrt(square / (1 + inside) ** 2 - 1)


def _relu_square(b: float) -> float:
    """E relu(b + s)^2 of normal s."""
    return (1 + b * b) * float(_cdf(b)) + b * math.exp(-b * b / 2) / math.sqrt(2 * math.pi)


def _cdf(x: npt.ArrayLike) -> Floats:
    """Of the normal distribution, within 1e-7: interpolated in a table."""
    return np.interp(np.asarray(x, np.float64), *_cdf_table())


@cache
def _cdf_table() -> tuple[Floats, Floats]:
    x = np.linspace(-8, 8, 16001)
    return x, np.array([0.5 * math.erfc(-value / math.sqrt(2)) for value in x])


class ActiveWeights:
    """The weights of a checkpoint, for `synthetic.write_checkpoint`, whose FFNs are active as said above.

    Args:
        shape: with predictors, of ranks of at least 4.
        active: mean share of the neurons (for MoE: of each routed expert) that the predictor lets through and whose
            gate and up are positive; more than 0 and less than CAP.
        seed: of all random numbers.

    Raises:
        ValueError: `active` is out of bounds.
    """

    def __init__(self, shape: Shape, active: float, seed: int = 0) -> None:
        if not 0 < active < CAP:
            raise ValueError(f"active: expected more than 0 and less than {CAP}, found {active}")
        self._shape, self._active, self._seed = shape, active, seed
        self._n_constant = max(1, min(BLOCK, shape.n_embd // 8))
        self._ffn: tuple[str, _Ffn] | None = None

    def __call__(self, name: str, dims: tuple[int, ...]) -> Iterator[Bits]:
        """bf16 bits of a tensor, in pieces of whole rows."""
        numbers = [int(part) for part in name.split(".") if part.isdigit()]
        e, constant = self._shape.n_embd, self._n_constant
        if len(dims) == 1:
            yield _bits(np.ones(dims))
            return
        found = FFN.fullmatch(name)
        if found and found[2] != "down_proj" and found[2] != "w2":
            if self._ffn is None or self._ffn[0] != found[1]:
                self._ffn = None  # frees it first
                rng = np.random.default_rng([self._seed, 0, *numbers])
                self._ffn = found[1], _Ffn(rng, self._shape, self._shape.ranks[numbers[0]], self._active, constant)
            yield from self._ffn[1].rows(MATRICES.get(found[2]) or found[3])
            return
        # What reads the residual has products of variance 1, whatever its constants.
        sd, first_rows, first_columns = e**-0.5, None, None
        if name == "model.embed_tokens.weight":
            sd, first_columns = 1.0, CONSTANT
        elif name.endswith("self_attn.o_proj.weight"):
            sd, first_rows = ADDED * e**-0.5, 0.0
        elif found:
            # About active * n_ff terms with E h^2 = 1/4.
            sd, first_rows = 2 * ADDED * (self._active * dims[1]) ** -0.5, 0.0
        elif name.endswith("block_sparse_moe.gate.weight"):
            first_columns = 0.0
        rng = np.random.default_rng([self._seed, 1, *numbers, *name.rsplit(".", 2)[-2].encode()])
        step = max(1, PIECE // prod(dims[1:]))
        for start in range(0, dims[0], step):
            rows = _uniform(rng, sd, (min(step, dims[0] - start), dims[1]))
            if first_columns is not None:
                rows[:, :constant] = _bits(np.array([first_columns]))
            if first_rows is not None:
                rows[: max(0, constant - start)] = _bits(np.array([first_rows]))
            yield rows


class _Ffn:
    """gate, up and predictor of one FFN, made from one random matrix."""

    def __init__(self, rng: np.random.Generator, shape: Shape, rank: int, active: float, n_constant: int) -> None:
        self._rng, self._rank, self._n_constant = rng, rank, n_constant
        self._e, n_ff = shape.n_embd, shape.n_ff
        m = (rank - max(1, min(BLOCK, rank // 4))) // 2
        # s_k has sizes[k] coordinates.
        self._sizes = np.bincount(np.arange(self._e - n_constant) % m, minlength=m)
        self._c = rng.integers(-128, 128, (n_ff, m), dtype=np.int8)
        squares = (self._c.astype(np.float32) + np.float32(0.5)) ** 2
        self._norm = np.sqrt(squares @ self._sizes.astype(np.float32)) / BYTE_SD
        self._t = thresholds(rng.permutation(frequencies(active, n_ff)))
        self._of_gate = rng.bit_generator.state  # its random end comes next, each time it is made

    def rows(self, matrix: str) -> Iterator[Bits]:
        """All rows of gate, up, fc1 or fc2, in pieces."""
        if matrix == "fc1":
            yield self._fc1()
            return
        if matrix == "gate":
            self._rng.bit_generator.state = self._of_gate
        step = max(1, PIECE // self._e)
        for start in range(0, len(self._c), step):
            piece = slice(start, start + step)
            yield self._fc2(piece) if matrix == "fc2" else self._reading(piece, is_gate=matrix == "gate")

    def _reading(self, piece: slice, is_gate: bool) -> Bits:
        """Rows of gate or up: constants, C repeated, and of gate a random end."""
        e, constant, m = self._e, self._n_constant, self._c.shape[1]
        mean = -self._t[piece]
        end = e
        if is_gate:
            mean = GATE_SHARE * mean + math.sqrt(1 - GATE_SHARE**2) * GATE_MARGIN
            end = constant + round(GATE_SHARE * (e - constant))
        c = _from_bytes(self._c[piece], e**-0.5)
        rows = np.empty((len(c), e), np.uint16)
        rows[:, :constant] = _bits(mean * self._norm[piece] * e**-0.5 / (constant * CONSTANT))[:, None]
        for start in range(constant, end, m):
            width = min(m, end - start)
            rows[:, start : start + width] = c[:, :width]
        rows[:, end:] = _uniform(self._rng, e**-0.5, (len(c), e - end))
        return rows

    def _fc1(self) -> Bits:
        """[rank, n_embd]: hidden units that are constant, then b + s_k, then b - s_k."""
        constant, m = self._n_constant, self._c.shape[1]
        rows = np.zeros((self._rank, self._e))
        rows[:, :constant] = HIDDEN_BIAS * (self._sizes.mean() ** 0.5) / (constant * CONSTANT)
        sd = np.sqrt(self._sizes)
        for sign, unit in ((1, self._rank - 2 * m), (-1, self._rank - m)):
            rows[unit : unit + m, :constant] = HIDDEN_BIAS * sd[:, None] / (constant * CONSTANT)
            coordinate = np.arange(constant, self._e)
            rows[unit + (coordinate - constant) % m, coordinate] = sign
        return _bits(rows)

    def _fc2(self, piece: slice) -> Bits:
        """Rows of [n_ff, rank]: -slope t from the constant units, then C, then -C."""
        m = self._c.shape[1]
        units = self._rank - 2 * m
        scale = self._rank**-0.5
        value = HIDDEN_BIAS * self._sizes.mean() ** 0.5
        c = _from_bytes(self._c[piece], scale)
        rows = np.empty((len(c), self._rank), np.uint16)
        mean = -hidden_pair()[0] * self._t[piece] * self._norm[piece] * scale
        rows[:, :units] = _bits(mean / (units * value))[:, None]
        rows[:, units : units + m] = c
        rows[:, units + m :] = c ^ 0x8000  # the sign bit
        return rows


def _uniform(rng: np.random.Generator, sd: float, dims: tuple[int, int]) -> Bits:
    return _from_bytes(rng.integers(-128, 128, dims, dtype=np.int8), sd)


def _from_bytes(values: npt.NDArray[np.int8], sd: float) -> Bits:
    """(i + 1/2) * sd / BYTE_SD in bf16, which has the 8 bits that i + 1/2 needs."""
    table = _bits((np.arange(256, dtype=np.uint8).view(np.int8) + 0.5) * (sd / BYTE_SD))
    index = np.ascontiguousarray(values).view(np.uint8).reshape(-1)
    bits = np.empty(index.shape, np.uint16)
    for i in range(0, len(index), CHUNK):
        np.take(table, index[i : i + CHUNK], out=bits[i : i + CHUNK], mode="clip")
    return bits.reshape(values.shape)


def _bits(values: npt.NDArray[np.floating]) -> Bits:
    return to_bf16(values.astype(np.float32))

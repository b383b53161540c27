"""Training of one FFN's predictor: fc2 . relu(fc1 . x) - b, with Adam.

The last epochs compute with the matrices as they will be stored, and pass derivatives through the rounding as if it
were not there (straight-through estimator, Bengio et al. 2013). What happens is a function of the samples, the options
and the number of threads alone: an epoch's order of the samples is drawn from a seed of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from tsconv.errors import TsconvError
from tsconv.predictor.train import objective
from tsconv.predictor.train.calibrate import Curve, Figures
from tsconv.predictor.train.rounding import MIN_BIAS, THRESHOLD, Stored, Types
from tsconv.predictor.train.samples import BLOCK, Samples, values_of_codes

if TYPE_CHECKING:
    from torch import Tensor

MIN_BATCH, MAX_BATCH = 128, 1024  # rows of a step,
STEPS = 32  # of which an epoch has so many at least: several passes through few samples
MAX_VALUES = 1 << 22  # of h that are looked at together where nothing is trained
HELD_ROWS = 16_384  # that results are judged by, at most
RATE = 0.11  # of Adam, over sqrt(n_embd)
WARM_UP = 50  # steps
LAST_RATE = 0.02  # share of the rate that is left at the end
ROUNDED_SHARE = 1 / 3  # of the epochs compute with rounded matrices
MAX_Q = 100.0  # what missing a neuron costs, in units of its price, counts at most so much: single ones must not decide
FIRST_BIAS = 3.0  # a neuron that nothing is known of is off, log(price / E[e])
PRICE_SHARE = 0.3  # the first price is that at which an observer who knows e misses this share of the target
MAX_SHIFT = 0.3  # of log(price) behind an epoch
PRICE_VALUES = 1 << 22  # of h that the first price and E are taken from
PATIENCE = 3  # epochs without a better result that end a phase


@dataclass(frozen=True)
class Recipe:
    """How a predictor is trained.

    Attributes:
        rank: of its hidden layer.
        types: it is stored in.
        missed: the share that its threshold may miss on held-out samples.
        epochs: at most; each is a pass through the samples, or several where they are few.
        seed: of the first weights and of the order of the samples.
        device: where torch computes: "cpu", "cuda", ...
    """

    rank: int
    types: Types
    missed: float
    epochs: int
    seed: int
    device: str = "cpu"


@dataclass
class State:
    """Of training between two epochs: what a run that goes on later needs.

    Attributes:
        parameters: fc1 [r, n_embd], fc2 [n_ff, r], b [n_ff].
        means, squares: Adam's running means of derivatives and of their squares.
        step, epoch: done.
        price, typical: of tsconv.predictor.train.objective.
        rounds: whether the phase with rounded matrices has begun.
        best: the fewest neurons per token that reach the target so far; best_since: epochs without fewer.
        ended: whether nothing is to be gained any more.
        kept: the stored predictor of `best`.
    """

    parameters: list[Tensor]
    means: list[Tensor]
    squares: list[Tensor]
    price: float
    typical: float
    step: int = 0
    epoch: int = 0
    rounds: bool = False
    best: float = math.inf
    best_since: int = 0
    kept: tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]] | None = None
    ended: bool = False


@dataclass(frozen=True)
class Fitted:
    """A predictor and what it does on held-out samples with a threshold of 1."""

    stored: Stored
    figures: Figures
    epochs: int


Start = tuple[npt.NDArray[np.float32], npt.NDArray[np.float32], npt.NDArray[np.float32]]  # fc1, fc2, b
Epoch = Callable[[State, Figures], None]


class Fit:
    """Trains one predictor.

    Args:
        trained, held: samples of the FFN.
        down: float32 [n_ff], |down_i|^2.
        recipe: how.
        start: weights to begin with, None for random ones.
        state: of an earlier run with the same arguments.
    """

    def __init__(
        self,
        trained: Samples,
        held: Samples,
        down: npt.NDArray[np.float64],
        recipe: Recipe,
        start: Start | None = None,
        state: State | None = None,
    ) -> None:
        import torch

        self.trained, self.held, self.recipe = trained, held, recipe
        self.device = torch.device(recipe.device)
        self.down = torch.from_numpy(down.astype(np.float32)).to(self.device)
        self.values = torch.from_numpy(values_of_codes()).to(self.device)
        self.state = self._begin(start) if state is None else state
        for name in ("parameters", "means", "squares"):
            setattr(self.state, name, [tensor.to(self.device) for tensor in getattr(self.state, name)])
        self.batch = max(MIN_BATCH, min(MAX_BATCH, trained.n // STEPS // BLOCK * BLOCK))
        steps = -(-trained.n_blocks // (self.batch // BLOCK))
        self.passes = max(1, STEPS // steps)
        self.n_steps = recipe.epochs * self.passes * steps

    def run(self, epoch: Epoch = lambda state, figures: None) -> Fitted:
        """Trains to the end. `epoch` is called with the state behind each epoch, and what it reached.

        Raises:
            TsconvError: samples that cannot be read; training that diverges.
        """
        state, recipe = self.state, self.recipe
        first_rounded = recipe.epochs - max(1, round(recipe.epochs * ROUNDED_SHARE))
        while state.epoch < recipe.epochs and not state.ended:
            if not state.rounds and (state.epoch >= first_rounded or state.best_since >= PATIENCE):
                self._begin_rounding()
            self._epoch()
            state.epoch += 1
            figures = self._judge()
            state.ended = state.rounds and state.best_since >= PATIENCE
            epoch(state, figures)
        assert state.kept is not None
        stored = Stored(*state.kept)
        return Fitted(stored, self._curve(stored).at(THRESHOLD), state.epoch)

    # ---- steps

    def _begin(self, start: Start | None) -> State:
        import torch

        recipe, n_embd, n_ff = self.recipe, self.trained.n_embd, self.trained.n_ff
        x, h = self._some_rows()
        values = self.values[torch.from_numpy(h).to(self.device).int()]
        typical = objective.typical_energy(values, self.down)
        e = objective.shares(values, self.down, typical)
        if start is None:
            generator = torch.Generator().manual_seed(self._seed(-2))
            length = float(np.sqrt(np.square(x.astype(np.float64)).mean())) or 1.0
            fc1 = torch.randn(recipe.rank, n_embd, generator=generator) / (math.sqrt(n_embd) * length)
            fc2 = torch.randn(n_ff, recipe.rank, generator=generator) / math.sqrt(recipe.rank)
            parameters = [fc1, fc2, torch.full((n_ff,), FIRST_BIAS)]
        else:
            parameters = [torch.from_numpy(np.array(array, np.float32, order="C")) for array in start]
        return State(
            parameters=parameters,
            means=[torch.zeros_like(p) for p in parameters],
            squares=[torch.zeros_like(p) for p in parameters],
            price=objective.price_of(e, PRICE_SHARE * recipe.missed),
            typical=typical,
        )

    def _some_rows(self) -> tuple[npt.NDArray[np.float16], npt.NDArray[np.uint8]]:
        return next(self.trained.batches(PRICE_VALUES // self.trained.n_ff, self._order(-1)))

    def _seed(self, epoch: int) -> int:
        return int(np.random.SeedSequence([self.recipe.seed, epoch + 2]).generate_state(1)[0])

    def _order(self, epoch: int) -> list[int]:
        return np.random.default_rng(self._seed(epoch)).permutation(self.trained.n_blocks).tolist()

    def _tensors(self, x: npt.NDArray[np.float16], h: npt.NDArray[np.uint8]) -> tuple[Tensor, Tensor]:
        """x, and e, of some rows."""
        import torch

        inputs = torch.from_numpy(x).to(self.device).float()
        values = self.values[torch.from_numpy(h).to(self.device).int()]
        return inputs, objective.shares(values, self.down, self.state.typical)

    def _epoch(self) -> None:
        state = self.state
        for n in range(state.epoch * self.passes, (state.epoch + 1) * self.passes):
            for x, h in self.trained.batches(self.batch, self._order(n)):
                inputs, e = self._tensors(x, h)
                self._step(inputs, e.div_(state.price).clamp_(max=MAX_Q))

    def _step(self, x: Tensor, q: Tensor) -> None:
        """A step of Adam on the mean over the rows of the objective."""
        fc1, fc2, b = self._computed_with()
        hidden = (x @ fc1.T).relu_()
        slope = objective.slope_((hidden @ fc2.T).sub_(b), q).div_(len(x))
        back = (slope @ fc2).mul_(hidden > 0)
        gradients = [back.T @ x, slope.T @ hidden, -slope.sum(dim=0)]
        state = self.state
        state.step += 1
        rate = RATE / math.sqrt(x.shape[1]) * self._share(state.step)
        adam_(state.parameters, gradients, state.means, state.squares, state.step, rate)
        state.parameters[2].clamp_(min=MIN_BIAS)

    def _share(self, step: int) -> float:
        """Of the rate: up in the beginning, then down along a cosine."""
        return min(1.0, step / min(WARM_UP, self.n_steps / 10)) * (
            LAST_RATE + (1 - LAST_RATE) * 0.5 * (1 + math.cos(math.pi * min(1.0, step / self.n_steps)))
        )

    # ---- rounding

    def _computed_with(self) -> list[Tensor]:
        """The matrices of a step: as they are, or as they would be stored."""
        import torch

        fc1, fc2, b = self.state.parameters
        if not (self.state.rounds and self.recipe.types.rounds):
            return [fc1, fc2, b]
        first, second = (torch.from_numpy(w).to(self.device) for w in self.recipe.types.read(self._store()))
        return [first, second * b[:, None], b]

    def _store(self) -> Stored:
        fc1, fc2, b = (p.cpu().numpy() for p in self.state.parameters)
        return self.recipe.types.store(fc1, fc2 / b[:, None], self._importance)

    @property
    def _importance(self) -> npt.NDArray[np.float32]:
        """The mean of each hidden activation. Measured once: rounding begins with hidden activations of like size."""
        return np.ones(self.recipe.rank, np.float32)

    def _begin_rounding(self) -> None:
        """Divides row k of fc1 by the mean of activation k and multiplies column k of fc2 with it, which changes
        nothing: all weigh alike then, and 16 columns of fc2 that share a scale are of like size. What was reached
        without rounding counts no more."""
        import torch

        state = self.state
        fc1, fc2, _ = state.parameters
        total = torch.zeros(self.recipe.rank, device=self.device)
        total += (self._tensors(*self._some_rows())[0] @ fc1.T).relu_().mean(dim=0)
        length = fc1.square().sum(dim=1).sqrt()
        scale = torch.where(total > 1e-3 * length, total, torch.where(length > 0, length, torch.ones_like(length)))
        fc1 /= scale[:, None]
        fc2 *= scale
        state.means[0] *= scale[:, None]
        state.squares[0] *= scale.square()[:, None]
        state.means[1] /= scale
        state.squares[1] /= scale.square()
        state.rounds, state.best, state.best_since, state.kept = True, math.inf, 0, None

    # ---- what was reached

    def _judge(self) -> Figures:
        """Finds the threshold that reaches the target on the held-out samples, keeps the predictor where it lets fewer
        neurons through than all before, and moves the price to where no threshold is needed."""
        state, recipe = self.state, self.recipe
        stored = self._store() if state.rounds else None
        curve = self._curve(stored)
        threshold = curve.threshold(recipe.missed)
        figures = curve.at(threshold)
        # where no threshold reaches it, what misses least is best
        reached = figures.predicted if figures.missed <= recipe.missed else self.held.n_ff * (1 + figures.missed)
        if reached < state.best:
            state.best, state.best_since = reached, 0
            if stored is not None:
                divided = recipe.types.divided(stored, threshold)
                state.kept = divided.fc1, divided.fc2
        else:
            state.best_since += 1
        b = state.parameters[2]
        shift = float(np.clip(float((b * (threshold - 1)).median()), -MAX_SHIFT, MAX_SHIFT)) if state.epoch > 1 else 0.0
        state.price = float(np.clip(state.price * math.exp(shift), 1e-12, 1e12))
        b.add_(shift).clamp_(min=MIN_BIAS)
        return figures

    def _curve(self, stored: Stored | None) -> Curve:
        """Of the held-out samples: with a stored predictor, or the present one as it is."""
        import torch

        if stored is None:
            fc1, fc2, b = self.state.parameters
            fc2 = fc2 / b[:, None]
        else:
            fc1, fc2 = (torch.from_numpy(w).to(self.device) for w in self.recipe.types.read(stored))
        curve = Curve()
        blocks = range(min(self.held.n_blocks, HELD_ROWS // BLOCK))
        for x, h in self.held.batches(MAX_VALUES // self.held.n_ff, blocks):
            inputs, e = self._tensors(x, h)
            logits = (inputs @ fc1.T).relu_() @ fc2.T
            if not bool(torch.isfinite(logits).all()):
                raise TsconvError("training diverged: logits are not finite", where=self.trained.path.name)
            curve.add(logits.cpu().numpy(), e.cpu().numpy(), h)
        return curve


def adam_(
    parameters: list[Tensor],
    gradients: list[Tensor],
    means: list[Tensor],
    squares: list[Tensor],
    step: int,
    rate: float,
    betas: tuple[float, float] = (0.9, 0.98),
) -> None:
    """One step of Adam without weight decay (Kingma and Ba 2015), in place; `step` counts from 1."""
    for p, g, m, v in zip(parameters, gradients, means, squares, strict=True):
        m.lerp_(g, 1 - betas[0])
        v.mul_(betas[1]).addcmul_(g, g, value=1 - betas[1])
        denominator = (v / (1 - betas[1] ** step)).sqrt_().add_(1e-10)
        p.addcdiv_(m, denominator, value=-rate / (1 - betas[0] ** step))


def saved(state: State) -> dict[str, Any]:
    """For torch.save."""
    import torch

    values = dict(vars(state))
    values["kept"] = None if state.kept is None else [torch.from_numpy(rows) for rows in state.kept]
    return values


def restored(values: dict[str, Any]) -> State:
    """Of `saved`."""
    kept = values["kept"]
    return State(**values | {"kept": None if kept is None else (kept[0].numpy(), kept[1].numpy())})


def use_threads(n_threads: int) -> None:
    """Torch computes with so many threads from now on."""
    import torch

    torch.set_num_threads(n_threads)

"""What a predictor is trained for.

Neuron i adds h_i * down_i to the output of its FFN for a token t. Leaving it out costs the token the share

    e_ti = w_t (h_ti |down_i|)^2,  w_t = 1 / sqrt(E max(E_t, E)),  E_t = sum_i (h_ti |down_i|)^2,  E = median of E_t > 0

Trained models have a few tokens whose activations are hundreds of times those of others, as a rule the first ones of a
text, which others then attend to (Sun et al., "Massive Activations in Large Language Models", 2024). By energy alone
they would be all that counts. By their share of a token's energy they could all be missed. The root is between the two:
such a token counts as many, and does not decide everything. A token that adds less than most do counts less.

Reading a neuron costs `price`, in the same unit. With z the logit, minimised is the sum over tokens and neurons of

    (e softplus(-z) + price softplus(z)) / price

whose least value, for what the predictor can know of a token, is at z = log(E[e] / price): a neuron is let through
where the energy that is to be expected of it is worth the bytes it takes. The derivative is sigmoid(z) (1 + q) - q with
q = e / price.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def token_weights(energies: Tensor, typical: float) -> Tensor:
    """w_t [n] of the energies E_t [n] of tokens, `typical` being E."""
    return energies.clamp(min=typical).rsqrt_().mul_(typical**-0.5)


def typical_energy(h: Tensor, down: Tensor) -> float:
    """E of h [n, n_ff] and |down_i|^2 [n_ff]; 1 where no neuron is active."""
    energies = (h.square() * down).sum(dim=1)
    energies = energies[energies > 0]
    return float(energies.median()) if len(energies) else 1.0


def shares(h: Tensor, down: Tensor, typical: float) -> Tensor:
    """e [n, n_ff] of h [n, n_ff] and |down_i|^2 [n_ff], float32."""
    energy = h.square() * down
    return energy * token_weights(energy.sum(dim=1), typical)[:, None]


def slope_(z: Tensor, q: Tensor) -> Tensor:
    """The derivative by z [n, n_ff], written over z; q is written over too."""
    z.sigmoid_()
    z.addcmul_(z, q)
    return z.sub_(q)


def price_of(e: Tensor, missed: float) -> float:
    """The price at which an observer who knows e misses the share `missed` of its sum: what is cheaper than it is left
    out."""
    values = e.flatten()
    values = values[values > 0].double().sort().values
    if not len(values):
        return 1.0
    at = int((values.cumsum(0) < missed * values.sum()).sum())
    return float(values[min(at, len(values) - 1)])

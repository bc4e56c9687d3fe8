"""A surrogate of the loss: the sensitivities, corrected by multipliers that measured losses teach it.

log(loss − base) = link(log Σ_g cost[g, f_g]·exp(D θ)[g, f_g]), the link a parabola near the identity. D gives every
(group, format) the terms of its module kind, depth, format, pairs of these, and itself, so that some two hundred
Gaussian terms describe a space of hundreds of groups, and what is learned at one budget serves the others.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from coatrt.configs.space import ConfigSpace
from coatrt.errors import ConfigError

__all__ = ["Multipliers", "Surrogate", "disturbed", "fit_multipliers", "multiplier_terms", "predicted"]

_DEPTHS = 3
# Prior standard deviations of the log multipliers, by what they belong to.
_PRIOR = {"kind": 0.5, "depth": 0.5, "format": 0.5, "kind, format": 0.25, "kind, depth": 0.25, "group": 0.25}
_LINK_MEAN = np.array([0.0, 1.0, 0.0])  # log Δ = c0 + c1·t + c2·t², t = log cost
_LINK_SPREAD = np.array([3.0, 0.4, 0.1])
_RELATIVE_NOISE = (0.2, 0.1, 0.05, 0.02)  # of the increase; the evidence chooses
_ABSOLUTE_NOISE = 0.003  # nats
_LEAST_INCREASE = 0.01  # nats added to every increase: its logarithm must not follow noise near zero
_ITERATIONS = 12


@dataclass(frozen=True)
class Surrogate:
    """The space as the surrogate sees it.

    Args:
        cost: prior cost of every group in every format, [groups, formats], nats per token.
        terms: which terms each (group, format) has, [groups, formats, terms], 0 or 1.
        spread: prior standard deviation of each term, [terms].
        base: loss of the unquantized model, nats per token.
    """

    cost: NDArray[np.float64]
    terms: NDArray[np.float64]
    spread: NDArray[np.float64]
    base: float

    def __post_init__(self) -> None:
        if self.cost.shape != self.terms.shape[:2] or self.terms.shape[2:] != self.spread.shape:
            raise ConfigError(
                f"a surrogate of costs {self.cost.shape} and terms {self.terms.shape}; give one term row "
                "per group and format"
            )


@dataclass(frozen=True)
class Multipliers:
    """A Gaussian over the terms θ and the link's coefficients.

    Args:
        mean: [terms + 3].
        root: a matrix R with covariance R Rᵀ, [terms + 3, terms + 3].
        noise: relative noise that the evidence chose.
    """

    mean: NDArray[np.float64]
    root: NDArray[np.float64]
    noise: float

    def draw(self, rng: np.random.Generator, temperature: float = 1.0) -> NDArray[np.float64]:
        """Return a sample [terms + 3], its deviation from the mean scaled by `temperature`."""
        return self.mean + temperature * (self.root @ rng.normal(size=len(self.mean)))


def multiplier_terms(space: ConfigSpace) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return (terms [groups, formats, terms], prior standard deviations [terms]) of a space."""
    by_name = space.model.by_name
    first = [by_name[group[0]] for group in space.groups]
    layers = 1 + max(matrix.layer for matrix in first)
    # Tables have a kind of their own; the depth they are given then changes nothing.
    depths = [max(matrix.layer, 0) * _DEPTHS // max(layers, 1) for matrix in first]
    labels: dict[tuple[str, object], int] = {}
    rows = []
    for i, matrix in enumerate(first):
        for j, _ in enumerate(space.formats):
            own = {
                "kind": matrix.kind,
                "depth": depths[i],
                "format": j,
                "kind, format": (matrix.kind, j),
                "kind, depth": (matrix.kind, depths[i]),
                "group": i,
            }
            rows.append([labels.setdefault(label, len(labels)) for label in own.items()])
    terms = np.zeros((len(first), len(space.formats), len(labels)))
    for place, columns in enumerate(rows):
        terms[place // len(space.formats), place % len(space.formats), columns] = 1.0
    return terms, np.array([_PRIOR[what] for what, _ in labels])


def disturbed(surrogate: Surrogate, theta: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the costs [groups, formats] under multipliers θ [terms + 3]."""
    multipliers: NDArray[np.float64] = np.exp(surrogate.terms @ theta[:-3])
    return surrogate.cost * multipliers


def predicted(surrogate: Surrogate, theta: NDArray[np.float64], cost: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the losses that θ's link gives to total costs [n], nats per token."""
    t = np.log(np.maximum(cost, 1e-12))
    # An increasing link: the parabola is held beyond its vertex.
    _, c1, c2 = theta[-3:]
    if c2 < 0:
        t = np.minimum(t, -c1 / (2 * c2))
    elif c2 > 0:
        t = np.maximum(t, -c1 / (2 * c2))
    increase = np.exp(np.minimum(theta[-3] + c1 * t + c2 * t * t, 50.0))
    return np.asarray(surrogate.base - _LEAST_INCREASE + increase)


def fit_multipliers(surrogate: Surrogate, choices: Sequence[NDArray[np.int64]], losses: Sequence[float]) -> Multipliers:
    """Return the Laplace approximation of the posterior (MacKay 1992), by Gauss–Newton from the prior mean.

    The relative noise is the one of greatest evidence among a few.

    Args:
        surrogate: prior costs and terms.
        choices: measured configurations as format numbers per group.
        losses: their losses, nats per token.
    """
    rows = np.arange(len(surrogate.cost))
    cost = np.stack([surrogate.cost[rows, choice] for choice in choices])  # (n, groups)
    terms = np.stack([surrogate.terms[rows, choice] for choice in choices])  # (n, groups, terms)
    increase = np.maximum(np.asarray(losses) - surrogate.base, 0.0) + _LEAST_INCREASE
    y = np.log(increase)
    mean = np.concatenate([np.zeros(len(surrogate.spread)), _LINK_MEAN])
    precision = np.concatenate([surrogate.spread, _LINK_SPREAD]) ** -2.0
    best: tuple[float, Multipliers] | None = None
    theta = mean.copy()  # each noise starts where the one before ended
    for noise in _RELATIVE_NOISE:
        weight = 1.0 / (noise**2 + (_ABSOLUTE_NOISE / increase) ** 2)
        jacobian, value = _linearised(cost, terms, theta)
        for _ in range(_ITERATIONS):
            hessian = (jacobian * weight[:, None]).T @ jacobian + np.diag(precision)
            step = np.linalg.solve(hessian, jacobian.T @ (weight * (y - value)) - precision * (theta - mean))
            before = _misfit(y - value, weight, theta - mean, precision)
            for _ in range(6):
                tried = theta + step
                jacobian, value = _linearised(cost, terms, tried)
                after = _misfit(y - value, weight, tried - mean, precision)
                if after <= before:
                    break
                step = step / 2
            theta = tried
            if abs(before - after) < 1e-4 * (1 + before):
                break
        hessian = (jacobian * weight[:, None]).T @ jacobian + np.diag(precision)
        lower = np.linalg.cholesky(hessian)
        evidence = (
            -0.5 * _misfit(y - value, weight, theta - mean, precision)
            + 0.5 * np.log(weight).sum()
            + 0.5 * np.log(precision).sum()
            - np.log(np.diag(lower)).sum()
        )
        if best is None or evidence > best[0]:
            best = float(evidence), Multipliers(theta, np.linalg.inv(lower).T, noise)
    assert best is not None
    return best[1]


def _misfit(
    residual: NDArray[np.float64],
    weight: NDArray[np.float64],
    moved: NDArray[np.float64],
    precision: NDArray[np.float64],
) -> float:
    return float((weight * residual**2).sum() + (precision * moved**2).sum())


def _linearised(
    cost: NDArray[np.float64], terms: NDArray[np.float64], theta: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return (∂ log Δ / ∂θ [n, terms + 3], log Δ [n]) at θ."""
    scaled = cost * np.exp(terms @ theta[:-3])  # (n, groups)
    total = np.maximum(scaled.sum(1), 1e-12)
    t = np.log(total)
    share = scaled / total[:, None]
    slope = theta[-2] + 2 * theta[-1] * t
    by_term = slope[:, None] * np.einsum("ng,ngp->np", share, terms)
    powers = np.stack([np.ones_like(t), t, t * t], 1)
    return np.concatenate([by_term, powers], 1), powers @ theta[-3:]

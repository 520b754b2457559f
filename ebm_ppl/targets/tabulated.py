"""A one-dimensional law tabulated on a fine float64 grid: quadrature for its constants, inverse CDF for its draws."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from ebm_ppl.types import Array, Key


class TabulatedLaw:
    """The density proportional to ``exp(log_weight(x))`` on ``[low, high]``, which must vanish at both ends.

    Integrals use the trapezoidal rule, which converges faster than any power of the spacing for a smooth integrand
    that vanishes at both ends: totals and expectations of smooth functions are exact to float64 rounding.

    Draws invert the piecewise linear CDF through the grid. With spacing ``h`` that CDF is within ``h^2 max|p'| / 4`` of
    the exact one: below 1e-6 for every law of this package, far below what any feasible number of draws can resolve.
    float32 draws add the rounding of a uniform variate, 1e-7.

    Args:
        log_weight: Unnormalised log density, a NumPy function of an array.
        low: Left end of the grid.
        high: Right end of the grid.
        num_points: Grid points.

    Raises:
        ValueError: the density does not vanish at an end of the grid.

    Example:
        >>> law = TabulatedLaw(lambda x: -0.5 * x**2, -9.0, 9.0)
        >>> round(float(law.log_normalizer), 10)  # log(2 pi) / 2
        0.9189385332
        >>> round(law.expectation(lambda x: x**2), 10)
        1.0
    """

    def __init__(
        self, log_weight: Callable[[np.ndarray], np.ndarray], low: float, high: float, num_points: int = 2**14 + 1
    ):
        self.points = np.linspace(low, high, num_points)
        log_weights = log_weight(self.points)
        peak = log_weights.max()
        weights = np.exp(log_weights - peak)
        if max(weights[0], weights[-1]) > 1e-14:
            raise ValueError(f"[{low}, {high}]: the density does not vanish at its ends; expected a wider interval.")
        spacing = self.points[1] - self.points[0]
        cells = 0.5 * spacing * (weights[1:] + weights[:-1])
        self.log_normalizer = float(np.log(cells.sum()) + peak)
        self.cumulative = np.concatenate([[0.0], np.cumsum(cells)]) / cells.sum()
        self._probabilities = weights / weights.sum()

    def expectation(self, function: Callable[[np.ndarray], np.ndarray]) -> float:
        """``E[function(X)]`` of a smooth function."""
        return float(np.sum(self._probabilities * function(self.points)))

    def cdf(self, points: np.ndarray | float) -> np.ndarray:
        """``P(X <= point)``, linear between grid points."""
        return np.asarray(np.interp(points, self.points, self.cumulative))

    def sample(self, key: Key, shape: tuple[int, ...]) -> Array:
        """I.i.d. draws of the given shape, by inverse CDF."""
        uniform = jax.random.uniform(key, shape)
        return jnp.interp(uniform, jnp.asarray(self.cumulative), jnp.asarray(self.points))

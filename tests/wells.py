"""A double well of three parameters: the one-dimensional target whose objectives and gradients are sums over a grid.

Every expectation of a smooth function under it is a Riemann sum that is exact to rounding in float64, so the exact value of
an objective, and by automatic differentiation its exact gradient, is one line.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from ebm_ppl.testing import t_test_chain_means

GRID = np.linspace(-3.0, 3.0, 4001)
PARAMETERS = np.array([4.0, 1.0, 0.3])


class Wells(eqx.Module):
    """U(x) = a (x^2 - b)^2 + c x, the parameters being (a, b, c)."""

    parameters: jax.Array

    def __call__(self, x):
        height, place, tilt = self.parameters
        return height * (x**2 - place) ** 2 + tilt * x


def log_normalizer(parameters):
    """log Z, differentiable. In float64 (``with jax.enable_x64(True)``) exact to rounding."""
    grid = jnp.asarray(GRID)
    return jax.nn.logsumexp(-jax.vmap(Wells(parameters))(grid)) + jnp.log(grid[1] - grid[0])


def grid_probabilities(parameters=PARAMETERS):
    """Probabilities of the points of the grid, as NumPy float64."""
    height, place, tilt = np.asarray(parameters, float)
    log_weight = -(height * (GRID**2 - place) ** 2 + tilt * GRID)
    weight = np.exp(log_weight - log_weight.max())
    return weight / weight.sum()


def exact_gradient(parameters, batch):
    """Autodiff of the exact negative log-likelihood of rows, in float64."""
    with jax.enable_x64(True):
        rows = jnp.asarray(np.asarray(batch), jnp.float64)

        def negative_log_likelihood(p):
            return jnp.mean(jax.vmap(Wells(p))(rows)) + log_normalizer(p)

        return np.asarray(jax.grad(negative_log_likelihood)(jnp.asarray(np.asarray(parameters), jnp.float64)))


def exact_draws(key, num, parameters=PARAMETERS):
    """Independent draws of the normalised density, by its inverse distribution function, ``(num,)``."""
    cumulative = np.cumsum(grid_probabilities(parameters))
    return jnp.asarray(np.interp(np.asarray(jax.random.uniform(key, (num,))), cumulative, GRID), jnp.float32)


def check_mean_gradient(gradients, exact, *, name="gradient"):
    """t-tests, one per parameter, that independent replicates ``(replicate, parameter)`` have the exact mean.

    At the suite's budget of false failures; each check states its power. Returns the checks for the caller to look at.
    """
    columns = enumerate(zip(np.asarray(gradients).T, np.asarray(exact), strict=True))
    checks = [
        t_test_chain_means(np.asarray(column, float), float(value), name=f"{name}[{index}]")
        for index, (column, value) in columns
    ]
    for check in checks:
        check.raise_if_failed()
    return checks


def check_gradient_of_scale(loss_of_energy, energy, shape, dtype, key):
    """A loss of ``scale * energy`` on zeros of a shape has a value and a gradient in ``scale``, under ``jit`` and ``vmap``.

    Nothing is computed: shapes and dtypes are those of an abstract evaluation.
    """
    with jax.enable_x64(dtype == jnp.float64):

        def loss(scale, rows, key):
            return loss_of_energy(lambda x: scale * energy(x), rows, key)

        real = dtype if jnp.issubdtype(dtype, jnp.floating) else jnp.result_type(float)
        rows, scale = jnp.zeros((2, 5, *shape), dtype), jnp.ones((), real)
        mapped = jax.vmap(jax.value_and_grad(loss), (None, 0, 0))
        value, gradient = jax.eval_shape(mapped, scale, rows, jax.random.split(key))
        assert value.dtype == gradient.dtype == real
    assert value.shape == gradient.shape == (2,)

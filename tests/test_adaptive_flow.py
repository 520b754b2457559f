"""Balanced training with an adaptive flow: the mode weight that local moves cannot learn, and the exact parts.

Acceptance and pools of a Gaussian proposal for a Gaussian target are in ``test_independence.py``, flows against Jacobians
and quadrature in ``test_flows.py``.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.optimize
import scipy.special

import ebm_ppl as ebm
from ebm_ppl import kernels, objectives, potentials

# --- the mode weight of one parameter: exp(theta sigmoid(x / .2)) tilts two equal modes at -4 and 4


class TwoHumps:
    """Equal parts of N(-4, 1) and N(4, 1): a base that compiles faster than NumPyro's mixture of the same law."""

    event_shape = ()

    def sample(self, key, shape):
        side, noise = jax.random.split(key)
        return jnp.where(jax.random.bernoulli(side, 0.5, shape), 4.0, -4.0) + jax.random.normal(noise, shape)

    def log_prob(self, x):
        left, right = (-0.5 * (x - mean) ** 2 for mean in (-4.0, 4.0))
        return jnp.logaddexp(left, right) - 0.5 * np.log(8.0 * np.pi)


jax.tree_util.register_static(TwoHumps)
LINE = TwoHumps()
AXIS = np.linspace(-12.0, 12.0, 4801)


class Logit(eqx.Module):
    """U(x) = -theta sigmoid(x / .2)."""

    theta: jax.Array

    def __call__(self, x):
        return -self.theta * jax.nn.sigmoid(x / 0.2)


def model_weight(theta):
    """Mass of the model right of zero, by quadrature."""
    density = np.exp(theta * scipy.special.expit(AXIS / 0.2) + np.asarray(LINE.log_prob(AXIS), np.float64))
    return density[AXIS > 0].sum() / density.sum()


def line_data(key, num_rows=4096):
    side, noise = jax.random.split(key)
    data = jnp.where(jax.random.uniform(side, (num_rows,)) < 2 / 3, 4.0, -4.0) + jax.random.normal(noise, (num_rows,))
    return data, float((data > 0).mean())


@eqx.filter_jit
def learn_line(key, data, kernel, num_steps):
    """Four hundred updates of the parameter; its mean over the second half."""
    optimizer = optax.adam(0.05)

    def update(carry, step_key):
        theta, state, position = carry

        def loss(theta):
            sampler = ebm.sampling.chains_at(position, kernel)
            tilted = potentials.tilt(Logit(theta), LINE)
            return objectives.persistent_contrastive_divergence(tilted, sampler, data, step_key, num_steps=num_steps)

        gradient, (sampler, _) = jax.grad(loss, has_aux=True)(theta)
        step, state = optimizer.update(gradient, state)
        return (theta + step, state, sampler.position), theta

    start = jnp.zeros(()), optimizer.init(jnp.zeros(())), LINE.sample(key, (512,))
    _, thetas = jax.lax.scan(update, start, jax.random.split(key, 400))
    return thetas[200:].mean(), thetas[-1]


def test_the_mode_weight_is_learned_with_global_moves_and_runs_away_without(key):
    """The best parameter is about .7; local chains keep their weights of one half, and the parameter has no limit."""
    data, weight = line_data(key)
    best = scipy.optimize.brentq(lambda theta: model_weight(theta) - weight, -5.0, 5.0)
    assert best == pytest.approx(np.log(2.0), abs=0.15)
    local = kernels.mala(0.3)
    for method in ("isir", "independence"):
        pool = 8 if method == "isir" else None
        kernel = kernels.flow_assisted(LINE, local, num_local=4, num_proposals=pool, method=method)
        mean, _ = learn_line(key, data, kernel, 1)
        assert abs(model_weight(float(mean)) - weight) <= 0.02
    mean, last = learn_line(key, data, local, 5)
    assert abs(model_weight(float(mean)) - weight) >= 0.2
    assert float(last) > 10.0

"""Potentials: combinators against their formulas, networks, and what they refuse."""

import distrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest

import ebm_ppl as ebm
from ebm_ppl import potentials


def quadratic(x):
    return 0.5 * jnp.sum(x**2)


def test_tilting_subtracts_the_log_density_of_the_base():
    base = dist.MultivariateNormal(jnp.array([0.5, -0.5]), jnp.array([[1.0, 0.3], [0.3, 2.0]]))
    tilted = potentials.tilt(quadratic, base)
    x = jnp.array([0.3, 1.2])
    np.testing.assert_allclose(tilted(x), 0.5 * (0.09 + 1.44) - base.log_prob(x), rtol=1e-6)
    np.testing.assert_allclose(jax.grad(tilted)(x), x - jax.grad(base.log_prob)(x), rtol=1e-5)
    assert tilted.support is base.support


def test_a_tilted_gaussian_is_the_gaussian_it_should_be():
    """N(0, I) tilted by x'Ax/2 - b'x is N((A + I)^-1 b, (A + I)^-1), log Z = b'(A + I)^-1 b/2 - logdet(A + I)/2."""
    a, b = jnp.array([[1.5, 0.4], [0.4, 0.7]]), jnp.array([0.3, -0.8])
    base = dist.Normal(0.0, 1.0).expand([2]).to_event(1)
    tilted = potentials.tilt(lambda x: 0.5 * x @ a @ x - b @ x, base)
    covariance = jnp.linalg.inv(a + jnp.eye(2))
    log_z = 0.5 * b @ covariance @ b - 0.5 * jnp.linalg.slogdet(a + jnp.eye(2))[1]
    exact = dist.MultivariateNormal(covariance @ b, covariance)
    for x in jax.random.normal(jax.random.key(0), (5, 2)):
        np.testing.assert_allclose(-tilted(x) - log_z, exact.log_prob(x), rtol=1e-5)


def test_a_distrax_base_works_as_it_is():
    base = distrax.MultivariateNormalDiag(jnp.zeros(2), jnp.ones(2))
    np.testing.assert_allclose(potentials.tilt(lambda x: 0.0 * x[0], base)(jnp.zeros(2)), np.log(2 * np.pi), rtol=1e-6)


def test_no_gradient_reaches_a_base_or_an_inverse_temperature():
    net = potentials.MLP(2, key=jax.random.key(0), width=4, depth=1, zero_init=False)
    base = dist.Normal(jnp.zeros(2), 1.0).to_event(1)
    whole = potentials.temper(potentials.tilt(net, base), 0.5)
    marked = potentials.trainable(whole)
    assert sum(jax.tree.leaves(marked)) == len(jax.tree.leaves(eqx.filter(net, eqx.is_inexact_array)))
    gradient = eqx.filter_grad(lambda u: u(jnp.ones(2)))(whole)
    fixed = (gradient.potential.base, gradient.inverse_temperature)
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(fixed))
    assert whole.support == base.support
    assert potentials.add(quadratic, whole).support == base.support


def test_adding_and_tempering_follow_their_formulas():
    total = potentials.add(quadratic, lambda x: x[0], lambda x: 2.0)
    x = jnp.array([1.0, 2.0])
    assert float(total(x)) == 2.5 + 1.0 + 2.0
    assert float(potentials.temper(total, 3.0)(x)) == 3.0 * 5.5
    with jax.enable_x64(True):
        assert potentials.temper(quadratic, 0.5)(jnp.ones(2, jnp.float32)).dtype == jnp.float32


@pytest.mark.parametrize(
    "net",
    [
        potentials.MLP(3, key=jax.random.key(0), width=8, depth=2),
        potentials.MLP((3, 2), key=jax.random.key(0), width=8, depth=1),
        potentials.Conv((8, 8), key=jax.random.key(0), channels=(4, 8)),
        potentials.Conv((7, 5, 3), key=jax.random.key(0), channels=(4,), width=8),
    ],
)
def test_networks_start_at_a_constant_energy_and_learn_any_event_shape(net):
    x = jax.random.normal(jax.random.key(1), (4, *net.event_shape))
    np.testing.assert_array_equal(jax.vmap(net)(x), 0.0)
    random = eqx.tree_at(lambda n: n.head.weight, net, jnp.ones_like(net.head.weight))
    assert len(set(jax.vmap(random)(x).tolist())) == 4
    gradient = jax.vmap(jax.grad(random))(x)
    assert gradient.shape == x.shape
    assert bool(jnp.isfinite(gradient).all())
    with pytest.raises(ValueError, match="event: got shape"):
        net(x)


def test_the_energy_of_a_row_does_not_depend_on_its_batch():
    net = potentials.Conv((8, 8), key=jax.random.key(0), zero_init=False)
    x = jax.random.normal(jax.random.key(1), (16, 8, 8))
    np.testing.assert_allclose(jax.vmap(net)(x)[3], net(x[3]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: potentials.tilt(3.0, dist.Normal()), TypeError, "potential: got float"),
        (lambda: potentials.tilt(quadratic, 3.0), TypeError, "base: got float"),
        (
            lambda: potentials.tilt(quadratic, dist.Normal(jnp.zeros(2), 1.0)),
            ValueError,
            r"base: got batch_shape \(2,\)",
        ),
        (lambda: potentials.add(), ValueError, "potentials: got none"),
        (lambda: potentials.add(quadratic, 3.0), TypeError, r"potentials\[1\]: got float"),
        (lambda: potentials.temper(quadratic, -1.0), ValueError, "inverse_temperature: got -1.0"),
        (lambda: potentials.temper("u", 1.0), TypeError, "potential: got str"),
        (lambda: potentials.MLP(0, key=jax.random.key(0)), ValueError, "event_shape: got 0"),
        (lambda: potentials.MLP(2, key=jax.random.key(0), width=0), ValueError, "width: got 0"),
        (lambda: potentials.MLP(2, key=jax.random.key(0), depth=1.5), TypeError, "depth: got 1.5"),
        (lambda: potentials.Conv((8,), key=jax.random.key(0)), ValueError, r"event_shape: got \(8,\)"),
        (lambda: potentials.Conv((8, 8), key=jax.random.key(0), channels=()), ValueError, "channels: got none"),
    ],
)
def test_bad_input_is_refused(call, error, text):
    with pytest.raises(error, match=text):
        call()


def test_the_table_of_contents_lists_what_it_offers():
    assert ebm.potentials is potentials
    for name in ("diagnostics", "plots", "targets", "testing", "fit", "EBM"):
        assert name in dir(ebm)
        assert getattr(ebm, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'kernel'"):
        ebm.kernel  # noqa: B018

"""NUTS over latent EBMs on constrained supports: the moments of the laws they are, and both sides of every seam."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.distributions import biject_to, constraints
from numpyro.infer import MCMC, NUTS

import ebm_ppl as ebm
from ebm_ppl.handlers import constant_normalizer
from ebm_ppl.supports import ProjectTransform, WrapTransform, ambient_sphere, is_circular, movable, wrapped_circle
from ebm_ppl.testing import t_test_chain_means

ALPHA = jnp.array([2.0, 3.0, 5.0])


def latent(energy, support, event_shape=()):
    def model():
        numpyro.sample("x", ebm.EBM(energy, dist.ImproperUniform(support, (), event_shape)))

    return constant_normalizer(model)


def draws(model, key, num_samples=100):
    mcmc = MCMC(
        NUTS(model),
        num_warmup=300,
        num_samples=num_samples,
        num_chains=64,
        chain_method="vectorized",
        progress_bar=False,
    )
    mcmc.run(key)
    assert int(mcmc.get_extra_fields()["diverging"].sum()) == 0
    return np.asarray(mcmc.get_samples(group_by_chain=True)["x"], np.float64)


@pytest.mark.slow
def test_simplex_moments(key):
    x = draws(latent(lambda x: -jnp.sum((ALPHA - 1.0) * jnp.log(x)), constraints.simplex, (3,)), key)
    for i, mean in enumerate((0.2, 0.3, 0.5)):
        t_test_chain_means(x[..., i], mean, name=f"mean {i}").raise_if_failed()
    t_test_chain_means(x[..., 0] ** 2, 0.2 * 0.8 / 11 + 0.04, name="second moment").raise_if_failed()


def test_circle_has_no_seam(key):
    """von Mises, kappa = 4, mode at pi. Cut open at pi, one chain crossed once in 2,000 draws, and E[cos] looked right."""
    x = draws(latent(lambda x: 4.0 * jnp.cos(x), constraints.circular), key)
    assert np.abs(x).max() <= np.float32(np.pi)
    t_test_chain_means(np.cos(x), -0.8635226, name="cos").raise_if_failed()
    t_test_chain_means(x > 0, 0.5, name="side").raise_if_failed()
    crossings = (np.diff(np.sign(x), axis=1) != 0).sum(axis=1)
    assert crossings.min() >= 10


def test_sphere_moments(key):
    """von Mises-Fisher, d = 3, kappa = 5: E[u_0] = coth 5 - 1/5."""
    u = draws(latent(lambda u: -5.0 * u[0], constraints.sphere, (3,)), key)
    np.testing.assert_allclose(np.linalg.norm(u, axis=-1), 1.0, atol=1e-5)
    t_test_chain_means(u[..., 0], 1 / np.tanh(5.0) - 0.2, name="mean direction").raise_if_failed()
    t_test_chain_means(u[..., 1], 0.0, name="across").raise_if_failed()


@pytest.mark.slow
def test_torus_of_two_coupled_angles(key):
    """x_1 | x_0 is von Mises around x_0, so their difference is von Mises and x_0 uniform."""
    x = draws(latent(lambda x: -2.0 * jnp.cos(x[0] - x[1]), constraints.circular, (2,)), key)
    ratio = 1.5906368546 / 2.2795853023  # I_1(2) / I_0(2)
    t_test_chain_means(np.cos(x[..., 0] - x[..., 1]), ratio, name="coupling").raise_if_failed()
    t_test_chain_means(np.cos(x[..., 0]), 0.0, name="uniform").raise_if_failed()


def test_movable_supports():
    assert movable(constraints.circular) is wrapped_circle
    assert movable(constraints.sphere) is ambient_sphere
    assert movable(constraints.positive) is constraints.positive
    product = movable(constraints.independent(constraints.circular, 1))
    assert is_circular(product)
    assert product.event_dim == 1
    assert not is_circular(constraints.real)
    assert isinstance(biject_to(wrapped_circle), WrapTransform)
    assert isinstance(biject_to(ambient_sphere), ProjectTransform)
    # NumPyro's own constraints keep their own transforms.
    assert not isinstance(biject_to(constraints.circular), WrapTransform)


def test_wrapping_is_a_translation_and_its_own_section():
    wrap, z = WrapTransform(), jnp.linspace(-20.0, 20.0, 101)
    x = wrap(z)
    assert bool(wrapped_circle(x).all())
    np.testing.assert_allclose(jnp.cos(x), jnp.cos(z), atol=1e-5)
    np.testing.assert_allclose(wrap(wrap.inv(x)), x, atol=1e-5)
    np.testing.assert_array_equal(jax.vmap(jax.grad(wrap))(z), 1.0)


@pytest.mark.parametrize("dim", [2, 3, 5])
def test_projection_of_a_gaussian_vector_is_uniform_on_the_sphere(dim):
    """exp(log |J|) times the surface density of the uniform law is the density of the Gaussian vector."""
    y = jax.random.normal(jax.random.key(0), (20, dim))
    project = ProjectTransform()
    u = project(y)
    assert bool(ambient_sphere(u).all())
    area = 2 * np.pi ** (dim / 2) / np.exp(jax.scipy.special.gammaln(dim / 2))
    gaussian = dist.Normal(0.0, 1.0).log_prob(y).sum(axis=-1)
    np.testing.assert_allclose(project.log_abs_det_jacobian(y, u) - np.log(area), gaussian, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(project(project.inv(u)), u, atol=1e-6)


@pytest.mark.parametrize(
    "support", [constraints.boolean, constraints.nonnegative_integer, constraints.integer_interval(0, 4)]
)
def test_discrete_supports_have_no_transform_and_say_what_moves_there(support):
    site = ebm.EBM(lambda x: 1.0 * x, dist.ImproperUniform(support, (), ()))
    with pytest.raises(TypeError, match=r"discrete support .*exact_normalizer.*Gibbs-with-gradients"):
        site.transform  # noqa: B018


def test_supports_without_a_transform_are_named():
    base = dist.ImproperUniform(constraints.positive_definite_circulant_vector, (), (3,))
    with pytest.raises(TypeError, match=r"PositiveDefiniteCirculantVector.*no transform"):
        ebm.EBM(jnp.sum, base).transform  # noqa: B018

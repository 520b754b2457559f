"""Independence and i-SIR kernels: closed-form acceptance and pools, invariance, seeded faults, non-finite energies."""

import distrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
import scipy.stats

import ebm_ppl as ebm
from ebm_ppl import kernels, targets
from ebm_ppl.proposals import log_density
from ebm_ppl.testing import exact_start_invariance, t_test_chain_means

# Wider than their targets, with heavier tails, and not centred on them.
PROPOSALS = {
    "gumbel": dist.Laplace(0.0, 1.5),
    "student_t": dist.Cauchy(0.5, 1.5),
    "gaussian_mixture": dist.Laplace(0.5, 3.0),
    "banana": dist.Laplace(jnp.array([0.2, 0.0]), jnp.array([2.0, 3.0])).to_event(1),
}
KERNELS = {"independence": kernels.independence, "isir": lambda q: kernels.isir(q, num_proposals=4)}


def gaussian(x):
    return 0.5 * jnp.sum(x**2)


def normal(scale, dim):
    return dist.Normal(0.0, scale).expand([dim]).to_event(1)


def one_step(key, kernel, num_chains, dim):
    """Reports of one step from exact draws of a standard normal: i.i.d. over chains."""
    start = jax.random.normal(jax.random.fold_in(key, 0), (num_chains, dim))
    return ebm.advance(jax.random.fold_in(key, 1), gaussian, ebm.init_sampler(start, kernel), 1)[1]


@pytest.mark.parametrize(("dim", "value"), [(1, 0.8349), (4, 0.6237)])
def test_acceptance_of_an_overdispersed_gaussian(key, dim, value):
    sigma = 1.3
    exact = 2.0 * scipy.stats.f.cdf(1.0 / sigma**2, dim, dim)
    assert abs(exact - value) < 1e-4
    info = one_step(key, kernels.independence(normal(sigma, dim)), 200_000, dim)
    check = t_test_chain_means(np.asarray(info.acceptance_rate), exact)
    check.raise_if_failed()
    assert check.power < 0.01
    assert info.num_energies.tolist() == [2] * 200_000  # the start, and one proposal
    assert not bool(info.num_gradients.any())


@pytest.mark.parametrize(("dim", "value"), [(1, 0.9129), (4, 0.6944)])
def test_effective_sample_size_of_a_pool(key, dim, value):
    sigma = 1.3
    exact = (np.sqrt(2 * sigma**2 - 1) / sigma**2) ** dim
    assert abs(exact - value) < 1e-4
    # A pool of n has an ESS fraction that differs from its limit by O(1/n), far below the error of the mean here.
    info = one_step(key, kernels.isir(normal(sigma, dim), num_proposals=8000), 64, dim)
    check = t_test_chain_means(np.asarray(info.statistics["pool_ess"]), exact)
    check.raise_if_failed()
    assert check.power < 0.02


def test_a_perfect_proposal(key):
    info = one_step(key, kernels.independence(normal(1.0, 4)), 1000, 4)
    np.testing.assert_allclose(info.acceptance_rate, 1.0, atol=2e-5)
    num_proposals = 8
    info = one_step(key, kernels.isir(normal(1.0, 4), num_proposals=num_proposals), 100_000, 4)
    np.testing.assert_allclose(info.acceptance_rate, (num_proposals - 1) / num_proposals, atol=1e-5)
    np.testing.assert_allclose(info.statistics["pool_ess"], 1.0, atol=1e-5)
    # What is reported is what happens.
    t_test_chain_means(np.asarray(info.has_moved, float), (num_proposals - 1) / num_proposals).raise_if_failed()
    assert info.num_energies[0] == num_proposals  # of which one for the start


SLOW = [
    ("independence", "student_t"),
    ("independence", "gaussian_mixture"),
    ("independence", "banana"),
    ("isir", "gumbel"),
    ("isir", "gaussian_mixture"),
]


@pytest.mark.parametrize(
    ("kernel", "name"),
    [
        ("independence", "gumbel"),
        ("isir", "student_t"),
        ("isir", "banana"),
        *[pytest.param(*pair, marks=pytest.mark.slow) for pair in SLOW],
    ],
)
def test_exact_start_invariance(key, kernel, name):
    report = law_of(key, KERNELS[kernel](PROPOSALS[name]), name)
    report.raise_if_failed()
    assert 0.2 < report.acceptance < 0.95


def law_of(key, kernel, name, **options):
    return exact_start_invariance(
        key, kernel, targets.get(name), num_chains=20_000, num_steps=3, reference_factor=2, **options
    )


class Tampered(eqx.Module):
    """A distribution that lies about its density: to its draws, or to events handed to it."""

    honest: dist.Distribution
    fault: str = eqx.field(static=True)

    def sample_and_log_prob(self, key, n):
        draws = self.honest.sample(key, (n,))
        return draws, self._lie(self.honest.log_prob(draws))

    def log_prob(self, events):
        honest = self._lie(self.honest.log_prob(events))
        return jnp.full_like(honest, jnp.inf) if self.fault == "own weight left out" else honest

    def _lie(self, log_prob):
        factor = {"density left out": 0.0, "wrong sign": -1.0}.get(self.fault, 1.0)
        return factor * log_prob


@pytest.mark.parametrize("name", ["gumbel", pytest.param("banana", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("kernel", "fault"),
    [
        ("independence", "density left out"),
        ("isir", "density left out"),
        ("isir", "own weight left out"),
        ("isir", "wrong sign"),
    ],
)
def test_the_harness_rejects_a_seeded_fault(key, kernel, fault, name):
    kernel = KERNELS[kernel](Tampered(PROPOSALS[name], fault))
    if fault == "wrong sign":
        report = law_of(key, lambda potential: kernel(lambda event: -potential(event)), name, minimum_moved=0.0)
    else:
        report = law_of(key, kernel, name, minimum_moved=0.0)
    assert not all(check.passed for check in report.checks), report


def cliff(x):
    """Not a number above 1, infinite below -1, minus infinity in between at a slit."""
    energy = jnp.where(x > 1.0, jnp.nan, jnp.where(x < -1.0, jnp.inf, 0.5 * x**2))
    return jnp.where(jnp.abs(x - 0.5) < 0.2, -jnp.inf, energy)


@pytest.mark.parametrize("kernel", KERNELS)
def test_nonfinite_energies_are_rejected_and_counted(key, kernel):
    sampler = ebm.init_sampler(jnp.zeros(256), KERNELS[kernel](dist.Normal(0.0, 1.0)))
    after, info = ebm.advance(key, cliff, sampler, 20)
    assert bool(jnp.isfinite(jax.vmap(cliff)(after.position)).all())
    assert not bool(info.is_divergent.any())
    assert bool((info.num_nonfinite > 0).all())
    assert bool(jnp.isfinite(info.acceptance_rate).all())
    if kernel == "isir":
        assert bool(jnp.isfinite(info.statistics["pool_ess"]).all())


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_chain_whose_energy_is_not_finite_leaves(key, kernel):
    sampler = ebm.init_sampler(jnp.resize(jnp.array([3.0, -3.0, 0.5]), 256), KERNELS[kernel](dist.Normal(0.0, 1.0)))
    after, _ = ebm.advance(key, cliff, sampler, 20)
    assert bool(jnp.isfinite(jax.vmap(cliff)(after.position)).all())


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_chain_with_nowhere_to_go_stays_and_is_flagged(key, kernel):
    sampler = ebm.init_sampler(jnp.full(16, 3.0), KERNELS[kernel](dist.Normal(5.0, 0.1)))
    after, info = ebm.advance(key, cliff, sampler, 3)
    assert after.position.tolist() == [3.0] * 16
    assert bool(info.is_divergent.all())
    assert not bool(info.has_moved.any())
    np.testing.assert_array_equal(info.acceptance_rate, 0.0)


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_chain_outside_the_support_of_the_proposal_stays(key, kernel):
    """NumPyro's density of a uniform is finite outside; taken at its word it would bring every chain in."""
    uniform = dist.Uniform(-1.0, 1.0)
    sampler = ebm.init_sampler(jnp.array([2.0, -3.0, 0.5, 0.0]), KERNELS[kernel](uniform))
    after, info = ebm.advance(key, lambda x: 0.5 * x**2, sampler, 20)
    assert info.has_moved.tolist() == [False, False, True, True]
    assert after.position[:2].tolist() == [2.0, -3.0]
    assert bool(jnp.isfinite(info.acceptance_rate).all())
    assert log_density(uniform, jnp.array([2.0, 0.0]))[0] == -jnp.inf


def test_proposals_of_numpyro_and_distrax_change(key):
    traces = 0

    def energy(x):
        nonlocal traces
        traces += 1
        return 0.5 * jnp.sum(x**2)

    families = {
        "numpyro": lambda scale: normal(scale, 2),
        # Its structure holds bound methods, which equal no others: it works, and compiles anew.
        "distrax": lambda scale: distrax.MultivariateNormalDiag(jnp.zeros(2), scale * jnp.ones(2)),
    }
    for library, family in families.items():
        sampler = ebm.init_sampler(jnp.zeros((8, 2)), kernels.isir(family(1.5), num_proposals=4))
        sampler, before = ebm.advance(key, energy, sampler, 2)
        num_traces = traces
        sampler, after = ebm.advance(key, energy, ebm.adaptation.set_tunables(sampler, proposal=family(9.0)), 2)
        # The shape check at the boundary, and no compilation.
        assert library == "distrax" or traces - num_traces <= 1
        assert after.acceptance_rate.mean() < before.acceptance_rate.mean()


def test_float64(key):
    with jax.enable_x64(True):
        for make in (KERNELS["isir"],):
            sampler = ebm.init_sampler(jnp.zeros((8, 2)), make(normal(1.2, 2)))
            assert ebm.advance(key, gaussian, sampler, 3)[0].position.dtype == jnp.float64


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: kernels.independence(3.0), TypeError, "proposal: got float, expected a distribution with a log_prob"),
        (
            lambda: kernels.independence(dist.Normal(0.0, 1.0).expand([3])),
            ValueError,
            r"proposal: got batch_shape \(3,\)",
        ),
        (lambda: kernels.isir(dist.Normal(0.0, 1.0), num_proposals=1), ValueError, "num_proposals: got 1"),
        (lambda: kernels.isir(dist.Normal(0.0, 1.0), num_proposals=2.0), TypeError, "num_proposals: got 2.0"),
        (
            lambda: kernels.isir(dist.ImproperUniform(dist.constraints.real, (), ()), num_proposals=2),
            ValueError,
            "cannot be sampled",
        ),
    ],
)
def test_bad_kernels_are_refused(call, error, text):
    with pytest.raises(error, match=text):
        call()


@pytest.mark.parametrize("kernel", KERNELS)
def test_chains_that_the_proposal_does_not_fit_are_refused(key, kernel):
    sampler = ebm.init_sampler(jnp.zeros((4, 3)), KERNELS[kernel](normal(1.0, 2)))
    with pytest.raises(ValueError, match=r"proposal: got events of shape \(2,\), expected those of the chains, \(3,\)"):
        ebm.advance(key, gaussian, sampler, 1)
    sampler = ebm.init_sampler({"x": jnp.zeros(4)}, KERNELS[kernel](dist.Normal(0.0, 1.0)))
    with pytest.raises(TypeError, match=f"position: got a dict, and {kernel} proposes events that are one array"):
        ebm.advance(key, lambda event: event["x"] ** 2, sampler, 1)

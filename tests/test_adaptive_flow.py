"""Balanced training with an adaptive flow: the mode weight that local moves cannot learn, and the exact parts.

Acceptance and pools of a Gaussian proposal for a Gaussian target are in ``test_independence.py``, flows against Jacobians
and quadrature in ``test_flows.py``, invariance of the whole kernel from exact starts in ``test_composition.py``.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import optax
import pytest
import scipy.optimize
import scipy.special

import ebm_ppl as ebm
from ebm_ppl import flows, kernels, objectives, potentials, recipes
from ebm_ppl.info import step_info
from ebm_ppl.objectives.contrastive import energy_gap

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


# --- closed forms


def gap_gradient(potential, rows, chains, log_weight=None):
    """Gradient of the contrastive loss with these negatives, at these weights."""
    sampler = ebm.sampling.chains_at(chains, kernels.mala(0.1))
    if log_weight is not None:
        sampler = sampler._replace(log_weight=jnp.asarray(log_weight, jnp.float32))
    info = step_info(sampler.num_chains)
    return eqx.filter_grad(lambda potential: energy_gap(potential, rows, sampler, info)[0])(potential)


class Quadratic(eqx.Module):
    """U(x) = x'Ax / 2 - b'x, tilting a standard normal."""

    curvature: jax.Array
    slope: jax.Array

    def __call__(self, x):
        return 0.5 * x @ self.curvature @ x - self.slope @ x


def points_with(mean, covariance):
    """Rows whose mean and covariance are exactly these."""
    steps = np.sqrt(len(mean)) * np.linalg.cholesky(covariance).T
    return jnp.asarray(np.concatenate([mean + steps, mean - steps]), jnp.float32)


def test_a_tilted_gaussian_has_its_normalizer_and_its_best_parameters():
    base = dist.Normal(jnp.zeros(2), 1.0).to_event(1)
    mean, covariance = np.array([0.4, -0.7]), np.array([[0.5, 0.2], [0.2, 0.8]])
    precision = np.linalg.inv(covariance)
    best = Quadratic(*(jnp.asarray(x, jnp.float32) for x in (precision - np.eye(2), precision @ mean)))
    exact = 0.5 * mean @ precision @ mean - 0.5 * np.linalg.slogdet(precision)[1]
    found = ebm.normalizer.quadrature(ebm.EBM(best, base))
    np.testing.assert_allclose(found.value, exact, atol=1e-4)
    rows = points_with(mean, covariance)
    at_best = gap_gradient(best, rows, rows)
    assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(at_best)) < 1e-6
    elsewhere = gap_gradient(best, rows, points_with(mean, 1.1 * covariance))
    assert float(jnp.abs(elsewhere.curvature).max()) > 0.01


class Regions(eqx.Module):
    """U(x) = -theta_k in region k: what an energy can do about mode weights."""

    theta: jax.Array

    def __call__(self, x):
        return -self.theta @ jax.nn.one_hot(x.astype(int), 3)


def test_weights_of_modes_are_learned_from_chains_that_mix_and_drift_for_ever_from_those_that_do_not():
    base, target = np.array([0.5, 0.3, 0.2]), np.array([0.2, 0.3, 0.5])
    modes, rows = jnp.arange(3.0), jnp.repeat(jnp.arange(3.0), np.array([2, 3, 5]), total_repeat_length=10)
    best = Regions(jnp.asarray(np.log(target / base), jnp.float32))
    mixing = np.log(base) + np.asarray(best.theta)
    assert float(jnp.abs(gap_gradient(best, rows, modes, mixing).theta).max()) < 1e-6
    for theta in (np.zeros(3), np.array([3.0, 0.0, -5.0])):  # wherever the energy is, the step is the same
        stuck = gap_gradient(Regions(jnp.asarray(theta, jnp.float32)), rows, modes, np.log(base))
        np.testing.assert_allclose(stuck.theta, base - target, atol=1e-6)


def test_the_gradient_is_that_of_the_likelihood_on_a_grid(key):
    rows, _ = line_data(key, 512)
    theta = 0.4

    def loss(theta):
        kernel = theta * scipy.special.expit(AXIS / 0.2) + np.asarray(LINE.log_prob(AXIS), np.float64)
        log_z = scipy.special.logsumexp(kernel) + np.log(AXIS[1] - AXIS[0])
        return log_z - theta * scipy.special.expit(np.asarray(rows, np.float64) / 0.2).mean()

    slope = (loss(theta + 1e-4) - loss(theta - 1e-4)) / 2e-4
    log_weight = theta * scipy.special.expit(AXIS / 0.2) + np.asarray(LINE.log_prob(AXIS), np.float64)
    found = gap_gradient(Logit(jnp.asarray(theta)), rows, jnp.asarray(AXIS, jnp.float32), log_weight)
    np.testing.assert_allclose(found.theta, slope, atol=1e-5)


# --- the recipe


def test_target_proposal_and_base_are_one_law_at_the_start_and_only_the_flow_moves(key):
    base = dist.Normal(jnp.array([1.0, -1.0]), jnp.full(2, 2.0)).to_event(1)
    data = base.sample(key, (128,))
    flow = flows.RealNVP(2, key=key, num_layers=2, width=4, depth=1, base=base)
    network = potentials.MLP(2, key=key, width=4, depth=1, zero_init=True)
    x = base.sample(jax.random.fold_in(key, 1), (16,))
    expected = base.log_prob(x)
    np.testing.assert_allclose(flow.log_prob(x), expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(-jax.vmap(potentials.tilt(network, base))(x), expected, rtol=1e-6)

    options = {"network": network, "base": base, "flow": flow, "bank_size": 64, "num_cycles": 1, "num_local": 1}
    state, history = recipes.adaptive_flow(
        key, data, num_updates=3, batch_size=32, num_proposals=4, step_size=0.25, report_every=3, **options
    )
    tunables = state.sampler.kernel.keywords
    assert float(tunables["step_size"]) == 0.25
    moved = tunables["proposal"]
    for before, after in zip(jax.tree.leaves(flow.base), jax.tree.leaves(moved.base), strict=True):
        np.testing.assert_array_equal(before, after)
    assert any((a != b).any() for a, b in zip(jax.tree.leaves(flow), jax.tree.leaves(moved), strict=True))
    # The first negatives are draws of the base, so a step's pool has nearly its largest effective size.
    assert history["evaluation_global_pool_ess"][-1] > 0.9


@pytest.mark.slow
def test_a_flow_that_lost_the_energy_is_reported(key):
    side = dist.Normal(jnp.full(2, 30.0), 0.1).to_event(1)
    flow = flows.RealNVP(2, key=key, num_layers=2, width=4, depth=1, base=side)
    data = jax.random.normal(key, (128, 2))
    with pytest.warns(RuntimeWarning, match="the flow has collapsed or lost the energy"):
        recipes.adaptive_flow(key, data, num_updates=2, batch_size=32, flow=flow, bank_size=64, report_every=2)


def test_a_base_on_half_the_space_is_refused(key):
    data = 1.0 + jax.random.uniform(key, (64, 2))
    with pytest.raises(ValueError, match=r"base: got one on .*, expected one on the whole space"):
        recipes.adaptive_flow(key, data, num_updates=1, base=dist.Gamma(2.0, 1.0).expand([2]).to_event(1))
    with pytest.raises(TypeError, match="batch_size"):
        recipes.adaptive_flow(key, data, num_updates=1, batch_size="16")


def test_an_optimizer_of_proposals_needs_one():
    only = flows.proposal_only(optax.sgd(1.0))
    with pytest.raises(ValueError, match="proposal_only with a kernel that has no proposal"):
        only.init(kernels.mala(0.1))
    with pytest.raises(TypeError, match="optimizer: got str"):
        flows.proposal_only("adam")
    two = kernels.cycle(*(kernels.independence(dist.Normal(0.0, scale)) for scale in (1.0, 2.0)))
    updates, _ = only.update(jax.tree.map(jnp.ones_like, two), only.init(two), two)
    assert all(bool((leaf != 0).all()) for leaf in jax.tree.leaves(updates))

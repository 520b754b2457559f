"""Generator-initialised chains follow their closed-form joint law, expose their latents, and claim no more."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from scipy import stats

import ebm_ppl as ebm
from ebm_ppl import kernels, targets
from ebm_ppl.adaptation import set_tunables
from ebm_ppl.testing import cdf_test, exact_start_invariance

NUM_CHAINS = 30_000
LOADINGS = np.array([[1.0, 0.2], [-0.5, 0.8], [0.3, 0.6]])
PRECISION = np.array([[1.5, 0.4, 0.0], [0.4, 1.0, -0.3], [0.0, -0.3, 2.0]])
STEP_SIZE, NOISE_SCALE, INITIAL_SCALE, NUM_STEPS = 0.2, 0.25, 0.5, 4
# Weights of (x_k, x_0, z) in the combinations whose laws are compared.
COMBINATIONS = {
    "x_k": np.array([1.0, 0.5, -1.0, 0, 0, 0, 0, 0]),
    "x_k and x_0": np.array([1.0, 0, 0.5, -1.0, 0.3, 0, 0, 0]),
    "x_k and z": np.array([1.0, -1.0, 0, 0, 0, 0, -1.0, 0.7]),
    "all": np.array([0.3, 1.0, 0.4, 0.6, -1.0, 0.1, 0.5, -1.0]),
}


class Linear(eqx.Module):
    weight: jax.Array

    def __call__(self, latent):
        return self.weight @ latent


def energy(x):
    return 0.5 * x @ jnp.asarray(PRECISION, x.dtype) @ x


def joint_covariance(num_steps):
    """Of (x_k, x_0, z), by x' = M x + eta xi from x_0 = W z + sigma e."""
    contraction = np.eye(3) - STEP_SIZE * PRECISION
    initial = LOADINGS @ LOADINGS.T + INITIAL_SCALE**2 * np.eye(3)
    power, noise = np.eye(3), np.zeros((3, 3))
    for _ in range(num_steps):
        power = contraction @ power
        noise = contraction @ noise @ contraction.T + NOISE_SCALE**2 * np.eye(3)
    return np.block(
        [
            [power @ initial @ power.T + noise, power @ initial, power @ LOADINGS],
            [initial @ power.T, initial, LOADINGS],
            [LOADINGS.T @ power.T, LOADINGS.T, np.eye(2)],
        ]
    )


def langevin_kernel(**options):
    return kernels.generator(
        Linear(jnp.asarray(LOADINGS, jnp.float32)), latent_shape=2, num_steps=NUM_STEPS, step_size=STEP_SIZE,
        noise_scale=NOISE_SCALE, initial_scale=INITIAL_SCALE, **options,
    )  # fmt: skip


def test_latent_initial_and_revised_event_have_their_joint_law(key):
    sampler, info = ebm.advance(key, energy, ebm.init_sampler(jnp.zeros((NUM_CHAINS, 3)), langevin_kernel()), 1)
    initial, latent = sampler.auxiliary["initial"], sampler.auxiliary["latent"]
    triple = np.concatenate([sampler.position, initial, latent], axis=1)
    exact, other = joint_covariance(NUM_STEPS), joint_covariance(NUM_STEPS + 1)
    fooled = []
    for name, combination in COMBINATIONS.items():
        values = triple @ combination
        cdf_test(values, stats.norm(0.0, np.sqrt(combination @ exact @ combination)).cdf, name=name).raise_if_failed()
        wrong = cdf_test(values, stats.norm(0.0, np.sqrt(combination @ other @ combination)).cdf, name=name)
        fooled.append(wrong.passed)
    assert not all(fooled)  # the law of one step more is told apart
    assert info.num_gradients.tolist()[0] == NUM_STEPS + 1  # advance counts the start of a phase
    distance = jnp.linalg.norm(sampler.position - initial, axis=1)
    np.testing.assert_allclose(info.statistics["revision_distance"], distance, rtol=1e-5)


def exact_generator(target):
    """Gaussian draws of the target itself: x = L z."""
    precision = np.asarray(target.potential.precision, np.float64)
    return Linear(jnp.asarray(np.linalg.cholesky(np.linalg.inv(precision)), jnp.float32))


@pytest.mark.parametrize("kind", ["calibrated", "langevin", "wrong generator"])
def test_only_an_exact_generator_with_a_calibrated_kernel_is_invariant(key, kind):
    target = targets.get("gaussian")
    exact = exact_generator(target)
    kernel = {
        "calibrated": lambda: kernels.generator(exact, latent_shape=2, num_steps=3, local=kernels.mala(0.4)),
        "langevin": lambda: kernels.generator(exact, latent_shape=2, num_steps=3, step_size=0.4),
        "wrong generator": lambda: kernels.generator(
            Linear(1.5 * exact.weight), latent_shape=2, num_steps=3, local=kernels.mala(0.4)
        ),
    }[kind]()
    report = exact_start_invariance(key, kernel, target, num_chains=20_000, num_steps=2)
    if kind == "calibrated":
        report.raise_if_failed()
        assert 0.4 < report.acceptance < 0.9
    else:
        assert not all(check.passed for check in report.checks), report


def test_a_step_depends_on_its_key_alone_and_exposes_what_it_started_from(key):
    generator = Linear(jnp.asarray(LOADINGS, jnp.float32))
    kernel = kernels.generator(generator, latent_shape=2, num_steps=2, step_size=0.1)
    algorithm = kernel(energy)
    states = [algorithm.step(key, algorithm.init(jnp.full((5, 3), x), key))[0] for x in (0.0, 9.0)]
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), *states))
    np.testing.assert_array_equal(states[0].auxiliary["initial"], jax.vmap(generator)(states[0].auxiliary["latent"]))
    other, _ = algorithm.step(jax.random.fold_in(key, 1), states[0])
    assert not bool((other.auxiliary["latent"] == states[0].auxiliary["latent"]).any())


def test_training_takes_it_and_a_trained_generator_does_not_recompile(key):
    traces = 0

    def counted(x):
        nonlocal traces
        traces += 1
        return energy(x)

    batch = jnp.ones((8, 3))
    sampler = ebm.init_sampler(batch, langevin_kernel())
    assert sampler.auxiliary["latent"].shape == (8, 2)
    loss, (after, _) = ebm.objectives.persistent_contrastive_divergence(energy, sampler, batch, key, num_steps=1)
    assert bool(jnp.isfinite(loss))
    assert after.auxiliary["initial"].shape == (8, 3)
    _, draws = ebm.draw(key, energy, sampler, 3)
    assert draws.statistics["revision_distance"].shape == (8, 3)
    ebm.advance(key, counted, sampler, 1)
    before = traces
    changed = set_tunables(sampler, generator=Linear(jnp.zeros((3, 2))), step_size=0.01, initial_scale=0.1)
    ebm.advance(key, counted, changed, 1)
    assert traces - before <= 1  # the shape check at the boundary, and no compilation


def test_generators_of_any_kind_and_shape(key):
    def images(latent):
        return jnp.tanh(latent).reshape(2, 2)

    network = eqx.nn.MLP(3, 4, 8, 1, key=key)
    for generator, shape in ((images, (2, 2)), (network, (4,))):
        latent_shape = 4 if shape == (2, 2) else (3,)
        kernel = kernels.generator(generator, latent_shape=latent_shape, num_steps=2, local=kernels.hmc(0.1, 2))
        sampler = ebm.init_sampler(jnp.zeros((4, *shape)), kernel)
        sampler, info = ebm.advance(key, lambda x: jnp.sum(x**2), sampler, 1)
        assert sampler.position.shape == (4, *shape)
        assert info.num_gradients.tolist() == [6] * 4  # two trajectories of two, their start, and that of the phase


GENERATOR = Linear(jnp.ones((3, 2)))


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"generator": 3}, TypeError, "generator: got int"),
        ({"num_steps": -1}, ValueError, "num_steps: got -1"),
        ({"latent_shape": 0}, ValueError, "latent_shape: got 0"),
        ({"step_size": None}, ValueError, "step_size: got None without a local kernel"),
        ({"local": kernels.mala(0.1)}, ValueError, "step_size: got one together with local"),
        ({"step_size": None, "local": 3}, TypeError, "local: got int"),
        ({"initial_scale": -1.0}, ValueError, "initial_scale: got -1.0"),
        ({"noise_scale": 0.1, "temperature": 1.0}, ValueError, "temperature: got 1.0 together"),
    ],
)
def test_bad_arguments_are_refused(options, error, text):
    arguments = {"generator": GENERATOR, "latent_shape": 2, "num_steps": 2, "step_size": 0.1, **options}
    with pytest.raises(error, match=text):
        kernels.generator(**arguments)


def test_nested_kernels_and_wrong_events_are_refused(key):
    inner = kernels.generator(GENERATOR, latent_shape=2, num_steps=2, step_size=0.1)
    with pytest.raises(TypeError, match="local: got a kernel that draws its chains anew"):
        kernels.generator(GENERATOR, latent_shape=2, num_steps=2, local=inner)
    with pytest.raises(ValueError, match=r"generator: made an event of shape \(3,\), expected .* \(2,\)"):
        ebm.advance(key, lambda x: jnp.sum(x**2), ebm.init_sampler(jnp.zeros((4, 2)), inner), 1)


def _advance_once(key, local):
    kernel = kernels.generator(GENERATOR, latent_shape=2, num_steps=1, local=local)
    return ebm.advance(key, energy, ebm.init_sampler(jnp.zeros((4, 3)), kernel), 1)


def test_a_prior_that_jit_cannot_see_and_weights_that_would_be_lost_are_refused(key):
    class WithPrior:
        def __call__(self, latent):
            return latent

        def sample_prior(self, key):
            return 100.0 + jax.random.normal(key, (2,))

    with pytest.raises(TypeError, match=r"generator: got a WithPrior with a prior of its own that is no pytree"):
        kernels.generator(WithPrior(), latent_shape=2, num_steps=0)
    start = dist.Normal(0.0, 1.0).expand([3]).to_event(1)
    smc = kernels.tempered_smc(inner=kernels.mala(0.1), reference=start, keep_weights=True)
    with pytest.raises(TypeError, match="local: got a kernel"):
        _advance_once(key, smc)


def test_a_prior_of_latents_is_standard_normal(key):
    kernel = kernels.generator(GENERATOR, latent_shape=2, num_steps=1, step_size=1e-6)
    sampler, _ = ebm.advance(key, energy, ebm.init_sampler(jnp.zeros((NUM_CHAINS, 3)), kernel), 1)
    cdf_test(sampler.auxiliary["latent"][:, 0], dist.Normal(0.0, 1.0).cdf).raise_if_failed()

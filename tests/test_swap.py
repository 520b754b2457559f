"""Another sampler is one changed argument: in a training objective, in a NumPyro model, and in the conformance harness."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from numpyro.infer import SVI, Trace_ELBO

import ebm_ppl as ebm
from ebm_ppl import kernels
from ebm_ppl.diffusion import DiffusionSampler
from ebm_ppl.flows import RealNVP
from ebm_ppl.objectives import persistent_contrastive_divergence
from ebm_ppl.testing import kernel_conformance

BASE = dist.Normal(0.0, 1.0).expand([2]).to_event(1)
WIDE = dist.StudentT(5.0, 0.0, 1.2).expand([2]).to_event(1)


def push(z):
    return 0.7 * z


def from_base(key, num_chains):
    return BASE.sample(key, (num_chains,))


@functools.cache
def flow():
    return RealNVP(2, key=jax.random.key(1), num_layers=2, width=8, depth=1)


@functools.cache
def diffuser():
    return DiffusionSampler(2, num_steps=3, key=jax.random.key(2), width=8, depth=1)


MALA = kernels.mala(step_size=0.4)
KERNELS = {
    "adjusted_mclmc": lambda: kernels.adjusted_mclmc(0.5, 4),
    "barker": lambda: kernels.barker(step_size=1.0),
    "cycle": lambda: kernels.cycle(MALA, kernels.hmc(0.5, 3)),
    "diffusion": lambda: kernels.diffusion(diffuser()),
    "diffusion, metropolis": lambda: kernels.diffusion(diffuser(), correction="metropolis"),
    "flow_assisted": lambda: kernels.flow_assisted(flow(), MALA, num_local=2, num_proposals=4),
    "generator": lambda: kernels.generator(push, latent_shape=2, num_steps=3, step_size=0.05),
    "global_local": lambda: kernels.global_local(kernels.independence(WIDE), MALA, num_local=2),
    "hmc": lambda: kernels.hmc(step_size=0.5, num_integration_steps=4),
    "independence": lambda: kernels.independence(WIDE),
    "isir": lambda: kernels.isir(WIDE, num_proposals=4),
    "langevin": lambda: kernels.langevin(step_size=0.05),
    "mala": lambda: MALA,
    "mixture": lambda: kernels.mixture([MALA, kernels.independence(WIDE)], [0.5, 0.5]),
    "nuts": lambda: kernels.nuts(step_size=0.5, max_num_doublings=3),
    "random_walk": lambda: kernels.random_walk(0.8),
    "raw_diffusion": lambda: kernels.raw_diffusion(diffuser()),
    "replica_exchange": lambda: kernels.replica_exchange([1.0, 0.5, 0.2], inner=MALA),
    "short_run": lambda: kernels.short_run(3, from_base, step_size=0.1, noise_scale=0.3),
    "tempered_smc": lambda: kernels.tempered_smc(inner=MALA, num_steps=1),
    "tempered_smc, weighted": lambda: kernels.tempered_smc(inner=MALA, num_steps=1, keep_weights=True),
    "unadjusted_langevin": lambda: kernels.unadjusted_langevin(step_size=0.1),
    "unadjusted_mclmc": lambda: kernels.unadjusted_mclmc(0.3, 1.5),
}
FAST = {"diffusion", "flow_assisted", "generator", "replica_exchange", "tempered_smc, weighted"}
EVERY = [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in KERNELS]

# Populations whose members meet: resampling, or a draw for all of them.
TOGETHER = {"tempered_smc", "tempered_smc, weighted"}


def test_no_kernel_is_left_out():
    """Each kernel of the package is here or, if discrete or of the sphere, in the tests of those."""
    discrete = {"discrete_langevin", "gibbs", "gibbs_with_gradients", "unadjusted_discrete_langevin"}
    public = {name for name, value in vars(kernels).items() if callable(value) and not name.startswith("_")}
    here = {name.partition(",")[0] for name in KERNELS}
    assert public - discrete - {"sphere_langevin", "from_blackjax", "implied_temperature", "mclmc"} == here


def tilted(strength=1.0):
    return ebm.potentials.tilt(jax.tree_util.Partial(pull, jnp.asarray(strength)), BASE)


def pull(strength, x):
    return 0.5 * strength * jnp.sum((x - 1.0) ** 2)


@pytest.mark.parametrize("name", EVERY)
def test_in_persistent_contrastive_divergence(name, key):
    """The gradient in the strength is that of the mean squared distance, data against negatives: exact is -1.5 + .75."""
    start = BASE.sample(jax.random.fold_in(key, 1), (512,))
    sampler = ebm.init_sampler(start, KERNELS[name]())
    data = jnp.ones((4, 2)) + jnp.sqrt(1.5)

    @jax.jit
    def update(key, sampler):
        def loss(strength):
            objective = functools.partial(persistent_contrastive_divergence, num_steps=30)
            return objective(tilted(strength), sampler, data, key)

        return jax.grad(loss, has_aux=True)(1.0)

    gradient, (sampler, metrics) = update(key, sampler)
    assert np.isfinite(float(gradient))
    assert int(metrics["num_divergent"]) == 0
    if name not in {"raw_diffusion", "generator", "short_run"}:  # which follow a law of their own
        # Chains at N(1/2, I/2): E|x - 1|^2 / 2 = .75; 512 chains give it to about .04.
        assert float(gradient) == pytest.approx(1.5 - 0.75, abs=0.2)
    update(jax.random.fold_in(key, 2), sampler)
    assert update._cache_size() == 1


@pytest.mark.parametrize("name", EVERY)
def test_in_a_numpyro_model(name):
    data = 0.5 + 0.5 * jax.random.normal(jax.random.key(5), (200, 2))

    def model(data):
        strength = numpyro.param("strength", 0.5, constraint=dist.constraints.positive)
        with numpyro.plate("rows", len(data)):
            numpyro.sample("x", ebm.EBM(lambda x: pull(strength, x), BASE), obs=data)

    phase = ebm.handlers.negative_phase(model, kernel=KERNELS[name](), num_chains=64, num_steps=2)
    svi = SVI(phase, lambda data: None, optax.adam(0.02), Trace_ELBO())
    result = svi.run(jax.random.key(0), 5, data, progress_bar=False)
    # Data are tighter than the model: the strength grows, by about the learning rate per update.
    assert 0.5 < float(result.params["strength"]) < 0.7


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n == "isir" else pytest.mark.slow) for n in KERNELS])
def test_keeps_the_protocol(name):
    position = 0.5 + jnp.sqrt(0.5) * jax.random.normal(jax.random.key(0), (64, 2))
    report = kernel_conformance(
        jax.random.key(1), KERNELS[name](), tilted(), position, independent_chains=name not in TOGETHER
    )
    if name == "raw_diffusion":  # which never looks at the energy: it cannot count one that is NaN, and says it is raw
        report = report._replace(findings=tuple(f for f in report.findings if not f.rule.startswith("a NaN energy")))
    report.raise_if_failed()


@pytest.mark.parametrize("name", ["diffusion", "generator", "raw_diffusion", "short_run", "tempered_smc"])
def test_what_draws_afresh_is_refused_where_particles_carry_weights(name):
    """Their weights would belong to particles that are gone."""
    kernel, message = KERNELS[name](), "draws its chains anew"

    def model(data):
        numpyro.sample("x", ebm.EBM(lambda x: pull(numpyro.param("strength", 1.0), x), BASE), obs=data)

    with pytest.raises(TypeError, match=message):
        ebm.handlers.negative_phase(model, kernel=kernel, loss_value="tracked")
    with pytest.raises(TypeError, match=message):
        ebm.handlers.estimated_normalizer(model, kernel=kernel)
    with pytest.raises(TypeError, match=message):
        ebm.infer.Exchange(model, inner_kernel=kernel, inner_steps=3)
    with pytest.raises(TypeError, match=message):
        ebm.normalizer.annealed_importance(jax.random.key(0), ebm.EBM(lambda x: pull(1.0, x), BASE), kernel=kernel)
    for inner in (kernel, kernels.cycle(kernel, MALA)) if name in {"raw_diffusion", "short_run"} else (kernel,):
        with pytest.raises(TypeError, match=message):
            kernels.tempered_smc(inner=inner)

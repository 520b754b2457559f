"""Kernels made of kernels: invariance, honest counts, tunables within reach, and what is refused."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from blackjax.base import SamplingAlgorithm

import ebm_ppl as ebm
from ebm_ppl import kernels, targets
from ebm_ppl.adaptation import set_tunables, tunables
from ebm_ppl.info import step_info
from ebm_ppl.testing import binomial_test, exact_start_invariance
from tests.test_independence import PROPOSALS

STEP_SIZE = {"gumbel": 1.6, "student_t": 2.0, "gaussian_mixture": 1.0, "banana": 0.37}


def quadratic(x):
    return 0.5 * jnp.sum(x**2)


def compositions(name):
    isir, mala = kernels.isir(PROPOSALS[name], num_proposals=4), kernels.mala(STEP_SIZE[name])
    return {
        "global_local": kernels.global_local(isir, mala, 2),
        "mixture": kernels.mixture([isir, mala, kernels.independence(PROPOSALS[name])], [0.2, 0.5, 0.3]),
        "cycle": kernels.cycle(mala, isir, kernels.hmc(STEP_SIZE[name] ** 0.5, 2)),
        "flow_assisted": kernels.flow_assisted(PROPOSALS[name], mala, num_local=1, method="independence"),
    }


FAST = [("global_local", "gumbel"), ("mixture", "banana"), ("cycle", "gumbel")]
SLOW = [(kind, name) for name in STEP_SIZE for kind in ("global_local", "mixture", "cycle") if (kind, name) not in FAST]


@pytest.mark.parametrize(
    ("kind", "name"),
    [*FAST, *[pytest.param(*pair, marks=pytest.mark.slow) for pair in [*SLOW, ("flow_assisted", "gaussian_mixture")]]],
)
def test_exact_start_invariance(key, kind, name):
    law_of(key, compositions(name)[kind], name).raise_if_failed()


def law_of(key, kernel, name, **options):
    return exact_start_invariance(
        key, kernel, targets.get(name), num_chains=20_000, num_steps=2, reference_factor=2, **options
    )


def stale(algorithm_of):
    """A local kernel that believes the log density of the positions before the global step."""

    def kernel(potential):
        algorithm = algorithm_of(potential)

        def init(position, rng_key):
            state = algorithm.init(position, rng_key)
            return state._replace(logdensity=state.logdensity - 1.0)

        return SamplingAlgorithm(init, algorithm.step)

    return kernel


def choice_by_state(potential):
    """A mixture of moving and staying that looks at the state before it chooses, which no mixture may."""
    algorithm = kernels.isir(PROPOSALS["gumbel"], num_proposals=4)(potential)

    def step(rng_key, state):
        moved, info = algorithm.step(rng_key, state)
        chosen = state.position > 0
        return jax.tree.map(lambda new, old: jnp.where(chosen, new, old), moved, state), info

    return SamplingAlgorithm(algorithm.init, step)


def test_the_harness_rejects_a_stale_density_and_a_choice_by_state(key):
    isir, mala = kernels.isir(PROPOSALS["gumbel"], num_proposals=4), kernels.mala(STEP_SIZE["gumbel"])
    for fault in (kernels.global_local(isir, stale(mala), 1), choice_by_state):
        report = law_of(key, fault, "gumbel", minimum_moved=0.0)
        assert not all(check.passed for check in report.checks), report


@pytest.mark.parametrize(
    ("kernel", "gradients", "energies"),
    [
        # Per step, then for the start. A global step costs one gradient at the new positions, whatever num_local is.
        (kernels.flow_assisted(dist.Normal(0.0, 2.0), kernels.mala(0.3), num_local=3, num_proposals=5), (4, 1), (4, 0)),
        (kernels.flow_assisted(dist.Normal(0.0, 2.0), kernels.mala(0.3), method="independence"), (5, 1), (1, 0)),
        (kernels.cycle(kernels.mala(0.3), kernels.hmc(0.3, 4)), (5, 1), (0, 0)),
        (kernels.mixture([kernels.mala(0.3), kernels.hmc(0.3, 4)], [0.5, 0.5]), (5, 1), (0, 0)),
        (kernels.mixture([kernels.independence(dist.Normal(0.0, 2.0)), kernels.mala(0.3)], [0.5, 0.5]), (2, 1), (1, 0)),
        (kernels.cycle(*[kernels.independence(dist.Normal(0.0, 2.0))] * 2), (0, 0), (2, 1)),
        (kernels.cycle(kernels.cycle(kernels.mala(0.3)), kernels.mala(0.2)), (2, 1), (0, 0)),
    ],
)
def test_every_evaluation_is_counted_and_none_is_made_twice(key, kernel, gradients, energies):
    num_chains, num_steps, evaluations = 3, 4, []

    def energy(x):
        jax.debug.callback(lambda _: evaluations.append(1), x)  # once for each chain, with a gradient or without
        return 0.5 * jnp.sum(x**2)

    _, info = ebm.advance(key, energy, ebm.init_sampler(jnp.zeros(num_chains), kernel), num_steps)
    jax.effects_barrier()
    assert info.num_gradients.tolist() == [num_steps * gradients[0] + gradients[1]] * num_chains
    assert info.num_energies.tolist() == [num_steps * energies[0] + energies[1]] * num_chains
    counted = int(info.num_gradients.sum() + info.num_energies.sum())
    # Where only the log density is kept, as in a mixture with an independence kernel, the compiled start may skip more.
    assert len(evaluations) == counted


def test_statistics_and_acceptance_of_the_parts(key):
    kernel = kernels.flow_assisted(dist.Normal(0.0, 1.0), kernels.mala(0.5), num_local=2, num_proposals=4)
    _, info = ebm.advance(key, quadratic, ebm.init_sampler(jnp.zeros(64), kernel), 10)
    assert set(info.statistics) == {"global_acceptance_rate", "global_pool_ess", "local_acceptance_rate"}
    np.testing.assert_allclose(info.statistics["global_acceptance_rate"], 0.75, atol=1e-5)
    np.testing.assert_allclose(info.acceptance_rate, info.statistics["local_acceptance_rate"], rtol=1e-6)
    # Without a step size among the parts, the mean of those that have an accept step.
    kernel = kernels.cycle(*[kernels.isir(dist.Normal(0.0, 1.0), num_proposals=n) for n in (2, 4)])
    _, info = ebm.advance(key, quadratic, ebm.init_sampler(jnp.zeros(64), kernel), 10)
    np.testing.assert_allclose(info.acceptance_rate, (0.5 + 0.75) / 2, atol=1e-5)


def test_chains_choose_their_kernels_independently(key):
    """Kernels that leave a mark: one moves up by one, the other down."""

    def mark(sign):
        def kernel(potential):
            def step(rng_key, state):
                return Marked(state.position + sign), step_info(state.position.shape[0])

            return SamplingAlgorithm(lambda position, rng_key: Marked(position), step)

        return kernel

    num_chains = 20_000
    sampler = ebm.init_sampler(jnp.zeros(num_chains), kernels.mixture([mark(1.0), mark(-1.0)], [0.3, 0.7]))
    sampler, draws = ebm.draw(key, quadratic, sampler, 2)
    steps = jnp.diff(draws.position, axis=1, prepend=0.0)
    binomial_test(int((steps[:, 0] > 0).sum()), num_chains, 0.3).raise_if_failed()
    both = (steps[:, 0] > 0) & (steps[:, 1] > 0)
    binomial_test(int(both.sum()), num_chains, 0.09).raise_if_failed()
    neighbours = (steps[::2, 0] > 0) & (steps[1::2, 0] > 0)
    binomial_test(int(neighbours.sum()), num_chains // 2, 0.09).raise_if_failed()
    # The probabilities are a tunable.
    sampler, _ = ebm.advance(key, quadratic, set_tunables(sampler, probabilities=jnp.array([1.0, 0.0])), 1)
    assert bool((sampler.position == draws.position[:, -1] + 1.0).all())


class Marked(NamedTuple):
    position: jax.Array


def test_tunables_are_those_of_the_parts():
    def names(kernel):
        return sorted(tunables(ebm.init_sampler(jnp.zeros(4), kernel)))

    mala, isir = kernels.mala(0.3), kernels.isir(dist.Normal(0.0, 1.0), num_proposals=2)
    assert names(kernels.global_local(isir, mala, 2)) == ["proposal", "step_size"]
    assert names(kernels.global_local(mala, mala, 2)) == ["global_step_size", "local_step_size"]
    assert names(kernels.mixture([isir, mala], [0.5, 0.5])) == ["probabilities", "proposal", "step_size"]
    assert names(kernels.cycle(mala, mala)) == ["kernel_0_step_size", "kernel_1_step_size"]
    # A composition inside another one whose names would meet.
    nested = kernels.cycle(mala, kernels.cycle(mala, mala), mala)
    assert len(names(nested)) == 4
    assert "kernel_1_kernel_0_step_size" in names(nested)


def test_tunables_change_without_recompiling_and_the_local_step_is_tuned(key):
    traces = 0

    def energy(x):
        nonlocal traces
        traces += 1
        return 0.5 * jnp.sum(x**2)

    kernel = kernels.flow_assisted(dist.Normal(0.0, 1.5), kernels.mala(0.01), num_local=2, num_proposals=4)
    sampler = ebm.init_sampler(jnp.zeros(256), kernel)
    ebm.advance(key, energy, sampler, 5)
    before = traces
    changed = set_tunables(sampler, proposal=dist.Normal(1.0, 4.0), step_size=0.5)
    _, info = ebm.advance(key, energy, changed, 5)
    assert traces - before <= 1  # the shape check at the boundary, and no compilation
    assert info.statistics["global_pool_ess"].mean() < 0.8
    tuned = ebm.tune_step_size(key, energy, sampler, 0.7)
    _, info = ebm.advance(key, energy, tuned, 5)
    assert abs(float(info.statistics["local_acceptance_rate"].mean()) - 0.7) < 0.05
    both = ebm.init_sampler(jnp.zeros(4), kernels.cycle(kernels.mala(0.1), kernels.mala(0.2)))
    with pytest.raises(ValueError, match=r"its kernel has tunables \['kernel_0_step_size', 'kernel_1_step_size'\]"):
        ebm.tune_step_size(key, energy, both)


def test_events_may_be_pytrees_where_the_parts_allow_them(key):
    position = {"a": jnp.zeros((4, 3)), "b": jnp.zeros(4)}

    def energy(event):
        return 0.5 * jnp.sum(event["a"] ** 2) + 0.5 * event["b"] ** 2

    for kernel in (
        kernels.cycle(kernels.mala(0.3), kernels.hmc(0.3, 3)),
        kernels.mixture([kernels.mala(0.3), kernels.hmc(0.3, 3)], [0.5, 0.5]),
    ):
        sampler, _ = ebm.advance(key, energy, ebm.init_sampler(position, kernel), 5)
        assert jax.tree.map(jnp.shape, sampler.position) == {"a": (4, 3), "b": (4,)}


class Carrying:
    """The function behind a kernel whose chains carry more than a position."""

    def start_auxiliary(self, position):
        return position

    def __call__(self, potential):
        raise AssertionError


class Weighted(NamedTuple):
    position: jax.Array
    log_weight: jax.Array


def weighted(potential):
    return SamplingAlgorithm(
        lambda position, rng_key: Weighted(position, jnp.zeros(position.shape[0])), lambda rng_key, state: (state, None)
    )


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: kernels.global_local(kernels.mala(0.1), 3, 2), TypeError, "local_kernel: got int, expected a kernel"),
        (lambda: kernels.global_local(kernels.mala(0.1), kernels.mala(0.1), 0), ValueError, "num_local: got 0"),
        (lambda: kernels.cycle(), ValueError, "kernels: got none"),
        (lambda: kernels.cycle(kernels.mala(0.1), Carrying()), TypeError, "kernel_1: got a kernel whose chains carry"),
        (lambda: kernels.mixture([kernels.mala(0.1)], [0.5, 0.5]), ValueError, r"probabilities: got shape \(2,\)"),
        (lambda: kernels.mixture([kernels.mala(0.1)] * 2, [0.5, 0.6]), ValueError, r"probabilities: got \[0.5, 0.6\]"),
        (lambda: kernels.mixture([kernels.mala(0.1)] * 2, [-0.5, 1.5]), ValueError, "probabilities: got"),
        (
            lambda: kernels.flow_assisted(dist.Normal(0, 1), kernels.mala(0.1), method="x"),
            ValueError,
            "method: got 'x'",
        ),
        (
            lambda: kernels.flow_assisted(dist.Normal(0, 1), kernels.mala(0.1), num_proposals=3, method="independence"),
            ValueError,
            "num_proposals: got 3 for method='independence', which has no pool",
        ),
    ],
)
def test_bad_compositions_are_refused(call, error, text):
    with pytest.raises(error, match=text):
        call()


def test_weighted_populations_are_refused(key):
    sampler = ebm.init_sampler(jnp.zeros(4), kernels.cycle(weighted, kernels.mala(0.1)))
    with pytest.raises(TypeError, match="kernels: got one whose chains have weights of their own"):
        ebm.advance(key, quadratic, sampler, 1)

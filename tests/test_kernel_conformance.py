"""Every kernel keeps the protocol, and the harness that says so sees each fault."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import pytest
from blackjax.base import SamplingAlgorithm
from jax.tree_util import Partial

from ebm_ppl import kernels
from ebm_ppl.info import step_info
from ebm_ppl.testing import kernel_conformance

POSITION = jax.random.normal(jax.random.key(0), (32, 2))


def quadratic(x):
    return 0.5 * jnp.sum(x**2)


# --- a kernel written by hand, right and with one fault at a time ----------------------------------------------------


class Walk(NamedTuple):
    position: jax.Array
    energy: jax.Array


def random_walk(potential, *, scale, fault=None):
    """A Metropolis random walk on a population, in as few lines as a user would write."""

    def init(position, rng_key):
        return Walk(position, jax.vmap(potential)(position))

    def step(rng_key, state):
        move_key, accept_key = jax.random.split(jax.random.key(3) if fault == "key" else rng_key)
        noise = jax.random.normal(move_key, state.position.shape)
        proposal = state.position + scale * noise
        if fault == "coupled":
            proposal = proposal + 0.1 * state.position.mean(axis=0)
        if fault == "frozen":
            proposal = state.position
        energy = jax.vmap(potential)(proposal)
        log_ratio = state.energy - energy
        if fault == "absolute energy":
            log_ratio = -energy
        finite = jnp.isfinite(energy)
        accept = jnp.log(jax.random.uniform(accept_key, energy.shape)) < log_ratio
        if fault == "nan accepted":
            accept = accept | ~finite
        position = jnp.where(accept[:, None], proposal, state.position)
        if fault == "dtype":
            position = position.astype(jnp.float16)
        counted = 0 if fault == "nan not counted" else ~finite
        info = step_info(len(energy), acceptance_rate=jnp.exp(jnp.minimum(log_ratio, 0)), num_nonfinite=counted)
        if fault == "info":
            info = info._replace(acceptance_rate=info.acceptance_rate.mean())
        return Walk(position, jnp.where(accept, energy, state.energy)), info

    return SamplingAlgorithm(init, step)


class ByHand(NamedTuple):
    fault: str | None = None

    def __call__(self, potential, scale):
        return random_walk(potential, scale=scale, fault=self.fault)


def by_hand(fault=None):
    return Partial(ByHand(fault), scale=jnp.array(0.8))


def test_a_kernel_of_five_lines_conforms():
    kernel_conformance(jax.random.key(1), by_hand(), quadratic, POSITION).raise_if_failed()


FAULTS = {
    "key": "the same key gives the same run",
    "coupled": "a chain does not depend",
    "frozen": "chains move",
    "absolute energy": "an additive constant",
    "nan accepted": "a NaN energy is counted",
    "nan not counted": "a NaN energy is counted",
    "dtype": "a step keeps",
    "info": "a step reports",
}


@pytest.mark.parametrize(
    "fault", [f if f in ("coupled", "nan accepted") else pytest.param(f, marks=pytest.mark.slow) for f in FAULTS]
)
def test_every_fault_is_seen_by_its_rule(fault):
    report = kernel_conformance(jax.random.key(1), by_hand(fault), quadratic, POSITION)
    broken = [finding.rule for finding in report.findings if not finding.passed]
    assert any(rule.startswith(FAULTS[fault]) for rule in broken), str(report)
    with pytest.raises(AssertionError, match="FAIL "):
        report.raise_if_failed()


def test_a_step_size_that_is_no_leaf_is_seen():
    report = kernel_conformance(jax.random.key(1), Partial(random_walk, scale=0.8), quadratic, POSITION, num_steps=1)
    assert not report.findings[0].passed


def test_one_chain_is_refused():
    with pytest.raises(ValueError, match="at least two"):
        kernel_conformance(jax.random.key(1), kernels.mala(0.5), quadratic, POSITION[:1])

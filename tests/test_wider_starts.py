"""SMC of a diagnosis starts anew from a wider base where the model reaches beyond its own."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest

import ebm_ppl as ebm
from ebm_ppl.diagnostics import diagnose
from ebm_ppl.diagnostics.tempered_runs import moving_kernel, run_tempered
from ebm_ppl.diagnostics.widened import Stretched, widened
from ebm_ppl.kernels import mala
from ebm_ppl.subjects import find_subject

BASE = dist.Normal(0.0, 1.0).expand([2]).to_event(1)
FAR = jnp.array([9.0, 0.0])
SCALE = 0.5
LOG_Z = 0.7
"""Known by construction: the energy below is that of a normalised law, less this constant."""


def far_away(x):
    """What makes the base a normal law nine standard deviations away."""
    return BASE.log_prob(x) - dist.Normal(FAR, SCALE).to_event(1).log_prob(x) - LOG_Z


def temper(may_widen, seed=0):
    subject = find_subject(ebm.EBM(far_away, BASE), jnp.zeros(2))
    draws = FAR + SCALE * jax.random.normal(jax.random.key(seed), (200, 2))
    sampler = ebm.init_sampler(draws[:64], mala(step_size=0.1))
    keys = jax.random.split(jax.random.key(seed + 1))
    kernel = moving_kernel(keys[0], subject, sampler, draws[:64])
    return run_tempered(keys[1], subject, kernel, draws, 60_000, None, may_widen=may_widen)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_log_z_is_right_from_the_wider_start(seed):
    found = temper(True, seed)
    assert found.num_starts > 1
    assert float(found.forward.value) == pytest.approx(LOG_Z, abs=4 * float(found.forward.standard_error) + 1e-3)
    assert float(found.forward.standard_error) < 0.1
    # From above, and late: 128 particles on the long way back. What the check of the gap takes for agreement is 1.
    assert -0.3 < float(found.reverse.value) - LOG_Z < 1.0


@pytest.mark.slow
def test_a_given_reference_is_kept():
    assert temper(False).num_starts == 1


@pytest.mark.slow
def test_a_model_beyond_its_base_is_judged_all_the_same():
    draws = FAR + SCALE * jax.random.normal(jax.random.key(3), (1000, 2))
    sampler = ebm.init_sampler(draws[:64], mala(step_size=0.1))
    for shift, verdict in ((0.0, "pass"), (0.5, "fail")):
        found = diagnose(ebm.EBM(far_away, BASE), sampler, draws + shift, jax.random.key(4), budget=200_000)
        assert found.model == verdict, found


def test_the_wider_start_is_a_normalised_law_around_both():
    rng = np.random.default_rng(0)
    first, found = rng.normal(size=(2000, 2)), rng.normal(size=(2000, 2)) * 0.5 + np.array([9.0, 0.0])
    wide = widened(BASE, first, found)
    # From -2 to 9 + 2 / 2 in the first coordinate, from -2 to 2 in the other.
    np.testing.assert_allclose(wide.shift, [4.0, 0.0], atol=0.2)
    np.testing.assert_allclose(wide.factor, [6.0, 2.0], atol=0.2)
    ticks = jnp.linspace(-40.0, 40.0, 801)
    grid = jnp.stack(jnp.meshgrid(ticks, ticks), -1).reshape(-1, 2)
    assert float(jnp.exp(wide.log_prob(grid)).sum() * (ticks[1] - ticks[0]) ** 2) == pytest.approx(1.0, abs=1e-3)
    draws = np.asarray(wide.sample(jax.random.key(0), (4000,)))
    np.testing.assert_allclose(draws.std(axis=0), wide.factor, rtol=0.06)
    np.testing.assert_allclose(draws.mean(axis=0), wide.shift, atol=0.4)


def test_it_has_no_rows():
    law = Stretched(BASE, jnp.zeros(2), jnp.ones(2))
    assert law.expand(()) is law
    with pytest.raises(ValueError, match="batch_shape"):
        law.expand((3,))

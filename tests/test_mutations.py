"""The tests tested: seeded faults in the package, each of which some test must catch.

A fault is an edit of one place in a copy of the package; the tests named beside it then run against the copy in a process
of their own, and one of them must fail. The text of a fault that has gone from the package is itself a failure.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]


class Fault(NamedTuple):
    """``old`` becomes ``new`` in ``path`` (below the package); ``tests`` are arguments of pytest."""

    path: str
    old: str
    new: str
    tests: str


FAULTS = {
    # what an EBM site means
    "dropped log Z": Fault(
        "distributions.py",
        "return self.unnormalized_log_prob(value) - self.log_normalizer",
        "return self.unnormalized_log_prob(value)",
        "tests/test_distributions.py -k quartic_integrates",
    ),
    "dropped Jacobian": Fault(
        "normalizer/unconstrained.py",
        "return event, log_jacobian.reshape(*lead, -1).sum(axis=-1)",
        "return event, 0.0 * log_jacobian.reshape(*lead, -1).sum(axis=-1)",
        "tests/test_normalizer.py -k quadrature_of_targets",
    ),
    "dropped base": Fault(
        "potentials/combinators.py",
        "return jnp.where(inside, 0.0, jnp.inf) + self.potential(safe) - base.log_prob(safe)",
        "return jnp.where(inside, 0.0, jnp.inf) + self.potential(safe)",
        "tests/test_potentials.py",
    ),
    "temperature upside down": Fault(
        "potentials/combinators.py",
        "return jax.lax.stop_gradient(self.inverse_temperature.value).astype(energy.dtype) * energy",
        "return energy / jax.lax.stop_gradient(self.inverse_temperature.value).astype(energy.dtype)",
        "tests/test_potentials.py",
    ),
    # the contrastive gradient
    "sign of the negative phase": Fault(
        "objectives/contrastive.py",
        "    loss = energy_data - energy_negative\n",
        "    loss = energy_data + energy_negative\n",
        "tests/test_objectives.py -k exhaustive",
    ),
    "no stop-gradient on negatives": Fault(
        "objectives/contrastive.py",
        "jax.lax.stop_gradient(negatives.position)",
        "negatives.position",
        "tests/test_objectives.py -k sends_no_gradient",
    ),
    "weights ignored": Fault(
        "objectives/contrastive.py",
        "weight = normalized_weights(log_weight, axis=None).astype(negative.dtype)",
        "weight = (jnp.ones_like(log_weight) / log_weight.size).astype(negative.dtype)",
        "tests/test_objectives.py -k exhaustive",
    ),
    "chains not carried": Fault(
        "objectives/contrastive.py",
        "    sampler = moving if index is None else scatter_chains(sampler, index, moving)\n",
        "",
        "tests/test_objectives.py -k continue_where",
    ),
    "negatives put back elsewhere": Fault(
        "replay.py",
        "old.at[index].set(new)",
        "old.at[: new.shape[0]].set(new)",
        "tests/test_objectives.py tests/test_sampling.py -k 'bank or scatter or gather'",
    ),
    "restarts with the wrong probability": Fault(
        "replay.py",
        "chosen = jax.random.bernoulli(key, probability, (sampler.num_chains,))",
        "chosen = jax.random.bernoulli(key, 1.0 - probability, (sampler.num_chains,))",
        "tests/test_objectives.py -k restarts_come",
    ),
    "key reuse": Fault(
        "sampling.py",
        "    init_key, run_key = jax.random.split(key)\n    func = function_behind(sampler.kernel)",
        "    init_key, run_key = key, key\n    func = function_behind(sampler.kernel)",
        "tests/test_training.py -k used_twice",
    ),
    "the same noise at every update": Fault(
        "training/loop.py",
        "jax.random.fold_in(step_key, state.step)",
        "step_key",
        "tests/test_training.py -k 'used_twice or maximum_likelihood'",
    ),
    # the other objectives
    "sign of the trace": Fault(
        "objectives/score.py",
        "return 0.5 * jnp.sum(gradient(x) ** 2) - jnp.sum(hessian_diagonal(gradient, x))",
        "return 0.5 * jnp.sum(gradient(x) ** 2) + jnp.sum(hessian_diagonal(gradient, x))",
        "tests/test_score.py -k fisher_divergence_up_to",
    ),
    "noise without its density": Fault(
        "objectives/noise_contrastive.py",
        "return -jax.vmap(potential)(rows) - row_log_prob, -jax.vmap(potential)(draws) - log_prob",
        "return -jax.vmap(potential)(rows), -jax.vmap(potential)(draws)",
        "tests/test_noise_contrastive.py -k nce_gradient_is_that",
    ),
    "work of the wrong sign": Fault(
        "kernels/reweighted.py",
        "log_weight = auxiliary.log_weight + auxiliary.energy - energy",
        "log_weight = auxiliary.log_weight - auxiliary.energy + energy",
        "tests/test_weighted.py -k unbiased_along",
    ),
    # training
    "rows drawn with replacement": Fault(
        "training/batches.py",
        "return jax.random.permutation(jax.random.fold_in(key, epoch), self.num_rows)",
        "return jax.random.randint(jax.random.fold_in(key, epoch), (self.num_rows,), 0, self.num_rows)",
        "tests/test_training.py -k every_row_is_seen",
    ),
    "one shuffle for all epochs": Fault(
        "training/batches.py",
        "return jax.random.permutation(jax.random.fold_in(key, epoch), self.num_rows)",
        "return jax.random.permutation(key, self.num_rows)",
        "tests/test_training.py -k every_row_is_seen",
    ),
    "a masked NaN": Fault(
        "training/loop.py",
        "healthy = is_finite(numbers) & is_healthy(eqx.combine(arrays, static))",
        "healthy = jnp.ones((), bool)",
        "tests/test_training.py -k stops_training",
    ),
    "the base is trained": Fault(
        "potentials/combinators.py",
        "            return jax.tree.map(lambda _: False, node)\n",
        "            return jax.tree.map(eqx.is_inexact_array, node)\n",
        "tests/test_training.py -k does_not_move",
    ),
    "the sampler learns from the old potential": Fault(
        "training/step.py",
        "sampler_objective(potential, moved._replace(kernel=kernel), batch, sampler_key)",
        "sampler_objective(state.potential, moved._replace(kernel=kernel), batch, sampler_key)",
        "tests/test_fit_options.py -k sees_the_updated",
    ),
    "an average of nothing": Fault(
        "training/step.py",
        "average=_averaged(state, potential)",
        "average=state.average",
        "tests/test_fit_options.py -k recursion_by_hand",
    ),
    # kernels
    "the generator follows its own draws": Fault(
        "objectives/teaching.py",
        "        generator_loss(model, revised, latents),\n",
        "        generator_loss(model, initial, latents),\n",
        "tests/test_teaching.py -k its_own_pairs",
    ),
    "values of the step before": Fault(
        "objectives/policy_improvement.py",
        "after = jnp.concatenate([values[:, 1:], jax.vmap(potential)(trajectory.final)[:, None]], axis=1)",
        "after = jnp.concatenate([values[:, :-1], jax.vmap(potential)(trajectory.final)[:, None]], axis=1)",
        "tests/test_policy_improvement.py -k soft_values_leave",
    ),
    "targets of values that move": Fault(
        "objectives/policy_improvement.py",
        "jnp.sum((jax.lax.stop_gradient(costs + after) - values) ** 2, axis=1)",
        "jnp.sum((costs + after - values) ** 2, axis=1)",
        "tests/test_policy_improvement.py -k soft_values_leave",
    ),
    "entropy of the wrong sign": Fault(
        "objectives/policy_improvement.py",
        "entropy_weight.astype(dtype) * trajectory.step_log_prob\n        - velocity",
        "-entropy_weight.astype(dtype) * trajectory.step_log_prob\n        - velocity",
        "tests/test_policy_improvement.py -k soft_values_leave",
    ),
    "values are asked one step early": Fault(
        "objectives/policy_improvement.py",
        "_values(value, after[:, :-1], first=1)",
        "_values(value, after[:, :-1])",
        "tests/test_policy_improvement.py -k 'improve_to and pathwise'",
    ),
    "advantage of the past": Fault(
        "objectives/policy_improvement.py",
        "jnp.cumsum(costs[:, ::-1], axis=1)[:, ::-1]",
        "jnp.cumsum(costs, axis=1)",
        "tests/test_policy_improvement.py -k 'improve_to and reinforce'",
    ),
    "velocity runs away from the steps": Fault(
        "diffusion/player.py",
        "0.5 * jnp.log1p(-rate * gradient)",
        "0.5 * jnp.log1p(rate * gradient)",
        "tests/test_policy_improvement.py -k bound",
    ),
    "the base is penalised": Fault(
        "objectives/regularizers.py",
        "    potential = without_base(potential)\n",
        "",
        "tests/test_generalized_contrastive_divergence.py -k penalty",
    ),
    "draws with weights taken as they are": Fault(
        "chains.py",
        "    if isinstance(state, WeightedPopulation) and getattr",
        "    if False and getattr",
        "tests/test_generalized_contrastive_divergence.py -k simulated",
    ),
    "two players with one noise": Fault(
        "training/step.py", "_PLAYER = 0x7FFFFFFF", "_PLAYER = 1", "tests/test_teaching.py -k noise_of_its_own"
    ),
    "the Hamiltonian of a rejected proposal": Fault(
        "kernels/composed.py",
        'return jnp.where(jnp.asarray(fields["is_accepted"]), energy, before)',
        "return energy",
        "tests/test_from_blackjax.py -k state_the_chain_went_to",
    ),
    "energy for log density": Fault(
        "kernels/composed.py",
        "return -new.logdensity + 0.25",
        "return new.logdensity + 0.25",
        "tests/test_kernels.py -k 'invariance and mala and gumbel'",
    ),
    "independence without its proposal's density": Fault(
        "kernels/independence.py",
        "log_ratio = log_weight - own_log_weight(proposal, state)",
        "log_ratio = 0.0 * log_weight",
        "tests/test_independence.py -k 'overdispersed'",
    ),
    "swaps in the wrong direction": Fault(
        "kernels/tempering.py",
        "log_ratio = -jnp.diff(inverse_temperatures)[:, None] * (energy[:-1] - energy[1:])",
        "log_ratio = jnp.diff(inverse_temperatures)[:, None] * (energy[:-1] - energy[1:])",
        "tests/test_tempering.py -k 'exact_start'",
    ),
    "a trajectory's past left out of its weight": Fault(
        "diffusion/sampler.py",
        "return self.log_prob - self.backward_log_prob.sum(axis=1)",
        "return self.log_prob",
        "tests/test_diffusion.py -k 'mean_weight'",
    ),
    "sign of a flow's volume": Fault(
        "flows/coupling.py",
        "log_prob = log_density(self._base, flat.reshape(-1, *self.event_shape)) + log_det",
        "log_prob = log_density(self._base, flat.reshape(-1, *self.event_shape)) - log_det",
        "tests/test_flows.py -k 'jacobian or normalised'",
    ),
    # normalisers
    "annealing weighs after the move only": Fault(
        "normalizer/annealing.py",
        "    log_weight = step * (at_start - level)\n",
        "    log_weight = 0.0 * at_start\n",
        "tests/test_normalizer.py -k 'annealing_is_unbiased or plain_ratio'",
    ),
    # shallow energies, the sphere, and short runs
    "features leave their sphere sideways": Fault(
        "optimizers.py",
        "moved = z + update - z * jnp.sum(z * update, axis=-1, keepdims=True)",
        "moved = z + update",
        "tests/test_shallow.py -k written_out",
    ),
    "mass grows by steps instead of factors": Fault(
        "optimizers.py",
        "w * jnp.expm1(jnp.minimum(update, MAX_EXPONENT))",
        "w * update",
        "tests/test_shallow.py -k written_out",
    ),
    "features weighted by their mass": Fault(
        "optimizers.py",
        "width * g / jnp.where(weights > 0, weights, 1.0)[:, None]",
        "width * g",
        "tests/test_shallow.py -k written_out",
    ),
    "sign of the energy gap in the duality gap": Fault(
        "diagnostics/duality.py",
        "float(limit * discrepancy + gap)",
        "float(limit * discrepancy - gap)",
        "tests/test_shallow.py -k 'no_gap or what_is_left'",
    ),
    "restarts one step late": Fault(
        "replay.py",
        "chosen |= sampler.age >= check_count(",
        "chosen |= sampler.age > check_count(",
        "tests/test_dual_training.py -k at_their_age",
    ),
    "restarts at another row": Fault(
        "objectives/contrastive.py",
        "index = jnp.arange(chains.num_chains) % period % num_rows",
        "index = (jnp.arange(chains.num_chains) % period + 1) % num_rows",
        "tests/test_dual_training.py -k at_their_age",
    ),
    "pairs of equal noise": Fault(
        "kernels/scaled_langevin.py",
        "jnp.where(jnp.arange(2 * num_pairs) < num_pairs, 1.0, -1.0)",
        "jnp.where(jnp.arange(2 * num_pairs) < num_pairs, 1.0, 1.0)",
        "tests/test_dual_training.py -k pairs",
    ),
    "no way back to the sphere": Fault(
        "kernels/sphere_langevin.py",
        "return position / jnp.linalg.norm(position, axis=-1, keepdims=True)",
        "return position",
        "tests/test_dual_training.py -k 'samples_the_law'",
    ),
    "the Laplacian of another dimension": Fault(
        "objectives/spherical_score.py",
        "- (x.size - 1) * radial",
        "- x.size * radial",
        "tests/test_dual_training.py -k 'limit_of_small_steps or fisher'",
    ),
    "one step more than k": Fault(
        "kernels/short_run.py",
        "jax.lax.fori_loop(0, self.num_steps, lambda",
        "jax.lax.fori_loop(0, self.num_steps + 1, lambda",
        "tests/test_short_run.py tests/test_short_run_training.py -k 'exactly_k or at_k_are'",
    ),
    "times counted anew at each of them": Fault(
        "kernels/short_run.py",
        "jnp.asarray((0, *times[:-1]), jnp.int32)",
        "jnp.zeros(len(times), jnp.int32)",
        "tests/test_short_run_training.py -k 'at_every_time or at_k_are'",
    ),
    "short runs taken for densities": Fault(
        "handlers/policy.py",
        "                refuse_short_run(name, site, may_train=self.trains_by_gradient)\n",
        "",
        "tests/test_short_run_training.py -k no_policy",
    ),
    "the mismatch in variances": Fault(
        "diagnostics/sampling_times.py",
        "spread = jax.tree.map(jnp.sqrt, variance)",
        "spread = variance",
        "tests/test_short_run_training.py -k every_array",
    ),
}

QUICK = ("dropped log Z", "weights ignored", "chains not carried")


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in FAULTS]
)
def test_a_seeded_fault_is_caught(tmp_path, name):
    fault = FAULTS[name]
    for part in ("ebm_ppl", "tests"):
        shutil.copytree(ROOT / part, tmp_path / part, ignore=shutil.ignore_patterns("__pycache__"))
    for part in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / part, tmp_path / part)
    source = tmp_path / "ebm_ppl" / fault.path
    text = source.read_text()
    assert text.count(fault.old) == 1, f"the place of this fault is there {text.count(fault.old)} times"
    source.write_text(text.replace(fault.old, fault.new))
    selection, _, expression = fault.tests.partition(" -k ")
    options = ["-x", "-q", "-p", "no:xdist", "-p", "no:cacheprovider", "-m", "slow or not slow"]
    command = [sys.executable, "-m", "pytest", *options, *selection.split()]
    if expression:
        command += ["-k", expression.strip("'")]
    # The copy's own tests import the copy's package: its directory precedes what is installed.
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1, f"no test failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
    assert "ImportError" not in done.stdout
    assert "\nFAILED " in done.stdout


def test_there_are_enough_of_them():
    assert len(FAULTS) >= 20

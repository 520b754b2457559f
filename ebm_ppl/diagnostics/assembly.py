"""The checks of a diagnosis, made from its parts."""

import jax
import jax.numpy as jnp
import numpy as np

from ebm_ppl.adaptation import tunables
from ebm_ppl.checks import map_energy
from ebm_ppl.diagnostics.agreement import check_log_z_gap, check_mode_weights, check_model_moments, check_smc
from ebm_ppl.diagnostics.check import Check
from ebm_ppl.diagnostics.comparison import Means, means_of_chains, means_of_rows, means_of_runs
from ebm_ppl.diagnostics.convergence import check_rhat, check_rhat_nested
from ebm_ppl.diagnostics.discrepancy import check_proposal_quality
from ebm_ppl.diagnostics.effective import check_autocorrelation_time, check_ess
from ebm_ppl.diagnostics.equilibrium import check_energy_drift, check_energy_gap, check_smc_crosscheck
from ebm_ppl.diagnostics.monitored import Modes, Monitor
from ebm_ppl.diagnostics.movement import (
    check_acceptance,
    check_divergences,
    check_frozen,
    check_nonfinite,
)
from ebm_ppl.diagnostics.tempered_runs import Tempered
from ebm_ppl.diagnostics.traces import Trace
from ebm_ppl.subjects import Subject
from ebm_ppl.types import Array, Key, SamplerState

MISSED = 0.1
"""Where SMC has less than this share of the weight that the data have, SMC itself is looked into."""
RARE = 0.02
"""Modes with less of the chains, or with all but this, are no variables of R-hat."""


def checks_of_movement(trace: Trace, groups: Trace) -> list[Check]:
    """Of how the chains move."""
    given, fresh = (check_frozen(x.draws.position) for x in (trace, groups))
    return [
        fresh if fresh.status == "fail" and given.status != "fail" else given,
        check_nonfinite(
            np.concatenate([x.every_step.reshape(1, -1, x.every_step.shape[-1]) for x in (trace, groups)], 1)
        ),
        check_acceptance(trace.draws.acceptance_rate),
        check_divergences(trace.draws.is_divergent),
    ]


def _with_modes(trace: Trace, find: Modes, names: list[str]) -> tuple[np.ndarray, list[str]]:
    """Statistics of the kept draws, and the indicators of modes that are neither rare nor all there is."""
    if not np.isfinite(trace.values).all():
        return trace.values, names
    inside = find.indicators(trace.draws.position, lead=2)
    share = inside.mean(axis=(0, 1))
    chosen = [mode for mode in range(inside.shape[-1]) if RARE < share[mode] < 1.0 - RARE]
    if inside.shape[-1] == 2:
        chosen = chosen[:1]  # the other says the same
    return np.concatenate([trace.values, inside[..., chosen]], axis=-1), [*names, *(f"mode {mode}" for mode in chosen)]


def checks_of_mixing(
    trace: Trace,
    groups: Trace,
    ids: np.ndarray,
    find: Modes,
    names: list[str],
    num_steps: int | None,
    persistent: bool,
) -> list[Check]:
    """Of chains against each other and their starts."""
    values, shown = _with_modes(trace, find, names)
    grouped, grouped_names = _with_modes(groups, find, names)
    cost = trace.num_gradients
    return [
        check_rhat(values, shown)._replace(num_gradients=cost),
        check_rhat_nested(grouped, ids, grouped_names)._replace(num_gradients=groups.num_gradients),
        check_ess(values, shown, num_gradients=cost),
        check_autocorrelation_time(trace.every_step, names, num_steps=num_steps, persistent=persistent),
    ]


def checks_of_equilibrium(
    subject: Subject, watch: Monitor, find: Modes, start: np.ndarray, rows: Array, trace: Trace
) -> list[Check]:
    """Of chains against data and themselves later on."""
    data_energy = np.asarray(map_energy(subject.potential, rows))
    first = watch(start)
    later, names = trace.values, watch.names
    if np.isfinite(first).all() and np.isfinite(later).all() and find.num_modes > 1:
        first = np.concatenate([first, find.indicators(start)], axis=-1)
        later = np.concatenate([later, find.indicators(trace.draws.position, lead=2)], axis=-1)
        names = [*names, *(f"mode {mode}" for mode in range(later.shape[-1] - len(names)))]
    energies = np.concatenate([first[:, :1], trace.values[..., 0]], axis=1)
    return [check_energy_gap(data_energy, energies), check_energy_drift(first, later, names)]


def checks_of_proposals(key: Key, subject: Subject, chains: SamplerState) -> list[Check]:
    """Of each distribution that the kernel proposes from."""
    proposals = {name: x for name, x in tunables(chains).items() if callable(getattr(x, "log_prob", None))}
    if not proposals:
        why, blind_to = "the kernel proposes from no distribution", "modes that the proposal never draws"
        return [Check("proposal", "not assessable", np.nan, "ESS >= .01, k-hat <= .7", why, blind_to)]
    return [check_proposal_quality(key, subject.potential, proposal) for proposal in proposals.values()]


def checks_by_smc(
    key: Key, subject: Subject, watch: Monitor, find: Modes, rows: Array, trace: Trace, tempered: Tempered
) -> list[Check]:
    """Of SMC, of the chains by SMC, and of the model by SMC."""
    smc = tempered.smc
    if smc is None:
        return _unassessed(tempered.reason)
    believed = [check_smc(smc)._replace(num_gradients=tempered.num_gradients)]
    if tempered.forward is None or tempered.reverse is None:
        believed.append(_unassessed("the negatives are not finite")[1])
    else:
        believed.append(check_log_z_gap(tempered.forward, tempered.reverse))
    doubts = [check for check in believed if check.judges == "smc" and check.status != "pass"]
    values = watch(smc.position)
    if doubts or not np.isfinite(values).all():
        why = f"SMC is not believed: {doubts[0].why}" if doubts else "energies of SMC draws are not finite"
        return [*believed, *_unassessed(why)[2:]]

    def of_runs(x: np.ndarray) -> Means:
        return means_of_runs(x, smc.log_weight, smc.log_normalizer)

    runs, weights = of_runs(watch.moments(values)), of_runs(find.indicators(smc.position, lead=2))
    chains = watch.moments(trace.values)
    crosscheck = check_smc_crosscheck(chains, runs, watch.moment_names)
    moments = watch.moments(watch(rows))
    indicators = find.indicators(rows)
    if np.isfinite(chains).all():
        inside = find.indicators(trace.draws.position, lead=2)
        by_mode = check_mode_weights(means_of_chains(inside), weights, judges="sampler")
    else:
        by_mode = _unassessed("draws are not finite")[3]
    of_rows = means_of_rows(indicators)
    model = [check_model_moments(moments, runs, watch.moment_names), check_mode_weights(of_rows, weights)]
    if any(check.status == "fail" for check in model):
        model = _unless_missed(key, model, of_rows, weights, rows, indicators, tempered)
    return [*believed, crosscheck, by_mode, *model]


def _unless_missed(
    key: Key,
    model: list[Check],
    of_rows: Means,
    weights: Means,
    rows: Array,
    indicators: np.ndarray,
    tempered: Tempered,
) -> list[Check]:
    """A model that seems to lack a mode of the data fails only where SMC has not just missed it.

    Annealing back from the rows in the mode bounds the mass around them from above, up to noise. Where that leaves room for
    the weight that the data have there, nobody knows.
    """
    if tempered.anneal_back is None or tempered.forward is None:
        return model
    for mode in np.flatnonzero((of_rows.mean > RARE) & (weights.mean < MISSED * of_rows.mean)):
        inside = rows[np.flatnonzero(indicators[:, mode])]
        bound = tempered.anneal_back(jax.random.fold_in(key, int(mode)), inside)
        room = float(jnp.exp(bound.value - tempered.forward.value))
        if not room < of_rows.mean[mode]:
            why = (
                f"SMC has {weights.mean[mode]:.2g} of mode {mode}, the data {of_rows.mean[mode]:.2g}, and annealing back "
                "from there leaves room for it: SMC may have missed it. Pass a wider reference"
            )
            return [check._replace(status="not assessable", why=why) for check in model]
    return model


def _unassessed(why: str) -> list[Check]:
    """The checks that need SMC, without it."""
    return [
        Check("smc", "not assessable", np.nan, "<= .14", why, "modes that no particle found", "smc", True),
        Check(
            "log_z_gap",
            "not assessable",
            np.nan,
            "|gap| <= 1; fails > 5 nats",
            why,
            "modes missed by both",
            "smc",
            True,
        ),
        Check("smc_crosscheck", "not assessable", np.nan, "|z| <= 5", why, "what SMC has missed too", is_required=True),
        Check("mode_weights", "not assessable", np.nan, "|z| <= 5", why, "modes that all have missed"),
        Check("model_moments", "not assessable", np.nan, "|z| <= 5", why, "what SMC has missed", "model", True),
        Check(
            "model_mode_weights", "not assessable", np.nan, "|z| <= 5", why, "modes that all have missed", "model", True
        ),
    ]

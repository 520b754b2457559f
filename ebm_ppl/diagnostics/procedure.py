"""The whole diagnosis of a sampler and a model at frozen parameters."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr

from ebm_ppl.checks import as_array, check_count, check_rows
from ebm_ppl.diagnostics.assembly import (
    checks_by_smc,
    checks_of_equilibrium,
    checks_of_mixing,
    checks_of_movement,
    checks_of_proposals,
)
from ebm_ppl.diagnostics.check import Check
from ebm_ppl.diagnostics.convert import to_datatree
from ebm_ppl.diagnostics.discrepancy import check_ksd
from ebm_ppl.diagnostics.monitored import Modes, Monitor
from ebm_ppl.diagnostics.movement import check_bfmi
from ebm_ppl.diagnostics.report import Diagnosis
from ebm_ppl.diagnostics.tempered_runs import Tempered, moving_kernel, run_tempered
from ebm_ppl.diagnostics.traces import NUM_CHAINS, Trace, generator, given_chains, run_trace, superchains
from ebm_ppl.meshes import on_host
from ebm_ppl.partials import function_behind
from ebm_ppl.proposals import event_like
from ebm_ppl.sampling import check_sampler
from ebm_ppl.subjects import Subject, find_subject
from ebm_ppl.types import Array, FreshPopulation, Kernel, Key, SamplerState

SHARE_OF_CHAINS = 0.25
"""Of the budget for continuing the given chains, as much for superchains; the rest for SMC (.4) and annealing back (.1)."""
MAX_ROWS = 10_000
"""Rows of data that are looked at."""


def diagnose(
    potential_or_model: Any,
    sampler: SamplerState,
    data: Any,
    key: Key,
    *,
    budget: int = 1_000_000,
    num_steps: int | None = None,
    persistent: bool = True,
    reference: Any = None,
    kernel: Kernel | None = None,
    num_particles: int | None = None,
    statistics: Callable[[Any], Any] | None = None,
    modes: Any = None,
    site: str | None = None,
    model_args: tuple = (),
    model_kwargs: dict[str, Any] | None = None,
) -> Diagnosis:
    """Judge a sampler, and apart from it a model, at frozen parameters.

    The given chains are continued (a quarter of the budget), chains are started anew in superchains of one start each
    (a quarter; half of it is warm-up), independent runs of tempered SMC go from the base to the model (four tenths), and
    the negatives are annealed back to the base (a tenth). Every check is a function of this package that can be called
    alone.

    The SAMPLER passes where R-hat, nested R-hat, energy drift and the cross-check against SMC are assessed and pass. The
    MODEL passes where SMC gives nothing away against itself, forward and reverse log Z agree, and energies, moments and
    mode weights of the data are those of the SMC draws; where SMC is not believed the model is "not assessable", and never
    passes.

    Args:
        potential_or_model: A potential of one event, base included (:func:`ebm_ppl.potentials.tilt`), an
            :class:`~ebm_ppl.distributions.EBM` of one row, or a NumPyro model with EBM sites whose parameters were
            substituted.
        sampler: The chains as training left them, events on the support. Chains that training did not leave have to be
            advanced first: what they are is taken for the negatives.
        data: Rows ``(row, *event)``, best held out from training.
        key: Random key.
        budget: Gradient evaluations to spend; one of the energy alone counts a third. At least a block of 25 steps of 64
            chains is made of each kind of run, and one of eight populations.
        num_steps: ``k``, the kernel steps of one phase of training, to hold autocorrelation times against.
        persistent: Whether training keeps its chains from update to update; without it ``k`` below one autocorrelation time
            fails.
        reference: NumPyro distribution on the support to temper from; the potential's own or the EBM's base when ``None``.
        kernel: Moves SMC's particles, in unconstrained space; a tuned MALA when ``None``, the sampler's own if discrete.
        num_particles: Of each SMC run; chosen by the budget when ``None``.
        statistics: What to watch beside the energy, a function of one event; principal directions when ``None``.
        modes: Centres ``(mode, *event)``, or a function from one event to the number of its mode; clusters of data,
            negatives and SMC draws when ``None``.
        site: EBM site of a model with several.
        model_args: Arguments of a model.
        model_kwargs: Keyword arguments of a model.

    Returns:
        A :class:`Diagnosis`; print it.

    Raises:
        TypeError: an argument is of another kind.
        ValueError: shapes do not fit, the EBM has rows, or the kernel gives weights to chains.
        UnknownNormalizerError: parameters of the model have no value.

    Example:
        >>> import jax, jax.numpy as jnp, numpyro.distributions as dist, ebm_ppl as ebm
        >>> potential = ebm.potentials.tilt(lambda x: 0.5 * x**2, dist.Normal(0.0, 1.0))  # the model is N(0, 1/2)
        >>> draws = jnp.sqrt(0.5) * jax.random.normal(jax.random.key(0), (2, 1000))
        >>> sampler = ebm.init_sampler(draws[0, :64], ebm.kernels.mala(step_size=0.5))
        >>> found = diagnose(potential, sampler, draws[1], jax.random.key(1), budget=100_000)
        >>> found.sampler, found.model
        ('pass', 'pass')
        >>> diagnose(potential, sampler, draws[1] + 2.0, jax.random.key(1), budget=100_000).model
        'fail'
    """
    if not isinstance(sampler, SamplerState):
        raise TypeError(f"sampler: got {type(sampler).__name__}, expected the result of ebm.init_sampler.")
    if len(jax.tree.leaves(sampler.position)) != 1 or not isinstance(sampler.position, jax.Array):
        raise TypeError("sampler: got events that are pytrees of several arrays, expected single arrays: flatten them.")
    budget = check_count("budget", budget, 1000)
    if num_steps is not None:
        check_count("num_steps", num_steps)
    event = event_like(sampler.position)
    subject = find_subject(
        potential_or_model, event, reference=reference, site=site, args=model_args, kwargs=model_kwargs
    )
    check_sampler(subject.potential, sampler)
    keys = jax.random.split(key, 9)
    rows = _rows(keys[0], subject, data, event)
    chains = given_chains(keys[1], sampler)
    start = on_host(chains.position)
    examples = np.concatenate([np.asarray(rows[: len(start)], start.dtype), start])
    watch = Monitor(
        subject.potential, examples[np.isfinite(examples.reshape(len(examples), -1)).all(axis=1)], statistics
    )
    trace = run_trace(keys[2], subject.potential, chains, watch, SHARE_OF_CHAINS * budget)
    fresh, ids = superchains(keys[3], subject.potential, chains, rows, subject.reference)
    groups = run_trace(keys[4], subject.potential, fresh, watch, SHARE_OF_CHAINS * budget, drop=0.5)
    tempered = _temper(keys[5], subject, chains, rows, trace, kernel, 0.5 * budget, num_particles, reference is None)
    smc = tempered.smc
    find = Modes(_examples(rows, trace, smc), modes)
    checks = [
        *checks_of_movement(trace, groups),
        *checks_of_mixing(trace, groups, ids, find, watch.names, num_steps, persistent),
        *checks_of_equilibrium(subject, watch, find, start, rows, trace),
        check_ksd(keys[6], subject.potential, trace.draws.position),
        check_bfmi(None if _draws_afresh(chains) else trace.hamiltonian),
        *checks_of_proposals(keys[7], subject, chains),
        *checks_by_smc(keys[8], subject, watch, find, rows, trace, tempered),
    ]
    checks = [_at_whose_door(check, checks) for check in checks]
    reverse_cost = 0 if tempered.reverse is None else int(tempered.reverse.num_gradients)
    return Diagnosis(
        tuple(checks),
        _tree(subject, chains, trace, groups, ids, tempered),
        trace.num_gradients + groups.num_gradients + tempered.num_gradients + reverse_cost,
        trace.num_energies + groups.num_energies + tempered.num_energies,
        budget,
    )


def _draws_afresh(chains: SamplerState) -> bool:
    """Whether chains are drawn anew at every step, so that no energy is a step away from the one before."""
    func = function_behind(chains.kernel)
    return isinstance(func, FreshPopulation) and func.draws_afresh


def _at_whose_door(check: Check, checks: list[Check]) -> Check:
    """A gap between data and chains that sample what SMC samples is the model's."""
    agrees = any(other.name == "smc_crosscheck" and other.status == "pass" for other in checks)
    return check._replace(judges="model") if check.name == "energy_gap" and check.status == "warn" and agrees else check


def _rows(key: Key, subject: Subject, data: Any, event: Any) -> Array:
    """Some of the data, shuffled."""
    rows = as_array("data", data)
    if subject.ebm.support.is_discrete:
        if rows.shape[1:] != event.shape or len(rows) == 0:
            raise ValueError(f"data: got shape {rows.shape}, expected (row, *{event.shape}) with at least one row.")
    else:
        rows = check_rows("data", rows, event_shape=event.shape, support=subject.ebm.support)
    # These few are on every process, wherever the data are.
    return jnp.asarray(on_host(rows[generator(key).permutation(len(rows))[:MAX_ROWS]]))


def _temper(
    key: Key,
    subject: Subject,
    chains: SamplerState,
    rows: Array,
    trace: Trace,
    kernel: Kernel | None,
    allowance: float,
    num_particles: int | None,
    may_widen: bool,
) -> Tempered:
    if subject.reference is None:
        why = "there is no base to temper from: pass reference=..., or tilt the energy"
        return Tempered(None, None, None, why, 0, 0)
    tune_key, run_key = jax.random.split(key)
    like: Any = jnp.result_type(chains.position)
    if kernel is None:
        try:
            kernel = moving_kernel(tune_key, subject, chains, rows[np.arange(NUM_CHAINS) % len(rows)].astype(like))
        except TypeError as error:
            return Tempered(None, None, None, f"pass kernel=...: {error}", 0, 0)
    negatives = jnp.asarray(trace.draws.position).reshape(-1, *trace.draws.position.shape[2:])
    return run_tempered(run_key, subject, kernel, negatives, allowance, num_particles, may_widen=may_widen)


def _examples(rows: Array, trace: Trace, smc: Any) -> np.ndarray:
    """Equal parts of data, negatives and SMC draws, those that are finite."""
    position = trace.draws.position
    parts = [np.asarray(rows), position.reshape(-1, *position.shape[2:])]
    if smc is not None:
        parts.append(np.asarray(smc.position).reshape(-1, *position.shape[2:]))
    count = min(1000, *(len(part) for part in parts))
    chosen = np.concatenate([part[np.linspace(0, len(part) - 1, count).astype(int)] for part in parts])
    return chosen[np.isfinite(chosen.reshape(len(chosen), -1)).all(axis=1)]


def _tree(
    subject: Subject, chains: SamplerState, trace: Trace, groups: Trace, ids: np.ndarray, tempered: Tempered
) -> xr.DataTree:
    both = {"forward": tempered.forward, "reverse": tempered.reverse}
    tree = to_datatree(
        trace.draws,
        site=subject.site,
        sampler=chains,
        smc=tempered.smc,
        log_z={name: one for name, one in both.items() if one is not None} or None,
        potential=subject.potential,
        num_steps=trace.steps_per_draw,
        start="the given chains",
    )
    fresh = to_datatree(
        groups.draws,
        site=subject.site,
        sampler=chains,
        superchain_ids=ids,
        num_steps=groups.steps_per_draw,
        start="rows of data, draws of the base, and the given chains; warm-up left out",
    )
    tree["superchains"] = fresh["negative_phase"].copy()
    tree["superchains_stats"] = fresh["negative_phase_stats"].copy()
    return tree

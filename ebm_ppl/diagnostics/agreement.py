"""Checks of the model itself, by SMC, and of whether that SMC is to be believed."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from ebm_ppl.diagnostics.check import Check, Judged
from ebm_ppl.diagnostics.comparison import NUM_ERRORS, Means, difference, means_of_rows
from ebm_ppl.diagnostics.equilibrium import COARSE
from ebm_ppl.kernels.smc import SMCResult
from ebm_ppl.normalizer.result import LogNormalizer

SMALL_EFFECT = 0.1
"""Differences between data and model below so many standard deviations are remarked on, and not called a failure."""
SMALL_WEIGHT = 0.05
"""So are mode weights that differ by less than this."""
COARSE_WEIGHT = 0.25
"""Mode weights of which an error like this would not have shown are not assessed."""
MAX_VARIANCE = 0.02
"""Relative variance of the mean normaliser of all runs, that of fifty independent weights."""
MIN_RUNS = 8
"""Fewer independent runs give no error of their own."""
WARNED_GAP, FAILED_GAP = 1.0, 5.0
"""Nats between forward and reverse estimates of log Z."""


def check_model_moments(data: Any, runs: Means, names: Sequence[str]) -> Check:
    """Whether the data have the energies and moments of the model, the model's being known from SMC.

    Args:
        data: Statistics of the rows, ``(row, statistic)``; best of rows held out from training.
        runs: The same under SMC, from :func:`means_of_runs`.
        names: One name per statistic.

    Returns:
        Value: the largest difference in standard errors. Above 5 it warns, and it fails where it is more than a tenth of a
        standard deviation of one event too.

    Example:
        >>> from ebm_ppl.diagnostics import means_of_runs
        >>> rng = np.random.default_rng(0)
        >>> runs = means_of_runs(rng.normal(size=(8, 500, 1)), np.zeros((8, 500)), np.zeros(8))
        >>> check_model_moments(rng.normal(size=(5000, 1)), runs, ["x"]).status
        'pass'
        >>> check_model_moments(rng.normal(1.0, size=(5000, 1)), runs, ["x"]).status
        'fail'
    """
    values = np.asarray(data, np.float64)
    rows = means_of_rows(values) if len(values) > 1 and np.isfinite(values).all() else None
    blind_to = "what the statistics do not show, and regions that SMC has missed: see log_z_gap"
    threshold = "|z| <= 5; fails if also > .1 sd"

    def finish(status: Any, value: float, why: str) -> Check:
        return Check("model_moments", status, value, threshold, why, blind_to, "model", True)

    if rows is None or not np.isfinite(runs.mean).all():
        return finish("not assessable", np.nan, "energies or statistics are not finite, or there are too few rows")
    found = difference(rows, runs)
    z, effect, told = float(found.z[found.worst]), float(found.effect[found.worst]), f"largest for {names[found.worst]}"
    large = (np.abs(found.z) > NUM_ERRORS) & (np.abs(found.effect) > SMALL_EFFECT)
    if found.is_significant and large.any():
        index = int(np.argmax(np.where(large, np.abs(found.z), 0.0)))
        why = f"data and model differ by {found.effect[index]:.2g} sd in {names[index]}"
        return finish("fail", float(found.z[index]), why)
    if found.is_significant:
        return finish("warn", z, f"{told}: data and model differ by {effect:.2g} sd")
    if not found.resolution <= COARSE:
        return finish("not assessable", z, f"{told}; a difference of {found.resolution:.2g} sd would not have shown")
    return finish("pass", z, f"{told}; a difference of {found.resolution:.2g} sd would have shown")


def check_mode_weights(found: Means, runs: Means, *, judges: Judged = "model") -> Check:
    """Whether the weights of modes are those of SMC: of the data to judge the model, of the chains to judge the sampler.

    Args:
        found: Mode indicators of the data (:func:`means_of_rows`) or of the chains (:func:`means_of_chains`).
        runs: The same under SMC, from :func:`means_of_runs`.
        judges: Which of the two it is.

    Returns:
        Value: the largest difference of weights in standard errors. Above 5 it fails; for the data it only warns where no
        weight is off by more than .05.

    Example:
        >>> from ebm_ppl.diagnostics import means_of_rows, means_of_runs
        >>> rng = np.random.default_rng(0)
        >>> def indicators(shape, weight):
        ...     left = rng.random(shape) < weight
        ...     return np.stack([left, ~left], axis=-1)
        >>> runs = means_of_runs(indicators((8, 500), 0.2), np.zeros((8, 500)), np.zeros(8))
        >>> [check_mode_weights(means_of_rows(indicators((5000,), weight)), runs).status for weight in (0.2, 0.5)]
        ['pass', 'fail']
    """
    name = "mode_weights" if judges == "sampler" else "model_mode_weights"
    blind_to = "modes that data, chains and SMC have all missed"
    threshold = "|z| <= 5" if judges == "sampler" else "|z| <= 5; fails if also > .05"

    def finish(status: Any, value: float, why: str) -> Check:
        return Check(name, status, value, threshold, why, blind_to, judges, judges == "model")

    if not np.isfinite(found.mean).all() or not np.isfinite(runs.mean).all() or not np.isfinite(found.variance).all():
        return finish("not assessable", np.nan, "draws are not finite, or there are too few of them")
    if found.mean.size < 2:
        return finish("not assessable", np.nan, "there is one mode only")
    if found.degrees < MIN_RUNS - 1:
        return finish(
            "not assessable", np.nan, f"needs at least {MIN_RUNS} chains, which may all be in one mode by chance"
        )
    whose = "data" if judges == "model" else "chains"
    compared = difference(found, runs)
    index, change = compared.worst, found.mean - runs.mean
    z = float(compared.z[index])
    told = f"mode {index}: {whose} {found.mean[index]:.3g}, SMC {runs.mean[index]:.3g}"
    if compared.is_significant:
        large = judges == "sampler" or bool(np.abs(change).max() > SMALL_WEIGHT)
        return finish("fail" if large else "warn", z, told)
    resolution = float(NUM_ERRORS * compared.error.max())
    if not resolution <= COARSE_WEIGHT:
        return finish("not assessable", z, f"{told}; a difference of {resolution:.2g} would not have shown")
    return finish("pass", z, f"{told}; a difference of {resolution:.2g} would have shown")


def check_smc(smc: SMCResult) -> Check:
    """Whether independent runs of tempered SMC give nothing away against themselves.

    Args:
        smc: Runs with a leading axis on every array, from :func:`ebm_ppl.normalizer.tempered_particles`.

    Returns:
        Value: the standard error of log Z from the spread of the runs, to be below .14. Further: weights are finite,
        populations neither collapse nor lose their ancestry nor stick, no particles end where the start hardly draws, and
        the steps weighted backwards agree.

    Example:
        >>> import jax, numpyro.distributions as dist, ebm_ppl as ebm
        >>> model, kernel = ebm.EBM(lambda x: 0.5 * x**2, dist.Normal(0.0, 1.0)), ebm.kernels.mala(step_size=0.3)
        >>> runs = ebm.normalizer.tempered_particles(jax.random.key(0), model, kernel=kernel, num_particles=200)
        >>> check_smc(runs).status
        'pass'
    """
    blind_to = "modes that no particle found"
    log_z = np.asarray(smc.log_normalizer, np.float64)
    num_runs = log_z.size

    def finish(status: Any, value: float, why: str) -> Check:
        return Check("smc", status, value, "<= .14", why, blind_to, "smc", True)

    if num_runs < MIN_RUNS:
        return finish("not assessable", np.nan, f"{num_runs} runs; needs at least {MIN_RUNS}")
    if not np.asarray(smc.is_finite).all() or not np.isfinite(log_z).all():
        return finish("fail", np.nan, "the weights of a run are not finite")
    share = np.exp(log_z - log_z.max())
    error = float(np.sqrt(share.var(ddof=1) / num_runs) / share.mean())
    # Flags of single runs are noisy, and there are many: their averages decide.
    flags = ("ess_minimum", "parent_minimum", "ancestor_fraction", "outside_fraction", "acceptance_minimum")
    pooled = smc._replace(**{name: jnp.mean(jnp.asarray(getattr(smc, name))) for name in flags})
    pooled = pooled._replace(log_weight=jnp.ravel(smc.log_weight))
    reversal = np.asarray(smc.reversal_gap, np.float64)
    reversal_error = max(reversal.std(ddof=1) / np.sqrt(num_runs), 1e-12)
    if bool(pooled.is_collapsed):
        return finish("fail", error, "few particles stand for all, or they do not move")
    if bool(pooled.is_uncovered):
        return finish("fail", error, "particles end where the reference hardly ever draws: pass a wider reference")
    if abs(reversal.mean()) > NUM_ERRORS * reversal_error and abs(reversal.mean()) > 0.1:
        return finish("fail", error, f"weighted backwards the same steps differ by {reversal.mean():.2g} nats")
    if not error**2 <= MAX_VARIANCE:
        return finish("fail", error, "runs disagree about log Z: use more particles")
    return finish("pass", error, f"{num_runs} runs agree about log Z")


def check_log_z_gap(forward: LogNormalizer, reverse: LogNormalizer) -> Check:
    """Forward estimate of log Z, by SMC from the base, minus the reverse one, by annealing from the negatives to the base.

    From exact draws the two bound log Z from below and above, up to noise. Forward below reverse says that SMC lost mass
    where the negatives are, or annealing was too fast: SMC is not believed. Forward above reverse says that the negatives
    are not draws of the model: a fault of the sampler.

    Args:
        forward: From SMC.
        reverse: From :func:`ebm_ppl.normalizer.reverse_annealed_importance`.

    Returns:
        Value: the gap in nats. Warn above 1, fail above 5.

    Example:
        >>> import jax.numpy as jnp
        >>> from ebm_ppl.normalizer import LogNormalizer
        >>> estimate = lambda value: LogNormalizer(*map(jnp.array, (value, 0.01, 500.0, 0.2, 1000, True)))
        >>> check_log_z_gap(estimate(2.0), estimate(2.1)).status
        'pass'
        >>> check_log_z_gap(estimate(-9.0), estimate(2.0)).judges, check_log_z_gap(estimate(9.0), estimate(2.0)).judges
        ('smc', 'sampler')

    References:
        Grosse, Ghahramani, Adams (2015), arXiv:1511.02543.
    """
    blind_to = "a mode that SMC and the negatives have both missed"
    threshold = "|gap| <= 1; fails > 5 nats"
    gap = float(np.asarray(forward.value)) - float(np.asarray(reverse.value))
    error = float(np.hypot(np.asarray(forward.standard_error), np.asarray(reverse.standard_error)))
    gradients = int(np.asarray(reverse.num_gradients))

    def finish(status: Any, why: str, judges: Judged = "smc") -> Check:
        return Check("log_z_gap", status, gap, threshold, why, blind_to, judges, judges == "smc", gradients)

    if not np.isfinite(gap) or not np.isfinite(error):
        return finish("not assessable", "an estimate is not finite")
    if abs(gap) <= WARNED_GAP:
        if error > WARNED_GAP / 2:
            return finish("not assessable", f"the gap is known to {error:.2g} nats only")
        return finish("pass", f"forward {float(forward.value):.3f}, reverse {float(reverse.value):.3f}")
    status = "fail" if abs(gap) > FAILED_GAP else "warn"
    if gap > 0:
        return finish(status, "the negatives are not draws of the model", "sampler")
    return finish(status, "SMC has lost mass where the negatives are, or annealing back was too fast")

"""Quality of a short run against its number of steps."""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ebm_ppl.diagnostics.sampling_times import SamplingTimes
from ebm_ppl.plots.style import COLOURS, new_figure, styled


def sampling_times(found: SamplingTimes) -> Figure:
    """Mismatch of moments, energy distance and energy gap against the number of steps, the ``k`` of training marked.

    All three on a logarithmic axis of steps; the energy distance on a logarithmic scale above its error, and the gap on one
    that is linear near zero. Times at which draws are lost are crosses at the upper edge.

    Args:
        found: From :func:`ebm_ppl.diagnostics.sampling_times`.

    Returns:
        A matplotlib figure.

    Raises:
        TypeError: ``found`` is something else.

    Example:
        >>> import jax, numpyro.distributions as dist, ebm_ppl as ebm
        >>> kernel = ebm.kernels.short_run(5, dist.Normal(0.0, 1.0), step_size=0.1)
        >>> model = ebm.potentials.ShortRun(lambda x: -0.5 * x**2, kernel)
        >>> rows = 2.05 * jax.random.normal(jax.random.key(0), (500,))
        >>> figure = sampling_times(ebm.diagnostics.sampling_times(jax.random.key(1), model, rows, times=(1, 5, 10)))
    """
    if not isinstance(found, SamplingTimes):
        raise TypeError(f"found: got {type(found).__name__}, expected the result of diagnostics.sampling_times.")
    times = np.maximum(found.times, 0.5)  # a logarithmic axis has no zero
    with styled():
        figure = new_figure(6.4, 7.2)
        panels = figure.subplots(3, 1, sharex=True)
        mismatch, distance, gap = panels
        mismatch.plot(times, np.where(np.isfinite(found.moment_mismatch), found.moment_mismatch, np.nan), marker="o")
        mismatch.axhline(found.moment_noise, color="0.4", linestyle=":", label="two samples of one law")
        mismatch.set_yscale("log")
        mismatch.set_ylabel("moment mismatch\n(standard deviations)")
        distance.errorbar(
            times, found.energy_distance, 2.0 * found.energy_distance_error, marker="o", color=COLOURS[1], capsize=3
        )
        distance.set_yscale("symlog", linthresh=_decade(_least(found.energy_distance_error)))
        distance.axhline(0.0, color="0.4", linestyle=":")
        distance.set_ylabel("energy distance\nto the data")
        gap.errorbar(times, found.energy_gap, 2.0 * found.energy_gap_error, marker="o", color=COLOURS[2], capsize=3)
        gap.axhline(0.0, color="0.4", linestyle=":")
        gap.set_yscale("symlog", linthresh=_decade(2.0 * _least(found.energy_gap_error)))
        gap.set_ylabel("energy of data\nless of draws (nats)")
        gap.set_xlabel("steps")
        gap.set_xscale("log")
        for axes in panels:
            axes.axvline(found.num_steps, color="black", linewidth=1.0, label=f"k = {found.num_steps}")
            _mark_lost(axes, times[found.num_lost > 0])
        mismatch.legend(loc="best")
        figure.suptitle(found.verdict)
    return figure


def _least(errors: np.ndarray) -> float:
    known = errors[np.isfinite(errors)]
    return float(known.min()) if known.size else 1.0


def _decade(value: float) -> float:
    """The power of ten above a number, so that no tick falls between zero and where an axis becomes logarithmic."""
    return float(10.0 ** np.ceil(np.log10(max(value, 1e-12))))


def _mark_lost(axes: Axes, times: np.ndarray) -> None:
    if len(times):
        axes.plot(
            times,
            np.ones(len(times)),
            "x",
            color=COLOURS[5],
            transform=axes.get_xaxis_transform(),
            clip_on=False,
            label="lost",
        )

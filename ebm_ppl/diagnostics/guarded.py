"""ArviZ's effective sample size and nested R-hat, with the guards that they lack."""

import functools
from collections.abc import Callable
from typing import Any, Literal

import arviz_stats
import numpy as np

from ebm_ppl.checks import check_count

_ess: Any = getattr(arviz_stats, "ess")  # noqa: B009 - a public name that the stubs do not list
_rhat_nested: Any = getattr(arviz_stats, "rhat_nested")  # noqa: B009

Method = Literal["bulk", "tail", "mean"]


def as_series(values: Any) -> np.ndarray:
    """Draws as float64 ``(chain, draw, series)``, from ``(chain, draw, *shape)``.

    Raises:
        TypeError: they are not real numbers.
        ValueError: there are no chain and draw axes.

    Example:
        >>> as_series(np.zeros((4, 10, 2, 3))).shape
        (4, 10, 6)
    """
    values = as_real_numbers("values", values)
    if values.ndim < 2 or values.size == 0:
        raise ValueError(f"values: got shape {values.shape}, expected (chain, draw, ...) with some of each.")
    return values.reshape(*values.shape[:2], -1)


def as_real_numbers(name: str, values: Any) -> np.ndarray:
    """Real numbers in double precision.

    Raises:
        TypeError: they are something else.
    """
    try:
        array = np.asarray(values)
        if not np.iscomplexobj(array):
            return array.astype(np.float64)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name}: got {type(values).__name__}, expected an array of real numbers.") from error
    raise TypeError(f"{name}: got dtype {array.dtype}, expected an array of real numbers.")


def ess(values: Any, *, method: Method = "bulk") -> np.ndarray:
    """Effective sample size over all chains, of every variable.

    Args:
        values: ``(chain, draw, *shape)``.
        method: ``"bulk"`` (rank-normalised, for means), ``"tail"`` (the smaller of those of the 5 % and 95 % quantiles), or
            ``"mean"`` (of the values as they are).

    Returns:
        ``shape``: zero where a chain never moved (ArviZ says that every draw counts), NaN with fewer than four draws or
        where a draw is not finite.

    Raises:
        TypeError: ``values`` are not real numbers.
        ValueError: ``values`` has no chain and draw axes, or an unknown method.

    Example:
        >>> draws = np.random.default_rng(0).normal(size=(4, 500))
        >>> bool(ess(draws) > 1500), float(ess(np.ones((4, 500))))
        (True, 0.0)

    References:
        Vehtari, Gelman, Simpson, Carpenter, Buerkner (2021), arXiv:1903.08008.
    """
    if method not in ("bulk", "tail", "mean"):
        raise ValueError(f"method: got {method!r}, expected 'bulk', 'tail' or 'mean'.")
    options = {"prob": (0.05, 0.95)} if method == "tail" else {}
    return _guarded(values, 0.0, functools.partial(_ess, method=method, **options))


def _guarded(values: Any, of_stuck: float, measure: Callable[..., np.ndarray]) -> np.ndarray:
    """A measure of ArviZ where every chain moves; a value of ours where one does not, NaN where nothing can be said."""
    series = as_series(values)
    result = np.full(series.shape[-1], np.nan)
    usable = np.isfinite(series).all(axis=(0, 1)) & (series.shape[1] >= 4)
    stuck = stuck_chains(series).any(axis=0)
    result[usable & stuck] = of_stuck
    moving = usable & ~stuck
    if moving.any():
        result[moving] = measure(series[..., moving], chain_axis=0, draw_axis=1)
    return result.reshape(np.shape(values)[2:])


def stuck_chains(series: np.ndarray) -> np.ndarray:
    """Which chain never moved in which series, ``(chain, series)``.

    A coordinate that is constant by construction cannot be told from one that a sampler never moves, and counts too. Two
    values make an indicator, which may well be constant along one chain: it is stuck where it is constant along all.
    """
    if series.shape[1] < 2:
        return np.zeros((series.shape[0], series.shape[2]), bool)
    with np.errstate(invalid="ignore", over="ignore"):  # infinities, whose range is no number
        is_constant = np.ptp(series, axis=1) == 0
    low, high = series.min(axis=(0, 1)), series.max(axis=(0, 1))
    is_indicator = ((series == low) | (series == high)).all(axis=(0, 1)) & ~is_constant.all(axis=0)
    return is_constant & ~is_indicator


def memories(series: np.ndarray) -> np.ndarray:
    """How many of their own autocorrelation times chains last, ``(series,)``, whatever the chains' means are.

    Around its own mean a short chain looks less dispersed, and less dependent, than it is; the correction is measured on
    AR(1) chains. At least 1, and exactly that where no chain moves or there are fewer than four draws.

    Args:
        series: ``(chain, draw, series)``, finite.

    Example:
        >>> draws = np.random.default_rng(0).normal(size=(16, 500, 1))
        >>> bool(400 < memories(draws)[0] < 600), memories(np.ones((4, 50, 1))).tolist()
        (True, [1.0])
    """
    centred = series - series.mean(axis=1, keepdims=True)
    result = np.ones(series.shape[-1])
    moving = np.ptp(series, axis=1).any(axis=0) & (series.shape[1] >= 4)
    if moving.any():
        length = _ess(centred[..., moving], chain_axis=0, draw_axis=1, method="mean") / len(series)
        result[moving] = np.maximum(length / (1.0 + 8.0 / length), 1.0)
    return result


def rhat_nested(values: Any, superchain_ids: Any) -> np.ndarray:
    """Rank-normalised split R-hat between superchains, groups of chains that started from one point each.

    ``sqrt(1 + B / W)``, ``B`` the variance of the means of superchains, ``W`` the variance within them. Many short chains
    are enough: what it asks is whether where a chain started still shows, and so it means nothing for arbitrary groups.

    Args:
        values: ``(chain, draw, *shape)``.
        superchain_ids: ``(chain,)`` whole numbers, as many chains of each.

    Returns:
        ``shape``: infinite where a chain never moved, NaN with fewer than four draws or where a draw is not finite.

    Raises:
        TypeError: ``values`` are not real numbers.
        ValueError: the groups do not fit the chains, are of different sizes, or there is only one.

    Example:
        >>> draws = np.random.default_rng(0).normal(size=(16, 200))
        >>> bool(rhat_nested(draws, np.repeat(np.arange(4), 4)) < 1.01)
        True

    References:
        Margossian, Hoffman, Sountsov, Riou-Durand, Vehtari, Gelman (2024), Nested R-hat, arXiv:2110.13017.
    """
    ids = check_superchains(superchain_ids, as_series(values).shape[0])
    return _guarded(values, np.inf, functools.partial(_rhat_nested, superchain_ids=ids))


def check_superchains(superchain_ids: Any, num_chains: int) -> np.ndarray:
    """Numbers of superchains from zero on, ``(chain,)``.

    Raises:
        ValueError: they do not fit the chains, are of different sizes, or there are fewer than two.
    """
    ids = np.asarray(superchain_ids)
    if ids.shape != (check_count("num_chains", num_chains),):
        raise ValueError(f"superchain_ids: got shape {ids.shape}, expected ({num_chains},), one number per chain.")
    _, ids, sizes = np.unique(ids, return_inverse=True, return_counts=True)
    if len(sizes) < 2 or sizes.min() != sizes.max():
        raise ValueError(
            f"superchain_ids: got groups of {sizes.tolist()} chains, expected at least two groups of one size."
        )
    return ids

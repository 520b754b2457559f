"""What checks of series have in common: their names, and what can be said before anything is computed."""

from collections.abc import Sequence

import numpy as np

from ebm_ppl.diagnostics.check import Check, Status
from ebm_ppl.diagnostics.guarded import stuck_chains
from ebm_ppl.diagnostics.mixing import MIN_CHAINS, MIN_DRAWS


class Outcome:
    """A check with a part of its fields filled in."""

    def __init__(self, name: str, threshold: str, blind_to: str, *, num_gradients: int = 0):
        self.fields = name, threshold, blind_to, num_gradients

    def __call__(self, status: Status, value: float, why: str) -> Check:
        """The check, with the rest of its fields."""
        name, threshold, blind_to, num_gradients = self.fields
        required = name in ("rhat", "rhat_nested")
        return Check(name, status, float(value), threshold, why, blind_to, "sampler", required, num_gradients)


def name_series(series: np.ndarray, names: Sequence[str] | None) -> list[str]:
    """One name per series.

    Raises:
        ValueError: there are more, or fewer, names than series.
    """
    if names is None:
        return [f"variable {index}" for index in range(series.shape[-1])]
    if len(names) != series.shape[-1]:
        raise ValueError(f"names: got {len(names)} of them, expected {series.shape[-1]}, one per variable.")
    return list(names)


def judge_early(series: np.ndarray, names: list[str], finish: Outcome) -> Check | None:
    """What can be said before anything is computed."""
    num_chains, num_draws = series.shape[:2]
    bad = int((~np.isfinite(series).all(axis=-1)).sum())
    if bad:
        return finish("not assessable", np.nan, f"{bad} of {num_chains * num_draws} draws are NaN or infinite")
    if num_chains < MIN_CHAINS or num_draws < MIN_DRAWS:
        return finish(
            "not assessable",
            np.nan,
            f"{num_chains} chains of {num_draws} draws; needs at least {MIN_CHAINS} chains of {MIN_DRAWS}",
        )
    constant = np.ptp(series, axis=(0, 1)) == 0
    if constant.any():
        return finish("not assessable", np.nan, f"{names[int(np.argmax(constant))]} is the same in all draws")
    stuck = stuck_chains(series)
    if stuck.any():
        _, variable = np.argwhere(stuck)[0]
        count = int(stuck.any(axis=1).sum())
        value = 0.0 if finish.fields[0] == "ess" else np.inf
        return finish("fail", value, f"in {count} of {num_chains} chains {names[variable]} never changes")
    return None

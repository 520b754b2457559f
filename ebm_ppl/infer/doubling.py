"""Whether the inner chains of an exchange kernel are long enough: run them twice and four times as long, and compare."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import scipy.stats
from numpyro.infer import MCMC

from ebm_ppl.checks import check_count
from ebm_ppl.infer.exchange import Exchange
from ebm_ppl.types import Kernel, Key


class DoublingRow(NamedTuple):
    """One posterior quantity at one length of the inner chains.

    Attributes:
        inner_steps: Length.
        quantity: Site, coordinate, and whether it is the mean or the standard deviation.
        estimate: Its posterior estimate.
        mcse: Monte Carlo standard error, from independent chains.
        deviation: Distance from the estimate with the longest chains, over the standard error of the difference; zero for
            the longest themselves.
    """

    inner_steps: int
    quantity: str
    estimate: float
    mcse: float
    deviation: float


class InnerDoubling(NamedTuple):
    """Outcome of :func:`inner_doubling_test`; printing it shows a table.

    Attributes:
        rows: One per length and quantity.
        acceptance: Mean acceptance of the parameters' proposals, by length.
        critical: Deviation beyond which two lengths disagree.
    """

    rows: tuple[DoublingRow, ...]
    acceptance: dict[int, float]
    critical: float

    @property
    def disagreeing(self) -> tuple[int, ...]:
        """Lengths whose posterior differs from that of the longest chains."""
        return tuple(
            steps
            for steps in self.acceptance
            if any(not row.deviation <= self.critical for row in self.rows if row.inner_steps == steps)
        )

    @property
    def agrees(self) -> bool:
        """Whether all lengths agree, so that the shortest does: no bias is visible at this precision."""
        return not self.disagreeing

    def __str__(self) -> str:
        verdict = (
            "agree" if self.agrees else f"DISAGREE: {', '.join(map(str, self.disagreeing))} inner steps are too few"
        )
        lines = [
            f"inner chains of {', '.join(map(str, self.acceptance))} steps {verdict} (|deviation| beyond "
            f"{self.critical:.2f} disagrees)",
            f"{'inner_steps':>11}  {'quantity':<24}{'estimate':>12}{'mcse':>12}{'deviation':>11}{'acceptance':>12}",
        ]
        lines += [
            f"{row.inner_steps:>11}  {row.quantity:<24}{row.estimate:>12.5g}{row.mcse:>12.2g}{row.deviation:>11.2f}"
            f"{self.acceptance[row.inner_steps]:>12.3f}"
            for row in self.rows
        ]
        return "\n".join(lines)


def inner_doubling_test(
    key: Key,
    model: Callable[..., Any],
    args: tuple = (),
    kwargs: dict[str, Any] | None = None,
    *,
    inner_kernel: Kernel,
    inner_steps: int,
    num_doublings: int = 2,
    num_warmup: int = 500,
    num_samples: int = 500,
    num_chains: int = 32,
    alpha: float = 1e-3,
    **exchange: Any,
) -> InnerDoubling:
    """Run :class:`Exchange` with inner chains of ``m, 2m, 4m, ...`` steps and compare the posteriors.

    Inner chains that are too short bias the posterior with a healthy acceptance rate, so acceptance says nothing; that
    longer chains change nothing does. Means and standard deviations are compared with those of the longest chains by a
    t-test over independent chains. Agreement shows no bias beyond the reported errors; it is no proof: where no length
    mixes at all, as across separated modes, all agree on the same wrong answer.

    Args:
        key: Random key.
        model: The model.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        inner_kernel: As for :class:`Exchange`.
        inner_steps: The shortest length ``m``.
        num_doublings: Doublings beyond it, at least one.
        num_warmup: Warm-up of every chain.
        num_samples: Draws of every chain.
        num_chains: Independent chains per length; 32 or more, side by side.
        alpha: Probability that equal posteriors are said to disagree.
        **exchange: Other arguments of :class:`Exchange`.

    Returns:
        The estimates and whether they agree.

    Raises:
        ValueError: a count is too small, or the model is refused by :class:`Exchange`.

    Example:
        >>> import jax, jax.numpy as jnp, numpyro, numpyro.distributions as dist, ebm_ppl as ebm
        >>> def model(x):
        ...     precision = numpyro.sample("precision", dist.Gamma(2.0, 1.0))
        ...     flat = dist.ImproperUniform(dist.constraints.real, (), ())
        ...     with numpyro.plate("rows", len(x)):
        ...         numpyro.sample("x", ebm.EBM(lambda x: 0.5 * precision * x**2, flat), obs=x)
        >>> result = inner_doubling_test(
        ...     jax.random.key(0), model, (jnp.array([0.3, -1.2, 0.8]),), inner_kernel=ebm.kernels.mala(step_size=0.5),
        ...     inner_steps=10, num_doublings=1, num_warmup=50, num_samples=50, num_chains=4,
        ... )
        >>> [row.quantity for row in result.rows[:2]], list(result.acceptance)
        (['mean precision', 'sd precision'], [10, 20])

    References:
        Liang (2010), A double Metropolis-Hastings sampler for spatial models with intractable normalizing constants.
    """
    check_count("num_chains", num_chains, 2)
    lengths = [
        check_count("inner_steps", inner_steps) * 2**k for k in range(check_count("num_doublings", num_doublings) + 1)
    ]
    samples, acceptance = {}, {}
    for run_key, length in zip(jax.random.split(key, len(lengths)), lengths, strict=True):
        mcmc = MCMC(
            Exchange(model, inner_kernel=inner_kernel, inner_steps=length, **exchange),
            num_warmup=num_warmup,
            num_samples=num_samples,
            num_chains=num_chains,
            chain_method="vectorized",
            progress_bar=False,
        )
        mcmc.run(run_key, *args, **(kwargs or {}))
        samples[length] = _coordinates(mcmc.get_samples(group_by_chain=True))
        acceptance[length] = float(np.mean(mcmc.get_extra_fields()["accept_prob"]))
    return _compare(samples, acceptance, alpha)


def _coordinates(samples: dict[str, Any]) -> dict[str, np.ndarray]:
    """Every scalar coordinate of every site as ``(chain, draw)``."""
    columns = {}
    for name, values in samples.items():
        values = np.asarray(values, np.float64)
        for index in np.ndindex(values.shape[2:]):
            label = name + (f"[{','.join(map(str, index))}]" if index else "")
            columns[label] = values[(slice(None), slice(None), *index)]
    return columns


def _compare(samples: dict[int, dict[str, np.ndarray]], acceptance: dict[int, float], alpha: float) -> InnerDoubling:
    longest = samples[max(samples)]
    num_chains = next(iter(longest.values())).shape[0]
    num_comparisons = 2 * len(longest) * (len(samples) - 1)
    critical = float(scipy.stats.t.isf(alpha / (2 * num_comparisons), 2 * (num_chains - 1)))
    rows = []
    for steps, columns in samples.items():
        for name, values in columns.items():
            # Squared deviations from one centre have means that are linear in the law, as the t-test wants.
            centre = longest[name].mean()
            for kind, function in {"mean": lambda x: x, "sd": lambda x, centre=centre: (x - centre) ** 2}.items():
                ours, theirs = function(values).mean(axis=1), function(longest[name]).mean(axis=1)
                error = ours.std(ddof=1) / num_chains**0.5
                spread = np.hypot(error, theirs.std(ddof=1) / num_chains**0.5)
                deviation = 0.0 if values is longest[name] else (ours.mean() - theirs.mean()) / spread
                estimate, mcse = float(ours.mean()), float(error)
                if kind == "sd":
                    # By the delta method; about the centre, so a shifted mean widens it too.
                    estimate = estimate**0.5
                    mcse = mcse / (2 * estimate)
                rows.append(DoublingRow(steps, f"{kind} {name}", estimate, mcse, abs(float(deviation))))
    return InnerDoubling(tuple(rows), acceptance, critical)

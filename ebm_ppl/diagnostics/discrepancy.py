"""Checks of draws by the gradient of the energy alone, and of the proposals that a kernel makes."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from ebm_ppl.checks import check_count, map_energy
from ebm_ppl.diagnostics.check import Check
from ebm_ppl.normalizer.pareto import pareto_khat
from ebm_ppl.objectives.domains import flat_rows
from ebm_ppl.objectives.stein import median_distance, stein_kernel
from ebm_ppl.proposals import log_density, sample_and_log_prob
from ebm_ppl.regions import is_whole_space
from ebm_ppl.types import Array, Key, Potential
from ebm_ppl.weights import effective_size

MIN_GROUPS = 16
"""Signs are drawn for chains (or blocks of them); fewer of them make no distribution."""
_BLOCKS = 32


def check_ksd(
    key: Key, potential: Potential, position: Any, *, num_bootstrap: int = 4000, max_rows: int = 512
) -> Check:
    """Whether draws balance the forces of the energy, by the kernel Stein discrepancy with a wild bootstrap.

    The inverse multiquadric kernel ``(1 + |x - y|^2 / l^2)^(-1/2)``, ``l`` the median distance. The bootstrap gives all
    draws of a chain one sign (of a block of a chain, where chains are few), and so allows for any dependence among them.

    Args:
        key: Random key.
        potential: Energy of one continuous event on the whole space.
        position: Draws ``(chain, draw, *event)``.
        num_bootstrap: Replicates.
        max_rows: Draws to use, evenly spaced; the cost grows with their square.

    Returns:
        Value: the p-value; below a thousandth it fails.

    Example:
        >>> draws = jax.random.normal(jax.random.key(0), (32, 10))
        >>> energy = lambda x: 0.5 * x**2
        >>> check_ksd(jax.random.key(1), energy, draws).status, check_ksd(jax.random.key(1), energy, 2.0 * draws).status
        ('pass', 'fail')

    References:
        Gorham, Mackey (2017), arXiv:1703.01717; Chwialkowski, Strathmann, Gretton (2016), A kernel test of goodness of fit,
        arXiv:1602.02964; Wenliang, Kanagawa (2020), arXiv:2008.10087 (its blindness).
    """
    blind_to = "mode weights: draws of the right shape around each mode pass, however many each mode has"

    def finish(status: Any, value: float, why: str, cost: int = 0) -> Check:
        return Check("ksd", status, value, "p >= .001", why, blind_to, num_gradients=cost)

    position = jnp.asarray(position)
    num_chains, num_draws = position.shape[:2]
    support = getattr(potential, "support", None)
    if not jnp.issubdtype(position.dtype, jnp.floating) or getattr(support, "is_discrete", False):
        return finish("not assessable", np.nan, "events are discrete: the energy has no gradient there")
    if support is not None and not is_whole_space(support, position[0, 0]):
        return finish("not assessable", np.nan, "the support has a boundary, where Stein's identity has another term")
    if not bool(jnp.isfinite(position).all()):
        return finish("not assessable", np.nan, "draws are NaN or infinite")
    kept = min(num_draws, max(max_rows // num_chains, 1))
    position = position[:, np.linspace(0, num_draws - 1, kept).round().astype(int)]
    # Where chains are few, blocks of each stand for chains.
    blocks = min(kept, -(-_BLOCKS // num_chains)) if num_chains < _BLOCKS else 1
    group = (np.arange(num_chains)[:, None] * blocks + np.arange(kept) * blocks // kept).ravel()
    rows = position.reshape(-1, *position.shape[2:])
    if num_chains * blocks < MIN_GROUPS or len(np.unique(np.asarray(rows).reshape(len(rows), -1), axis=0)) < MIN_GROUPS:
        return finish("not assessable", np.nan, f"{num_chains} chains of {num_draws} draws are too few, or do not move")
    check_count("num_bootstrap", num_bootstrap, 1000)  # with fewer no p could be below a thousandth
    statistic, null, length = _bootstrap(key, potential, rows, jnp.asarray(group), num_chains * blocks, num_bootstrap)
    if not np.isfinite(float(statistic)):
        return finish("not assessable", np.nan, "the energy or its gradient is not finite at some draws")
    value = float((1 + jnp.sum(null >= statistic)) / (num_bootstrap + 1))
    if value < 1e-3:
        return finish("fail", value, "draws do not balance the forces of the energy", len(rows))
    return finish("pass", value, f"{len(rows)} draws, length scale {float(length):.3g}", len(rows))


@eqx.filter_jit
def _bootstrap(
    key: Key, potential: Potential, rows: Array, group: Array, num_groups: int, num_bootstrap: int
) -> tuple[Array, Array, Array]:
    """The sum of the Stein kernel over all pairs, the same with random signs, ``(bootstrap,)``, and the length scale."""
    flat = flat_rows("check_ksd", potential, rows)
    score = -jax.vmap(jax.grad(flat.energy))(flat.rows)
    length, one = median_distance(flat.rows), jnp.ones((), flat.rows.dtype)
    pairs = stein_kernel(flat.rows, score, jnp.broadcast_to(one, len(rows)), length, 0.5 * one)
    member = jax.nn.one_hot(group, num_groups, dtype=pairs.dtype)
    pairs = member.T @ pairs @ member
    sign = jax.random.rademacher(key, (num_bootstrap, num_groups), pairs.dtype)
    return pairs.sum(), jnp.sum((sign @ pairs) * sign, axis=1), length


def check_proposal_quality(key: Key, potential: Potential, proposal: Any, *, num_proposals: int = 1000) -> Check:
    """What a flow or another proposal is worth against the energy: weights ``w = exp(-U) / q`` of its own draws.

    Args:
        key: Random key.
        potential: Energy of one event, base included.
        proposal: ``q``, which can be drawn from and evaluated.
        num_proposals: Draws.

    Returns:
        Value: the effective sample size as a fraction. Warn where it is below .01, or where the Pareto k-hat of the weights
        is above .7. The finding has k-hat, the acceptance rate of independence moves, and the largest share of one weight.

    Example:
        >>> import numpyro.distributions as dist
        >>> energy = lambda x: 0.5 * x**2
        >>> check_proposal_quality(jax.random.key(0), energy, dist.Normal(0.0, 1.2)).status
        'pass'
        >>> check_proposal_quality(jax.random.key(0), energy, dist.Normal(9.0, 0.1)).status
        'warn'

    References:
        Vehtari, Simpson, Gelman, Yao, Gabry (2024), arXiv:1507.02646 (k-hat).
    """
    blind_to = "modes that the proposal never draws"
    num_proposals = check_count("num_proposals", num_proposals, 50)
    draws, _ = sample_and_log_prob(proposal, key, num_proposals)
    energy = np.asarray(map_energy(potential, draws), np.float64)
    log_weight = -energy - np.asarray(log_density(proposal, draws), np.float64)

    def finish(status: Any, value: float, why: str) -> Check:
        return Check("proposal", status, value, "ESS >= .01, k-hat <= .7", why, blind_to)

    bad = np.isnan(log_weight) | (log_weight == np.inf)
    if bad.any() or not np.isfinite(log_weight).any():
        return finish("warn", np.nan, f"{int(bad.sum())} of {num_proposals} proposals have no weight")
    weights = jnp.asarray(log_weight)
    fraction, khat = float(effective_size(weights)) / num_proposals, float(pareto_khat(weights))
    share = np.exp(log_weight - log_weight.max())
    half = num_proposals // 2
    # Independence moves in equilibrium start from draws weighted by w, and w min(1, w' / w) = min(w, w').
    accepted, start = np.minimum(share[:half], share[half : 2 * half]).sum(), share[:half].sum()
    acceptance = float(accepted / start) if start > 0 else np.nan
    largest = float(share.max() / share.sum())
    why = f"k-hat {khat:.2f}, acceptance of independence moves {acceptance:.2f}, largest weight {largest:.1%}"
    return finish("warn" if fraction < 0.01 or khat > 0.7 else "pass", fraction, why)

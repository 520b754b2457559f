"""Kernel checks: chains that start from exact draws of a target must still be exact draws after any number of steps.

Nothing has to converge and no autocorrelation has to be estimated: the chains are independent by construction.

References:
    Gandy, Scott (2020), Unit testing for MCMC and other Monte Carlo methods, arXiv:2001.06465.
"""

from typing import Any, Protocol, cast, runtime_checkable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from ebm_ppl.checks import check_count
from ebm_ppl.partials import function_behind
from ebm_ppl.testing.report import KernelReport
from ebm_ppl.testing.statistics import ALPHA, CHECKS, binomial_check, two_sample_check
from ebm_ppl.types import Array, AuxiliaryKernel, FreshPopulation, Info, Kernel, Key, Potential


@runtime_checkable
class ExactTarget(Protocol):
    """What the kernel checks ask of a target; :class:`ebm_ppl.targets.Target` provides it."""

    name: str

    @property
    def unconstrained_potential(self) -> Potential:
        """Energy of one point of R^d."""
        ...

    def sample(self, key: Key, n: int, /) -> Array:
        """Exact i.i.d. draws, ``(n, *event_shape)``."""
        ...

    def unconstrain(self, event: Array, /) -> Array:
        """From events to points of R^d."""
        ...


def exact_start_invariance(
    key: Key,
    kernel: Kernel,
    target: ExactTarget,
    *,
    num_chains: int = 100_000,
    num_steps: int = 5,
    alpha: float = ALPHA,
    reference_factor: int = 4,
    minimum_moved: float = 0.05,
    minimum_jump: float = 1e-3,
    power_goal: float | None = None,
) -> KernelReport:
    """Whether a kernel leaves a target invariant: chains started from exact draws must still be exact draws.

    Chains run in unconstrained coordinates ``z``. Their ends are compared with fresh exact draws by two-sample DKW on
    one-dimensional projections: up to four coordinates, two fixed linear combinations, the energy, and the radius, each
    at ``alpha`` over their number.

    The law passes trivially if nothing moves, so ``report.passed`` also demands movement. A fault is detected through
    its effect on the law after ``num_steps`` steps: use a coarse step size (acceptance .3 to .8), at which faults are
    large, and a few steps, over which they accumulate.

    Args:
        key: JAX random key.
        kernel: A population kernel, ``kernel(potential) -> (init, step)``, whose chains are independent given their
            starts.
        target: A continuous target with an exact sampler.
        num_chains: Independent chains.
        num_steps: Steps of each, at least 1.
        alpha: False-failure rate of the whole report.
        reference_factor: Fresh draws per chain.
        minimum_moved: What the fraction of chains that moved must exceed, in every coordinate.
        minimum_jump: What the mean squared distance, relative to twice the variance, must exceed in some coordinate.
        power_goal: Fail if some discrepancy of CDFs above this could go unnoticed; ``None`` only reports the power.

    Returns:
        A report; call ``.raise_if_failed()`` in a test.

    Raises:
        TypeError: the kernel's chains carry more than a position: what of it an exact start is, only its author knows.
        ValueError: a count is below 1.

    Example:
        >>> import jax
        >>> from ebm_ppl import kernels, targets
        >>> kernel = kernels.mala(step_size=0.3)
        >>> report = exact_start_invariance(
        ...     jax.random.key(0), kernel, targets.get("gaussian"), num_chains=2000, num_steps=2
        ... )
        >>> report.passed
        True

    References:
        Gandy, Scott (2020), arXiv:2001.06465, section 2; architecture after the MCMC tests of TensorFlow Probability.
    """
    CHECKS.record(alpha)
    key_run, key_reference = jax.random.split(key)
    potential = target.unconstrained_potential
    _, end, summary = _run(key_run, kernel, target, num_chains, num_steps)
    num_reference = num_chains * check_count("reference_factor", reference_factor)
    reference = target.unconstrain(target.sample(key_reference, num_reference))
    ours, theirs = _project(potential, end), _project(potential, reference)
    checks = tuple(
        two_sample_check(name, np.asarray(ours[name]), np.asarray(theirs[name]), alpha / len(ours)) for name in ours
    )
    return KernelReport(
        name=f"exact-start invariance of {target.name}",
        checks=checks,
        **summary,
        minimum_moved=minimum_moved,
        minimum_jump=minimum_jump,
        power_goal=power_goal,
        alpha=alpha,
        num_chains=num_chains,
        num_steps=num_steps,
    )


def exact_start_reversibility(
    key: Key,
    kernel: Kernel,
    target: ExactTarget,
    *,
    num_chains: int = 100_000,
    num_steps: int = 1,
    alpha: float = ALPHA,
    minimum_moved: float = 0.05,
    minimum_jump: float = 1e-3,
    power_goal: float | None = None,
) -> KernelReport:
    """Whether a kernel is reversible: from an exact start, ``(X_0, X_k)`` and ``(X_k, X_0)`` have one law.

    Then any antisymmetric function of the pair is as often positive as negative: an exact sign test among the chains
    where it is not zero, for differences of a coordinate and of the energy, and for cross products ``f(X_0) g(X_k) -
    g(X_0) f(X_k)`` of coordinates and energy, which see a rotation. Only for kernels that claim detailed balance;
    deterministic-scan Gibbs or persistent momentum fails although it is invariant.

    Arguments, return value and errors are those of :func:`exact_start_invariance`; ``power`` is the smallest deviation
    from one half of the probability of a positive sign.

    Example:
        >>> import jax
        >>> from ebm_ppl import kernels, targets
        >>> kernel = kernels.mala(step_size=0.3)
        >>> exact_start_reversibility(jax.random.key(0), kernel, targets.get("ring"), num_chains=2000).has_moved
        True

    References:
        Gandy, Scott (2020), arXiv:2001.06465, section 2.
    """
    CHECKS.record(alpha)
    key_run, key_scale = jax.random.split(key)
    start, end, summary = _run(key_run, kernel, target, num_chains, num_steps)
    # Independent draws set the scales, so that the functions do not depend on the chains they judge.
    scale = target.unconstrain(target.sample(key_scale, 4096))
    signs = _antisymmetric_signs(target.unconstrained_potential, start, end, scale)
    checks = []
    for name, sign in signs.items():
        sign = np.asarray(sign)
        # A NaN counts as neither sign, and the report fails on it separately.
        positive, negative = int(np.sum(sign > 0)), int(np.sum(sign < 0))
        checks.append(binomial_check(name, positive, max(positive + negative, 1), 0.5, alpha / len(signs)))
    return KernelReport(
        name=f"exact-start reversibility of {target.name}",
        checks=tuple(checks),
        **summary,
        minimum_moved=minimum_moved,
        minimum_jump=minimum_jump,
        power_goal=power_goal,
        alpha=alpha,
        num_chains=num_chains,
        num_steps=num_steps,
    )


def _run(
    key: Key, kernel: Kernel, target: ExactTarget, num_chains: int, num_steps: int
) -> tuple[Array, Array, dict[str, float]]:
    """Starts, ends, and how the chains moved."""
    check_count("num_chains", num_chains)
    check_count("num_steps", num_steps)
    func = function_behind(kernel)
    is_fresh = isinstance(func, FreshPopulation) and func.draws_afresh
    if isinstance(func, AuxiliaryKernel) and not is_fresh:
        raise TypeError(
            "kernel: got one whose chains carry more than a position, expected one whose exact starts are draws of the "
            "target alone. Start it from an exact joint state, and compare with ebm_ppl.testing.two_sample_test."
        )
    key_start, key_chains = jax.random.split(key)
    start = target.unconstrain(target.sample(key_start, num_chains))
    # Numbers become arrays, hence traced: a new step size does not recompile. Functions stay static.
    kernel, potential = jax.tree.map(
        lambda leaf: jnp.asarray(leaf) if eqx.is_array_like(leaf) else leaf, (kernel, target.unconstrained_potential)
    )
    end, summary = _run_chains(key_chains, kernel, potential, start, num_steps)
    return start, end, {name: float(value) for name, value in summary.items()}


@eqx.filter_jit
def _run_chains(
    key: Key, kernel: Kernel, potential: Potential, start: Array, num_steps: int
) -> tuple[Array, dict[str, Array]]:
    algorithm = kernel(potential)
    key_init, key_steps = jax.random.split(key)

    def step(state: Any, key: Key) -> tuple[Any, tuple[Array, Array]]:
        # BlackJAX declares no fields for its infos; ours are an ebm_ppl.types.Info.
        state, info = cast(tuple[Any, Info], algorithm.step(key, state))
        return state, (jnp.nanmean(info.acceptance_rate), jnp.mean(info.is_divergent))

    state = algorithm.init(start, key_init)
    state, (acceptance, divergent) = jax.lax.scan(step, state, jax.random.split(key_steps, num_steps))
    before, after = (x.reshape(x.shape[0], -1) for x in (start, state.position))
    is_finite = jnp.all(jnp.isfinite(after), axis=1)
    squared_jump = jnp.mean(jnp.where(is_finite[:, None], after - before, 0.0) ** 2, axis=0)
    return state.position, {
        "acceptance": jnp.mean(acceptance),
        "moved_fraction": jnp.min(jnp.mean(after != before, axis=0)),
        "relative_jump": jnp.max(squared_jump / (2.0 * jnp.var(before, axis=0))),
        "divergent_fraction": jnp.mean(divergent),
        "nonfinite_fraction": jnp.mean(~is_finite),
    }


def _directions(dim: int) -> np.ndarray:
    """Two fixed unit vectors in general position, ``(2, dim)``."""
    directions = np.random.default_rng(0).normal(size=(2, dim))
    return directions / np.linalg.norm(directions, axis=1, keepdims=True)


@eqx.filter_jit
def _project(potential: Potential, positions: Array) -> dict[str, Array]:
    """The one-dimensional views of a population that are compared, each ``(chain,)``."""
    flat = positions.reshape(positions.shape[0], -1)
    dim = flat.shape[1]
    columns = {f"z[{i}]": flat[:, i] for i in range(min(dim, 4))}
    if dim > 1:
        mixed = jnp.matmul(flat, jnp.asarray(_directions(dim).T, flat.dtype), precision="highest")
        columns |= {"combination 0": mixed[:, 0], "combination 1": mixed[:, 1]}
    columns["energy"] = jax.vmap(potential)(positions)
    columns["radius"] = jnp.linalg.norm(flat, axis=1)
    return columns


@eqx.filter_jit
def _antisymmetric_signs(potential: Potential, start: Array, end: Array, scale: Array) -> dict[str, Array]:
    """Functions of (start, end) that change sign when the two are exchanged, each ``(chain,)``."""

    def features(positions: Array) -> Array:
        flat = positions.reshape(positions.shape[0], -1)
        return jnp.concatenate([flat, jax.vmap(potential)(positions)[:, None]], axis=1)

    reference = features(scale)
    before, after = ((features(x) - reference.mean(axis=0)) / reference.std(axis=0) for x in (start, end))

    def cross(i: int, j: int) -> Array:
        return before[:, i] * after[:, j] - before[:, j] * after[:, i]

    functions = {
        "z[0]": after[:, 0] - before[:, 0],
        "energy": after[:, -1] - before[:, -1],
        "z[0] x energy": cross(0, -1),
    }
    if before.shape[1] > 2:
        functions["z[0] x z[1]"] = cross(0, 1)
    # A fused multiply-add leaves rounding errors in the cross products of a chain that has not moved.
    has_moved = jnp.any(before != after, axis=1)
    return {name: jnp.where(has_moved, value, 0.0) for name, value in functions.items()}

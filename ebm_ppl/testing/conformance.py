"""Whether a kernel keeps the protocol: what samplers, objectives and handlers rely on, apart from the law itself."""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from ebm_ppl.checks import check_count
from ebm_ppl.densities import LikeEnergy
from ebm_ppl.sampling import advance, draw, init_sampler
from ebm_ppl.types import Array, Info, Kernel, Key, Potential, PyTree, SamplerState, Scalar


class Finding(NamedTuple):
    """One rule of the protocol: whether it is kept, and what was seen."""

    rule: str
    passed: bool
    detail: str = ""


class ConformanceReport(NamedTuple):
    """The rules a kernel was held to; printing it shows all of them."""

    findings: tuple[Finding, ...]

    @property
    def passed(self) -> bool:
        """Whether every rule is kept."""
        return all(finding.passed for finding in self.findings)

    def __str__(self) -> str:
        lines = [f"kernel conformance: {'PASSED' if self.passed else 'FAILED'}"]
        for rule, passed, detail in self.findings:
            lines.append(f"{'ok  ' if passed else 'FAIL'}  {rule}" + (f": {detail}" if detail else ""))
        return "\n".join(lines)

    def raise_if_failed(self) -> "ConformanceReport":
        """The report itself, or an error that shows it.

        Raises:
            AssertionError: a rule is broken.
        """
        if not self.passed:
            raise AssertionError(str(self))
        return self


def kernel_conformance(
    key: Key,
    kernel: Kernel,
    potential: Potential,
    position: PyTree,
    *,
    independent_chains: bool = True,
    num_steps: int = 3,
) -> ConformanceReport:
    """Whether a kernel can serve as a negative phase: shapes, reports, randomness, compilation, and bad energies.

    It says nothing of the law that the kernel samples; that is what
    :func:`~ebm_ppl.testing.exact_start_invariance` is for.

    Args:
        key: JAX random key.
        kernel: The kernel.
        potential: Energy of one event, finite at ``position`` and around it.
        position: Starting positions ``(chain, *event)``, at least two chains, not all equal.
        independent_chains: Whether a chain must not depend on where the other chains are. False for a population that
            interacts, as the particles of sequential Monte Carlo do.
        num_steps: Kernel steps of each run.

    Returns:
        A report; call ``.raise_if_failed()`` in a test. A rule whose check raises is broken, with the error as detail.

    Raises:
        ValueError: fewer than two chains.

    Example:
        >>> import jax, jax.numpy as jnp, ebm_ppl as ebm
        >>> position = jax.random.normal(jax.random.key(0), (64, 2))
        >>> kernel = ebm.kernels.mala(step_size=0.5)
        >>> print(kernel_conformance(jax.random.key(1), kernel, lambda x: 0.5 * jnp.sum(x**2), position))
        kernel conformance: PASSED
        ok  ...
    """
    sampler = init_sampler(position, kernel)
    if sampler.num_chains < 2:
        raise ValueError(f"position: got {sampler.num_chains} chain, expected at least two.")
    check_count("num_steps", num_steps)
    trial = _Trial(key, potential, sampler, num_steps)
    rules: dict[str, Callable[[_Trial], tuple[bool, str]]] = {
        "its numbers are leaves of a Partial, so that they can change without recompiling": _tunables_are_leaves,
        "a step keeps the structure, shapes and dtypes of the state": _state_is_stable,
        "a step reports an Info of one number per chain": _info_has_its_shape,
        "chains move": _chains_move,
        "the same key gives the same run, another key another one": _is_a_function_of_the_key,
        "one program serves new positions, energies and tunables": _compiles_once,
        "it works under jax.vmap": _vmaps,
        "no gradient flows through its chains": _is_a_constant,
        "an additive constant of the energy changes nothing": _ignores_constants,
        "a NaN energy is counted, and a chain that ends at one is flagged": _counts_nan,
    }
    if independent_chains:
        rules["a chain does not depend on where the others are"] = _chains_are_independent
    findings = []
    for rule, check in rules.items():
        try:
            passed, detail = check(trial)
        except Exception as error:  # whatever the kernel under test raises is a finding, not a failure of the check
            passed, detail = False, f"{type(error).__name__}: {error}".split("\n")[0]
        findings.append(Finding(rule, bool(passed), detail))
    return ConformanceReport(tuple(findings))


class _Trial(NamedTuple):
    key: Key
    potential: Potential
    sampler: SamplerState
    num_steps: int

    def run(self, key: Key | None = None, potential: Any = None, sampler: SamplerState | None = None) -> Any:
        return advance(
            self.key if key is None else key,
            self.potential if potential is None else potential,
            self.sampler if sampler is None else sampler,
            self.num_steps,
        )


def _tunables_are_leaves(trial: _Trial) -> tuple[bool, str]:
    kernel = trial.sampler.kernel
    if not isinstance(kernel, Partial):
        return False, f"got {type(kernel).__name__}, expected a jax.tree_util.Partial"
    loose = [leaf for leaf in jax.tree.leaves(kernel) if not eqx.is_array(leaf)]
    return not loose, f"not arrays: {loose}" if loose else ""


def _algorithm(trial: _Trial) -> tuple[Any, Any]:
    algorithm: Any = trial.sampler.kernel(trial.potential)
    more = () if trial.sampler.auxiliary is None else (trial.sampler.auxiliary,)
    return algorithm, algorithm.init(trial.sampler.position, trial.key, *more)


def _state_is_stable(trial: _Trial) -> tuple[bool, str]:
    algorithm, state = _algorithm(trial)
    after, _ = jax.eval_shape(algorithm.step, trial.key, state)
    before = jax.eval_shape(lambda: state)
    same = jax.tree.structure(before) == jax.tree.structure(after) and all(
        (a.shape, a.dtype) == (b.shape, b.dtype)
        for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True)
    )
    return same, "" if same else f"before {before}, after {after}"


def _info_has_its_shape(trial: _Trial) -> tuple[bool, str]:
    algorithm, state = _algorithm(trial)
    _, info = jax.eval_shape(algorithm.step, trial.key, state)
    if not isinstance(info, Info):
        return False, f"got {type(info).__name__}, expected the result of ebm_ppl.info.step_info"
    shapes = {leaf.shape for leaf in jax.tree.leaves(info)}
    return shapes == {(trial.sampler.num_chains,)}, f"shapes {sorted(shapes)}"


def _chains_move(trial: _Trial) -> tuple[bool, str]:
    _, info = trial.run()
    fraction = float(info.has_moved.mean())
    return fraction > 0.05, f"{fraction:.0%} of them in {trial.num_steps} steps"


def _is_a_function_of_the_key(trial: _Trial) -> tuple[bool, str]:
    first, again = trial.run()[0].position, trial.run()[0].position
    other = trial.run(key=jax.random.fold_in(trial.key, 1))[0].position
    return _equal(first, again) and not _equal(first, other), ""


def _compiles_once(trial: _Trial) -> tuple[bool, str]:
    traces: list[int] = []

    @jax.jit
    def run(key: Key, shift: Array, sampler: SamplerState) -> PyTree:
        traces.append(1)
        return advance(key, _changed(_shifted, trial.potential, shift), sampler, trial.num_steps)[0].position

    def nudged(x: Array) -> Array:
        return x * (1 + 1e-6) if jnp.issubdtype(x.dtype, jnp.floating) else x

    run(trial.key, jnp.asarray(0.0), trial.sampler)
    run(trial.key, jnp.asarray(1.0), jax.tree.map(nudged, trial.sampler))
    return len(traces) == 1, f"{len(traces)} programs for two calls" if len(traces) > 1 else ""


def _changed(change: Callable[..., Scalar], potential: Potential, number: Array) -> LikeEnergy:
    """The potential under test with another energy; a kernel may ask it for its base or its coding all the same."""
    return LikeEnergy(Partial(change, potential, number), potential)


def _shifted(potential: Potential, shift: Array, event: PyTree) -> Array:
    return potential(event) + shift


def _vmaps(trial: _Trial) -> tuple[bool, str]:
    keys = jax.random.split(trial.key, 2)
    both = jax.vmap(lambda key: trial.run(key=key)[0].position)(keys)
    alone = trial.run(key=keys[1])[0].position
    return _close(jax.tree.map(lambda x: x[1], both), alone), ""


def _is_a_constant(trial: _Trial) -> tuple[bool, str]:
    def total(scale: Array) -> Array:
        potential = _changed(_scaled, trial.potential, scale)
        _, draws = draw(trial.key, potential, trial.sampler, 1, num_steps=trial.num_steps)
        return sum((leaf.astype(float).sum() for leaf in jax.tree.leaves(draws.position)), jnp.asarray(0.0))

    slope = float(jax.grad(total)(jnp.asarray(1.0)))
    return slope == 0.0, f"derivative {slope}" if slope else ""


def _scaled(potential: Potential, scale: Array, event: PyTree) -> Array:
    return scale * potential(event)


def _ignores_constants(trial: _Trial) -> tuple[bool, str]:
    plain = trial.run()[0].position
    shifted = trial.run(potential=_changed(_shifted, trial.potential, jnp.asarray(8.0)))[0].position
    # Rounding may flip an accept step here and there.
    same = jax.tree.map(lambda a, b: np.isclose(a, b, rtol=1e-3, atol=1e-3).reshape(len(a), -1).all(1), plain, shifted)
    fraction = float(np.mean(np.all(jax.tree.leaves(same), axis=0)))
    return fraction >= 0.95, f"{fraction:.0%} of the chains end at the same place"


def _counts_nan(trial: _Trial) -> tuple[bool, str]:
    energies = jax.vmap(trial.potential)(trial.sampler.position)
    # Off limits: everything with an energy above the median of where the chains are; these chains start inside.
    limit = jnp.median(energies)
    allowed = np.flatnonzero(np.asarray(energies <= limit))
    inside = np.resize(allowed, trial.sampler.num_chains)
    position = jax.tree.map(lambda x: x[inside], trial.sampler.position)
    walled = _changed(_walled, trial.potential, limit)
    sampler, info = trial.run(potential=walled, sampler=init_sampler(position, trial.sampler.kernel))
    lost = ~jnp.isfinite(jax.vmap(walled)(sampler.position))
    unflagged = int((lost & ~info.is_divergent).sum())
    counted = int(info.num_nonfinite.sum()) + int(info.is_divergent.sum())
    return not unflagged and counted > 0, f"{counted} counted or flagged, {unflagged} chains end there unflagged"


def _walled(potential: Potential, limit: Array, event: PyTree) -> Array:
    energy = potential(event)
    return jnp.where(energy > limit, jnp.nan, energy)


def _chains_are_independent(trial: _Trial) -> tuple[bool, str]:
    def first_elsewhere(x: Array) -> Array:
        return x.at[0].set(x[-1])

    moved = trial.sampler._replace(position=jax.tree.map(first_elsewhere, trial.sampler.position))
    ours, theirs = trial.run()[0].position, trial.run(sampler=moved)[0].position
    return _close(jax.tree.map(lambda x: x[1:], ours), jax.tree.map(lambda x: x[1:], theirs)), ""


def _equal(a: PyTree, b: PyTree) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def _close(a: PyTree, b: PyTree) -> bool:
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.allclose(x, y, rtol=1e-4, atol=1e-5) for x, y in pairs)

"""Draws of a short run: at the number of steps that it was trained for, and at any other."""

from collections.abc import Sequence

import equinox as eqx
import jax

from ebm_ppl.checks import check_count, check_potential, is_traced
from ebm_ppl.partials import as_constants, function_behind
from ebm_ppl.potentials import ShortRun
from ebm_ppl.types import Kernel, Key, Potential, PyTree, ShortRunKernel

MAX_TIME = 2**31
"""Steps are counted in 32 bits."""


def draw_short_run(
    key: Key, potential: Potential, num_draws: int, *, times: Sequence[int] | None = None, kernel: Kernel | None = None
) -> PyTree:
    """Fresh, independent draws of a short run, each the end of its own chain.

    The same start, kernel and tunables as in training. At ``k`` steps the law is the one that training fitted; at other
    times it is another one, which shows what the energy is by itself.

    Args:
        key: Random key.
        potential: A :class:`ebm_ppl.potentials.ShortRun`, or any energy with ``kernel``.
        num_draws: Chains.
        times: Increasing numbers of steps, beyond ``k`` too, at which the same chains are looked at; only ``k`` when
            ``None``.
        kernel: :func:`ebm_ppl.kernels.short_run`; that of the potential when ``None``.

    Returns:
        Events ``(draw, *event)``; with ``times`` ``(time, draw, *event)``. With one key the draws of one time do not
        depend on which other times are asked for. An energy that is not bounded below may take chains to infinity at
        long times: such draws are not finite.

    Raises:
        TypeError: there is no short-run kernel, or a count is not a whole number.
        ValueError: ``times`` do not increase, the start gives another number of positions, or the energy does not fit one
            event.

    Example:
        >>> import jax, jax.numpy as jnp, numpyro.distributions as dist, ebm_ppl as ebm
        >>> kernel = ebm.kernels.short_run(10, dist.Normal(0.0, 1.0).expand([2]).to_event(1), step_size=0.1)
        >>> model = ebm.potentials.ShortRun(lambda x: 0.5 * jnp.sum(x**2), kernel)
        >>> draw_short_run(jax.random.key(0), model, 5, times=(0, 10, 1000)).shape
        (3, 5, 2)
    """
    kernel = short_run_of(potential, kernel)
    num_draws = check_count("num_draws", num_draws)
    wanted = (function_behind(kernel).num_steps,) if times is None else tuple(times)
    for before, time in zip((-1, *wanted), wanted, strict=False):
        if not before < check_count("times", time, minimum=0) < MAX_TIME:
            raise ValueError(f"times: got {list(wanted)}, expected increasing numbers of steps.")
    if not wanted:
        raise ValueError("times: got none, expected at least one number of steps.")
    func = function_behind(kernel)
    start = jax.eval_shape(lambda key: func.start_positions(key, num_draws, **kernel.keywords), key)
    check_potential(potential, jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), start))
    run = _positions_at if is_traced(key, potential, kernel) else _compiled_positions_at
    positions = run(key, potential, kernel, num_draws, wanted)
    return jax.tree.map(lambda x: x[0], positions) if times is None else positions


def short_run_of(potential: Potential, kernel: Kernel | None = None) -> Kernel:
    """The short run that draws are made with.

    Raises:
        TypeError: there is none.
    """
    if kernel is None:
        if not isinstance(potential, ShortRun):
            raise TypeError(
                f"potential: got {type(potential).__name__} without a kernel, expected an ebm.potentials.ShortRun, "
                "which has one, or kernel=ebm.kernels.short_run(...)."
            )
        kernel = potential.sampler
    if not isinstance(function_behind(kernel), ShortRunKernel):
        raise TypeError(f"kernel: got {type(kernel).__name__}, expected ebm.kernels.short_run(...).")
    return kernel


def _positions_at(key: Key, potential: Potential, kernel: Kernel, num_draws: int, times: tuple[int, ...]) -> PyTree:
    potential, kernel = as_constants((potential, kernel))
    return as_constants(function_behind(kernel).positions_at(key, potential, num_draws, times, **kernel.keywords))


_compiled_positions_at = eqx.filter_jit(_positions_at)

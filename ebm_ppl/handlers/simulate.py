"""``simulate``: give the EBMs of a model a sampler, so that prior and posterior predictive simulation works."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from numpyro.primitives import Messenger

from ebm_ppl.chains import ChainSimulator, draws_afresh
from ebm_ppl.checks import check_count
from ebm_ppl.distributions import EBM, Simulator, find_ebms, map_ebms
from ebm_ppl.potentials import find_short_runs
from ebm_ppl.potentials.short_run import not_a_density
from ebm_ppl.regions import is_whole_space
from ebm_ppl.training.state import is_same_kernel
from ebm_ppl.types import Array, Kernel


class simulate(Messenger):
    """Attach a sampler to every EBM of a model that has none, so that its sites can be drawn.

    Each draw is the end of its own chain, started at a draw of the base (or uniformly in unconstrained space where the
    base cannot be sampled), so that the rows of a plate are independent. The draws are as good as the chains are long:
    next to each simulated site ``x`` the model gains the deterministic sites ``x$acceptance_rate`` and ``x$energy_drift``
    (the energy at the end minus half way), which ``Predictive`` returns with the draws and
    :func:`ebm_ppl.diagnostics.simulation_summary` judges.

    Args:
        fn: A NumPyro model.
        kernel: From :mod:`ebm_ppl.kernels`. It acts in unconstrained space.
        num_steps: Kernel steps per draw, at least 2. A kernel whose steps draw anew also takes 1, without
            ``x$energy_drift``: with :func:`ebm_ppl.kernels.raw_diffusion` and a sampler that was trained for the energy, a
            draw then costs the ``T`` evaluations of that sampler's network.
        sampler: Instead of a kernel, an exact or learned simulator ``(key, potential, num_samples) -> samples``.

    Raises:
        TypeError: neither or both of ``kernel`` and ``sampler`` were given.
        ValueError: too small a ``num_steps``; when drawn from, a kernel that weights its chains, or one that is not that of
            an energy of short runs.

    Example:
        >>> import jax, jax.numpy as jnp, numpyro, numpyro.distributions as dist, ebm_ppl as ebm
        >>> def model():
        ...     x = numpyro.sample("x", ebm.EBM(lambda x: x**4, dist.Normal(0.0, 1.0)))
        ...     numpyro.sample("y", dist.Normal(x, 0.1))
        >>> simulated = simulate(model, kernel=ebm.kernels.mala(step_size=0.3), num_steps=100)
        >>> draws = numpyro.infer.Predictive(simulated, num_samples=500)(jax.random.key(0))
        >>> draws["y"].shape, sorted(draws)
        ((500,), ['x', 'x$acceptance_rate', 'x$energy_drift', 'y'])
    """

    def __init__(
        self,
        fn: Callable[..., Any] | None = None,
        *,
        kernel: Kernel | None = None,
        num_steps: int = 100,
        sampler: Simulator | None = None,
    ):
        super().__init__(fn)
        if (kernel is None) == (sampler is None):
            given = "neither" if kernel is None else "both"
            raise TypeError(f"kernel, sampler: got {given}, expected one of them.")
        self._kernel, self._sampler = kernel, sampler
        fewest = 1 if kernel is not None and draws_afresh(kernel) else 2
        self._num_steps = check_count("num_steps", num_steps, fewest)
        self._reports: dict[int, dict[str, Array]] = {}
        self._names: dict[int, str] = {}

    def process_message(self, msg: dict[str, Any]) -> None:
        """Attach the sampler."""
        if msg["type"] == "sample" and find_ebms(msg["fn"]):
            self._names[id(msg)] = msg["name"]
            msg["fn"] = map_ebms(
                lambda ebm: (
                    ebm
                    if ebm.sampler is not None
                    else self._checked(msg["name"], ebm).with_sampler(self._simulator(id(msg)))
                ),
                msg["fn"],
            )

    def _checked(self, name: str, ebm: EBM) -> EBM:
        """An energy of short runs is drawn by those runs, in the space where they were trained."""
        runs = find_short_runs(ebm.potential)
        if runs and not (
            self._kernel is not None
            and is_same_kernel(runs[0].sampler, self._kernel)
            and self._num_steps == 1
            and isinstance(ebm.base, dist.ImproperUniform)
            and is_whole_space(ebm.support, jnp.zeros(ebm.event_shape))
        ):
            raise ValueError(
                f"site '{name}': {not_a_density(runs[0].num_steps)}, whose draws are those of its own runs: expected "
                "kernel=potential.sampler and num_steps=1, and the site ebm.EBM(potential, dist.ImproperUniform(support, "
                "(), event_shape)) on the whole space (the energy has its base inside)."
            )
        return ebm

    def _simulator(self, site: int) -> Simulator:
        if self._kernel is None:
            assert self._sampler is not None  # the constructor saw to it
            return self._sampler
        return ChainSimulator(self._kernel, self._num_steps, partial(self._reports.__setitem__, site))

    def postprocess_message(self, msg: dict[str, Any]) -> None:
        """Record how the simulation went, where there was one."""
        # By message, not by name: handlers further out, such as scope, have changed the name by now.
        site = self._names.pop(id(msg), "")
        for name, value in self._reports.pop(id(msg), {}).items():
            numpyro.deterministic(f"{site}${name}", value)

    def __exit__(self, *exception: Any) -> None:
        """Forget everything, tracers of an interrupted simulation included."""
        self._reports.clear()
        self._names.clear()
        super().__exit__(*exception)

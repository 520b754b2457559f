"""Short-run training: an energy and a sampler of exactly k steps from a fixed start, which belong together."""

import functools
import warnings
from dataclasses import dataclass
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import optax

from ebm_ppl.checks import as_array, check_count, check_potential, check_rows
from ebm_ppl.diagnostics import find_escape
from ebm_ppl.generation import draw_short_run
from ebm_ppl.kernels import langevin
from ebm_ppl.kernels import short_run as short_run_kernel
from ebm_ppl.kernels.discrete import check_chains
from ebm_ppl.objectives import contrastive_divergence, persistent_contrastive_divergence
from ebm_ppl.potentials import MLP, ShortRun, tilt
from ebm_ppl.potentials.short_run import not_a_density
from ebm_ppl.recipes.bases import normal_base
from ebm_ppl.regions import check_base
from ebm_ppl.sampling import init_sampler, is_discrete_kernel
from ebm_ppl.training import TrainState, fit, init_train
from ebm_ppl.training.state import check_optimizer
from ebm_ppl.training.stopping import Evaluate
from ebm_ppl.types import Array, Kernel, Key, Potential

From = Literal["noise", "data", "persistent"]


def short_run(
    key: Key,
    data: Array,
    *,
    num_updates: int,
    num_steps: int = 10,
    start: From = "noise",
    init: Any = None,
    kernel: Kernel | None = None,
    step_size: float | None = None,
    network: Potential | None = None,
    base: Any = None,
    batch_size: int | None = None,
    num_chains: int | None = None,
    optimizer: optax.GradientTransformation | None = None,
    evaluate: Evaluate | None = None,
    report_every: int = 100,
    progress_bar: bool | None = None,
) -> tuple[TrainState, dict[str, np.ndarray]]:
    """Train an energy with negatives that are ``num_steps`` steps from noise, fresh in every update (Rdm-k).

    The update is that of contrastive divergence, ``E_data[dU] - E_k[dU]``, with the law of ``x_k`` in the place of the
    model's. Where it ends, the statistics of the data are those of the draws at exactly ``k`` steps of this sampler,
    and the energy by itself is no model of them: it may not even have a normalising constant. What is learned is the
    whole sampler, start, kernel and ``k``; the state holds it as one :class:`ebm_ppl.potentials.ShortRun`, and
    :func:`ebm_ppl.draw_short_run` draws.

    With another ``start`` the same call trains by CD-k (``"data"``) or PCD-k (``"persistent"``), for comparison. Those
    energies are judged at equilibrium, and the state has them bare.

    Args:
        key: Random key.
        data: Rows ``(row, *event)``.
        num_updates: Updates.
        num_steps: ``k``.
        start: ``"noise"``, ``"data"`` or ``"persistent"``.
        init: The law of ``x_0``, as in :func:`ebm_ppl.kernels.short_run`; the base when ``None``, or for a discrete
            kernel independent uniform sites.
        kernel: What moves the chains; Langevin with ``step_size`` when ``None``. A discrete one (``kernels.gibbs``)
            takes discrete data and a ``network`` with its values, such as :class:`ebm_ppl.potentials.RBM`.
        step_size: Of Langevin, 0.01 when ``None``; a part of the model.
        network: Energy of one event, without a base; :class:`ebm_ppl.potentials.MLP` with two hidden layers of 64 units
            when ``None``. Not for discrete kernels.
        base: Distribution to tilt; when ``None``, normal at the mean of the data, in all coordinates with the largest
            standard deviation that one of them has. With ``dist.ImproperUniform`` the network is the whole energy, and
            may fall without end. Discrete kernels have none.
        batch_size: Rows per update; 256, or all where they are fewer, when ``None``.
        num_chains: Chains; as many as rows when ``None``. CD-k has as many as rows.
        optimizer: Adam, clipped, with b1 = .5 and a step of 1e-3 that falls to a fiftieth of it along a cosine, when
            ``None``.
        evaluate: As in :func:`ebm_ppl.fit`.
        report_every: Updates between two looks at the run.
        progress_bar: As in :func:`ebm_ppl.fit`.

    Returns:
        The state and the history of :func:`ebm_ppl.fit`. From noise ``state.potential`` is a
        :class:`ebm_ppl.potentials.ShortRun`, else the energy. After CD-k the chains of the state are where they began: its
        negatives are rows that have moved.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is out of range, or the rows do not fit it.
        TrainingFailure: the energy or a chain became non-finite.

    Warns:
        RuntimeWarning: the energy falls without end in some direction (:func:`ebm_ppl.diagnostics.find_escape`). The
            draws of a short run are as good as ever; the energy has no density, and chains that go on leave.

    Example:
        >>> import jax, ebm_ppl as ebm
        >>> rows = 0.5 * jax.random.normal(jax.random.key(0), (500, 2)) + 1.0
        >>> state, history = short_run(jax.random.key(1), rows, num_updates=200, num_steps=5, step_size=0.1)
        >>> draws = ebm.draw_short_run(jax.random.key(2), state.potential, 1000)
        >>> bool(abs(draws.mean() - 1.0) < 0.1)
        True

    References:
        Nijkamp, Hill, Zhu, Wu (2019), Learning non-convergent non-persistent short-run MCMC toward energy-based model,
        arXiv:1904.09770; Agoritsas, Catania, Decelle, Seoane (2023), Explaining the effects of non-convergent sampling
        in the training of energy-based models, arXiv:2301.09428.
    """
    num_updates, num_steps = check_count("num_updates", num_updates), check_count("num_steps", num_steps)
    if start not in get_args(From):
        raise ValueError(f"start: got {start!r}, expected one of {list(get_args(From))}.")
    net_key, init_key, fit_key, probe_key = jax.random.split(key, 4)
    if kernel is None:
        kernel = langevin(0.01 if step_size is None else step_size)
    elif step_size is not None:
        raise ValueError(f"step_size: got {step_size} together with a kernel, which has its own; expected None.")
    is_discrete = is_discrete_kernel(kernel)
    potential, data, init = (_discrete if is_discrete else _continuous)(net_key, data, network, base, init)
    if optimizer is None:
        optimizer = _adam(num_updates)
    check_optimizer("optimizer", optimizer)
    batch_size = min(256, len(data)) if batch_size is None else check_count("batch_size", batch_size)
    num_chains = batch_size if num_chains is None else check_count("num_chains", num_chains)

    run = short_run_kernel(num_steps, init, kernel=kernel)
    chains = draw_short_run(init_key, potential, num_chains, times=(0,), kernel=run)[0]
    if start == "noise":
        potential, objective = (
            ShortRun(potential, run),
            functools.partial(persistent_contrastive_divergence, num_steps=1),
        )
    else:
        kind = contrastive_divergence if start == "data" else persistent_contrastive_divergence
        objective = functools.partial(kind, num_steps=num_steps)
    sampler = init_sampler(chains, run if start == "noise" else kernel)
    state, history = fit(
        fit_key,
        init_train(potential, optimizer, sampler),
        data,
        objective,
        optimizer,
        num_steps=num_updates,
        batch_size=batch_size,
        evaluate=evaluate,
        report_every=report_every,
        progress_bar=progress_bar,
    )
    if not is_discrete and (escape := find_escape(probe_key, state.potential, data)) is not None:
        found = not_a_density(num_steps) if start == "noise" else "this is no density"
        warnings.warn(
            f"the trained energy falls without end, to {escape.energies[-1]:.3g} at the farthest point looked at: "
            f"{found}. Draws of a short run need none; a prior does: give the energy a base.",
            RuntimeWarning,
            stacklevel=2,
        )
    return state, history


@functools.cache
def _adam(num_updates: int) -> optax.GradientTransformation:
    """One object per length, so that runs of that length share their compilation."""
    schedule = optax.cosine_decay_schedule(1e-3, num_updates, 0.02)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule, b1=0.5))


def _continuous(key: Key, data: Any, network: Any, base: Any, init: Any) -> tuple[Potential, Array, Any]:
    """The energy with its base, rows, and where runs start."""
    rows = check_rows("data", data)
    if base is None:
        base = normal_base(rows)
    else:
        check_base(base, rows[0])
    if init is None:
        if isinstance(base, dist.ImproperUniform):
            raise ValueError(
                "init: got None with an improper base, which cannot be sampled, expected where runs start."
            )
        init = base
    network = MLP(rows.shape[1:], key=key, width=64, depth=2) if network is None else network
    check_potential(network, rows[0], name="network")
    return tilt(network, base), rows, init


def _discrete(key: Key, data: Any, network: Any, base: Any, init: Any) -> tuple[Potential, Array, Any]:
    """The energy as it is, rows in its coding, and where runs start."""
    if network is None or base is not None:
        raise ValueError(
            "network, base: a discrete kernel needs a network with its values, such as potentials.RBM, and takes no "
            f"base; got {type(network).__name__} and {type(base).__name__}."
        )
    rows = as_array("data", data)
    values = check_chains("short_run", None, network, rows, name="data", what="row")
    check_potential(network, rows[0], name="network")
    return network, rows, _UniformSites(values, rows.shape[1:], str(rows.dtype)) if init is None else init


@dataclass(frozen=True)
class _UniformSites:
    """Independent sites, every value as likely as any other."""

    values: tuple[int | float, ...]
    shape: tuple[int, ...]
    dtype: str

    def __call__(self, key: Key, num_chains: int) -> Array:
        return jax.random.choice(key, jnp.asarray(self.values, self.dtype), (num_chains, *self.shape))

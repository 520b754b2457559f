"""Learning a latent energy-based prior together with its generator, by two sets of chains."""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from numpyro import handlers
from numpyro.distributions import biject_to, constraints
from numpyro.infer.util import compute_log_probs, potential_energy, transform_fn
from tqdm.auto import tqdm

from ebm_ppl.adaptation import check_target_acceptance, check_tunable_step, follow_target_acceptance
from ebm_ppl.checks import check_count
from ebm_ppl.errors import TrainingFailure, UnknownNormalizerError
from ebm_ppl.handlers import negative_phase
from ebm_ppl.handlers.unnormalized import unnormalized
from ebm_ppl.infer.latent_rows import LatentRows, find_latents, unscaled
from ebm_ppl.provenance import ebm_dependencies
from ebm_ppl.roles import Role, role_of
from ebm_ppl.sampling import advance, chains_at, init_sampler
from ebm_ppl.types import Array, Kernel, Key, PyTree


class LatentPriorState(NamedTuple):
    """Everything that goes on from one update to the next; one pytree.

    Attributes:
        params: Values of the ``numpyro.param`` sites, constrained.
        optimizer_state: Of the optimizer, in unconstrained space.
        posterior: Latents of every row, unconstrained: ``{site: (chain, *rows, ...)}``.
        posterior_kernel: The kernel that moves them, with its tunables.
        prior: The chains of the EBM priors, ``{"<site>$chains": ...}``.
        step: Updates made.
        key: Base key of the run.
    """

    params: dict[str, Array]
    optimizer_state: PyTree
    posterior: dict[str, Array]
    posterior_kernel: Kernel
    prior: dict[str, Any]
    step: Array
    key: Key


class _Program(NamedTuple):
    """What stays the same during a run."""

    model: Callable[..., Any]
    args: tuple
    kwargs: dict[str, Any]
    phase: negative_phase
    optimizer: optax.GradientTransformation
    num_posterior_steps: int
    target_acceptance: float | None


def fit_latent_prior(
    key: Key,
    model: Callable[..., Any],
    *args: Any,
    optimizer: optax.GradientTransformation,
    posterior_kernel: Kernel,
    prior_kernel: Kernel,
    num_steps: int,
    num_posterior_steps: int = 10,
    num_prior_steps: int = 10,
    num_posterior_chains: int = 1,
    num_prior_chains: int = 128,
    target_acceptance: float | None = 0.6,
    state: LatentPriorState | None = None,
    report_every: int = 100,
    progress_bar: bool = True,
    **kwargs: Any,
) -> tuple[LatentPriorState, dict[str, np.ndarray]]:
    """Maximum likelihood for a model with latent EBM priors: chains for the posterior, and other chains for the prior.

    For ``p(z) = base(z) exp(-U_a(z)) / Z(a)`` and ``p_b(x | z)`` each update ascends
    ``E_{p(z|x)}[d log p~_a(z) + d log p_b(x|z)] - N E_{p_a}[d log p~_a(z)]``. The first expectation is over posterior
    chains, one set for EVERY row of the data: under a subsampling plate the rows of a minibatch are taken out by the
    plate's indices, moved, and put back. The second is over chains of the prior, which the rows share. Both persist. No
    gradient flows through a chain. The gradient is that of the likelihood when both have arrived; the original paper
    uses short chains from noise instead, and so ascends a perturbed likelihood.

    Args:
        key: Random key.
        model: A NumPyro model whose parameters are ``numpyro.param`` sites (``eqx_module`` and its like included), without
            a normaliser policy.
        *args: Its arguments.
        optimizer: An optax optimizer, for the parameters in unconstrained space and the loss per data set.
        posterior_kernel: Moves all latents of a minibatch together, in unconstrained space.
        prior_kernel: Moves the chains of the priors.
        num_steps: Updates.
        num_posterior_steps: Posterior kernel steps per update.
        num_prior_steps: Prior kernel steps per update.
        num_posterior_chains: Posterior chains per row.
        num_prior_chains: Chains per prior.
        target_acceptance: Both step sizes follow it; ``None`` keeps them.
        state: Go on from this state; the key is then ignored.
        report_every: Updates per compiled call, and between reports of non-finite numbers.
        progress_bar: Show one.
        **kwargs: Keyword arguments of the model.

    Returns:
        The state, and a history of arrays ``(num_steps,)``: ``grad_norm``, ``posterior_acceptance``, ``prior_acceptance``.

    Raises:
        UnknownNormalizerError: no EBM is a learned prior, or one depends on latent sites of its own.
        ValueError: a latent is discrete, or an argument is out of range.
        TrainingFailure: parameters or a gradient stopped being finite; ``state`` is that of the last report before it.

    Example:
        >>> import jax, jax.numpy as jnp, numpyro, numpyro.distributions as dist, optax, ebm_ppl as ebm
        >>> def model(x):
        ...     b = numpyro.param("b", 0.0)
        ...     with numpyro.plate("rows", len(x)):
        ...         z = numpyro.sample("z", ebm.EBM(lambda z: -b * z, dist.Normal(0.0, 1.0)))
        ...         numpyro.sample("x", dist.Normal(z, 0.5), obs=x)
        >>> mala = ebm.kernels.mala(step_size=0.1)
        >>> state, _ = fit_latent_prior(
        ...     jax.random.key(0), model, 0.8 + jnp.linspace(-2.0, 2.0, 40), optimizer=optax.adam(0.05), num_steps=300,
        ...     posterior_kernel=mala, prior_kernel=mala, progress_bar=False)
        >>> bool(abs(state.params["b"] - 0.8) < 0.15)  # the tilt moves the mean of z, and so of x, to b
        True

    References:
        Pang, Han, Nijkamp, Zhu, Wu (2020), Learning latent space energy-based prior model, arXiv:2006.08205, equations 9
        to 12.
    """
    check_count("num_steps", num_steps)
    check_count("report_every", report_every)
    num_posterior_chains = check_count("num_posterior_chains", num_posterior_chains)
    if target_acceptance is not None:
        check_target_acceptance("target_acceptance", target_acceptance)
    _require_learned_prior(model, args, kwargs)
    phase = negative_phase(
        model,
        kernel=prior_kernel,
        num_chains=num_prior_chains,
        num_steps=num_prior_steps,
        target_acceptance=target_acceptance,
    )
    program = _Program(
        model,
        args,
        kwargs,
        phase,
        optimizer,
        check_count("num_posterior_steps", num_posterior_steps),
        target_acceptance,
    )
    if state is None:
        with handlers.block():
            state = _start(key, program, posterior_kernel, num_posterior_chains)
    arrays, static = eqx.partition(state, eqx.is_array)

    @jax.jit
    def run(arrays: PyTree, steps: Array) -> tuple[PyTree, dict[str, Array]]:
        def update(arrays: PyTree, _: Array) -> tuple[PyTree, dict[str, Array]]:
            state, metrics = _update(program, eqx.combine(arrays, static))
            return eqx.filter(state, eqx.is_array), metrics

        return jax.lax.scan(update, arrays, steps)

    history: list[dict[str, np.ndarray]] = []
    # A caller's handlers have no business with the traces of the fit.
    with handlers.block(), tqdm(total=num_steps, disable=not progress_bar, unit="update") as bar:
        for first in range(0, num_steps, report_every):
            steps = jnp.arange(min(report_every, num_steps - first))
            before = arrays
            arrays, metrics = run(arrays, steps)
            history.append(jax.device_get(metrics))
            bad = ~np.isfinite(history[-1]["grad_norm"])
            if bad.any():
                step = int(eqx.combine(before, static).step) + int(np.argmax(bad))
                raise TrainingFailure(
                    f"update {step}: the parameters or their gradient are not finite. Lower the learning rate or the step "
                    "sizes, or give the prior a base that confines it, and go on from the `state` of this error.",
                    step=step,
                    state=eqx.combine(before, static),
                    rows=(),
                    chains=(),
                    history=_joined(history[:-1]),
                )
            bar.update(len(steps))
            bar.set_postfix_str(f"posterior acceptance {history[-1]['posterior_acceptance'].mean():.3f}")
    return eqx.combine(arrays, static), _joined(history)


def _joined(history: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {name: np.concatenate([part[name] for part in history]) for name in history[0]} if history else {}


def _require_learned_prior(model: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> None:
    roles = {name: role_of(found) for name, found in ebm_dependencies(model, args, kwargs).items()}
    if Role.LEARNED_PRIOR not in roles.values():
        described = ", ".join(f"'{name}': {role.value}" for name, role in roles.items()) or "none"
        raise UnknownNormalizerError(
            f"model: got EBM sites {described}, expected a latent one whose energy depends on numpyro.param. "
            "ebm_ppl.check_model(model) says what the others need."
        )


def _transforms(trace: dict[str, Any]) -> dict[str, Any]:
    return {
        name: biject_to(site["kwargs"].get("constraint", constraints.real))
        for name, site in trace.items()
        if site["type"] == "param"
    }


def _start(key: Key, program: _Program, posterior_kernel: Kernel, num_chains: int) -> LatentPriorState:
    trace_key, latent_key, key = jax.random.split(key, 3)
    rows = find_latents(program.model, program.args, program.kwargs, trace_key)
    seeded = handlers.seed(handlers.substitute(program.phase, rows.example), trace_key)
    trace = handlers.trace(seeded).get_trace(*program.args, **program.kwargs)
    # A network is one parameter of many arrays.
    params = {name: jax.tree.map(jnp.asarray, site["value"]) for name, site in trace.items() if site["type"] == "param"}
    prior = {name: site["value"] for name, site in trace.items() if site["type"] == "mutable"}
    prior = jax.tree.map(lambda x: jnp.asarray(x, jnp.result_type(x)), prior)
    unconstrained = transform_fn(_transforms(trace), params, invert=True)
    posterior = rows.init(latent_key, num_chains)
    sampler = init_sampler(rows.gather(posterior, rows.plates), posterior_kernel)
    if program.target_acceptance is not None:
        check_tunable_step(sampler)
    optimizer_state = program.optimizer.init(unconstrained)
    return LatentPriorState(params, optimizer_state, posterior, sampler.kernel, prior, jnp.zeros((), jnp.int32), key)


def _update(program: _Program, state: LatentPriorState) -> tuple[LatentPriorState, dict[str, Array]]:
    trace_key, posterior_key, prior_key = jax.random.split(jax.random.fold_in(state.key, state.step), 3)
    rows = find_latents(handlers.substitute(program.model, state.params), program.args, program.kwargs, trace_key)
    frozen = {**jax.lax.stop_gradient(state.params), **rows.plates}

    posterior = handlers.substitute(unscaled(unnormalized(program.model), rows.sizes), frozen)
    posterior = handlers.seed(posterior, trace_key)  # the same minibatch and the same noise, whatever the latents are

    def energy(latents: dict[str, Array]) -> Array:
        return jnp.asarray(potential_energy(posterior, program.args, program.kwargs, latents))

    chosen = rows.gather(state.posterior, rows.plates)
    sampler = chains_at(chosen, state.posterior_kernel)
    sampler, info = advance(posterior_key, energy, sampler, program.num_posterior_steps)
    acceptance_rate = info.acceptance_rate.mean()
    if program.target_acceptance is not None:
        sampler = follow_target_acceptance(sampler, acceptance_rate, program.target_acceptance)

    transforms = _param_transforms(program, state.params, rows, trace_key)

    def loss(unconstrained: dict[str, Array], prior: dict[str, Any]) -> tuple[Array, dict[str, Any]]:
        params = transform_fn(transforms, unconstrained)

        def chain_loss(latents: dict[str, Array]) -> tuple[Array, dict[str, Any]]:
            values = {**params, **rows.plates, **rows.constrain(latents), **prior}
            seeded = handlers.seed(program.phase, prior_key)
            log_probs, trace = compute_log_probs(seeded, program.args, program.kwargs, values)
            moved = {name: site["value"] for name, site in trace.items() if site["type"] == "mutable"}
            total = jnp.sum(jnp.stack(jax.tree.leaves(log_probs)))
            # The value of log Z is unknown and NaN; all that is used is the gradient.
            return -total, moved

        losses, moved = jax.vmap(chain_loss)(jax.lax.stop_gradient(sampler.position))
        # Every posterior chain saw the same move of the prior chains.
        return losses.mean(), jax.tree.map(lambda x: x[0], moved)

    unconstrained = transform_fn(transforms, state.params, invert=True)
    gradient, prior = jax.grad(loss, has_aux=True)(unconstrained, state.prior)
    updates, optimizer_state = program.optimizer.update(gradient, state.optimizer_state, unconstrained)
    params = transform_fn(transforms, optax.apply_updates(unconstrained, updates))
    state = state._replace(
        params=params,
        optimizer_state=optimizer_state,
        posterior=rows.scatter(state.posterior, sampler.position, rows.plates),
        posterior_kernel=sampler.kernel,
        prior=prior,
        step=state.step + 1,
    )
    prior_acceptance = jnp.stack([bank["acceptance_rate"] for bank in prior.values()]).mean()
    metrics = {
        # Infinite updates spoil the parameters although the gradient was finite: they count as a failure at once.
        "grad_norm": optax.tree.norm(gradient) + 0.0 * optax.tree.norm(updates),
        "posterior_acceptance": acceptance_rate,
        "prior_acceptance": prior_acceptance,
    }
    return state, metrics


def _param_transforms(program: _Program, params: dict[str, Array], rows: LatentRows, key: Key) -> dict[str, Any]:
    model = handlers.substitute(unnormalized(program.model), {**params, **rows.plates, **rows.example})
    return _transforms(handlers.trace(handlers.seed(model, key)).get_trace(*program.args, **program.kwargs))

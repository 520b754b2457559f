"""The exchange algorithm: exact random-walk Metropolis over parameters whose normaliser nobody can compute."""

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from numpyro.infer.gibbs import GIBBS_SITES_KWARG, conditioned, with_conditioning
from numpyro.infer.initialization import init_to_uniform
from numpyro.infer.mcmc import MCMCKernel
from numpyro.infer.util import initialize_model
from numpyro.util import identity, is_prng_key

from ebm_ppl.checks import check_count, check_markov_kernel, check_positive
from ebm_ppl.handlers import constant_normalizer
from ebm_ppl.handlers.unnormalized import unnormalized
from ebm_ppl.infer.auxiliary import Auxiliary
from ebm_ppl.infer.exchange_move import ExchangeMove
from ebm_ppl.infer.exchange_sites import conditioning_values
from ebm_ppl.infer.random_walk import RandomWalk, WalkTuning
from ebm_ppl.types import Array, Kernel, Key


class ExchangeState(NamedTuple):
    """State of an :class:`Exchange` chain. There is no potential energy: it contains log Z.

    Attributes:
        i: Number of steps so far, warm-up included.
        z: Unconstrained values of the block, by site.
        accept_prob: Acceptance probability of the last proposal.
        mean_accept_prob: Its mean, over warm-up while that lasts and over sampling afterwards.
        num_accepted: Accepted proposals, counted likewise.
        num_invalid: Proposals rejected because their ratio was NaN, counted likewise; above zero an energy is NaN.
        inner_accept_prob: Mean acceptance of the inner kernel at the last proposal; NaN where no kernel ran.
        walk: The proposal: ``walk.step_size`` and ``walk.covariance``.
        rng_key: Random key of the next step.
    """

    i: Array
    z: dict[str, Array]
    accept_prob: Array
    mean_accept_prob: Array
    num_accepted: Array
    num_invalid: Array
    inner_accept_prob: Array
    walk: RandomWalk
    rng_key: Key


class Exchange(MCMCKernel):
    """Exchange algorithm for doubly intractable posteriors ``p(theta) prod_i exp(u(theta, x_i)) / Z(theta)^N``.

    A proposal ``theta'`` of a random walk comes with an auxiliary data set ``y`` drawn from ``p(y | theta')``, one row
    for every row of the data, and is accepted with probability ``min(1, r)``,

        ``r = f(theta', x) / f(theta, x) * prod_i exp(u(theta, y_i) - u(theta', y_i))``,

    where ``f`` is the joint density with every Z left out. The Z cancel, so with exact auxiliary draws the chain has
    exactly the posterior as its stationary law.

    The kernel moves the latent sites that reach the energy of an EBM site (found by
    :func:`ebm_ppl.provenance.ebm_dependencies`) in unconstrained space, Jacobians included. Warm-up adapts the proposal's
    scale to ``target_accept_prob`` and its covariance to the posterior's; both are frozen after it.

    Auxiliary draws come from one of two sources:

    - ``inner_steps=None``: the sampler attached to the EBM, ``EBM(..., sampler=function)``. It must be exact. The chains
      that ``handlers.simulate`` attaches are not, and are refused: they start at the base, and where ``theta'`` is so
      extreme that they do not move, the ratio rewards it (measured: a log precision of 67 for 1.19).
    - ``inner_steps=m``: for every data row a chain of ``m`` steps of ``inner_kernel`` under ``theta'``, started AT THAT
      ROW (double Metropolis-Hastings). The row is already close to a draw of every plausible ``theta'``, so short chains
      do; the bias vanishes as ``m`` grows. Too few steps let the posterior fall back towards the prior, with a healthy
      acceptance rate: check with :func:`inner_doubling_test`. The kernel must have an accept step and be reversible, as
      MALA, HMC and NUTS are.

    With many rows the auxiliary data disagree with the data by chance, and acceptance falls. ``num_bridges=K`` carries the
    auxiliary data from ``theta'`` to ``theta`` in ``K`` steps of ``inner_kernel`` along a geometric path, which removes
    most of that noise and, after an exact draw, leaves the stationary law exact.

    A plug-in estimate of Z inside a Metropolis ratio is not offered: ``1 / Z_hat`` is biased by Jensen's inequality even
    where ``Z_hat`` is not, and to the power N the bias is large; no general unbiased and non-negative estimate exists.

    Use it alone in ``MCMC``, or as a block: latent sites that do not reach an energy are NUTS's business,

        ``m = constant_normalizer(model, given=["theta"])``
        ``Gibbs([(Exchange(m), ["theta"]), (NUTS(m), None)])``

    since all blocks share one model and log Z is constant while ``theta`` is held fixed. (``Exchange`` looks through the
    handler.) For ``HMCGibbs`` see :meth:`gibbs_fn`.

    Args:
        model: A NumPyro model.
        inner_kernel: Kernel from :mod:`ebm_ppl.kernels` for inner chains and bridges, in the unconstrained coordinates of
            one row.
        inner_steps: Steps ``m`` of every inner chain; ``None`` for exact draws.
        num_bridges: Bridges ``K``; one step of ``inner_kernel`` for each.
        sites: The latent sites to move, where these should be more than reach an energy.
        step_size: Initial standard deviation of the random walk per coordinate, ``2.38 / sqrt(d)`` by default.
        target_accept_prob: What warm-up tunes the mean acceptance probability to.
        adapt_step_size: Whether warm-up tunes the step size.
        adapt_covariance: Whether warm-up tunes the covariance.
        dense: Whether the covariance is dense, or diagonal.
        init_strategy: NumPyro initialisation strategy.

    Raises:
        TypeError: the model is not callable, or a count is not a whole number.
        ValueError: arguments contradict each other; when the chain starts: the block does not fit the model (discrete
            sites, latent sites that nothing would move), or the data are empty, not finite or outside their support.
        UnknownNormalizerError: (when the chain starts) no EBM depends on a latent site; or an EBM is scaled
            (subsampling), inside a mixture or a scan, or masked by latent values.
        NotImplementedError: (when the chain starts) an EBM has no sampler and there is no inner kernel.

    Example:
        >>> import jax, jax.numpy as jnp, numpyro, numpyro.distributions as dist, ebm_ppl as ebm
        >>> def model(x):
        ...     precision = numpyro.sample("precision", dist.Gamma(2.0, 1.0))
        ...     draw = lambda key, potential, n: jax.random.normal(key, (n,)) / jnp.sqrt(precision)
        ...     flat = dist.ImproperUniform(dist.constraints.real, (), ())
        ...     with numpyro.plate("rows", len(x)):
        ...         numpyro.sample("x", ebm.EBM(lambda x: 0.5 * precision * x**2, flat, sampler=draw), obs=x)
        >>> mcmc = numpyro.infer.MCMC(Exchange(model), num_warmup=200, num_samples=500, progress_bar=False)
        >>> mcmc.run(jax.random.key(0), jnp.array([0.3, -1.2, 0.8]))
        >>> mcmc.get_samples()["precision"].shape
        (500,)

    References:
        Murray, Ghahramani, MacKay (2006), MCMC for doubly-intractable distributions, arXiv:1206.6848, algorithm 2 and,
        for bridges, section 4. Liang (2010), A double Metropolis-Hastings sampler for spatial models with intractable
        normalizing constants, Journal of Statistical Computation and Simulation 80. Jacob, Thiery (2015), On nonnegative
        unbiased estimators, arXiv:1309.6473.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        *,
        inner_kernel: Kernel | None = None,
        inner_steps: int | None = None,
        num_bridges: int = 0,
        sites: Sequence[str] | None = None,
        step_size: float | None = None,
        target_accept_prob: float = 0.3,
        adapt_step_size: bool = True,
        adapt_covariance: bool = True,
        dense: bool = True,
        init_strategy: Callable[..., Any] = init_to_uniform,
    ):
        if not callable(model):
            raise TypeError(f"model: got {type(model).__name__}, expected a NumPyro model.")
        if inner_steps is not None:
            check_count("inner_steps", inner_steps)
        check_count("num_bridges", num_bridges, 0)
        if inner_kernel is None and (inner_steps is not None or num_bridges):
            raise ValueError(
                f"inner_kernel: got None with inner_steps={inner_steps} and num_bridges={num_bridges}, expected a kernel "
                "such as ebm_ppl.kernels.mala(step_size=0.1) to move auxiliary data with."
            )
        if inner_kernel is not None:
            check_markov_kernel("inner_kernel", inner_kernel)
        if inner_kernel is not None and inner_steps is None and not num_bridges:
            raise ValueError(
                "inner_steps: got None with an inner_kernel, expected the number of steps of the inner chains. Without an "
                "inner_kernel auxiliary data come from the EBM's own exact sampler."
            )
        if isinstance(sites, str) or (sites is not None and not len(sites)):
            raise ValueError(f"sites: got {sites!r}, expected a sequence of site names.")
        if not 0.0 < target_accept_prob < 1.0:
            raise ValueError(f"target_accept_prob: got {target_accept_prob}, expected a number between 0 and 1.")
        self._model = model
        # The policy of a shared model is for the other blocks: this one accounts for log Z itself.
        self._bare_model: Any = model.fn if isinstance(model, constant_normalizer) else model
        self._auxiliary = Auxiliary(inner_kernel, inner_steps, num_bridges)
        self._sites_asked = None if sites is None else tuple(sites)
        self._step_size = None if step_size is None else check_positive("step_size", step_size)
        self._tuning = WalkTuning(0, target_accept_prob, self._step_size, adapt_step_size, adapt_covariance, dense)
        self._init_strategy = init_strategy
        self._move: Any = None
        self._postprocess_fn: Any = None

    @property
    def model(self) -> Callable[..., Any]:
        """The model as it was given."""
        return self._model

    @property
    def sample_field(self) -> str:
        """The field of the state that holds the samples."""
        return "z"

    @property
    def default_fields(self) -> tuple[str, ...]:
        """What ``MCMC`` collects unasked."""
        return ("z", "accept_prob")

    def get_diagnostics_str(self, state: ExchangeState) -> str:
        """For the progress bar."""
        return (
            f"step size {float(state.walk.step_size):.2e}. acc. prob={float(state.mean_accept_prob):.2f}, "
            f"{int(state.num_accepted)} accepted"
        )

    def init(
        self, rng_key: Key, num_warmup: int, init_params: Any, model_args: tuple, model_kwargs: dict[str, Any] | None
    ) -> ExchangeState:
        """The first state, or as many states as there are keys.

        ``init_params`` are unconstrained values of the block, constrained ones inside a composite kernel.
        """
        model_kwargs = {} if model_kwargs is None else model_kwargs
        is_single = is_prng_key(rng_key)
        split = jax.random.split if is_single else jax.vmap(jax.random.split, out_axes=1)
        rng_key, params_key = split(rng_key)
        setup_key = params_key if is_single else params_key[0]
        found = ExchangeMove.find(
            setup_key, self._bare_model, model_args, model_kwargs, self._sites_asked, self._auxiliary
        )
        (params, *_), _, self._postprocess_fn, model_trace = initialize_model(
            params_key,
            unnormalized(self._bare_model),
            init_strategy=self._init_strategy,
            dynamic_args=True,
            model_args=model_args,
            model_kwargs=model_kwargs,
            validate_grad=False,
        )
        self._move = found.with_params(model_trace)
        if init_params is not None:
            if set(init_params) != set(found.sites.block):
                raise ValueError(
                    f"init_params: got sites {sorted(init_params)}, expected those of the block: "
                    f"{sorted(found.sites.block)}."
                )
            is_composed = GIBBS_SITES_KWARG in model_kwargs
            params = found.unconstrain(init_params) if is_composed else init_params
        self._tuning = self._tuning._replace(num_warmup=num_warmup)

        def init_chain(key: Key, z: dict[str, Array]) -> ExchangeState:
            walk = self._tuning.init(ravel_pytree(z)[0])
            zero, none = jnp.zeros((), jnp.result_type(int)), jnp.zeros(())
            return ExchangeState(zero, z, none, none, zero, zero, jnp.array(jnp.nan), walk, key)

        return init_chain(rng_key, params) if is_single else jax.vmap(init_chain)(rng_key, params)

    def sample(self, state: ExchangeState, model_args: tuple, model_kwargs: dict[str, Any] | None) -> ExchangeState:
        """One proposal, accepted or not; for a batch of states one for each."""
        if self._move is None:
            raise RuntimeError("Exchange: init must be called before sample.")
        step = partial(self._step, model_args=model_args, model_kwargs=model_kwargs or {})
        return step(state) if is_prng_key(state.rng_key) else jax.vmap(step)(state)

    def _step(self, state: ExchangeState, model_args: tuple, model_kwargs: dict[str, Any]) -> ExchangeState:
        rng_key, key = jax.random.split(state.rng_key)
        moved = self._move.propose(key, state.z, state.walk, model_args, model_kwargs)
        num_warmup = self._tuning.num_warmup
        is_warmup = state.i < num_warmup
        walk = jax.lax.cond(
            is_warmup,
            lambda: self._tuning.update(state.walk, state.i, ravel_pytree(moved.z)[0], moved.accept_prob),
            lambda: state.walk,
        )
        # Counts and means start again when sampling does.
        is_first = (state.i == 0) | (state.i == num_warmup)
        i = state.i + 1
        n = jnp.where(is_warmup, i, i - num_warmup)
        mean, accepted, invalid = (
            jnp.where(is_first, 0, x) for x in (state.mean_accept_prob, state.num_accepted, state.num_invalid)
        )
        return ExchangeState(
            i=i,
            z=moved.z,
            accept_prob=moved.accept_prob,
            mean_accept_prob=mean + (moved.accept_prob - mean) / n,
            num_accepted=accepted + moved.is_accepted,
            num_invalid=invalid + moved.is_invalid,
            inner_accept_prob=moved.inner_accept_prob,
            walk=walk,
            rng_key=rng_key,
        )

    def postprocess_fn(self, model_args: tuple, model_kwargs: dict[str, Any] | None) -> Callable[[Any], Any]:
        """Constrained values of the block, and the model's deterministic sites."""
        if self._postprocess_fn is None:
            return identity
        return self._postprocess_fn(*model_args, **(model_kwargs or {}))

    def get_constrain_fn(self, model_args: tuple, model_kwargs: dict[str, Any] | None) -> Callable[[Any], Any]:
        """Constrained values of the block; composite kernels condition their other blocks on them."""
        return partial(self._move.constrain, model_args=model_args, model_kwargs=model_kwargs or {})

    def refresh(self, state: ExchangeState, model_args: tuple, model_kwargs: dict[str, Any] | None) -> ExchangeState:
        """The state itself: it caches nothing that depends on what the block is conditioned on."""
        return state

    def wrap_model(self, wrapper: Callable[[Any], Any]) -> "Exchange":
        """A copy on the wrapped model, to be initialised anew."""
        kernel = copy.copy(self)
        kernel._model, kernel._bare_model = wrapper(self._model), wrapper(self._bare_model)
        kernel._move, kernel._postprocess_fn = None, None
        return kernel

    def gibbs_fn(self, *model_args: Any, **model_kwargs: Any) -> Callable[..., dict[str, Array]]:
        """One exchange move as the ``gibbs_fn`` of NumPyro's ``HMCGibbs`` or ``CustomGibbs``.

        ``HMCGibbs(NUTS(m), exchange.gibbs_fn(x), ["theta"])`` with ``m = constant_normalizer(model, given=["theta"])``.
        Nothing adapts there, so the kernel needs a ``step_size``; as a block of ``Gibbs`` it adapts by itself.

        Args:
            *model_args: Arguments of the model: a ``gibbs_fn`` does not receive them.
            **model_kwargs: Keyword arguments of the model.

        Returns:
            ``gibbs_fn(rng_key, gibbs_sites, hmc_sites)``.

        Raises:
            ValueError: the kernel has no ``step_size``.
        """
        if self._step_size is None:
            raise ValueError(
                "step_size: got None, expected a number: gibbs_fn has no warm-up to adapt it in. Pass Exchange(model, "
                "step_size=...), or use Exchange as a block of numpyro.infer.gibbs.Gibbs."
            )
        model = conditioned(self._bare_model)
        values = conditioning_values(self._bare_model, model_args, model_kwargs, self._sites_asked)
        kwargs = with_conditioning(model_kwargs, values)
        move = ExchangeMove.find(jax.random.key(0), model, model_args, kwargs, self._sites_asked, self._auxiliary)

        def gibbs_fn(rng_key: Key, gibbs_sites: dict[str, Array], hmc_sites: dict[str, Array]) -> dict[str, Array]:
            kwargs = with_conditioning(model_kwargs, hmc_sites)
            z = move.unconstrain(gibbs_sites)
            walk = self._tuning.init(ravel_pytree(z)[0])
            return move.constrain(move.propose(rng_key, z, walk, model_args, kwargs).z, model_args, kwargs)

        return gibbs_fn

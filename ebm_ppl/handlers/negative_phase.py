"""``negative_phase``: the gradient of log Z from chains, inside NumPyro's own SVI."""

import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpyro
import optax
from numpyro.primitives import mutable

from ebm_ppl.adaptation import check_target_acceptance, check_tunable_step, follow_target_acceptance
from ebm_ppl.chains import advance_chains, base_draws, chain_values, chain_weights, init_chains
from ebm_ppl.checks import check_count, check_markov_kernel
from ebm_ppl.distributions import EBM, find_ebms
from ebm_ppl.errors import UnknownNormalizerError
from ebm_ppl.handlers.callers import (
    is_autoguide_setup,
    require_carried_state,
    require_no_stable_update,
    require_random_keys,
)
from ebm_ppl.handlers.gradient import gradient_surrogate
from ebm_ppl.handlers.left_out import leave_out
from ebm_ppl.handlers.policy import Policy
from ebm_ppl.handlers.rows import Rows, find_rows, fingerprint
from ebm_ppl.handlers.sampler_player import observed_rows, sampler_player, site_potential
from ebm_ppl.handlers.tracking import TrackedNormalizer, init_tracking, track
from ebm_ppl.provenance import SiteDependencies
from ebm_ppl.types import Kernel, Objective

CHAINS = "$chains"
"""What the name of an EBM site is followed by in ``SVIState.mutable_state``."""


class negative_phase(Policy):
    """Train the energies of a NumPyro model with unmodified ``SVI``: chains supply the gradient of log Z.

    Maximum likelihood needs ``d log Z = E_p[d log p~]``. Before each evaluation the chains of every EBM site move
    ``num_steps`` kernel steps under the energy as it is now, and log Z is replaced by a number with that gradient
    (:func:`gradient_surrogate`). The chains persist in NumPyro's mutable state: ``SVI`` carries them from update to update
    in ``state.mutable_state["<site>$chains"]``, a dictionary with the ``sampler`` (positions in unconstrained space), the
    last ``acceptance_rate`` and the number of divergent steps so far, ``num_divergent``. With a ``sampler_objective`` the
    sampler learns too, as in :func:`ebm_ppl.fit`: after each phase its kernel, such as the flow of
    :func:`ebm_ppl.kernels.flow_assisted`, makes one step, and the state carries that optimizer's state, the last
    ``sampler_loss`` and the last phase's means of the kernel's own ``statistics``.

    The gradient is that of maximum likelihood when the chains have arrived; with a large learning rate and few steps they
    lag behind. The value of log Z is not known, and so the loss is NaN, unless it is tracked: an algorithm that needs it
    then fails visibly instead of being wrong.

    A site with rows (a ``condition``) has chains for every row. Under a subsampling plate they are found by the plate's
    indices; rows that come back with other data than their chains were made for raise an error.

    Args:
        fn: A whole NumPyro model.
        kernel: From :mod:`ebm_ppl.kernels`, such as ``ebm.kernels.mala(step_size=0.1)``. It acts in unconstrained space.
        num_chains: Chains per EBM site, and per row where it has rows.
        num_steps: Kernel steps per evaluation (k).
        persistent: Chains go on from where they were. ``False`` starts them afresh at every evaluation and carries nothing:
            the only right way where the energy depends on latent sites that a guide draws anew each time, and then with
            enough steps to arrive.
        loss_value: ``"nan"``, or ``"tracked"``: as many chains again, which no gradient sees, carry importance weights
            (Jarzynski's) and give log Z with an error, so that the loss is a number that means something. Learning is the
            same. It needs a base that can be sampled and a kernel with an accept step (without one the loss stays NaN).
        target_acceptance: Adapt the step size towards this acceptance rate between updates; ``None`` keeps it.
        sampler_objective: The sampler's own, such as :func:`ebm_ppl.objectives.chain_likelihood`: differentiated in the
            floating arrays of the kernel, at the energy that the chains have just moved under. Its batch is the observed
            rows in unconstrained space, ``None`` for a site that is not observed.
        sampler_optimizer: An optax transformation for it; :func:`ebm_ppl.flows.proposal_only` keeps it from step sizes.

    Returns:
        The model with the policy ``"gradient"`` (``"estimate"`` when tracked) at every EBM site that learns, and
        ``"constant"`` at those where nothing that moves reaches log Z.

    Raises:
        UnknownNormalizerError: (when the model runs) a latent site reaches the energy and the chains persist; the value of
            log Z counts, as in a mixture; the evaluation carries no chains (``SVI.evaluate``, several particles) or has no
            random key (MCMC).
        TypeError: chains cannot move on the support.
        ValueError: an argument is out of range, or the kernel has nothing that the ``sampler_objective`` trains.
        jax.errors.JaxRuntimeError: (while running) rows were reordered under their chains, or the sampler became
            non-finite in learning.

    Example:
        >>> import jax, jax.numpy as jnp, numpyro, numpyro.distributions as dist, ebm_ppl as ebm
        >>> def model(data):
        ...     weight = numpyro.param("weight", 0.0)
        ...     with numpyro.plate("rows", len(data)):
        ...         numpyro.sample("x", ebm.EBM(lambda x: -weight * x, dist.Normal(0.0, 1.0)), obs=data)
        >>> trained = negative_phase(model, kernel=ebm.kernels.mala(step_size=0.5), num_chains=256)
        >>> svi = numpyro.infer.SVI(trained, lambda data: None, numpyro.optim.Adam(0.05), numpyro.infer.Trace_ELBO())
        >>> result = svi.run(jax.random.key(0), 300, 0.7 + jnp.linspace(-1.0, 1.0, 50), progress_bar=False)
        >>> bool(abs(result.params["weight"] - 0.7) < 0.1)  # a tilt by w moves the mean of N(0, 1) to w
        True

    References:
        Tieleman (2008), Training restricted Boltzmann machines using approximations to the likelihood gradient. Carbone,
        Hua, Coste, Vanden-Eijnden (2023), Efficient training of energy-based models using Jarzynski equality,
        arXiv:2305.19414, for the weights of ``"tracked"``.
    """

    trains_by_gradient = True

    def __init__(
        self,
        fn: Callable[..., Any] | None = None,
        *,
        kernel: Kernel,
        num_chains: int = 128,
        num_steps: int = 10,
        persistent: bool = True,
        loss_value: str = "nan",
        target_acceptance: float | None = None,
        sampler_objective: Objective | None = None,
        sampler_optimizer: optax.GradientTransformation | None = None,
    ):
        super().__init__(fn)
        if not callable(kernel):
            raise TypeError(
                f"kernel: got {type(kernel).__name__}, expected one such as ebm.kernels.mala(step_size=0.1)."
            )
        if loss_value not in ("nan", "tracked"):
            raise ValueError(f"loss_value: got {loss_value!r}, expected 'nan' or 'tracked'.")
        if loss_value == "tracked" and not persistent:
            raise ValueError(
                "loss_value: got 'tracked' with persistent=False, expected 'nan': weights belong to chains that persist. "
                "ebm_ppl.handlers.estimated_normalizer gives a value without them."
            )
        if loss_value == "tracked":
            # Its weights belong to where each chain has been.
            check_markov_kernel("kernel", kernel)
        if target_acceptance is not None:
            check_target_acceptance("target_acceptance", target_acceptance)
            if not persistent:
                raise ValueError(
                    "target_acceptance: got one with persistent=False, expected None: no step size is kept."
                )
        self._player = sampler_player(kernel, sampler_objective, sampler_optimizer, persistent=persistent)
        self._kernel = kernel
        self._num_chains = check_count("num_chains", num_chains)
        self._num_steps = check_count("num_steps", num_steps)
        self._persistent = persistent
        self._is_tracked = loss_value == "tracked"
        self._target_acceptance = target_acceptance
        self._plates: dict[str, tuple[int, Any]] = {}

    def require(self, name: str, found: SiteDependencies) -> None:
        """The gradient of log Z alone must do, from the chains there are."""
        if found.weight:
            sites = ", ".join(sorted(found.weight))
            raise UnknownNormalizerError(
                f"site '{name}': how often its log Z counts depends on {{{sites}}}, as in a mixture or under a mask or "
                "scale with latent values, so its value is needed, not only its gradient. Use exact_normalizer or "
                "estimated_normalizer, or give the EBM a log_normalizer."
            )
        if found.latents and self._persistent:
            sites = ", ".join(sorted(found.latents))
            raise UnknownNormalizerError(
                f"site '{name}': its potential depends on latent site(s) {{{sites}}}, which a guide draws anew at every "
                "evaluation, so persistent chains would belong to other values. Use negative_phase(..., persistent=False) "
                f"with enough steps, exact_normalizer, or ebm_ppl.infer.Exchange for MCMC over {{{sites}}}."
            )

    def account(self, ebm: EBM, msg: dict[str, Any], found: SiteDependencies) -> EBM:
        """Run the negative phase of one site and put its gradient in the place of log Z."""
        if not (found.latents or found.params):
            if msg["is_observed"]:
                warnings.warn(
                    f"site '{msg['name']}': no parameter and no latent site reaches its potential, so this site cannot "
                    "learn anything.",
                    stacklevel=2,
                )
            return leave_out(ebm)
        if numpyro.get_mask() is False:
            return ebm.with_normalizer(jnp.nan, "gradient")  # nobody asks for densities, as in Predictive
        if is_autoguide_setup():
            return ebm.with_normalizer(0.0, "gradient")
        if len(find_ebms(msg["fn"])) > 1:
            raise UnknownNormalizerError(f"site '{msg['name']}': got several EBMs in one site, expected one.")
        require_random_keys("negative_phase", msg["name"])
        key = numpyro.prng_key()
        frozen = jax.tree.map(jax.lax.stop_gradient, ebm)
        return (
            self._with_persistent(key, ebm, frozen, msg, found)
            if self._persistent
            else self._with_fresh(key, ebm, frozen)
        )

    def _with_fresh(self, key: Any, ebm: EBM, frozen: EBM) -> EBM:
        init_key, run_key = jax.random.split(key)
        sampler = init_chains(init_key, frozen, self._num_chains, self._kernel)
        sampler, _ = advance_chains(run_key, frozen, sampler, self._num_steps)
        negatives, log_weight = chain_values(frozen, sampler), chain_weights(frozen, sampler)
        return ebm.with_normalizer(gradient_surrogate(ebm, negatives, log_weight), "gradient")

    def _with_persistent(self, key: Any, ebm: EBM, frozen: EBM, msg: dict[str, Any], found: SiteDependencies) -> EBM:
        require_carried_state(msg["name"])
        if not self._is_tracked:
            require_no_stable_update(msg["name"])
        rows = find_rows(ebm, msg, self._plates)
        if self._player is not None and rows.shape:
            raise UnknownNormalizerError(
                f"site '{msg['name']}': has a law and chains for every row, and one proposal cannot follow them all. Leave "
                "sampler_objective out, with a kernel that needs no fitting."
            )
        init_key, move_key, track_key, player_key = jax.random.split(key, 4)
        initial: Any = self._new_bank(init_key, frozen, rows)
        bank: Any = mutable(msg["name"] + CHAINS, initial)
        bank["identity"] = rows.check_same(bank["identity"], fingerprint(ebm, msg, found), msg["name"])
        sampler, info = advance_chains(move_key, frozen, rows.gather(bank["sampler"]), self._num_steps)
        negatives, log_weight = chain_values(frozen, sampler), chain_weights(frozen, sampler)
        acceptance_rate = info.acceptance_rate.mean()
        if self._target_acceptance is not None:
            sampler = follow_target_acceptance(sampler, acceptance_rate, self._target_acceptance)
        if self._player is not None:
            bank["statistics"] = {name: values.mean() for name, values in info.statistics.items()}
            sampler, bank["sampler_optimizer_state"], bank["sampler_loss"] = self._player.move(
                player_key,
                site_potential(frozen),
                sampler,
                observed_rows(frozen, msg),
                bank["sampler_optimizer_state"],
                msg["name"],
            )
        bank["sampler"] = rows.scatter(bank["sampler"], sampler)
        bank["acceptance_rate"] = acceptance_rate
        bank["num_divergent"] = bank["num_divergent"] + info.is_divergent.sum()
        if not self._is_tracked:
            return ebm.with_normalizer(gradient_surrogate(ebm, negatives, log_weight), "gradient")
        # The step size in use now is that of the chains of the gradient.
        tracking = rows.gather(bank["tracking"])
        tracking = tracking._replace(sampler=tracking.sampler._replace(kernel=bank["sampler"].kernel))
        tracked, tracking = track(track_key, frozen, tracking, self._num_steps)
        bank["tracking"] = rows.scatter(bank["tracking"], tracking)
        value, error = (number.reshape(ebm.batch_shape) for number in tracked)
        tracked = TrackedNormalizer(gradient_surrogate(ebm, negatives, log_weight, value=value), error)
        return ebm.with_normalizer(tracked, "estimate")

    def _new_bank(self, key: Any, frozen: EBM, rows: Rows) -> dict[str, Any]:
        """Chains for the whole data set, as they are before the first evaluation."""
        if self._is_tracked and base_draws(key, frozen, (1,), rows.shape) is None:
            raise ValueError(
                f"loss_value: got 'tracked' with the base {type(frozen.base).__name__}, which cannot be sampled (for all "
                "rows), expected a normalised base that can: it is where the running log Z starts."
            )
        sampler = init_chains(key, frozen, self._num_chains, self._kernel, batch_shape=rows.shape)
        if self._target_acceptance is not None:
            check_tunable_step(sampler)
        bank = {
            "sampler": sampler,
            "identity": jnp.zeros(sampler.log_weight.shape[:-1], jnp.uint32),
            "acceptance_rate": jnp.zeros((), jnp.float32),
            "num_divergent": jnp.zeros((), jnp.int32),
        }
        if self._player is not None:
            bank["sampler_optimizer_state"] = self._player.start(sampler.kernel)
        if self._is_tracked:
            sampler = init_chains(
                jax.random.fold_in(key, 1), frozen, self._num_chains, self._kernel, batch_shape=rows.shape
            )
            bank["tracking"] = init_tracking(sampler)
        return bank

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Prove that the gradient of log Z will do, once per shape of the arguments, and run the model."""
        self._plates = {}
        return super().__call__(*args, **kwargs)

    def postprocess_message(self, msg: dict[str, Any]) -> None:
        """Note the indices of the plates; check observed values."""
        if msg["type"] == "plate":
            self._plates[self.name_inside(msg)] = (msg["args"][0], msg["value"])
        super().postprocess_message(msg)

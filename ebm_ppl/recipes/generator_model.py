"""A NumPyro latent-variable model of one row, with its parameters and an amortised guide, as one trainable pytree."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from numpyro import handlers
from numpyro.contrib.module import eqx_module
from numpyro.distributions import biject_to, constraints
from numpyro.infer.util import log_density

from ebm_ppl.checks import as_array, as_positive_number, check_count
from ebm_ppl.types import Array, Event, Key, PyTree, Scalar


def gaussian_generator(network: Any, latent_size: int, scale: float) -> Callable[..., None]:
    """The NumPyro model ``z ~ N(0, I)``, ``x ~ N(g(z), scale^2 I)`` of one row, the network's weights its parameters.

    Args:
        network: ``g``, an Equinox module from one latent to one event.
        latent_size: Length of a latent.
        scale: Standard deviation of the events around their mean.

    Returns:
        A function ``model(x=None)`` with the sites ``z`` and ``x``; ``x`` is observed where it is given.

    Raises:
        TypeError: ``network`` is not callable.
        ValueError: ``latent_size`` or ``scale`` is not positive.

    Example:
        >>> import equinox as eqx, jax, numpyro
        >>> model = gaussian_generator(eqx.nn.Linear(3, 2, key=jax.random.key(0)), 3, 0.1)
        >>> trace = numpyro.handlers.trace(numpyro.handlers.seed(model, 0)).get_trace()
        >>> trace["z"]["value"].shape, trace["x"]["value"].shape
        ((3,), (2,))
    """
    if not callable(network):
        raise TypeError(f"network: got {type(network).__name__}, expected an Equinox module from a latent to an event.")
    size, deviation = check_count("latent_size", latent_size), as_positive_number("scale", scale)

    def model(x: Event | None = None) -> None:
        generator: Any = eqx_module("generator", network)
        z = numpyro.sample("z", dist.Normal(0.0, 1.0).expand([size]).to_event(1))
        numpyro.sample("x", dist.Normal(generator(z), deviation).to_event(), obs=x)

    return model


class NormalInference(eqx.Module):
    """An inference network ``x -> (mean, log standard deviation)`` of the latents of one flattened event."""

    network: eqx.nn.MLP
    latent_shape: tuple[int, ...] = eqx.field(static=True)

    def __init__(self, key: Key, event: Array, latent: Array, *, width: int = 128, depth: int = 2):
        self.latent_shape = latent.shape
        self.network = eqx.nn.MLP(event.size, 2 * latent.size, width, depth, activation=jax.nn.silu, key=key)

    def __call__(self, event: Array) -> tuple[Array, Array]:
        """Mean and log standard deviation, of the shape of a latent."""
        mean, log_scale = jnp.split(self.network(event.reshape(-1)), 2)
        return mean.reshape(self.latent_shape), log_scale.reshape(self.latent_shape)


class GeneratorModel(eqx.Module):
    """A NumPyro model ``p(x, z)`` of one row with its guide ``q(z | x) = N(m(x), diag s(x)^2)``.

    All that is asked of the model's densities goes through NumPyro: ``log_joint`` is its ``log_density``, latents and means
    come from its trace. The pytree's floating arrays are the model's parameters, unconstrained, and the network's.

    Args:
        model: ``model(x)`` of ONE row, ``x`` an event or ``None``, with one observed site and one latent site that is real,
            such as :func:`gaussian_generator` makes. Its parameters are ``numpyro.param`` sites, those of ``eqx_module``
            and its like included.
        event: An example of a row.
        key: Random key for the parameters.
        inference: From one event to mean and log standard deviation of its latent; a multilayer perceptron when ``None``.

    Attributes:
        parameters: Of the model, by site and unconstrained. :attr:`params` gives them as NumPyro takes them.
        inference: The network.

    Raises:
        TypeError: ``model`` is not callable.
        ValueError: the model has not exactly one observed site and one real latent site, or the network gives other shapes
            than the latent's.

    Example:
        >>> import equinox as eqx, jax, jax.numpy as jnp
        >>> from numpyro.infer import Predictive
        >>> model = gaussian_generator(eqx.nn.Linear(3, 2, key=jax.random.key(0)), 3, 0.1)
        >>> pair = GeneratorModel(model, jnp.zeros(2), key=jax.random.key(1))
        >>> draws = Predictive(pair.model, params=pair.params, num_samples=5)(jax.random.key(2))
        >>> draws["x"].shape, pair(draws["z"][0]).shape
        ((5, 2), (2,))
    """

    parameters: dict[str, PyTree]
    inference: Any
    model: Callable[..., None] = eqx.field(static=True)
    latent_site: str = eqx.field(static=True)
    event_site: str = eqx.field(static=True)
    latent_shape: tuple[int, ...] = eqx.field(static=True)
    constrained: tuple[str, ...] = eqx.field(static=True)

    def __init__(self, model: Callable[..., None], event: Event, *, key: Key, inference: Any = None):
        if not callable(model):
            raise TypeError(f"model: got {type(model).__name__}, expected a NumPyro model of one row.")
        model_key, inference_key = jax.random.split(key)
        event = as_array("event", event)
        trace = handlers.trace(handlers.seed(model, model_key)).get_trace(event)
        sites = [site for site in trace.values() if site["type"] == "sample"]
        observed = [site["name"] for site in sites if site["is_observed"]]
        latent = [site for site in sites if not site["is_observed"]]
        if len(observed) != 1 or len(latent) != 1:
            raise ValueError(
                f"model: got observed sites {observed} and latent sites {[site['name'] for site in latent]}, expected one "
                "of each: x, observed where it is given, and z."
            )
        found = latent[0]
        if not _is_real(found["fn"].support):
            raise ValueError(
                f"model: got the latent site '{found['name']}' with support {found['fn'].support}, expected a real one. "
                "Sample a normal and transform it in the model."
            )
        self.model, self.event_site, self.latent_site = model, observed[0], found["name"]
        self.latent_shape = found["value"].shape
        bijections = _bijections(trace)
        self.constrained = tuple(name for name, found in bijections.items() if not _is_real(found.codomain))
        self.parameters = {name: bijection.inv(trace[name]["value"]) for name, bijection in bijections.items()}
        self.inference = NormalInference(inference_key, event, found["value"]) if inference is None else inference
        shapes = [x.shape for x in jax.tree.leaves(jax.eval_shape(self.inference, event))]
        if shapes != [self.latent_shape] * 2:
            raise ValueError(
                f"inference: gave shapes {shapes}, expected mean and log standard deviation of shape {self.latent_shape}."
            )

    @property
    def params(self) -> dict[str, PyTree]:
        """Values of the model's ``numpyro.param`` sites, as ``Predictive(model, params=...)`` takes them."""
        if not self.constrained:
            return self.parameters
        # The model's own start: unconstrained values are none that its distributions would take.
        bijections = _bijections(self._trace({self.latent_site: jnp.zeros(self.latent_shape)}))
        return {name: bijections[name](value) for name, value in self.parameters.items()}

    def _trace(self, values: dict[str, Any], key: Key | None = None) -> dict[str, Any]:
        # The event of a trace is drawn and not looked at, so that its key is of no account unless one is given.
        model = handlers.seed(handlers.substitute(self.model, data=values), jax.random.key(0) if key is None else key)
        return handlers.trace(model).get_trace(None)

    def __call__(self, latent: Array) -> Event:
        """Mean of the event under its latent."""
        return self._trace({**self.params, self.latent_site: latent})[self.event_site]["fn"].mean

    def sample_prior(self, key: Key) -> Array:
        """One latent, from the model."""
        return self._trace(self.params, key)[self.latent_site]["value"]

    def log_joint(self, event: Event, latent: Array) -> Scalar:
        """``log p(x, z)``, by NumPyro's ``log_density``."""
        values = {**self.params, self.latent_site: latent}
        return jnp.asarray(log_density(self.model, (event,), {}, values)[0])

    def posterior(self, event: Event) -> dist.Distribution:
        """``q(z | x)``."""
        mean, log_scale = self.inference(event)
        return dist.Normal(mean, jnp.exp(log_scale)).to_event()

    def log_posterior(self, latent: Array, event: Event) -> Scalar:
        """``log q(z | x)``."""
        return jnp.asarray(self.posterior(event).log_prob(latent))

    def sample_posterior(self, key: Key, event: Event) -> Array:
        """A draw of ``q(z | x)``."""
        return jnp.asarray(self.posterior(event).rsample(key))

    def guide(self, x: Event) -> None:
        """``q(z | x)`` as a NumPyro guide of one row, at the network's weights as they are."""
        numpyro.sample(self.latent_site, self.posterior(x))


def _bijections(trace: dict[str, Any]) -> dict[str, Any]:
    """From unconstrained values of the parameters to their own."""
    params = {name: site for name, site in trace.items() if site["type"] == "param"}
    return {name: biject_to(site["kwargs"].get("constraint", constraints.real)) for name, site in params.items()}


def _is_real(support: Any) -> bool:
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    return support is constraints.real or support is constraints.real_vector

"""The latents of a model by data row: which rows a minibatch holds, and where their chains are kept."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from numpyro import handlers
from numpyro.distributions import biject_to
from numpyro.primitives import Messenger

from ebm_ppl.handlers.unnormalized import unnormalized
from ebm_ppl.provenance import any_value
from ebm_ppl.types import Array, Key


class Latent(NamedTuple):
    """One latent site.

    Attributes:
        transform: From unconstrained space onto its support.
        shape: Its unconstrained shape for the whole data set.
        axes: For each subsampling plate it lies in, the (negative) axis of that shape.
    """

    transform: Any
    shape: tuple[int, ...]
    axes: dict[str, int]


class LatentRows(NamedTuple):
    """The latents of one evaluation of a model.

    Attributes:
        latents: By site.
        plates: Indices of each subsampling plate in this evaluation.
        sizes: Full size of each of these plates.
        example: A value of every latent, constrained, of this evaluation's shape.
    """

    latents: dict[str, Latent]
    plates: dict[str, Array]
    sizes: dict[str, int]
    example: dict[str, Array]

    def init(self, key: Key, num_chains: int) -> dict[str, Array]:
        """Unconstrained starts of the chains of all rows, uniform in (-2, 2) as NumPyro's are."""
        keys = jax.random.split(key, len(self.latents))
        return {
            name: jax.random.uniform(key, (num_chains, *latent.shape), minval=-2.0, maxval=2.0)
            for key, (name, latent) in zip(keys, self.latents.items(), strict=True)
        }

    def gather(self, bank: dict[str, Array], plates: dict[str, Array]) -> dict[str, Array]:
        """The chains of this evaluation's rows."""
        chosen = dict(bank)
        for name, latent in self.latents.items():
            for plate, axis in latent.axes.items():
                chosen[name] = jnp.take(chosen[name], plates[plate], axis=axis)
        return chosen

    def scatter(self, bank: dict[str, Array], moved: dict[str, Array], plates: dict[str, Array]) -> dict[str, Array]:
        """Put the chains of this evaluation's rows back."""
        result = {}
        for name, latent in self.latents.items():
            index: list[Any] = [jnp.arange(size) for size in bank[name].shape]
            for plate, axis in latent.axes.items():
                index[axis] = plates[plate]
            result[name] = bank[name].at[jnp.ix_(*index)].set(moved[name]) if latent.axes else moved[name]
        return result

    def constrain(self, latents: dict[str, Array]) -> dict[str, Array]:
        """Unconstrained values of one chain as values of the sites."""
        return {name: self.latents[name].transform(value) for name, value in latents.items()}


class unscaled(Messenger):
    """Undo the scale of subsampling plates: it stands for the rows that are not there, and a row's posterior has none."""

    def process_message(self, msg: dict[str, Any]) -> None:
        """Note the sizes of plates; correct the scale of sites in them."""
        if msg["type"] == "sample":
            for frame in msg["cond_indep_stack"]:
                size = self._sizes.get(frame.name, frame.size)
                if size != frame.size:
                    msg["scale"] = msg["scale"] * frame.size / size

    def __init__(self, fn: Callable[..., Any], sizes: dict[str, int]):
        super().__init__(fn)
        self._sizes = sizes


def find_latents(model: Callable[..., Any], args: tuple, kwargs: dict[str, Any], key: Key) -> LatentRows:
    """Trace a model for its latents and for the rows that its plates choose under this key.

    Raises:
        ValueError: a latent is discrete, or lies outside a subsampling plate, so that its posterior needs all rows.
    """
    seeded = handlers.substitute(handlers.seed(unnormalized(model), key), substitute_fn=any_value)
    with handlers.block():
        trace = handlers.trace(seeded).get_trace(*args, **kwargs)
    plates = {
        name: site["value"]
        for name, site in trace.items()
        if site["type"] == "plate" and site["args"][0] != site["value"].shape[0]
    }
    sizes = {name: trace[name]["args"][0] for name in plates}
    latents, example = {}, {}
    for name, site in trace.items():
        if site["type"] != "sample" or site["is_observed"]:
            continue
        fn = site["fn"]
        if fn.is_discrete:
            raise ValueError(f"site '{name}': got a discrete latent, expected continuous ones for gradient kernels.")
        transform = biject_to(fn.support)
        event_shape = transform.inverse_shape(fn.shape())[len(fn.batch_shape) :]
        batch_shape, axes = list(fn.batch_shape), {}
        for frame in site["cond_indep_stack"]:
            if frame.name in plates:
                axes[frame.name] = frame.dim - len(event_shape)
                batch_shape[frame.dim] = sizes[frame.name]
        if set(axes) != set(plates):
            missing = sorted(set(plates) - set(axes))
            raise ValueError(
                f"site '{name}': got a latent outside the subsampling plate(s) {missing}, expected every latent in them: "
                "the posterior of the others needs all rows at every step."
            )
        latents[name] = Latent(transform, (*batch_shape, *event_shape), axes)
        example[name] = jnp.asarray(site["value"])
    return LatentRows(latents, plates, sizes, example)

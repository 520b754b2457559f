"""What a diagnosis is about: one law at frozen parameters, as an EBM and as the potential that chains move under."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpyro.distributions as dist
from numpyro import handlers
from numpyro.distributions import constraints

from ebm_ppl.checks import check_potential
from ebm_ppl.distributions import EBM, find_ebms
from ebm_ppl.errors import UnknownNormalizerError
from ebm_ppl.proposals import can_sample
from ebm_ppl.provenance import ebm_dependencies
from ebm_ppl.rows import RowPotential
from ebm_ppl.types import Potential


class Subject(NamedTuple):
    """One law.

    Attributes:
        ebm: As a distribution of one event, without rows; log Z is that of ``exp(-potential)``.
        potential: Energy of one event, base included: what the chains move under.
        reference: NumPyro distribution of one event to temper towards, or ``None``.
        site: Name of the site; ``"x"`` where there was none.
    """

    ebm: EBM
    potential: Potential
    reference: Any
    site: str


def find_subject(
    subject: Any,
    event: Any,
    *,
    reference: Any = None,
    site: str | None = None,
    args: tuple = (),
    kwargs: dict[str, Any] | None = None,
) -> Subject:
    """The law behind a potential, an EBM, or an EBM site of a NumPyro model.

    Args:
        subject: A potential of one event (base included), an :class:`~ebm_ppl.distributions.EBM` without rows, or a NumPyro
            model whose parameters and latents have been substituted.
        event: Shape and dtype of one event of the chains.
        reference: In place of the potential's ``.reference``, or of the base.
        site: Which EBM site of a model, where there are several.
        args: Arguments of the model.
        kwargs: Keyword arguments of the model.

    Raises:
        TypeError: it is none of these, or the energy is not a real floating scalar.
        ValueError: an EBM with rows, a model without such a site or with several, or events of another shape.
        UnknownNormalizerError: a parameter or latent that reaches the energy of the site has no value.

    Example:
        >>> import jax, jax.numpy as jnp, ebm_ppl as ebm
        >>> tilted = ebm.potentials.tilt(lambda x: x**4, dist.Normal(0.0, 2.0))
        >>> find_subject(tilted, jax.ShapeDtypeStruct((), jnp.float32)).ebm.event_shape
        ()
    """
    if reference is not None and not isinstance(reference, dist.Distribution):
        raise TypeError(f"reference: got {type(reference).__name__}, expected a NumPyro distribution of one event.")
    if isinstance(subject, EBM):
        return _of_ebm(subject, event, reference, site or "x")
    if not callable(subject):
        raise TypeError(f"potential: got {type(subject).__name__}, expected a potential, an EBM or a NumPyro model.")
    if args or kwargs or site is not None or _is_model(subject, event):
        name, ebm = _site_of(subject, site, args, kwargs or {})
        return _of_ebm(ebm, event, reference, name)
    potential: Any = subject
    check_potential(potential, event)
    if reference is None:
        found = getattr(subject, "reference", None)
        reference = found if isinstance(found, dist.Distribution) else _uniform(subject, event)
    support = getattr(subject, "support", None)
    if support is None:
        support = constraints.real if reference is None else reference.support
    return Subject(EBM(potential, dist.ImproperUniform(support, (), event.shape)), potential, reference, "x")


def _of_ebm(ebm: EBM, event: Any, reference: Any, site: str) -> Subject:
    if ebm.batch_shape:
        raise ValueError(
            f"ebm: got batch_shape {ebm.batch_shape}, expected (): one law. Diagnose one row at a time, with its condition "
            "bound to the energy."
        )
    if ebm.event_shape != event.shape:
        raise ValueError(f"sampler: got events of shape {event.shape}, expected those of the EBM, {ebm.event_shape}.")
    if reference is None and can_sample(ebm.base):
        reference = ebm.base
    is_bare = RowPotential(ebm, 0).is_bare and ebm.support.is_discrete
    return Subject(ebm, ebm.potential if is_bare else RowPotential(ebm, 0), reference, site)


def _uniform(potential: Any, event: Any) -> Any:
    """All states alike, for sites that are coded from zero on."""
    values = getattr(potential, "site_values", None)
    if values is None or tuple(values) != tuple(range(len(values))):
        return None
    one = dist.Bernoulli(0.5) if len(values) == 2 else dist.DiscreteUniform(0, len(values) - 1)
    return one.expand(event.shape).to_event(len(event.shape))


def _is_model(subject: Callable[..., Any], event: Any) -> bool:
    """Whether it is a NumPyro model: handlers are, and functions that need no event or leave sites behind."""
    if isinstance(subject, handlers.substitute | handlers.condition | handlers.seed) or hasattr(subject, "require"):
        return True
    try:
        jax.eval_shape(subject, event)
    except TypeError:
        try:
            return bool(ebm_dependencies(subject))
        except Exception:
            return False
    except Exception:
        return False
    return False


def _site_of(model: Any, site: str | None, args: tuple, kwargs: dict[str, Any]) -> tuple[str, EBM]:
    while callable(getattr(model, "require", None)):
        model = model.fn  # a policy about log Z; the law itself is below it
    found = ebm_dependencies(model, args, kwargs)
    if not found or (site is None and len(found) > 1) or (site is not None and site not in found):
        raise ValueError(f"site: got {site!r}, expected one of the model's EBM sites {sorted(found)}.")
    name = next(iter(found)) if site is None else site
    unset: list[str] = []

    def note(message: dict[str, Any]) -> None:
        if message["type"] in ("sample", "param") and message["value"] is None:
            unset.append(message["name"])

    with handlers.block():
        seeded = handlers.seed(handlers.substitute(model, substitute_fn=note), 0)
        trace = handlers.trace(handlers.substitute(seeded, substitute_fn=lambda message: None)).get_trace(
            *args, **kwargs
        )
    missing = sorted((found[name].latents | found[name].params) & set(unset))
    if missing:
        raise UnknownNormalizerError(
            f"site '{name}': its energy depends on {missing}, which have no value; expected a model at frozen parameters. "
            "Pass numpyro.handlers.substitute(model, data=params) with the values that were found."
        )
    ebms = find_ebms(trace[name]["fn"])
    if len(ebms) != 1:
        raise ValueError(f"site '{name}': got {len(ebms)} EBMs in one distribution, expected one.")
    return name, ebms[0]

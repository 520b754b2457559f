"""What each EBM site of a model is for, and so what has to be done about its log Z."""

from collections.abc import Callable
from enum import Enum
from typing import Any, NamedTuple

from ebm_ppl.errors import UnknownNormalizerError
from ebm_ppl.potentials.short_run import not_a_density
from ebm_ppl.provenance import SiteDependencies, ebm_dependencies, factor_sites


class Role(Enum):
    """The part an EBM site plays: a matter of whether it is observed, and of what reaches its energy or base."""

    NORMALIZED = "normalised"
    CONSTANT = "constant"
    LEARNED = "learned"
    DOUBLY_INTRACTABLE = "doubly intractable"
    FIXED_PRIOR = "fixed prior"
    LEARNED_PRIOR = "learned prior"
    HIERARCHICAL = "hierarchical"
    WEIGHTED = "weighted"
    SHORT_RUN = "short run"


_MEANING = {
    Role.NORMALIZED: "log Z is given",
    Role.CONSTANT: "observed, and nothing that moves reaches it: this site cannot learn anything",
    Role.LEARNED: "observed data of an energy that is learned: maximum likelihood needs the gradient of log Z",
    Role.DOUBLY_INTRACTABLE: "observed data of an energy with latent parameters, whose posterior holds log Z once per row",
    Role.FIXED_PRIOR: "a latent with a fixed energy: log Z is one constant of the log joint",
    Role.LEARNED_PRIOR: "a latent with a learned energy: its prior's log Z is part of the likelihood",
    Role.HIERARCHICAL: "a latent with latent parameters: their posterior contains its log Z",
    Role.SHORT_RUN: "an energy trained by short runs: what was fitted is the law of their last step, not exp(-U)",
    Role.WEIGHTED: "its log Z counts a varying number of times (a mixture, or a mask or scale with latent values)",
}

_WHAT_TO_DO = {
    Role.NORMALIZED: "nothing",
    Role.CONSTANT: "handlers.constant_normalizer",
    Role.LEARNED: "handlers.negative_phase with SVI, or ebm_ppl.fit; handlers.exact_normalizer where log Z can be summed "
    "or integrated",
    Role.DOUBLY_INTRACTABLE: "infer.Exchange; handlers.exact_normalizer with NUTS; handlers.surrogate_normalizer with NUTS "
    "near a mode; handlers.negative_phase(persistent=False) with SVI and Trace_ELBO",
    Role.FIXED_PRIOR: "handlers.constant_normalizer with NUTS or SVI",
    Role.LEARNED_PRIOR: "handlers.negative_phase with SVI and a guide; infer.fit_latent_prior (two chains); "
    "handlers.exact_normalizer",
    Role.HIERARCHICAL: "infer.Exchange for the parameters inside numpyro.infer.gibbs.Gibbs; handlers.exact_normalizer; "
    "handlers.surrogate_normalizer",
    Role.SHORT_RUN: "handlers.simulate with the kernel it was trained with, potential.sampler, and num_steps=1; a prior "
    "has to be trained by chains that arrive: objectives.persistent_contrastive_divergence, then diagnose",
    Role.WEIGHTED: "handlers.exact_normalizer, handlers.estimated_normalizer (not in MCMC), or a log_normalizer",
}


def role_of(found: SiteDependencies) -> Role:
    """The role of one site.

    Example:
        >>> nothing = frozenset()
        >>> role_of(SiteDependencies(True, nothing, frozenset({"w"}), nothing, nothing, False))
        <Role.LEARNED: 'learned'>
    """
    if found.is_normalized:
        return Role.NORMALIZED
    if found.short_run and not is_trained(found):
        return Role.SHORT_RUN
    if found.weight:
        return Role.WEIGHTED
    if found.latents:
        return Role.DOUBLY_INTRACTABLE if found.observed else Role.HIERARCHICAL
    if found.params:
        return Role.LEARNED if found.observed else Role.LEARNED_PRIOR
    return Role.CONSTANT if found.observed else Role.FIXED_PRIOR


def what_to_do(found: SiteDependencies) -> str:
    """The policies that are right for a site, in words."""
    return _WHAT_TO_DO[role_of(found)]


def refuse_scan(name: str, found: SiteDependencies) -> None:
    """No policy can account for log Z of an EBM inside NumPyro's ``scan``, which hides what its energy depends on.

    Raises:
        UnknownNormalizerError: the site is in one.
    """
    if found.in_scan or name in found.latents:
        raise UnknownNormalizerError(
            f"site '{name}': it is inside numpyro.contrib.control_flow.scan, which hides what its energy depends on, so no "
            "policy can account for its log Z. Declare the EBM outside the scan, or give it a log_normalizer."
        )


def is_trained(found: SiteDependencies) -> bool:
    """Whether a site is observed data of an energy with nothing but parameters: there a gradient is all that is needed."""
    return found.observed and bool(found.params) and not found.latents and not found.weight


def refuse_short_run(name: str, found: SiteDependencies, *, may_train: bool = False) -> None:
    """An energy that was trained by short runs is no density: ``exp(-U)`` is not what was fitted, and may have no integral.

    Args:
        name: Of the site.
        found: What reaches it.
        may_train: Whether this policy asks for no more than a gradient where the site is trained.

    Raises:
        UnknownNormalizerError: the site has such an energy, and a density is needed.
    """
    if found.short_run and not (may_train and is_trained(found)):
        raise UnknownNormalizerError(
            f"site '{name}': {not_a_density(found.short_run)}, and cannot serve as a prior or a likelihood: training "
            f"fitted the law of step {found.short_run} of its runs, and exp(-U) may have no integral. Draw from it with "
            "handlers.simulate(model, kernel=potential.sampler, num_steps=1); for a density train with "
            "persistent_contrastive_divergence. Where diagnostics.sampling_times shows that nothing changes after the last "
            "step, pass potential.plain."
        )


class SiteReport(NamedTuple):
    """What :func:`check_model` found about one EBM site.

    Attributes:
        role: Its role.
        latents: Latent sites that reach its energy or base.
        params: Parameters that do.
        weight: Sites that decide how often its log Z counts.
        what_to_do: The policies that are right for it.
        notes: Further remarks.
    """

    role: Role
    latents: frozenset[str]
    params: frozenset[str]
    weight: frozenset[str]
    what_to_do: str
    notes: tuple[str, ...]


class ModelReport(NamedTuple):
    """What :func:`check_model` found; prints as a page.

    Attributes:
        sites: One :class:`SiteReport` per EBM site.
        policy: Name of the policy that wraps the model, and that has accepted every site; empty without one.
        factors: ``numpyro.factor`` sites, about whose normalisation nothing can be known.
    """

    sites: dict[str, SiteReport]
    policy: str
    factors: tuple[str, ...]

    def __str__(self) -> str:
        lines = [] if self.sites else ["no EBM sites"]
        for name, site in self.sites.items():
            lines.append(f"site '{name}': {site.role.value}")
            lines.append(f"  meaning     {_MEANING[site.role]}")
            reached = [
                f"{what} {{{', '.join(sorted(names))}}}"
                for what, names in (("latent", site.latents), ("param", site.params), ("weight", site.weight))
                if names
            ]
            lines.append(f"  depends on  {', '.join(reached) or 'nothing that moves'}")
            handled = f"done: {self.policy}" if self.policy else site.what_to_do
            lines.append(f"  what to do  {handled}")
            lines.extend(f"  note        {note}" for note in site.notes)
        lines.extend(
            f"factor '{name}': an unnormalised term, with no log Z and no sampling; if it is an energy, declare an EBM"
            for name in self.factors
        )
        return "\n".join(lines)


def check_model(model: Callable[..., Any], *args: Any, **kwargs: Any) -> ModelReport:
    """Say what each EBM site of a model is for, and what its log Z needs, before anything runs.

    The model is traced abstractly, and the sites and parameters that reach each energy are found by provenance, through
    closures, deterministic sites, transforms and ``lift``. If the model is wrapped in one of the policies of
    :mod:`ebm_ppl.handlers`, each site is put to it, and a wrong pairing raises the policy's own error.

    Args:
        model: A NumPyro model, with or without a policy.
        *args: Its arguments.
        **kwargs: Its keyword arguments.

    Returns:
        A :class:`ModelReport`; print it.

    Raises:
        UnknownNormalizerError: an EBM sits inside ``numpyro.contrib.control_flow.scan``, or the policy round the model is
            wrong for a site.

    Example:
        >>> import jax.numpy as jnp, numpyro, numpyro.distributions as dist, ebm_ppl as ebm
        >>> def model(data):
        ...     scale = numpyro.sample("scale", dist.LogNormal())
        ...     with numpyro.plate("rows", len(data)):
        ...         numpyro.sample("x", ebm.EBM(lambda x: scale * x**2, dist.Normal(0.0, 1.0)), obs=data)
        >>> print(check_model(model, jnp.zeros(3)))
        site 'x': doubly intractable
          meaning     observed data of an energy with latent parameters, whose posterior holds log Z once per row
          depends on  latent {scale}
          what to do  infer.Exchange; handlers.exact_normalizer with NUTS; ...
    """
    policies = []
    while callable(getattr(model, "require", None)):
        policies.append(model)
        model = model.fn  # pyright: ignore[reportFunctionMemberAccess]
    found = ebm_dependencies(model, args, kwargs)
    for name, site in found.items():
        refuse_scan(name, site)
        for policy in policies:
            if not site.is_normalized:
                refuse_short_run(name, site, may_train=policy.trains_by_gradient)
                policy.require(name, site)
    sites = {
        name: SiteReport(role_of(site), site.latents, site.params, site.weight, what_to_do(site), _notes(site))
        for name, site in found.items()
    }
    policy = ", ".join(type(policy).__name__ for policy in policies)
    return ModelReport(sites, policy, factor_sites(model, args, kwargs))


def _notes(site: SiteDependencies) -> tuple[str, ...]:
    notes = []
    if site.short_run:
        notes.append(not_a_density(site.short_run))
    if site.is_discrete and not site.observed:
        notes.append(
            "discrete: NUTS and the other gradient kernels cannot move it; use a discrete kernel (Gibbs, "
            "Gibbs-with-gradients) inside numpyro.infer.gibbs.Gibbs"
        )
    if site.is_discrete and not site.is_normalized and (site.params or site.latents):
        notes.append("discrete: where its states can be enumerated, handlers.exact_normalizer sums log Z exactly")
    if site.has_rows:
        notes.append("one normaliser per row: under subsampling let numpyro.plate choose the rows")
    return tuple(notes)

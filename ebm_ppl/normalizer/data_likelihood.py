"""How well an EBM explains data: the mean log density of rows, with the errors of the rows and of log Z."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ebm_ppl.checks import is_traced
from ebm_ppl.normalizer.likelihood_rows import check_rows_of, rows_of
from ebm_ppl.types import Array


class MeanLogLikelihood(NamedTuple):
    """A mean log density per row in nats, or a difference of two, with its error.

    Attributes:
        value: The mean over the rows.
        standard_error: Of ``value``, from both sources below: how far it may be from the expectation over rows like these.
        data_error: Standard error of the average over the rows, taken for independent; NaN for a single row.
        log_normalizer_error: Standard error that comes with log Z. It stays where there are more rows.
        num_rows: How many rows.
        reliable: Whether every log Z in it is, and the value is finite.

    Example:
        >>> MeanLogLikelihood(*map(jnp.array, (-1.234, 0.02, 0.016, 0.012, 360, True)))
        -1.234 ± 0.020 nats per row (data 0.016, log Z 0.012; 360 rows)
    """

    value: Array
    standard_error: Array
    data_error: Array
    log_normalizer_error: Array
    num_rows: Array
    reliable: Array

    def __repr__(self) -> str:
        if is_traced(self):
            return f"MeanLogLikelihood(value={self.value})"
        text = (
            f"{self.value:.3f} ± {self.standard_error:.3f} nats per row (data {self.data_error:.3f}, log Z "
            f"{self.log_normalizer_error:.3f}; {self.num_rows} rows)"
        )
        return text if self.reliable else f"{text}, UNRELIABLE log Z"

    __str__ = __repr__


def log_likelihood(ebm: Any, data: Any, log_normalizer: Any = None) -> MeanLogLikelihood:
    """``mean_i log p(x_i)``, the mean of ``log base(x) - U(x) - log Z`` over rows of data.

    An estimate of log Z by annealing or importance sampling lies below it on average, and the likelihood above: by about
    half the squared error where that is small, and by any amount where it is not ``reliable``. What
    :func:`ebm_ppl.normalizer.reverse_annealed_importance` gives errs to the other side.

    Args:
        ebm: The EBM. Without a batch shape all rows share it and its log Z; with one, every row of data has an EBM and a
            log Z of its own.
        data: ``(row, *event_shape)``, or ``(*batch_shape, *event_shape)`` where the EBM has a batch shape.
        log_normalizer: A result of :mod:`ebm_ppl.normalizer`, or a number where log Z is known; the EBM's own when
            ``None``. One log Z for all rows is one error, which does not average out. One for each row are errors that do:
            they are taken for independent, as those of one call of a normaliser are.

    Returns:
        The mean with its error. ``value`` is differentiable in whatever the EBM and its log Z are.

    Raises:
        UnknownNormalizerError: there is no log Z, or the EBM's own stands for its gradient only.
        NonFiniteEnergyError: the log density of a row is not finite.
        TypeError: the data are not numbers of the kind of the events, or ``log_normalizer`` is a pair of bounds.
        ValueError: no data; another shape; rows that are NaN, infinite or outside the support; or a log Z of a shape that
            does not fit.

    Example:
        >>> import jax.numpy as jnp, numpyro.distributions as dist, ebm_ppl
        >>> ebm = ebm_ppl.EBM(lambda x: 0.5 * x**2, dist.Normal(0.0, 1.0))
        >>> log_likelihood(ebm, jnp.linspace(-1.0, 1.0, 100), ebm_ppl.normalizer.quadrature(ebm))
        -0.912 ± 0.031 nats per row (data 0.031, log Z 0.000; 100 rows)
    """
    terms = rows_of("ebm", ebm, check_rows_of("data", ebm, data), log_normalizer)
    return _average(terms.log_density, terms.normalizer_variance, terms.shared_variance, terms.reliable)


def compare_log_likelihoods(
    first: Any,
    second: Any,
    data: Any,
    *,
    first_log_normalizer: Any = None,
    second_log_normalizer: Any = None,
) -> MeanLogLikelihood:
    """``mean_i log p_first(x_i) - log p_second(x_i)``: by how much one model explains the same rows better, in nats.

    The error of the data is that of the differences, row by row: rows that are hard for both do not count, and it is far
    smaller than what the errors of two averages would give. The two log Z are taken for independent estimates.

    Args:
        first: An EBM, or any normalised distribution with ``log_prob`` (NumPyro, distrax, a flow): a baseline.
        second: As ``first``.
        data: As in :func:`log_likelihood`, for both.
        first_log_normalizer: As ``log_normalizer`` in :func:`log_likelihood`, where ``first`` is an EBM.
        second_log_normalizer: As ``first_log_normalizer``.

    Returns:
        The mean difference with its error: positive where ``first`` is better, and by more than chance where it is many
        standard errors.

    Raises:
        UnknownNormalizerError: as in :func:`log_likelihood`.
        NonFiniteEnergyError: the log density of a row under an EBM is not finite.
        TypeError: as in :func:`log_likelihood`; something has no ``log_prob``; a log Z is given to a distribution that has
            none; or one is on a discrete support and the other is not, whose densities cannot be compared.
        ValueError: as in :func:`log_likelihood`; or a distribution has another shape than the rows, or no density at one.

    Example:
        >>> import jax, jax.numpy as jnp, numpyro.distributions as dist, ebm_ppl
        >>> ebm = ebm_ppl.EBM(lambda x: 0.5 * x**2, dist.Normal(0.0, 1.0))  # N(0, 1/2)
        >>> data = 0.5**0.5 * jax.random.normal(jax.random.key(0), (1000,))
        >>> log_z = ebm_ppl.normalizer.quadrature(ebm)
        >>> found = compare_log_likelihoods(ebm, dist.Normal(0.0, 1.0), data, first_log_normalizer=log_z)
        >>> bool(found.value > 4 * found.standard_error)
        True

    References:
        Vuong (1989), Likelihood ratio tests for model selection and non-nested hypotheses, Econometrica 57.
    """
    sides = ("first", first, first_log_normalizer), ("second", second, second_log_normalizer)
    supports = [getattr(model, "support", None) for _, model, _ in sides]
    kinds = {bool(support.is_discrete) for support in supports if support is not None}
    if len(kinds) > 1:
        raise TypeError(
            f"second: got the support {supports[1]} beside {supports[0]}, expected two densities or two probabilities. "
            "Densities of continuous events cannot be compared with probabilities of discrete ones."
        )
    a, b = (rows_of(name, model, check_rows_of("data", model, data), log_z) for name, model, log_z in sides)
    if a.log_density.shape != b.log_density.shape:
        raise ValueError(
            f"second: got {b.log_density.size} rows, expected as many as the first has, {a.log_density.size}."
        )
    return _average(
        a.log_density - b.log_density,
        a.normalizer_variance + b.normalizer_variance,
        a.shared_variance + b.shared_variance,
        a.reliable & b.reliable,
    )


def _average(
    log_density: Array, normalizer_variance: Array, shared_variance: Array, reliable: Array
) -> MeanLogLikelihood:
    num_rows = log_density.size
    value = jnp.mean(log_density)
    # NaN for one row, whose spread nobody knows.
    spread = jax.lax.stop_gradient(jnp.var(log_density, ddof=1) / num_rows if num_rows > 1 else jnp.nan * value)
    data_variance = jnp.maximum(spread - (normalizer_variance - shared_variance), 0.0)
    return MeanLogLikelihood(
        value=value,
        standard_error=jnp.sqrt(jnp.maximum(spread + shared_variance, normalizer_variance)),
        data_error=jnp.sqrt(data_variance),
        log_normalizer_error=jnp.sqrt(normalizer_variance),
        num_rows=jnp.asarray(num_rows),
        reliable=reliable & jnp.isfinite(value),
    )

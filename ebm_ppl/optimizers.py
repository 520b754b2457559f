"""Steps of optimizers that stay in a set: unit vectors, positive weights, balls of measures.

Each is an optax transformation that comes last in a chain: it takes the step that those before it have made, and turns it
into one that ends in its set. Put any optimizer in front, ``optax.chain(optax.adam(1e-2), sphere_step())``.
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

from ebm_ppl.checks import as_floats, check_one, check_positive
from ebm_ppl.potentials.shallow import ShallowEnergy
from ebm_ppl.types import Array, PyTree

MAX_EXPONENT = 30.0
"""A weight grows by no more than ``exp`` of this in one step, which leaves room for a projection to bring it back."""


def _stateless(step: Callable[[Any, Any], Any]) -> optax.GradientTransformation:
    """A function of the step and the parameter, array by array."""
    return optax.stateless_with_tree_map(step)


def sphere_step() -> optax.GradientTransformation:
    """Rows stay unit vectors: a step ``u`` becomes its tangent part, and the end is divided by its length.

    ``z' = (z + P u) / |z + P u|`` with ``P = I - z z'``, for every row, the last axis, of every array.

    Returns:
        A transformation that needs the parameters.

    Example:
        >>> optimizer, z = optax.chain(optax.sgd(0.1), sphere_step()), jnp.array([[1.0, 0.0]])
        >>> updates, _ = optimizer.update(jnp.array([[5.0, 1.0]]), optimizer.init(z), z)
        >>> [round(float(x), 4) for x in (z + updates)[0]]
        [0.995, -0.0995]

    References:
        Absil, Mahony, Sepulchre (2008), Optimization algorithms on matrix manifolds, section 4.1.1: retraction.
    """

    def step(update: Array, z: Array) -> Array:
        moved = z + update - z * jnp.sum(z * update, axis=-1, keepdims=True)
        return moved / jnp.linalg.norm(moved, axis=-1, keepdims=True) - z

    return _stateless(step)


def exponentiated_step() -> optax.GradientTransformation:
    """Weights stay positive: a step ``u`` becomes a factor, ``w' = w exp(u)``.

    With gradient descent before it, ``w' = w exp(-rate dL/dw)``: the exponentiated gradient, which in the mean-field
    scaling is the growth and decay of mass in the Wasserstein-Fisher-Rao flow.

    Returns:
        A transformation that needs the parameters.

    Example:
        >>> optimizer, w = optax.chain(optax.sgd(1.0), exponentiated_step()), jnp.array([2.0])
        >>> updates, _ = optimizer.update(jnp.array([jnp.log(2.0)]), optimizer.init(w), w)
        >>> float((w + updates)[0])
        1.0

    References:
        Kivinen, Warmuth (1997), Exponentiated gradient versus gradient descent for linear predictors.
    """
    return _stateless(lambda update, w: w * jnp.expm1(jnp.minimum(update, MAX_EXPONENT)))


def total_variation_projection(bound: float | Array) -> optax.GradientTransformation:
    """The mean of the weights stays within a bound: ``w' = w min(1, bound / mean |w|)``.

    A common factor is the projection in the relative entropy that belongs to :func:`exponentiated_step`. The Euclidean
    one (``optax.projections.projection_l1_ball``) would set the smallest weights to zero, which factors never leave.

    Args:
        bound: ``beta > 0``.

    Raises:
        TypeError: an argument is no number.
        ValueError: it is not finite and positive.

    Example:
        >>> optimizer, w = optax.chain(optax.sgd(1.0), total_variation_projection(1.0)), jnp.array([1.0, 1.0])
        >>> updates, _ = optimizer.update(jnp.array([-2.0, 0.0]), optimizer.init(w), w)
        >>> (w + updates).tolist()
        [1.5, 0.5]
    """
    bound = check_positive("bound", bound)

    def project(update: Array, w: Array) -> Array:
        moved = w + update
        return moved * jnp.minimum(1.0, bound / jnp.mean(jnp.abs(moved))) - w

    return _stateless(project)


def mean_square_projection(bound: float | Array) -> optax.GradientTransformation:
    """The root mean square of the weights stays within a bound: the nearest point of the ball of the lazy regime.

    Args:
        bound: ``beta > 0``.

    Raises:
        TypeError: an argument is no number.
        ValueError: it is not finite and positive.

    Example:
        >>> optimizer, w = optax.chain(optax.sgd(1.0), mean_square_projection(1.0)), jnp.zeros(2)
        >>> updates, _ = optimizer.update(jnp.array([-3.0, 3.0]), optimizer.init(w), w)
        >>> [round(float(x), 4) for x in w + updates]
        [1.0, -1.0]
    """
    bound = check_positive("bound", bound)

    def project(update: Array, w: Array) -> Array:
        return optax.projections.projection_l2_ball(w + update, bound * jnp.sqrt(w.size)) - w

    return _stateless(project)


def mean_field() -> optax.GradientTransformation:
    """Gradients of every :class:`~ebm_ppl.potentials.ShallowEnergy` as those of a measure.

    ``m dL/dw_i`` for weights and ``m / w_i dL/dz_i`` for features, of ``m`` units.

    In a mean over ``m`` units each has a gradient of order ``1/m``, that of a feature also in proportion to its weight.
    The velocity of an atom in the space of measures depends on neither, and nor do good learning rates.

    Returns:
        A transformation that needs the parameters and comes first in a chain.

    Raises:
        ValueError: at ``init``, there is no such energy among the parameters.

    Example:
        >>> energy = ShallowEnergy(2, key=jax.random.key(0), width=4)
        >>> gradient = jax.grad(lambda energy: energy(jnp.array([1.0, 0.0])))(energy)
        >>> scaled, _ = mean_field().update(gradient, mean_field().init(energy), energy)
        >>> bool(jnp.allclose(scaled.weights, 4 * gradient.weights))
        True
    """

    def init(params: PyTree) -> optax.EmptyState:
        if not any(isinstance(node, ShallowEnergy) for node in jax.tree.leaves(params, is_leaf=_is_shallow)):
            raise ValueError("potential: has no ShallowEnergy, whose gradients this optimizer scales; expected one.")
        return optax.EmptyState()

    def update(updates: PyTree, state: Any, params: PyTree = None) -> tuple[PyTree, Any]:
        if params is None:
            raise ValueError(
                "params: got None, expected the parameters, as in optimizer.update(gradient, state, params)."
            )
        return jax.tree.map(_scaled, updates, params, is_leaf=_is_shallow), state

    return optax.GradientTransformation(init, update)


def _is_shallow(node: Any) -> bool:
    return isinstance(node, ShallowEnergy)


def _scaled(gradient: Any, energy: Any) -> Any:
    if not _is_shallow(gradient):
        return gradient
    width, weights = energy.weights.size, energy.weights

    def of_features(g: Array) -> Array:
        # A weight may have shrunk to zero; its atom then has no mass that could move.
        return jnp.where(weights[:, None] > 0, width * g / jnp.where(weights > 0, weights, 1.0)[:, None], 0.0)

    features = jax.tree.map(of_features, gradient.features)
    return eqx.tree_at(lambda node: (node.features, node.weights), gradient, (features, width * gradient.weights))


def measure_descent(
    weight_rate: float | optax.Schedule,
    feature_rate: float | optax.Schedule | None = None,
    *,
    bound: float | None = None,
) -> optax.GradientTransformation:
    """Gradient descent for the measure of a :class:`~ebm_ppl.potentials.ShallowEnergy`, within its ball.

    Feature learning (with a ``feature_rate``): ``z' = sphere(z - a P V(z))`` and ``w' = w exp(-b V)``, then the total
    variation is brought within the bound; ``V`` is the derivative of the loss in the measure. Lazy: ``w' = w - b V``,
    and the root mean square is.

    Args:
        weight_rate: ``b``.
        feature_rate: ``a``; ``None`` for the lazy regime, whose features are fixed.
        bound: Of the norm; none when ``None``.

    Returns:
        An optax transformation for a potential whose trainable parameters are such an energy's.

    Raises:
        TypeError: an argument is no number.
        ValueError: a rate is not finite, or ``bound`` is not finite and positive. At ``init``: the regime is another, or
            there are other parameters.

    Example:
        >>> import ebm_ppl as ebm
        >>> energy = ShallowEnergy(2, key=jax.random.key(0), width=4, signs="negative")
        >>> optimizer = measure_descent(0.1, 0.1, bound=1.0)
        >>> state, rows = ebm.init_train(energy, optimizer), jnp.array([[1.0, 0.0]])
        >>> mean_energy = ebm.objectives.stateless(lambda potential, batch, key: jax.vmap(potential)(batch).mean())
        >>> state, _ = ebm.train_step(state, rows, jax.random.key(1), mean_energy, optimizer)
        >>> round(float(state.potential.norm), 5)
        1.0

    References:
        Domingo-Enrich, Bietti, Gabrie, Bruna, Vanden-Eijnden (2021), arXiv:2107.05134; Chizat, Bach (2018), On the
        global convergence of gradient descent for over-parameterized models using optimal transport, arXiv:1805.09545.
    """
    for name, rate in (("weight_rate", weight_rate), ("feature_rate", feature_rate)):
        if rate is not None and not callable(rate):
            check_one(name, as_floats(name, rate), jnp.isfinite, "a finite number or a schedule")
    is_lazy = feature_rate is None
    last = [] if bound is None else [(mean_square_projection if is_lazy else total_variation_projection)(bound)]
    first = [] if is_lazy else [exponentiated_step()]
    steps: dict[Any, optax.GradientTransformation] = {
        "weights": optax.chain(optax.scale_by_learning_rate(weight_rate), *first, *last)
    }
    if feature_rate is not None:
        steps["features"] = optax.chain(optax.scale_by_learning_rate(feature_rate), sphere_step())

    def labels(params: PyTree) -> PyTree:
        named = jax.tree_util.tree_map_with_path(
            lambda path, _: getattr(path[-1], "name", "?") if path else "?", params
        )
        found = set(jax.tree.leaves(named))
        if found != set(steps):
            regime, remedy = ("lazy", "pass") if is_lazy else ("features", "leave out")
            raise ValueError(
                f"optimizer: measure_descent got parameters {sorted(found)}, expected {sorted(steps)}: a ShallowEnergy of "
                f"the {regime} regime alone. For the other regime {remedy} feature_rate; for a sum with other networks use "
                "optax.partition."
            )
        return named

    return optax.chain(mean_field(), optax.partition(steps, labels))

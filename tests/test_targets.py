"""Targets against numerical quadrature of their densities, and exact samplers against those densities."""

from collections.abc import Callable
from functools import cache, partial
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from scipy.interpolate import PchipInterpolator
from scipy.special import logsumexp

from ebm_ppl import targets
from ebm_ppl.targets.tabulated import TabulatedLaw
from ebm_ppl.testing import cdf_test, t_test_chain_means

NAMES = targets.names()
CONSTRAINED = ("dirichlet", "gamma", "truncated_normal")
NUM_DRAWS = 100_000

# Boxes outside of which the planar densities are below 1e-12 of their peak.
BOXES = {
    "banana": ((-15.0, 15.0), (-10.0, 120.0)),
    "gaussian": ((-7.0, 7.0), (-7.0, 7.0)),
    "grid25": ((-6.5, 6.5), (-6.5, 6.5)),
    "many_well": ((-4.0, 4.0), (-8.5, 8.5)),
    "ring": ((-3.7, 3.7), (-3.7, 3.7)),
    "tilted_normal": ((-4.0, 5.0), (-5.5, 3.5)),
}


# --- quadrature of densities -----------------------------------------------------------------------------------------


class Panels(NamedTuple):
    """A composite Gauss-Legendre rule; nodes and weights have shape ``(panel, order)``."""

    edges: np.ndarray
    nodes: np.ndarray
    weights: np.ndarray


class Oracle(NamedTuple):
    """What quadrature of a density says: log Z, the mean energy, and CDFs of one-dimensional views of the draws."""

    log_normalizer: float
    mean_energy: float
    marginals: dict[str, tuple[Callable, Callable]]


def panels(low: float, high: float, num_panels: int, order: int = 5) -> Panels:
    edges = np.linspace(low, high, num_panels + 1)
    roots, weights = np.polynomial.legendre.leggauss(order)
    half = 0.5 * np.diff(edges)[:, None]
    return Panels(edges, edges[:-1, None] + half * (1.0 + roots), half * weights)


def cdf_from_cells(edges: np.ndarray, masses: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    cumulative = np.concatenate([[0.0], np.cumsum(masses)]) / np.sum(masses)
    with np.errstate(over="ignore"):  # where the CDF is flat, slopes are ratios of rounding errors
        interpolant = PchipInterpolator(edges, cumulative)
    return lambda x: interpolant(np.clip(x, edges[0], edges[-1]))


def evaluate(function: Callable, events: np.ndarray) -> np.ndarray:
    return np.asarray(jax.jit(jax.vmap(function))(jnp.asarray(events)))


def log_weight(target: targets.Target) -> Callable:
    """Unnormalised log density, ``log base - U``."""
    return lambda x: target.logdensity(x) + target.log_normalizer


def scalar_oracle(target: targets.Target) -> Oracle:
    if target.name == "truncated_normal":
        rule, to_event, slope, from_event = panels(-1.0, 2.0, 200), lambda t: t, np.ones_like, lambda x: x
    elif target.name == "gamma":
        rule, to_event, slope, from_event = panels(-30.0, 5.0, 2000), np.exp, np.exp, np.log
    else:  # the whole line, with nodes far out for heavy tails
        rule, to_event, slope, from_event = panels(-12.0, 12.0, 2000), np.sinh, np.cosh, np.arcsinh
    nodes = to_event(rule.nodes)
    masses = np.exp(evaluate(log_weight(target), nodes.ravel()).reshape(nodes.shape)) * slope(rule.nodes) * rule.weights
    total = masses.sum()
    energy = evaluate(target.potential, nodes.ravel()).reshape(nodes.shape)
    for function, exact in target.expectations.values():
        values = np.asarray(function(jnp.asarray(nodes)))
        assert np.sum(values * masses) / total == pytest.approx(exact, abs=1e-8)
    cdf = cdf_from_cells(rule.edges, masses.sum(axis=1))
    mean_energy = np.sum(np.where(masses > 0, energy, 0.0) * masses) / total
    return Oracle(np.log(total), mean_energy, {"x": (lambda x: x, lambda x: cdf(from_event(x)))})


def planar_oracle(target: targets.Target) -> Oracle:
    first, second = (panels(low, high, 160) for low, high in BOXES[target.name])
    mesh = np.stack(np.meshgrid(first.nodes.ravel(), second.nodes.ravel(), indexing="ij"), axis=-1)
    shape = (*first.nodes.shape, *second.nodes.shape)
    log_density = evaluate(log_weight(target), mesh.reshape(-1, 2)).reshape(shape)
    masses = np.exp(log_density) * first.weights[:, :, None, None] * second.weights
    energy = evaluate(target.potential, mesh.reshape(-1, 2)).reshape(shape)
    return Oracle(
        np.log(masses.sum()),
        np.sum(energy * masses) / masses.sum(),
        {
            "x[0]": (lambda x: x[:, 0], cdf_from_cells(first.edges, masses.sum(axis=(1, 2, 3)))),
            "x[1]": (lambda x: x[:, 1], cdf_from_cells(second.edges, masses.sum(axis=(0, 1, 3)))),
        },
    )


def factorised_oracle(target: targets.Target) -> Oracle:
    """For energies that are a sum over orthogonal directions, which is checked first."""
    dim = target.event_shape[0]
    origin = jnp.zeros(dim)
    if target.name.startswith("gaussian"):
        directions = np.linalg.eigh(np.asarray(jax.hessian(target.potential)(origin)))[1].T
    else:
        directions = np.eye(dim)

    at_origin = float(target.potential(origin))
    events = np.random.default_rng(0).normal(size=(20, dim))
    slices = (events @ directions.T)[:, :, None] * directions
    along = evaluate(target.potential, slices.reshape(-1, dim)).reshape(20, dim)
    np.testing.assert_allclose(
        evaluate(target.potential, events), at_origin + (along - at_origin).sum(axis=1), rtol=1e-10, atol=1e-10
    )

    rule = panels(-9.0, 9.0, 300)
    points = rule.nodes[:, :, None] * directions[:, None, None, :]
    energy = evaluate(target.potential, points.reshape(-1, dim)).reshape(dim, *rule.nodes.shape) - at_origin
    masses = np.exp(-energy) * rule.weights
    totals = masses.sum(axis=(1, 2))
    marginals = {
        f"direction {i}": (
            lambda x, i=i: np.asarray(x, np.float64) @ directions[i],
            cdf_from_cells(rule.edges, masses[i].sum(axis=1)),
        )
        for i in range(min(dim, 4))
    }
    mean_energy = at_origin + np.sum((energy * masses).sum(axis=(1, 2)) / totals)
    return Oracle(np.log(totals).sum() - at_origin, mean_energy, marginals)


def funnel_oracle(target: targets.Target) -> Oracle:
    """Given ``v`` the energy is a sum over the other coordinates, which is checked first."""
    rng = np.random.default_rng(0)
    for v in rng.normal(scale=3.0, size=5):
        event = np.concatenate([[v], np.exp(v / 2) * rng.normal(size=9)])
        slices = np.concatenate([np.full((9, 1), v), np.diag(event[1:])], axis=1)
        neck = float(target.potential(jnp.zeros(10).at[0].set(v)))
        along = evaluate(target.potential, slices) - neck
        assert float(target.potential(jnp.asarray(event))) == pytest.approx(neck + along.sum(), rel=1e-10)

    outer, inner = panels(-26.0, 26.0, 60), panels(-9.0, 9.0, 30)
    v, scaled = outer.nodes.ravel(), inner.nodes.ravel()
    events = np.zeros((9, v.size, scaled.size, 10))
    events[..., 0] = v[:, None]
    for i in range(9):
        events[i, :, :, i + 1] = np.exp(v / 2)[:, None] * scaled
    energy = evaluate(target.potential, events.reshape(-1, 10)).reshape(events.shape[:-1])
    neck = evaluate(target.potential, np.pad(v[:, None], ((0, 0), (0, 9))))
    slice_energy = energy - neck[:, None]
    masses = np.exp(-slice_energy + v[:, None] / 2) * inner.weights.ravel()
    totals = masses.sum(axis=2)
    mass_of_v = np.exp(np.log(totals).sum(axis=0) - neck) * outer.weights.ravel()
    probability_of_v = mass_of_v / mass_of_v.sum()
    mean_energy = np.sum(probability_of_v * (neck + ((slice_energy * masses).sum(axis=2) / totals).sum(axis=0)))
    mass_of_scaled = np.einsum("v,vs->s", probability_of_v / totals[0], masses[0]).reshape(inner.nodes.shape)
    return Oracle(
        np.log(mass_of_v.sum()),
        mean_energy,
        {
            "v": (lambda x: x[:, 0], cdf_from_cells(outer.edges, mass_of_v.reshape(outer.nodes.shape).sum(axis=1))),
            "x[1] exp(-v/2)": (
                lambda x: x[:, 1] * np.exp(-x[:, 0] / 2),
                cdf_from_cells(inner.edges, mass_of_scaled.sum(axis=1)),
            ),
        },
    )


def dirichlet_oracle(target: targets.Target) -> Oracle:
    rule = panels(0.0, 1.0, 80)
    s, t = np.meshgrid(rule.nodes.ravel(), rule.nodes.ravel(), indexing="ij")
    weights = np.multiply.outer(rule.weights.ravel(), rule.weights.ravel()) * (1.0 - s)
    marginals = {}
    for i, order in enumerate([(0, 1, 2), (2, 0, 1), (1, 2, 0)]):
        # The triangle as (s, (1 - s) t, (1 - s)(1 - t)), with s in the place of coordinate i.
        events = np.stack([s, (1 - s) * t, (1 - s) * (1 - t)], axis=-1)[..., list(order)].reshape(-1, 3)
        masses = np.exp(evaluate(log_weight(target), events)).reshape(s.shape) * weights
        cells = masses.sum(axis=1).reshape(rule.nodes.shape).sum(axis=1)
        marginals[f"x[{i}]"] = (lambda x, i=i: x[:, i], cdf_from_cells(rule.edges, cells))
    energy = evaluate(target.potential, events).reshape(s.shape)
    return Oracle(np.log(masses.sum()), np.sum(energy * masses) / masses.sum(), marginals)


@cache
def exact_draws(name: str, seed: int) -> np.ndarray:
    """float32 draws, shared by the tests of one target."""
    key = jax.random.fold_in(jax.random.key(seed), NAMES.index(name))
    return np.asarray(targets.get(name).sample(key, NUM_DRAWS))


def oracle(target: targets.Target) -> Oracle:
    if target.name in BOXES:
        return planar_oracle(target)
    special = {"funnel": funnel_oracle, "dirichlet": dirichlet_oracle}
    return special.get(target.name, factorised_oracle if target.event_shape else scalar_oracle)(target)


# --- laws of every target --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_density_and_sampler_agree_with_quadrature(name, seed):
    with jax.enable_x64(True):
        target = targets.get(name)
        exact = oracle(target)
    assert target.log_normalizer == pytest.approx(exact.log_normalizer, abs=1e-6)

    draws = exact_draws(name, seed)
    assert draws.shape == (NUM_DRAWS, *target.event_shape)
    assert draws.dtype == np.float32
    for label, (view, cdf) in exact.marginals.items():
        cdf_test(view(draws), cdf, name=f"{name} {label}").raise_if_failed()
    # The energy involves all coordinates at once, so a wrong dependence between them shows here.
    with jax.enable_x64(True):
        energies = evaluate(target.potential, draws.astype(np.float64))
    t_test_chain_means(energies, exact.mean_energy, name=f"{name} energy").raise_if_failed()
    functions, values = zip(*target.expectations.values(), strict=True)
    columns = evaluate(lambda x: jnp.stack([function(x) for function in functions]), draws)
    for label, column, value in zip(target.expectations, columns.T, values, strict=True):
        t_test_chain_means(column, value, name=f"{name} {label}").raise_if_failed()


def test_tabulated_constants():
    log_normalizers = {
        "banana": 0.0,
        "dirichlet": -8.9306264692,
        "double_well": -0.0535718536,
        "funnel": 0.0,
        "gamma": -1.3862943611,
        "gumbel": 0.0,
        "many_well": 10.2934797071,
        "many_well_32": 164.6956753132,
        "ring": 1.8405248677,
        # sqrt(2 pi) (Phi(2) - Phi(-1)), from a table of the normal law
        "truncated_normal": 0.5 * np.log(2 * np.pi) + np.log(0.977249868051821 - 0.158655253931457),
    }
    for name, value in log_normalizers.items():
        assert targets.get(name).log_normalizer == pytest.approx(value, abs=6e-11), name
    many_well = targets.get("many_well").expectations
    assert targets.get("double_well").expectations["x^2"][1] == pytest.approx(0.9176708607, abs=6e-11)
    assert many_well["x[0]"][1] == pytest.approx(1.18796, abs=6e-6)
    assert many_well["x[0]^2"][1] == pytest.approx(2.95981, abs=6e-6)
    assert many_well["x[0] > 0"][1] == pytest.approx(0.8443071, abs=6e-8)
    assert targets.get("ring").expectations["|x|"][1] == pytest.approx(2.02, abs=1e-12)


@eqx.filter_jit
@partial(jax.vmap, in_axes=(None, 0, 0))
def slopes(potential, x, direction, step=1e-5):
    """Directional derivative by ``jax.grad`` and by central differences."""
    ahead, behind = potential(x + step * direction), potential(x - step * direction)
    return jnp.sum(jax.grad(potential)(x) * direction), (ahead - behind) / (2 * step)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_match_finite_differences(name, key, seed):
    with jax.enable_x64(True):
        target = targets.get(name)
        events = jnp.asarray(exact_draws(name, seed)[:8], jnp.float64)
        for potential, points in (
            (target.potential, events),
            (target.unconstrained_potential, target.unconstrain(events)),
        ):
            directions = jax.random.normal(key, points.shape, points.dtype)
            exact, numeric = slopes(potential, points, directions)
            np.testing.assert_allclose(exact, numeric, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_shapes_precisions_and_support(name, key, seed):
    single = targets.get(name)
    draws = jnp.asarray(exact_draws(name, seed)[:200])
    with jax.enable_x64(True):
        double = targets.get(name)
        assert jax.eval_shape(partial(double.sample, n=3), key).dtype == jnp.float64
        reference = evaluate(double.logdensity, np.asarray(draws, np.float64))
        mixed = double.potential(jnp.asarray(draws[0]))
    assert mixed.dtype == jnp.float32, "a float32 event of a float64 target must not be promoted"

    values = jax.jit(jax.vmap(single.logdensity))(draws)
    assert values.shape == (200,)
    assert values.dtype == jnp.float32
    assert np.all(np.isfinite(values))
    assert np.all(single.support(draws))
    np.testing.assert_allclose(values, reference, rtol=1e-4, atol=2e-4)
    np.testing.assert_allclose(values[7], single.logdensity(draws[7]), rtol=1e-4, atol=1e-4)

    unconstrained = single.unconstrain(draws)
    assert np.all(np.isfinite(unconstrained))
    np.testing.assert_allclose(single.constrain(unconstrained), draws, rtol=1e-4, atol=1e-5)
    if name not in CONSTRAINED:
        np.testing.assert_array_equal(unconstrained, draws)


@pytest.mark.parametrize("name", NAMES)
def test_rebuilding_a_target_does_not_recompile(name, seed):
    traces = []
    event = jnp.asarray(exact_draws(name, seed)[0])

    @eqx.filter_jit
    def energy(potential, x):
        traces.append(None)
        return potential(x)

    for _ in range(2):
        target = targets.get(name)
        energy(target.unconstrained_potential, target.unconstrain(event))
    assert len(traces) == 1


@pytest.mark.parametrize("name", CONSTRAINED)
def test_unconstrained_density_has_the_same_normalizer(name):
    with jax.enable_x64(True):
        target = targets.get(name)
        rule = panels(-30.0, 30.0, 150)
        nodes, weights = rule.nodes.ravel(), rule.weights.ravel()
        if target.event_shape:
            nodes = np.stack(np.meshgrid(nodes, nodes, indexing="ij"), axis=-1).reshape(-1, 2)
            weights = np.multiply.outer(weights, weights).ravel()
        energy = evaluate(target.unconstrained_potential, nodes)
    assert logsumexp(-energy, b=weights) == pytest.approx(target.log_normalizer, abs=1e-6)


@pytest.mark.parametrize(
    ("name", "outside"), [("gamma", -0.5), ("truncated_normal", 2.5), ("dirichlet", (0.5, 0.6, -0.1))]
)
def test_density_is_zero_outside_the_support(name, outside):
    assert targets.get(name).logdensity(jnp.asarray(outside)) == -jnp.inf


@pytest.mark.parametrize("name", ["gaussian", "gamma"])
def test_nan_is_not_hidden_by_the_support(name):
    target = targets.get(name)
    assert np.isnan(target.logdensity(jnp.full(target.event_shape, jnp.nan)))


# --- moving density between base and energy --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["double_well", "tilted_normal"])
def test_base_resplit_changes_nothing(name, seed):
    target = targets.get(name)
    base = dist.Normal(jnp.full(target.event_shape, 0.3), 1.7).to_event(len(target.event_shape))
    split = target.with_base(base)
    draws = exact_draws(name, seed)[:100]
    for view in ("logdensity", "unconstrained_potential"):
        before, after = evaluate(getattr(target, view), draws), evaluate(getattr(split, view), draws)
        np.testing.assert_allclose(after, before, rtol=1e-4, atol=1e-4)
    assert not np.allclose(evaluate(split.potential, draws), evaluate(target.potential, draws))


def test_base_of_another_shape_is_refused():
    target = targets.get("gaussian")
    with pytest.raises(ValueError, match=r"event_shape \(\), expected \(2,\)"):
        target.with_base(dist.Normal(0.0, 1.0))
    with pytest.raises(ValueError, match="batch_shape"):
        targets.get("double_well").with_base(dist.Normal(jnp.zeros(3), 1.0))


# --- registry and constructors ---------------------------------------------------------------------------------------


def test_registry_names_its_targets():
    assert all(targets.get(name).name == name for name in NAMES)
    assert targets.get("gaussian", dim=3).event_shape == (3,)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("gausian", {}, "Did you mean 'gaussian'"),
        ("zzz", {}, "Known targets: banana"),
        ("gaussian", {"dim": 0}, "dim: got 0"),
        ("many_well", {"dim": 3}, "even"),
        ("funnel", {"dim": 1}, "dim: got 1"),
        ("ring", {"radius": 1.0, "width": 0.5}, "radius: got 1.0"),
        ("truncated_normal", {"low": 1.0, "high": 1.0}, "low < high"),
        ("banana", {"scale": -1.0}, "scale"),
    ],
)
def test_wrong_requests_name_the_remedy(name, options, message):
    with pytest.raises(ValueError, match=message):
        targets.get(name, **options)


def test_unknown_option_and_empty_sample_are_refused(key):
    with pytest.raises(TypeError, match="dimension"):
        targets.get("gaussian", dimension=3)
    with pytest.raises(ValueError, match="n: got 0"):
        targets.get("gaussian").sample(key, 0)


def test_ring_has_a_finite_gradient_at_the_origin():
    assert np.all(np.isfinite(jax.grad(targets.get("ring").potential)(jnp.zeros(2))))


def test_gaussian_precision_is_dense_and_well_conditioned():
    precision = np.asarray(targets.get("gaussian_50").potential.precision)
    assert np.all(precision != 0)
    assert np.linalg.cond(precision) < 9


# --- the tabulated law -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("log_density", "low", "high"),
    [
        (lambda x: -4.0 * (x**2 - 1.0) ** 2, -2.5, 2.5),
        (lambda x: 0.5 * x + 6.0 * x**2 - x**4, -4.0, 4.0),
        (lambda x: np.log(x) - 0.5 * ((x - 2.0) / 0.2) ** 2, 0.3, 3.7),
    ],
    ids=["double_well", "many_well", "ring"],
)
def test_tabulated_cdf_error_is_below_its_stated_bound(log_density, low, high):
    law = TabulatedLaw(log_density, low, high)
    # Every grid cell cut in two: the CDF is wrong most at the middle of a cell.
    rule = panels(low, high, 2 * (law.points.size - 1))
    cumulative = np.cumsum(np.sum(np.exp(log_density(rule.nodes)) * rule.weights, axis=1))
    assert np.max(np.abs(law.cdf(rule.edges[1:]) - cumulative / cumulative[-1])) < 1e-6


def test_tabulated_law_refuses_a_cut_density():
    with pytest.raises(ValueError, match="does not vanish"):
        TabulatedLaw(lambda x: -x, 0.0, 10.0)

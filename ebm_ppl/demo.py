"""The main job, end to end: learn an EBM prior from real images, use it in a NumPyro model, diagnose it with ArviZ.

On scikit-learn's 1,797 handwritten 8x8 digits: train an EBM prior by persistent contrastive divergence from a
full-covariance Gaussian base, estimate its log Z for an honest log-likelihood of held-out digits, fill in their missing
half with NUTS, and hand chains and posterior to ArviZ. Run it with ``make demo`` or ``python -m ebm_ppl``.
"""

import functools
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import xarray as xr
from numpyro.distributions.transforms import LowerCholeskyAffine
from numpyro.infer.reparam import TransformReparam
from sklearn.datasets import load_digits

from ebm_ppl import diagnostics, handlers, kernels, normalizer, objectives, plots, potentials
from ebm_ppl.adaptation import tunables, tune_step_size
from ebm_ppl.diagnostics import Estimate, Summary
from ebm_ppl.distributions import EBM
from ebm_ppl.normalizer import LogNormalizer, MeanLogLikelihood
from ebm_ppl.sampling import advance, draw, init_sampler
from ebm_ppl.training import TrainState, fit, init_train
from ebm_ppl.types import Array, Kernel, Key

IMAGE = (8, 8)
NOISE = 0.1
"""Standard deviation of pixel noise, in the data (which are whole grey levels) and in the observations."""

OBSERVED = np.arange(64) < 32
"""The upper half of the image is seen, the lower half is missing."""


class Digits(NamedTuple):
    """Digits as rows of 64 pixels in [-1, 1], and the Gaussian fitted to the training rows.

    Attributes:
        train: Training rows, ``(1437, 64)``.
        held_out: Held-out rows, ``(360, 64)``.
        mean: Mean of the training rows.
        covariance: Their covariance plus the pixel noise.
        whiten: The map ``x = mean + L z`` from white coordinates to pixels.
    """

    train: np.ndarray
    held_out: np.ndarray
    mean: np.ndarray
    covariance: np.ndarray
    whiten: LowerCholeskyAffine


class Result(NamedTuple):
    """What the demo measured; :func:`table` prints it.

    Attributes:
        mse: Mean squared error of the missing pixels on held-out digits, by prior.
        negative_phase: Mixing of the trained EBM's own chains at frozen parameters.
        posterior: Mixing of NUTS over the inpaintings, all digits together.
        digit_rhat: Largest R-hat over the missing pixels of each digit, ``(digit,)``.
        energy_gap: Held-out energy minus energy of the negatives.
        log_normalizer: log Z of the EBM, by tempered SMC.
        log_likelihood: Mean log density of held-out digits, pixel noise included, by prior.
        advantage: Of the EBM over the full-covariance Gaussian on the same digits.
        seconds: Wall time of each part.
    """

    mse: dict[str, float]
    negative_phase: Summary
    posterior: Summary
    digit_rhat: np.ndarray
    energy_gap: Estimate
    log_normalizer: LogNormalizer
    log_likelihood: dict[str, Estimate]
    advantage: MeanLogLikelihood
    seconds: dict[str, float]


def load(seed: int) -> Digits:
    """Split the bundled digits into training and held-out rows and fit a Gaussian to the former."""
    pixels = np.asarray(load_digits(return_X_y=True)[0], np.float32) / 8.0 - 1.0
    order = np.random.default_rng(seed).permutation(len(pixels))
    held_out, train = pixels[order[:360]], pixels[order[360:]]
    mean = train.mean(axis=0)
    covariance = (np.cov(train.T) + NOISE**2 * np.eye(64)).astype(np.float32)
    whiten = LowerCholeskyAffine(jnp.asarray(mean), jnp.linalg.cholesky(jnp.asarray(covariance)))
    return Digits(train, held_out, mean, covariance, whiten)


def train(
    key: Key, digits: Digits, *, kernel: Kernel | None = None, num_updates: int = 2000
) -> tuple[TrainState, dict[str, np.ndarray]]:
    """Train an energy on white coordinates, tilted by a standard normal, with persistent negatives.

    A standard normal in white coordinates is the full-covariance Gaussian in pixels, so the EBM starts at that baseline.

    Args:
        key: Random key.
        digits: From :func:`load`.
        kernel: Moves the negatives; MALA when ``None``. A step size, where it has one, is tuned to acceptance .6.
        num_updates: Training updates.
    """
    net_key, noise_key, chain_key, tune_key, fit_key = jax.random.split(key, 5)
    base = dist.Normal(0.0, 1.0).expand([64]).to_event(1)
    net = potentials.MLP(64, width=256, depth=2, key=net_key)
    potential = potentials.tilt(net, base)
    # Grey levels are whole numbers; without noise a density would chase the gaps between them. Ten noisy copies of each
    # row stand in for fresh noise in every batch.
    copies = jnp.tile(digits.train, (10, 1))
    data = jax.vmap(digits.whiten.inv)(copies + NOISE * jax.random.normal(noise_key, copies.shape))
    sampler = init_sampler(base.sample(chain_key, (256,)), kernels.mala(step_size=0.1) if kernel is None else kernel)
    target_acceptance = 0.6 if "step_size" in tunables(sampler) else None
    if target_acceptance is not None:
        sampler = tune_step_size(tune_key, potential, sampler, target_acceptance)
    optimizer = optax.chain(
        optax.clip_by_global_norm(10.0), optax.adam(optax.cosine_decay_schedule(1e-3, num_updates, 0.05))
    )
    objective = functools.partial(objectives.persistent_contrastive_divergence, num_steps=15)
    state = init_train(potential, optimizer, sampler)
    return fit(
        fit_key,
        state,
        data,
        objective,
        optimizer,
        num_steps=num_updates,
        batch_size=256,
        target_acceptance=target_acceptance,
    )


def inpainting_model(prior: dist.Distribution, observed_pixels: Array) -> None:
    """``x ~ EBM``, ``y ~ Normal(x[observed], noise)``, for many digits at once."""
    with numpyro.plate("digit", observed_pixels.shape[0]):
        x = jnp.asarray(numpyro.sample("x", prior))
        numpyro.sample("y", dist.Normal(x[..., OBSERVED], NOISE).to_event(1), obs=observed_pixels)


def inpaint(
    key: Key,
    prior: dist.Distribution,
    observed_pixels: Array,
    *,
    num_warmup: int = 200,
    num_samples: int = 500,
) -> numpyro.infer.MCMC:
    """Fill in missing pixels with NUTS, four chains; sampling runs in the prior's white coordinates."""
    model = handlers.constant_normalizer(numpyro.handlers.reparam(inpainting_model, config={"x": TransformReparam()}))
    nuts = numpyro.infer.NUTS(model, init_strategy=numpyro.infer.init_to_uniform(radius=1), max_tree_depth=5)
    mcmc = numpyro.infer.MCMC(
        nuts,
        num_warmup=num_warmup,
        num_samples=num_samples,
        num_chains=4,
        chain_method="vectorized",
        progress_bar=False,
    )
    mcmc.run(key, prior, observed_pixels, extra_fields=("num_steps", "accept_prob", "diverging"))
    return mcmc


def gaussian_inpainting(digits: Digits, pixels: np.ndarray) -> np.ndarray:
    """Posterior mean under the full-covariance Gaussian prior and the same observation noise, in closed form."""
    of_observations = digits.covariance[np.ix_(OBSERVED, OBSERVED)] + NOISE**2 * np.eye(OBSERVED.sum())
    gain = np.linalg.solve(of_observations, digits.covariance[OBSERVED])
    return digits.mean + (pixels[:, OBSERVED] - digits.mean[OBSERVED]) @ gain


def log_likelihoods(
    key: Key, prior: EBM, digits: Digits, rows: Array, *, num_particles: int = 512
) -> tuple[LogNormalizer, dict[str, Estimate], MeanLogLikelihood]:
    """Log Z of the prior, log-likelihoods of rows by prior, and how much better than the Gaussian the EBM is.

    Args:
        key: Random key.
        prior: The EBM in white coordinates, where its base is the full-covariance Gaussian.
        digits: From :func:`load`.
        rows: Held-out digits with their noise, in white coordinates.
        num_particles: Of tempered SMC.

    Returns:
        log Z, mean log densities of PIXELS in nats per digit, and the difference between EBM and Gaussian.
    """
    # A wider start than the base: digits are not Gaussian, and some lie further out than its draws.
    wide = dist.Normal(0.0, 1.2).expand([64]).to_event(1)
    kernel = kernels.hmc(step_size=0.2, num_integration_steps=10)
    log_z = normalizer.tempered_smc(key, prior, reference=wide, kernel=kernel, num_particles=num_particles)
    of_pixels = -digits.whiten.log_abs_det_jacobian(rows[0], rows[0])
    pixelwise = dist.Normal(digits.mean, np.sqrt(np.diag(digits.covariance))).to_event(1)
    baselines = {
        "independent Normal": dist.TransformedDistribution(pixelwise, digits.whiten.inv),
        "full-covariance Gaussian": prior.base,
    }
    found = {}
    for name, baseline in baselines.items():
        values = np.asarray(baseline.log_prob(rows), np.float64)
        found[name] = Estimate(float(values.mean() + of_pixels), float(values.std(ddof=1) / np.sqrt(values.size)))
    mean = normalizer.log_likelihood(prior, rows, log_z)
    found["EBM"] = Estimate(float(mean.value + of_pixels), float(mean.standard_error))
    return log_z, found, normalizer.compare_log_likelihoods(prior, prior.base, rows, first_log_normalizer=log_z)


def run(
    seed: int = 0,
    output: str | Path = "outputs/demo",
    *,
    kernel: Kernel | None = None,
    num_updates: int = 2000,
    num_digits: int = 150,
    num_samples: int = 500,
    num_particles: int = 512,
) -> Result:
    """Run the whole job, write its figures and DataTree to ``output``, and return what it measured.

    Args:
        seed: Of the split and of every random key.
        output: Folder for ``digits.png``, ``rank.png`` and ``demo.nc``.
        kernel: Moves the negatives in training; MALA when ``None``.
        num_updates: Training updates.
        num_digits: Held-out digits to fill in.
        num_samples: NUTS draws per chain, after 200 of warm-up.
        num_particles: Particles behind log Z.
    """
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    seconds: dict[str, float] = {}
    train_key, tune_key, settle_key, chain_key, nuts_key = jax.random.split(jax.random.key(seed), 5)
    smc_key = jax.random.fold_in(chain_key, 1)
    digits = load(seed)

    print(f"Training the EBM prior on {len(digits.train)} digits ...", flush=True)
    start = time.perf_counter()
    state, history = train(train_key, digits, kernel=kernel, num_updates=num_updates)
    seconds["training"] = time.perf_counter() - start

    print("Running its chains at frozen parameters ...", flush=True)
    start = time.perf_counter()
    # Longer moves than training needs: another kernel on half of the persistent chains is one changed argument.
    sampler = init_sampler(state.sampler.position[:128], kernels.hmc(step_size=0.2, num_integration_steps=15))
    sampler = tune_step_size(tune_key, state.potential, sampler, target_acceptance=0.8)
    sampler, _ = advance(settle_key, state.potential, sampler, 200)
    sampler, draws = draw(chain_key, state.potential, sampler, 100, num_steps=20)
    noisy = digits.held_out + NOISE * np.random.default_rng(seed).normal(size=(360, 64))
    held_out = jnp.asarray(digits.whiten.inv(noisy))
    gap = diagnostics.energy_gap(state.potential, held_out, draws)
    seconds["negative phase"] = time.perf_counter() - start

    print("Estimating its log Z by tempered SMC ...", flush=True)
    start = time.perf_counter()
    white_prior = EBM(state.potential.potential, dist.Normal(0.0, 1.0).expand([64]).to_event(1))
    log_z, likelihoods, advantage = log_likelihoods(smc_key, white_prior, digits, held_out, num_particles=num_particles)
    seconds["log Z"] = time.perf_counter() - start

    print(f"Filling in the lower half of {num_digits} held-out digits with NUTS ...", flush=True)
    start = time.perf_counter()
    prior = dist.TransformedDistribution(white_prior, digits.whiten)
    truth = digits.held_out[:num_digits]
    mcmc = inpaint(nuts_key, prior, jnp.asarray(truth[:, OBSERVED]), num_samples=num_samples)
    filled = {
        "independent Normal": np.where(OBSERVED, truth, digits.mean),
        "full-covariance Gaussian": gaussian_inpainting(digits, truth),
        "EBM": np.asarray(mcmc.get_samples()["x"].mean(axis=0)),
    }
    seconds["NUTS"] = time.perf_counter() - start

    print("Handing chains and posterior to ArviZ ...", flush=True)
    start = time.perf_counter()
    tree = diagnostics.to_datatree(
        draws, site="x_base", sampler=sampler, history=history, posterior=mcmc, attrs={"seed": seed}
    )
    result = Result(
        mse={name: float(np.mean((image - truth)[:, ~OBSERVED] ** 2)) for name, image in filled.items()},
        negative_phase=diagnostics.summary(tree),
        posterior=diagnostics.summary(tree, group="posterior", var_names=["x"]),
        digit_rhat=diagnostics.rhat(mcmc.get_samples(group_by_chain=True)["x"][..., ~OBSERVED]).max(axis=-1),
        energy_gap=gap,
        log_normalizer=log_z,
        log_likelihood=likelihoods,
        advantage=advantage,
        seconds=seconds,
    )
    _thinned(tree).to_netcdf(output / "demo.nc", engine="h5netcdf")
    plots.rank(tree).savefig(output / "rank.png", dpi=150)
    _figure(digits, draws.position[:, -1], truth, filled, mcmc).savefig(output / "digits.png", dpi=150)
    seconds["ArviZ and figures"] = time.perf_counter() - start
    return result


def _thinned(tree: xr.DataTree) -> xr.DataTree:
    """A tree of a few megabytes: every fifth draw of the inpaintings, and their white coordinates left out."""
    tree = tree.copy()
    tree["posterior"] = xr.DataTree(tree["posterior"].to_dataset()[["x"]].isel(draw=slice(None, None, 5)))
    return tree


def _figure(digits: Digits, negatives: Array, truth: np.ndarray, filled: dict, mcmc: numpyro.infer.MCMC):
    def images(rows: Any) -> np.ndarray:
        return np.asarray(rows).reshape(-1, *IMAGE)

    rows = {
        "truth": images(truth),
        "seen": images(np.where(OBSERVED, truth, np.nan)),
        "Gaussian": images(filled["full-covariance Gaussian"]),
        "EBM mean": images(filled["EBM"]),
        "EBM draw": images(mcmc.get_samples()["x"][-1]),
    }
    return plots.inpainting(images(digits.train[:60]), images(digits.whiten(negatives[:60])), rows)


def table(result: Result) -> str:
    """The one table of the demo."""
    ebm, gaussian = result.mse["EBM"], result.mse["full-covariance Gaussian"]
    lines = ["", "Held-out inpainting, mean squared error of the missing lower half (pixels in [-1, 1])"]
    lines += [f"  {name + ' prior':<32}{value:>8.4f}" for name, value in result.mse.items()]
    lines += [f"  {'EBM against Gaussian':<32}{100 * (ebm / gaussian - 1):>7.1f}%", ""]
    lines += ["Held-out log-likelihood, nats per digit of 64 pixels with noise 0.1 (± standard error)"]
    for name, estimate in result.log_likelihood.items():
        lines.append(f"  {name + ' prior':<32}{estimate.value:>8.1f} ± {estimate.standard_error:.1f}")
    lines += [
        f"  {'EBM minus Gaussian, paired':<32}{result.advantage.value:>8.1f} ± {result.advantage.standard_error:.1f}"
    ]
    lines += [f"  {result.log_normalizer!r}, by tempered SMC", ""]
    lines += [f"{'Sampler':<36}{'EBM chains (HMC)':>20}{'inpaintings (NUTS)':>20}"]
    phases = (result.negative_phase, result.posterior)
    rows = {
        "chains x draws": [f"{s.num_chains} x {s.num_draws}" for s in phases],
        "acceptance": [f"{s.acceptance_rate:.3f}" for s in phases],
        "R-hat (largest)": [f"{s.rhat:.3f}" for s in phases],
        "bulk ESS (smallest)": [f"{s.ess_bulk:.0f}" for s in phases],
        "bulk ESS per 1,000 gradients": [f"{1e3 * s.ess_per_gradient:.3g}" for s in phases],
        "digits with R-hat <= 1.01 / 1.05": [
            "-",
            f"{(result.digit_rhat <= 1.01).sum()} / {(result.digit_rhat <= 1.05).sum()} of {len(result.digit_rhat)}",
        ],
        "energy gap, held-out - chains": [str(result.energy_gap), "-"],
        "mixing": [s.mixing for s in phases],
    }
    lines += [f"  {name:<34}{left:>20}{right:>20}" for name, (left, right) in rows.items()]
    lines += [f"  mixing of the EBM chains: {phases[0].reason}", f"  mixing of the inpaintings: {phases[1].reason}", ""]
    lines += ["Seconds: " + ", ".join(f"{name} {value:.0f}" for name, value in result.seconds.items())]
    return "\n".join(lines)

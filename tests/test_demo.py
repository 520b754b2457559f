"""The main job: its parts against closed forms, a reduced run end to end, and the promised margin on three seeds."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
import xarray as xr

import ebm_ppl as ebm
from ebm_ppl import __main__ as command_line
from ebm_ppl import demo
from ebm_ppl.testing import t_test_chain_means


def prior_of(net, digits):
    base = dist.Normal(0.0, 1.0).expand([64]).to_event(1)
    return dist.TransformedDistribution(ebm.EBM(net, base), digits.whiten)


@pytest.mark.slow
def test_an_untrained_prior_is_the_gaussian_and_nuts_finds_its_closed_form(key):
    """Zero energy leaves the full-covariance Gaussian, whose posterior mean is known exactly."""
    digits = demo.load(0)
    truth = digits.held_out[:3]
    net = ebm.potentials.MLP(64, key=key, width=8, depth=1)
    means = []
    for run in range(4):
        mcmc = demo.inpaint(
            jax.random.fold_in(key, run), prior_of(net, digits), jnp.asarray(truth[:, demo.OBSERVED]), num_samples=300
        )
        means.append(np.asarray(mcmc.get_samples(group_by_chain=True)["x"].mean(axis=1)))
    means = np.concatenate(means)  # 16 independent chains, (chain, digit, pixel)
    exact = demo.gaussian_inpainting(digits, truth)
    # A few projections, not all 192 pixels: each is a check against the suite's budget.
    for name, weights in {"mean missing pixel": ~demo.OBSERVED, "mean seen pixel": demo.OBSERVED}.items():
        for digit in range(3):
            check = t_test_chain_means(
                means[:, digit, weights].mean(axis=1), float(exact[digit, weights].mean()), name=name
            )
            check.raise_if_failed()
    assert np.abs(means.mean(axis=0) - exact).max() < 0.1


def test_the_gaussian_baseline_is_the_conditional_mean_of_the_joint_gaussian():
    digits = demo.load(1)
    filled = demo.gaussian_inpainting(digits, digits.held_out[:5])
    # The same posterior in information form: precision of the prior plus that of the observations.
    precision = np.linalg.inv(digits.covariance.astype(np.float64)) + np.diag(demo.OBSERVED / demo.NOISE**2)
    residual = np.where(demo.OBSERVED, digits.held_out[:5] - digits.mean, 0.0) / demo.NOISE**2
    np.testing.assert_allclose(filled, digits.mean + np.linalg.solve(precision, residual.T).T, atol=1e-3)


@pytest.mark.slow
def test_an_untrained_ebm_explains_pixels_as_well_as_the_gaussian(key):
    """Zero energy: log Z is 0 and all three numbers have closed forms, in pixels."""
    digits = demo.load(0)
    net = ebm.potentials.MLP(64, key=key, width=8, depth=1)
    prior = ebm.EBM(net, dist.Normal(0.0, 1.0).expand([64]).to_event(1))
    pixels = digits.held_out[:50] + demo.NOISE
    log_z, found, advantage = demo.log_likelihoods(
        key, prior, digits, jnp.asarray(digits.whiten.inv(pixels)), num_particles=64
    )
    covariance = digits.covariance.astype(np.float64)
    residual = pixels - digits.mean
    constant = 32 * np.log(2 * np.pi)
    squares = np.sum(residual * np.linalg.solve(covariance, residual.T).T, axis=1)
    gaussian = -0.5 * squares - 0.5 * np.linalg.slogdet(covariance)[1] - constant
    variance = np.diag(covariance)
    independent = -0.5 * np.sum(residual**2 / variance + np.log(variance), axis=1) - constant
    np.testing.assert_allclose(found["full-covariance Gaussian"].value, gaussian.mean(), rtol=1e-3)
    np.testing.assert_allclose(found["independent Normal"].value, independent.mean(), rtol=1e-3)
    np.testing.assert_allclose(found["EBM"].value + float(log_z.value), gaussian.mean(), rtol=1e-3)
    assert abs(advantage.value) < 5 * log_z.standard_error
    np.testing.assert_allclose(advantage.value, -log_z.value, atol=1e-4)


def test_no_held_out_digit_is_trained_on():
    digits = demo.load(0)
    train = {row.tobytes() for row in digits.train}
    assert len(digits.train) + len(digits.held_out) == 1797
    assert not any(row.tobytes() in train for row in digits.held_out)


def test_a_reduced_run_end_to_end(tmp_path, monkeypatch, capsys):
    arguments = [
        "ebm_ppl",
        "--updates",
        "30",
        "--digits",
        "3",
        "--samples",
        "40",
        "--particles",
        "64",
        "--output",
        str(tmp_path),
    ]
    monkeypatch.setattr("sys.argv", arguments)
    command_line.main()
    printed = capsys.readouterr().out
    assert "full-covariance Gaussian prior" in printed
    assert "mixing of the EBM chains" in printed
    assert "EBM minus Gaussian, paired" in printed
    assert "log Z = " in printed
    assert {path.name for path in tmp_path.iterdir()} == {"digits.png", "rank.png", "demo.nc"}
    assert (tmp_path / "digits.png").stat().st_size > 20_000
    tree = xr.open_datatree(tmp_path / "demo.nc", engine="h5netcdf")
    assert set(tree.children) >= {"negative_phase", "negative_phase_stats", "training", "posterior", "sample_stats"}
    assert tree["training"].sizes["step"] == 30
    assert tree["posterior"]["x"].shape == (4, 8, 3, 64)
    assert tree.attrs["inference_library"] == "ebm_ppl"


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_ebm_prior_beats_the_full_covariance_gaussian_by_a_quarter(seed):
    digits = demo.load(seed)
    train_key, nuts_key = jax.random.split(jax.random.key(seed))
    state, _ = demo.train(train_key, digits)
    truth = digits.held_out[:150]
    mcmc = demo.inpaint(
        nuts_key, prior_of(state.potential.potential, digits), jnp.asarray(truth[:, demo.OBSERVED]), num_samples=300
    )

    def mse(filled):
        return np.mean((np.asarray(filled) - truth)[:, ~demo.OBSERVED] ** 2)

    ours, gaussian = mse(mcmc.get_samples()["x"].mean(axis=0)), mse(demo.gaussian_inpainting(digits, truth))
    print(f"seed {seed}: EBM {ours:.4f}, Gaussian {gaussian:.4f}, {100 * (ours / gaussian - 1):.1f} %")
    assert ours <= 0.75 * gaussian


@pytest.mark.slow
@pytest.mark.parametrize(
    "kernel",
    [
        ebm.kernels.hmc(step_size=0.1, num_integration_steps=3),
        ebm.kernels.isir(dist.Normal(0.0, 1.0).expand([64]).to_event(1), num_proposals=8),
        ebm.kernels.replica_exchange([1.0, 0.8], inner=ebm.kernels.mala(step_size=0.1)),
        ebm.kernels.tempered_smc(inner=ebm.kernels.mala(step_size=0.1), num_steps=1),
    ],
    ids=["hmc", "isir", "replica_exchange", "tempered_smc"],
)
def test_another_sampler_is_one_argument(key, kernel):
    state, history = demo.train(key, demo.load(0), kernel=kernel, num_updates=3)
    assert np.isfinite(history["energy_gap"]).all()
    assert np.isfinite(np.asarray(state.sampler.position)).all()

"""``python -m ebm_ppl check``: what it prints, what it writes, and what it refuses."""

import argparse
import re
import subprocess
import sys
from pathlib import Path

import pytest

import ebm_ppl as ebm
from ebm_ppl import command

FILE = """
from __future__ import annotations

import dataclasses, functools
import jax, numpyro, numpyro.distributions as dist, optax
import ebm_ppl as ebm

base = dist.Normal(0.0, 1.0).expand([2]).to_event(1)
truth = {truth}


def data():
    return 0.5**0.5 * jax.random.normal(jax.random.key(1), (1000, 2)) + truth


def energy(x):
    return 0.5 * (x**2).sum()


def state():
    draws = 0.5**0.5 * jax.random.normal(jax.random.key(2), (64, 2))
    sampler = ebm.init_sampler(draws, ebm.kernels.mala(step_size=0.5))
    return ebm.init_train(ebm.potentials.tilt(ebm.potentials.MLP(2, key=jax.random.key(0), width=4, depth=1), base),
                          optax.adam(1e-2), sampler)


def without_chains():
    return state()._replace(sampler=None)


def model(x):
    scale = numpyro.sample("scale", dist.LogNormal())
    numpyro.sample("x", ebm.EBM(lambda x: scale * (x**2).sum(), base), obs=x)


def dropped(x):
    return ebm.handlers.constant_normalizer(model)(x)


wrong = ebm.handlers.constant_normalizer(model)


@functools.cache
def arguments():
    return (data()[0],)


def factory():
    return wrong


@dataclasses.dataclass
class Options:  # which looks up its own module
    scale: float = 1.0
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "wells.py"
    path.write_text(FILE.replace("{truth}", "0.0"))
    return path


def run(*options):
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.check(parser.parse_args([str(option) for option in options]))


def test_roles_are_printed_and_written(file, tmp_path, capsys):
    page = tmp_path / "report.html"
    assert run(f"{file}:model", "--args", "arguments", "--html", page) == 0
    printed = capsys.readouterr().out
    assert "site 'x': doubly intractable" in printed
    text = page.read_text()
    assert "infer.Exchange" in text
    assert "<h2>Diagnosis</h2>" not in text
    assert "&#x27;x&#x27;" in text  # escaped


def test_a_wrong_policy_is_a_failure(file, capsys):
    assert run(f"{file}:wrong", "--args", "arguments") == 1
    assert "constant_normalizer" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["wells:model"], "expected a Python file and a name in it"),
        (["nowhere.py:model"], "there is no file"),
        (["{file}:nothing"], "has no 'nothing', expected one of .*model"),
        (["{file}:model", "--args", "base"], "expected a tuple"),
        (["{file}:model", "--args", "energy"], "energy: got a function with arguments"),
        (["{file}:model", "--args", "arguments", "--checkpoint", "{file}"], "--checkpoint: "),
        (["{file}:model", "--args", "arguments", "--checkpoint", "nowhere"], "--checkpoint: "),
        (["{file}:model"], "--args: they do not fit model"),
        (["{file}:truth"], "truth: got float, expected a NumPyro model"),
        (["{file}:base"], "base: got Independent, expected a NumPyro model"),
        (["{file}:factory"], "factory: it has no EBM site"),
        (["{file}:model", "--html", "nowhere/report.html"], "--html: got nowhere/report.html"),
        (
            ["{file}:model", "--args", "arguments", "--checkpoint", "x", "--state", "base"],
            "--state: base is not the result of ebm.init_train",
        ),
    ],
)
def test_what_is_not_there_is_named(file, options, message, capsys):
    assert run(*(option.replace("{file}", str(file)) for option in options)) == 2
    assert re.search(message, capsys.readouterr().err)


def test_a_state_without_chains_is_refused(file, tmp_path, capsys):
    options = ["--args", "arguments", "--checkpoint", tmp_path / "any", "--state", "without_chains"]
    assert run(f"{file}:model", *options) == 2
    assert "with a sampler" in capsys.readouterr().err


def test_a_file_of_a_package_is_refused(file, capsys):
    (file.parent / "__init__.py").touch()
    assert run(f"{file}:model", "--args", "arguments") == 2
    assert "part of a package" in capsys.readouterr().err


def test_the_demo_and_its_options_are_still_there():
    shown = subprocess.run([sys.executable, "-m", "ebm_ppl", "--help"], capture_output=True, text=True, check=True)
    assert "--updates" in shown.stdout
    assert re.search(r"check +what the EBM sites", shown.stdout)


@pytest.mark.slow
@pytest.mark.parametrize(("truth", "status"), [("0.0", 0), ("2.0", 1)])
def test_a_saved_run_is_diagnosed(tmp_path, capsys, truth, status):
    """The energy is zero before training: the model is its base, whose draws are wider than these rows."""
    file: Path = tmp_path / "wells.py"
    text = FILE.replace("{truth}", truth).replace("0.5**0.5 *", "1.0 *")  # draws of the base
    file.write_text(text.replace("step_size=0.5", "step_size=1.0"))
    namespace = {}
    exec(file.read_text(), namespace)
    saved, page = tmp_path / "run.safetensors", tmp_path / "report.html"
    ebm.checkpoint.save(saved, namespace["state"]())
    options = ["--args", "arguments", "--checkpoint", saved, "--budget", 150_000, "--html", page]
    assert run(f"{file}:model", *options) == status
    printed, shown = capsys.readouterr().out, page.read_text()
    assert f"model:   {'fail' if status else 'pass'}" in printed
    assert shown.count("data:image/png;base64,") == 2
    assert shown.count("log_z_gap") >= 1

"""The README does what it says: its code runs, and its table has the form that the demo prints."""

import re
from pathlib import Path

import numpy as np

README = (Path(__file__).parent.parent / "README.md").read_text()


def test_the_example_runs_and_learns_the_ring(capsys):
    (code,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len([line for line in code.splitlines() if line.strip() and not line.startswith("#")]) <= 25
    names: dict = {}
    exec(compile(code, "README.md", "exec"), names)
    assert "mixing" in capsys.readouterr().out
    # The ring has radius 2 and width .2: mean radius 2.02, standard deviation .20.
    radius = np.linalg.norm(np.asarray(names["draws"].position), axis=-1)
    assert abs(radius.mean() - 2.02) < 0.05
    assert abs(radius.std() - 0.2) < 0.05
    # x[0] was observed near 2; the prior then leaves x[1] near 0, within the width of the visible arc.
    posterior = np.asarray(names["mcmc"].get_samples()["x"])
    assert abs(posterior[:, 0].mean() - 1.9) < 0.2
    assert abs(posterior[:, 1].mean()) < 0.5


def test_the_printed_table_says_what_the_demo_says():
    from ebm_ppl import demo
    from ebm_ppl.diagnostics import Estimate, Summary
    from ebm_ppl.normalizer import LogNormalizer, MeanLogLikelihood

    log_z = LogNormalizer(*map(np.array, (4.6, 0.06, 170.0, np.nan, 1000, True)))
    mean = Estimate(-12.0, 0.6)
    phase = Summary(4, 100, 1.0, 500.0, 0.1, 5000, 0.8, 0.0, 0, 0, "yes", "R-hat 1.000")
    result = demo.Result(
        mse={"independent Normal": 0.3, "full-covariance Gaussian": 0.2, "EBM": 0.1},
        negative_phase=phase,
        posterior=phase,
        digit_rhat=np.ones(4),
        energy_gap=Estimate(0.0, 1.0),
        log_normalizer=log_z,
        log_likelihood={"independent Normal": mean, "full-covariance Gaussian": mean, "EBM": mean},
        advantage=MeanLogLikelihood(*map(np.array, (13.0, 0.4, 0.4, 0.06, 360, True))),
        seconds={},
    )

    def labels(text):
        return [re.split(r"\s{2,}", line.strip())[0] for line in text.splitlines() if line.strip()]

    (printed,) = re.findall(r"```text\n(.*?)```", README, flags=re.DOTALL)
    for label in labels(demo.table(result)):
        # The lines of reasons, of log Z and the seconds carry their numbers in the text.
        assert label.split(":")[0].split(",")[0].split("=")[0] in printed

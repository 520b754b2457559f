"""The benchmarks of speed compare like with like: the loop by hand trains as the package does, and clocks are right."""

import functools
import json
import subprocess
import sys
import types

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ebm_ppl as ebm
from tests.benchmarks import _by_hand as by_hand
from tests.benchmarks import _environments, _paired, against_thrml, against_torchebm, svi_speed, training_speed

OPTIMIZER = optax.adam(1e-2)


def at_rest(potential, sampler, batch, key):
    """The contrastive objective with the chains as negatives, where they are."""
    info = ebm.advance(key, potential, sampler, 1)[1]
    loss, metrics = ebm.objectives.contrastive.energy_gap(potential, batch, sampler, info)
    return loss, (sampler, metrics)


CASES = {"planar": training_speed.planar(16, 32, 2), "digits": training_speed.digits(32, 2)}


@pytest.mark.parametrize("name", CASES)
def test_the_energy_by_hand_is_that_of_the_package_up_to_a_constant(name):
    case = CASES[name]
    ours = jax.vmap(case.potential)(case.rows[:20])
    by_us = jax.vmap(case.energy, (None, 0))(case.parameters, case.rows[:20])
    np.testing.assert_allclose(ours - ours[0], by_us - by_us[0], rtol=1e-4, atol=1e-4)
    assert float(jnp.std(by_us)) > 0.1


@pytest.mark.parametrize("name", CASES)
def test_the_first_update_by_hand_is_that_of_the_package(name):
    case = CASES[name]
    batch = case.rows[:32]
    sampler = ebm.init_sampler(case.chains, ebm.kernels.mala(step_size=0.1))
    state = ebm.init_train(case.potential, OPTIMIZER, sampler)
    after, metrics = eqx.filter_jit(ebm.train_step)(state, batch, jax.random.key(0), at_rest, OPTIMIZER)
    parameters, _, loss = eqx.filter_jit(by_hand.descend)(
        case.energy, OPTIMIZER, case.parameters, OPTIMIZER.init(case.parameters), batch, case.chains
    )
    read = {"planar": by_hand.mlp_parameters, "digits": by_hand.conv_parameters}[name]
    assert float(loss) == pytest.approx(float(metrics["loss"]), abs=1e-4)
    found, before = jax.tree.leaves(read(after.potential.potential)), jax.tree.leaves(case.parameters)
    for ours, theirs, old in zip(found, jax.tree.leaves(parameters), before, strict=True):
        assert float(jnp.abs(ours - old).max()) > 5e-3  # Adam's first step is about its rate
        np.testing.assert_allclose(ours, theirs, atol=1e-3)


@pytest.mark.parametrize("move", by_hand.MOVES)
def test_moves_by_hand_and_of_the_package_have_the_same_law(move):
    """One step from one point, 40,000 chains each: moments agree within six standard errors."""
    case, step_size = CASES["planar"], 0.3
    chains = jnp.tile(jnp.array([[0.7, -1.2]]), (40_000, 1))
    by_us = by_hand.MOVES[move](jax.random.key(1), case.energy, case.parameters, chains, 1, step_size)
    sampler = ebm.init_sampler(chains, training_speed.KERNELS[move](step_size=step_size))
    ours = ebm.advance(jax.random.key(2), case.potential, sampler, 1)[0].position
    kept = [jnp.mean((x == chains).all(axis=1)) for x in (by_us, ours)]
    assert (0.02 < float(kept[0]) < 0.9) == (move == "mala")
    for statistic in (lambda x: x, lambda x: x**2, lambda x: (x == chains).astype(float)):
        one, other = np.asarray(statistic(by_us)), np.asarray(statistic(ours))
        error = np.sqrt((one.var(axis=0) + other.var(axis=0)) / len(chains)) + 1e-9
        assert (np.abs(one.mean(axis=0) - other.mean(axis=0)) < 6.0 * error).all()


def test_the_loop_by_hand_sees_every_row_once_an_epoch_and_learns():
    case = CASES["planar"]
    seen = []

    def energy(parameters, event):
        jax.debug.callback(lambda x: seen.append(np.asarray(x)), event)
        return case.energy(parameters, event)

    options = {"energy": energy, "move": "ula", "num_steps": 0, "step_size": 0.1, "batch_size": 32}
    loop = by_hand.begin(jax.random.key(0), case.parameters, case.chains, case.rows, OPTIMIZER)
    by_hand.train(loop, case.rows, optimizer=OPTIMIZER, num_updates=8, **options)
    jax.effects_barrier()
    chains = {row.tobytes() for row in np.asarray(case.chains)}
    rows = [x.tobytes() for x in seen if x.tobytes() not in chains]
    assert {rows.count(x.tobytes()) for x in np.asarray(case.rows)} == {1}

    options |= {"energy": case.energy, "num_steps": 5}
    loop, losses = by_hand.train(loop, case.rows, optimizer=OPTIMIZER, num_updates=150, **options)
    assert int(loop.step) == 150
    gap = lambda parameters: float(jax.vmap(case.energy, (None, 0))(parameters, case.rows).mean())
    assert jnp.isfinite(losses).all()
    assert gap(loop.parameters) != pytest.approx(gap(case.parameters), abs=0.1)


@pytest.mark.parametrize("number", [0, 1, 7])
def test_bare_gradients_are_as_many_as_asked_for(number):
    """Of ``|x|^2 / 2`` each shrinks the chains by a thousandth."""
    found = by_hand.bare_gradients(lambda x: 0.5 * jnp.sum(x**2), jnp.ones((3, 2)), number)
    np.testing.assert_allclose(found, 0.999**number, rtol=1e-6)


@pytest.fixture
def clock(monkeypatch):
    """A clock that only contenders move."""
    now = types.SimpleNamespace(seconds=0.0)
    monkeypatch.setattr(_paired, "time", types.SimpleNamespace(perf_counter=lambda: now.seconds))
    return now


def contender(clock, calls, name, seconds):
    def run():
        calls.append(name)
        clock.seconds += seconds

    return run


def test_contenders_take_turns_in_both_orders(clock):
    calls = []
    seconds = _paired.in_turns(
        {name: contender(clock, calls, name, s) for name, s in (("a", 1.0), ("b", 3.0))}, turns=4, warm_up=1
    )
    assert "".join(calls) == "ab" + "abbaabba"
    assert _paired.ratio(seconds["b"], seconds["a"]) == {"median": 3.0, "lower_quartile": 3.0, "upper_quartile": 3.0}


def test_the_clock_of_fit_stands_still_while_others_run(clock):
    calls, case = [], CASES["planar"]
    state = ebm.init_train(case.potential, OPTIMIZER, ebm.init_sampler(case.chains, ebm.kernels.mala(step_size=0.1)))
    objective = functools.partial(ebm.objectives.persistent_contrastive_divergence, num_steps=1)
    seconds = _paired.in_turns_with_fit(
        {name: contender(clock, calls, name, s) for name, s in (("a", 1.0), ("b", 3.0))},
        *(jax.random.key(0), state, case.rows, objective, OPTIMIZER),
        chunk=2,
        turns=3,
        warm_up=1,
        batch_size=32,
    )
    assert seconds == {"fit": [0.0] * 3, "a": [1.0] * 3, "b": [3.0] * 3}
    assert calls in (list("abbaabba"), list("baabbaab"))


def test_reports_are_ratios_that_exist():
    case = CASES["planar"]
    updates = training_speed.compare_updates(case, "ula", 3)
    phases = training_speed.compare_phases(case, ebm.kernels.unadjusted_langevin(0.01), 3)
    svi = svi_speed.compare(8, 16, 2, 3)
    assert phases["gradients_per_phase"] in (10, 11)
    for found in (updates["speed_against_hand"], phases["over_as_many_gradients"], svi["svi_over_fit"]):
        assert 0.0 < found["lower_quartile"] <= found["median"] <= found["upper_quartile"] < np.inf


# --- Other environments ---------------------------------------------------------------------------------------------


def test_an_environment_that_cannot_be_made_is_reported_and_never_skipped(monkeypatch, tmp_path):
    failed = subprocess.CompletedProcess([], 1, "", "no network here")
    monkeypatch.setattr(_environments.subprocess, "run", lambda *args, **options: failed)
    monkeypatch.setattr(_environments, "ENVIRONMENTS", tmp_path)
    with pytest.raises(_environments.Unavailable, match="no network here"):
        _environments.interpreter(_environments.TORCHEBM)
    for benchmark, name in ((against_torchebm, "torchebm"), (against_thrml, "thrml")):
        result = benchmark.run()
        assert result["met"] is False
        assert result[name].startswith("not available")
        assert "no network here" in result[name]


def test_an_environment_is_made_once_for_its_pins(monkeypatch, tmp_path):
    commands = []

    def run(command, **options):
        commands.append(command)
        (tmp_path / "peer").mkdir(exist_ok=True)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(_environments, "ENVIRONMENTS", tmp_path)
    monkeypatch.setattr(_environments.subprocess, "run", run)
    for pins, made in ((("a==1",), 2), (("a==1",), 2), (("a==2",), 4)):
        _environments.interpreter(_environments.Requirements("peer", pins))
        assert len(commands) == made
    assert commands[-1][-1] == "a==2"


ECHO = """
import sys
print('{"v": "1"}', flush=True)
for line in sys.stdin:
    print(line, end="", flush=True)
    if "stop" in line:
        sys.exit(3)
"""


def test_a_peer_answers_until_its_input_ends(monkeypatch, tmp_path):
    (tmp_path / "echo.py").write_text(ECHO)
    monkeypatch.setattr(_environments, "SCRIPTS", tmp_path)
    monkeypatch.setattr(_environments, "interpreter", lambda requirements: sys.executable)
    with _environments.Peer(_environments.THRML, "echo.py") as peer:
        assert peer.versions == {"v": "1"}
        assert peer.ask(chains=3) == {"chains": 3}
        peer.ask(stop=True)
        with pytest.raises(_environments.Unavailable, match="status 3"):
            peer.ask(chains=4)


def test_the_correlation_of_neighbours_is_known_and_a_wrong_law_is_refused():
    """On a 4x4 torus at weak coupling the infinite lattice is all but exact; enumeration says so."""
    assert against_thrml.exact_correlation(0.05) == pytest.approx(np.tanh(0.05) + 2 * np.tanh(0.05) ** 3, abs=1e-5)
    assert against_thrml.exact_correlation(0.3) == pytest.approx(0.35225, abs=1e-5)
    spins = np.indices((32, 32)).sum(axis=0)[None] % 2 * 2 - 1
    assert against_thrml.correlation(spins) == -1.0
    with pytest.raises(RuntimeError, match=r"thrml: neighbours correlate by 0\.4"):
        against_thrml.check_law(64, {"neighbour_correlation": {"here": 0.3523, "thrml": 0.4}})


def test_the_questions_for_the_peers_have_a_json_form():
    case = against_torchebm.peer_case("hmc", (64, 256), 3)
    assert json.loads(json.dumps(case)) == case | {"steps": 10}

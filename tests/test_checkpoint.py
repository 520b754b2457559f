"""States on disk: what is saved comes back to the last bit, and what is not that state is refused by name."""

import json
import os
import pickle
import struct
import subprocess
import sys
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import optax
import pytest
from safetensors.numpy import save_file

import ebm_ppl as ebm
from ebm_ppl.checkpoint import storage
from ebm_ppl.checkpoint.manifest import FORMAT, to_metadata
from ebm_ppl.checkpoint.naming import described_structure, in_words, named_leaves
from ebm_ppl.checkpoint.states import arrays_and_manifest
from tests.resumed_run import digest, fresh_state, train

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def trained():
    return train(fresh_state(), 20)


@pytest.fixture
def file(trained, tmp_path):
    path = tmp_path / "state.safetensors"
    ebm.checkpoint.save(path, trained)
    return path


def test_a_state_comes_back_to_the_last_bit(trained, file):
    restored = ebm.checkpoint.restore(file, like=fresh_state())
    assert digest(restored) == digest(trained)
    assert jax.tree.structure(restored) == jax.tree.structure(trained)
    assert jax.random.key_impl(restored.key) == jax.random.key_impl(trained.key)
    for before, after in zip(jax.tree.leaves(trained), jax.tree.leaves(restored), strict=True):
        if isinstance(before, jax.Array):
            assert jax.typeof(before) == jax.typeof(after)  # weak types too


def test_a_restored_state_trains_without_compiling_again(trained, file):
    from ebm_ppl.training.loop import _run_chunk

    train(trained, 10)
    before = _run_chunk._cached._cache_size()
    train(ebm.checkpoint.restore(file, like=trained), 10)
    assert _run_chunk._cached._cache_size() == before


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg", "unsafe_rbg"])
def test_keys_come_back_with_their_implementation(tmp_path, impl):
    state = fresh_state()._replace(key=jax.random.key(7, impl=impl))
    ebm.checkpoint.save(tmp_path / "a", state)
    restored = ebm.checkpoint.restore(tmp_path / "a", like=fresh_state())
    assert str(jax.random.key_impl(restored.key)) == str(jax.random.key_impl(state.key))
    assert jnp.all(jax.random.bits(restored.key, (4,)) == jax.random.bits(state.key, (4,)))


def test_raw_keys_are_numbers_that_come_back(tmp_path):
    state = fresh_state()._replace(key=jax.random.PRNGKey(7))
    ebm.checkpoint.save(tmp_path / "a", state)
    assert jnp.all(ebm.checkpoint.restore(tmp_path / "a", like=fresh_state()).key == state.key)


def test_a_state_that_was_never_trained_has_no_key_afterwards(tmp_path, trained):
    ebm.checkpoint.save(tmp_path / "a", fresh_state())
    assert ebm.checkpoint.restore(tmp_path / "a", like=trained).key is None


def test_all_types_and_shapes_of_arrays_come_back(tmp_path):
    tree = {
        "bfloat16": jnp.linspace(-1.0, 1.0, 7, dtype=jnp.bfloat16),
        "complex": np.array([[1 + 2j, np.nan]]),
        "half": jnp.ones((2, 0, 3), jnp.float16),
        "scalar": jnp.float32(3.5),
        "numpy": np.arange(6, dtype=np.int64)[::-2],
        "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "bool": np.array(True),
        "generic": np.float64(0.1),
        "keys": jax.random.split(jax.random.key(0), 3),
        "numbers": (1, -0.0, float("inf"), True, "text"),
        "function": jax.nn.relu,
        "nothing": None,
        "bytes": np.array([np.nan, -np.nan]).view(np.uint64),
    }
    ebm.checkpoint.save(tmp_path / "a", tree)
    restored = ebm.checkpoint.restore(tmp_path / "a", like=tree)
    for name, leaf in named_leaves(tree).items():
        found = named_leaves(restored)[name]
        assert type(found) is type(leaf)
        if hasattr(leaf, "dtype"):
            assert (found.dtype, found.shape) == (leaf.dtype, leaf.shape)
            is_key = name == "['keys']"
            found, leaf = (np.asarray(jax.random.key_data(x) if is_key else x) for x in (found, leaf))
            assert found.tobytes() == leaf.tobytes(), name
        else:
            assert repr(found) == repr(leaf)


def test_abstract_states_are_enough_to_restore_into(trained, file):
    like = jax.eval_shape(lambda: {"a": trained.sampler.position})
    ebm.checkpoint.save(file, {"a": trained.sampler.position})
    assert jnp.all(ebm.checkpoint.restore(file, like=like)["a"] == trained.sampler.position)


def test_numbers_of_like_are_not_looked_at(trained, file):
    like = fresh_state()
    like = like._replace(sampler=like.sampler._replace(position=jnp.full_like(like.sampler.position, jnp.nan)))
    assert digest(ebm.checkpoint.restore(file, like=like)) == digest(trained)


def test_the_manifest_tells_what_wrote_the_file(file):
    manifest = ebm.checkpoint.read_manifest(file)
    assert manifest.step == 20
    assert manifest.environment["jax"] == jax.__version__
    assert manifest.environment["ebm-ppl"] == ebm.__version__
    assert manifest.environment["backend"] == "cpu"
    assert manifest.arrays[".key"]["key_impl"] == "fry" or "threefry" in manifest.arrays[".key"]["key_impl"]
    assert "mala" in manifest.structure[".sampler.kernel"]


def test_any_reader_of_the_format_can_open_it(trained, file):
    from safetensors.numpy import load_file

    assert np.array_equal(load_file(file)[".sampler.position"], trained.sampler.position)


def test_the_order_of_a_set_does_not_matter(tmp_path):
    """The leaves of a mixture have another order under another hash seed; by name they are found all the same."""
    digests = []
    for seed in ("0", "1", "2"):
        run = subprocess.run(
            [sys.executable, "-m", "tests.resumed_run", str(tmp_path), "--updates", "20"],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            cwd=ROOT,
            check=True,
            timeout=300,
        )
        digests.append(run.stdout.split()[-1])
    assert len(set(digests)) == 1
    assert "from 20" in run.stdout


def test_structures_are_words_without_addresses():
    state = fresh_state()
    text = json.dumps(described_structure(state))
    assert " at 0x" not in text
    assert "silu" in text
    assert in_words((frozenset({"b", "a"}), {"z": int})) == "{'a', 'b'}, {'z': builtins.int}"


# What is not that state.


def _refused(path, like, match, **options):
    with pytest.raises(ebm.CheckpointError, match=match) as caught:
        ebm.checkpoint.restore(path, like=like, **options)
    assert caught.value.path == str(path)
    return caught.value.entry


def test_another_kernel_is_refused(file):
    state = fresh_state()
    like = state._replace(sampler=state.sampler._replace(kernel=ebm.kernels.unadjusted_langevin(step_size=0.3)))
    assert _refused(file, like, "mala.*where `like` has.*Langevin") == ".sampler.kernel"
    assert ebm.checkpoint.restore(file, like=like, check_structure=False).step == 20


def test_another_activation_is_refused(file):
    state = fresh_state()
    net = ebm.potentials.MLP(2, key=jax.random.key(0), width=16, depth=2, activation=jnp.tanh)
    like = state._replace(potential=ebm.potentials.tilt(net, dist.Normal(0.0, 1.0).expand([2]).to_event(1)))
    assert _refused(file, like, "silu").startswith(".potential")


def test_another_base_is_refused(tmp_path):
    def tilted(loc):
        net = ebm.potentials.MLP(2, key=jax.random.key(0), width=4, depth=1)
        return ebm.potentials.tilt(net, dist.Normal(loc, 1.0).expand([2]).to_event(1))

    ebm.checkpoint.save(tmp_path / "a", tilted(0.5))
    restored = ebm.checkpoint.restore(tmp_path / "a", like=tilted(0.0))  # numbers are those of the file
    assert restored(jnp.ones(2)) == tilted(0.5)(jnp.ones(2))
    _refused(tmp_path / "a", tilted(jnp.zeros(())), "no array|an array")


def test_another_width_is_refused(file):
    net = ebm.potentials.MLP(2, key=jax.random.key(0), width=17, depth=2)
    like = ebm.init_train(net, optax.adam(1e-2))
    _refused(file, like, "where `like` has")
    assert _refused(file, like, "lacks|has what", check_structure=False)


def test_another_number_of_chains_is_refused(file):
    state = fresh_state()
    sampler = state.sampler._replace(position=jnp.zeros((17, 2)))
    entry = _refused(file, state._replace(sampler=sampler), r"float32 of shape \(16, 2\) where .* \(17, 2\)")
    assert entry == ".sampler.position"


def test_another_precision_is_refused(file):
    state = fresh_state()
    sampler = state.sampler._replace(position=np.zeros((16, 2), np.float64))
    _refused(file, state._replace(sampler=sampler), "float32 of shape .* where `like` has float64")


def test_another_function_is_refused(tmp_path):
    ebm.checkpoint.save(tmp_path / "a", {"f": jnp.tanh})
    assert _refused(tmp_path / "a", {"f": jnp.sin}, "tanh.*where `like` has.*sin") == "['f']"


def test_missing_and_superfluous_arrays_are_named(tmp_path):
    ebm.checkpoint.save(tmp_path / "a", {"a": jnp.ones(2), "b": jnp.ones(2)})
    assert _refused(tmp_path / "a", {"a": jnp.ones(2)}, "has not: .*'b'") == "['b']"
    assert _refused(tmp_path / "a", {k: jnp.ones(2) for k in "abc"}, "lacks .*'c'") == "['c']"


def test_keys_of_another_implementation_are_refused(tmp_path):
    ebm.checkpoint.save(tmp_path / "a", {"k": jax.random.key(0, impl="rbg")})
    assert _refused(tmp_path / "a", {"k": jax.random.key(0)}, "random key of") == "['k']"


# Files that are damaged, foreign, or meant to harm.


def test_every_truncation_is_refused(trained, file):
    content = file.read_bytes()
    for size in [0, 1, 7, 8, 9, 100, len(content) // 2, len(content) - 1]:
        file.write_bytes(content[:size])
        _refused(file, trained, "part of one")
    file.write_bytes(content + b"\0")
    _refused(file, trained, "part of one")


def test_every_flipped_bit_is_refused(trained, file):
    """One bit, at 200 places spread over the file: in the length, the header, the manifest or an array."""
    content = file.read_bytes()
    generator = np.random.default_rng(0)
    places = [*range(8), *generator.integers(8, len(content), 200)]
    num_entries = 0
    for place in places:
        damaged = bytearray(content)
        damaged[place] ^= 1 << int(generator.integers(8))
        file.write_bytes(damaged)
        with pytest.raises(ebm.CheckpointError) as caught:
            ebm.checkpoint.restore(file, like=trained)
        num_entries += caught.value.entry is not None
    assert num_entries > 20


def test_swapped_arrays_are_refused(trained, file):
    """Two arrays of one type and shape, each with its own good bytes, in each other's places."""
    arrays, manifest = arrays_and_manifest(trained)
    first, second = ".optimizer_state[1][0].mu.potential.head.weight", ".optimizer_state[1][0].nu.potential.head.weight"
    assert arrays[first].shape == arrays[second].shape
    arrays[first], arrays[second] = arrays[second], arrays[first]
    storage.write(file, arrays, manifest)
    assert _refused(file, trained, "not the ones written") in (first, second)


class _Harmful:
    def __reduce__(self):
        return (Path.touch, (_Harmful.trap,))


@pytest.mark.parametrize("wrap", ["pickle", "npy", "npz", "array"])
def test_a_pickle_is_never_executed(trained, tmp_path, wrap):
    _Harmful.trap = tmp_path / "executed"
    content, path = pickle.dumps(_Harmful()), tmp_path / "a.safetensors"
    if wrap == "pickle":
        path.write_bytes(content)
    elif wrap == "npy":
        with path.open("wb") as handle:
            np.save(handle, np.array([_Harmful()], object), allow_pickle=True)
    elif wrap == "npz":
        with path.open("wb") as handle:
            np.savez(handle, position=np.array([_Harmful()], object))
    else:
        arrays, manifest = arrays_and_manifest(trained)
        arrays[".sampler.position"] = np.frombuffer(content, np.uint8)
        storage.write(path, arrays, manifest)
    with pytest.raises(ebm.CheckpointError):
        ebm.checkpoint.restore(path, like=trained)
    with pytest.raises(ebm.CheckpointError):
        ebm.checkpoint.restore(path, like={".": np.zeros(1, object)})
    assert not _Harmful.trap.exists()
    pickle.loads(content)  # the trap works
    assert _Harmful.trap.exists()


def test_no_module_of_the_package_can_unpickle():
    words = ("pickle", "dill", "marshal", "shelve", "allow_pickle=True", "serialize_executable", "joblib")
    for path in (ROOT / "ebm_ppl").rglob("*.py"):
        lines = [line for line in path.read_text().splitlines() if not line.lstrip().startswith("#")]
        found = [word for word in words if any(f"import {word}" in line or f"{word}." in line for line in lines)]
        assert not found, path


def test_foreign_files_are_refused(trained, tmp_path):
    save_file({"a": np.zeros(3)}, tmp_path / "a")
    _refused(tmp_path / "a", trained, "did not write")
    save_file({"a": np.zeros(3)}, tmp_path / "a", metadata={"format": "pt"})
    _refused(tmp_path / "a", trained, "did not write")


def _with_metadata(path, trained, **changed):
    arrays, manifest = arrays_and_manifest(trained)
    save_file({k: np.array(v) for k, v in arrays.items()}, path, metadata={**to_metadata(manifest), **changed})


def test_a_later_version_is_refused(trained, file):
    _with_metadata(file, trained, version="2")
    _refused(file, trained, "Install a later one")
    for version in ("", "-1", "1.5", "²", "9" * 5_000):
        _with_metadata(file, trained, version=version)
        _refused(file, trained, "expected a whole number")


@pytest.mark.parametrize(
    "text",
    ["", "[]", "[" * 100_000, '{"a": 1}', '{"step": ' + "9" * 5_000 + "}", "null", '"text"'],
)
def test_manifests_that_are_none_are_refused(trained, file, text):
    import hashlib

    sha256 = hashlib.sha256(text.encode()).hexdigest()
    _with_metadata(file, trained, manifest=text, manifest_sha256=sha256)
    _refused(file, trained, "manifest")
    _with_metadata(file, trained, manifest=text)
    _refused(file, trained, "damaged")


@pytest.mark.parametrize(
    "change",
    [
        {"arrays": []},
        {"step": "20"},
        {"structure": {".": 3}},
        {"arrays": {".step": {"dtype": "int32", "shape": [-1], "sha256": ""}}},
        {"arrays": {".step": {"dtype": "int32", "shape": ["a"], "sha256": ""}}},
        {"arrays": {".step": 5}},
        {"values": None},
    ],
)
def test_manifests_of_the_wrong_types_are_refused(trained, file, change):
    import dataclasses
    import hashlib

    _, manifest = arrays_and_manifest(trained)
    text = json.dumps({**dataclasses.asdict(manifest), **change})
    _with_metadata(file, trained, manifest=text, manifest_sha256=hashlib.sha256(text.encode()).hexdigest())
    _refused(file, trained, "manifest")


def test_sizes_that_nobody_has_are_refused_before_anything_is_allocated(trained, file, monkeypatch):
    """A manifest that declares petabytes, and a header that does."""
    import dataclasses

    arrays, manifest = arrays_and_manifest(trained)
    huge = {**manifest.arrays[".sampler.position"], "shape": [2**40, 2**10]}
    changed = dataclasses.replace(manifest, arrays={**manifest.arrays, ".sampler.position": huge})
    storage.write(file, arrays, changed)
    assert _refused(file, trained, "where `like` has") == ".sampler.position"
    # Even into a `like` of that size, which costs nothing while it is abstract.
    like = trained._replace(
        sampler=trained.sampler._replace(position=jax.ShapeDtypeStruct((2**40, 2**10), jnp.float32))
    )
    assert _refused(file, like, "its manifest says") == ".sampler.position"

    header = json.dumps({"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}).encode()
    file.write_bytes(struct.pack("<Q", len(header)) + header)
    _refused(file, trained, "part of one")
    file.write_bytes(struct.pack("<Q", 2**63) + b"{}")
    _refused(file, trained, "part of one")


def test_names_that_look_like_paths_lead_nowhere(trained, file):
    arrays, manifest = arrays_and_manifest(trained)
    import dataclasses

    for name in ("../../escaped", "/tmp/escaped", "a\0b"):
        extra = {**manifest.arrays, name: storage.array_entry(name, np.zeros(2))}
        storage.write(file, {**arrays, name: np.zeros(2)}, dataclasses.replace(manifest, arrays=extra))
        assert _refused(file, trained, "has not") == name
    # An array of the header alone is not in the manifest, and is never read.
    storage.write(file, {**arrays, "../../escaped": np.zeros(2)}, manifest)
    assert digest(ebm.checkpoint.restore(file, like=trained)) == digest(trained)
    assert not list(file.parent.parent.glob("escaped"))


def test_what_is_no_file_is_refused(trained, tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        ebm.checkpoint.restore(tmp_path / "missing", like=trained)
    _refused(tmp_path, trained, "not a file")
    os.mkfifo(tmp_path / "pipe")
    _refused(tmp_path / "pipe", trained, "not a file")


def test_what_cannot_be_saved_is_refused(tmp_path):
    with pytest.raises(TypeError, match="dtype object"):
        ebm.checkpoint.save(tmp_path / "a", {"a": np.array([None])})
    with pytest.raises(TypeError, match="being traced"):
        jax.jit(lambda x: ebm.checkpoint.save(tmp_path / "a", x))(1.0)
    assert not list(tmp_path.iterdir())


# One step from the old file to the new one.


@pytest.mark.parametrize("call", ["save_file", "_sync", "os.replace"])
@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_a_write_that_fails_leaves_the_old_file(trained, file, monkeypatch, call, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(f"ebm_ppl.checkpoint.storage.{call}", fail)
    with pytest.raises(type(error)):
        ebm.checkpoint.save(file, trained._replace(step=trained.step + 1))
    monkeypatch.undo()
    assert ebm.checkpoint.restore(file, like=trained).step == trained.step
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_bytes_are_on_the_disk_before_the_name_is(trained, file, monkeypatch):
    events = []
    for module, name in ((storage, "save_file"), (storage, "_sync"), (os, "replace")):
        original = getattr(module, name)

        def told(*args, original=original, name=name, **kwargs):
            events.append(name if name != "_sync" else f"sync {'directory' if Path(args[0]).is_dir() else 'file'}")
            return original(*args, **kwargs)

        monkeypatch.setattr(module, name, told)
    ebm.checkpoint.save(file, trained)
    assert events == ["save_file", "sync file", "replace", "sync directory"]


def test_what_a_killed_process_left_is_removed(trained, file):
    left = file.parent / f".{file.name}.abc{storage.PARTIAL}"
    left.write_bytes(b"part")
    other = file.parent / f".other.abc{storage.PARTIAL}"
    other.write_bytes(b"of somebody else")
    ebm.checkpoint.save(file, trained)
    assert not left.exists()
    assert other.exists()


# A directory of them.


def _at(state, step):
    return state._replace(step=jnp.asarray(step, jnp.int32))


@pytest.mark.parametrize("asynchronous", [False, True])
def test_the_last_few_are_kept(trained, tmp_path, asynchronous):
    with ebm.checkpoint.Checkpoints(tmp_path / "new", keep=3, asynchronous=asynchronous) as checkpoints:
        assert checkpoints.steps() == []
        with pytest.raises(FileNotFoundError, match="no checkpoint"):
            checkpoints.restore(like=trained)
        for step in (5, 10, 99, 100, 1_000):
            checkpoints.save(_at(trained, step))
    assert checkpoints.steps() == [99, 100, 1_000]
    assert checkpoints.restore(like=trained).step == 1_000
    assert checkpoints.restore(like=trained, step=99).step == 99
    with pytest.raises(FileNotFoundError, match="no step 10;"):
        checkpoints.restore(like=trained, step=10)
    checkpoints.save(_at(trained, 1_000))  # again is no error


def test_a_directory_belongs_to_one_run(trained, tmp_path):
    checkpoints = ebm.checkpoint.Checkpoints(tmp_path)
    checkpoints.save(_at(trained, 100))
    with pytest.raises(ValueError, match="step 100, later than this one of step 10"):
        checkpoints.save(_at(trained, 10))
    assert checkpoints.steps() == [100]


def test_a_damaged_one_is_not_passed_over(trained, tmp_path):
    with ebm.checkpoint.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(_at(trained, 1))
        checkpoints.save(_at(trained, 2))
    path = checkpoints.path(2)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ebm.CheckpointError, match="part of one") as caught:
        checkpoints.restore(like=trained)
    assert "restore(like, step=1)" in caught.value.__notes__[0]
    assert checkpoints.restore(like=trained, step=1).step == 1


def test_a_link_out_of_the_directory_is_refused(trained, tmp_path):
    ebm.checkpoint.save(tmp_path / "elsewhere", trained)
    checkpoints = ebm.checkpoint.Checkpoints(tmp_path / "run")
    checkpoints.path(20).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ebm.CheckpointError, match="leads elsewhere"):
        checkpoints.restore(like=trained)


def test_other_files_in_the_directory_are_left_alone(trained, tmp_path):
    for name in ("notes.txt", "step-1.safetensors.bak", "step-x.safetensors", "step-.safetensors"):
        (tmp_path / name).write_text("mine")
    with ebm.checkpoint.Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(_at(trained, 1))
        checkpoints.save(_at(trained, 2))
    assert checkpoints.steps() == [2]
    assert len(list(tmp_path.iterdir())) == 5


def test_the_error_of_a_thread_is_heard(trained, tmp_path, monkeypatch):
    checkpoints = ebm.checkpoint.Checkpoints(tmp_path)

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("ebm_ppl.checkpoint.directory.write", fail)
    checkpoints.save(trained)
    with pytest.raises(OSError, match="disk full"):
        checkpoints.save(trained)
    monkeypatch.undo()
    with checkpoints:
        checkpoints.save(trained)
    assert checkpoints.steps() == [20]


def test_a_state_may_be_given_away_once_it_was_handed_over(trained, tmp_path, monkeypatch):
    """Buffers that a training loop of one's own donates are gone while the thread still hashes."""
    state = jax.tree.map(lambda x: jnp.copy(x) if isinstance(x, jax.Array) else x, trained)
    expected, saved = digest(state), threading.Event()
    original = ebm.checkpoint.directory.hashed_manifest
    monkeypatch.setattr(ebm.checkpoint.directory, "hashed_manifest", lambda *a: (saved.wait(60.0), original(*a))[1])
    with ebm.checkpoint.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state)
        for leaf in jax.tree.leaves(state):
            if isinstance(leaf, jax.Array):
                leaf.delete()
        saved.set()
    assert digest(checkpoints.restore(like=fresh_state())) == expected


def test_misuse_of_a_directory(trained, tmp_path):
    with pytest.raises(ValueError, match="keep"):
        ebm.checkpoint.Checkpoints(tmp_path, keep=0)
    with pytest.raises(TypeError, match="state: got dict"):
        ebm.checkpoint.Checkpoints(tmp_path).save({})


def test_a_file_says_its_format(file):
    assert FORMAT.encode() in file.read_bytes()[:10_000_000]


# States that no host holds, through Orbax.


def test_a_sharded_state_comes_back_to_the_last_bit(trained, tmp_path):
    ebm.checkpoint.save_sharded(tmp_path / "a", trained)
    restored = ebm.checkpoint.restore_sharded(tmp_path / "a", like=fresh_state())
    assert digest(restored) == digest(trained)
    with pytest.raises(FileExistsError, match="expected a new directory"):
        ebm.checkpoint.save_sharded(tmp_path / "a", trained)


def test_sharded_states_are_refused_by_name_too(trained, tmp_path):
    with pytest.raises(FileNotFoundError, match="no complete checkpoint"):
        ebm.checkpoint.restore_sharded(tmp_path, like=trained)
    ebm.checkpoint.save_sharded(tmp_path / "a", trained)
    state = fresh_state()
    like = state._replace(sampler=state.sampler._replace(kernel=ebm.kernels.unadjusted_langevin(step_size=0.3)))
    with pytest.raises(ebm.CheckpointError, match="mala") as caught:
        ebm.checkpoint.restore_sharded(tmp_path / "a", like=like)
    assert caught.value.entry == ".sampler.kernel"
    like = state._replace(sampler=state.sampler._replace(position=jnp.zeros((17, 2))))
    with pytest.raises(ebm.CheckpointError, match=r"\(17, 2\)"):
        ebm.checkpoint.restore_sharded(tmp_path / "a", like=like)


@pytest.mark.slow
def test_a_damaged_sharded_state_is_refused(tmp_path):
    """In a process of its own: Orbax leaves a loop that complains later."""
    ebm.checkpoint.save_sharded(tmp_path / "a", {"x": jnp.arange(4.0)})
    (tmp_path / "a" / "arrays" / "manifest.ocdbt").write_bytes(b"")
    code = f"""
import jax.numpy as jnp, ebm_ppl as ebm
try:
    ebm.checkpoint.restore_sharded({str(tmp_path / "a")!r}, like={{"x": jnp.zeros(4)}})
except ebm.CheckpointError as error:
    print("refused:", error)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=300)
    assert "refused: checkpoint" in run.stdout
    assert "Orbax cannot read" in run.stdout


def test_without_orbax_one_is_told_what_to_install(trained, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "orbax.checkpoint", None)
    with pytest.raises(ImportError, match=r"ebm-ppl\[sharded\]"):
        ebm.checkpoint.save_sharded(tmp_path / "a", trained)

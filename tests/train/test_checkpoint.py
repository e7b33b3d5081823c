"""Checkpoints: bit-equal between groupings and meshes, damage found and passed over, atomic under SIGKILL, keep rules, clear refusals.

The toy model has 4 layers: scanned (one stack), unrolled, or a prefix layer, a stack of two and a suffix layer.
"""
import gc
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from effmodels.config import ConfigError
from effmodels.layers.param import ParamInfo
from effmodels.train import digest, optim
from effmodels.train.checkpoint import Checkpointer, CheckpointError, CheckpointMismatch
from effmodels.train.state import TrainState, abstract

# Orbax leaves futures behind when the files that it reads are broken.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
LAYERS = 4
OUTSIDE = {"embed": (ParamInfo(("vocab", "embed"), ("embed",)), (16, 8)), "norm.scale": (ParamInfo(("norm",)), (8,))}
LAYER = {
    "mixer.wq": (ParamInfo(("embed", "heads", "head_dim"), ("embed",)), (8, 4, 4)),
    "mlp.up": (ParamInfo(("expert", "embed", "expert_mlp"), ("embed",), ("expert",)), (2, 8, 8)),
    "norm.scale": (ParamInfo(("norm",)), (8,)),
}
GROUPINGS = {"scanned": [range(0, 4)], "unrolled": [[0], [1], [2], [3]], "mixed": [[0], range(1, 3), [3]]}


def grouped(grouping, per_layer):
    """({path: array of this grouping}, manifest) from per_layer(layer, name) -> array."""
    arrays, manifest = {}, {}
    for segment, layers in enumerate(GROUPINGS[grouping]):
        for name in LAYER:
            path = f"segments.{segment}.{name}"
            parts = [per_layer(i, name) for i in layers]
            arrays[path] = np.stack(parts) if len(layers) > 1 else parts[0]
            manifest |= {f"layers.{i}.{name}": (path, k if len(layers) > 1 else None) for k, i in enumerate(layers)}
    return arrays, manifest


def make(grouping, optimizer="adamw", seed=0, steps=2):
    """(TrainState after random updates, manifest, infos); the same numbers in every grouping."""
    def draws(seed):
        rng = np.random.default_rng(seed)
        outside = {p: rng.normal(size=s).astype(np.float32) for p, (_, s) in OUTSIDE.items()}
        layers = {(i, n): rng.normal(size=s).astype(np.float32) for i in range(LAYERS) for n, (_, s) in LAYER.items()}
        arrays, manifest = grouped(grouping, lambda i, n: layers[i, n])
        return arrays | outside, manifest | {p: (p, None) for p in OUTSIDE}
    params, manifest = draws(seed)
    infos = {p: i for p, (i, _) in OUTSIDE.items()}
    for segment, layers in enumerate(GROUPINGS[grouping]):
        infos |= {f"segments.{segment}.{n}": i.stacked() if len(layers) > 1 else i for n, (i, _) in LAYER.items()}
    options = {"min_dim_size_to_factor": 4} if optimizer == "adafactor" else {}
    tx = optim.make_optimizer({"name": optimizer, "options": options}, infos, {p: x.shape for p, x in params.items()}, 10)
    params = jax.tree.map(jnp.asarray, params)
    state = TrainState(jnp.int32(steps), params, {"bias": jnp.arange(3.0)}, tx.init(params))
    return state, manifest | {"bias": ("bias", None)}


def fill(state, manifest, seed=0):
    """Moments that are all different, and the same for the same canonical name."""
    from effmodels.train import grouping
    values = []
    for leaf, x in grouping.leaves(state, manifest).values():
        parts = []
        for part, _ in leaf.parts():
            rng = np.random.default_rng([seed, *part.encode()])
            parts.append(rng.normal(size=leaf.part_shape(x.shape)).astype(x.dtype) if x.dtype != np.int32 else np.int32(7))
        values.append(jnp.asarray(np.stack(parts) if leaf.stacked else parts[0]))
    return grouping.rebuild(state, values)


def assert_identical(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for (k, a), b in zip(jax.tree_util.tree_flatten_with_path(got)[0], jax.tree.leaves(want)):
        assert a.dtype == b.dtype and np.asarray(a).tobytes() == np.asarray(b).tobytes(), jax.tree_util.keystr(k)


@pytest.fixture
def broken_files():
    """What Orbax leaves behind is collected here, while its warnings are ignored."""
    yield
    gc.collect()


@pytest.fixture(scope="module")
def filled():
    cache = {}

    def get(grouping, optimizer="adamw", seed=0):
        if (grouping, optimizer, seed) not in cache:
            state, manifest = make(grouping, optimizer)
            cache[grouping, optimizer, seed] = fill(state, manifest, seed), manifest
        return cache[grouping, optimizer, seed]
    return get


def data_file(directory, step, part):
    """The largest file of one array of a step."""
    files = [p for p in (pathlib.Path(directory) / str(step) / "state").rglob("*") if p.is_file() and part in str(p) and p.name[0] != "."]
    return max(files, key=lambda p: p.stat().st_size)


def test_round_trip_with_host_data(tmp_path, filled):
    state, manifest = filled("scanned")
    host = {"data": {"next": 7}, "tokens": 12345678901234, "note": "á", "list": [1, 2.5, None]}
    with_checkpoints = Checkpointer(tmp_path / "c", mode="async")
    assert with_checkpoints.latest() is None
    assert with_checkpoints.save(3, state, manifest=manifest, host=host)
    with_checkpoints.wait()
    assert not with_checkpoints.save(3, state, manifest=manifest, host=host)
    with_checkpoints.close()
    got, got_host, step = Checkpointer(tmp_path / "c").restore(abstract(state), manifest=manifest)
    assert_identical(got, state)
    assert (got_host, step) == (host, 3)
    params, buffers, step = Checkpointer(tmp_path / "c").restore_model(state.params, state.buffers, manifest=manifest)
    assert_identical((params, buffers), (state.params, state.buffers))


@pytest.mark.parametrize("optimizer, pairs", [
    ("adamw", [("scanned", "unrolled"), ("unrolled", "scanned"), ("mixed", "scanned"), ("scanned", "mixed"), ("unrolled", "mixed")]),
    ("adafactor", [("scanned", "unrolled"), ("mixed", "scanned")]),
    ("muon", [("unrolled", "scanned")]),
])
def test_any_grouping_into_any_other(tmp_path, filled, optimizer, pairs):
    for source, target in pairs:
        state, manifest = filled(source, optimizer)
        want, want_manifest = filled(target, optimizer)
        directory = tmp_path / source
        Checkpointer(directory, mode="sync").save(1, state, manifest=manifest, host={})
        got, _, _ = Checkpointer(directory).restore(abstract(want), manifest=want_manifest)
        assert_identical(got, want)
        shutil.rmtree(directory)


def sharded(state, shape):
    """The abstract state on a mesh of this shape: matrices split in both axes, scalars (adam's count) without any sharding."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()[: shape[0] * shape[1]]).reshape(shape), ("a", "b"))

    def of(x):
        fits = x.ndim >= 2 and x.shape[-2] % shape[0] == x.shape[-1] % shape[1] == 0
        spec = PartitionSpec(*([None] * (x.ndim - 2)), "a", "b") if fits else PartitionSpec()
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec) if x.ndim else None)
    return jax.tree.map(of, state), mesh


def test_meshes_and_groupings_change_together(tmp_path, filled):
    state, manifest = filled("scanned")
    directory = tmp_path / "c"
    on_mesh, _ = sharded(state, (2, 4))
    placed = jax.tree.map(lambda x, a: jax.device_put(x, a.sharding) if a.sharding else x, state, on_mesh)
    Checkpointer(directory, mode="sync").save(1, placed, manifest=manifest, host={})
    for shape, target in (((8, 1), "scanned"), ((4, 2), "unrolled"), ((1, 1), "mixed")):
        want, want_manifest = filled(target)
        wanted, mesh = sharded(want, shape)
        got, _, _ = Checkpointer(directory).restore(wanted, manifest=want_manifest)
        assert_identical(got, want)
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted)):
            # Counters come back on the same mesh as the rest, or the next jitted step refuses them.
            assert a.sharding.is_equivalent_to(b.sharding or NamedSharding(mesh, PartitionSpec()), a.ndim)
    bad = wanted.replace(params={p: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(on_mesh.params["embed"].sharding.mesh,
                         PartitionSpec(("a", "b")))) for p, x in wanted.params.items()})
    with pytest.raises(ValueError, match="divide"):  # the caller's error is not called damage
        Checkpointer(directory).restore(bad, manifest=want_manifest)


@pytest.mark.parametrize("damage, reason", [
    ("flip", "wrong digest of opt_state.*mu:layers"), ("truncate", "Reason: ."), ("remove", "Reason: ."), ("meta", "Reason: ."),
])
def test_damage_is_named_and_passed_over(tmp_path, filled, broken_files, damage, reason):
    (first, manifest), (second, _) = filled("scanned"), filled("scanned", seed=1)
    directory, lines = tmp_path / "c", []
    saver = Checkpointer(directory, mode="sync", keep=3)
    saver.save(1, first, manifest=manifest, host={"step": 1})
    saver.save(2, second, manifest=manifest, host={"step": 2})
    file = data_file(directory, 2, ".mu:segments.0.mixer.wq") if damage != "meta" else directory / "2" / "meta" / "metadata"
    content = bytearray(file.read_bytes())
    if damage in ("flip", "meta"):
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    elif damage == "truncate":
        file.write_bytes(content[: len(content) // 2])
    else:
        shutil.rmtree(file.parent)
    reader = Checkpointer(directory, mode="sync", log=lines.append)
    got, host, step = reader.restore(abstract(first), manifest=manifest)
    assert (step, host) == (1, {"step": 1})
    assert_identical(got, first)
    assert "DAMAGED" in lines[0] and str(directory / "2") in lines[0] and "going back to step 1" in lines[0]
    assert re.search(reason, lines[0])
    assert reader.steps() == [1, 2] and reader.latest() == 1  # reading changes nothing
    reader.save(2, second, manifest=manifest, host={})
    assert (tmp_path / "c-damaged" / "2").exists()
    assert_identical(Checkpointer(directory).restore(abstract(first), manifest=manifest)[0], second)
    with pytest.raises(CheckpointError, match="no step 9 in"):
        reader.restore(abstract(first), manifest=manifest, step=9)


def test_nothing_good_left(tmp_path, filled, broken_files):
    state, manifest = filled("scanned")
    with pytest.raises(CheckpointError, match="no checkpoint in .*it has none"):
        Checkpointer(tmp_path / "none").restore(abstract(state), manifest=manifest)
    Checkpointer(tmp_path, mode="sync").save(4, state, manifest=manifest, host={})
    shutil.rmtree(tmp_path / "4" / "state")
    with pytest.raises(CheckpointError, match=r"no good checkpoint in .*step 4: .*new --workdir"):
        Checkpointer(tmp_path, log=lambda _: None).restore(abstract(state), manifest=manifest)


def test_keep_last_and_best(tmp_path, filled):
    state, manifest = filled("scanned")
    saver = Checkpointer(tmp_path, mode="sync", keep=2, keep_best=2)
    losses = {1: 5.0, 2: 1.0, 3: 4.0, 4: None, 5: 2.0, 6: 3.0, 7: float("nan"), 8: 9.0}
    for step, loss in losses.items():
        saver.save(step, state, manifest=manifest, host={}, metrics=None if loss is None else {"loss": loss})
    assert saver.steps() == [2, 5, 7, 8]
    saver.close()
    again = Checkpointer(tmp_path, mode="sync", keep=1, keep_best=1)  # best survives a restart
    again.save(9, state, manifest=manifest, host={})
    assert again.steps() == [2, 9]


def test_full_disk_is_seen_before_the_save(tmp_path, filled, monkeypatch):
    state, manifest = filled("scanned")
    saver = Checkpointer(tmp_path, mode="sync")
    saver.save(1, state, manifest=manifest, host={})
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000})())
    message = "step 2 needs .* GB and 0.00 GB is free at .*nothing was written, the last good checkpoint is step 1"
    with pytest.raises(CheckpointError, match=message):
        saver.save(2, state, manifest=manifest, host={})
    assert saver.steps() == [1]


def test_values_that_are_not_finite_are_not_saved(tmp_path, filled):
    state, manifest = filled("scanned")
    broken = state.params | {"segments.0.mlp.up": state.params["segments.0.mlp.up"].at[2, 1, 3, 4].set(jnp.nan)}
    saver = Checkpointer(tmp_path, mode="sync")
    with pytest.raises(CheckpointError, match="not finite in params:layers.2.mlp.up"):
        saver.save(1, state.replace(params=broken), manifest=manifest, host={})
    assert saver.steps() == []


def test_another_model_is_refused(tmp_path, filled):
    state, manifest = filled("unrolled")
    saver = Checkpointer(tmp_path, mode="sync")
    saver.save(1, state, manifest=manifest, host={})

    def change(edit):
        params = edit(dict(state.params))
        names = {n: w for n, w in manifest.items() if w[0] in params or w[0] == "bias"} | {
            p.replace("segments.", "layers."): (p, None) for p in params if p not in state.params}
        return abstract(state.replace(params=params, opt_state={})), names

    cases = [
        (lambda p: p | {"segments.3.mixer.gate": jnp.zeros(3)}, "another model. only here: layers.3.mixer.gate"),
        (lambda p: {k: v for k, v in p.items() if "segments.2" not in k}, "only in the checkpoint: layers.2.mixer.wq, layers.2.mlp.up"),
        (lambda p: p | {"embed": jnp.zeros((17, 8))}, r"embed is float32\[16, 8\], here float32\[17, 8\]"),
        (lambda p: p | {"embed": jnp.zeros((16, 8), jnp.bfloat16)}, r"here bfloat16\[16, 8\]"),
        (lambda p: p, r"another optimiser. only in the checkpoint: .*opt_state"),
    ]
    for edit, message in cases:
        target, names = change(edit)
        with pytest.raises(CheckpointMismatch, match=message):
            saver.restore(target, manifest=names)


def test_bad_arguments(tmp_path, filled):
    state, manifest = filled("scanned")
    saver = Checkpointer(tmp_path, mode="sync")
    with pytest.raises(TypeError, match="only what JSON holds"):
        saver.save(1, state, manifest=manifest, host={"x": object()})
    saver.save(5, state, manifest=manifest, host={})
    with pytest.raises(CheckpointError, match="step 3 is older than step 5"):
        saver.save(3, state, manifest=manifest, host={})
    with pytest.raises(ConfigError, match="'async' or 'sync'"):
        Checkpointer(tmp_path, mode="fast")
    with pytest.raises(ConfigError, match="at least 1"):
        Checkpointer(tmp_path, keep=0)
    with pytest.raises(ValueError, match="not in the model's manifest"):
        saver.save(6, state, manifest={n: w for n, w in manifest.items() if n != "embed"}, host={})
    with pytest.raises(ValueError, match="names 3 layers"):
        saver.save(6, state, manifest={n: w for n, w in manifest.items() if not n.startswith("layers.3")}, host={})


def test_donation_during_an_asynchronous_save(tmp_path, filled):
    state, manifest = filled("scanned")
    want = jax.tree.map(np.array, state)
    saver = Checkpointer(tmp_path, mode="async")
    later = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
    live = jax.tree.map(jnp.array, state)
    saver.save(1, live, manifest=manifest, host={})
    for _ in range(3):
        live = later(live)
    saver.close()
    assert_identical(Checkpointer(tmp_path).restore(abstract(state), manifest=manifest)[0], want)


KILLED = """
    import os, signal, sys
    sys.path[:0] = [{root!r}]
    import tests.conftest
    from effmodels.train.checkpoint import Checkpointer
    from tests.train.test_checkpoint import fill, make
    state, manifest = make("scanned")
    saver = Checkpointer({directory!r}, mode="async")
    saver.save(1, fill(state, manifest), manifest=manifest, host={{"step": 1}})
    saver.wait()
    real = os.rename
    def rename(source, target, **kwargs):
        # The last act of a save: until here the files of step 2 are there, but the step is not.
        if str(target).endswith("/2"):
            os.kill(os.getpid(), signal.SIGKILL)
        return real(source, target, **kwargs)
    os.rename = os.replace = rename
    saver.save(2, fill(state, manifest, 1), manifest=manifest, host={{"step": 2}})
    saver.wait()
    print("not killed")
"""


@pytest.mark.subprocess
def test_sigkill_during_a_save_leaves_the_step_before(tmp_path, filled):
    directory, root = tmp_path / "c", str(pathlib.Path(__file__).parents[2])
    code = textwrap.dedent(KILLED).format(root=root, directory=str(directory))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env={**os.environ, "PYTHONPATH": root})
    assert done.returncode == -signal.SIGKILL, done.stdout + done.stderr
    left = [p.name for p in directory.iterdir() if "tmp" in p.name]
    assert left, "the kill came too early to leave anything behind"
    state, manifest = filled("scanned")
    lines = []
    saver = Checkpointer(directory, mode="sync", log=lines.append)
    got, host, step = saver.restore(abstract(state), manifest=manifest)
    assert (step, host) == (1, {"step": 1})
    assert_identical(got, state)
    saver.save(2, state, manifest=manifest, host={})
    assert saver.steps() == [1, 2] and not [p for p in directory.iterdir() if "tmp" in p.name]
    assert "left over from a save that was interrupted" in lines[0]


def test_digests_do_not_depend_on_device_mesh_or_stacking():
    rng = np.random.default_rng(0)
    mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(2, 4), ("a", "b"))
    for dtype in (jnp.float32, jnp.bfloat16, jnp.int32, bool):
        draw = rng.normal(size=(3, 66, 1000)) * 100
        x = jnp.asarray(draw > 0 if dtype is bool else draw).astype(dtype)
        host, _ = digest.host_digest(x, True)
        split = jax.device_put(x, NamedSharding(mesh, PartitionSpec(None, "a", "b")))
        with jax.enable_x64(True):
            device, _ = jax.jit(digest.device_digest, static_argnums=1)(split, True)
        np.testing.assert_array_equal(host, device)
        assert [int(digest.host_digest(layer, False)[0]) for layer in x] == host.tolist()
        assert len(set(host.tolist())) == 3


def test_digests_see_every_small_damage():
    x = np.random.default_rng(0).normal(size=70_000).astype(np.float32)
    base = digest.host_digest(x, False)[0]
    seen = set()
    for i, bit in ((0, 0), (69_999, 31), (65_536, 7), (12, 31)):
        y = x.copy()
        y.view(np.uint32)[i] ^= np.uint32(1 << bit)
        seen.add(int(digest.host_digest(y, False)[0]))
    swapped, negated = x.copy(), x.copy()
    swapped[[5, 66_000]] = x[[66_000, 5]]
    negated[[5, 66_000]] *= -1
    seen |= {int(digest.host_digest(y, False)[0]) for y in (swapped, negated)}
    assert len(seen) == 6 and int(base) not in seen
    y = x.copy()
    y[3], y[66_000] = np.inf, np.nan
    assert digest.host_digest(y, False)[1] == 2


def test_meta_is_readable_json(tmp_path, filled):
    state, manifest = filled("scanned")
    Checkpointer(tmp_path, mode="sync").save(1, state, manifest=manifest, host={"tokens": 5})
    meta = json.loads((tmp_path / "1" / "meta" / "metadata").read_text())
    assert meta["manifest"]["layers.2.mixer.wq"] == ["segments.0.mixer.wq", 2]
    assert len(meta["digests"]["params:segments.0.mixer.wq"]) == LAYERS and meta["host"] == {"tokens": 5}

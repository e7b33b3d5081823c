"""What a kept program is found by, and two plans that write the same one at once."""
import json
import threading

import pytest

from effmodels.plan.compiling import cache
from tests.plan import plans


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("EFFMODELS_PLAN_CACHE", str(tmp_path / "kept"))
    return tmp_path / "kept"


def test_the_key_holds_everything_that_is_asked_for(monkeypatch):
    request = {"config": {"seq_len": 8, "model": {"d_model": 4}}, "topology": "v4:2x2x1", "slices": 1, "what": "train", "level": None}
    one = cache.key(request)
    assert cache.key(json.loads(json.dumps(request))) == one
    others = [
        request | {"config": {"seq_len": 8, "model": {"d_model": 5}}}, request | {"topology": "v4:2x2x2"}, request | {"slices": 2},
        request | {"what": "decode"}, request | {"level": "O0"},
    ]  # fmt: skip
    assert len({one, *map(cache.key, others)}) == 6
    monkeypatch.setattr(cache, "versions", lambda: {"libtpu": "another"})
    assert cache.key(request) != one
    monkeypatch.undo()
    monkeypatch.setattr(cache, "sources", lambda: "others")
    assert cache.key(request) != one


@pytest.mark.parametrize("name", ["LIBTPU_INIT_ARGS", "XLA_FLAGS", "JAX_ENABLE_X64"])
def test_the_key_holds_what_the_environment_tells_the_compiler(monkeypatch, name):
    monkeypatch.delenv(name, raising=False)
    one = cache.key({})
    found = {one}
    for value in ("--xla_a=1", "--xla_a=2"):
        monkeypatch.setenv(name, value)
        found.add(cache.key({}))
    assert len(found) == 3
    monkeypatch.setenv(name, "" if name != "XLA_FLAGS" else "--xla_force_host_platform_device_count=4")
    monkeypatch.setenv("JAX_PLATFORMS", "another")
    assert cache.key({}) == one


def test_the_digest_sees_what_changes_a_step_and_not_the_report(tmp_path, monkeypatch):
    read = ("effmodels/plan/compiling/step.py", "effmodels/models/decoder.py", "pallas_kernels/k.py")
    for name in (*read, "effmodels/plan/report/answer.py"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("1")
    monkeypatch.setattr(cache, "_ROOT", tmp_path)
    digest = cache.sources.__wrapped__
    found = [digest()]
    for name in read:
        (tmp_path / name).write_text("2")
        found.append(digest())
    assert len(set(found)) == 4
    (tmp_path / "effmodels/plan/report/answer.py").write_text("2")
    assert digest() == found[-1]


def write(name, text, at=None):
    with cache.writing(name) as new:
        (new / "result.json").write_text(text)
        if at:
            at.wait()


def test_two_writers_of_one_program_leave_one_whole(folder):
    together = threading.Barrier(2)
    threads = [threading.Thread(target=write, args=("k", text, together)) for text in ("first", "second")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (cache.find("k") / "result.json").read_text() in ("first", "second")
    assert [p.name for p in folder.iterdir()] == ["k"]


def test_what_fails_leaves_nothing(folder):
    with pytest.raises(RuntimeError), cache.writing("k") as new:
        (new / "result.json").write_text("half")
        raise RuntimeError
    assert cache.find("k") is None and list(folder.iterdir()) == []


def test_nothing_is_kept_where_that_is_asked_for(monkeypatch):
    monkeypatch.setenv("EFFMODELS_PLAN_CACHE", "")
    write("k", "text")
    assert cache.find("k") is None
    cache.keep_plan("k", plans.cpu())
    assert cache.kept_plan("k") is None


def test_a_plan_is_kept_for_these_sources(monkeypatch):
    write("k", "text")
    plan = plans.cpu()
    cache.keep_plan("k", plan)
    assert cache.kept_plan("k") == plan
    monkeypatch.setattr(cache, "reader", lambda: "other sources")
    assert cache.kept_plan("k") is None

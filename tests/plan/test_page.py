"""The pictures and the page: what is drawn is what is summed, nothing comes from the network, any plan has one."""
import builtins
import re
import struct
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import pytest

from effmodels.plan.records import KINDS, MEMORY_PARTS, PHASES
from effmodels.plan.report import page, picture, spans
from tests.plan import plans

VOID = {"meta"}


def lane(found, name):
    return [s for s in found if s.lane == name]


def test_the_chip_lane_is_the_step():
    """End to end, and as long by kind as the operations, however coarsely they are drawn."""
    for make in (plans.large, plans.fast, plans.cpu, plans.decode):
        for pieces in (3, 30, 3000):
            plan = make()
            found = lane(spans.spans(plan.operations, pieces), "chip")
            clock = 0.0
            for s in found:
                assert s.start == pytest.approx(clock) and s.seconds > 0
                clock += s.seconds
            assert clock == pytest.approx(plan.seconds)
            for kind in KINDS:
                want = sum(o.total for o in plan.operations if o.kind == kind)
                assert sum(s.seconds for s in found if s.kind == kind) == pytest.approx(want)


def test_many_short_operations_are_drawn_together():
    operations = [plans.op(f"fusion.{i}", ("memory", "matmul")[i % 2], 1, 1e-5) for i in range(10_000)]
    found = spans.spans(operations, pieces=100)
    assert 100 <= len(found) <= 202 and found[0].name == "50 short operations"


def test_phases():
    """As long as their operations, in order; a phase made of many short operations is not lost."""
    plan = plans.large()
    found = lane(spans.spans(plan.operations), "phase")
    assert [s.kind for s in found] == list(PHASES[:3])  # the update is too short to draw
    for s in found[:2]:
        assert s.seconds == pytest.approx(sum(o.total for o in plan.operations if o.phase == s.kind))
    short = [plans.op("a", "matmul", 1, 1.0, phase="forward"), *(plans.op("b", "memory", 1, 1e-3, phase="backward") for _ in range(500))]
    assert [s.kind for s in spans.spans(short) if s.lane == "phase"] == ["forward", "backward"]
    assert not lane(spans.spans(plans.decode().operations), "phase")  # nobody knows any


def test_hidden_transfers_begin_where_they_stand():
    """3 s on the wire, 1 s of it waited for: 1 s in the chip's lane, then 2 s behind compute; two at once share the lane."""
    compute = plans.op("dot", "matmul", 1, 5.0)
    gather = plans.wire("all-gather", "fsdp", 1, 3.0, 1.0, 1e6)
    (found,) = lane(spans.spans([gather, compute]), "transfers hidden")
    assert (found.start, found.seconds) == (1.0, 2.0) and "all-gather over fsdp" in found.name
    free = plans.wire("all-gather", "fsdp", 1, 2.0, 0.0, 1e6)
    both = lane(spans.spans([free, free, compute]), "transfers hidden")
    assert [(s.start, s.seconds) for s in both] == [(0.0, 2.0), (2.0, 2.0)]
    beside = plans.wire("all-gather", "fsdp", 1, 2.0, 2.0, 1e6, shared=2.0)  # half of its flight, hence of what it sends
    assert [s.seconds for s in lane(spans.spans([beside, compute]), "transfers hidden")] == [1.0]
    assert not lane(spans.spans([compute, free]), "transfers hidden")  # nothing runs after it
    many = lane(spans.spans([*(plans.wire("all-gather", "fsdp", 1, 1e-3, 0.0, 1.0) for _ in range(100)), compute]), "transfers hidden")
    assert sum(s.seconds for s in many) == pytest.approx(0.1, abs=5 / 300) and len(many) < 10


@pytest.mark.parametrize("make", plans.ALL)
def test_svg(make):
    """Well-formed; the rectangles of the memory are as wide as their bytes; labels of the axis stay inside."""
    plan = make()
    drawings = [page.memory_svg(plan)] + ([page.timeline_svg(plan)] if plan.operations else [])
    for text in drawings:
        root = ElementTree.fromstring(text)
        width, height = map(float, root.get("viewBox").split()[2:])
        for r in root.iter("rect"):
            assert 0 <= float(r.get("x")) and float(r.get("x")) + float(r.get("width")) <= width and float(r.get("y")) <= height
        assert all(0 <= float(t.get("x")) <= width and float(t.get("y")) <= height for t in root.iter("text"))
    root = ElementTree.fromstring(drawings[0])
    by_colour = {r.get("fill"): float(r.get("width")) for r in root.iter("rect") if r.get("height") == "40"}
    end = max(plan.memory.total, plan.memory.available)
    for part in MEMORY_PARTS:
        if getattr(plan.memory, part):
            assert by_colour[spans.MEMORY_COLOURS[part]] == pytest.approx(790 * getattr(plan.memory, part) / end, abs=0.01)


class Balance(HTMLParser):
    def __init__(self):
        super().__init__()
        self.open, self.links = [], []

    def handle_starttag(self, tag, attributes):
        self.links += [(name, value) for name, value in attributes if name in ("src", "href", "xlink:href", "action")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.mark.parametrize("make", plans.ALL)
def test_page(make):
    """Balanced tags, nothing loaded from anywhere, names escaped."""
    plan = make()
    text = page.html_page(plans.dataclasses.replace(plan, config="configs/<a&b>.py", notes=("a < b & <script>",)))
    parser = Balance()
    parser.feed(text)
    assert not parser.open and not parser.links
    assert not re.search(r"https?:|//|@import|url\(|<script|<link|<img|<iframe", text.replace("<!DOCTYPE", ""))
    assert "configs/&lt;a&amp;b&gt;.py" in text and "<a&b>" not in text
    assert ("<h2>Timeline</h2>" in text) == bool(plan.operations)
    assert ("Costliest operations" in text) == bool(plan.operations)
    assert ('class="verdict no"' in text) == (not plan.fits)


def test_colours_differ():
    for colours in (list(spans.MEMORY_COLOURS.values()), [spans.COLOURS[k] for k in spans.LABELS]):
        values = [tuple(int(c[i : i + 2], 16) for i in (1, 3, 5)) for c in colours]
        assert all(sum(abs(x - y) for x, y in zip(a, b)) > 80 for i, a in enumerate(values) for b in values[:i])


@pytest.mark.parametrize("make", (plans.large, plans.too_large))
def test_picture(make, tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "plan.png"
    picture.save(make(), path)
    head = path.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", head[16:24])
    assert width == 1500 and height > 300


def test_a_picture_without_matplotlib(monkeypatch, tmp_path):
    there = builtins.__import__

    def missing(name, *rest, **more):
        if name.startswith("matplotlib"):
            raise ModuleNotFoundError(f"No module named {name!r}", name="matplotlib")
        return there(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ModuleNotFoundError, match=r"needs matplotlib, which is not installed: pip install -e '\.\[notebook\]'"):
        picture.save(plans.large(), tmp_path / "plan.png")
    assert page.html_page(plans.large())

"""The compiler's dumps of one compilation, in a process of its own.

libtpu reads LIBTPU_INIT_ARGS once, when it is loaded, so what is to be dumped is chosen before a process starts. `in_child` starts one,
gives it a folder for the dumps (some hundred megabytes for a large program) that is removed afterwards, and returns its small JSON.
"""
import dataclasses
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile

from effmodels.plan import topology
from effmodels.plan.schedule.bundles import NotUnderstood

_FLAGS = "--xla_jf_dump_to={} --xla_jf_dump_llo_pass_label_regex=(^final_.*|dedup.*)"
_TIMES = "--xla_jf_dump_static_llo_profile_to={}"
_FILE = re.compile(r"^\d+-(.+)-\d+-(final_bundles|final_hlo-static-per-bundle-utilization|deduplication-map)\.txt$")


class CompilerError(RuntimeError):
    """The program did not compile, or its process died; the message is the compiler's own."""


@dataclasses.dataclass(frozen=True)
class Dump:
    """Files of one compilation by the name of the HLO instruction whose code they hold."""

    bundles: dict[str, pathlib.Path]
    slots: dict[str, pathlib.Path]
    same: dict[str, str]  # instruction without code of its own -> the one whose code it runs
    timed: dict[pathlib.Path, float]  # cycles by libtpu's own simulator, by file of bundles

    def of(self, instruction: str):
        """(bundles, slots) of an instruction, or None when the compiler dumped none."""
        name = instruction if instruction in self.bundles else self.same.get(instruction)
        return (self.bundles[name], self.slots[name]) if name in self.bundles and name in self.slots else None


def read(folder: str | os.PathLike) -> Dump:
    """The Dump in a folder."""
    found = {"final_bundles": {}, "final_hlo-static-per-bundle-utilization": {}, "deduplication-map": {}}
    for path in sorted(pathlib.Path(folder).iterdir()):
        match = _FILE.match(path.name)
        if match and not match.group(1).endswith("schedule-analysis"):
            found[match.group(2)][match.group(1)] = path
    bundles, slots, maps = found.values()
    if not bundles:
        raise NotUnderstood("the compiler wrote no bundles; this libtpu may have other dump flags.")
    same = {name: key for path in maps.values() for name, key in _same(path.read_text())}
    return Dump(bundles, slots, same, dict(_timed(folder, bundles)))


def _timed(folder, bundles):
    for path in pathlib.Path(folder).glob("*_static_llo_profile.textproto"):
        text = path.read_text()
        name, cycles = re.search(r'hlo_op_name: "([^"]+)"', text), re.search(r"estimated_cycles: (\d+)", text)
        if not name or not cycles:
            raise NotUnderstood(f"{path.name} has no name and cycles.")
        if name.group(1) in bundles:
            yield bundles[name.group(1)], float(cycles.group(1))


def _same(text):
    """(instruction, instruction whose code it shares) of a deduplication map."""
    key, group = None, []
    for line in [*text.splitlines(), "key:"]:
        line = line.strip().lstrip("%")
        if line.startswith("key:"):
            yield from ((name, key) for name in group)
            key, group = line[4:], []
        elif key and line and not line.startswith(("ordinal", "equivalent_hlos")):
            group.append(line.split()[0])


def in_child(module: str, request: dict, *, libtpu_times=False, timeout: float = 1800) -> dict:
    """Runs `python -m module request.json result.json` with the dump flags set; returns the result.

    The request gets the key "dump", the folder. libtpu_times: libtpu also runs its own simulator, which is slow.
    """
    if not topology.has_compiler():
        raise ModuleNotFoundError("measuring a TPU program needs libtpu, which is not installed: pip install -e '.[plan]'.")
    with tempfile.TemporaryDirectory(prefix="effmodels-dump-") as folder:
        here, dump = pathlib.Path(folder), pathlib.Path(folder, "dump")
        dump.mkdir()
        (here / "request.json").write_text(json.dumps(request | {"dump": str(dump)}))
        command = [sys.executable, "-m", module, str(here / "request.json"), str(here / "result.json")]
        try:
            done = subprocess.run(command, env=_environment(dump, libtpu_times), capture_output=True, text=True, timeout=timeout)
        except subprocess.TimeoutExpired:
            raise CompilerError(f"compiling {request.get('target', module)} took longer than {timeout:.0f} s.") from None
        result = here / "result.json"
        if done.returncode or not result.exists():
            last = "\n".join(done.stderr.strip().splitlines()[-15:])
            raise CompilerError(f"the compiler's process ended with code {done.returncode}:\n{last}")
        return json.loads(result.read_text())


def _environment(dump, libtpu_times):
    flags = f"{os.environ.get('LIBTPU_INIT_ARGS', '')} {_FLAGS.format(dump)} {_TIMES.format(dump) if libtpu_times else ''}".strip()
    path = os.pathsep.join(p or os.getcwd() for p in sys.path)
    return os.environ | {"LIBTPU_INIT_ARGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": path}

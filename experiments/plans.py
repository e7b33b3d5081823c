"""Plans the flagships of docs/plans/plans.toml and writes their reports beside it.

    python -m experiments.plans                        # all of them, hours; what was compiled before is only read
    python -m experiments.plans --only=moe_1b-v4-4     # some of them
    python -m experiments.plans --check                # does it still compile and fit? memory only, nothing written

Of each plan: the answer with its tables (.txt), the numbers (.json), the picture (.png); and of all the table in README.md.
"""
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import tomllib

from absl import app, flags

from experiments import common

_FOLDER = flags.DEFINE_string("folder", "docs/plans", "where plans.toml is, and the reports go")
_ONLY = flags.DEFINE_list("only", [], "names of plans; default: all")
_CHECK = flags.DEFINE_bool("check", False, "compile without optimisation, write nothing, end with status 1 where a plan does not fit")

HEAD = """# Plans of the flagships

Every report beside this file is the output of one command; `python -m experiments.plans` makes them again from `plans.toml`. Compiled for
the topology on a machine without a TPU, never run on one: the times are estimates, and `docs/plan.md` says how far to trust them.

| plan | topology | mesh | memory, GiB per chip | step | predicted MFU | aim | largest loss |
|---|---|---|---|---|---|---|---|
"""


def main(argv):
    del argv
    folder = pathlib.Path(_FOLDER.value)
    plans = tomllib.loads((folder / "plans.toml").read_text())
    unknown = [name for name in _ONLY.value if name not in plans]
    if unknown:
        sys.exit(f"error: --only={unknown[0]}: plans.toml has {', '.join(plans)}.")
    wanted = {name: plans[name] for name in _ONLY.value or plans}
    failed = [name for name, entry in wanted.items() if not _plan(name, entry, folder)]
    if not _CHECK.value:
        (folder / "README.md").write_text(HEAD + "".join(_row(name, entry, folder) for name, entry in plans.items()))
    sys.exit(f"error: no plan, or one that does not fit: {', '.join(failed)}" if failed else 0)


def command(entry, *more):
    """What to type for a plan of plans.toml."""
    return ["-m", "experiments.plan", f"--config={entry['config']}", f"--topology={entry['topology']}", *entry["flags"], *more]


def _plan(name, entry, folder):
    """Runs one plan in a process of its own; whether there is a plan, and with --check whether it fits."""
    common.say(f"== {name}")
    with tempfile.TemporaryDirectory() as scratch:
        made = {kind: pathlib.Path(scratch) / f"{name}.{kind}" for kind in ("json", "png")}
        more = ["--memory", "--require_fit"] if _CHECK.value else [f"--{kind}={path}" for kind, path in made.items()]
        child = subprocess.Popen([sys.executable, *command(entry, *more)], stdout=subprocess.PIPE, text=True)
        lines = []
        for line in child.stdout:
            common.say(line.rstrip())
            lines.append(line)
        if child.wait() or _CHECK.value:
            return child.returncode == 0
        for path in made.values():
            (folder / path.name).write_bytes(path.read_bytes())
    # Progress is told in lines that begin with two blanks or belong to no answer; the answer begins with the config's name.
    first = next(i for i, line in enumerate(lines) if line.startswith(entry["config"]))
    typed = " \\\n    ".join(["python " + " ".join(command(entry)[:4]), *entry["flags"]])
    (folder / f"{name}.txt").write_text(f"$ {typed}\n\n" + "".join(line.rstrip() + "\n" for line in lines[first:]))
    return True


def _row(name, entry, folder):
    """One line of the table; of a plan that was not made yet, its name and aim."""
    file, aim = folder / f"{name}.json", f"{entry['reach']:.0%}" if "reach" in entry else "fits"
    if not file.exists():
        return f"| {name} | {entry['topology']} | | not planned yet | | | {aim} | |\n"
    from effmodels.plan import records
    from effmodels.plan.report import binds, rows

    plan = records.from_json(json.loads(file.read_text()))
    mesh = " ".join(f"{axis}={n}" for axis, n in plan.mesh.items() if n > 1)
    memory = f"{plan.memory.total / 2**30:.1f} of {plan.memory.available / 2**30:.2f}" + ("" if plan.fits else ": **does not fit**")
    lost = [share for share in binds.shares(plan) if share.what != binds.AT_PEAK] if plan.operations else []
    binding = f"{rows.share_name(lost[0])}, {lost[0].share:.0%}" if lost else ""
    step = f"{plan.seconds:.3g} s | {plan.mfu:.1%}"
    return f"| [{name}]({name}.txt) | {entry['topology']} | {mesh} | {memory} | {step} | {aim} | {binding} |\n"


if __name__ == "__main__":
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "1")
    app.run(main)

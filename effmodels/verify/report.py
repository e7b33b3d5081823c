"""What a verification found: rows of (check, what, value, bound), the worst leaves, explanations; as a table and as JSON."""
import dataclasses
import math

LOADS = "tokens per layer and expert"  # the row that says whether both sides routed alike


@dataclasses.dataclass(frozen=True)
class Row:
    """One comparison. value and bound: relative errors, or counts where `what` says so; passed: value <= bound (or inside a band)."""

    check: str
    what: str
    value: float
    bound: float
    passed: bool
    note: str = ""


def row(check, what, value, bound, note="", least=None):
    """A Row that passes when the value is a number of at most `bound` (and at least `least`)."""
    value = float(value)
    passed = math.isfinite(value) and value <= bound and (least is None or value >= least)
    band = "" if least is None else f"at least {least:.1e}"
    return Row(check, what, value, float(bound), passed, "; ".join(t for t in (band, note) if t))


@dataclasses.dataclass
class Outcome:
    """What one check found. leaves: the worst parameters by name; explanations: sentences on what failed."""

    check: str
    rows: list = dataclasses.field(default_factory=list)
    leaves: list = dataclasses.field(default_factory=list)
    explanations: list = dataclasses.field(default_factory=list)
    seconds: float = 0.0
    skipped: str = ""

    @property
    def passed(self):
        """Whether every comparison is within its bound."""
        return all(r.passed for r in self.rows)


@dataclasses.dataclass
class Report:
    """All outcomes of one verification and what it ran on."""

    setting: dict
    outcomes: list

    @property
    def passed(self):
        """Whether something was checked, and every check passed."""
        return all(o.passed for o in self.outcomes) and any(not o.skipped for o in self.outcomes)

    def table(self):
        """The table that a person reads, with the worst leaves and the explanations under it."""
        lines = [f"{'check':<13}{'what':<46}{'value':>10}  {'bound':>8}"]
        for outcome in self.outcomes:
            if outcome.skipped:
                lines.append(f"{outcome.check:<13}not done: {outcome.skipped}")
            for r in outcome.rows:
                verdict = ("pass" if r.passed else "FAIL") + (f"  ({r.note})" if r.note else "")
                lines.append(f"{r.check:<13}{r.what:<46}{_number(r.value):>10}  {_number(r.bound):>8}  {verdict}")
        for outcome in self.outcomes:
            if not outcome.passed:
                lines += ["", f"{outcome.check} FAILED"]
                lines += [f"  {text}" for text in outcome.explanations]
                for x in outcome.leaves:
                    lines.append(f"  {x['name']:<44} error {x['error']:.1e}  ratio {x['ratio']:.3f}  {x['reading']}")
        failed = [o.check for o in self.outcomes if not o.passed]
        done = sum(not o.skipped for o in self.outcomes)
        lines += ["", f"{done - len(failed)} of {done} checks passed" + (f"; FAILED: {', '.join(failed)}" if failed else "")]
        return "\n".join(lines)

    def to_dict(self):
        """Everything, as JSON holds it (a value that is not finite becomes text)."""
        outcomes = [dataclasses.asdict(o) | {"passed": o.passed} for o in self.outcomes]
        return _finite({"passed": self.passed, "setting": self.setting, "outcomes": outcomes})


def _number(x):
    if not math.isfinite(x):
        return str(x)
    return f"{x:.0f}" if x == int(x) and abs(x) < 1e6 else f"{x:.1e}"


def _finite(value):
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value

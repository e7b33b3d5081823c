"""The result of a kernel benchmark: one row per case and contestant, as a table, as JSON, as a plot.

A row: {"op", "direction", "shape", "dtype", "contestant", "milliseconds", "roofline_share", "ratio", ...}, or {..., "error": why
there is none.
`ratio` is the contestant's time over ours (above 1: ours is faster), in the same run.
"""
import json
import pathlib

OURS = ("pallas_tpu", "pallas_gpu", "xla")


def row(case, contestant, peak, measured=None, error=None):
    """One row; `peak` (chips.Peak) gives the share of the roofline."""
    result = {"op": case.op, "direction": case.direction, "shape": dict(case.shape), "dtype": case.dtype, "contestant": contestant}
    if error is not None:
        return {**result, "error": error}
    result.update(measured)
    if peak is not None and "milliseconds" in measured:
        result["roofline_share"] = round(peak.seconds(case.flops(), case.bytes()) * 1e3 / measured["milliseconds"], 3)
    return result


def add_ratios(rows):
    """Each row's time over that of our best implementation for the same case (in the order of OURS)."""
    by_case = {}
    for r in rows:
        if _time(r):
            by_case.setdefault(_case(r), {})[r["contestant"]] = _time(r)
    for r in rows:
        times = by_case.get(_case(r), {})
        ours = next((times[name] for name in OURS if name in times), None)
        if ours and _time(r):
            r["ratio"] = round(_time(r) / ours, 3)
    return rows


def _time(r):
    return r.get("milliseconds", r.get("cycles"))


def _case(r):
    return r["op"], r["direction"], tuple(r["shape"].items()), r["dtype"]


def lines(rows):
    """The table as text, a blank line between cases."""
    previous = None
    for r in rows:
        if _case(r) != previous:
            previous = _case(r)
            shape = " ".join(f"{k}={v}" for k, v in r["shape"].items())
            yield f"\n{r['op']} {r['direction']}  {shape}  {r['dtype']}"
        if "error" in r:
            yield f"  {r['contestant']:26s} no figure: {r['error']}"
            continue
        names = ("kernels_milliseconds", "mxu_share", "temporary_bytes")
        extra = "".join(f"  {name.replace('_', ' ')} {r[name]:.4g}" for name in names if r.get(name) is not None)
        time = f"{r['milliseconds']:10.4g} ms" if "milliseconds" in r else f"{r['cycles']:12,} issue cycles"
        share = f"  roofline {r['roofline_share']:6.1%}" if "roofline_share" in r else ""
        yield f"  {r['contestant']:26s} {time}{share}  {r.get('ratio', float('nan')):6.2f} x ours{extra}"


def write(path, header, rows):
    """The whole run as JSON."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**header, "rows": rows}, indent=1) + "\n")


def plot(path, header, rows):
    """Bars: each case's contestants by the share of the roofline."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    names = list(dict.fromkeys(_case(r) for r in rows))
    shown = [r for r in rows if "roofline_share" in r]
    who = list(dict.fromkeys(r["contestant"] for r in shown))
    figure, axes = plt.subplots(figsize=(9, 0.4 + 0.16 * sum(1 for _ in shown) + 0.2 * len(names)), dpi=120)
    y, ticks = 0.0, {}
    for name in names:
        here = [r for r in shown if _case(r) == name]
        for r in here:
            axes.barh(y, r["roofline_share"], color=f"C{who.index(r['contestant'])}")
            axes.text(r["roofline_share"] + 0.005, y, f"{r['contestant']}  {r['milliseconds']:.3g} ms", va="center", fontsize=6)
            y += 1
        if here:
            op, direction, shape, _ = name
            ticks[y - len(here) / 2 - 0.5] = f"{op} {direction}\n" + " ".join(f"{k}={v}" for k, v in shape)
        y += 1
    axes.set_yticks(list(ticks), list(ticks.values()), fontsize=6)
    axes.invert_yaxis()
    axes.set(xlim=(0, 1.15), xlabel=f"share of the roofline: {header['what']}")
    figure.tight_layout()
    figure.savefig(path)

"""A plan as one PNG: the timeline of a step above the memory by category."""
from effmodels.plan import units
from effmodels.plan.records import MEMORY_PARTS
from effmodels.plan.report import spans


def save(plan, path):
    """Writes the picture of a `Plan`; a plan without times shows its memory only. Raises ModuleNotFoundError without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "a picture of a plan needs matplotlib, which is not installed: pip install -e '.[notebook]'; --html needs nothing."
        ) from error
    found = spans.spans(plan.operations)
    heights = ([0.6 * len(spans.lanes(found)) + 0.6, 0.5] if found else []) + [1.1, 0.6]  # each panel, and its legend below
    figure = Figure(figsize=(10, 0.7 + sum(heights)), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    needed = f"needs {units.size(plan.memory.total)} per device"
    fits = needed if plan.fits and not plan.memory.available else "fits" if plan.fits else "does not fit"
    figure.suptitle(f"{plan.config} on {plan.topology}: {fits}", fontsize=11)
    if found:
        _timeline(plan, found, *panels[:2])
    _memory(plan, *panels[-2:])
    figure.savefig(path, format="png")


def _timeline(plan, found, axes, below):
    scale, unit = units.time_unit(plan.seconds)
    rows = spans.lanes(found)
    for kind in spans.COLOURS:
        drawn = [s for s in found if s.kind == kind]
        if drawn:
            axes.barh(
                [rows.index(s.lane) for s in drawn], [s.seconds / scale for s in drawn], left=[s.start / scale for s in drawn], height=0.8,
                color=spans.COLOURS[kind], label=spans.LABELS.get(kind), linewidth=0,
            )  # fmt: skip
    for s in found:
        if s.lane == "phase" and s.seconds > 0.012 * len(s.kind) * plan.seconds:
            axes.text((s.start + s.seconds / 2) / scale, rows.index("phase"), s.kind, ha="center", va="center", fontsize=9)
    axes.set(xlim=(0, plan.seconds / scale), xlabel=f"{unit} of one step", yticks=range(len(rows)), yticklabels=rows)
    axes.invert_yaxis()
    _finish(axes, below)


def _memory(plan, axes, below):
    memory, start = plan.memory, 0.0
    scale, unit = units.size_unit(max(memory.total, memory.available, 1))
    for name in MEMORY_PARTS:
        num_bytes = getattr(memory, name)
        if num_bytes:
            label = f"{spans.memory_label(name, plan.what)} {units.size(num_bytes)}"
            colour = spans.MEMORY_COLOURS[name]
            axes.barh(0, num_bytes / scale, left=start / scale, height=0.8, color=colour, label=label, edgecolor="white", linewidth=0.4)
            start += num_bytes
    if memory.available:
        axes.axvline(memory.available / scale, color="#d00", linestyle="--", label=f"usable {units.size(memory.available)}")
    end = max(memory.total, memory.available, 1) / scale
    axes.set(xlim=(0, 1.01 * end), xlabel=f"{unit} per device", yticks=[0], yticklabels=["memory"])
    _finish(axes, below)


def _finish(axes, below):
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    below.axis("off")
    below.legend(*axes.get_legend_handles_labels(), ncols=3, fontsize=8, frameon=False, loc="upper center", borderaxespad=0)

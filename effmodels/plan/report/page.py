"""A plan as one HTML file that needs nothing else: the answer, a timeline of the step and the memory as SVG, the tables."""
import html

from effmodels.plan import units
from effmodels.plan.records import MEMORY_PARTS
from effmodels.plan.report import answer, rows, spans

_WIDTH, _LEFT, _RIGHT = 960, 150, 20  # of a picture, of its row labels, of the margin behind its plot, in pixels
_PLOT = _WIDTH - _LEFT - _RIGHT
_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #222; max-width: 1080px; margin: 2em auto; padding: 0 1em; }
h1 { font-size: 1.35em; } h2 { font-size: 1.1em; margin-top: 2em; }
.verdict { padding: .6em .9em; border-left: 6px solid #009e73; background: #eef7f3; font-weight: 600; }
.verdict.no { border-color: #d55e00; background: #fcf0e8; } .verdict.unknown { border-color: #999; background: #f3f3f3; }
pre { background: #f6f6f6; padding: 1em; overflow-x: auto; font-size: 13px; line-height: 1.4; }
.wide { overflow-x: auto; } svg { max-width: 100%; height: auto; }
table { border-collapse: collapse; font-size: 13px; } th, td { padding: .25em .7em; border-bottom: 1px solid #ddd; white-space: nowrap; }
th { text-align: right; border-bottom: 2px solid #999; } td { text-align: right; font-variant-numeric: tabular-nums; }
th.word, td.word { text-align: left; } .note, li { color: #555; font-size: 13px; }
"""


def html_page(plan, *, budget=None, saving=None, failures=None):
    """The whole document as a string; arguments as of `answer.text`."""
    title = html.escape(f"Plan of {plan.config} on {plan.topology}")
    mood = "no" if not plan.fits else "" if plan.memory.available else "unknown"
    summary = answer.text(plan, budget=budget, saving=saving, failures=failures)
    parts = [
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>{_STYLE}</style></head><body>',
        f'<h1>{title}</h1>\n<p class="verdict {mood}">{html.escape(answer.verdict(plan))}</p>\n<pre>{html.escape(summary)}</pre>',
        f'<h2>Memory of one device</h2>\n<div class="wide">{memory_svg(plan)}</div>',
    ]
    if plan.operations:
        caption = (
            "One step of one chip. Each operation is drawn once, as long as all its calls together: a scanned layer as long as all layers. "
            "Neighbours that are too short to see are drawn together, by kind. Point at a piece to see what it is."
        )
        parts.append(f'<h2>Timeline</h2>\n<div class="wide">{timeline_svg(plan)}</div>\n<p class="note">{caption}</p>')
    else:
        parts.append(f'<p class="note">{html.escape(answer.tables(plan).splitlines()[-1])}</p>')
    parts += [_table(table) for table in rows.tables(plan)]
    parts.append(_list("Notes", plan.notes) + _list("Made with", [f"{name} {version}" for name, version in plan.versions.items()]))
    return "\n".join(parts) + "\n</body></html>\n"


def timeline_svg(plan):
    """The lanes of `spans` over the seconds of a step."""
    total = plan.seconds
    scale, unit = units.time_unit(total)
    found = spans.spans(plan.operations)
    lanes = spans.lanes(found)
    tops = {lane: 20 + 50 * i for i, lane in enumerate(lanes)}
    pieces = [_text(_LEFT - 10, top + 25, lane, "end") for lane, top in tops.items()]
    for s in found:
        x, width = _LEFT + _PLOT * s.start / total, _PLOT * s.seconds / total
        tip = f"{s.name}: {units.time(s.seconds)}, {units.percent(s.seconds / total)}"
        pieces.append(_rect(x, tops[s.lane], width, spans.COLOURS[s.kind], tip))
        if s.lane == "phase" and 7 * len(s.kind) < width:
            pieces.append(_text(x + width / 2, tops[s.lane] + 25, s.kind, "middle"))
    bottom = 20 + 50 * len(lanes)
    pieces += _axis(total / scale, f"{unit} of one step", bottom)
    shown = [(spans.COLOURS[kind], label) for kind, label in spans.LABELS.items() if any(s.kind == kind for s in found)]
    legend, height = _legend(shown, bottom + 55)
    return _svg(height, pieces + legend, "Timeline of one step")


def memory_svg(plan):
    """Memory by category against what a chip has."""
    memory = plan.memory
    end = max(memory.total, memory.available, 1)
    scale, unit = units.size_unit(end)
    pieces, x, shown = [_text(_LEFT - 10, 55, "needed", "end")], float(_LEFT), []
    for name in MEMORY_PARTS:
        num_bytes = getattr(memory, name)
        if num_bytes:
            label = f"{spans.memory_label(name, plan.what)} {units.size(num_bytes)}"
            shown.append((spans.MEMORY_COLOURS[name], label))
            width = _PLOT * num_bytes / end
            pieces.append(_rect(x, 30, width, spans.MEMORY_COLOURS[name], label, ' stroke="#fff" stroke-width=".5"'))
            x += width
    if memory.available:
        edge = _LEFT + _PLOT * memory.available / end
        pieces.append(f'<path d="M{edge:.2f} 22V78" stroke="#d00" stroke-width="2" stroke-dasharray="5 3"/>')
        side = "end" if edge > _WIDTH / 2 else "start"
        pieces.append(_text(edge, 16, f"usable: {units.size(memory.available)}", side))
    pieces += _axis(end / scale, f"{unit} per device", 80)
    legend, height = _legend(shown, 135)
    return _svg(height, pieces + legend, "Memory by category")


def _axis(end, label, top):
    """A line with round ticks from 0 to `end` below a plot."""
    step = spans.tick_step(end)
    parts = [f'<path d="M{_LEFT} {top}H{_LEFT + _PLOT}" stroke="#666"/>']
    for i in range(int(end / step + 1e-9) + 1):
        x = _LEFT + _PLOT * i * step / end
        parts += [f'<path d="M{x:.2f} {top}v5" stroke="#666"/>', _text(x, top + 18, f"{i * step:g}", "middle")]
    return [*parts, _text(_LEFT + _PLOT / 2, top + 36, label, "middle")]


def _legend(entries, top):
    """Squares and labels in rows that fit the width; (elements, height of the picture)."""
    parts, x = [], _LEFT
    for colour, label in entries:
        width = 34 + 7.6 * len(label)
        if x > _LEFT and x + width > _WIDTH:
            x, top = _LEFT, top + 22
        parts += [f'<rect x="{x:.0f}" y="{top - 11}" width="13" height="13" fill="{colour}"/>', _text(x + 18, top, label, "start")]
        x += width
    return parts, top + 14


def _rect(x, y, width, colour, tip, more=""):
    return f'<rect x="{x:.2f}" y="{y}" width="{width:.2f}" height="40" fill="{colour}"{more}><title>{html.escape(tip)}</title></rect>'


def _text(x, y, content, anchor):
    return f'<text x="{x:.1f}" y="{y}" text-anchor="{anchor}">{html.escape(content)}</text>'


def _svg(height, elements, label):
    size = f'viewBox="0 0 {_WIDTH} {height}" width="{_WIDTH}" height="{height}"'
    head = f'<svg {size} role="img" aria-label="{label}" font-family="sans-serif" font-size="13">'
    return "\n".join([head, *elements, "</svg>"])


def _table(table):
    def cells(tag, values):
        return "".join(f"<{tag}{' class=word' if i < table.names else ''}>{html.escape(value)}</{tag}>" for i, value in enumerate(values))

    if not table.rows:
        return f"<h2>{table.title}</h2>\n<p>None.</p>"
    body = "\n".join(f"<tr>{cells('td', row)}</tr>" for row in table.rows)
    inside = f"<table><tr>{cells('th', table.columns)}</tr>\n{body}</table>"
    return f'<h2>{table.title}</h2>\n<div class="wide">{inside}</div>\n<p class="note">{html.escape(table.note)}</p>'


def _list(title, entries):
    return f"<h2>{title}</h2>\n<ul>{''.join(f'<li>{html.escape(entry)}</li>' for entry in entries)}</ul>" if entries else ""

"""Figures for people: bytes, seconds and counts with three digits and the unit that fits."""
import math

GIB = 2**30
_BYTES = ((2**60, "EiB"), (2**50, "PiB"), (2**40, "TiB"), (GIB, "GiB"), (2**20, "MiB"), (2**10, "KiB"), (1, "B"))
_SECONDS = ((1.0, "s"), (1e-3, "ms"), (1e-6, "us"))
_LONG = ((86400.0, "days"), (3600.0, "hours"), (60.0, "minutes"))
_COUNTS = ((1e24, "Y"), (1e21, "Z"), (1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))

_WORDS = ((1e12, "trillion"), (1e9, "billion"), (1e6, "million"))


def digits(value):
    """A number with three significant digits and no exponent: 0.0123, 5.31, 41.0, 1,024."""
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else str(value)
    rounded = float(f"{value:.2e}")
    return f"{rounded:,.{min(9, max(0, 2 - math.floor(math.log10(abs(rounded)))))}f}"


def size_unit(num_bytes):
    """(bytes in it, name) of the binary unit for a number of bytes."""
    return next(((scale, name) for scale, name in _BYTES if num_bytes >= 0.9995 * scale), (1, "B"))


def size(num_bytes):
    """Bytes as '30.8 GiB'."""
    scale, name = size_unit(num_bytes)
    return f"{digits(num_bytes / scale)} {name}"


def time(seconds):
    """Seconds as '5.31 s', '12.0 ms' or '4.60 us'; from two minutes on as minutes, hours or days."""
    for scale, name in _LONG:
        if seconds >= 2 * scale:
            return f"{digits(seconds / scale)} {name}"
    scale, name = time_unit(seconds)
    return f"{digits(seconds / scale)} {name}"


def time_unit(seconds):
    """(seconds in it, name) of the unit for a duration of a step."""
    return next(((scale, name) for scale, name in _SECONDS if seconds >= 0.9995 * scale), _SECONDS[-1])


def count(value, unit):
    """A figure with a unit and its prefix: '823 PFLOP', '1.58 MB/s'."""
    scale, prefix = next(((scale, prefix) for scale, prefix in _COUNTS if abs(value) >= 0.9995 * scale), (1.0, ""))
    return f"{digits(value / scale)} {prefix}{unit}"


def number(value):
    """A count in words for people: '364', '372,000', '1.40 trillion'."""
    scale, name = next(((scale, name) for scale, name in _WORDS if abs(value) >= 0.9995 * scale), (1.0, ""))
    return f"{digits(value / scale)} {name}".rstrip()


def span(low, high):
    """Two durations as '5.92 to 6.76 s', in the unit of the longer one."""
    shown = time(high)
    scale = next(scale for scale, name in _LONG + _SECONDS if shown.endswith(f" {name}"))
    return f"{digits(low / scale)} to {shown}"


def percent(share):
    """A share as '54.8 %'."""
    return f"{100 * share:.1f} %" if share == 0 or abs(share) >= 0.0005 else "< 0.1 %"

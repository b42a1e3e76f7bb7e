"""Line charts, bars and histograms as inline SVG, drawn by hand so that a report needs nothing from outside.

A chart is `WIDTH` x `HEIGHT` units and scales with its container. Long curves are cut into buckets, each of
which draws its mean and, behind it, the band from its lowest to its highest value: no spike is lost.
"""

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 560, 264
LEFT, RIGHT, TOP, BOTTOM = 58, 26, 14, 38
MOST_POINTS = 400
HOVER_STRIPS = 100
# Positive curves that span more than this ratio are drawn on a logarithmic axis.
LOG_RATIO = 30.0


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One line: `points` are (step, value) in the order of steps; a value of None leaves a gap."""

    label: str
    colour: str
    points: Sequence[tuple[float, float | None]]
    dots: bool = False


@dataclass(frozen=True)
class _Bucket:
    """Neighbouring points drawn as one."""

    x: float
    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class _Axis:
    """Where a value lies on a chart's edge: `start` and `end` are SVG units for `low` and `high`."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def at(self, value: float) -> float:
        """The SVG coordinate of a value."""
        low, high = (math.log10(self.low), math.log10(self.high)) if self.log else (self.low, self.high)
        value = math.log10(value) if self.log else value
        return self.start + (value - low) / (high - low) * (self.end - self.start)


def number(value: float) -> str:
    """A number as short as it stays readable: `0.0342`, `12.5`, `3.2k`, `1.5M`, `3e-04`."""
    size = abs(value)
    if size == 0:
        return "0"
    for limit, suffix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if size >= limit * 0.9999:
            return f"{value / limit:.3g}{suffix}"
    return f"{value:.1e}".replace(".0e", "e") if size < 1e-3 else f"{value:.3g}"


def numbers(values: Sequence[float]) -> list[str]:
    """Several numbers as `number` writes them, with as many digits as tell them apart."""
    texts = [number(value) for value in values]
    digits = 3
    while len({_value(text) for text in texts}) < len(set(values)) and digits < 12:
        digits += 1
        texts = [_precise(value, digits) for value in values]
    return texts


def _value(text: str) -> float:
    """What a label says."""
    for suffix, power in (("k", "e3"), ("M", "e6"), ("G", "e9"), ("T", "e12")):
        text = text.replace(suffix, power)
    return float(text)


def _precise(value: float, digits: int) -> str:
    """So many digits of a number: `1502`, `9.995e-4`."""
    if value == 0 or 0.01 <= abs(value) < 10.0**digits:
        return f"{value:.{digits}g}"
    mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"


def linear_ticks(low: float, high: float, most: int = 6) -> list[float]:
    """At most `most` round numbers (1, 2 or 5 times a power of ten apart) within low..high."""
    raw = (high - low) / max(1, most - 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [index * step for index in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2, 5 times powers of ten within low..high; only the powers where those would be too many."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [factor * 10.0**power for power in powers for factor in (1, 2, 5)]
    ticks = [tick for tick in ticks if low * 0.999 <= tick <= high * 1.001]
    if len(ticks) > 7:
        ticks = [tick for tick in ticks if math.isclose(math.log10(tick) % 1, 0, abs_tol=1e-9)]
    return ticks if len(ticks) <= 9 else ticks[:: math.ceil(len(ticks) / 9)]


def _stretches(curve: Curve) -> list[list[_Bucket]]:
    """The curve between its gaps, each stretch downsampled; together about `MOST_POINTS` buckets."""
    size = math.ceil(len(curve.points) / MOST_POINTS)
    stretches: list[list[_Bucket]] = [[]]
    for start in range(0, len(curve.points), size):
        chunk = [(x, y) for x, y in curve.points[start : start + size] if y is not None]
        if not chunk:
            stretches.append([])
            continue
        values = [y for _, y in chunk]
        middle = sum(x for x, _ in chunk) / len(chunk)
        stretches[-1].append(_Bucket(middle, sum(values) / len(values), min(values), max(values)))
    return [stretch for stretch in stretches if stretch]


def _domain(values: list[float], log: bool) -> tuple[float, float]:
    """The range of an axis: a little wider than the values, and never empty."""
    low, high = min(values), max(values)
    if log:
        return low / 1.15, high * 1.15
    spread = (high - low) or abs(high) * 0.2 or 1.0
    bottom = low - 0.06 * spread
    # A quantity that is never negative keeps its axis from going below nought.
    return (max(0.0, bottom) if low >= 0 else bottom), high + 0.06 * spread


def _path(places: Sequence[tuple[float, float]]) -> str:
    """SVG path data through the places."""
    return "M" + "L".join(f"{x:.1f},{y:.1f}" for x, y in places)


def _draw_curve(curve: Curve, x_axis: _Axis, y_axis: _Axis) -> list[str]:
    """Band, line and dots of one curve, and a red mark at the foot of every step without a finite value."""
    parts = []
    for stretch in _stretches(curve):
        places = [(x_axis.at(bucket.x), y_axis.at(bucket.mean)) for bucket in stretch]
        if len(curve.points) > MOST_POINTS:
            upper = [(x_axis.at(bucket.x), y_axis.at(bucket.high)) for bucket in stretch]
            lower = [(x_axis.at(bucket.x), y_axis.at(bucket.low)) for bucket in reversed(stretch)]
            parts.append(f'<path d="{_path(upper + lower)}Z" fill="{curve.colour}" opacity=".18"/>')
        if len(places) > 1:
            parts.append(f'<path d="{_path(places)}" class="line" stroke="{curve.colour}"/>')
        if curve.dots or len(places) == 1:
            parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.2" fill="{curve.colour}"/>' for x, y in places]
    lost = [step for step, value in curve.points if value is None]
    for step in lost[:: math.ceil(len(lost) / HOVER_STRIPS) or 1]:
        place = f"M{x_axis.at(step):.1f},{HEIGHT - BOTTOM}v-9"
        parts.append(f'<path d="{place}" class="lost"><title>not finite at step {step:,.0f}</title></path>')
    return parts


def _grid(x_axis: _Axis, y_axis: _Axis, x_label: str, whole: bool = False) -> list[str]:
    """Grid lines, ticks and their labels; `whole` leaves out values that are no whole numbers."""
    base, right = HEIGHT - BOTTOM, x_axis.end
    parts = []
    ticks = log_ticks(y_axis.low, y_axis.high) if y_axis.log else linear_ticks(y_axis.low, y_axis.high)
    ticks = [tick for tick in ticks if not whole or tick == round(tick)]
    for tick, text in zip(ticks, numbers(ticks), strict=True):
        y = y_axis.at(tick)
        parts.append(f'<path d="M{LEFT},{y:.1f}H{right}" class="grid"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" class="tick" text-anchor="end">{text}</text>')
    for tick in linear_ticks(x_axis.low, x_axis.high, most=8):
        if tick != round(tick):
            continue
        x = x_axis.at(tick)
        parts.append(f'<path d="M{x:.1f},{base}v5" class="axis"/>')
        parts.append(f'<text x="{x:.1f}" y="{base + 18}" class="tick" text-anchor="middle">{round(tick):,}</text>')
    parts.append(f'<path d="M{LEFT},{base}H{right}" class="axis"/>')
    parts.append(f'<text x="{right}" y="{HEIGHT - 4}" class="label" text-anchor="end">{escape(x_label)}</text>')
    return parts


def _nearest(points: Sequence[tuple[float, float | None]], wanted: float) -> tuple[float, float | None]:
    """The point whose step lies nearest to the wanted one."""
    after = bisect_left(points, wanted, key=lambda point: point[0])
    return min(points[max(0, after - 1) : after + 1], key=lambda point: abs(point[0] - wanted))


def _hover(curves: Sequence[Curve], x_axis: _Axis) -> list[str]:
    """Invisible strips whose tooltips name the step and every curve's value nearest to it."""
    points = curves[0].points
    strips = min(HOVER_STRIPS, len(points))
    width = (WIDTH - LEFT - RIGHT) / strips
    parts = []
    for index in range(strips):
        x = LEFT + index * width
        wanted = x_axis.low + (index + 0.5) / strips * (x_axis.high - x_axis.low)
        lines = []
        for curve in curves:
            step, value = _nearest(curve.points, wanted)
            shown = "not finite" if value is None else number(value)
            lines.append(f"{curve.label} at step {step:,.0f}: {shown}")
        title = escape("\n".join(lines))
        parts.append(
            f'<rect x="{x:.1f}" y="{TOP}" width="{width:.2f}" height="{HEIGHT - TOP - BOTTOM}" class="hover">'
            f"<title>{title}</title></rect>"
        )
    return parts


def line_chart(curves: Sequence[Curve], *, label: str, x_label: str = "step") -> str:
    """An SVG of the curves over a common step axis; a sentence instead where there is no value at all."""
    curves = [curve for curve in curves if curve.points]
    values = [y for curve in curves for _, y in curve.points if y is not None]
    if not values:
        return '<p class="nothing">No values were recorded.</p>'
    steps = [x for curve in curves for x, _ in curve.points]
    log = min(values) > 0 and max(values) / min(values) > LOG_RATIO
    first, last = min(steps), max(steps)
    margin = 1.0 if first == last else 0.0
    x_axis = _Axis(first - margin, last + margin, LEFT, WIDTH - RIGHT)
    y_axis = _Axis(*_domain(values, log), HEIGHT - BOTTOM, TOP, log)
    parts = _grid(x_axis, y_axis, x_label + (" (logarithmic values)" if log else ""))
    for curve in curves:
        parts += _draw_curve(curve, x_axis, y_axis)
    parts += _hover(curves, x_axis)
    return _svg(parts, label)


def histogram(shares: Sequence[float], *, label: str, colour: str, x_label: str, bars: int = 20) -> str:
    """An SVG that counts `shares`, fractions of 0..1, in equally wide bars over the percentages they span."""
    low = math.floor(min(shares) * 20) / 20
    low = min(low, 0.95)
    x_axis = _Axis(100 * low, 100.0, LEFT, WIDTH - RIGHT)
    counts = [0] * bars
    for share in shares:
        counts[min(bars - 1, int((min(share, 1.0) - low) / (1 - low) * bars))] += 1
    y_axis = _Axis(0.0, max(counts) * 1.06, HEIGHT - BOTTOM, TOP)
    parts = _grid(x_axis, y_axis, x_label, whole=True)
    width = (WIDTH - LEFT - RIGHT) / bars
    for index, count in enumerate(counts):
        if count:
            y = y_axis.at(count)
            start, end = (100 * (low + (index + edge) / bars * (1 - low)) for edge in (0, 1))
            parts.append(
                f'<rect x="{LEFT + index * width + 1:.1f}" y="{y:.1f}" width="{width - 2:.1f}" '
                f'height="{HEIGHT - BOTTOM - y:.1f}" rx="2" fill="{colour}">'
                f"<title>{start:.4g}% to {end:.4g}% full: {count:,}</title></rect>"
            )
    return _svg(parts, label)


def bars(counts: Sequence[int], *, label: str, colour: str, name: str, mean: str, width: int = WIDTH) -> str:
    """An SVG with a bar for each of `counts`, numbered from 0, and a line at their mean; red marks stand for 0.

    `name` says what a bar is and `mean` what the line is, for the tooltips; `width` replaces `WIDTH`.
    """
    base = HEIGHT - BOTTOM
    x_axis = _Axis(-0.5, len(counts) - 0.5, LEFT, width - RIGHT)
    y_axis = _Axis(0.0, (max(counts) or 1) * 1.06, base, TOP)
    parts = _grid(x_axis, y_axis, name, whole=True)
    gap = min(4.0, 0.25 * (x_axis.at(1) - x_axis.at(0)))
    for number, count in enumerate(counts):
        left, right, y = x_axis.at(number - 0.5) + gap / 2, x_axis.at(number + 0.5) - gap / 2, y_axis.at(count)
        title = f"<title>{escape(name)} {number}: {count:,}</title>"
        if count:
            place = f'x="{left:.1f}" y="{y:.1f}" width="{right - left:.1f}" height="{base - y:.1f}"'
            parts.append(f'<rect {place} fill="{colour}">{title}</rect>')
        else:
            parts.append(f'<path d="M{x_axis.at(number):.1f},{base}v-9" class="lost">{title}</path>')
    even = sum(counts) / len(counts)
    title = f"<title>{escape(mean)}: {even:,.0f}</title>"
    parts.append(f'<path d="M{LEFT},{y_axis.at(even):.1f}H{x_axis.end}" class="axis">{title}</path>')
    return _svg(parts, label, width)


def _svg(parts: list[str], label: str, width: int = WIDTH) -> str:
    """The drawing's frame, with its name for screen readers."""
    return (
        f'<svg viewBox="0 0 {width} {HEIGHT}" role="img" aria-label="{escape(label, quote=True)}">'
        + "".join(parts)
        + "</svg>"
    )

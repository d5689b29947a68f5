"""The crossover plot as SVG: time of a linear layer over the dense one's, against M."""

import math

PANEL_W, PANEL_H, LEFT, TOP, GAP = 400, 260, 62, 58, 64
COLORS = ["#1f6fb4", "#c8501e", "#2f8f4e", "#7d4fb0", "#b08a00", "#0f8f8f", "#a8326e"]
PEER = "#777777"
IN_A_ROW = 8  # of the legend
SHAPES = ("4096x4096", "14336x4096")


def text(x, y, content, size=11, anchor="middle", weight="normal", color="#222"):
    return (f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}" '
            f'font-weight="{weight}" fill="{color}">{content}</text>')


def line(x1, y1, x2, y2, color, width=1.0, dash=""):
    extra = f' stroke-dasharray="{dash}"' if dash else ""
    return (f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{color}" '
            f'stroke-width="{width}"{extra}/>')


class Panel:
    """Both axes are logarithmic."""

    def __init__(self, left, top, ms, ratios):
        self.left, self.top, self.ms = left, top, ms
        self.low = min(0.25, min(ratios)) * 0.95
        self.high = max(3.0, max(ratios)) * 1.05

    def x(self, m):
        low, high = math.log(self.ms[0]), math.log(self.ms[-1])
        return self.left + PANEL_W * (math.log(m) - low) / max(high - low, 1e-9)

    def y(self, ratio):
        low, high = math.log(self.low), math.log(self.high)
        return self.top + PANEL_H * (1 - (math.log(ratio) - low) / (high - low))

    def frame(self, title):
        parts = [text(self.left + PANEL_W / 2, self.top - 10, title, 13, weight="bold")]
        for ratio in (0.25, 0.5, 1, 2, 3, 5, 10):
            if self.low <= ratio <= self.high:
                y, one = self.y(ratio), ratio == 1
                parts.append(line(self.left, y, self.left + PANEL_W, y,
                                  "#444" if one else "#ddd", 1.2 if one else 1))
                parts.append(text(self.left - 6, y + 4, f"{ratio:g}", anchor="end"))
        labelled = -math.inf
        for m in self.ms:
            x = self.x(m)
            parts.append(line(x, self.top, x, self.top + PANEL_H, "#eee"))
            if x - labelled > 40:
                parts.append(text(x, self.top + PANEL_H + 16, f"{m}", 10))
                labelled = x
        return parts

    def curve(self, points, color, dash):
        path = " ".join(f"{self.x(m):.1f},{self.y(r):.1f}" for m, r in points)
        extra = f' stroke-dasharray="{dash}"' if dash else ""
        marks = [f'<circle cx="{self.x(m):.1f}" cy="{self.y(r):.1f}" r="2.6" fill="{color}"/>'
                 for m, r in points]
        return [f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="2"'
                f'{extra}/>'] + marks


def styles(names):
    """Color and dash: ours in color, peers in grey."""
    result, color = {}, 0
    for name in sorted(names):
        if name in ("bitsandbytes", "torch"):
            result[name] = (PEER, "" if name == "bitsandbytes" else "4 3")
        else:
            result[name] = (COLORS[color % len(COLORS)], "")
            color += 1
    return result


def plot(rows, title):
    """rows: {(pass, shape): {M: {implementation: {"ratio": time over the dense layer's}}}}"""
    names = {name for table in rows.values() for row in table.values() for name in row}
    style = styles(names - {"dense", "torch"})
    parts = []
    for row, direction in enumerate(("forward", "dx")):
        for col, shape in enumerate(SHAPES):
            table = rows.get((direction, shape), {})
            ratios = {m: {name: entry["ratio"] for name, entry in row_.items()
                          if name in style and entry["ratio"]}
                      for m, row_ in sorted(table.items())}
            values = [r for row_ in ratios.values() for r in row_.values()]
            if not values:
                continue
            panel = Panel(LEFT + col * (PANEL_W + GAP), TOP + row * (PANEL_H + GAP), list(ratios),
                          values)
            parts += panel.frame(f"{direction}, {shape}")
            for name, (color, dash) in style.items():
                points = [(m, row_[name]) for m, row_ in ratios.items() if name in row_]
                if points:
                    parts += panel.curve(points, color, dash)
    width, foot = LEFT + 2 * PANEL_W + GAP + 30, TOP + 2 * (PANEL_H + GAP) - 16
    step = (width - LEFT) / IN_A_ROW
    legend = []
    for i, (name, (color, dash)) in enumerate(style.items()):
        x, y = LEFT + i % IN_A_ROW * step, foot + 18 * (1 + i // IN_A_ROW)
        legend += [line(x, y - 4, x + 24, y - 4, color, 3, dash),
                   text(x + 30, y, name, 12, "start")]
    height = foot + 18 * -(-len(style) // IN_A_ROW) + 18
    head = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
            f'viewBox="0 0 {width} {height}" font-family="sans-serif">',
            f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
            text(LEFT, 24, title, 14, "start", "bold"),
            text(16, TOP + PANEL_H + 20, "time over dense bf16", 12).replace(
                "<text ", f'<text transform="rotate(-90 16 {TOP + PANEL_H + 20})" '),
            text(LEFT + PANEL_W + GAP / 2, foot, "M (rows of x)", 12)]
    return "\n".join(head + parts + legend + ["</svg>"]) + "\n"

"""What bench/memory.py measured, for docs/performance.md: two tables and the plot of speed against
the memory budget."""

import math

import memory
from crossover import COLORS, line, text

GIB = 1 << 30
WIDTH, HEIGHT, LEFT, TOP, RIGHT, BOTTOM = 760, 400, 76, 48, 40, 70
MEASURED, PREDICTED, FIXED = COLORS[0], "#999999", COLORS[1]


def budget_of(entry):
    """The budget in GiB; None of a fixed policy."""
    wish = entry["set"].get("train.memory_budget", "")
    return float(wish.removesuffix("GiB")) if wish.endswith("GiB") else None


def policy(entry):
    return f"auto, {entry['set']['train.memory_budget']}" if budget_of(entry) else \
        entry["set"]["train.recompute"]


def by_budget(entries):
    """Fixed policies first, then by budget."""
    return sorted(entries, key=lambda entry: budget_of(entry) or 0)


def origin(entries):
    """Where the rows come from."""
    known = {(e["device"], e["commit"], e["date"]) for e in entries}
    return "\n\n".join(f"Measured: {device}; commit {commit}; {date}."
                       for device, commit, date in sorted(known))


def budget_table(entries, table):
    if not entries:
        return "Not measured yet."
    rows = [[policy(e), f"{e['tokens_per_s']:,.0f}", f"{1e3 * e['step_seconds']:.1f}",
             f"{1e3 * e['predicted_step_seconds']:.1f}",
             f"{e['step_seconds'] / e['predicted_step_seconds'] - 1:+.1%}",
             f"{e['peak_bytes'] / GIB:.3f}",
             "yes" if memory.byte_equal(e) else memory.difference_text(e),
             e["plan"]] for e in by_budget(entries)]
    return table(["train.recompute", "tokens/s", "ms a step", "predicted", "off", "peak, GiB",
                  "as predicted", "plan"], rows) + "\n\n" + origin(entries)


def settings(row):
    """A row's settings in short."""
    quant = row["quant.type"]
    if quant == "nf4":
        quant += "+dq" if row.get("quant.double_quant", True) else ""
    parts = [quant, f"r={row['lora.r']} {row['lora.targets']}",
             f"{row['train.batch_size']} x {row['data.seq_len']}", row["train.recompute"]]
    parts += [f"{row[key]} {what}" for key, what in (
        ("train.memory_budget", "budget"), ("parallel.trials_per_gpu", "trials together"),
        ("quant.compute_dtype", "compute")) if key in row]
    return ", ".join(parts)


def memory_table(entries, table):
    """One row per configuration, as they were measured."""
    if not entries:
        return "Not measured yet."
    rows = []
    for e in entries:
        context = memory.context_of(entries, e["device"], memory.reference_row())
        ratio = memory.device_ratio(e, context)
        rows.append([e["model"].removeprefix("synthetic:"), settings(e["set"]),
                     f"{e['predicted_bytes']:,}",
                     "equal" if memory.byte_equal(e) else memory.difference_text(e),
                     f"{e['device_used_bytes'] / GIB:.3f}" if e["device_used_bytes"] else "-",
                     f"{ratio - 1:+.2%}" if ratio else "-"])
    return table(["model", "run", "predicted peak, B", "the allocator's", "GPU's own, GiB",
                  "over prediction and context"], rows) + "\n\n" + origin(entries)


class Axes:
    """Budgets (GiB) to the right, logarithmic; tokens/s upwards from zero."""

    def __init__(self, budgets, top):
        self.low, self.high = min(budgets) * 0.92, max(budgets) * 1.08
        step = 10 ** math.floor(math.log10(top))
        self.step = step if top / step >= 4 else step / 2
        self.top = self.step * math.ceil(top * 1.02 / self.step)

    def x(self, budget):
        share = math.log(budget / self.low) / math.log(self.high / self.low)
        return LEFT + share * (WIDTH - LEFT - RIGHT)

    def y(self, rate):
        return TOP + (1 - rate / self.top) * (HEIGHT - TOP - BOTTOM)

    def frame(self, budgets):
        parts, rate = [], 0
        while rate <= self.top:
            parts += [line(LEFT, self.y(rate), WIDTH - RIGHT, self.y(rate), "#ddd"),
                      text(LEFT - 6, self.y(rate) + 4, f"{rate:,.0f}", anchor="end")]
            rate += self.step
        for budget in budgets:
            x = self.x(budget)
            parts += [line(x, TOP, x, HEIGHT - BOTTOM, "#eee"),
                      text(x, HEIGHT - BOTTOM + 16, f"{budget:g}", 10)]
        return parts

    def curve(self, points, color, dash=""):
        path = " ".join(f"{self.x(b):.1f},{self.y(rate):.1f}" for b, rate in points)
        extra = f' stroke-dasharray="{dash}"' if dash else ""
        marks = [] if dash else [self.mark(point, color) for point in points]
        return [f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="2"'
                f'{extra}/>'] + marks

    def mark(self, point, color):
        return (f'<circle cx="{self.x(point[0]):.1f}" cy="{self.y(point[1]):.1f}" r="3.4" '
                f'fill="{color}"/>')


def budget_plot(entries):
    """SVG; None with fewer than two budgets."""
    planned = [e for e in by_budget(entries) if budget_of(e)]
    fixed = [e for e in entries if not budget_of(e)]
    if len(planned) < 2:
        return None
    budgets = [budget_of(e) for e in planned]
    at = [(e["peak_bytes"] / GIB, e["tokens_per_s"]) for e in fixed]
    predicted = [(budget_of(e), e["step_tokens"] / e["predicted_step_seconds"]) for e in planned]
    measured = [(budget_of(e), e["tokens_per_s"]) for e in planned]
    axes = Axes(budgets + [x for x, _ in at], max(r for _, r in predicted + measured + at))
    parts = axes.frame(budgets) + axes.curve(predicted, PREDICTED, "5 4")
    parts += axes.curve(measured, MEASURED)
    for entry, point in zip(fixed, at):
        parts += [axes.mark(point, FIXED),
                  text(axes.x(point[0]), axes.y(point[1]) + 18, policy(entry), color=FIXED)]
    for i, (what, color, dash) in enumerate((
            ("auto, at its budget", MEASURED, ""), ("auto, as predicted", PREDICTED, "5 4"),
            ("fixed, at its own peak", FIXED, ""))):
        x = LEFT + 190 * i
        parts += [line(x, HEIGHT - 14, x + 24, HEIGHT - 14, color, 3, dash),
                  text(x + 30, HEIGHT - 10, what, 12, "start")]
    keys = planned[0]["set"]
    title = (f"{planned[0]['model'].removeprefix('synthetic:')}, r={keys['lora.r']} "
             f"{keys['lora.targets']}, {keys['train.batch_size']} x {keys['data.seq_len']} tokens "
             f"on {planned[0]['device']}")
    head = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" '
            f'viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif">',
            f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>',
            text(LEFT, 24, title, 14, "start", "bold"),
            text(18, HEIGHT / 2, "tokens/s", 12).replace(
                "<text ", f'<text transform="rotate(-90 18 {HEIGHT / 2:.0f})" '),
            text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - BOTTOM + 36, "memory, GiB", 12)]
    return "\n".join(head + parts + ["</svg>"]) + "\n"

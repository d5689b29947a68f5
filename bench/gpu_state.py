"""What nvidia-smi says of the first GPU that programs see: at one moment, and in samples beside a
measurement."""

import os
import statistics
import subprocess
import tempfile

STATE = ("clocks.sm", "clocks.mem", "power.draw", "power.limit", "temperature.gpu", "pstate",
         "utilization.gpu")
SAMPLED = ("clocks.sm", "power.draw", "temperature.gpu")
PERIOD_MS = 200
# Bits of nvmlClocksEventReasons; 1 is an idle GPU. Older drivers call the field the second way.
REASONS = {0x2: "application clocks", 0x4: "software power cap", 0x8: "hardware slowdown",
           0x10: "sync boost", 0x20: "software thermal slowdown",
           0x40: "hardware thermal slowdown", 0x80: "hardware power brake", 0x100: "display clocks"}
REASON_FIELDS = ("clocks_event_reasons.active", "clocks_throttle_reasons.active")


def command(fields, *options):
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0] or "0"
    return ["nvidia-smi", "-i", first, "--query-gpu=" + ",".join(fields),
            "--format=csv,noheader,nounits", *options]


def number(text):
    """Of a decimal or of bits in hexadecimal; the text itself where it is neither."""
    try:
        return int(text, 16) if text.startswith("0x") else float(text)
    except ValueError:
        return text


def values_of(fields, line):
    values = [value.strip() for value in line.strip().split(",")]
    return dict(zip(fields, map(number, values))) if len(values) == len(fields) else None


def query(*fields):
    """The fields' values now; None for what is not known."""
    try:
        result = subprocess.run(command(fields), capture_output=True, text=True)
    except FileNotFoundError:
        return dict.fromkeys(fields)
    found = values_of(fields, result.stdout) if result.returncode == 0 else None
    return found or dict.fromkeys(fields)


def summary(lines, fields):
    """Of each field [least, median, most] over the samples, and the share of the samples that had a
    reason for lower clocks, by reason; None without a sample."""
    samples = [sample for sample in (values_of(fields, line) for line in lines) if sample]
    if not samples:
        return None
    result = {"samples": len(samples)}
    for field in SAMPLED:
        known = [s[field] for s in samples if isinstance(s[field], float)]
        if known:
            result[field] = [min(known), statistics.median(known), max(known)]
    masks = [s[field] for s in samples for field in REASON_FIELDS if isinstance(s.get(field), int)]
    if masks:
        shares = {name: sum(bool(mask & bit) for mask in masks) / len(masks)
                  for bit, name in REASONS.items()}
        result["reasons"] = {name: round(share, 3) for name, share in shares.items() if share}
    return result


class Sampler:
    """One nvidia-smi that reports every 200 ms while the block runs; `summary` afterwards."""

    def __enter__(self):
        reasons = next((f for f in REASON_FIELDS if query(f)[f] is not None), None)
        self.fields = SAMPLED + ((reasons,) if reasons else ())
        self.summary, self.process = None, None
        self.output = tempfile.TemporaryFile("w+")
        try:
            self.process = subprocess.Popen(command(self.fields, "-lms", str(PERIOD_MS)),
                                            stdout=self.output, stderr=subprocess.DEVNULL)
        except FileNotFoundError:
            pass
        return self

    def __exit__(self, *error):
        if self.process:
            self.process.terminate()
            self.process.wait()
            self.output.seek(0)
            self.summary = summary(self.output.read().splitlines(), self.fields)
        self.output.close()

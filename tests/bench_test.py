"""qlab-bench on a few small cases of every operation: each is checked against its reference, then
timed.

    python tests/bench_test.py build/qlab-bench cpu|cuda

Ends with 77, which ctest calls skipped, where there is no such device.
"""

import json
import pathlib
import re
import subprocess
import sys
import tempfile

SKIPPED = 77
SMALL = {
    "cpu": r"attention/|rms_norm/|swiglu/|rope/|cross_entropy/|adamw/"
           r"|(de)?quantize/576x576/b64/nested/bf16|(de)?quantize/1536x576/b256/plain"
           r"|lora/both/576x576/m256/r(0|16|16-dropout)/|linear/(forward|dx)/576x576/m(1|512)/",
    "cuda": r"attention/.*/(1x512|4x512|packed)[^/]*/|rms_norm/.*/(512|2048)x|swiglu/.*/(512|2048)x"
            r"|rope/.*/(512|2048)x|cross_entropy/512x49152|adamw/4884480/"
            r"|(de)?quantize/(1024|4096|6144)x4096/b64/nested|(de)?quantize/14336x4096/b(32|4096)/"
            r"|lora/both/4096x4096/m512/r(0|16|16-dropout|64)/"
            r"|linear/(forward|dx)/(4096x4096|192x576)/m(1|64)/"
            r"|linear/dx/192x576/m1024/"}


def operation(name):
    return name.split("/")[1]


def kernels(names):
    """Implementations of linear layers: cuda/linear/PASS/NxK/mM/IMPLEMENTATION/..."""
    return {name.split("/")[5] for name in names if operation(name) == "linear"}


def listed(program, pattern):
    result = subprocess.run([program, "--benchmark_list_tests", f"--benchmark_filter={pattern}"],
                            capture_output=True, text=True)
    if result.returncode not in (0, 2):  # 2: there is none
        sys.exit(result.stdout + result.stderr)
    return [line for line in result.stdout.splitlines() if line.startswith(("cpu/", "cuda/"))]


def problems(everything, chosen, status, rows):
    """What is wrong with a run of the chosen cases, as a list of sentences."""
    found = [f"{row['name']}: {row['error_message']}" for row in rows if row.get("error_occurred")]
    timed = {row["name"] for row in rows if row.get("us", 0) > 0}
    found += [f"{name} was not timed" for name in chosen if name not in timed]
    pairs = [row["name"].split("/")[5] for row in rows
             if 0 < row.get("over_beside", 0) < 100 and row.get("beside_us", 0) > 0]
    if "scratch" not in pairs or "dense" in pairs:
        found += [f"linear layers timed in turns with dense: {', '.join(pairs) or 'none'}"]
    for what, of in (("operation", lambda names: set(map(operation, names)) - {"ceiling"}),
                     ("kernel of linear layers", kernels)):
        found += [f"no case of the {what} {name}" for name in sorted(of(everything) - of(chosen))]
    return found + ([f"exit status {status}"] if status != 0 else [])


def main():
    program, device = str(pathlib.Path(sys.argv[1]).resolve()), sys.argv[2]
    pattern = f"^{device}/({SMALL[device]})"
    everything, chosen = listed(program, f"^{device}/"), listed(program, pattern)
    if not everything:
        print(f"tests/bench_test.py: Skipped\nno {device} device for qlab-bench")
        return SKIPPED
    with tempfile.TemporaryDirectory() as folder:
        output = pathlib.Path(folder) / "rows.json"
        run = subprocess.run([program, f"--benchmark_filter={pattern}",
                              f"--benchmark_out={output}", "--benchmark_out_format=json"],
                             capture_output=True, text=True)
        text = output.read_text() if output.exists() else ""
    try:
        rows = json.loads(text)["benchmarks"]
    except ValueError:
        print(run.stdout + run.stderr)
        print(f"qlab-bench wrote no results (exit status {run.returncode})")
        return 1
    wrong = problems(everything, chosen, run.returncode, rows)
    nothing = subprocess.run([program, "--benchmark_filter=no such case"], capture_output=True)
    if nothing.returncode != 2:
        wrong.append(f"exit status {nothing.returncode} where a filter finds nothing")
    for row in rows:
        print(re.sub(r"/iterations.*", "", row["name"]), f"{row.get('us', 0):.1f} us")
    print(*wrong, f"{len(rows)} cases, {len(wrong)} problems", sep="\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

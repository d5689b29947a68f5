"""Chooses the kernel for NF4 linear layers by what was measured: quant/nf4_dispatch_table.inc.

    python bench/tune.py [--results bench/results/linear.json] [--tests build/qlab_tests]

From the rows linear/PASS/NxK/mM/IMPLEMENTATION of the file, for the GPU it was measured on: the fused
kernel where it beats decoding the weights first (`scratch`) by more than the noise, and nothing where
it does not. The lines of other GPUs stay. --tests runs the test of bits first: a kernel whose rows
depend on how many there are is not admitted, nor is anything else then.
"""

import argparse
import json
import pathlib
import re
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
TABLE = ROOT / "quant/nf4_dispatch_table.inc"
FUSED = ("simt", "mma", "wgmma")
OPS = {"forward": "Op::transpose", "dx": "Op::none"}
LINE = re.compile(r'\{"(.*?)", (.*)\},')
HEAD = """// Written by `make tune` (bench/tune.py) from bench/results/linear.json. Of a GPU: the product, the
// largest matrix (elements) and number of rows that a line is for, and the kernel.
"""


def measured(result):
    """{(pass, elements): {M: {implementation: us}}} of one GPU; a shape's slower orientation counts
    where two shapes have as many elements."""
    times = {}
    for row in result["ours"]:
        match = re.fullmatch(r"linear/(forward|dx)/(\d+)x(\d+)/m(\d+)/(\w+)", row["name"])
        if not match or "us" not in row:
            continue
        direction, n, k, m, name = match.groups()
        shape = times.setdefault((direction, int(n) * int(k)), {}).setdefault(int(m), {})
        shape.setdefault(f"{n}x{k}", {})[name] = row["us"]
    return times


def fastest(shapes, margin):
    """The fused kernel that beats `scratch` on every shape, the best in sum; None otherwise."""
    best, least = None, float("inf")
    for name in FUSED:
        if not all(name in row and "scratch" in row and row[name] * (1 + margin) < row["scratch"]
                   for row in shapes.values()):
            continue
        total = sum(row[name] for row in shapes.values())
        if total < least:
            best, least = name, total
    return best


def lines_for(times, margin=0.03):
    """(op, elements, rows, kernel): neighbouring numbers of rows with one answer are one line."""
    lines = []
    for direction in OPS:
        for (passed, elements), by_rows in sorted(times.items()):
            if passed != direction:
                continue
            runs = []
            for m, shapes in sorted(by_rows.items()):
                kernel = fastest(shapes, margin)
                if runs and runs[-1][1] == kernel:
                    runs[-1][0] = m
                else:
                    runs.append([m, kernel])
            lines += [(OPS[direction], elements, m, kernel) for m, kernel in runs]
    return lines


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--results", default=str(ROOT / "bench/results/linear.json"))
    parser.add_argument("--tests", help="the program of tests, to check the rows' bits first")
    parser.add_argument("--table", default=str(TABLE))
    options = parser.parse_args()
    try:
        result = json.loads(pathlib.Path(options.results).read_text())
    except FileNotFoundError:
        sys.exit(f"{options.results} is not there: `make gpu-bench PART=linear` writes it")
    times = measured(result)
    if not times:
        sys.exit(f"{options.results} has no linear layers: measure them with "
                 "`make gpu-bench PART=linear`")
    gpus = {call["gpu"]["name"] for call in result["calls"]}
    if len(gpus) != 1:
        sys.exit(f"{options.results} mixes GPUs: {', '.join(sorted(gpus))}")
    gpu = gpus.pop()
    if options.tests:
        test = subprocess.run([options.tests, "--gtest_brief=1",
                               "--gtest_filter=*Nf4Linear*RowsAreIndependentOfTheirNumber*cuda*"],
                              capture_output=True, text=True)
        if test.returncode != 0 or not re.search(r"PASSED  \] [1-9]", test.stdout):
            sys.exit("The rows' bits depend on their number, or no test ran: no kernel is admitted.\n"
                     + test.stdout + test.stderr)
    table = pathlib.Path(options.table)
    others = []
    if table.exists():
        for line in table.read_text().splitlines():
            match = LINE.fullmatch(line.strip())
            if match and match.group(1) != gpu:
                others.append(line)
    own = [f'{{"{gpu}", {op}, {elements}, {rows}, '
           + (f"Nf4Kernel::{kernel}" if kernel else "std::nullopt") + "},"
           for op, elements, rows, kernel in lines_for(times)]
    temporary = table.with_suffix(".tmp")
    temporary.write_text(HEAD + "\n".join(others + own) + "\n")
    temporary.replace(table)
    print(f"{table}: {len(own)} lines for {gpu}")


if __name__ == "__main__":
    main()

"""Chooses the kernel for NF4 linear layers by what was measured: quant/nf4_dispatch_table.inc.

    python bench/tune.py [--results bench/results/linear.json] [--tests build/qlab_tests] [--gpu NAME]

From the rows linear/PASS/NxK/mM/IMPLEMENTATION of the file, for each matrix, product and number of
rows by itself: the fused kernel where it beats decoding the weights first (`scratch`) by more than
the noise of both and by 3 % at least, and nothing where it does not. The times of a case come from
one call. Lines are written for the GPU that is here, or that --gpu names, or else for the only one
of the file; those of other GPUs stay. --tests runs the test of bits first: a kernel whose rows depend
on how many there are is not admitted, nor is anything else then.
"""

import argparse
import json
import pathlib
import re
import subprocess
import sys

import gpu_state
import measure

ROOT = pathlib.Path(__file__).resolve().parent.parent
TABLE = ROOT / "quant/nf4_dispatch_table.inc"
FUSED = ("simt", "mma", "lut", "wgmma", "wgmma2", "wgmma3")
MARGIN = 0.03  # at least
# Rows in products of any number of them, and in each tile of the kernels that choose among several.
BITS = "*Nf4Linear*RowsAreIndependentOfTheirNumber*cuda*:*Nf4Linear*WarpgroupTilesAgree*cuda*"
OPS = {"forward": "Op::transpose", "dx": "Op::none"}
LINE = re.compile(r'\{"(.*?)", (.*)\},')
HEAD = """// Written by `make tune` (bench/tune.py) from bench/results/linear.json. Of a GPU: the product, the
// matrix [N, K], the largest number of rows that a line is for, and the kernel.
"""


def measured(result, gpu):
    """{(pass, n, k): {M: {implementation: row}}} of one GPU: of each case what the latest call has
    that measured `scratch`, without which there is nothing to choose by."""
    calls = {}  # {case: {call: {implementation: row}}}
    for row in result["ours"]:
        if row["name"].startswith("linear/") and "us" in row and (
                result["calls"][row["call"]]["gpu"]["name"] == gpu):
            case, name = row["name"].removeprefix("linear/").rsplit("/", 1)
            calls.setdefault(case, {}).setdefault(row["call"], {})[name] = row
    times = {}
    for case, found in calls.items():
        direction, shape, m = case.split("/")
        n, k = map(int, shape.split("x"))
        whole = [call for call, rows in found.items() if "scratch" in rows]
        if whole:
            times.setdefault((direction, n, k), {})[int(m[1:])] = found[max(whole)]
    return times


def beats(row, other):
    """By more than the noise of both, and by the least margin."""
    noise = (row.get("noise_percent", 0) + other.get("noise_percent", 0)) / 100
    return row["us"] * (1 + max(MARGIN, noise)) < other["us"]


def fastest(rows):
    """The fused kernel that beats `scratch`, the fastest of them; None otherwise."""
    better = [name for name in FUSED if name in rows and beats(rows[name], rows["scratch"])]
    return min(better, key=lambda name: rows[name]["us"], default=None)


def lines_for(times):
    """(op, n, k, rows, kernel): neighbouring numbers of rows with one answer are one line."""
    lines = []
    for direction in OPS:
        matrices = [key for key in times if key[0] == direction]
        for _, n, k in sorted(matrices, key=lambda key: (key[1] * key[2], key[1])):
            runs = []
            for m, rows in sorted(times[direction, n, k].items()):
                kernel = fastest(rows)
                if runs and runs[-1][1] == kernel:
                    runs[-1][0] = m
                else:
                    runs.append([m, kernel])
            lines += [(OPS[direction], n, k, m, kernel) for m, kernel in runs]
    return lines


def gpu_of(result, wanted, here):
    """The GPU to choose for: the wanted one, the one that is here, or the file's only one."""
    used = {row["call"] for row in result["ours"] if row["name"].startswith("linear/")}
    gpus = sorted({result["calls"][call]["gpu"]["name"] for call in used})
    if wanted or here:
        gpus = [name for name in gpus if name == (wanted or here)]
    if not gpus:
        return None
    if len(gpus) > 1:
        sys.exit(f"the results mix GPUs: {', '.join(gpus)}; choose one with --gpu '{gpus[0]}'")
    return gpus[0]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--results", default=str(ROOT / "bench/results/linear.json"))
    parser.add_argument("--tests", help="the program of tests, to check the rows' bits first")
    parser.add_argument("--gpu", help="another than the one that is here")
    parser.add_argument("--table", default=str(TABLE))
    options = parser.parse_args()
    try:
        result = json.loads(pathlib.Path(options.results).read_text())
    except FileNotFoundError:
        sys.exit(f"{options.results} is not there: `make gpu-bench PART=linear` writes it")
    except ValueError as error:
        sys.exit(f"{options.results} is not what `make gpu-bench PART=linear` writes: {error}")
    if not measure.well_formed(result):
        sys.exit(f"{options.results} is not what `make gpu-bench PART=linear` writes")
    here = gpu_state.query("name")["name"]
    gpu = gpu_of(result, options.gpu, here)
    if gpu is None:
        of = f" of {options.gpu or here}" if options.gpu or here else ""
        sys.exit(f"{options.results} has no linear layers{of}: measure them with "
                 "`make gpu-bench PART=linear`")
    times = measured(result, gpu)
    if not times:
        sys.exit(f"{options.results} has no case of {gpu} with `scratch`, by which the others are "
                 "judged: measure whole cases with `make gpu-bench PART=linear`")
    if options.tests:
        if not pathlib.Path(options.tests).exists():
            sys.exit(f"{options.tests} is not there: `make build` makes it")
        test = subprocess.run([options.tests, "--gtest_brief=1", "--gtest_filter=" + BITS],
                              capture_output=True, text=True)
        if test.returncode != 0 or not re.search(r"PASSED  \] [1-9]", test.stdout):
            why = ("The rows' bits depend on their number" if test.returncode else
                   "No test of the rows' bits ran" if here else
                   "No test of the rows' bits ran, since no NVIDIA GPU was found")
            sys.exit(f"{why}: no kernel is admitted.\n" + test.stdout + test.stderr)
    table = pathlib.Path(options.table)
    others = []
    if table.exists():
        for line in table.read_text().splitlines():
            match = LINE.fullmatch(line.strip())
            if match and match.group(1) != gpu:
                others.append(line)
    own = [f'{{"{gpu}", {op}, {n}, {k}, {rows}, '
           + (f"Nf4Kernel::{kernel}" if kernel else "std::nullopt") + "},"
           for op, n, k, rows, kernel in lines_for(times)]
    temporary = table.with_suffix(".tmp")
    temporary.write_text(HEAD + "\n".join(others + own) + "\n")
    temporary.replace(table)
    print(f"{table}: {len(own)} lines for {gpu}")


if __name__ == "__main__":
    main()

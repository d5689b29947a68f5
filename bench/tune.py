"""Chooses kernels by what was measured.

    python bench/tune.py [--part linear|product] [--results FILE] [--tests build/qlab_tests] [--gpu NAME]

linear: quant/nf4_dispatch_table.inc from the rows linear/PASS/NxK/mM/IMPLEMENTATION of
bench/results/linear.json. For each matrix, product and number of rows by itself: the fused kernel
where it beats decoding the weights first (`scratch`) by more than the noise of both and by 3 % at
least, and nothing where it does not; by the ratios to the dense layer that was timed in turns with
each, where there are any.
product: core/ops/gemm_tilings.inc from the rows product/PASS/NxK/mM/proposalI of
bench/results/product.json: what cuBLAS proposes and what beats its own choice, measured in turns with
it, by more than the noise and by 1.5 % at least.

The times of a case come from one call. Lines are written for the GPU that is here, or that --gpu
names, or else for the only one of the file; those of other GPUs stay. --tests runs the test of bits
first: a kernel whose rows depend on how many there are is not admitted, nor is anything else then.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import re
import subprocess
import sys
import typing

import gpu_state
import measure

ROOT = pathlib.Path(__file__).resolve().parent.parent
FUSED = ("simt", "mma", "lut", "wgmma", "wgmma2", "wgmma3")
MARGIN = 0.03  # at least
PROPOSAL_MARGIN = 0.015
OPS = {"forward": "Op::transpose", "dx": "Op::none"}
LINE = re.compile(r'\{"(.*?)", (.*)\},')


def measured(result, gpu, part, needed):
    """{(pass, n, k): {M: {implementation: row}}} of one GPU: of each case what the latest call has
    that measured `needed`, without which there is nothing to choose by."""
    calls = {}  # {case: {call: {implementation: row}}}
    for row in result["ours"]:
        if row["name"].startswith(part + "/") and "us" in row and (
                result["calls"][row["call"]]["gpu"].get("name") == gpu):
            case, name = row["name"].removeprefix(part + "/").rsplit("/", 1)
            calls.setdefault(case, {}).setdefault(row["call"], {})[name] = row
    times = {}
    for case, found in calls.items():
        direction, shape, m = case.split("/")
        n, k = map(int, shape.split("x"))
        whole = [call for call, rows in found.items() if needed in rows]
        if whole:
            times.setdefault((direction, n, k), {})[int(m[1:])] = found[max(whole)]
    return times


def fastest(rows):
    """The fused kernel that beats `scratch` by more than the noise of both, and by the least margin;
    the fastest of them; None otherwise. By what they take of the dense layer in turns with it, where
    all have that, since times by themselves are those of several states of a GPU."""
    there = [name for name in (*FUSED, "scratch") if name in rows]
    paired = all("over_beside" in rows[name] for name in there)
    time, noise = (("over_beside", "over_beside_noise_percent") if paired else
                   ("us", "noise_percent"))

    def beats(row, other):
        margin = max(MARGIN, (row.get(noise, 0) + other.get(noise, 0)) / 100)
        return row[time] * (1 + margin) < other[time]

    better = [name for name in FUSED if name in rows and beats(rows[name], rows["scratch"])]
    return min(better, key=lambda name: rows[name][time], default=None)


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


def linear_lines(times):
    return [f"{op}, {n}, {k}, {rows}, " + (f"Nf4Kernel::{kernel}" if kernel else "std::nullopt")
            for op, n, k, rows, kernel in lines_for(times)]


def product_lines(times):
    """The proposal that took the smallest share of the library's choice, where it beats it."""
    lines = []
    for direction in OPS:
        for _, n, k in sorted((key for key in times if key[0] == direction),
                              key=lambda key: (key[1] * key[2], key[1])):
            for m, rows in sorted(times[direction, n, k].items()):
                rows = [row for row in rows.values() if {"over_beside", "tile", "cluster", "option"}
                        <= row.keys()]
                best = min(rows, key=lambda row: row["over_beside"], default={"over_beside": 1})
                noise = best.get("over_beside_noise_percent", 0) / 100
                if best["over_beside"] < 1 - max(PROPOSAL_MARGIN, noise):
                    tiling = ", ".join(str(int(best[key])) for key in ("tile", "cluster", "option"))
                    lines.append(f"{OPS[direction]}, {n}, {k}, {m}, {{{tiling}}}")
    return lines


@dataclasses.dataclass
class Part:
    """What is chosen: by which rows, into which table, after which tests of bits."""
    what: str
    needed: str  # the implementation without which a case decides nothing
    table: str
    lines: typing.Callable
    bits: str
    head: str


PARTS = {
    "linear": Part(
        "linear layers", "scratch", "quant/nf4_dispatch_table.inc", linear_lines,
        # Rows in products of any number of them, and in each tile of the kernels that choose among
        # several.
        "*Nf4Linear*RowsAreIndependentOfTheirNumber*cuda*:*Nf4Linear*WarpgroupTilesAgree*cuda*",
        """// Written by `make tune` (bench/tune.py) from bench/results/linear.json. Of a GPU: the product, the
// matrix [N, K], the largest number of rows that a line is for, and the kernel.
"""),
    "product": Part(
        "products", "proposal1", "core/ops/gemm_tilings.inc", product_lines,
        "*Gemm*Large*HaveTheBitsOfTheLibrarysChoice*cuda*",
        """// Written by `make tune PART=product` (bench/tune.py) from bench/results/product.json. Of a GPU: the
// product, the matrix [N, K], the rows, and the numbers that the library gives the tile, the cluster
// and the option of the kernel that was faster than its own choice.
"""),
}


def gpu_of(result, part, wanted, here):
    """The GPU to choose for: the wanted one, the one that is here, or the file's only one."""
    used = {row["call"] for row in result["ours"] if row["name"].startswith(part + "/")}
    gpus = sorted({result["calls"][call]["gpu"].get("name") for call in used} - {None})
    if wanted or here:
        gpus = [name for name in gpus if name == (wanted or here)]
    if not gpus:
        return None
    if len(gpus) > 1:
        sys.exit(f"the results mix GPUs: {', '.join(gpus)}; choose one with --gpu '{gpus[0]}'")
    return gpus[0]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--part", choices=PARTS, default="linear")
    parser.add_argument("--results", help="bench/results/PART.json unless given")
    parser.add_argument("--tests", help="the program of tests, to check the rows' bits first")
    parser.add_argument("--gpu", help="another than the one that is here")
    parser.add_argument("--table", help="the file to write into")
    options = parser.parse_args()
    part = PARTS[options.part]
    path = pathlib.Path(options.results or ROOT / f"bench/results/{options.part}.json")
    measuring = f"`make gpu-bench PART={options.part}`"
    try:
        result = json.loads(path.read_text())
    except FileNotFoundError:
        sys.exit(f"{path} is not there: {measuring} writes it")
    except OSError as error:
        sys.exit(f"{path} cannot be read: {error.strerror}")
    except ValueError as error:
        sys.exit(f"{path} is not what {measuring} writes: {error}")
    wrong = measure.wrong_in(result)
    if wrong:
        sys.exit(f"{path} is not what {measuring} writes: {wrong}")
    here = gpu_state.query("name")["name"]
    gpu = gpu_of(result, options.part, options.gpu, here)
    if gpu is None:
        of = f" of {options.gpu or here}" if options.gpu or here else ""
        sys.exit(f"{path} has no {part.what}{of}: measure them with {measuring}")
    table = pathlib.Path(options.table or ROOT / part.table)
    if not table.parent.is_dir():
        sys.exit(f"{table}: the folder is not there")
    times = measured(result, gpu, options.part, part.needed)
    if not times:
        sys.exit(f"{path} has no case of {gpu} with `{part.needed}`, by which the others are "
                 f"judged: measure whole cases with {measuring}")
    if options.tests:
        if not pathlib.Path(options.tests).is_file() or not os.access(options.tests, os.X_OK):
            sys.exit(f"{options.tests} is no program: `make build` makes the tests")
        test = subprocess.run([options.tests, "--gtest_brief=1", "--gtest_filter=" + part.bits],
                              capture_output=True, text=True)
        if test.returncode != 0 or not re.search(r"PASSED  \] [1-9]", test.stdout):
            why = ("The rows' bits depend on the kernel" if test.returncode else
                   "No test of the rows' bits ran" if here else
                   "No test of the rows' bits ran, since no NVIDIA GPU was found")
            sys.exit(f"{why}: no kernel is admitted.\n" + test.stdout + test.stderr)
    others = []
    if table.exists():
        for line in table.read_text().splitlines():
            match = LINE.fullmatch(line.strip())
            if match and match.group(1) != gpu:
                others.append(line)
    own = [f'{{"{gpu}", {line}}},' for line in part.lines(times)]
    temporary = table.with_suffix(".tmp")
    temporary.write_text(part.head + "".join(line + "\n" for line in others + own))
    temporary.replace(table)
    print(f"{table}: {len(own)} lines for {gpu}")


if __name__ == "__main__":
    main()

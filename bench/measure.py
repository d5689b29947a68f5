"""One part of the GPU benchmark: our side and the peers, in one call, into bench/results/PART.json.

    python bench/measure.py PART [--build build] [--filter REGEX] [--no-peers]

Each row names the call that it comes from. An older call's rows of a case (and of the cases that
it is set beside, see group_of) give way to a call that has measured everything they have, ours and
the peers'; until then they stay beside the newer ones. So neither a filter, nor a call whose
seconds did not suffice, nor one side alone loses what was measured. Who reads the file takes a
ratio from the rows of one call: the latest that has both sides.

A filter chooses whole cases: its expression is looked for in the name without the implementation.
The peers are found on PYTHONPATH; one that is missing is named in the file and in the output.
Afterwards bench/report.py renews the headline, the plot and the tables. Ends with 1 when something
of ours failed.
"""

import argparse
import datetime
import importlib.util
import json
import math
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time

from gpu_state import STATE, Sampler, query

ROOT = pathlib.Path(__file__).resolve().parent.parent
BENCH = ROOT / "bench"
OPERATIONS = {"kernels": "dequantize|quantize|lora|rms_norm|swiglu|rope|cross_entropy|adamw",
              "linear": "linear", "product": "product", "attention": "attention"}
WITHOUT_PEERS = ("product",)
ROWS_OF_STEPS = BENCH / "step_rows.json"
OUR_SHARE = 0.6
COUNTERS = ("us", "noise_percent", "GB/s", "copy_percent", "TFLOP/s", "product_percent",
            "beside_us", "over_beside", "over_beside_noise_percent",
            "tile", "cluster", "option")


def nested(keys):
    """Dotted keys as the blocks of a config file."""
    blocks = {}
    for key, value in keys.items():
        block, name = key.split(".")
        blocks.setdefault(block, {})[name] = value
    return blocks


def commit():
    if os.environ.get("QLAB_COMMIT"):
        return os.environ["QLAB_COMMIT"]
    described = subprocess.run(["git", "describe", "--always", "--dirty", "--exclude=*"], cwd=ROOT,
                               capture_output=True, text=True)
    return described.stdout.strip() if described.returncode == 0 else "unknown"


def same_commit(a, b):
    """Of two descriptions, however far they are shortened."""
    bare = [text.removesuffix("-dirty") for text in (a, b)]
    prefix = bare[0].startswith(bare[1]) or bare[1].startswith(bare[0])
    return prefix and a.endswith("-dirty") == b.endswith("-dirty")


def commit_of(program, built):
    """What is recorded as measured: the commit that the program says it was built from, with a
    warning where that is not what is checked out."""
    checked_out = commit()
    if not built or built == "unknown" or same_commit(built, checked_out):
        return checked_out
    print(f"WARNING: {program} was built from {built} and {checked_out} is checked out: its figures "
          f"are recorded as {built}'s; build again to measure what is checked out", file=sys.stderr)
    return built


def qlab_commit(qlab):
    """commit_of() a qlab."""
    said = subprocess.run([qlab, "--version"], capture_output=True, text=True).stdout
    found = re.search(r"\((.*)\)", said)
    return commit_of(qlab, found[1] if found else "")


def run(command, seconds):
    """Both sides begin nothing new once their seconds have passed."""
    print("+", " ".join(str(part) for part in command), flush=True)
    environment = os.environ | {"QLAB_BENCH_SECONDS": str(int(seconds))}
    return subprocess.run([str(part) for part in command], env=environment).returncode


def plain_name(name):
    """Without the device and Google Benchmark's suffixes."""
    return re.sub(r"/(iterations|repeats|min_time):.*|/manual_time|/real_time", "",
                  name).removeprefix("cuda/")


def benchmarks(operations, chosen):
    """The expression for qlab-bench: a filter's match ends before the implementation, so that a
    case is measured whole; right before it, where the filter ends in $."""
    if not chosen:
        return f"^cuda/(ceiling|{operations})/"
    behind = "" if chosen.endswith("$") else ".*"
    return f"^cuda/(ceiling/|.*({chosen.removesuffix('$')}){behind}/[^/]+/iterations:)"


def our_kernels(build, part, chosen, folder, seconds):
    """Rows of qlab-bench, its context, and the list of cases for the peers."""
    output = folder / "ours.json"
    flags = [f"--benchmark_filter={benchmarks(OPERATIONS[part], chosen)}"]
    listed = subprocess.run([build / "qlab-bench", *flags, "--benchmark_list_tests"],
                            capture_output=True, text=True)
    mine = re.compile(f"(cuda/)?(ceiling|{OPERATIONS[part]})/")
    found = [name for name in listed.stdout.splitlines() if mine.match(name)]
    if not any("/ceiling/" not in name for name in found):
        if not found:  # no ceiling either
            sys.exit(f"no case of {part}: {build / 'qlab-bench'} sees no GPU")
        sys.exit(f"no case of {part} that '{chosen}' finds; it is looked for in names like "
                 "linear/forward/4096x4096/m64, without the implementation")
    (folder / "cases.txt").write_text("\n".join(found))
    status = run([build / "qlab-bench", *flags, f"--benchmark_out={output}",
                  "--benchmark_out_format=json"], seconds)
    if not output.exists() or not output.read_text().strip():
        sys.exit(f"qlab-bench wrote nothing (exit status {status})")
    result = json.loads(output.read_text())
    rows = []
    for benchmark in result["benchmarks"]:
        row = {"name": plain_name(benchmark["name"])}
        if benchmark.get("error_occurred"):
            row["error"] = benchmark["error_message"]
            if row["error"].startswith("left out"):
                print(row["name"], row["error"])
                continue
        row |= {key: float(f"{benchmark[key]:.6g}") for key in COUNTERS if key in benchmark}
        if mine.match(row["name"]):
            rows.append(row)
    # Of this machine, not of the measurement.
    hidden = ("executable", "host_name", "flags")
    return rows, {key: value for key, value in result["context"].items() if key not in hidden}


def regular_expression(text):
    """Of an option."""
    try:
        re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"'{text}' is no regular expression: {error}")
    return text


def found_rows(path, expression):
    """The rows of a file whose name the expression finds; without any, says which there are."""
    rows = json.loads(path.read_text())
    found = [row for row in rows if re.search(expression, row["name"])]
    if not found:
        sys.exit(f"no row that '{expression}' finds; {path.name} has " +
                 ", ".join(row["name"] for row in rows))
    return found


def our_steps(build, chosen, check, folder, seconds):
    output = folder / "ours.json"
    run([sys.executable, BENCH / "steps.py", "--qlab", build / "qlab", "--output", output,
         "--rows", chosen, "--check", check], seconds)
    if not output.exists():
        sys.exit("bench/steps.py measured nothing")
    return json.loads(output.read_text())["rows"]


def their_rows(part, chosen, folder, seconds):
    output = folder / "peers.json"
    if importlib.util.find_spec("torch") is None:
        return {"rows": [], "versions": {}, "missing": {"all": "PyTorch is not installed"}}
    command = ([BENCH / "peers/step.py", "--rows", chosen] if part == "step" else
               [BENCH / "peers/kernels.py", "--cases", folder / "cases.txt"])
    status = run([sys.executable, *command, "--output", output], seconds)
    if not output.exists():
        return {"rows": [], "versions": {}, "missing": {"all": f"exit status {status}"}}
    return json.loads(output.read_text())


def case_of(row):
    return row["name"].rsplit("/", 1)[0]


def group_of(row):
    """The cases that ratios are taken among: all ranks of a LoRA module, a step and its gang."""
    return re.sub(r"(?<=/m)(\d+)/r\d+[^/]*$|-gang\d+$", r"\1", case_of(row))


def merged(old, call, ours, peers):
    """The file's rows and those of this call, which takes the place of the older calls that
    measured nothing of a group that it has not; what ended in an error measured nothing. A call's
    ceilings stay with its rows."""
    new = {"ours": ours, "peers": peers}
    fresh = {(side, row["name"]) for side, rows in new.items() for row in rows
             if "error" not in row}
    measured = {}  # (group, call): its rows in the file
    for side in new:
        for row in old.get(side, []):
            if case_of(row) != "ceiling":
                measured.setdefault((group_of(row), row["call"]), set()).add((side, row["name"]))
    kept = {key for key, rows in measured.items() if not rows <= fresh}
    used = sorted({index for _, index in kept})
    result = {"part": call["part"], "calls": [old["calls"][i] for i in used] + [call]}
    for side, rows in new.items():
        result[side] = [row | {"call": used.index(row["call"])} for row in old.get(side, [])
                        if (group_of(row), row["call"]) in kept or
                        (case_of(row) == "ceiling" and row["call"] in used)]
        result[side] += [row | {"call": len(used)} for row in rows]
    return result


def write(path, result):
    """JSON with one row a line; an older file is replaced as a whole."""
    parts = []
    for key, value in result.items():
        text = json.dumps(value)
        if isinstance(value, list) and value:
            text = "[\n  " + ",\n  ".join(json.dumps(item) for item in value) + "\n ]"
        parts.append(f" {json.dumps(key)}: {text}")
    path.parent.mkdir(exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text("{\n" + ",\n".join(parts) + "\n}\n")
    os.replace(temporary, path)


NUMBERS = (*COUNTERS, "step_seconds", "tokens_per_s", "peak_bytes", "mfu")
ABOVE_ZERO = ("us", "beside_us", "over_beside", "step_seconds", "tokens_per_s")
GPU_NAME = re.compile(r"[\w .,:()/+-]+")
LAYER = re.compile(r"(linear|product)/(forward|dx)/\d+x\d+/m\d+/\w[\w.+-]*")


def wrong_in(result):
    """Why this is no file of measured calls; None where it is one."""
    if not isinstance(result, dict) or not all(
            isinstance(result.get(key), list) for key in ("calls", "ours", "peers")):
        return "not the rows of measured calls"
    for number, call in enumerate(result["calls"]):
        gpu = call.get("gpu") if isinstance(call, dict) else None
        if not isinstance(gpu, dict):
            return f"call {number} says nothing of its GPU"
        name = gpu.get("name")
        if name is not None and not (isinstance(name, str) and GPU_NAME.fullmatch(name)):
            return f"call {number}: {name!r} is no name of a GPU"
    for row in result["ours"] + result["peers"]:
        wrong = wrong_in_row(row, len(result["calls"]))
        if wrong:
            return wrong
    return None


def wrong_in_row(row, calls):
    if not isinstance(row, dict) or not isinstance(row.get("name"), str) or "/" not in row["name"]:
        return "a row without a name"
    name, call = row["name"], row.get("call")
    if type(call) is not int or not 0 <= call < calls:
        return f"{name}: call {call!r} is not one of the {calls} of the file"
    if re.match("(linear|product)/", name) and not LAYER.fullmatch(name):
        return f"{name}: not PART/PASS/NxK/mM/IMPLEMENTATION"
    for key in (key for key in NUMBERS if key in row):
        number = row[key]
        if type(number) not in (int, float) or not math.isfinite(number):
            return f"{name}: {key} is no number: {number!r}"
        if key in ABOVE_ZERO and number <= 0:
            return f"{name}: {key} is not above 0: {number}"
    if "over_beside" in row and "beside_us" not in row:
        return f"{name}: over_beside without beside_us"
    hashes = row.get("adapter_sha256", [])
    if not isinstance(hashes, list) or not all(isinstance(text, str) for text in hashes):
        return f"{name}: adapter_sha256 is no list of hashes"
    return None


def read_results(path):
    """What write() has left there, {} where there is no file. What is not of this layout is not
    overwritten."""
    try:
        result = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except ValueError as error:
        sys.exit(f"{path}: not read: {error}; move it away to measure anew")
    except OSError as error:
        sys.exit(f"{path}: not read: {error.strerror}")
    wrong = wrong_in(result)
    if wrong:
        sys.exit(f"{path}: {wrong}; move it away to measure anew")
    return result


def results_of(options):
    return pathlib.Path(options.results) / f"{options.part}.json"


def record(options, call, ours, peers):
    path = results_of(options)
    old = read_results(path)
    # The same call again, now with its peers: its first record is replaced.
    for side in ("ours", "peers"):
        old[side] = [row for row in old.get(side, [])
                     if old["calls"][row["call"]]["date"] != call["date"]]
    write(path, merged(old, call, ours, peers))
    return path


def measure(options, folder):
    read_results(results_of(options))  # what cannot be read is said before minutes are spent
    call = {"part": options.part, "commit": commit(),
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "gpu": query("name", "driver_version", "memory.total", "clocks.max.sm"),
            "flags": {"filter": options.filter, "peers": not options.no_peers},
            "state_before": query(*STATE)}
    build, start = pathlib.Path(options.build).resolve(), time.monotonic()
    program = build / ("qlab" if options.part == "step" else "qlab-bench")
    if not program.exists():
        sys.exit(f"{program} is not there: `make build` makes it")
    if options.part == "step" and found_rows(ROWS_OF_STEPS, options.filter) and (
            call["gpu"]["name"] is None):
        sys.exit("steps are measured on an NVIDIA GPU, and nvidia-smi found none")
    share = options.seconds * (1 if options.no_peers else OUR_SHARE)
    with Sampler() as samples:
        if options.part == "step":
            call["commit"] = qlab_commit(build / "qlab")
            ours = our_steps(build, options.filter, options.check, folder, share)
        else:
            ours, call["context"] = our_kernels(build, options.part, options.filter, folder, share)
            call["commit"] = commit_of(build / "qlab-bench", call["context"].get("qlab_commit"))
    call |= {"state_between": query(*STATE), "state_ours": samples.summary, "peer_versions": {},
             "missing_peers": {}}
    record(options, call, ours, [])  # not lost when the time is up while the peers run
    peers, left = {"rows": [], "versions": {}, "missing": {}}, options.seconds - (
        time.monotonic() - start)
    with Sampler() as samples:
        if not options.no_peers:
            peers = their_rows(options.part, options.filter, folder, left)
    call |= {"state_after": query(*STATE), "peer_versions": peers["versions"],
             "state_peers": None if options.no_peers else samples.summary,
             "missing_peers": peers["missing"]}
    return call, ours, peers["rows"]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("part", choices=["step", *OPERATIONS])
    parser.add_argument("--build", default=str(ROOT / "build"))
    parser.add_argument("--filter", default="", type=regular_expression,
                        help="only cases whose name this finds")
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--check", choices=["few", "all", "none"], default="few",
                        help="of steps: rows that are also trained without graphs, for their bits")
    parser.add_argument("--seconds", type=float, default=400,
                        help="after these nothing new is begun; ours has 60 %% of them")
    parser.add_argument("--results", default=str(BENCH / "results"))
    options = parser.parse_args()
    options.no_peers = options.no_peers or options.part in WITHOUT_PEERS
    with tempfile.TemporaryDirectory() as folder:
        call, ours, peers = measure(options, pathlib.Path(folder))
    print(record(options, call, ours, peers))
    for peer, reason in call["missing_peers"].items():
        print(f"MISSING PEER {peer}: {reason}", file=sys.stderr)
    failed = [row for row in ours if "error" in row]
    for row in failed:
        print(f"FAILED {row['name']}: {row['error']}", file=sys.stderr)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()

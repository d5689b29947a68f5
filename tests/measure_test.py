"""bench/measure.py: how a call's rows join the file, and that a ratio comes from one call."""

import contextlib
import io
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import time
import unittest
import unittest.mock

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "bench"))
import crossover
import gpu_state
import headline
import measure
import report

CASE = "dequantize/8x8/b64"
TARGET = {"name": "t", "unit": "us", "target": 1, "bound": "at least", "ratio": "peer/ours",
          "ours": {"file": "kernels", "name": CASE + "/*", "field": "us"},
          "peer": {"file": "kernels", "name": CASE + "/bnb", "field": "us"}}


def rows(**times):
    """ours: a=1 is CASE/a; other cases as o__a=1."""
    return [{"name": f"{name.split('__')[0]}/case/{name.split('__')[1]}" if "__" in name else
             f"{CASE}/{name}", "us": us} for name, us in times.items()]


class MergeTest(unittest.TestCase):
    def setUp(self):
        self.file, self.count = {}, 0

    def call(self, ours=(), peers=()):
        self.count += 1
        call = {"part": "kernels", "date": str(self.count), "commit": "c", "gpu": {"name": "G"}}
        ceiling = [{"name": "ceiling/copy", "GB/s": float(self.count)}]
        self.file = measure.merged(self.file, call, ceiling + list(ours), list(peers))

    def found(self):
        """{(date of the call, name without its case): us} of all but the ceilings."""
        return {(self.file["calls"][row["call"]]["date"], row["name"].removeprefix(CASE + "/")):
                row["us"] for side in ("ours", "peers") for row in self.file[side] if "us" in row}

    def ratio(self):
        return headline.entry_of({"kernels": self.file}, TARGET)["ratio"]

    def test_a_whole_call_replaces_what_it_measured_again(self):
        self.call(rows(qlab=1, other__qlab=5), rows(bnb=2))
        self.call(rows(qlab=3), rows(bnb=4))
        self.assertEqual(self.found(), {("1", "other/case/qlab"): 5, ("2", "qlab"): 3,
                                        ("2", "bnb"): 4})
        self.assertEqual(self.ratio(), 4 / 3)

    def test_one_side_alone_leaves_the_pair(self):
        self.call(rows(qlab=1), rows(bnb=2))
        pair = {("1", "qlab"): 1, ("1", "bnb"): 2}
        self.call(rows(qlab=3))
        self.assertEqual(self.found(), pair | {("2", "qlab"): 3})
        self.call(peers=rows(bnb=8))
        self.assertEqual(self.found(), pair | {("2", "qlab"): 3, ("3", "bnb"): 8})
        self.assertEqual(self.ratio(), 2)
        shown = report.by_case({"kernels": self.file}, "kernels", "dequantize/")
        self.assertEqual({name: row["us"] for name, row in shown["8x8/b64"].items()},
                         {"qlab": 1, "bnb": 2})
        self.call(rows(qlab=4))
        self.assertEqual(self.found(), pair | {("3", "bnb"): 8, ("4", "qlab"): 4})
        self.call(rows(qlab=6), rows(bnb=9))
        self.assertEqual(self.found(), {("5", "qlab"): 6, ("5", "bnb"): 9})
        self.assertEqual(self.ratio(), 1.5)

    def test_a_failed_call_leaves_the_older_one(self):
        self.call(rows(qlab=1), rows(bnb=2))
        failed = [{"name": CASE + "/qlab", "error": "out of memory"}]
        self.call(failed, rows(bnb=3))
        self.assertEqual(self.found(), {("1", "qlab"): 1, ("1", "bnb"): 2, ("2", "bnb"): 3})
        self.assertEqual(self.ratio(), 2)

    def test_a_call_cut_within_a_case_leaves_the_older_one(self):
        self.call(rows(mma=1, simt=2), rows(bnb=2, torch=3))
        old = self.found()
        self.call(rows(mma=4), rows(bnb=6, torch=7))
        self.assertEqual(self.found(), old | {("2", "mma"): 4, ("2", "bnb"): 6, ("2", "torch"): 7})
        self.call(rows(mma=4, simt=5), rows(bnb=6))
        self.assertEqual({key for key in self.found() if key[0] == "1"}, set(old))

    def test_two_sides_of_two_calls_make_no_ratio(self):
        self.call(rows(qlab=1))
        self.call(peers=rows(bnb=2))
        self.assertEqual(len(self.found()), 2)
        entry = headline.entry_of({"kernels": self.file}, TARGET)
        self.assertEqual((entry["ours"], entry["ratio"], entry["met"]), (None, None, False))

    def test_pairs_take_the_place_of_two_rows(self):
        pair = rows(mma=6, scratch=5, dense=1)
        pair[0] |= {"over_beside": 1.5, "beside_us": 4.1}
        pair[1] |= {"over_beside": 1.25, "beside_us": 4.2}
        target = TARGET | {"ratio": "ours/peer", "bound": "at most", "target": 1.3,
                           "ours": TARGET["ours"] | {"not": ["dense"]},
                           "peer": {"self": TARGET["peer"] | {"name": CASE + "/dense"}}}
        self.call(pair)
        entry = headline.entry_of({"kernels": self.file}, target)
        self.assertEqual([entry[key] for key in ("ours", "peer", "ratio", "met", "formula")],
                         [5, 4.2, 1.25, True, "median of pairs"])
        self.assertEqual(entry["from"]["peer"]["field"], "beside_us")
        self.call(rows(mma=6, scratch=5, dense=1))
        entry = headline.entry_of({"kernels": self.file}, target)
        self.assertEqual((entry["ratio"], entry["formula"]), (5, "ours/peer"))
        linear = [row | {"name": "linear/dx/8x8/m1024/" + row["name"].split("/")[-1], "call": 0}
                  for row in pair]
        table = report.linear_rows({"linear": {"ours": linear}})["dx", "8x8"][1024]
        self.assertEqual({name: row["ratio"] for name, row in table.items()},
                         {"mma": 1.5, "scratch": 1.25, "dense": 1})

    def test_ceilings_stay_with_the_rows_of_their_call(self):
        self.call(rows(qlab=1, other__qlab=5), rows(bnb=2))
        self.call(rows(qlab=3))
        self.call(rows(other__qlab=6))
        rates = [(row["call"], row["GB/s"]) for row in self.file["ours"] if "GB/s" in row]
        self.assertEqual(rates, [(0, 1), (1, 2), (2, 3)])
        self.assertEqual([call["date"] for call in self.file["calls"]], ["1", "2", "3"])
        self.call(rows(qlab=1, other__qlab=5), rows(bnb=2))
        self.assertEqual([row["GB/s"] for row in self.file["ours"] if "GB/s" in row], [4])
        self.assertEqual(len(self.file["calls"]), 1)

    def test_cases_that_are_set_beside_each_other_stay_together(self):
        for base, other in (("lora/both/8x8/m512/r0", "lora/both/8x8/m512/r16-dropout"),
                            ("8b-1x512-none", "8b-1x512-none-gang8")):
            self.assertEqual(measure.group_of({"name": base + "/a"}).removesuffix("/r0"),
                             measure.group_of({"name": other + "/a"}))
            self.file = {}
            pair = [{"name": base + "/a", "us": 1}, {"name": other + "/a", "us": 2}]
            self.call(pair)
            self.call(pair[:1])
            self.assertEqual(len([row for row in self.file["ours"] if "us" in row]), 3, base)
            self.call(pair)
            self.assertEqual(len([row for row in self.file["ours"] if "us" in row]), 2, base)
        self.assertNotEqual(measure.group_of({"name": "linear/dx/8x8/m1/a"}),
                            measure.group_of({"name": "linear/dx/8x8/m16/a"}))


class StateTest(unittest.TestCase):
    def test_samples_in_short(self):
        fields = gpu_state.SAMPLED + gpu_state.REASON_FIELDS[:1]
        lines = ["1980, 127.5, 39, 0x0000000000000001", "1500, 690.0, 60, 0x0000000000000004",
                 "1700, 650.0, [N/A], 0x0000000000000024", "", "[Unknown Error]"]
        state = gpu_state.summary(lines, fields)
        self.assertEqual(state, {"samples": 3, "clocks.sm": [1500, 1700, 1980],
                                 "power.draw": [127.5, 650, 690], "temperature.gpu": [39, 49.5, 60],
                                 "reasons": {"software power cap": 0.667,
                                             "software thermal slowdown": 0.333}})
        self.assertIsNone(gpu_state.summary([], fields))
        text = report.under_load({"state_ours": state, "state_peers": None})
        self.assertEqual(len(text), 1)
        self.assertIn("1500 to 1980 MHz (median 1700), 128 to 690 W (median 650)", text[0])
        self.assertIn("software power cap 67 % of the time", text[0])

    def test_a_sampler_beside_a_program(self):
        with tempfile.TemporaryDirectory() as folder:
            fake = pathlib.Path(folder) / "nvidia-smi"
            fake.write_text("#!/bin/sh\ncase \"$*\" in\n*clocks_event*lms*) while :; do echo "
                            "'1000, 100, 40, 0x4'; sleep 0.05; done ;;\n"
                            "*=clocks_event_reasons.active*) echo 0x4 ;;\nesac\n")
            fake.chmod(0o755)
            with unittest.mock.patch.dict(os.environ, PATH=f"{folder}:{os.environ['PATH']}"):
                with gpu_state.Sampler() as sampler:
                    time.sleep(0.5)
        self.assertGreater(sampler.summary["samples"], 2)
        self.assertEqual(sampler.summary["reasons"], {"software power cap": 1})
        self.assertIsNotNone(sampler.process.returncode)


class PlotTest(unittest.TestCase):
    def test_the_legend_lies_within_the_plot_however_many_kernels_there_are(self):
        for count in (1, 9, 17):
            kernels = {f"kernel number {i}": {"ratio": 1.5} for i in range(count)}
            svg = crossover.plot({("forward", crossover.SHAPES[0]): {1: kernels, 64: kernels}}, "")
            width, height = map(int, re.search(r'width="(\d+)" height="(\d+)"', svg).groups())
            places = [(float(x), float(y)) for x, y in
                      re.findall(r'<text x="([\d.]+)" y="([\d.]+)"[^>]*>kernel number', svg)]
            self.assertEqual(len(set(places)), count)
            for x, y in places:
                self.assertLess(x, width - 60)
                self.assertLess(y, height)


class FilterTest(unittest.TestCase):
    def test_it_ends_before_the_implementation(self):
        name = "cuda/linear/forward/64x64/m1/{}/iterations:11/manual_time"
        for chosen, count in (("linear/.*/64x64/m1", 2), ("64x64/m1/mma", 0), ("", 2), ("m16", 0),
                              ("64x64/m(1|4)$", 2), ("64x64/m$", 0), ("64x64/m", 2)):
            pattern = re.compile(measure.benchmarks("linear", chosen))
            found = [n for n in ("mma", "simt") if pattern.search(name.format(n))]
            self.assertEqual(len(found), count, chosen)
            self.assertTrue(pattern.search("cuda/ceiling/copy/iterations:1/manual_time"))


FAKE = """#!/usr/bin/env python3
import json, re, sys
names = ["cuda/ceiling/copy/iterations:1/manual_time"] + [
    f"cuda/linear/dx/{n}x8/m1/{kernel}/iterations:11/manual_time"
    for n in (8, 16) for kernel in ("mma", "scratch")]
options = dict(a.lstrip("-").split("=", 1) for a in sys.argv[1:] if "=" in a)
names = [name for name in names if re.search(options["benchmark_filter"], name)]
if "--benchmark_list_tests" in sys.argv:
    print(*names, sep="\\n")
else:
    rows = [{"name": name, "us": 2.0, "noise_percent": 0.5} for name in names]
    rows[-1] |= {"error_occurred": True, "error_message": "left out: the time is up"}
    with open(options["benchmark_out"], "w") as file:
        json.dump({"context": {"qlab_commit": "0123456789ab"}, "benchmarks": rows}, file)
"""


class CommitTest(unittest.TestCase):
    def test_a_binary_of_another_commit_is_said_and_recorded(self):
        long = "0adf5e9c1234"
        for built, checked_out, same in ((long, "0adf5e9", True), ("0adf5e9", long, True),
                                         (long + "-dirty", "0adf5e9-dirty", True),
                                         (long + "-dirty", "0adf5e9", False),
                                         (long, "23c7834", False), ("unknown", "23c7834", True),
                                         ("", "23c7834", True)):
            said = io.StringIO()
            with unittest.mock.patch.dict(os.environ, {"QLAB_COMMIT": checked_out}), \
                    contextlib.redirect_stderr(said):
                recorded = measure.commit_of("build/qlab-bench", built)
            self.assertEqual(recorded, checked_out if same else built, built)
            self.assertEqual("WARNING: build/qlab-bench was built from" in said.getvalue(),
                             not same, built)


class WholeTest(unittest.TestCase):
    """The program, with a stand-in for qlab-bench."""

    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = pathlib.Path(folder.name)
        (self.folder / "qlab-bench").write_text(FAKE)
        (self.folder / "qlab-bench").chmod(0o755)

    def measure(self, *options):
        return subprocess.run([sys.executable, ROOT / "bench/measure.py", "linear", "--build",
                               self.folder, "--results", self.folder, *options],
                              capture_output=True, text=True,
                              env=os.environ | {"PYTHONPATH": str(self.folder)})

    def test_a_call_without_peers(self):
        result = self.measure("--no-peers", "--filter", "dx/16x8")
        self.assertEqual(result.returncode, 0, result.stderr)
        self.assertIn("linear/dx/16x8/m1/scratch left out", result.stdout)
        file = json.loads((self.folder / "linear.json").read_text())
        self.assertEqual([row["name"] for row in file["ours"]],
                         ["ceiling/copy", "linear/dx/16x8/m1/mma"])
        self.assertEqual(len(file["calls"]), 1)
        self.assertEqual(file["calls"][0]["commit"], "0123456789ab")
        self.assertIn("qlab-bench was built from 0123456789ab", result.stderr)
        self.assertIn("state_ours", file["calls"][0])

    def test_a_filter_that_finds_nothing(self):
        result = self.measure("--no-peers", "--filter", "m1/mma")
        self.assertEqual(result.returncode, 1)
        self.assertIn("no case of linear that 'm1/mma' finds", result.stderr)
        self.assertFalse((self.folder / "linear.json").exists())

    def test_a_filter_that_finds_no_step(self):
        (self.folder / "qlab").symlink_to("/bin/true")
        result = subprocess.run([sys.executable, ROOT / "bench/measure.py", "step", "--build",
                                 self.folder, "--results", self.folder, "--filter", "no_such_row"],
                                capture_output=True, text=True)
        self.assertEqual(result.returncode, 1)
        self.assertIn("no row that 'no_such_row' finds; step_rows.json has 8b-4x2048-none, ",
                      result.stderr)
        self.assertFalse((self.folder / "step.json").exists())

    def test_peers_that_are_missing_are_named(self):
        (self.folder / "torch.py").write_text("raise ImportError('not here')\n")
        result = self.measure()
        self.assertIn("MISSING PEER all: exit status 1", result.stderr)
        file = json.loads((self.folder / "linear.json").read_text())
        self.assertEqual(len(file["ours"]), 4)
        self.assertTrue(file["calls"][0]["missing_peers"])

    def test_a_report_of_broken_rows_names_them_and_writes_nothing(self):
        results = ROOT / "bench/results"
        for file, change, why in (("linear", {"us": "9"}, "us is no number: '9'"),
                                  ("linear", {"name": "linear/dx/8x8/mX/mma"}, "not PART/PASS"),
                                  ("linear", {"over_beside": 1.0, "beside_us": float("inf")},
                                   "beside_us is no number"),
                                  ("step", {"tokens_per_s": None}, "tokens_per_s is no number"),
                                  ("step", {"adapter_sha256": 5}, "no list of hashes"),
                                  ("kernels", {"call": 1.0}, "call 1.0 is not one of"),
                                  ("long", {"date": 3}, "date of a run is 3"),
                                  ("memory", {"device": None}, "device of a run is None")):
            broken = json.loads((results / f"{file}.json").read_text())
            (broken["ours"] if isinstance(broken, dict) else broken)[0].update(change)
            (self.folder / f"{file}.json").write_text(json.dumps(broken))
            result = subprocess.run([sys.executable, ROOT / "bench/report.py", "--results",
                                     self.folder, "--docs", self.folder], capture_output=True,
                                    text=True)
            self.assertEqual(result.returncode, 1)
            self.assertIn(why, result.stderr)
            self.assertEqual(result.stderr.count("\n"), 1, result.stderr)
            self.assertFalse((self.folder / "headline.json").exists())
            (self.folder / f"{file}.json").unlink()

    def test_what_cannot_be_read_is_said_before_anything_is_measured(self):
        path = self.folder / "linear.json"
        for text in ('{"calls": [', "[]", "{}", '{"calls": [], "ours": [], "peers": [{}]}',
                     '{"calls": [{"gpu": {}}], "ours": [{"name": "a/b", "call": 1}], "peers": []}'):
            path.write_text(text)
            result = self.measure("--no-peers")
            self.assertEqual(result.returncode, 1)
            self.assertEqual(result.stdout, "")
            self.assertRegex(result.stderr, rf"^{path}: .*; move it away to measure anew\n$")
            self.assertEqual(path.read_text(), text)


class ReportTest(unittest.TestCase):
    """bench/report.py on a copy of what was measured."""

    def test_one_file_that_cannot_be_read_leaves_the_older_report_whole(self):
        with tempfile.TemporaryDirectory() as name:
            folder = pathlib.Path(name)
            for part in ("bench/results", "docs"):
                shutil.copytree(ROOT / part, folder / part)
            (folder / "bench/results/headline.json").write_text("[]\n")
            before = (folder / "docs/performance.md").read_text()
            for file in ("step", "kernels", "linear", "attention", "cpu_step", "memory", "long",
                         "budget"):
                damaged = folder / f"bench/results/{file}.json"
                whole = damaged.read_text()
                damaged.write_text(whole[:500])
                result = subprocess.run([sys.executable, ROOT / "bench/report.py", "--results",
                                         damaged.parent, "--docs", folder / "docs"],
                                        capture_output=True, text=True)
                self.assertEqual(result.returncode, 1, damaged)
                self.assertRegex(result.stderr, rf"^{damaged}: not read: .*\n$")
                self.assertEqual((damaged.parent / "headline.json").read_text(), "[]\n")
                self.assertEqual((folder / "docs/performance.md").read_text(), before)
                damaged.write_text(whole)


if __name__ == "__main__":
    unittest.main()

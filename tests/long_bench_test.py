"""bench/long.py on the CPU with small stand-ins, and that the headline finds what it measures.

    python tests/long_bench_test.py build/qlab
"""

import itertools
import json
import pathlib
import subprocess
import sys
import tempfile
import unittest

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "bench"))
import headline
import report

QLAB = pathlib.Path(sys.argv.pop(1) if len(sys.argv) > 1 else ROOT / "build/qlab").resolve()
ROWS = json.loads((ROOT / "bench/long_rows.json").read_text())
KEYS = {"lora.r": 4, "data.train": "synthetic", "data.seq_len": 32, "train.batch_size": 1,
        "train.steps": 2, "train.save_every": 0}


def row(name, **changes):
    return {"name": name, "command": "train", "model": "synthetic:tiny", "limit": 60,
            "set": KEYS | changes.pop("set", {})} | changes


class LongTest(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = pathlib.Path(folder.name)

    def measure(self, rows, *options):
        path = self.folder / "rows.json"
        path.write_text(json.dumps(rows))
        return subprocess.run([sys.executable, ROOT / "bench/long.py", "--qlab", QLAB, "--rows",
                               path, "--results", self.folder, "--device", "cpu", *options],
                              capture_output=True, text=True)

    def results(self):
        entries = json.loads((self.folder / "long.json").read_text())
        return {entry["name"]: entry for entry in entries}

    def test_every_kind_of_row(self):
        paged = {"optim.type": "paged_adamw", "train.grad_accum": 3, "train.steps": 6}
        files = row("files", checkpoint="tiny", set={"data.seq_len": 200})
        del files["model"]
        result = self.measure([row("plain"), row("paged", device_memory="1GB", set=paged), files,
                               row("asked", command="memory", gpu="h100-80gb")])
        self.assertEqual(result.returncode, 0, result.stdout + result.stderr)
        found = self.results()
        self.assertEqual(list(found), ["plain", "paged", "files", "asked"])
        for name, tokens in (("plain", 32), ("paged", 96), ("files", 200)):
            entry = found[name]
            self.assertAlmostEqual(entry["tokens_per_s"] * entry["step_seconds"], tokens)
            self.assertGreater(entry["seconds"], entry["start_seconds"])
            self.assertGreater(entry["peak_bytes"], 10000)
        self.assertEqual(found["files"]["tokens"], 200)
        self.assertEqual(found["paged"]["device_memory"], "1GB")
        self.assertEqual((found["paged"]["moved_bytes"], found["paged"]["host_bytes"]), (0, 0))
        self.assertNotIn("moved_bytes", found["plain"])
        self.assertGreater(found["asked"]["predicted_bytes"], 10000)
        raw = headline.load(self.folder)
        self.assertEqual(report.long_table(raw).count("\n"), 5)
        self.assertEqual({r["call"] for r in raw["long"]["ours"] if "tokens" in r}, {0})

    def test_what_fails_leaves_the_older_row(self):
        first = self.measure([row("a"), row("b")])
        self.assertEqual(first.returncode, 0, first.stderr)
        old = self.results()
        bad = row("a", set={"lora.targets": "no_such_module"})
        result = self.measure([bad, row("b", set={"lora.r": 8})])
        self.assertEqual(result.returncode, 1)
        self.assertIn("FAILED a: ", result.stderr)
        self.assertIn("no_such_module", result.stderr)
        self.assertEqual(self.results()["a"], old["a"])
        self.assertEqual(self.results()["b"]["set"]["lora.r"], 8, result.stdout + result.stderr)

    def test_what_cannot_be_read_is_said_before_anything_is_measured(self):
        path = self.folder / "long.json"
        for text in ("[{", "{}", '[{"name": "a"}]'):
            path.write_text(text)
            result = self.measure([row("a")])
            self.assertEqual((result.returncode, result.stdout), (1, ""))
            self.assertRegex(result.stderr, rf"{path}: .*; move it away to measure anew\n$")
            self.assertEqual(path.read_text(), text)

    def test_limits_and_the_filter(self):
        endless = row("endless", limit=2, set={"train.steps": 1000000})
        result = self.measure([endless, row("other")], "--filter", "endless")
        self.assertIn("FAILED endless: not done after 2 s", result.stderr)
        self.assertFalse((self.folder / "long.json").exists())
        result = self.measure([row("a"), row("b")], "--filter", "c")
        self.assertEqual(result.returncode, 1)
        self.assertIn("no row that 'c' finds; rows.json has a, b\n", result.stderr)
        result = self.measure([row("a"), row("late", limit=900)], "--seconds", "60")
        self.assertIn("late left out: it may take 900 s; FILTER=late", result.stdout)
        self.assertEqual(list(self.results()), ["a"])

    def test_a_ratio_is_of_one_commit_and_device(self):
        targets = json.loads((ROOT / "bench/targets.json").read_text())
        target = next(t for t in targets if t["name"].startswith("LLaMA-65B"))

        def ratio(*entries):
            form = headline.long_rows([
                {"name": name, "tokens_per_s": rate, "commit": commit, "device": "G", "date": date}
                for name, rate, commit, date in entries])
            return headline.entry_of({"long": form}, target)["ratio"]
        self.assertEqual(ratio(("65b-paged", 9.0, "c", "2"), ("65b-unpaged", 10.0, "c", "1")), 0.9)
        self.assertIsNone(ratio(("65b-paged", 9.0, "c", "2"), ("65b-unpaged", 10.0, "d", "1")))

    def test_pages_are_set_beside_the_run_without(self):
        def entry(name, seconds, commit="c", **more):
            return {"name": name, "step_seconds": seconds, "commit": commit, "device": "G",
                    "date": name} | more
        pages = {"beside": "plain", "state_bytes": 5_000_000_000, "step_moved_bytes": 10_000_000_000,
                 "step_stalled_seconds": 0.09, "device_memory": "9GB"}
        out = entry("out", 0.7, host_bytes=5_000_000_000, **pages)
        raw = {"long": headline.long_rows([entry("plain", 0.6), out, entry("in", 0.601, host_bytes=0,
                                                                           **pages)])}
        rows = {row["name"]: row for row in raw["long"]["ours"]}
        self.assertAlmostEqual(rows["out/qlab"]["GB/s"], 50)
        self.assertAlmostEqual(rows["in/qlab"]["added_seconds"], 0.001)
        self.assertNotIn("GB/s", rows["in/qlab"])
        text = report.paging_table(raw)
        self.assertIn("| out | 9GB | 5.00 | 5.00 | 10.00 | 700.0 | 90.0 | 100.0 | 50 |", text)
        self.assertEqual(text.count("\n"), 3)
        # Another commit's is not beside it.
        rows = headline.long_rows([entry("plain", 0.6, commit="d"), out])["ours"]
        self.assertNotIn("GB/s", rows[0] | rows[1])

    def test_the_states_just_leave(self):
        """Within its limit a row's states are all on the host, and none where it has no limit."""
        for row in ROWS:
            if not row["name"].startswith("paging-r256") or row["set"]["optim.type"] == "adamw":
                continue
            command = [QLAB, "memory", row["model"], "--gpu", "h100-80gb", "--json"]
            command += ["--device-memory", row["device_memory"]] if "device_memory" in row else []
            for key, value in row["set"].items():
                command += ["--set", f"{key}={json.dumps(value)}"]
            said = json.loads(subprocess.run(command, capture_output=True, text=True).stdout)
            self.assertIs(said["fits"], True)
            states = 671_088_640 * 8 if "device_memory" in row else 0
            self.assertEqual(said["paged_out_bytes"], states)

    def test_the_targets_name_rows_that_exist(self):
        names = {r["name"] for r in ROWS}
        self.assertEqual(len(names), len(ROWS))
        for target in json.loads((ROOT / "bench/targets.json").read_text()):
            ours = target.get("ours", {})
            if ours.get("file") == "long":
                keys = target.get("cases", {})
                for values in itertools.product(*keys.values()):
                    name = ours["name"].format(**dict(zip(keys, values)))
                    self.assertIn(name.removesuffix("/qlab"), names)
        for name, model in (("longest-24gb", 78475), ("longest-80gb", 342733)):
            found = next(r for r in ROWS if r["name"] == name)
            self.assertEqual((found["set"]["data.seq_len"], found["set"]["lora.r"]), (model, 32))


if __name__ == "__main__":
    unittest.main()

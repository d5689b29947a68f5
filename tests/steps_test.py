"""bench/steps.py with a stand-in for qlab: adapters with and without graphs are compared."""

import json
import pathlib
import subprocess
import sys
import tempfile
import unittest

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "bench"))
import headline

# Its adapter is the configuration without train.graphs, and with BY_GRAPHS all of it.
FAKE = """#!/usr/bin/env python3
import json, pathlib, sys
config = json.loads(pathlib.Path(sys.argv[2]).read_text())
trial = pathlib.Path(sys.argv[sys.argv.index("--out") + 1]) / "trials/0"
(trial / "adapter").mkdir(parents=True)
base = config.get("base", config)
with open(trial.parents[3] / "runs.txt", "a") as runs:
    print(base["train"]["steps"], base["train"].get("graphs", True), *sys.argv[7:], file=runs)
if not BY_GRAPHS:
    base["train"].pop("graphs", None)
if BY_REPLICAS:
    config["arguments"] = sys.argv[7:]
(trial / "adapter/adapter_model.safetensors").write_text(json.dumps(config))
(trial / "metrics.jsonl").write_text("{}\\n" * base["train"]["steps"])
(trial / "status.json").write_text(json.dumps(
    {"status": "finished", "peak_bytes": 1, "step_seconds_median": 0.5}))
"""


class StepsTest(unittest.TestCase):
    maxDiff = None

    def steps(self, *options, by_graphs=False, by_replicas=False, gpus="0"):
        """The exit status, the rows, and each run's (steps, graphs) and further arguments."""
        with tempfile.TemporaryDirectory() as name:
            folder = pathlib.Path(name)
            fake = folder / "qlab"
            fake.write_text(FAKE.replace("BY_GRAPHS", str(by_graphs))
                            .replace("BY_REPLICAS", str(by_replicas)))
            fake.chmod(0o755)
            result = subprocess.run(
                [sys.executable, ROOT / "bench/steps.py", "--qlab", fake, "--output",
                 folder / "rows.json", *options], capture_output=True, text=True,
                env={"TMPDIR": name, "PATH": "/usr/bin:/bin", "CUDA_VISIBLE_DEVICES": gpus})
            self.output = result.stdout
            self.assertEqual(result.stderr, "")
            rows = json.loads((folder / "rows.json").read_text())["rows"]
            runs = folder / "runs.txt"
            lines = runs.read_text().splitlines() if runs.exists() else []
            return result.returncode, rows, [tuple(line.split()) for line in lines]

    def test_rows_of_few_tokens_are_trained_without_graphs_as_well(self):
        status, rows, runs = self.steps("--rows", "^smollm2-4x512-none$")
        self.assertEqual(status, 0)
        self.assertEqual(runs, [("20", "True"), ("20", "False")])
        self.assertIs(rows[0]["graphs_off_equal"], True)
        self.assertEqual([len(digest) for digest in rows[0]["adapter_sha256"]], [64])
        self.assertEqual(rows[0]["tokens_per_s"], 4 * 512 / 0.5)

    def test_a_mismatch_fails_the_call(self):
        status, rows, _ = self.steps("--rows", "^smollm2-4x512-none$", by_graphs=True)
        self.assertEqual(status, 1)
        self.assertIs(rows[0]["graphs_off_equal"], False)
        self.assertIn("not that of the run without graphs", rows[0]["error"])
        self.assertNotIn("tokens_per_s", rows[0])

    def test_the_others_when_asked(self):
        for options, expected in (((), [("12", "True")]),
                                  (("--check", "all"), [("20", "True"), ("20", "False")]),
                                  (("--check", "all", "--steps", "9"),
                                   [("9", "True"), ("9", "False")])):
            status, rows, runs = self.steps("--rows", "^8b-8x2048-full$", *options)
            self.assertEqual((status, runs), (0, expected))
            self.assertEqual("graphs_off_equal" in rows[0], bool(options))

    def test_replicas_are_held_against_one_gpu(self):
        rows_chosen = ("--rows", "^8b-4x2048-two-gpus$")
        status, rows, runs = self.steps(*rows_chosen, gpus="0,1")
        self.assertEqual((status, runs), (0, [("12", "True"), ("12", "True", "--replicas", "2")]))
        self.assertEqual([row["tokens_per_s"] for row in rows], 2 * [2 * 4 * 2048 / 0.5])
        status, rows, _ = self.steps(*rows_chosen, gpus="0,1", by_replicas=True)
        self.assertEqual(status, 1)
        self.assertIn("tokens_per_s", rows[0])
        self.assertIn("not that of 8b-4x2048-two-gpus/one-gpu", rows[1]["error"])

    def test_a_row_for_more_gpus_than_are_here_is_left_out(self):
        status, rows, runs = self.steps("--rows", "^8b-4x2048-two-gpus$", gpus="0")
        self.assertEqual((status, rows, runs), (0, [], []))
        self.assertIn("8b-4x2048-two-gpus left out: needs 2 GPUs, and 1 is here", self.output)


class GangTest(unittest.TestCase):
    def as_alone(self, gang, call=0, steps=20):
        def row(name, adapters, call, train):
            return {"name": name, "adapter_sha256": adapters, "call": call, "config": train}
        rows = headline.step_rows({"ours": [
            row("8b/resident", ["a"], 0, {"train": {"steps": 20}}),
            row("8b-gang2/resident", gang, call, {"base": {"train": {"steps": steps}}})]})["ours"]
        self.assertNotIn("as_alone", rows[0])
        return rows[1].get("as_alone")

    def test_a_gang_has_the_adapter_of_the_run_alone(self):
        self.assertEqual(self.as_alone(["b", "a"]), 1)
        self.assertEqual(self.as_alone(["b", "c"]), 0)

    def test_only_runs_of_one_call_and_as_many_steps_are_compared(self):
        self.assertIsNone(self.as_alone(["b", "c"], call=1))
        self.assertIsNone(self.as_alone(["b", "c"], steps=12))


if __name__ == "__main__":
    unittest.main()

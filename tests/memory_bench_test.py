"""bench/memory.py: rows to sweeps, verdicts, merging, and the whole of it on the CPU.

    python tests/memory_bench_test.py build/qlab
"""

import json
import pathlib
import subprocess
import sys
import tempfile
import unittest

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "bench"))
import headline
import memory
import memory_report
import report

QLAB = pathlib.Path(sys.argv.pop(1) if len(sys.argv) > 1 else ROOT / "build/qlab").resolve()
TINY = {"lora.r": 4, "train.batch_size": 1, "data.seq_len": 32}
MIB = 1 << 20


def run_of(settings, peak=1000 * MIB, **changes):
    return {"model": "synthetic:tiny", "set": settings, "device": "Some GPU", "commit": "c",
            "date": "2026-01-01", "peak_bytes": peak, "predicted_bytes": peak,
            "training_peak_bytes": peak, "predicted_training_bytes": peak,
            "load_peak_bytes": 5, "predicted_load_bytes": 5,
            "device_used_bytes": peak + 500 * MIB, "context_bytes": 500 * MIB} | changes


class RowsTest(unittest.TestCase):
    def setUp(self):
        self.groups = memory.load_rows(memory.ROWS)

    def test_they_cover_what_is_asked_for(self):
        rows = [(model, row) for name, model, rows, _ in self.groups if name != memory.BUDGET
                for row in rows]
        self.assertGreaterEqual(len(rows), 24)
        self.assertEqual(len({memory.key_of({"model": m, "set": row}) for m, row in rows}),
                         len(rows))
        found = {key: {row.get(key) for _, row in rows} for key in rows[0][1]}
        self.assertLessEqual({512, 1024, 2048, 4096}, found["data.seq_len"])
        self.assertLessEqual({1, 2, 4, 8}, found["train.batch_size"])
        self.assertLessEqual({"none", "full", "auto"}, found["train.recompute"])
        self.assertLessEqual({4, 256}, found["lora.r"])
        self.assertLessEqual({"attention", "all-linear"}, found["lora.targets"])
        self.assertIn(4, {memory.trials_of(row) for _, row in rows})
        for model in ("smollm2-135m", "llama-3.1-8b", "llama-13b"):
            formats = {(row["quant.type"], row.get("quant.double_quant")) for m, row in rows
                       if m == "synthetic:" + model}
            self.assertLessEqual({("nf4", True), ("nf4", False), ("bf16", None)}, formats, model)

    def test_the_budgets(self):
        rows = next(group.rows for group in self.groups if group.name == memory.BUDGET)
        budgets = {row.get("train.memory_budget") for row in rows} - {None}
        self.assertEqual(budgets, {f"{n}GiB" for n in (8, 9, 10, 12, 16, 24, 32, 48, 64)})
        self.assertLessEqual({"full", "selective", "none"},
                             {row["train.recompute"] for row in rows})

    def test_a_filter_finds_groups_models_and_settings(self):
        for pattern, count in (("^13b-bf16 ", 2), ("llama-33b", 1), ("memory_budget.: .9GiB", 1)):
            found = memory.chosen_rows(self.groups, pattern)
            self.assertEqual(sum(len(group.rows) for group in found), count, pattern)

    def test_a_gang_is_as_many_points(self):
        row = TINY | {"parallel.trials_per_gpu": 4}
        points = memory.sweep_file("g", "synthetic:tiny", [TINY, row])["paired"]
        self.assertEqual(len(points), 5)
        self.assertEqual(len({point["optim.lr"] for point in points[1:]}), 4)


class VerdictTest(unittest.TestCase):
    def test_to_the_byte(self):
        self.assertTrue(memory.byte_equal(run_of(TINY)))
        self.assertFalse(memory.byte_equal(run_of(TINY, predicted_training_bytes=1000 * MIB - 256)))
        self.assertFalse(memory.byte_equal(run_of(TINY, predicted_load_bytes=4)))
        self.assertIn("NOT AS PREDICTED: training +256 B, loading +0 B",
                      memory.verdict(run_of(TINY, predicted_training_bytes=1000 * MIB - 256), None))

    def test_the_device_within_one_percent_of_prediction_and_context(self):
        context = 500 * MIB
        for used, agrees in ((1500, True), (1514, True), (1486, True), (1516, False),
                             (1484, False)):
            entry = run_of(TINY, device_used_bytes=used * MIB)
            self.assertIs(memory.device_agrees(entry, context), agrees, used)
        self.assertIsNone(memory.device_agrees(run_of(TINY, device_used_bytes=0), context))
        self.assertIsNone(memory.device_agrees(run_of(TINY), None))

    def test_the_context_is_the_first_row_s_on_that_device(self):
        reference = "synthetic:tiny", TINY
        entries = [run_of(TINY | {"lora.r": 8}, context_bytes=1), run_of(TINY)]
        self.assertEqual(memory.context_of(entries, "Some GPU", reference), 500 * MIB)
        self.assertIsNone(memory.context_of(entries, "Another", reference))

    def test_the_device_is_read_where_the_allocator_was_at_its_peak(self):
        peak = 1000 * MIB
        lines = [{"total": peak - 2 * MIB, "device_used": 9}, {"total": peak, "device_used": 7},
                 {"total": peak - 512, "device_used": 8},
                 {"total": peak, "device_used": 99, "shared": True}, {"total": peak}]
        self.assertEqual(memory.used_at_peak(lines, peak), (8, peak - 512))
        self.assertIsNone(memory.used_at_peak(lines[-1:], peak))

    def test_a_finished_trial_s_entry(self):
        status = {"device": "Some GPU", "peak_bytes": 900 * MIB, "load_peak_bytes": 950 * MIB,
                  "predicted_peak_bytes": 900 * MIB, "predicted_load_peak_bytes": 940 * MIB,
                  "peak_bytes_by_category": {}}
        lines = [{"phase": "load", "total": 300 * MIB, "device_used": 800 * MIB},
                 {"phase": "train", "total": 900 * MIB - 512, "device_used": 1450 * MIB}]
        entry = memory.entry_of("m", TINY, status, lines, 50 * MIB, {"commit": "c"})
        self.assertEqual((entry["peak_bytes"], entry["predicted_bytes"]), (950 * MIB, 940 * MIB))
        self.assertEqual(entry["device_used_bytes"], 1400 * MIB)
        self.assertEqual(entry["context_bytes"], 500 * MIB + 512)
        self.assertEqual(entry["beyond_bytes"], {"load": 450 * MIB, "train": 500 * MIB + 512})
        self.assertFalse(memory.byte_equal(entry))
        self.assertTrue(memory.device_agrees(entry, 500 * MIB))

    def test_the_headline_has_the_row_that_is_furthest_off(self):
        model, settings = memory.reference_row()
        entries = [run_of(settings, model=model),
                   run_of(TINY, device_used_bytes=1350 * MIB),
                   run_of(TINY | {"lora.r": 8}, device_used_bytes=0)]
        rows = headline.memory_rows(entries)
        self.assertEqual([row["device_ratio"] for row in rows["ours"][:-1]], [1, 1500 / 1350])
        self.assertEqual(rows["ours"][-1]["equal_share"], 1)
        off = run_of(TINY, predicted_training_bytes=999 * MIB)
        self.assertEqual(headline.memory_rows(entries + [off])["ours"][-1]["equal_share"], 3 / 4)


class MergeTest(unittest.TestCase):
    def test_the_same_row_is_replaced_and_others_stay(self):
        other = {"lora.r": 8}
        old = [run_of(TINY), run_of(other)]
        new = [run_of(dict(reversed(TINY.items())), commit="new"), run_of({"lora.r": 9})]
        result = memory.merged(old, new)
        self.assertEqual([(e["set"], e["commit"]) for e in result],
                         [(TINY, "new"), (other, "c"), ({"lora.r": 9}, "c")])

    def test_what_cannot_be_read_is_not_overwritten(self):
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder) / "memory.json"
            self.assertEqual(memory.read_results(path), [])
            for text in ("[{", "{}", "[1]", '[{"model": "m"}]'):
                path.write_text(text)
                with self.assertRaises(SystemExit) as raised:
                    memory.read_results(path)
                self.assertIn(str(path), str(raised.exception))
                self.assertEqual(path.read_text(), text)
            memory.write_results(path, [run_of(TINY)])
            self.assertEqual(memory.read_results(path), [run_of(TINY)])


class ReportTest(unittest.TestCase):
    def budgets(self):
        speed = {"plan": "all", "step_tokens": 100, "predicted_step_seconds": 0.9}
        rows = [TINY | {"lora.targets": "qv", "train.recompute": "auto",
                        "train.memory_budget": f"{n}GiB"} for n in (8, 64)]
        rows += [TINY | {"lora.targets": "qv", "train.recompute": "full"}]
        return [run_of(row, peak=(i + 8) * memory_report.GIB, step_seconds=1 + i,
                       tokens_per_s=100 / (1 + i), **speed) for i, row in enumerate(rows)]

    def test_the_table_and_the_plot_of_budgets(self):
        text = memory_report.budget_table(self.budgets(), report.table)
        self.assertIn("| auto, 64GiB | 50 | 2000.0 | 900.0 | +122.2% | 9.000 | yes | all |", text)
        plot = memory_report.budget_plot(self.budgets())
        self.assertEqual(plot.count("<circle"), 3)
        self.assertIsNone(memory_report.budget_plot(self.budgets()[1:]))

    def test_the_table_of_peaks(self):
        model, settings = memory.reference_row()
        text = memory_report.memory_table([run_of(settings, model=model)], report.table)
        self.assertIn("| equal | 1.465 | +0.00% |", text)


class WholeTest(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = pathlib.Path(folder.name)

    def measure(self, groups, *options):
        rows = self.folder / "rows.json"
        rows.write_text(json.dumps(groups))
        return subprocess.run([sys.executable, ROOT / "bench/memory.py", "--qlab", QLAB, "--rows",
                               rows, "--results", self.folder, "--device", "cpu", *options],
                              capture_output=True, text=True)

    def results(self, name):
        return memory.read_results(self.folder / f"{name}.json")

    def test_on_the_cpu(self):
        gang = TINY | {"parallel.trials_per_gpu": 2}
        budget = {"name": "budget", "model": "synthetic:tiny", "set": TINY,
                  "rows": [{"train.recompute": "auto", "train.memory_budget": "1KiB"},
                           {"train.recompute": "full"}]}
        groups = [{"name": "a", "model": "synthetic:tiny", "rows": [TINY, gang]}, budget]
        result = self.measure(groups)
        self.assertEqual(result.returncode, 1, result.stdout + result.stderr)
        self.assertIn("and its budget has 1.02 kB", result.stderr)
        self.assertIn("3 of 3 rows took what was predicted", result.stdout)
        runs = self.results("memory")
        self.assertEqual([run["set"] for run in runs], [TINY, gang])
        self.assertGreater(runs[1]["peak_bytes"], runs[0]["peak_bytes"])
        self.assertEqual([run["device_used_bytes"] for run in runs], [0, 0])
        self.assertEqual(sum(runs[0]["categories"].values()), runs[0]["peak_bytes"])
        speed, = self.results("budget")
        self.assertAlmostEqual(speed["tokens_per_s"] * speed["step_seconds"], 32)
        self.assertIn("fully again", speed["plan"])

        # The program reads the file; a part of the rows leaves the others as they are.
        table = subprocess.run([QLAB, "memory", "--table", "qlora-7b", "--measured",
                                self.folder / "memory.json"], capture_output=True, text=True)
        self.assertIn("where it has a run with the row's settings", table.stdout)
        before = (self.folder / "memory.json").read_text()
        result = self.measure(groups, "--filter", "recompute.: .full")
        self.assertEqual(result.returncode, 0, result.stdout + result.stderr)
        self.assertEqual((self.folder / "memory.json").read_text(), before)

    def test_time_that_is_up_leaves_rows_out(self):
        result = self.measure([{"name": "a", "model": "synthetic:tiny", "rows": [TINY]}],
                              "--seconds", "0")
        self.assertEqual(result.returncode, 0, result.stderr)
        self.assertIn("1 left out", result.stdout)
        self.assertFalse((self.folder / "memory.json").exists())

    def test_a_filter_that_finds_nothing(self):
        result = self.measure([{"name": "a", "model": "synthetic:tiny", "rows": [TINY]}],
                              "--filter", "no_such_row")
        self.assertEqual((result.returncode, result.stdout), (1, ""))
        self.assertIn("no row that 'no_such_row' finds", result.stderr)
        self.assertIn("the groups are a\n", result.stderr)


if __name__ == "__main__":
    unittest.main()

"""bench/tune.py: measured times in, lines of the dispatch table out."""

import json
import pathlib
import subprocess
import sys
import tempfile
import unittest

ROOT = pathlib.Path(__file__).resolve().parent.parent
GPU = "Some GPU 80GB"


def row(direction, shape, m, name, us):
    return {"name": f"linear/{direction}/{shape}/m{m}/{name}", "us": us, "call": 0}


class TuneTest(unittest.TestCase):
    def setUp(self):
        self.folder = tempfile.TemporaryDirectory()
        self.addCleanup(self.folder.cleanup)
        self.results = pathlib.Path(self.folder.name) / "linear.json"
        self.table = pathlib.Path(self.folder.name) / "table.inc"

    def tune(self, rows, gpus=(GPU,)):
        calls = [{"gpu": {"name": name}} for name in gpus]
        self.results.write_text(json.dumps({"calls": calls, "ours": rows}))
        result = subprocess.run([sys.executable, ROOT / "bench/tune.py", "--results", self.results,
                                 "--table", self.table], capture_output=True, text=True)
        lines = self.table.read_text().splitlines() if self.table.exists() else []
        return result, [line for line in lines if line.startswith("{")]

    def test_the_fastest_fused_kernel_until_decoding_first_wins(self):
        rows = [row("forward", "64x32", m, name, us) for m, times in {
            1: {"simt": 3, "mma": 5, "scratch": 9}, 4: {"simt": 4, "mma": 5, "scratch": 9},
            16: {"mma": 5, "scratch": 9}, 64: {"mma": 8.9, "scratch": 9}}.items()
            for name, us in times.items()]
        result, lines = self.tune(rows)
        self.assertEqual(result.returncode, 0, result.stderr)
        self.assertEqual(lines, [f'{{"{GPU}", Op::transpose, 2048, {m}, {kernel}}},' for m, kernel in
                                 ((4, "Nf4Kernel::simt"), (16, "Nf4Kernel::mma"),
                                  (64, "std::nullopt"))])

    def test_both_orientations_must_win(self):
        times = {"64x32": {"simt": 3, "mma": 4}, "32x64": {"simt": 11, "mma": 6}}
        rows = [row("dx", shape, 1, name, us) for shape, kernels in times.items()
                for name, us in (kernels | {"scratch": 9}).items()]
        _, lines = self.tune(rows)
        self.assertEqual(lines, [f'{{"{GPU}", Op::none, 2048, 1, Nf4Kernel::mma}},'])

    def test_other_gpus_keep_their_lines(self):
        other = '{"Another", Op::none, 5, 1, Nf4Kernel::simt},'
        self.table.write_text(other + "\n" + f'{{"{GPU}", Op::none, 5, 1, Nf4Kernel::mma}},\n')
        _, lines = self.tune([row("dx", "64x32", 1, "scratch", 9)])
        self.assertEqual(lines, [other, f'{{"{GPU}", Op::none, 2048, 1, std::nullopt}},'])

    def test_what_it_cannot_use_is_said(self):
        for rows, gpus, said in (([], (GPU,), "no linear layers"),
                                 ([row("dx", "8x8", 1, "mma", 1)], (GPU, "Another"), "mixes GPUs")):
            result, lines = self.tune(rows, gpus)
            self.assertNotEqual(result.returncode, 0)
            self.assertIn(said, result.stderr)
            self.assertEqual(lines, [])


if __name__ == "__main__":
    unittest.main()

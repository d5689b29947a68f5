"""bench/tune.py: measured times in, lines of the dispatch table out."""

import json
import os
import pathlib
import subprocess
import sys
import tempfile
import unittest

ROOT = pathlib.Path(__file__).resolve().parent.parent
GPU = "Some GPU 80GB"


def row(direction, shape, m, name, us, noise=0.1, call=0):
    return {"name": f"linear/{direction}/{shape}/m{m}/{name}", "us": us, "noise_percent": noise,
            "call": call}


class TuneTest(unittest.TestCase):
    def setUp(self):
        self.folder = tempfile.TemporaryDirectory()
        self.addCleanup(self.folder.cleanup)
        self.results = pathlib.Path(self.folder.name) / "linear.json"
        self.table = pathlib.Path(self.folder.name) / "table.inc"

    def tune(self, rows, gpus=(GPU,), options=(), peers=(), here=None):
        """`here`: the GPU of the machine, none by default, whichever it has."""
        if here:
            smi = pathlib.Path(self.folder.name) / "nvidia-smi"
            smi.write_text(f"#!/bin/sh\necho '{here}'\n")
            smi.chmod(0o755)
        calls = [{"gpu": {"name": name}} for name in gpus]
        self.results.write_text(json.dumps({"calls": calls, "ours": rows, "peers": peers}))
        result = subprocess.run([sys.executable, ROOT / "bench/tune.py", "--results", self.results,
                                 "--table", self.table, *options], capture_output=True, text=True,
                                env=os.environ | {"PATH": self.folder.name if here else ""})
        lines = self.table.read_text().splitlines() if self.table.exists() else []
        return result, [line for line in lines if line.startswith("{")]

    def test_the_fastest_fused_kernel_until_decoding_first_wins(self):
        rows = [row("forward", "64x32", m, name, us) for m, times in {
            1: {"simt": 3, "mma": 5, "scratch": 9}, 4: {"simt": 4, "mma": 5, "scratch": 9},
            16: {"mma": 5, "scratch": 9}, 64: {"mma": 8.9, "scratch": 9}}.items()
            for name, us in times.items()]
        result, lines = self.tune(rows)
        self.assertEqual(result.returncode, 0, result.stderr)
        self.assertEqual(lines, [f'{{"{GPU}", Op::transpose, 64, 32, {m}, {kernel}}},'
                                 for m, kernel in ((4, "Nf4Kernel::simt"), (16, "Nf4Kernel::mma"),
                                                   (64, "std::nullopt"))])

    def test_each_matrix_by_itself(self):
        times = {"64x32": {"simt": 3, "mma": 4}, "32x64": {"simt": 11, "mma": 6}}
        rows = [row("dx", shape, 1, name, us) for shape, kernels in times.items()
                for name, us in (kernels | {"scratch": 9}).items()]
        _, lines = self.tune(rows)
        self.assertEqual(lines, [f'{{"{GPU}", Op::none, 32, 64, 1, Nf4Kernel::mma}},',
                                 f'{{"{GPU}", Op::none, 64, 32, 1, Nf4Kernel::simt}},'])

    def test_a_gain_within_the_noise_is_none(self):
        for us, noise, kernel in ((9.7, 0.1, "Nf4Kernel::mma"), (9.8, 0.1, "std::nullopt"),
                                  (9.0, 4, "Nf4Kernel::mma"), (9.0, 6, "std::nullopt")):
            _, lines = self.tune([row("dx", "8x8", 1, "mma", us, noise),
                                  row("dx", "8x8", 1, "scratch", 10, noise)])
            self.assertEqual(lines, [f'{{"{GPU}", Op::none, 8, 8, 1, {kernel}}},'], us)

    def test_times_of_two_calls_are_not_compared(self):
        for first, second, kernel in ((5, None, "Nf4Kernel::mma"), (5, 6, "std::nullopt"),
                                      (7, None, "std::nullopt")):
            rows = [row("dx", "8x8", 1, "mma", first, call=0),
                    row("dx", "8x8", 1, "scratch", 6, call=0),
                    row("dx", "8x8", 1, "mma", 2 if second is None else 6, call=1)]
            rows += [row("dx", "8x8", 1, "scratch", second, call=1)] if second else []
            _, lines = self.tune(rows, (GPU, GPU))
            self.assertEqual(lines, [f'{{"{GPU}", Op::none, 8, 8, 1, {kernel}}},'])

    def test_a_case_that_is_the_peers_alone_decides_nothing(self):
        ours = [row("dx", "8x8", 1, name, us) for name, us in (("mma", 1), ("scratch", 2))]
        peers = [row("dx", shape, m, "bitsandbytes", 3, call=1)
                 for shape, m in (("8x8", 1), ("8x8", 4), ("32x8", 1))]
        _, lines = self.tune(ours, (GPU, GPU), peers=peers)
        self.assertEqual(lines, [f'{{"{GPU}", Op::none, 8, 8, 1, Nf4Kernel::mma}},'])

    def test_other_gpus_keep_their_lines(self):
        other = '{"Another", Op::none, 5, 1, 1, Nf4Kernel::simt},'
        self.table.write_text(other + "\n" + f'{{"{GPU}", Op::none, 5, 1, 1, Nf4Kernel::mma}},\n')
        _, lines = self.tune([row("dx", "64x32", 1, "scratch", 9)])
        self.assertEqual(lines, [other, f'{{"{GPU}", Op::none, 64, 32, 1, std::nullopt}},'])

    def test_a_file_of_several_gpus(self):
        rows = [row("dx", "8x8", 1, "mma", 1, call=call) for call in (0, 1)]
        rows += [row("dx", "8x8", 1, "scratch", us, call=call) for call, us in ((0, 2), (1, 1))]
        result, lines = self.tune(rows, (GPU, "Another"))
        self.assertNotEqual(result.returncode, 0)
        self.assertIn(f"mix GPUs: Another, {GPU}; choose one with --gpu 'Another'", result.stderr)
        self.assertEqual(lines, [])
        for gpu, kernel in ((GPU, "Nf4Kernel::mma"), ("Another", "std::nullopt")):
            self.table.unlink(missing_ok=True)
            result, lines = self.tune(rows, (GPU, "Another"), ["--gpu", gpu])
            self.assertEqual(lines, [f'{{"{gpu}", Op::none, 8, 8, 1, {kernel}}},'], result.stderr)
        self.table.unlink()
        _, lines = self.tune(rows, (GPU, "Another"), here="Another")
        self.assertEqual(lines, ['{"Another", Op::none, 8, 8, 1, std::nullopt},'])
        result, _ = self.tune(rows, (GPU, "Another"), here="A third")
        self.assertIn("has no linear layers of A third", result.stderr)

    def test_what_is_not_there_is_said(self):
        for rows, options in (([], ()), ([row("dx", "8x8", 1, "mma", 1)], ("--gpu", "Another"))):
            result, lines = self.tune(rows, options=options)
            self.assertNotEqual(result.returncode, 0)
            self.assertIn("has no linear layers", result.stderr)
            self.assertEqual(lines, [])

    def test_nothing_to_choose_by_leaves_the_table(self):
        before = f'{{"{GPU}", Op::none, 5, 1, 1, Nf4Kernel::mma}},'
        self.table.write_text(before + "\n")
        result, lines = self.tune([row("dx", "8x8", 1, "mma", 1)])
        self.assertNotEqual(result.returncode, 0)
        self.assertIn(f"no case of {GPU} with `scratch`", result.stderr)
        self.assertEqual(lines, [before])

    def test_no_kernel_without_its_test_of_bits(self):
        tests = pathlib.Path(self.folder.name) / "tests"
        rows = [row("dx", "8x8", 1, name, us) for name, us in (("mma", 1), ("scratch", 2))]
        for passed, status, admitted in ((2, 0, True), (2, 1, False), (0, 0, False)):
            self.table.unlink(missing_ok=True)
            tests.write_text(f"#!/bin/sh\nprintf '%s\\n' \"$*\" >'{tests}.arguments'\n"
                             f"echo '[  PASSED  ] {passed} tests.'\nexit {status}\n")
            tests.chmod(0o755)
            result, lines = self.tune(rows, options=("--tests", str(tests)))
            self.assertEqual((result.returncode == 0, len(lines)), (admitted, int(admitted)))
            asked = pathlib.Path(f"{tests}.arguments").read_text()
            self.assertIn("RowsAreIndependentOfTheirNumber", asked)
            self.assertIn("WarpgroupTilesAgree", asked)

    def test_the_proposal_that_beats_the_librarys_choice(self):
        rows = [{"name": f"product/{direction}/64x32/m{m}/proposal{i}", "us": 5, "call": 0,
                 "over_beside_noise_percent": noise, "over_beside": over, "beside_us": 1 / over,
                 "tile": 20 + i, "cluster": 3, "option": i}
                for direction, m, i, over, noise in (
                    ("forward", 4096, 1, 0.97, 0.1), ("forward", 4096, 2, 0.95, 0.1),
                    ("forward", 4096, 3, 1.2, 0.1), ("forward", 8192, 1, 0.99, 0.1),
                    ("dx", 4096, 1, 0.97, 4), ("dx", 8192, 1, 0.97, 0.1))]
        # Not timed in turns.
        rows.append({"name": "product/dx/64x32/m2048/proposal1", "us": 5, "call": 0})
        other = '{"Another", Op::none, 5, 1, 1, {1, 2, 3}},'
        self.table.write_text(other + "\n")
        result, lines = self.tune(rows, options=("--part", "product"))
        self.assertEqual(result.returncode, 0, result.stderr)
        self.assertEqual(lines, [other, f'{{"{GPU}", Op::transpose, 64, 32, 4096, {{22, 3, 2}}}},',
                                 f'{{"{GPU}", Op::none, 64, 32, 8192, {{21, 3, 1}}}},'])
        result, _ = self.tune([row("dx", "8x8", 1, "scratch", 1)], options=("--part", "product"))
        self.assertIn("has no products: measure them with `make gpu-bench PART=product`",
                      result.stderr)

    def test_ratios_in_turns_come_before_times(self):
        def paired(name, us, ratio):
            return row("forward", "64x32", 64, name, us) | {"over_beside": ratio,
                                                                 "beside_us": us / ratio}
        # By itself mma took less, beside the dense layer it takes more.
        _, lines = self.tune([paired("mma", 5, 1.3), paired("scratch", 9, 1.2)])
        self.assertEqual(lines, [f'{{"{GPU}", Op::transpose, 64, 32, 64, std::nullopt}},'])
        _, lines = self.tune([paired("mma", 5, 1.3), row("forward", "64x32", 64, "scratch", 9)])
        self.assertEqual(lines, [f'{{"{GPU}", Op::transpose, 64, 32, 64, Nf4Kernel::mma}},'])

    def test_a_broken_row_is_named_and_nothing_written(self):
        good = row("forward", "64x32", 1, "scratch", 9)
        for change, why in (({"us": float("nan")}, "us is no number: nan"),
                            ({"us": "9"}, "us is no number: '9'"),
                            ({"us": -9}, "us is not above 0: -9"),
                            ({"us": True}, "us is no number: True"),
                            ({"call": 1}, "call 1 is not one of the 1"),
                            ({"call": 0.0}, "call 0.0 is not one of the 1"),
                            ({"tile": "x"}, "tile is no number"),
                            ({"name": "linear/forward/axb/m1/scratch"}, "not PART/PASS/NxK"),
                            ({"name": "linear/forward/8x8/mX/scratch"}, "not PART/PASS/NxK")):
            result, _ = self.tune([good, row("forward", "64x32", 1, "simt", 3) | change])
            self.assertEqual(result.returncode, 1, change)
            self.assertRegex(result.stderr, r"^\S+linear.json is not what `make gpu-bench PART=")
            self.assertIn(why, result.stderr)
            self.assertEqual(result.stderr.count("\n"), 1)
            self.assertFalse(self.table.exists())
        result, _ = self.tune([good], gpus=('A "quoted" GPU',))
        self.assertIn("is no name of a GPU", result.stderr)

    def test_folders_and_other_files_for_files_are_said(self):
        rows = [row("forward", "64x32", 1, name, us) for name, us in (("simt", 3), ("scratch", 9))]
        folder = self.folder.name
        for options, why in ((("--tests", folder), "is no program"),
                             (("--tests", str(self.results)), "is no program"),
                             (("--table", folder + "/no/table.inc"), "the folder is not there"),
                             (("--results", folder), "cannot be read")):
            result, _ = self.tune(rows, options=options)
            self.assertEqual(result.returncode, 1)
            self.assertIn(why, result.stderr)
            self.assertNotIn("Traceback", result.stderr)

    def test_a_broken_file_is_said(self):
        for text in ('{"calls": [', "[]", "{}", '{"calls": [{}], "ours": [], "peers": []}'):
            self.results.write_text(text)
            result = subprocess.run([sys.executable, ROOT / "bench/tune.py", "--results",
                                     self.results, "--table", self.table],
                                    capture_output=True, text=True)
            self.assertEqual(result.returncode, 1)
            self.assertRegex(result.stderr,
                             r"^\S+linear.json is not what `make gpu-bench PART=linear`")
            self.assertFalse(self.table.exists())


if __name__ == "__main__":
    unittest.main()

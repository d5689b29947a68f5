"""Checks who includes whom (the arrows in HACKING.md). Prints each violation; exits 1 if any."""

import pathlib
import re
import sys

ALLOWED = {
    "core": {"core"},
    "autograd": {"core", "autograd"},
    "quant": {"core", "autograd", "quant"},
    "nn": {"core", "autograd", "quant", "nn", "data"},
    "optim": {"core", "autograd", "quant", "optim"},
    "data": {"core", "data"},
    "cuda": {"core", "autograd", "quant", "nn", "optim", "cuda"},
    "experiments": {"core", "autograd", "quant", "nn", "optim", "data", "experiments", "generated"},
    "bench": {"core", "autograd", "quant", "nn", "optim", "data", "bench", "generated"},
    "tests": {"core", "autograd", "quant", "nn", "optim", "data", "experiments", "tests",
              "generated"},
}
CUDA_HEADER = re.compile(r"(cuda|cublas|nccl|cub/|cooperative_groups|mma\.h)")
EIGEN_HEADER = re.compile(r"(unsupported/)?Eigen/")
INCLUDE = re.compile(r'^\s*#\s*include\s*([<"])([^">]+)[">]')
SOURCES = {".h", ".cpp", ".cu", ".cuh"}


def compared(file):
    """A kernel that somebody adds to the comparison of linear layers."""
    return file.parts[:2] == ("bench", "linear") and file.suffix == ".cu"


def violation(root, file, quote, name):
    """What is wrong with this include, or None."""
    folder = file.parts[0]
    if quote == "<":
        if CUDA_HEADER.match(name) and folder != "cuda" and not compared(file):
            return "CUDA headers belong in cuda/"
        if EIGEN_HEADER.match(name) and file.suffix != ".cpp":
            return "Eigen belongs in .cpp files"
        if name.startswith("yaml-cpp/") and folder not in ("experiments", "tests"):
            return "YAML is read in experiments/ only"
        return None
    target = name.split("/")[0]
    if target == "cuda" and compared(file):
        return None
    if target not in ALLOWED[folder]:
        return f"{folder} may include {', '.join(sorted(ALLOWED[folder]))}"
    if target != "generated" and not (root / name).is_file():
        return "no such file; paths start at the root of the project"
    return None


def main():
    root = pathlib.Path(__file__).resolve().parent.parent
    count = wrong = 0
    for folder in ALLOWED:
        for path in sorted((root / folder).rglob("*")):
            if path.suffix not in SOURCES:
                continue
            count += 1
            file = path.relative_to(root)
            for number, line in enumerate(path.read_text().splitlines(), 1):
                match = INCLUDE.match(line)
                reason = match and violation(root, file, match[1], match[2])
                if reason:
                    wrong += 1
                    print(f"{file}:{number}: includes {match[2]}: {reason}")
    print(f"include rules: {count} files, {wrong} violations")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

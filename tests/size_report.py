"""Prints files and lines of code per folder. Exits 1 when a file is longer than the limit."""

import pathlib
import sys

LIMIT = 700  # lines; aim for 300
FOLDERS = ["core", "autograd", "quant", "nn", "optim", "data", "cuda", "experiments", "bench",
           "tests", "tools"]
SOURCES = {".h", ".cpp", ".cu", ".cuh", ".py", ".sh", ".cmake"}


def main():
    root = pathlib.Path(__file__).resolve().parent.parent
    sizes = {}
    for folder in FOLDERS:
        sizes[folder] = {path.relative_to(root): len(path.read_text().splitlines())
                         for path in (root / folder).rglob("*") if path.suffix in SOURCES}
    print(f"{'folder':<12} {'files':>5} {'lines':>6}  longest")
    for folder, files in sizes.items():
        longest = max(files, key=files.get, default=None)
        note = f"{longest} ({files[longest]})" if longest else "-"
        print(f"{folder:<12} {len(files):>5} {sum(files.values()):>6}  {note}")
    everything = {path: lines for files in sizes.values() for path, lines in files.items()}
    print(f"{'all':<12} {len(everything):>5} {sum(everything.values()):>6}")
    too_long = {path: lines for path, lines in everything.items() if lines > LIMIT}
    for path, lines in too_long.items():
        print(f"{path}: {lines} lines, more than {LIMIT}: split it")
    return 1 if too_long else 0


if __name__ == "__main__":
    sys.exit(main())

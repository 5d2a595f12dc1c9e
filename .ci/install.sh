#!/usr/bin/env bash
# Install what is missing to run, test and check ebproxy: Debian packages, and a virtual environment in .venv.
set -euo pipefail
cd "$(dirname "$0")/.."

# python3-bpfcc is the BCC binding (PyPI's `bcc` is another package); the rest is for demo, tests and benchmarks.
packages=(python3 python3-venv python3-bpfcc iproute2 nftables iptables curl gcc libc6-dev openssl util-linux)

missing=()
for package in "${packages[@]}"; do
	dpkg-query -W -f '${Status}' "$package" 2>/dev/null | grep -q 'ok installed' || missing+=("$package")
done
if ((${#missing[@]})); then
	sudo=()
	[ "$(id -u)" = 0 ] || sudo=(sudo)
	echo "installing: ${missing[*]}"
	"${sudo[@]}" apt-get update -qq
	"${sudo[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}"
fi

# The system's own Python, because the system's own packages carry bcc.
[ -x .venv/bin/python ] || /usr/bin/python3 -m venv --system-site-packages .venv
.venv/bin/python -m pip install --quiet --disable-pip-version-check --requirement requirements.lock
.venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
.venv/bin/ebproxy --version

#!/usr/bin/env bash
# Resolve pyproject.toml, with its dev extra, into requirements.lock: every package at one version.
set -euo pipefail
cd "$(dirname "$0")/.."
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

# Without the system's packages, so that nothing the lock needs is left out because this machine has it.
/usr/bin/python3 -m venv "$scratch/venv"
"$scratch/venv/bin/pip" install --quiet --disable-pip-version-check --upgrade '.[dev]' 'setuptools>=68' wheel
{
	echo "# Made by \`make lock\` from pyproject.toml; edit that instead."
	"$scratch/venv/bin/pip" freeze --all --exclude ebproxy --exclude pip
} >requirements.lock

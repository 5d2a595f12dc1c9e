#!/usr/bin/env bash
# Build the container image with whatever builder works on this machine.
set -euo pipefail
cd "$(dirname "$0")/.."
tag=${IMAGE:-ebproxy:$(sed -n 's/^__version__ = "\(.*\)"/\1/p' agent/__init__.py)}
for builder in docker podman buildah; do
	# docker may be installed while no daemon answers; `info` asks it.
	if command -v "$builder" >/dev/null && "$builder" info >/dev/null 2>&1; then
		exec "$builder" build --tag "$tag" "$@" .
	fi
done
echo "none of docker, podman and buildah is installed and works; on Debian: apt-get install buildah" >&2
exit 1

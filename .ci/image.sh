#!/usr/bin/env bash
# Build the container image with whatever builder this machine has.
set -euo pipefail
cd "$(dirname "$0")/.."
tag=${IMAGE:-ebproxy:$(sed -n 's/^__version__ = "\(.*\)"/\1/p' agent/__init__.py)}
for builder in docker podman buildah; do
	if command -v "$builder" >/dev/null; then
		exec "$builder" build --tag "$tag" "$@" .
	fi
done
echo "none of docker, podman and buildah is installed; on Debian: apt-get install buildah" >&2
exit 1

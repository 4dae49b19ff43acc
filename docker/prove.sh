#!/bin/sh
# Proves the image where no container engine runs: the Dockerfile's own lines, carried out in a root that debootstrap made,
# then the server as uid 10001, without capabilities, on a read-only root, one completion, SIGTERM. Needs root's rights.
#   docker/prove.sh [--target cpu] [--build-arg NAME=VALUE ...]
set -eu
cd "$(dirname "$0")/.."
exec "${PYTHON:-python3.11}" -m tests.deploy.prove "$@"

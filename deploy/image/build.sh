#!/usr/bin/env bash
# Builds the images rerankd:cpu and rerankd:full and tests them (deploy/tests/image.py).
#
#   deploy/image/build.sh                      # with docker or podman, whichever runs here
#   BASES=stand-in deploy/image/build.sh       # no image registry: base images from Debian packages; as root, with debootstrap
#
#   ENGINE="podman --log-level debug"   engine, with its options
#   TARGETS="cpu"                       only this image
#   BUILD_OPTIONS="--build-arg ..."     more options for `build`
#   RUN_OPTIONS="..."                   more options for `run`
#   TEST=0                              build only
# ENGINE cannot be buildah: its `run` has no network and no volume, which the tests need.
set -euo pipefail
cd "$(dirname "$0")/../.."

if [ -z "${ENGINE:-}" ]; then
    if docker info > /dev/null 2>&1; then
        ENGINE=docker
    elif command -v podman > /dev/null; then
        ENGINE=podman
    else
        echo "neither a running docker nor podman was found; on Debian: apt-get install podman" >&2
        exit 1
    fi
fi
RUN_OPTIONS=${RUN_OPTIONS:-}
BUILD_OPTIONS=${BUILD_OPTIONS:-}
if [ "${ENGINE%% *}" = podman ]; then
    # The default format of podman has no health check.
    BUILD_OPTIONS="--format docker $BUILD_OPTIONS"
    if [ ! -d /run/systemd/system ]; then
        # In a container or a chroot there is no systemd that could manage cgroups, and podman's default limits on files and
        # processes are higher than this process may set.
        [ "$ENGINE" != podman ] || ENGINE="podman --cgroup-manager cgroupfs --runtime runc"
        BUILD_OPTIONS="--isolation chroot --network host $BUILD_OPTIONS"
        RUN_OPTIONS="--network host --ulimit nofile=4096:4096 --ulimit nproc=4096:4096 $RUN_OPTIONS"
    fi
fi
export ENGINE RUN_OPTIONS

if [ "${BASES:-registry}" = stand-in ]; then
    deploy/image/stand-in-bases.sh
    BUILD_OPTIONS="--pull=never $BUILD_OPTIONS"
fi

images=()
for target in ${TARGETS:-cpu full}; do
    echo "== build $target"
    # Words are split on purpose: both variables hold options.
    # shellcheck disable=SC2086
    $ENGINE build $BUILD_OPTIONS --target "$target" --tag "rerankd:$target" .
    images+=("$target=rerankd:$target")
done
[ "${TEST:-1}" = 0 ] || deploy/tests/image.py "${images[@]}"

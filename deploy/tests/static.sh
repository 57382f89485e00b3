#!/usr/bin/env bash
# Checks the Dockerfile, the Kubernetes manifests, the Compose file, the systemd unit and the workflows, without running them.
#
#   deploy/tests/static.sh
#
# Needs Python 3.11 or later and its package registry; kustomize or kubectl; npm; systemd-analyze. $RERANKD_BIN is the program
# (default: target/release/rerankd). Prints SKIPPED for what is missing.
set -euo pipefail
cd "$(dirname "$0")/../.."
requirements=deploy/tests/static-requirements.txt
work=target/tmp/deploy
bin=$work/venv/bin

if ! cmp -s "$requirements" "$work/installed.txt"; then
    python3 -m venv "$work/venv"
    if ! "$bin/pip" install --quiet --requirement "$requirements" 2> "$work/pip.log"; then
        cat "$work/pip.log" >&2
        # Only an unreachable registry is a reason to skip; a wrong requirement is a failure.
        grep -qE 'NewConnectionError|ConnectTimeout|ReadTimeout|Max retries|name resolution|ProxyError|unreachable' "$work/pip.log" || exit 1
        echo "SKIPPED: the Python package registry did not answer"
        exit 0
    fi
    cp "$requirements" "$work/installed.txt"
fi

"$bin/python" deploy/tests/kubernetes.py
"$bin/python" deploy/tests/services.py
# DL3008 wants the version of each Debian package. The base image's digest is the pin of a release.
"$bin/hadolint" --ignore DL3008 Dockerfile
"$bin/yamllint" --strict --config-file deploy/tests/yamllint.yaml deploy .github
"$bin/actionlint"
"$bin/zizmor" --offline --quiet .github/workflows

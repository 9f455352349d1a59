#!/usr/bin/env bash
# Resolve pyproject.toml anew into requirements/{run,dev}.lock: every version and hash pinned, no index named.
# Needs uv (`.venv/bin/pip install uv`). `make lock` runs it; arguments go to uv (e.g. --upgrade).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
uv=$(command -v .venv/bin/uv uv | head -n 1) || {
    echo "lock: uv is not here; run: .venv/bin/pip install uv" >&2
    exit 1
}
compile() {
    "$uv" pip compile --quiet --universal --python-version 3.11 --generate-hashes \
        --no-header --no-emit-index-url --no-emit-find-links "$@"
}
compile pyproject.toml requirements/build.in --output-file requirements/run.lock "$@"
compile pyproject.toml requirements/build.in --group dev --constraint requirements/run.lock \
    --output-file requirements/dev.lock "$@"

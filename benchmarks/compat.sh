#!/usr/bin/env bash
# Runs tests with the oldest and the newest torch, torchvision and timm, each in an environment of its own.
#
#     benchmarks/compat.sh [oldest|newest] [arguments for pytest]
#
# Without a name, both; without arguments, all tests but the slow ones. An environment takes 6 GB of disk and is deleted after its
# tests. The floors in pyproject.toml are the oldest versions here, which passed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export OMP_NUM_THREADS=1

OLDEST=(torch==2.9.0 torchvision==0.24.0 timm==1.0.31)
NEWEST=(torch torchvision timm)

run() {
    local name=$1 environment=build/compat/$1
    shift
    local -n versions=${name^^}
    python3 -m venv --clear "$environment"
    trap 'rm -rf "$environment"' RETURN
    "$environment/bin/python" -m pip install --quiet --upgrade "${versions[@]}" -e '.[dev]'
    "$environment/bin/python" -m pip list --format freeze | grep -E '^(torch|torchvision|timm|numpy)=='
    "$environment/bin/python" -m pytest -n auto "$@"
}

names=(oldest newest)
if [[ ${1:-} == oldest || ${1:-} == newest ]]; then
    names=("$1")
    shift
fi
if [[ $# -eq 0 ]]; then
    set -- tests -m 'not slow'
fi
status=0
for name in "${names[@]}"; do
    run "$name" "$@" || status=1
done
exit $status

#!/usr/bin/env bash
# Runs tests with the oldest and the newest Python, torch, torchvision and timm, and with some between, each in an
# environment of its own; writes down in docs/versions.md what passed.
#
#     benchmarks/compat.sh [NAME...] [-- arguments for pytest]
#
# Without a name, all of the matrix below; without arguments, the tests of every run, and only then is written down what
# came of them. An environment takes 6 GB of disk and is deleted after its tests. The floors in pyproject.toml are the
# oldest versions here, which passed. Needs python3.10 to python3.13 on the PATH, as pyenv gives them with
# `pyenv shell 3.10 3.11 3.12 3.13`; of a machine with other work, PYTEST_XDIST_AUTO_NUM_WORKERS=1 takes one core.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export OMP_NUM_THREADS=1

# name: Python, torch, torchvision, timm, huggingface_hub, of which timm before 1.0.22 imports what later ones have not
MATRIX=(
    'oldest: 3.10 ==2.4.0 ==0.19.0 ==1.0.9 <1'
    'older: 3.11 ==2.6.0 ==0.21.0 ==1.0.15 <1'
    'newer: 3.12 ==2.9.1 ==0.24.1 ==1.0.20 <1'
    'newest: 3.13 >=2.14 >=0.29 >=1.0.31 >=1'
    'newest-3.10: 3.10 >=2.14 >=0.29 >=1.0.31 >=1'
)

run() {
    local name=$1 python=$2 torch=$3 torchvision=$4 timm=$5 hub=$6
    shift 6
    echo "== $name: Python $python"
    environment=build/compat/$name # the trap below asks for it
    "python$python" -m venv --clear "$environment" || return 1
    "$environment/bin/python" -m pip install --quiet --upgrade \
        "torch$torch" "torchvision$torchvision" "timm$timm" "huggingface_hub$hub" -e '.[dev]' || return 1
    local status=0
    "$environment/bin/python" -m pytest -n auto --junit-xml "$environment/results.xml" "$@" || status=1
    if [[ $# -eq 0 ]]; then
        "$environment/bin/python" benchmarks/versions.py "$environment/results.xml" || status=1
    fi
    return $status
}

environment=
remove() { [[ -z $environment ]] || rm -rf "$environment"; }
trap remove EXIT # stopped by hand, too

names=()
while [[ $# -gt 0 && $1 != -- ]]; do
    names+=("$1")
    shift
done
shift || true
for name in ${names[@]+"${names[@]}"}; do
    if ! printf '%s\n' "${MATRIX[@]%%:*}" | grep -qx -- "$name"; then
        echo "no $name in the matrix: ${MATRIX[*]%%:*}" >&2
        exit 2
    fi
done
status=0
for row in "${MATRIX[@]}"; do
    read -ra versions <<<"${row#*:}"
    name=${row%%:*}
    if [[ ${#names[@]} -eq 0 || " ${names[*]} " == *" $name "* ]]; then
        run "$name" "${versions[@]}" "$@" || status=1
        remove
    fi
done
exit $status

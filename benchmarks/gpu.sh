#!/usr/bin/env bash
# All that only a GPU can tell about crosstrace, in one command: 8 minutes at most on one H100 (80 GB) or H200.
#
#   benchmarks/gpu.sh                      measure; results in $OUT/gpu.json, or benchmarks/results/gpu.json
#   benchmarks/gpu.sh --part kernel cost   some parts of it (benchmarks/gpu.py names them)
#   benchmarks/gpu.sh --smoke              that all of it runs: tiny shapes on the CPU, two minutes at most
#   benchmarks/gpu.sh --pack [3.12]        where there is a network: download what a machine without one may lack into
#                                          benchmarks/wheels (git ignores it, so copy it along), for this Python
#
# It needs torch for CUDA, and transformers. What else crosstrace needs and is not installed is taken from
# benchmarks/wheels, if that is there, and put into build/site: nothing that is installed changes. PYTHON names another
# Python. No network is used, and no setting of the GPU is changed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
case "${1:-}" in
    -h | --help) sed -n '2,/^set/{/^set/!s/^# \{0,1\}//p;}' "${BASH_SOURCE[0]}"; exit ;;
    --pack) exec "$python" benchmarks/gpu_wheels.py pack "${@:2}" ;;
esac
rm -rf build/site
"$python" benchmarks/gpu_wheels.py install
export PYTHONPATH="$PWD/src:$PWD/build/site${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
exec timeout --kill-after=5 475 "$python" benchmarks/gpu.py "$@"

#!/bin/sh
# One call on a machine with a GPU and no network: installs, checks the kernels against the reference, times everything.
# Some eight minutes.
#
#   sh benchmarks/gpu.sh WHEELS CHECKPOINT DATA OUT
#
# from the root of a checkout. WHEELS: folder with vitprune's wheel and those that the machine lacks, pytest's among them
# (benchmarks/README.md). OUT/gpu.md has the tables for docs/results.md. MINUTES: for timing, 5; BENCH_OPTIONS: options of
# `vitprune bench`, which measures a step of fine-tuning at the end.
set -eu

python=${PYTHON:-python3}
wheels=$1 checkpoint=$2 data=$3 out=$4
options=${BENCH_OPTIONS:---dtype bfloat16 --macs 50% --batch-size 64 --training --training-batch-size 64}
export HF_HUB_OFFLINE=1

"$python" -m pip install --quiet --no-index --find-links "$wheels" --upgrade vitprune pytest
"$python" -c "import torch; print(torch.__version__, torch.cuda.get_device_name() if torch.cuda.is_available() else 'no GPU')"
# the kernels that CPUs don't have; what fails is worth knowing, and no reason to measure nothing
TRITON_INTERPRET=0 "$python" -m pytest -rfE tests/pruning/kernels/test_doors.py tests/pruning/kernels/test_cuda.py \
    tests/pruning/packed/test_attention.py tests/pruning/learning/test_mask_gradients.py tests/contract/test_devices.py ||
    echo "kernels failed their tests"
"$python" benchmarks/gpu.py "$checkpoint" "$data" --output "$out" --minutes "${MINUTES:-5}" || echo "timing broke off"
# shellcheck disable=SC2086
"$python" -m vitprune bench "$checkpoint" --data "$data" $options --output "$out/training"

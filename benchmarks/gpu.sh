#!/bin/sh
# One call on a machine with a GPU and no network: installs, checks the kernels against the CPU, times everything.
#
#   sh benchmarks/gpu.sh WHEELS CHECKPOINT DATA OUT
#
# from the root of a checkout. WHEELS: folder with vitprune's wheel and those that the machine lacks, pytest's among them
# (benchmarks/README.md). What is measured: BENCH_OPTIONS, options of `vitprune bench`.
set -eu

wheels=$1 checkpoint=$2 data=$3 out=$4
sizes="--batch-size 1 --batch-size 4 --batch-size 16 --batch-size 64 --batch-size 256"
options=${BENCH_OPTIONS:---dtype bfloat16 --dtype float32 --mode eager --mode compiled --training $sizes}
paper="--set pruning.score=head-weighted-class-attention --set pruning.before_blocks=[4,7,10] --set pruning.dropped=leave"
export HF_HUB_OFFLINE=1

python -m pip install --quiet --no-index --find-links "$wheels" --upgrade vitprune pytest
python -c "import torch; print(torch.__version__, torch.cuda.get_device_name() if torch.cuda.is_available() else 'no GPU')"
# with a GPU this runs the kernels that CPUs don't have
python -m pytest -rs tests/pruning/test_packed_attention.py tests/pruning/learning/test_mask_gradients.py
# shellcheck disable=SC2086
python -m vitprune bench "$checkpoint" --data "$data" $options --output "$out/default"
# shellcheck disable=SC2086
python -m vitprune bench "$checkpoint" --data "$data" $options $paper --output "$out/paper"

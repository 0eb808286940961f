#!/bin/sh
# StyleGAN2 with classes and without, alike but for that, on the embedded micrographs of three materials.
#   sh experiments/classes/stylegan.sh [OUT]
# A second start goes on where the first was stopped. stylegan.md beside this file says what came out.
set -eu
out=${1:-runs/classes-stylegan}
python=${PYTHON:-.venv/bin/python}
OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
export OMP_NUM_THREADS

common="--data synthetic-materials --training.num-images 28000 --training.checkpoint-every 14000 --training.sample-every 14000"
"$python" train_gan.py demo $common --out "$out/ramp" --conditional --training.class-ramp-images 6000 14000
"$python" train_gan.py demo $common --out "$out/unconditional"
"$python" evaluate.py --models ramp="$out/ramp" unconditional="$out/unconditional" --num-images 600 \
  --no-memorisation --no-microscopy --out "$out/report"
"$python" experiments/classes/grid.py "$out/ramp" "$out/ramp.png"

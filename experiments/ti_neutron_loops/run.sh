#!/bin/sh
# The latent diffusion model on 25 TEM micrographs of neutron-irradiated titanium, 128 x 128 tiles, on one CPU core.
#   sh experiments/ti_neutron_loops/run.sh FOLDER_OF_MICROGRAPHS [OUT]
# A second start goes on where the first was stopped. README.md beside this file says where the micrographs are from.
set -eu
data=${1:?give the folder of micrographs}
out=${2:-runs/ti_neutron_loops}
python=${PYTHON:-.venv/bin/python}
OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
export OMP_NUM_THREADS

"$python" train_ldm.py demo --data "$data" --out "$out/ldm" \
  --tiles.resolution 128 --tiles.downsample 3 --tiles.held-out-fraction 0.2 \
  --autoencoder.family kl --autoencoder.block-out-channels 16 48 64 --autoencoder.latent-channels 8 \
  --autoencoder.num-images 6400 --autoencoder.validate-every 1600 --autoencoder.sample-every 1600 --autoencoder.checkpoint-every 800 \
  --denoiser.base-channels 32 --denoiser.channel-multipliers 1 2 4 --denoiser.attention-levels 2 --denoiser.learning-rate 1.5e-3 \
  --denoiser.num-images 88000 --denoiser.checkpoint-every 4000 --denoiser.sample-every 22000 --denoiser.validate-every 8000 \
  --sampler dpm-solver++-sde --num-inference-steps 20
"$python" evaluate.py --models "$out/ldm" --num-images 750 --out "$out"

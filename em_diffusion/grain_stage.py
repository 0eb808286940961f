"""The stage of a run that measures the grain that the autoencoder removes."""

import json

from em_data.files import write_atomically
from em_diffusion.em_grain import EMGrain
from em_diffusion.grain import fit_grain
from em_diffusion.validation import read_spaced_images, reconstruct
from em_training import fail_together
from em_training.noise import MAX_PIXELS
from em_training.weights import hash_weights, save_model


def run_grain_stage(config, data, vqvae, accelerator, out):
    """Measure the grain that the autoencoder removes from training views, or load it.

    Returns an `EMGrain`, or None with `grain_images` 0.
    """
    if not config.grain_images:
        return None
    with fail_together(accelerator):
        if accelerator.is_main_process:
            measure_grain(config, data, vqvae, accelerator, out / "grain")
    return EMGrain.from_pretrained(out / "grain").to(accelerator.device)


def measure_grain(config, data, vqvae, accelerator, path):
    """Measure the grain and save it, unless it was measured for this autoencoder."""
    record = path / "measured.json"
    made_for = {"num_images": config.grain_images, "autoencoder": hash_weights(vqvae)}
    if record.exists() and record.read_text() == json.dumps(made_for) + "\n":
        return
    num_images = min(config.grain_images, max(1, MAX_PIXELS // config.tiles.resolution**2))
    images = read_spaced_images(data.train, num_images)
    grain = fit_grain(images, reconstruct(vqvae, images, accelerator))
    accelerator.print(
        f"grain: the autoencoder removes noise of {100 * grain.deviations.mean() / 2:.1f} % of "
        f"the range of grey levels from {len(images):,} training views; generated images get "
        "new noise like it"
    )
    save_model(grain, path)
    write_atomically(record, json.dumps(made_for) + "\n")

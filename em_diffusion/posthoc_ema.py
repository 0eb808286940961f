"""Average the denoiser over another width after the training; also a command."""

import argparse
import json
import sys
from pathlib import Path

import torch

from em_data.files import write_atomically
from em_diffusion.autoencoder import encode
from em_diffusion.config import LDMConfig
from em_diffusion.denoiser import create_denoiser, load_denoiser
from em_diffusion.em_grain import EMGrain
from em_diffusion.load_autoencoder import load_autoencoder
from em_diffusion.masks import create_pipeline, load_layout_sampler
from em_diffusion.pipeline_em_ldm import EMLatentDiffusionPipeline
from em_diffusion.train import choose_sampler
from em_training import load_config
from em_training.cli import run_command
from em_training.config import read_json_object
from em_training.posthoc_ema import reconstruct_average
from em_training.weights import save_model

DESCRIPTION = """Average the denoiser's weights over another width after the training.

The run must have kept snapshots (train_ldm.py ... --denoiser.posthoc-ema-every IMAGES). DIR becomes
a run with the averaged denoiser, for generate.py and evaluate.py. The autoencoder is RUN's."""


def make_posthoc_pipeline(run, sigma_rel: float, out, num_images_seen: int | None = None) -> float:
    """Save the pipeline of `run`, with its denoiser averaged over `sigma_rel`, in `out`/pipeline.

    `out`/posthoc_ema.json says how it was made. If the run is finished, `out`/run.json is the run's
    own with that added.

    Args:
        num_images_seen: The moment of a snapshot. Default: the last one.

    Returns:
        The relative error of the averaging profile.

    Raises:
        ValueError: If the run has no autoencoder or not these snapshots.
    """
    run, out = Path(run), Path(out)
    if not (run / "config.json").exists():
        raise ValueError(f"{run} holds no training of train_ldm.py (no config.json)")
    if out.resolve() == run.resolve():
        raise ValueError(
            f"--out is the run itself, {run}, whose pipeline would be lost; choose another folder"
        )
    weights, error, num_images_seen = reconstruct_average(
        run / "denoiser" / "posthoc_ema", sigma_rel, num_images_seen
    )
    config = load_config(LDMConfig, run / "config.json")
    vqvae = load_autoencoder(run / "autoencoder" / "vqvae").eval()
    resolution = config.tiles.resolution
    with torch.no_grad():
        num_channels, side = encode(vqvae, torch.zeros(1, 1, resolution, resolution)).shape[1:3]
    trained = run / "denoiser" / "unet"
    if (trained / "config.json").is_file():  # it may have the architecture of another model
        unet = load_denoiser(trained).eval()
    elif config.denoiser.init_from is None:
        num_classes = max(0, len(weights.get("class_embedding.weight", ())) - 1)
        unet = create_denoiser(config.denoiser, side, num_channels, num_classes).eval()
    else:
        raise ValueError(f"{run} is not finished. Finish it first, with the same command.")
    unet.load_state_dict(unet.state_dict() | weights)
    result = json.loads((run / "run.json").read_text()) if (run / "run.json").exists() else None
    pixel_size_nm = result["data"].get("pixel_size_nm") if result else None
    save_model(make_pipeline(run, config, vqvae, unet, pixel_size_nm), out / "pipeline")
    made = {
        "run": str(run),
        "sigma_rel": sigma_rel,
        "num_images_seen": num_images_seen,
        "relative_error_of_profile": error,
    }
    write_atomically(out / "posthoc_ema.json", json.dumps(made, indent=2) + "\n")
    if result:
        result |= {"name": out.name, "num_images_seen": num_images_seen, "posthoc_ema": made}
        write_atomically(out / "run.json", json.dumps(result, indent=2) + "\n")
    return error


def make_pipeline(run, config, vqvae, unet, pixel_size_nm) -> EMLatentDiffusionPipeline:
    """Return the pipeline of a run with another U-Net."""
    scheduler, num_steps = choose_sampler(config)
    # runs made before version 0.1 have no grain
    has_grain = config.grain_images and (run / "grain" / "config.json").exists()
    grain = EMGrain.from_pretrained(run / "grain") if has_grain else None
    names = None
    if config.conditional:
        names = dict(enumerate(read_json_object(run / "data.json")["classes"]))
    return create_pipeline(
        vqvae,
        unet,
        scheduler,
        load_layout_sampler(run),
        pixel_size_nm,
        num_steps,
        grain,
        id2label=names,
    )


def main():
    parser = argparse.ArgumentParser(
        prog="python -m em_diffusion.posthoc_ema",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", metavar="RUN", help="the run's folder, finished or not")
    parser.add_argument(
        "--sigma-rel",
        type=float,
        required=True,
        help="width relative to the images seen, such as 0.05",
    )
    parser.add_argument(
        "--num-images",
        type=int,
        help="average up to the snapshot at this many images; the last one",
    )
    parser.add_argument("--out", metavar="DIR", required=True, help="folder for the new run")
    arguments = parser.parse_args()
    error = make_posthoc_pipeline(
        arguments.run, arguments.sigma_rel, arguments.out, arguments.num_images
    )
    print(
        f"{arguments.out}/pipeline averages over sigma_rel {arguments.sigma_rel}; the snapshots "
        f"meet its profile within {error:.2%}",
        file=sys.stderr,
    )


if __name__ == "__main__":
    run_command(main)

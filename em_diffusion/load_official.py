"""Convert an original autoencoder or latent diffusion model to a folder that diffusers loads.

    python -m em_diffusion.load_official CHECKPOINT OUT_DIR [--config MODEL.yaml]

From Python, use `em_diffusion.original.load.load_official`.
"""

import argparse
from pathlib import Path

from em_diffusion.load_autoencoder import load_autoencoder
from em_diffusion.original.load import load_official
from em_training.cli import run_command


def main():
    parser = argparse.ArgumentParser(
        prog="python -m em_diffusion.load_official",
        description="Convert an original autoencoder or latent diffusion model to safetensors.",
    )
    parser.add_argument(
        "checkpoint", help="a .ckpt file, or a folder with DALL-E's encoder.pkl and decoder.pkl"
    )
    parser.add_argument(
        "out_dir", type=Path, help="folder for the model, or for the pipeline of a diffusion model"
    )
    parser.add_argument("--config", help="the .ckpt file's yaml. Default: the yaml beside it.")
    parser.add_argument(
        "--autoencoder",
        help="run, pipeline, checkpoint or Hub id with the autoencoder of a checkpoint that holds "
        "only a U-Net",
    )
    parser.add_argument(
        "--raw-weights",
        action="store_true",
        help="take the raw weights even if the checkpoint holds averaged (EMA) weights",
    )
    parser.add_argument(
        "--colour", action="store_true", help="keep three channels instead of folding them into one"
    )
    args = parser.parse_args()
    autoencoder = None if args.autoencoder is None else load_autoencoder(args.autoencoder)
    model = load_official(
        args.checkpoint,
        args.config,
        use_ema=False if args.raw_weights else None,
        grey=not args.colour,
        autoencoder=autoencoder,
        say=print,
    )
    model.save_pretrained(args.out_dir)
    print(f"{type(model).__name__} -> {args.out_dir}")


if __name__ == "__main__":
    run_command(main)

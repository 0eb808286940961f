"""The study's comparison of autoencoders (its Table 1) and their reconstructions (its Figure 5).

    python experiments/2024_gan_vs_ldm/autoencoders.py --scale small
    python experiments/2024_gan_vs_ldm/autoencoders.py --scale study \\
        --data damaged-alloys:FOLDER --extractor inception \\
        --candidates vqgan-f8-8192=CHECKPOINT vqgan-f16-1024=CHECKPOINT \\
        vqgan-f16-16384=CHECKPOINT dalle-dvae=FOLDER

Each autoencoder reconstructs 1,000 held-out tiles (em_diffusion.select_autoencoder).
results/autoencoders_SCALE.json has the Frechet distance between originals and reconstructions
beside the study's reconstruction FID, and PSNR, SSIM and codes in use.
results/autoencoders_SCALE.png is Figure 5. The study does not say what Figure 5 shows beside the
originals; here it is the same tiles through each autoencoder, and the absolute errors.

`--scale study` compares the pretrained autoencoders of `--candidates`, named as above, and the one
that the preset `paper` trains. `--scale small` trains all at 64 x 64 on the embedded micrographs:
VQ with a factor of 4, 8 and 16, two codebooks at f16, as in the study, and a KL autoencoder. They
are far smaller and are trained for minutes.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path

from recipe import SCALES, STUDY, Results, choose_tiles, create_parser
from small_presets import make_ldm

from em_data import load_data
from em_data.files import write_atomically
from em_diffusion.autoencoder_loop import train_autoencoder
from em_diffusion.select_autoencoder import SelectionConfig, name_candidates, select_autoencoder
from em_diffusion.train import read_result, write_result
from em_training import create_accelerator
from em_training.cli import run_command

STUDY_DISTANCES = {each["key"]: each["frechet_distance"] for each in STUDY["autoencoders"]}


@dataclass(frozen=True)
class Variant:
    """An autoencoder to train; `like` names the study's of the same shape."""

    name: str
    factor: int = 8
    num_codes: int = 2048
    kind: str = "vq"
    like: str | None = None


LDM_VARIANT = Variant("vq-f8-2048", like="vqgan-f8-8192")  # what the LDM experiments use
VARIANTS = {
    "study": (Variant("paper", num_codes=8192),),
    "small": (
        Variant("vq-f4-2048", factor=4),
        LDM_VARIANT,
        Variant("vq-f16-256", 16, 256, like="vqgan-f16-1024"),
        Variant("vq-f16-2048", 16, 2048, like="vqgan-f16-16384"),
        Variant("kl-f8", kind="kl"),
    ),
    "test": (Variant("vq-f4-64", 4, 64, like="vqgan-f8-8192"), Variant("kl-f4", 4, kind="kl")),
}
COLUMNS = {
    "like": ("like the study's", ""),
    "psnr_db": ("PSNR, dB", ".2f"),
    "ssim": ("SSIM", ".3f"),
    "codes": ("codes used", ""),
    "num_images_seen": ("images trained on", ",d"),
    "train_seconds": ("training, s", ".0f"),
}


def make_config(variant: Variant, arguments):
    """The run of a variant: the scale's preset with the variant's levels and codes."""
    config = make_ldm(SCALES[arguments.scale].ldm.preset)
    num_levels = variant.factor.bit_length()
    channels = config.autoencoder.block_out_channels
    channels = (channels + channels[-1:] * num_levels)[:num_levels]
    num_images = SCALES[arguments.scale].ldm.autoencoder_images
    autoencoder = replace(
        config.autoencoder,
        kind=variant.kind,
        num_codes=variant.num_codes,
        block_out_channels=channels,
        num_images=config.autoencoder.num_images if num_images is None else num_images,
    )
    return replace(
        config,
        data=arguments.data,
        out=str(Path(arguments.runs) / f"autoencoders_{arguments.scale}" / variant.name),
        tiles=replace(config.tiles, **choose_tiles(config.tiles, arguments)),
        autoencoder=autoencoder,
    )


def train(variant: Variant, arguments) -> Path:
    """Train a variant unless it is trained; return the run's folder."""
    config = make_config(variant, arguments)
    out = Path(config.out)
    if read_result(out / "autoencoder", config.autoencoder.num_images) is None:
        accelerator = create_accelerator(out, config.precision)
        data = load_data(config.data, config.tiles, log=accelerator.print)
        _, seconds = train_autoencoder(
            config.autoencoder, data.train, data.held_out, accelerator=accelerator, out_dir=out
        )
        write_result(out / "autoencoder", config.autoencoder, seconds, accelerator)
    return out


def find_variant(arguments) -> str:
    """Return the autoencoder of the LDM experiments: `--autoencoder`'s, or the scale's f8."""
    if arguments.autoencoder is not None:
        return arguments.autoencoder
    variants = VARIANTS[arguments.scale]
    return str(train(LDM_VARIANT if LDM_VARIANT in variants else variants[0], arguments))


def describe(candidate, variant, source):
    """Return the settings, the study's distance and the measured values of a candidate.

    `variant` is None for a pretrained one.
    """
    name = candidate["name"]
    like = name if variant is None else variant.like
    settings = {"name": name, "kind": candidate["kind"], "factor": candidate["downsampling_factor"]}
    settings |= {"num_codes": candidate["num_codes"]}
    distance = candidate["frechet_distance"]
    measured = {
        "ours": distance["value"],
        "low": distance["low"],
        "high": distance["high"],
        "like": like,
    }
    measured |= {
        key: candidate[key]
        for key in ("psnr_db", "ssim", "spectrum_error_db", "codes_used", "num_parameters")
    }
    measured |= {"latent_shape": candidate["latent_shape"]}
    if candidate["num_codes"] is not None:
        measured["codes"] = f"{candidate['codes_used']:,} of {candidate['num_codes']:,}"
    if variant is not None:
        result = json.loads((Path(source) / "autoencoder" / "result.json").read_text())
        measured |= {key: result[key] for key in ("num_images_seen", "train_seconds")}
    return settings, STUDY_DISTANCES.get(like), measured


def run_experiment(arguments) -> Path:
    """Train what is missing, compare all on the same tiles, write the results; return the JSON."""
    results = Results(arguments, "autoencoders", "Table 1: autoencoders", COLUMNS, ("ldm",))
    variants = {variant.name: variant for variant in VARIANTS[arguments.scale]}
    sources = {name: str(train(variant, arguments)) for name, variant in variants.items()}
    sources |= name_candidates(arguments.candidates) if arguments.candidates else {}
    config = make_ldm(SCALES[arguments.scale].ldm.preset)
    selection = select_autoencoder(
        SelectionConfig(
            candidates=tuple(f"{name}={source}" for name, source in sources.items()),
            data=arguments.data,
            out=str(Path(arguments.runs) / f"autoencoders_{arguments.scale}"),
            num_images=SCALES[arguments.scale].ldm.num_reconstructions,
            tiles=replace(config.tiles, **choose_tiles(config.tiles, arguments)),
            extractor=arguments.extractor,
            floor=False,
        )
    )
    results.points = []  # all are judged together
    for candidate in selection["candidates"]:
        variant = variants.get(candidate["name"])
        settings, study, measured = describe(candidate, variant, sources[candidate["name"]])
        results.add(
            settings, study, measured | {"num_images_compared": selection["protocol"]["num_images"]}
        )
    results.notes = [
        f"{each['name']} was not judged: {each['error']}" for each in selection["failed"]
    ]
    results.write()
    picture = Path(arguments.runs) / f"autoencoders_{arguments.scale}" / "selection.png"
    write_atomically(results.path.with_suffix(".png"), picture.read_bytes())
    print(results.format_table())
    return results.path


def parse_arguments(argv=None):
    parser = create_parser(__doc__)
    parser.add_argument(
        "--candidates",
        nargs="*",
        default=(),
        metavar="NAME=SOURCE",
        help="pretrained autoencoders to judge as well",
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_command(lambda: print(run_experiment(parse_arguments())))

"""Pictures of what a generator has learned: a walk through w, styles of two images mixed, truncation.

    python -m em_stylegan.interpolate walk RUN walk.gif           (.gif, .png for APNG, .mp4 with an encoder)
    python -m em_stylegan.interpolate mixing RUN mixing.png --layers 0 4
    python -m em_stylegan.interpolate truncation RUN truncation.png

RUN is a run's folder or one that holds a saved pipeline.
"""

import argparse
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm

from em_data import save_image_grid, to_uint8
from em_stylegan.pipeline_em_stylegan import EMStyleGANPipeline
from em_training import make_generator
from em_training.cli import run_command
from em_training.walk import walk

VIDEO_FORMATS = (".gif", ".png", ".mp4")


def load_generator(model):
    """The generator, in evaluation mode, of a run's folder or of a folder that holds a saved pipeline."""
    for folder in (Path(model), Path(model) / "pipeline"):
        if (folder / "model_index.json").is_file():
            return EMStyleGANPipeline.from_pretrained(folder).generator.eval().requires_grad_(False)
    raise ValueError(
        f"{model} holds no finished StyleGAN (no model_index.json): give the folder of a run that has ended"
    )


@torch.no_grad()
def draw_ws(generator, seed, count, truncation_psi=1.0, class_label=None):
    """ws [count, num_ws, w_dim] of z that `seed` decides, all of one class where the generator knows classes."""
    z = torch.randn(
        count, generator.config.z_dim, generator=make_generator(seed, stream="interpolation")
    )
    return generator.mapping(z, class_label, truncation_psi)


@torch.no_grad()
def render(generator, ws, batch_size=16, description="images"):
    """Images [N, 1, R, R] on the CPU of ws [N, num_ws, w_dim], with the stored noise."""
    images = [
        generator.synthesis(part, "const")
        .mean(dim=1, keepdim=True)
        .cpu()  # of a colour network, its grey
        for part in tqdm(ws.split(batch_size), desc=description, unit="batch")
    ]
    return torch.cat(images)


def mix_styles(ws_rows, ws_columns, layers):
    """ws [rows, columns, num_ws, w_dim]: those of the row, but in `layers` (first, end) those of the column (2019, section 3.1)."""
    num_ws = ws_rows.shape[1]
    first, end = layers
    if not 0 <= first < end <= num_ws:
        raise ValueError(
            f"layers {first} to {end} are not among the generator's {num_ws}: give 0 <= FIRST < END <= {num_ws}"
        )
    mixed = ws_rows.unsqueeze(1).repeat(1, len(ws_columns), 1, 1)
    mixed[:, :, first:end] = ws_columns[None, :, first:end]
    return mixed


def save_video(images, path, frames_per_second):
    """Write images [N, 1, H, W] in [-1, 1] as an endless GIF or APNG, or as an MP4 (H.264), by the suffix of `path`, atomically.

    GIF and APNG keep every one of the 256 grey levels; a GIF's pace is the nearest that its hundredths of a second allow. An MP4 needs
    the program ffmpeg or the package imageio-ffmpeg.
    """
    path = Path(path)
    check_video_format(path)
    frames = to_uint8(images)[:, 0]  # [N, H, W]
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}-{os.getpid()}{path.suffix}")
    try:
        if path.suffix == ".mp4":
            _encode_mp4(frames, temporary, frames_per_second)
        else:
            first, *rest = [Image.fromarray(frame) for frame in frames]
            duration = round(1000 / frames_per_second)  # ms
            if path.suffix == ".gif":
                duration = find_gif_duration(frames_per_second)
            options = {"append_images": rest, "save_all": True, "duration": duration, "loop": 0}
            first.save(
                temporary, **options, **({"optimize": False} if path.suffix == ".gif" else {})
            )
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def check_video_format(path):
    """Raise `ValueError` when the suffix of `path` is none that a video can have, or its encoder is missing."""
    if Path(path).suffix not in VIDEO_FORMATS:
        raise ValueError(f"{path}: a video ends in {', '.join(VIDEO_FORMATS)}")
    if Path(path).suffix == ".mp4":
        find_encoder()


def find_gif_duration(frames_per_second):
    """Milliseconds of a GIF's frame: whole hundredths of a second, at least 2, below which viewers slow down to 10."""
    return 10 * max(2, round(100 / frames_per_second))


def find_encoder():
    """The path of ffmpeg: on the system, or that of the package imageio-ffmpeg; ValueError when there is none."""
    if shutil.which("ffmpeg"):
        return shutil.which("ffmpeg")
    try:
        import imageio_ffmpeg
    except ImportError as error:
        raise ValueError(
            "MP4 needs an encoder: pip install 'em-synthesis[video]', or install ffmpeg; .gif and .png (APNG) need neither"
        ) from error
    return imageio_ffmpeg.get_ffmpeg_exe()


def _encode_mp4(frames, path, frames_per_second):
    height, width = frames.shape[1:]
    raw = [
        "-f",
        "rawvideo",
        "-pix_fmt",
        "gray",
        "-s",
        f"{width}x{height}",
        "-r",
        str(frames_per_second),
        "-i",
        "-",
    ]
    coded = [
        "-c:v",
        "libx264",
        "-crf",
        "16",
        "-pix_fmt",
        "yuv420p",
        "-movflags",
        "+faststart",
        str(path),
    ]
    command = [find_encoder(), "-loglevel", "error", "-y", *raw, *coded]
    done = subprocess.run(
        command, input=np.ascontiguousarray(frames).tobytes(), capture_output=True, check=False
    )
    if done.returncode:
        raise ValueError(
            f"ffmpeg could not write the MP4: {done.stderr.decode(errors='replace').strip()[-300:]}"
        )


def make_walk(arguments):
    check_video_format(arguments.out)  # before the work
    generator = load_generator(arguments.model)
    keys = draw_ws(
        generator,
        arguments.seed,
        arguments.num_keys,
        arguments.truncation_psi,
        arguments.class_label,
    )
    images = render(generator, walk(keys, arguments.frames_per_key), description="frames")
    save_video(images, arguments.out, arguments.fps)


def make_mixing(arguments):
    check_grid_format(arguments.out)
    generator = load_generator(arguments.model)
    count = arguments.num_rows + arguments.num_columns
    ws = draw_ws(generator, arguments.seed, count, arguments.truncation_psi, arguments.class_label)
    rows, columns = ws[: arguments.num_rows], ws[arguments.num_rows :]
    mixed = mix_styles(rows, columns, arguments.layers or (0, generator.num_ws // 3))
    images = render(
        generator, torch.cat([columns, torch.cat([rows.unsqueeze(1), mixed], dim=1).flatten(0, 1)])
    )
    corner = torch.ones_like(images[:1])  # white: neither row nor column
    save_grid(torch.cat([corner, images]), arguments.out, num_columns=arguments.num_columns + 1)


def make_truncation(arguments):
    check_grid_format(arguments.out)
    generator = load_generator(arguments.model)
    ws = draw_ws(generator, arguments.seed, arguments.num_rows, class_label=arguments.class_label)
    w_mean = generator.mapping_network.w_mean
    ws = torch.stack(
        [w_mean.lerp(ws, psi) for psi in arguments.psi], dim=1
    )  # [rows, columns, num_ws, w_dim]
    save_grid(render(generator, ws.flatten(0, 1)), arguments.out, num_columns=len(arguments.psi))


def save_grid(images, path, num_columns):
    """`save_image_grid`, atomically, in a folder that is made."""
    path = Path(path)
    check_grid_format(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}-{os.getpid()}.png")
    try:
        save_image_grid(images, temporary, num_columns)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def check_grid_format(path):
    """Raise `ValueError` when `path` is no PNG."""
    if Path(path).suffix != ".png":
        raise ValueError(f"{path}: a grid of images ends in .png")


def parse_arguments(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="walk|mixing|truncation")

    def add(name, make, text):
        command = commands.add_parser(name, help=text)
        command.add_argument("model", help="a run's folder, or one that holds a saved pipeline")
        command.add_argument("out", help="the file to write")
        command.add_argument("--seed", type=int, default=0)
        command.add_argument("--class-label", type=int, help="of a generator that knows classes")
        command.set_defaults(make=make)
        return command

    one = add("walk", make_walk, "a closed walk through w as GIF, APNG or MP4")
    one.add_argument("--num-keys", type=int, default=6, help="images that the walk passes")
    one.add_argument("--frames-per-key", type=int, default=24)
    one.add_argument("--fps", type=int, default=24)
    two = add("mixing", make_mixing, "a grid: rows, with the styles of columns in some layers")
    two.add_argument("--num-rows", type=int, default=4)
    two.add_argument("--num-columns", type=int, default=5)
    two.add_argument(
        "--layers", type=int, nargs=2, metavar=("FIRST", "END"), help="default: the coarsest third"
    )
    for command in (one, two):
        command.add_argument("--truncation-psi", type=float, default=1.0)
    three = add("truncation", make_truncation, "a grid: images drawn towards the mean")
    three.add_argument("--num-rows", type=int, default=4)
    three.add_argument("--psi", type=float, nargs="+", default=[0.0, 0.25, 0.5, 0.75, 1.0])
    return parser.parse_args(argv)


def main():
    arguments = parse_arguments()
    for name in ("num_keys", "frames_per_key", "fps", "num_rows", "num_columns"):
        if getattr(arguments, name, 1) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1")
    arguments.make(arguments)
    print(arguments.out)


if __name__ == "__main__":
    run_command(main)

"""The comparison of autoencoders, with tiny networks and a tiny extractor."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import AutoencoderKL

from em_data import DataConfig
from em_diffusion import select_autoencoder as module
from em_diffusion.autoencoder import create_autoencoder
from em_diffusion.presets import PRESETS
from em_diffusion.select_autoencoder import (
    SelectionConfig,
    name_candidates,
    pair,
    select_autoencoder,
)
from em_diffusion.selection_output import format_table, join
from em_evaluation.baselines import read_baselines
from em_evaluation.distances import bootstrap_interval, frechet_influence
from em_evaluation.features import Extractor

ROOT = Path(__file__).parents[2]
STUDY_FILE = ROOT / "experiments" / "2024_gan_vs_ldm" / "study.json"
STUDY_AUTOENCODERS = read_baselines(STUDY_FILE)["autoencoders"]
TILES = {
    "resolution": 32,
    "downsample": 4,
    "num_micrographs": 6,
    "micrograph_size": 256,
    "held_out_fraction": 0.5,
}


class Pooled(Extractor):
    """Block means and block deviations: 32 features of images of 32 x 32."""

    name, identity, num_features = "pooled", "pooled, 32 features", 32

    def _features(self, images):
        blocks = torch.nn.functional.unfold(images, 8, stride=8)  # [B, 64, 16]
        return torch.cat([blocks.mean(1), blocks.std(1)], 1)


class Copy(torch.nn.Linear):
    """An autoencoder that returns its input plus `error` and uses the first two of its four
    codes.
    """

    device, dtype, config = torch.device("cpu"), torch.float32, {"num_vq_embeddings": 4}

    def __init__(self, error=0.0):
        super().__init__(3, 2)
        self.error = error

    def encode(self, images):
        return SimpleNamespace(latents=images)

    def quantize(self, latents):
        return latents, 0.0, (None, None, torch.arange(latents.numel()) % 2)

    def decode(self, latents):
        return SimpleNamespace(sample=latents + self.error)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True)
def _tiny_extractor(monkeypatch):
    monkeypatch.setitem(module.KINDS, Copy, "VQ")
    monkeypatch.setattr(module, "get_extractor", lambda *args, **options: Pooled())


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folders with a VQ and a KL autoencoder of random weights, and one that is broken."""
    folder = tmp_path_factory.mktemp("autoencoders")
    torch.manual_seed(0)
    create_autoencoder(PRESETS["test"]().autoencoder, 32).save_pretrained(
        folder / "run" / "autoencoder" / "vqvae"
    )
    blocks = {
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
    }
    channels = {
        "in_channels": 1,
        "out_channels": 1,
        "block_out_channels": (8, 16),
        "norm_num_groups": 8,
    }
    AutoencoderKL(**blocks, **channels, latent_channels=3, layers_per_block=1).save_pretrained(
        folder / "kl"
    )
    (folder / "broken").mkdir()
    (folder / "broken" / "config.json").write_text('{"_class_name": "VQModel"')
    return folder


def select(candidates, cache, out, **options):
    defaults = {
        "data": "synthetic",
        "num_images": 24,
        "batch_size": 8,
        "floor": False,
        "tiles": DataConfig(**TILES, cache_dir=cache),
    }
    config = SelectionConfig(candidates=tuple(candidates), out=str(out), **(defaults | options))
    lines = []
    return select_autoencoder(config, log=lines.append), "\n".join(lines)


@pytest.fixture(scope="module")
def selected(saved, cache, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "get_extractor", lambda *args, **options: Pooled())
        names = [
            f"kl={saved}/kl",
            f"broken={saved}/broken",
            f"ours={saved}/run",
            f"gone={saved}/nowhere",
        ]
        selection, text = select(names, cache, out)
    return selection, text, out


def test_candidates_are_judged_and_the_lame_ones_named(selected, saved):
    selection, text, out = selected
    assert json.loads((out / "selection.json").read_text(), parse_constant=pytest.fail) == selection
    assert str(saved) not in json.dumps(selection)
    assert {each["name"] for each in selection["candidates"]} == {"kl", "ours"}
    assert [each["name"] for each in selection["failed"]] == ["broken", "gone"]
    assert "broken cannot be judged" in text
    values = [each["frechet_distance"]["value"] for each in selection["candidates"]]
    assert values == sorted(values)
    by_name = {each["name"]: each for each in selection["candidates"]}
    vq, kl = by_name["ours"], by_name["kl"]
    assert (vq["kind"], kl["kind"]) == ("VQ", "KL")
    assert vq["latent_shape"] == [4, 16, 16]
    assert kl["latent_shape"] == [3, 16, 16]
    assert vq["downsampling_factor"] == kl["downsampling_factor"] == 2
    assert kl["pixels_per_latent_value"] == pytest.approx(32 * 32 / (3 * 16 * 16))
    assert 1 <= vq["codes_used"] <= vq["num_codes"] == 64
    assert 1 <= vq["perplexity"] <= vq["codes_used"]
    assert kl["num_codes"] is kl["codes_used"] is kl["perplexity"] is None
    assert all(
        each[f"{name}_images_per_second"] > 0 for each in (vq, kl) for name in ("encode", "decode")
    )
    assert selection["study"] is None
    assert "held-out" in selection["protocol"]["tiles"]
    assert selection["protocol"]["num_micrographs"] == 3


def test_a_perfect_autoencoder_has_no_distance_and_a_known_error_is_found(
    cache, tmp_path, monkeypatch
):
    monkeypatch.setattr(module, "load_autoencoder", lambda source, device: Copy(float(source)))
    selection, _ = select(["worse=0.04", "perfect=0"], cache, tmp_path)
    perfect, worse = selection["candidates"]
    assert perfect["name"] == "perfect"
    assert perfect["frechet_distance"]["value"] == pytest.approx(0, abs=1e-9)
    assert perfect["ssim"] == pytest.approx(1)
    assert perfect["psnr_db"] > 100
    assert perfect["spectrum_error_db"] == 0
    assert perfect["codes_used"] == 2
    assert perfect["perplexity"] == pytest.approx(2)
    assert perfect["num_parameters"] == 8
    # 0.04 is 5.1 grey levels, which round to 5; a shift moves the means of 16 blocks and no
    # deviation
    shift = 5 / 127.5
    assert worse["psnr_db"] == pytest.approx(
        20 * np.log10(2 / shift), abs=0.05
    )  # some pixels saturate
    assert worse["frechet_distance"]["value"] == pytest.approx(16 * shift**2, rel=0.05)
    (comparison,) = selection["comparisons"]
    assert (comparison["first"], comparison["second"]) == ("worse", "perfect")
    assert comparison["first_is"] == "farther"
    assert "perfect has the smallest distance" in selection["conclusion"][0]


def test_equal_candidates_cannot_be_told_apart(saved, cache, tmp_path):
    selection, _ = select([f"a={saved}/run", f"b={saved}/run"], cache, tmp_path)
    first, second = selection["candidates"]
    speeds = ("name", "encode_images_per_second", "decode_images_per_second")
    assert all(first[key] == second[key] for key in first if key not in speeds)
    assert selection["comparisons"][0]["frechet_distance_difference"] == {
        "value": 0,
        "low": 0,
        "high": 0,
    }
    assert "The difference to b is not significant" in selection["conclusion"][1]


def test_the_seed_decides_and_the_batch_size_does_not(saved, cache, tmp_path):
    names = [f"ours={saved}/run", f"kl={saved}/kl"]

    def numbers(**options):
        rows = sorted(
            select(names, cache, tmp_path, **options)[0]["candidates"], key=lambda row: row["name"]
        )
        keys = ("psnr_db", "ssim", "spectrum_error_db", "codes_used", "perplexity")
        return [
            value
            for row in rows
            for value in (*row["frechet_distance"].values(), *map(row.get, keys))
            if value
        ]

    reference = numbers()
    assert numbers() == reference
    for batch_size in (1, 7, 100):
        assert numbers(batch_size=batch_size) == pytest.approx(reference, rel=1e-4)
    assert numbers(seed=1) != pytest.approx(reference, rel=1e-4)


def test_the_side_is_said_and_fewer_tiles_than_asked_for_too(saved, cache, tmp_path):
    held_out, _ = select([f"ours={saved}/run"], cache, tmp_path, num_images=100_000)
    num_views = held_out["dataset"]["num_held_out_views"]
    assert held_out["protocol"]["num_images"] == num_views
    assert any(
        f"there are only {num_views:,} held-out views" in sentence
        for sentence in held_out["conclusion"]
    )
    train, text = select([f"ours={saved}/run"], cache, tmp_path, side="train")
    assert "24 random training tiles" in text
    assert "trained on these tiles have an advantage" in text
    assert (
        train["candidates"][0]["frechet_distance"] != held_out["candidates"][0]["frechet_distance"]
    )


def test_the_table_is_aligned_and_shows_the_study_beside_its_own_network_only(selected):
    selection, text, _ = selected
    table = format_table(selection)
    assert table in text
    assert "published" not in table
    lines = table.splitlines()
    rule = next(i for i, line in enumerate(lines) if line.startswith("---"))
    rows = lines[rule + 1 : rule + 3]
    assert (
        len({len(row) for row in (lines[rule], *rows)}) == 1
    )  # each ends with a right-aligned number under the rule
    for name in (" PSNR", " SSIM", " perplexity", " encode"):
        end = lines[rule - 2].index(name) + len(name)
        assert all(row[end - 1] != " " and row[end : end + 1] in ("", " ") for row in rows)
    beside = format_table(selection | {"study": STUDY_AUTOENCODERS})
    for each in STUDY_AUTOENCODERS:
        line = next(line for line in beside.splitlines() if each["name"] in line)
        assert line.split()[-1] == str(each["frechet_distance"])
    assert "orientation" in beside


def test_published_distances_are_shown_where_their_file_is_given(saved, cache, tmp_path):
    selection, text = select(
        [f"ours={saved}/run"], cache, tmp_path, extractor="inception", baselines=str(STUDY_FILE)
    )
    assert [each["frechet_distance"] for each in selection["study"]] == [
        31.15,
        60.26,
        82.19,
        116.64,
    ]
    assert "31.15" in text


def test_the_picture_holds_the_pixels_of_originals_and_reconstructions(
    cache, tmp_path, monkeypatch
):
    monkeypatch.setattr(module, "load_autoencoder", lambda source, device: Copy(0.25))
    drawn = {}
    original = module.draw_selection
    monkeypatch.setattr(
        module, "draw_selection", lambda *args: (drawn.update(args=args), original(*args))
    )
    select(["shifted=x"], cache, tmp_path)
    _, originals, reconstructions, path, num_columns = drawn["args"]
    picture = np.asarray(PIL.Image.open(path).convert("L"))
    zoom = 3  # tiles of 32 px are drawn 96 wide
    tiles, shifted = originals[:num_columns, 0], reconstructions["shifted"][:num_columns, 0]
    errors = (np.abs(shifted.astype(int) - tiles) * 4).clip(
        0, 255
    )  # a quarter of the range is white
    for levels, top, left in (
        (tiles, 34, 230),
        (shifted, 138, 230),
        (errors, 138, 230 + num_columns * 98 - 2 + 16),
    ):
        strip = join(np.asarray(levels, np.uint8), zoom)
        found = picture[top : top + strip.shape[0], left : left + strip.shape[1]]
        assert np.abs(found.astype(int) - strip).max() <= 2


def test_names_and_sources():
    assert name_candidates(["ours=runs/a", "runs/demo/ldm"]) == {
        "ours": "runs/a",
        "ldm": "runs/demo/ldm",
    }
    for texts, message in (
        ([], "there is no candidate"),
        (["=x"], "NAME=SOURCE"),
        (["x="], "NAME=SOURCE"),
        (["a=x", "a=y"], "two candidates are called a"),
    ):
        with pytest.raises(ValueError, match=message):
            name_candidates(texts)
    for options in ({"side": "both"}, {"num_images": 1}, {"batch_size": 0}):
        with pytest.raises(ValueError, match="--"):
            SelectionConfig(candidates=("a=x",), **options)


def test_the_interval_of_pairs_has_the_scatter_of_repeated_draws():
    """Drawing originals and reconstructions apart would overstate it: most of their scatter is
    common.
    """
    rng = np.random.default_rng(0)

    def draw():
        originals = rng.normal(size=(200, 4)) * [1, 2, 3, 4]
        return frechet_influence(0.8 * originals + 0.3 * rng.normal(size=(200, 4)) + 0.1, originals)

    distances = [draw() for _ in range(300)]
    scatter = np.std([distance.value for distance in distances])

    def half_width(distance):
        interval = bootstrap_interval(distance)
        return (interval.high - interval.low) / 2 / 1.96

    joint = np.mean([half_width(pair(distance)) for distance in distances[:40]])
    apart = np.mean([half_width(distance) for distance in distances[:40]])
    assert joint == pytest.approx(scatter, rel=0.15)
    assert apart > 1.5 * scatter


def test_the_command_ends_with_an_error_when_no_candidate_is_left(saved, cache, tmp_path):
    command = [
        sys.executable,
        "-m",
        "em_diffusion.select_autoencoder",
        "--candidates",
        f"a={saved}/broken",
        f"b={saved}/none",
    ]
    tiles = [f"--tiles.{key.replace('_', '-')}={value}" for key, value in TILES.items()]
    result = subprocess.run(
        [
            *command,
            "--data",
            "synthetic",
            "--num-images",
            "4",
            "--out",
            tmp_path,
            *tiles,
            "--tiles.cache-dir",
            cache,
        ],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 2
    assert "a cannot be judged: " in result.stderr
    assert (result.stdout + result.stderr).count("a cannot be judged") == 1
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "selection.json").exists()


def test_a_linear_autoencoder_of_each_shape_is_the_floor(saved, cache, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "get_extractor", lambda *args, **options: Pooled())
    candidates = [f"kl={saved}/kl", f"again={saved}/kl"]
    selection, said = select(candidates, cache, tmp_path, floor=True)
    named = {each["name"]: each for each in selection["candidates"]}
    assert set(named) == {"kl", "again", "linear, f2 x 3"}
    linear = named["linear, f2 x 3"]
    assert linear["kind"] == "basis"
    assert linear["latent_shape"] == named["kl"]["latent_shape"]
    assert linear["psnr_db"] > named["kl"]["psnr_db"] + 5  # random weights against a fit
    assert "linear, f2 x 3" in said

"""The look before training: facts, recommended flags, page and command."""

import html.parser
import os
import re
import shlex
import subprocess
import sys
from pathlib import PurePosixPath

import numpy as np
import PIL.Image
import pytest
import tifffile
from scipy import ndimage

from em_data import DataConfig, load_data
from em_data.look.command import LookConfig, look
from em_data.look.labels import draw_outlines
from em_data.look.recommendation import advise, choose_scale, count_tiles
from em_data.look.survey import MOST_MEASURED, Spread, survey_source
from em_data.look.text import describe_frames
from em_data.micrograph import Defect, Micrograph
from em_data.series import LONG_RUN, SERIES_PATTERN
from em_data.sources import open_source
from em_data.sources.base import Entry, Source
from em_data.sources.folder import find_specimen

SIDE = 256


def draw_blobs(diameter, seed, side=SIDE):
    """Return uint8 [side, side] with bright discs and noise."""
    rng = np.random.default_rng(seed)
    image = 0.1 * rng.normal(size=(side, side))
    y, x = np.mgrid[:side, :side]
    for _ in range(max(4, int(0.1 * side**2 / (np.pi / 4 * diameter**2)))):
        row, column = rng.uniform(0, side, 2)
        image = np.maximum(image, np.hypot(y - row, x - column) < diameter / 2)
    image = ndimage.gaussian_filter(image, 0.7) + 0.05 * rng.normal(size=image.shape)
    return np.clip(40 + 150 * image, 0, 255).astype(np.uint8)


def save(folder, name, image):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.fromarray(image).save(path)


def save_several(folder, names, diameter=20, side=SIDE):
    for seed, name in enumerate(names):
        save(folder, name, draw_blobs(diameter, seed, side))


def survey(folder, **tiles):
    config = DataConfig(**tiles)
    return survey_source(open_source(folder, config, folder / "../cache"), config), config


def call(folder, tmp_path, **options):
    """Return (the page's text, the printed text) of a look at a folder."""
    lines = []
    page = look(LookConfig(str(folder), str(tmp_path / "out"), **options), say=lines.append)
    return page.read_text(), "\n".join(lines)


@pytest.mark.parametrize(
    ("size", "side", "expected"),
    [
        (9, 2048, (64, 1)),
        (18, 2048, (128, 1)),
        (36, 2048, (256, 1)),
        (72, 2048, (256, 2)),
        (150, 4096, (256, 4)),
    ],
)
def test_a_structure_takes_about_a_seventh_of_a_tile(size, side, expected):
    assert choose_scale(size, size, [(side, side)] * 20) == expected


def test_tiles_are_enough_and_fit_into_the_micrographs():
    assert choose_scale(60, 60, [(512, 512)] * 10) == (256, 1)  # not one tile a micrograph
    resolution, factor = choose_scale(60, 60, [(200, 300)] * 40)
    assert resolution * factor <= 200
    assert choose_scale(5, 5, [(40, 40)]) == (64, 1)
    assert count_tiles([(300, 520)], 128, 2) == 2


def test_the_share_of_a_tile_stays_within_bounds():
    for size in np.geomspace(5, 600, 40):
        resolution, factor = choose_scale(size, size, [(4096, 4096)] * 50)
        assert 1 / 16 <= size / (resolution * factor) <= 1 / 3, size


def test_numbers_are_spread_over_a_series_of_unknown_length():
    spread, taken = Spread(8), []
    for number in range(1000):
        if spread.take(number):
            taken.append(number)
        taken = [each for each in taken if each % spread.step == 0]
    assert 8 <= len(taken) <= 16
    assert len(set(np.diff(taken))) == 1
    assert taken[0] == 0
    assert taken[-1] > 800


def test_facts_of_a_mixed_folder(tmp_path):
    folder = tmp_path / "data"
    save_several(folder, ["a/1.png", "a/2.png", "b/1.png"])
    tifffile.imwrite(folder / "b/2.tif", draw_blobs(20, 9).astype(np.uint16) * 200)
    save(folder, "b/copy.png", draw_blobs(20, 0)[::-1])
    save(folder, "masks/1.png", draw_blobs(20, 0))
    (folder / "broken.png").write_bytes(b"nothing")
    found, config = survey(folder)
    assert found.num_files == 6
    assert [each["bits"] for each in found.micrographs] == [8, 8, 8, 16, 8]
    assert found.copies == [["a/1.png", "b/copy.png"]]
    assert len(found.problems) == 1
    assert found.histogram.sum() == pytest.approx(1)
    assert advise(found, config).size_px[0] == pytest.approx(20, rel=0.2)


def test_the_line_recommends_what_a_training_accepts(tmp_path):
    """The words of the command give tiles of the size that was announced."""
    folder = tmp_path / "data"
    save_several(folder, [f"{i}.png" for i in range(4)], side=512)
    _, text = call(folder, tmp_path)
    words = shlex.split(text.splitlines()[-1])
    assert words[:5] == ["python", "train_ldm.py", "small", "--data", str(folder)]
    flags = dict(zip(words[5::2], words[6::2]))
    assert flags["--tiles.split"] == "micrograph"
    config = DataConfig(
        resolution=int(flags["--tiles.resolution"]),
        downsample=int(flags["--tiles.downsample"]),
        cache_dir=str(tmp_path / "cache"),
    )
    data = load_data(folder, config, log=lambda line: None)
    assert f"{data.summary['num_tiles']:,} tiles of 4 micrographs" in text
    assert str(tmp_path / "out" / "look.html") in text


def test_large_micrographs_of_coarse_structures_are_downsampled(tmp_path):
    """Public reports: 2048 px at 64 px and downsample 1 gave featureless tiles."""
    folder = tmp_path / "data"
    for i in range(4):
        image = np.kron(draw_blobs(20, i), np.ones((8, 8), np.uint8))
        save(folder, f"{i}.png", image)
    advice = advise(*survey(folder))
    assert advice.size_px[0] == pytest.approx(160, rel=0.2)
    assert advice.flags["downsample"] > 1
    assert 1 / 16 < 160 / (advice.flags["resolution"] * advice.flags["downsample"]) < 1 / 3


def test_images_smaller_than_any_tile_are_said(tmp_path):
    folder = tmp_path / "data"
    save_several(folder, ["a.png", "b.png"], diameter=8, side=40)
    advice = advise(*survey(folder))
    assert advice.num_tiles == 0
    assert any(text.startswith("No micrograph has 64 x 64 px") for text in advice.warnings)
    assert not any("copy them" in text for text in advice.warnings)


def test_folders_of_specimens_are_split_by_specimen(tmp_path):
    folder = tmp_path / "data"
    save_several(folder, [f"{specimen}/{i}.png" for specimen in "abc" for i in range(2)])
    assert advise(*survey(folder)).flags["split"] == "specimen"


def test_a_folder_with_most_of_the_images_is_not_held_out(tmp_path):
    folder = tmp_path / "data"
    save_several(folder, [*(f"a/{i}.png" for i in range(5)), "b/1.png", "c/1.png"])
    assert advise(*survey(folder)).flags["split"] == "micrograph"


def test_series_of_frames_are_specimens_by_their_names(tmp_path):
    folder = tmp_path / "data"
    names = [f"Chip-{chip}-Frame-{10 * i}.png" for chip in (1, 2, 3) for i in range(2)]
    save_several(folder, names)
    found, config = survey(folder)
    advice = advise(found, config)
    assert advice.flags["split"] == "specimen"
    data = load_data(
        folder,
        advice.apply(DataConfig(cache_dir=str(tmp_path / "cache"))),
        log=lambda line: None,
    )
    assert data.summary["specimens"] == ["Chip-1", "Chip-2", "Chip-3"]


def test_one_series_is_warned_of(tmp_path):
    folder = tmp_path / "data"
    save_several(folder, [f"Heat-Frame-{i}.png" for i in range(4)])
    advice = advise(*survey(folder))
    assert advice.flags["split"] == "micrograph"
    assert any("frames of one series (Heat*)" in each for each in advice.warnings)


def test_seconds_of_a_recording_are_neither_series_nor_specimens(tmp_path):
    """Gatan's layout for in-situ data: folders and names hold hour, minute, second and frame."""
    names = []
    for chip in "ab":
        for second in range(3):
            time = f"Hour_00_Minute_00_Second_{second:02d}"
            for frame in range(2):
                names.append(f"{chip}/{time.replace('_M', '/M').replace('_S', '/S')}/{chip}_{time}")
                names[-1] += f"_Frame_{frame:04d}.png"
    assert names[0] == (
        "a/Hour_00/Minute_00/Second_00/a_Hour_00_Minute_00_Second_00_Frame_0000.png"
    )
    save_several(tmp_path / "folders", names)
    found, _ = survey(tmp_path / "folders")
    assert {each["specimen"] for each in found.micrographs} == {"a", "b"}
    assert describe_frames(found) == [
        f"series: 6 micrographs look like frames of one series ({chip}*)" for chip in "ab"
    ]
    assert advise(found, DataConfig()).flags["split"] == "micrograph"  # two are too few
    save_several(tmp_path / "names", [name.rpartition("/")[2] for name in names])
    found, config = survey(tmp_path / "names")
    advice = advise(found, config)
    assert advice.flags["split"] == "micrograph"
    assert any("frames of one series (a*)" in each for each in advice.warnings)
    for pattern in (SERIES_PATTERN, None):
        source = open_source(tmp_path / "folders", DataConfig(specimen_pattern=pattern), None)
        assert {entry.specimen for entry in source.entries} == {"a", "b"}


@pytest.mark.parametrize(
    ("path", "specimen"),
    [
        ("steel/Hour_24/a.png", "steel/Hour_24"),  # aged for a day
        ("Second_03/x_Hour_00_Minute_00_Second_03_Frame_0001.dm4", None),
        ("steel/images/Time_1/Frame_2/a.png", "steel"),
        ("lifetime3/a.png", "lifetime3"),
    ],
)
def test_folders_of_times_are_no_specimens(path, specimen):
    assert find_specimen(PurePosixPath(path), None) == specimen


def test_a_long_numbered_run_draws_a_hint_that_says_what_is_known(tmp_path):
    folder = tmp_path / "data"
    scene = draw_blobs(9, 0, 96)
    for i in range(LONG_RUN):
        image = draw_blobs(9, i, 96) if i % 4 else np.clip(scene + 3.0 * (i // 4), 0, 255)
        save(folder, f"heat_{i:04d}.png", image.astype(np.uint8))
    said, config = [], {"resolution": 32, "cache_dir": str(tmp_path / "cache")}
    load_data(folder, DataConfig(**config), log=said.append)
    (hint,) = [each for each in said if "numbered names" in each]
    assert hint.startswith("20 micrographs of one size have numbered names (heat_0000.png to heat_")
    assert "near copies keep some of them together, in 16 groups. If they are" in hint
    assert "--tiles.split specimen" in hint
    found, _ = survey(folder)
    (warning,) = [each for each in advise(found, DataConfig()).warnings if "numbered" in each]
    assert "add another area or specimen" in warning
    parted = DataConfig(**config, split="specimen", specimen_pattern=r"heat_\d+")
    (hint,) = [each for each in load_data(folder, parted).summary["notices"] if "numbered" in each]
    assert "but lie in 16 specimens" in hint
    (folder / "heat_0001.png").unlink()
    said.clear()
    load_data(folder, DataConfig(**config), log=said.append)
    assert not any("numbered" in each for each in said)  # too few


def make_stack(num_frames, change):
    """Return a source with one stack, whose frames are a window that moves over a large scene."""
    scene = draw_blobs(20, 0, SIDE + num_frames * change)

    def frames():
        for i in range(num_frames):
            start = i * change
            image = scene[:SIDE, start : start + SIDE]
            yield Micrograph(image, f"heat.tif#{i:04d}", None, None, {"frame": i, "notices": []})

    return Source("heat", [Entry("heat.tif", "key", frames)], [])


def test_a_stack_is_one_group_and_slow_frames_are_skipped():
    advice = {}
    for change in (1, 30):
        found = survey_source(make_stack(40, change), DataConfig())
        advice[change] = advise(found, DataConfig())
        assert advice[change].flags["split"] == "leaky"
        assert describe_frames(found)[0].startswith("stacks: 1 file of 40 frames.")
    assert advice[1].flags["frame_step"] in (2, 4)
    assert "frame_step" not in advice[30].flags


def test_a_few_frames_that_hardly_change_are_warned_of():
    advice = advise(survey_source(make_stack(12, 0), DataConfig()), DataConfig())
    assert "frame_step" not in advice.flags
    assert any("little more than one micrograph" in each for each in advice.warnings)


def test_a_field_of_view_in_the_path_becomes_a_pattern(tmp_path):
    folder = tmp_path / "steel"
    save_several(folder, ["fov200nm/1.png", "fov200nm/2.png"])
    _, text = call(folder, tmp_path)
    flags = shlex.split(text.splitlines()[-1])
    pattern = flags[flags.index("--tiles.pixel-size-pattern") + 1]
    config = DataConfig(resolution=64, pixel_size_pattern=pattern, cache_dir=str(tmp_path / "c"))
    data = load_data(folder, config, log=lambda line: None)
    assert data.summary["pixel_size_nm"] == pytest.approx(200 / SIDE)
    assert "No file states its pixel size" not in text


def test_near_copies_and_masks_are_found_by_their_pixels(tmp_path):
    folder = tmp_path / "data"
    save_several(folder, ["1.png", "2.png", "3.png"])
    save(folder, "filtered.png", ndimage.gaussian_filter(draw_blobs(20, 1), 1) // 2 + 30)
    save(folder, "classes.png", np.where(draw_blobs(20, 2) > 110, 1, 0).astype(np.uint8))
    found, _ = survey(folder)
    assert found.copies == [["2.png", "filtered.png"]]
    assert any("look like labels by their pixels: classes.png" in each for each in found.ignored)


def test_one_image_leaves_only_the_leaky_split(tmp_path):
    folder = tmp_path / "data"
    save_several(folder, ["only.png"])
    advice = advise(*survey(folder))
    assert advice.flags["split"] == "leaky"
    assert any("scores look too good" in each for each in advice.warnings)
    assert any("tiles of 1 micrograph:" in each for each in advice.warnings)


def test_flags_of_the_user_are_kept(tmp_path):
    folder = tmp_path / "data"
    save_several(folder, ["1.png", "2.png"])
    _, text = call(folder, tmp_path, tiles=DataConfig(pixel_size_nm=0.5, label_bar="keep"))
    assert "--tiles.pixel-size-nm 0.5" in text.splitlines()[-1]
    assert "--tiles.label-bar keep" in text.splitlines()[-1]
    assert re.search(r"px( \([\d.]+ to [\d.]+\))?, [\d.]+ nm", text)


def test_pixel_sizes_that_differ_are_said(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    for i, size in enumerate((0.2, 0.2, 0.4, None)):
        options = {} if size is None else {"resolution": (1e7 / size,) * 2, "resolutionunit": 3}
        tifffile.imwrite(folder / f"{i}.tif", draw_blobs(20, i), **options)
    page, text = call(folder, tmp_path)
    assert "pixel size: 0.2 nm (2), 0.4 nm (1), unknown (1)" in text
    assert "a folder with the 2 micrographs of 0.2 nm" in text
    assert "Pixel sizes differ" in page


class Page(html.parser.HTMLParser):
    """Collects the tags, the text and what a page refers to."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.links, self.images, self.ids = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append(tag)
        self.links += [attributes[key] for key in ("href", "src") if key in attributes]
        self.ids += [attributes["id"]] if "id" in attributes else []
        if tag == "img":
            self.images.append(attributes)


def test_the_page_stands_alone_and_escapes_names(tmp_path):
    folder = tmp_path / "da<b>ta & more"
    name = '<script>alert(1)</script>\x1b[31m".png'
    save(folder, "1.png", draw_blobs(20, 1))
    (folder / "x").mkdir()
    PIL.Image.fromarray(draw_blobs(20, 2)).save(folder / name.replace("/", "_"))
    text, printed = call(folder, tmp_path)
    page = Page(text)
    assert "script" not in page.tags
    assert "\x1b" not in text + printed
    assert "&lt;script&gt;" in text
    targets = [link for link in page.links if not link.startswith("data:image/png;base64,")]
    assert {target.removeprefix("#") for target in targets} == set(page.ids)
    assert "http" not in re.sub(r"data:image/png;base64,[^\"]*", "", text)
    assert all(image.get("alt") for image in page.images)
    assert str(folder) in shlex.split(printed.splitlines()[-1])


def test_the_data_folder_is_never_written(tmp_path):
    folder = tmp_path / "data"
    save_several(folder, ["1.png", "2.png"])
    with pytest.raises(ValueError, match=r"lies in the data folder\. Use --out"):
        look(LookConfig(str(folder), str(folder / "sub")))
    with pytest.raises(ValueError, match="lies in the data folder"):
        look(LookConfig(str(folder), str(folder)))
    assert sorted(path.name for path in folder.rglob("*")) == ["1.png", "2.png"]


def test_unusable_folders_end_with_the_reasons(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "broken.png").write_bytes(b"nothing")
    save(folder, "flat.png", np.full((64, 64), 7, np.uint8))
    save(folder, "small.png", draw_blobs(5, 0, 20))
    with pytest.raises(ValueError, match="no image can be used") as caught:
        survey(folder)
    for name in ("broken.png", "flat.png", "small.png"):
        assert name in str(caught.value)


def test_many_micrographs_are_sampled_and_said(tmp_path):
    folder = tmp_path / "data"
    image = draw_blobs(8, 0, 64)
    for i in range(3 * MOST_MEASURED):
        save(folder, f"{i}.png", np.roll(image, i, axis=0))
    found, _ = survey(folder)
    assert len(found.micrographs) == 3 * MOST_MEASURED
    assert MOST_MEASURED <= len(found.samples) <= 2 * MOST_MEASURED
    assert sum(each.image is not None for each in found.samples) <= 12
    _, text = call(folder, tmp_path)
    assert f"measured on {len(found.samples)} of {3 * MOST_MEASURED} micrographs" in text


def test_the_command_prints_page_and_next_command_last(tmp_path):
    folder = tmp_path / "data"
    save_several(folder, ["1.png", "2.png"])
    command = [sys.executable, "-m", "em_data.look", str(folder)]
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    environment["PYTHONPATH"] = os.getcwd()
    options = {"cwd": tmp_path, "env": environment, "capture_output": True, "text": True}
    result = subprocess.run(command, check=True, **options)
    assert "The page is runs/look-data/look.html" in result.stdout
    assert result.stdout.splitlines()[-1].startswith("python train_ldm.py small")
    assert (tmp_path / "runs/look-data/look.html").is_file()
    result = subprocess.run([*command[:-1], "nowhere"], check=False, **options)
    assert result.returncode == 2
    assert result.stderr.startswith("error: There is no folder 'nowhere'")


def test_the_page_shows_labels_with_outlines_and_classes(tmp_path):
    save_several(tmp_path / "set", ["a.png", "b.png", "c.png"])
    mask = np.zeros((SIDE, SIDE), np.uint8)
    mask[20:40, 30:60] = mask[100:110, 100:110] = 3
    save(tmp_path / "set", "masks/a.png", mask)
    (tmp_path / "set" / "labels.csv").write_text("file_name,class\na.png,steel\nb.png,iron\n")
    page, text = call(tmp_path / "set", tmp_path, tiles=DataConfig(pixel_size_nm=0.5))
    found = "labels from masks/ (masks of kinds, 1 images): 1 of 3 micrographs, 2 defects (3: 2)"
    assert found in text
    assert "classes from column class of labels.csv: 2 of 3 micrographs (iron: 1, steel: 1)" in text
    assert f"L{found[1:]}." in page
    assert "a.png, from row 0 and column 0: 2 labels" in page
    assert "19.5 (12.1 to 26.8)" in page  # px; discs of 600 and of 100 pixels
    assert "9.73 (6.05 to 13.4)" in page  # nm
    for name in ("iron", "steel"):
        assert f'<tr><th scope="row">{name}</th><td>1</td></tr>' in page


def test_an_outline_lies_on_the_edge_of_a_mask():
    mask = np.ones((3, 4), bool)
    mask[0, 0] = False
    defects = [Defect("dot", (1, 2, 5, 5), mask), Defect("x", (-2, -2, 2, 2))]
    drawn = draw_outlines(np.zeros((8, 9), np.uint8), defects, {"dot": "#00ff00", "x": "#ff0000"})
    assert drawn.shape == (16, 18, 3)
    inside = np.zeros((8, 9), bool)
    inside[2:5, 1:5] = mask
    large = inside.repeat(2, axis=0).repeat(2, axis=1)
    outside = ndimage.binary_dilation(~large, np.ones((3, 3), bool))
    assert np.array_equal(drawn[..., 1] > 0, large & outside)
    assert drawn[:4, 3, 0].min() == 255  # the box ends at the second pixel
    assert drawn[..., 0].sum() == 255 * 7


def test_frames_are_compared_within_their_channel(tmp_path):
    scene = draw_blobs(20, 0)
    other = draw_blobs(20, 1)
    (tmp_path / "data").mkdir()
    tifffile.imwrite(
        tmp_path / "data/a.tif",
        np.stack([[scene, other]] * 3),
        imagej=True,
        metadata={"axes": "TCYX"},
    )
    found, _ = survey(tmp_path / "data")
    assert found.similarity[1] == pytest.approx(1)
    assert describe_frames(found)[0].startswith("stacks: 1 file of 3 frames.")
    assert any("2 channels" in notice for each in found.micrographs for notice in each["notices"])

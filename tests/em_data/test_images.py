import datasets
import numpy as np
import PIL.Image
import pytest
import tifffile
import torch

from em_data import (
    Images,
    as_images,
    from_uint,
    read_image_folder,
    read_micrograph,
    save_image_grid,
    to_uint8,
    write_image,
)


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_written_image_comes_back_exactly(bits, suffix, tmp_path):
    levels = np.random.default_rng(0).integers(0, 2**bits, (20, 30)).astype(f"uint{bits}")
    images = from_uint(levels)
    write_image(images, tmp_path / f"a{suffix}", bits=bits, pixel_size_nm=0.123456789)
    write_image(images[None], tmp_path / f"b{suffix}", bits=bits)
    folder = read_image_folder(tmp_path)
    assert folder.names == [f"a{suffix}", f"b{suffix}"]
    assert folder.pixel_size_nm == 0.123456789
    batch = folder.batch(range(2))
    assert batch.dtype == torch.float32
    assert batch.shape == (2, 1, 20, 30)
    assert torch.equal(batch[0, 0], images)
    assert torch.equal(batch[1, 0], images)
    assert read_micrograph(tmp_path / f"b{suffix}").pixel_size_nm is None
    # no remains of the atomic writing
    assert sorted(path.name for path in tmp_path.iterdir()) == folder.names


def test_pixel_size_stands_where_other_programs_look(tmp_path):
    image = torch.linspace(-1, 1, 64).reshape(8, 8)
    write_image(image, tmp_path / "a.png", pixel_size_nm=0.5)
    write_image(image, tmp_path / "a.tif", pixel_size_nm=0.5)
    with PIL.Image.open(tmp_path / "a.png") as png:
        assert png.info["dpi"][0] * 100 / 2.54 == pytest.approx(2e9, rel=1e-6)  # pixels per metre
    with tifffile.TiffFile(tmp_path / "a.tif") as tif:
        over, under = tif.pages[0].tags["XResolution"].value
        assert tif.imagej_metadata["unit"] == "nm"
        assert over / under == pytest.approx(2)  # pixels per unit
        assert tif.pages[0].tags["ResolutionUnit"].value == 1  # ImageJ's: the unit is in the text
        assert (tif.imagej_metadata["min"], tif.imagej_metadata["max"]) == (0, 255)
        assert "not counts" in tif.imagej_metadata["Info"]


def test_pixel_size_too_fine_for_a_png_header_is_kept_as_text(tmp_path):
    write_image(torch.linspace(-1, 1, 64).reshape(8, 8), tmp_path / "a.png", pixel_size_nm=0.01)
    assert read_micrograph(tmp_path / "a.png").pixel_size_nm == 0.01


def test_folder_reads_parts_in_natural_order(tmp_path):
    images = torch.rand(12, 1, 6, 6) * 2 - 1
    for i, image in enumerate(images):
        write_image(image, tmp_path / f"{i}.png")
    folder = read_image_folder(tmp_path)
    assert len(folder) == 12
    assert np.array_equal(to_uint8(folder.batch(range(3, 12))), to_uint8(images[3:]))
    assert folder.batch([]).shape == (0, 1, 6, 6)


def test_folder_of_any_kind_gives_the_same_images(noise, tmp_path):
    """Files in subfolders, JPEGs, and both forms of a `datasets` folder; labels are left out."""
    levels = np.stack([noise(i, (12, 10), np.uint16) for i in range(3)])
    (tmp_path / "files" / "b" / "masks").mkdir(parents=True)
    names = ["a.png", "b/frame 2.png", "b/frame 10.png"]
    for name, image in zip([*names, "b/masks/1.png"], [*levels, levels[0]]):
        PIL.Image.fromarray(image).save(tmp_path / "files" / name)
    paths = [str(tmp_path / "files" / name) for name in names]
    columns = {"image": paths, "pixel_size_nm": [0.5] * 3}
    images = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())
    images.save_to_disk(tmp_path / "images")
    array = datasets.Features({"levels": datasets.Array2D((12, 10), "uint16")})
    datasets.Dataset.from_dict({"levels": levels}, features=array).save_to_disk(tmp_path / "arrays")
    for name in ("files", "images", "arrays"):
        folder = read_image_folder(tmp_path / name)
        assert isinstance(folder, Images)
        assert torch.equal(folder.batch(range(3)), from_uint(levels).unsqueeze(1))
        assert torch.equal(folder.batch(np.array([2, 0]))[:, 0], from_uint(levels[[2, 0]]))
        assert folder.shape == (12, 10)
        assert folder.pixel_size_nm == (0.5 if name == "images" else None)
    files = read_image_folder(tmp_path / "files")
    assert files.names == names
    assert files.ignored == ["1 images in folder masks/: labels by their name"]
    (tmp_path / "photos").mkdir()
    PIL.Image.fromarray(np.full((8, 8), 51, np.uint8)).save(tmp_path / "photos" / "a.jpeg")
    photo = read_image_folder(tmp_path / "photos").batch([0])
    assert torch.equal(photo, from_uint(np.full((1, 1, 8, 8), 51, np.uint8)))


def test_images_without_a_range_of_grey_levels_are_refused_by_name(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", np.linspace(0, 255, 30, dtype=np.float32).reshape(5, 6))
    with pytest.raises(ValueError, match=r"a\.tif holds float32.*8 or 16 bits"):
        read_image_folder(tmp_path)


def test_tensors_and_arrays_are_containers_of_images_too():
    images = torch.rand(5, 1, 4, 4, dtype=torch.float64) * 2 - 1
    for given in (images, images.numpy()):
        container = as_images(given)
        assert isinstance(container, Images)
        assert len(container) == 5
        assert torch.equal(container.batch([4, 1]), images[[4, 1]].float())
        assert as_images(container) is container


def test_images_of_different_sizes_are_refused_by_name(tmp_path):
    write_image(torch.zeros(6, 6), tmp_path / "a.png")
    write_image(torch.zeros(6, 7), tmp_path / "b.png")
    with pytest.raises(ValueError, match=r"b\.png has 6 x 7"):
        read_image_folder(tmp_path).batch(range(2))


def test_missing_or_empty_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no folder"):
        read_image_folder(tmp_path / "none")
    with pytest.raises(ValueError, match="holds no"):
        read_image_folder(tmp_path)


def test_wrong_suffix_bits_and_shape_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"\.png or \.tif"):
        write_image(torch.zeros(6, 6), tmp_path / "a.jpg")
    with pytest.raises(ValueError, match="8 or 16 bits"):
        write_image(torch.zeros(6, 6), tmp_path / "a.png", bits=12)
    with pytest.raises(ValueError, match="one grey image"):
        write_image(torch.zeros(3, 6, 6), tmp_path / "a.png")


@pytest.mark.parametrize(
    ("num", "columns", "shape"), [(5, None, (2, 3)), (4, 4, (1, 4)), (1, 9, (1, 1)), (7, 2, (4, 2))]
)
def test_grid_holds_every_image_at_its_place(num, columns, shape, tmp_path):
    images = torch.rand(num, 1, 5, 6) * 2 - 1
    save_image_grid(images, tmp_path / "deep" / "grid.png", columns)
    grid = np.array(PIL.Image.open(tmp_path / "deep" / "grid.png"))
    assert grid.shape == (shape[0] * 7 - 2, shape[1] * 8 - 2)
    for i, image in enumerate(to_uint8(images)):
        row, col = divmod(i, shape[1])
        assert np.array_equal(grid[row * 7 : row * 7 + 5, col * 8 : col * 8 + 6], image[0])

"""Which image of a file with several images is the micrograph."""

import io

import numpy as np
import pytest
import tifffile

from em_data import read_micrograph

RNG = np.random.default_rng(4)
IMAGE = RNG.integers(0, 65536, (160, 200), dtype=np.uint16)
SMALL = RNG.integers(0, 256, (40, 50), dtype=np.uint8)
COLOUR = RNG.integers(0, 256, (40, 50, 3), dtype=np.uint8)
LARGE_COLOUR = RNG.integers(0, 256, (160, 200, 3), dtype=np.uint8)
MASK = IMAGE > 99
A_MASK = {"subfiletype": 4, "photometric": "mask"}
PLAIN = {"contiguous": False, "metadata": None}


def pages(*images):
    """A TIFF of (array, options of a page)."""
    buffer = io.BytesIO()
    with tifffile.TiffWriter(buffer) as writer:
        for array, options in images:
            writer.write(array, **PLAIN, **options)
    return buffer.getvalue()


def ome(*images):
    buffer = io.BytesIO()
    with tifffile.TiffWriter(buffer, ome=True) as writer:
        for array in images:
            writer.write(array, photometric="minisblack", metadata={"axes": "YX"})
    return buffer.getvalue()


def with_subifd(first, second, **options):
    buffer = io.BytesIO()
    with tifffile.TiffWriter(buffer) as writer:
        writer.write(first[0], subifds=1, **PLAIN, **first[1])
        writer.write(second[0], **PLAIN, **second[1])
    return buffer.getvalue()


RGB = {"photometric": "rgb"}
REDUCED = {"subfiletype": 1}
PYRAMID = [IMAGE, IMAGE[::2, ::2], IMAGE[::4, ::4]]
FILES = {
    "thumbnail first": (pages((SMALL, REDUCED), (IMAGE, {})), "1 reduced image of 40 x 50"),
    "thumbnail first, not marked": (pages((SMALL, {}), (IMAGE, {})), "1 image of 40 x 50"),
    "thumbnail last": (pages((IMAGE, {}), (SMALL, {})), "1 image of 40 x 50"),
    "colour preview first": (
        pages((COLOUR, RGB), (IMAGE, {})),
        "1 image in colours of 40 x 50",
    ),
    "colour preview of full size": (
        pages((LARGE_COLOUR, RGB), (IMAGE, {})),
        "1 image in colours of 160 x 200",
    ),
    "mask": (pages((MASK, A_MASK), (IMAGE, {})), "1 mask of 160 x 200"),
    "marked reduced, but large": (
        pages((np.zeros((300, 300), np.uint8), REDUCED), (IMAGE, {})),
        "1 reduced image of 300 x 300",
    ),
    "pyramid": (pages(*((level, {}) for level in PYRAMID)), "1 image of 80 x 100"),
    "pyramid in a SubIFD": (
        with_subifd((IMAGE, {}), (PYRAMID[1], REDUCED)),
        "1 reduced image of 80 x 100",
    ),
    "whole image in a SubIFD": (
        with_subifd((SMALL, REDUCED), (IMAGE, {})),
        "1 reduced image of 40 x 50",
    ),
    "ome series": (ome(SMALL, IMAGE), "1 image of 40 x 50"),
}


@pytest.mark.parametrize("kind", FILES)
def test_largest_grey_image_is_read_and_the_others_are_named(kind):
    data, named = FILES[kind]
    micrograph = read_micrograph(data, name="x")
    assert np.array_equal(micrograph.image, IMAGE)
    (notice,) = [each for each in micrograph.metadata["notices"] if "not used" in each]
    assert notice.startswith("the file holds more than the image of 160 x 200; not used: ")
    assert named in notice


def test_pixel_size_is_that_of_the_image_that_is_read():
    buffer = io.BytesIO()
    with tifffile.TiffWriter(buffer, ome=True) as writer:
        for array, size in ((SMALL, 5.0), (IMAGE, 1.25)):
            sizes = {f"PhysicalSize{axis}": size for axis in "XY"}
            units = {f"PhysicalSize{axis}Unit": "nm" for axis in "XY"}
            options = {"axes": "YX"} | sizes | units
            writer.write(array, photometric="minisblack", metadata=options)
    assert read_micrograph(buffer.getvalue(), name="x").pixel_size_nm == pytest.approx(1.25)


def test_only_image_is_read_though_it_is_marked_reduced():
    assert np.array_equal(read_micrograph(pages((IMAGE, REDUCED)), name="x").image, IMAGE)


def test_grey_thumbnail_of_a_colour_image_is_not_taken_for_a_micrograph():
    with pytest.raises(ValueError, match="x: a coloured image"):
        read_micrograph(pages((LARGE_COLOUR, RGB), (SMALL, {})), name="x")


def test_file_of_masks_is_refused():
    with pytest.raises(ValueError, match="x: a TIFF that holds only a mask"):
        read_micrograph(pages((MASK, A_MASK)), name="x")


def test_damaged_image_is_refused_and_not_replaced_by_its_thumbnail():
    data = pages((SMALL, {}), (IMAGE, {}))
    with pytest.raises(ValueError, match="x: truncated"):
        read_micrograph(data[: len(data) - 100], name="x")


def test_each_file_of_an_ome_set_gives_its_own_plane(tmp_path):
    planes = RNG.integers(0, 256, (3, 32, 40), dtype=np.uint8)
    uuids = [f"urn:uuid:0000000{i}-0000-0000-0000-000000000000" for i in range(3)]
    parts = "".join(
        f'<TiffData FirstT="{i}" IFD="0" PlaneCount="1"><UUID FileName="p{i}.ome.tif">{uuid}'
        "</UUID></TiffData>"
        for i, uuid in enumerate(uuids)
    )
    for i, (plane, uuid) in enumerate(zip(planes, uuids)):
        xml = (
            '<?xml version="1.0"?><OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06" '
            f'UUID="{uuid}"><Image ID="Image:0"><Pixels ID="Pixels:0" DimensionOrder="XYZCT" '
            'Type="uint8" SizeX="40" SizeY="32" SizeZ="1" SizeC="1" SizeT="3" '
            f'PhysicalSizeX="1.25" PhysicalSizeXUnit="nm">{parts}</Pixels></Image></OME>'
        )
        tifffile.imwrite(tmp_path / f"p{i}.ome.tif", plane, description=xml, metadata=None)
    for i, plane in enumerate(planes):
        micrograph = read_micrograph(tmp_path / f"p{i}.ome.tif")
        assert np.array_equal(micrograph.image, plane)
        assert micrograph.pixel_size_nm == pytest.approx(1.25)

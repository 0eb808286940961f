"""Small image files of every kind, and damaged copies of them."""

import io
from pathlib import Path

import numpy as np
import PIL.Image
import tifffile

from support.microscope_files import make_dm, make_mrc, make_ser, write_hspy, write_velox

EXTREMES = (0, 1, 2, 255, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFE, 0xFFFFFFFF)


def make_image(dtype=np.uint8, shape=(48, 64)):
    """Return a smooth image with some noise, so that compression has something to do."""
    rows, columns = np.indices(shape)
    image = 0.5 + 0.3 * np.sin(rows / 5) * np.cos(columns / 7)
    image += 0.05 * np.random.default_rng(0).standard_normal(shape)
    most = np.iinfo(dtype).max if np.issubdtype(dtype, np.integer) else 1
    return (np.clip(image, 0.01, 1) * most).astype(dtype)


def encode_tiff(array, **options):
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, array, **options)
    return buffer.getvalue()


def encode_with_pil(array, kind, **options):
    buffer = io.BytesIO()
    image = array if isinstance(array, PIL.Image.Image) else PIL.Image.fromarray(array)
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def make_pictures() -> dict[str, bytes]:
    """Return {file name: content} of sound TIFF, PNG, JPEG and BMP files of many kinds."""
    grey8, grey16 = make_image(), make_image(np.uint16)
    real = make_image(np.float32)
    stack = np.stack([np.roll(grey16, i, axis=0) for i in range(3)])
    wide = {"resolution": (1e7, 1e7), "resolutionunit": 3}
    return {
        "plain8.tif": encode_tiff(grey8, **wide),
        "plain16.tif": encode_tiff(grey16, rowsperstrip=8),
        "big_endian.tif": encode_tiff(grey16, byteorder=">"),
        "bigtiff.tif": encode_tiff(grey16, bigtiff=True),
        "float.tif": encode_tiff(real),
        "int32.tiff": encode_tiff(grey16.astype(np.int32) - 1000),
        "lzw.tif": encode_tiff(grey16, compression="lzw", predictor=True, rowsperstrip=8),
        "deflate.tif": encode_tiff(grey8, compression="zlib", tile=(16, 16)),
        "packbits.tif": encode_tiff(grey8, compression="packbits"),
        "jpeg.tif": encode_tiff(grey8, compression="jpeg"),
        "zstd.tif": encode_tiff(grey16, compression="zstd"),
        "stack.tif": encode_tiff(stack, imagej=True, metadata={"axes": "TYX", "unit": "nm"}),
        "pages.tif": encode_tiff(stack, photometric="minisblack", metadata=None),
        "series.ome.tif": encode_tiff(stack, ome=True, metadata={"axes": "TYX"}),
        "grey8.png": encode_with_pil(grey8, "PNG"),
        "grey16.png": encode_with_pil(grey16, "PNG"),
        "palette.png": encode_with_pil(PIL.Image.fromarray(grey8).convert("P"), "PNG"),
        "equal.png": encode_with_pil(np.dstack([grey8] * 3), "PNG"),
        "baseline.jpg": encode_with_pil(grey8, "JPEG", quality=90),
        "progressive.jpg": encode_with_pil(grey8, "JPEG", quality=80, progressive=True),
        "grey.bmp": encode_with_pil(grey8, "BMP"),
    }


def make_microscope_files(folder: Path) -> dict[str, tuple[bytes, list[bytes]]]:
    """Return {file name: (content, stretches of it that are pixels)} of files of microscopes."""
    grey8, grey16 = make_image(), make_image(np.uint16)
    stack = np.stack([np.roll(grey16, i, axis=0) for i in range(3)])
    real, wide = make_image(np.float32), grey16.astype(np.int32) - 1000
    nm, thumbnail = {"scale": 0.5, "unit": "nm"}, make_image(shape=(12, 16))
    path = folder / "sample"
    write_velox(path, {"HAADF": (np.moveaxis(stack, 0, -1), 1e-9), "BF": (grey8[..., None], 1e-9)})
    velox = path.read_bytes()
    path.unlink()
    write_hspy(path, stack, ["s", "nm", "nm"], navigate=[0])
    hspy = path.read_bytes()
    path.unlink()
    files = {
        "one.dm3": (make_dm([(grey16, nm)], 3), [grey16]),
        "two.dm4": (make_dm([(stack, nm), (grey8, {})]), [stack, grey8]),
        "thumbnail.dm4": (make_dm([(wide, nm)], thumbnail=thumbnail), [thumbnail, wide]),
        "one.ser": (make_ser(grey8[None]), [grey8[::-1]]),
        "series.ser": (make_ser(stack), [frame[::-1] for frame in stack]),
        "stack.mrc": (make_mrc(stack, (30.0, 20.0, 3.0)), [stack]),
        "big_endian.mrc": (make_mrc(grey16, order=">"), [grey16.astype(">u2")]),
        "real.mrc": (make_mrc(real), [real]),
        "velox.emd": (velox, [*stack, grey8]),
        "stack.hspy": (hspy, [stack]),
    }
    return {
        name: (data, [each.tobytes() for each in arrays]) for name, (data, arrays) in files.items()
    }


def truncate(data: bytes, rng) -> bytes:
    """Cut the end off."""
    return data[: int(rng.integers(0, len(data)))]


def flip_bits(data: bytes, rng) -> bytes:
    """Flip one to eight bits anywhere."""
    damaged = bytearray(data)
    for position in rng.integers(0, len(data), int(rng.integers(1, 9))):
        damaged[position] ^= 1 << int(rng.integers(8))
    return bytes(damaged)


def lie(data: bytes, rng) -> bytes:
    """Replace a number in the first or the last 512 bytes, where headers lie, by an extreme one."""
    damaged, size = bytearray(data), int(rng.choice([2, 4, 8]))
    position = int(rng.integers(0, min(512, len(data) - size)))
    if rng.random() < 0.3:
        position = max(0, len(data) - size - position)
    value = int(rng.choice(EXTREMES)) % 256**size
    order = "little" if rng.random() < 0.5 else "big"
    damaged[position : position + size] = value.to_bytes(size, order)
    return bytes(damaged)


def lose_block(data: bytes, rng) -> bytes:
    """Overwrite a block by zeros, drop it, or repeat it, as a broken copy does."""
    start = int(rng.integers(0, len(data)))
    stop = min(len(data), start + int(rng.integers(1, 1 + len(data) // 4)))
    middle = [bytes(stop - start), b"", 2 * data[start:stop]][int(rng.integers(3))]
    return data[:start] + middle + data[stop:]


MUTATIONS = (truncate, flip_bits, lie, lose_block)


def write_mutations(samples: dict[str, bytes], num: int, folder: Path, seed: int = 0) -> list[Path]:
    """Write `num` damaged files, `NUMBER-mutation-NAME`, over all samples and mutations in turn."""
    rng, paths, names = np.random.default_rng(seed), [], sorted(samples)
    for i in range(num):
        name, mutation = names[i % len(names)], MUTATIONS[i // len(names) % len(MUTATIONS)]
        paths.append(folder / f"{i:05d}-{mutation.__name__}-{name}")
        paths[-1].write_bytes(mutation(samples[name], rng))
    return paths

"""Small files of microscopes, written from the public descriptions of their formats."""

import json
import struct

import numpy as np

DM_TYPES = {  # of an image's elements: (DataType, the type of a tag's elements)
    "int16": (1, 2),
    "float32": (2, 6),
    "uint8": (6, 10),
    "int32": (7, 3),
    "int8": (9, 9),
    "uint16": (10, 4),
    "uint32": (11, 5),
    "float64": (12, 7),
}
SER_TYPES = {"uint8": 1, "uint16": 2, "uint32": 3, "int8": 4, "int16": 5, "int32": 6}
SER_TYPES |= {"float32": 7, "float64": 8}
MRC_MODES = {"int8": 0, "int16": 1, "float32": 2, "complex64": 4, "uint16": 6, "float16": 12}


def make_dm(images, version=4, thumbnail=None):
    """Return the bytes of a DigitalMicrograph file.

    images: [(array [H, W] or [frames, H, W], {"scale", "unit", "name", "tags"})].
    """
    items = [_dm_image(*each) for each in images]
    root = {"ImageList": items}
    if thumbnail is not None:
        items.insert(0, _dm_image(thumbnail, {}))
        root["Thumbnails"] = [{"ImageIndex": 0}]
    body = _dm_group(root, version, is_root=True)
    size = struct.pack(">q" if version == 4 else ">i", len(body) + 16)
    return struct.pack(">i", version) + size + struct.pack(">i", 1) + body + bytes(8)


def _dm_image(array, facts):
    scale, unit = facts.get("scale", 1.0), facts.get("unit", "")
    axis = {"Origin": 0.0, "Scale": scale, "Units": unit}
    axes = [axis] * 2 + [{"Origin": 0.0, "Scale": 1.0, "Units": ""}] * (array.ndim - 2)
    return {
        "ImageData": {
            "Calibrations": {
                "Brightness": {"Origin": 0.0, "Scale": 1.0, "Units": ""},
                "Dimension": axes,
            },
            "Data": array,
            "DataType": facts.get("type") or DM_TYPES[array.dtype.name][0],
            "Dimensions": list(facts.get("shape") or array.shape)[::-1],
            "PixelDepth": array.dtype.itemsize,
        },
        "ImageTags": facts.get("tags", {}),
        "Name": facts.get("name", "image"),
    }


def _dm_group(tags, version, is_root=False):
    word = ">q" if version == 4 else ">i"
    items = tags.items() if isinstance(tags, dict) else [("", each) for each in tags]
    body = b"".join(_dm_tag(name, value, version) for name, value in items)
    body = b"\1\0" + struct.pack(word, len(tags)) + body
    return struct.pack(word, len(body)) + body if version == 4 and not is_root else body


def _dm_tag(name, value, version):
    is_group = isinstance(value, dict | list)
    head = struct.pack(">bh", 20 if is_group else 21, len(name)) + name.encode()
    if is_group:
        return head + _dm_group(value, version)
    if isinstance(value, str):
        info, data = [20, 4, len(value)], value.encode("utf-16-le")
    elif isinstance(value, np.ndarray):
        info, data = [20, DM_TYPES[value.dtype.name][1], value.size], value.tobytes()
    elif isinstance(value, float):
        info, data = [7], struct.pack("<d", value)
    else:
        info, data = [5], struct.pack("<I", value)
    word = "q" if version == 4 else "i"
    body = b"%%%%" + struct.pack(f">{len(info) + 1}{word}", len(info), *info) + data
    return head + (struct.pack(">q", len(body)) if version == 4 else b"") + body


def make_ser(frames, scale_m=1e-9, num_announced=None):
    """Return the bytes of a series of TIA, version 0x220, of frames [frames, H, W]."""
    count = num_announced or len(frames)
    head = struct.pack("<HHHIIII", 0x4949, 0x197, 0x220, 0x4122, 0x4152, count, count)
    axis = struct.pack("<IddII", count, 0.0, 1.0, 0, 0) + struct.pack("<I", 0)
    start = len(head) + 12 + len(axis)
    items, offsets = [], []
    position = start + 2 * 8 * len(frames)
    for frame in frames:
        height, width = frame.shape
        item = struct.pack("<ddIddI", 0.0, scale_m, 0, 0.0, scale_m, 0)
        item += struct.pack("<HII", SER_TYPES[frame.dtype.name], width, height)
        item += frame[::-1].tobytes() + struct.pack("<HHI", 0x4152, 0, 0)
        offsets.append(position)
        position += len(item)
        items.append(item)
    tags = [offset + len(item) - 8 for offset, item in zip(offsets, items)]
    table = struct.pack(f"<{2 * len(frames)}Q", *offsets, *tags)
    return head + struct.pack("<QI", start, 1) + axis + table + b"".join(items)


def make_mrc(array, cell_angstrom=None, order="<", stamp=None, shape=None, imod=None):
    """Return the bytes of an MRC file of [H, W] or [frames, H, W]."""
    depth, height, width = shape or (1, *array.shape)[-3:]
    head = bytearray(1024)
    cell = cell_angstrom or (0.0, 0.0, 0.0)
    mode = MRC_MODES[array.dtype.name]
    struct.pack_into(f"{order}10I", head, 0, width, height, depth, mode, 0, 0, 0, width, height, 1)
    struct.pack_into(f"{order}3f", head, 40, *cell)
    struct.pack_into(f"{order}I", head, 108, 20140)
    if imod is not None:
        struct.pack_into(f"{order}II", head, 152, 1146047817, imod)
    head[208:216] = b"MAP " + (stamp or (b"\x44\x44\0\0" if order == "<" else b"\x11\x11\0\0"))
    return bytes(head) + array.astype(array.dtype.newbyteorder(order)).tobytes()


def write_velox(path, images, units="m"):
    """Write an EMD file as Velox lays it out: {title: (array [H, W, frames], metres a pixel)}."""
    import h5py

    def text(value):
        data = json.dumps(value).encode()
        return np.frombuffer(data.ljust(len(data) + 1, b"\0"), np.uint8)

    with h5py.File(path, "w") as file:
        strings = h5py.string_dtype()
        version = json.dumps({"format": "Velox", "version": "10"})
        file.create_dataset("Version", data=[version.encode()], dtype=strings)
        for i, (title, (array, scale)) in enumerate(images.items()):
            group = file.create_group(f"Data/Image/{i:032x}")
            group.create_dataset("Data", data=array, chunks=(*array.shape[:2], 1))
            metadata = {
                "Core": {},
                "Instrument": {"InstrumentClass": "Talos"},
                "Acquisition": {"AcquisitionStartDatetime": {"DateTime": "1500000000"}},
                "Optics": {"AccelerationVoltage": "200000", "NominalMagnification": "40000"},
                "Scan": {"FrameTime": "0.5"},
                "Stage": {},
                "Detectors": {"Detector-0": {"DetectorName": title, "ExposureTime": "0.5"}},
                "BinaryResult": {
                    "PixelSize": {"width": scale, "height": scale},
                    "Offset": {"x": 0.0, "y": 0.0},
                    "PixelUnitX": units,
                    "DetectorIndex": 0,
                },
            }
            column = np.zeros((60000, array.shape[2]), np.uint8)
            data = text(metadata)
            column[: len(data)] = data[:, None]
            group.create_dataset("Metadata", data=column)
            detector = {"dataPath": f"/Data/Image/{i:032x}", "detector": title}
            operations = file.require_group("Operations/StemInputOperation")
            operations.create_dataset(f"{i}", data=[json.dumps(detector).encode()], dtype=strings)


def write_hspy(path, array, units, navigate=(), title="", signal_type=""):
    """Write a file of HyperSpy with an array whose axes have a scale of 0.5 and the given units."""
    from rsciio.hspy import file_writer

    axes = [
        {
            "name": f"axis {i}",
            "size": size,
            "index_in_array": i,
            "scale": 0.5,
            "offset": 0.0,
            "units": unit,
            "navigate": i in navigate,
            "_type": "UniformDataAxis",
        }
        for i, (size, unit) in enumerate(zip(array.shape, units))
    ]
    signal = {
        "data": array,
        "axes": axes,
        "metadata": {"General": {"title": title}, "Signal": {"signal_type": signal_type}},
        "original_metadata": {},
        "attributes": {"_lazy": False, "ragged": False},
        "learning_results": {},
        "tmp_parameters": {},
        "models": {},
        "package_info": {"package": "", "package_version": ""},
    }
    file_writer(str(path), signal)

"""Read every microscope file of a folder by em_data, by RosettaSciIO and by ncempy, and compare.

    python benchmarks/microscope_files.py FOLDER [--ncempy PYTHON]

An image is equal if its pixels are, value by value, up to a flip and an exchange of rows and
columns, in which the readers' conventions differ. Pixel sizes are equal within 0.01 %. Prints
tables in Markdown. PYTHON is the interpreter of an environment that holds ncempy.
"""

import argparse
import hashlib
import importlib
import json
import re
import subprocess
import tempfile
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np

from em_data.formats import Refusal, decode
from em_data.formats.microscopes import SUFFIXES
from em_data.formats.microscopes.reader import HDF5, quiet
from em_data.metadata import unit_to_nm

OTHER_MODULES = {".emd": "emd", ".de5": "emd", ".hspy": "hspy", ".hdf5": "hspy", ".nxs": "nexus"}
READ_BY_NCEMPY = (".dm3", ".dm4", ".ser", ".emd", ".mrc", ".rec", ".st", ".ali")
WITH_NCEMPY = """
import json, sys, warnings
import numpy as np
import ncempy.io
warnings.simplefilter("ignore")
for line in sys.stdin:
    path, target = json.loads(line)
    try:
        found = ncempy.io.read(path)
        np.save(target, found["data"])
        units, sizes = found.get("pixelUnit"), found.get("pixelSize")
        units = [units] * len(sizes) if isinstance(units, str) else list(units)
        answer = [[float(each) for each in sizes], [str(each) for each in units]]
    except Exception as error:
        answer = str(error)[:100] or type(error).__name__
    print("ANSWER" + json.dumps(answer), flush=True)
"""


def hash_image(image):
    """Return a hash that flips and an exchange of rows and columns do not change."""
    image = np.asarray(image)
    image = image.astype(image.dtype.newbyteorder("="))
    views = [view[::i, ::k] for view in (image, image.T) for i in (1, -1) for k in (1, -1)]
    texts = (f"{view.shape} {view.dtype}".encode() + view.tobytes() for view in views)
    return min(hashlib.sha256(text).digest() for text in texts)


def hash_slices(array):
    """Return the hashes of all images in an array: along any of three axes, else the last two."""
    array = np.asarray(array)
    if array.dtype.names:
        array = array[array.dtype.names[0]]
    if array.ndim > 2:
        array = array.squeeze()
    if array.ndim < 2 or array.size > 10**8:
        return set()
    if array.ndim == 2:
        return {hash_image(array)}
    if array.ndim > 3:
        return {hash_image(image) for image in array.reshape(-1, *array.shape[-2:])}
    slices = (np.moveaxis(array, axis, 0) for axis in range(3))
    return {hash_image(image) for images in slices for image in images}


def read_with_rosettasciio(path, form):
    """Return [(hashes of its images, sizes of a pixel in nm)] of a file; [] if it raises."""
    module = OTHER_MODULES.get(path.suffix.lower(), "hspy") if form is HDF5 else form.module
    options = {"lazy": False} | ({"load_SI_image_stack": True} if module == "emd" else {})
    with quiet():
        try:
            signals = importlib.import_module(f"rsciio.{module}").file_reader(str(path), **options)
        except Exception:
            return []
    found = []
    for signal in signals:
        sizes = {
            float(round(abs(axis["scale"]) * factor, 12))
            for axis in signal["axes"]
            if (factor := unit_to_nm(axis.get("units") or ""))
        }
        found.append((hash_slices(signal["data"]), sizes))
    return found


class Ncempy:
    """ncempy in a process of its own."""

    def __init__(self, python):
        command = [python, "-c", WITH_NCEMPY]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def read(self, path):
        """Return (hashes of the images, sizes of a pixel in nm), or the error as text."""
        target = Path(tempfile.gettempdir(), f"ncempy_{self.process.pid}.npy")
        self.process.stdin.write(json.dumps([str(path), str(target)]) + "\n")
        self.process.stdin.flush()
        line = next(each for each in self.process.stdout if each.startswith("ANSWER"))
        answer = json.loads(line.removeprefix("ANSWER"))
        if isinstance(answer, str):
            return answer
        data = np.load(target)
        target.unlink()
        factors = [unit_to_nm(unit) for unit in answer[1]]
        return hash_slices(data), {size * f for size, f in zip(answer[0], factors) if f}


def is_equal(size, others):
    """Return True if a size is one of the others, or both are unknown."""
    if size is None:
        return not others
    return any(abs(size - other) < 1e-4 * size for other in others)


def compare_file(path, ncempy):
    """Return what the readers make of a file, as counts, and sentences on differences."""
    counts, remarks = Counter(files=1), []
    try:
        images = list(decode(path))
    except Refusal as refusal:
        counts["skipped"] = 1
        return counts, [], str(refusal)
    counts["read"], counts["images"] = 1, len(images)
    direct = read_with_rosettasciio(path, SUFFIXES[path.suffix.lower()])
    other = ncempy.read(path) if ncempy and path.suffix.lower() in READ_BY_NCEMPY else None
    if isinstance(other, tuple):
        counts["read by ncempy"] = 1
    elif isinstance(other, str):
        remarks.append(f"ncempy: {other}")
    for image in images:
        array = image.array if image.array.ndim == 2 else image.array[..., 0]
        key, size = hash_image(array), image.pixel_size_nm
        same = [sizes for hashes, sizes in direct if key in hashes]
        counts["pixels as RosettaSciIO"] += bool(same)
        if any(is_equal(size, sizes) for sizes in same):
            counts["size as RosettaSciIO"] += 1
        else:
            remarks.append(f"size {size} nm, RosettaSciIO {same}; {image.metadata['notices']}")
        if isinstance(other, tuple) and key in other[0]:
            counts["pixels as ncempy"] += 1
            if is_equal(size, other[1]):
                counts["size as ncempy"] += 1
            else:
                remarks.append(f"size {size} nm, ncempy {sorted(other[1])}")
        elif isinstance(other, tuple):
            remarks.append("the image is not among ncempy's, which reads one of a file")
    return counts, list(dict.fromkeys(remarks)), None


def print_table(head, rows):
    print("|", " | ".join(head), "|")
    print("|", " | ".join(["---"] + ["---:"] * (len(head) - 1)), "|")
    for row in rows:
        print("|", " | ".join(map(str, row)), "|")
    print()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--ncempy", metavar="PYTHON")
    args = parser.parse_args()
    ncempy = Ncempy(args.ncempy) if args.ncempy else None
    totals, reasons, differences = defaultdict(Counter), Counter(), []
    for path in sorted(args.folder.rglob("*")):
        if path.suffix.lower() not in SUFFIXES or not path.is_file():
            continue
        counts, remarks, reason = compare_file(path, ncempy)
        totals[path.suffix.lower()] += counts
        differences += [(path.name, remark) for remark in remarks]
        if reason:
            # numbers and names differ from file to file, the kind of the reason does not
            kind = re.sub(r" \(.*?\)|: .*|[.,].*", "", reason)
            reasons[path.suffix.lower(), kind] += 1
    columns = ["files", "skipped", "read", "images", "pixels as RosettaSciIO"]
    columns += ["size as RosettaSciIO", "read by ncempy", "pixels as ncempy", "size as ncempy"]
    print_table(
        ["suffix", *columns],
        [[suffix, *(counts[each] for each in columns)] for suffix, counts in totals.items()],
    )
    print_table(
        ["skipped", "suffix", "files"],
        [[kind, suffix, num] for (suffix, kind), num in sorted(reasons.items())],
    )
    print_table(["difference", "file"], [[remark, name] for name, remark in differences])


if __name__ == "__main__":
    main()

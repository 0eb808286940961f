"""Copy a folder of labelled images without some of them."""

import json
import shutil
from pathlib import Path, PurePosixPath

from em_data.files import write_atomically

FOLDERS = ("images", "masks", "semantic", "records", "labels")


def keep_images(source: Path, target: Path, dropped: set[str]) -> int:
    """Copy the images and labels of a folder, all but those of `dropped`.

    Files of labels follow their image by name: masks/, semantic/, records/ and labels/, and the
    entries of labels/coco.json and metadata.jsonl. What else is in the folder is copied.

    Args:
        source: A folder as generate.py --pairs or em_data.synthetic writes it.
        target: A folder that does not exist yet.
        dropped: Paths of images in `source`, such as "images/000003.png".

    Returns:
        Number of images that were copied.

    Raises:
        ValueError: The target exists, or an image is not in the folder images/.
    """
    if target.exists():
        raise ValueError(f"{target} exists. Use --keep-in with a new folder, or delete it.")
    stems = {_get_stem(name) for name in dropped}
    elsewhere = [name for name in dropped if not (source / name).is_file()]
    if elsewhere or not (source / "images").is_dir():
        raise ValueError(
            f"{source} has no folder images/ with labels beside it. Give a folder of generate.py "
            "--pairs with --format png or tiff."
        )

    def list_ignored(folder, names):
        path = Path(folder).relative_to(source)
        if not path.parts or path.parts[0] not in FOLDERS:
            return [name for name in names if name.endswith("-preview.png")]
        inside = PurePosixPath(*path.parts[1:])
        return [name for name in names if (inside / name).with_suffix("").as_posix() in stems]

    shutil.copytree(source, target, ignore=list_ignored)
    _filter_coco(target / "labels" / "coco.json", stems)
    _filter_lines(target / "metadata.jsonl", stems)
    return sum(path.is_file() for path in (target / "images").rglob("*"))


def _get_stem(name: str) -> str:
    """Return the path of an image below images/, without its suffix."""
    parts = PurePosixPath(name).parts
    parts = parts[1:] if parts[0] == "images" else parts
    return PurePosixPath(*parts).with_suffix("").as_posix()


def _filter_coco(path, stems):
    if not path.is_file():
        return
    coco = json.loads(path.read_text())
    coco["images"] = [each for each in coco["images"] if _get_stem(each["file_name"]) not in stems]
    kept = {each["id"] for each in coco["images"]}
    coco["annotations"] = [each for each in coco["annotations"] if each["image_id"] in kept]
    write_atomically(path, json.dumps(coco) + "\n")


def _filter_lines(path, stems):
    if not path.is_file():
        return
    lines = path.read_text().splitlines()
    kept = [line for line in lines if _get_stem(json.loads(line)["file_name"]) not in stems]
    write_atomically(path, "".join(f"{line}\n" for line in kept))

"""A folder of micrographs -> a data set on the Hub, without a loss: `python -m em_data.push FOLDER REPO`."""

import dataclasses
import io
import json
import re
import sys
import tempfile
from pathlib import Path

import numpy as np
import PIL.Image
import tyro
from huggingface_hub import DatasetCardData
from tqdm.auto import tqdm

from em_data.config import DataConfig
from em_data.files import find_cache_dir
from em_data.sources import open_source
from em_hub.transport import check_dry_run_folder, find_account, upload_folder

SHARD_BYTES = 256 * 2**20
ROW_GROUP_BYTES = 32 * 2**20  # what a stream of a set holds in memory


@dataclasses.dataclass(frozen=True)
class PushConfig:
    """Publish a folder of micrographs as a data set on the Hub: Parquet, every grey level of 8 or 16 bits as it is.

    A folder that also holds labels/coco.json and masks/, as em_data.labels writes them, is published with boxes and masks.
    `--data hub:owner/name` of the trainings reads it, labels included; `--data hub-stream:owner/name` keeps none of it on the disk.
    """

    folder: str
    """Folder of micrographs (TIFF, PNG, JPEG, BMP)."""
    repo: str
    """The data set's name: owner/name, or name for one's own. Made where there is none."""
    private: bool = False
    """Show a new data set to its owner alone."""
    revision: str | None = None
    """A branch to publish to, made where there is none; left out, main."""
    token: str | None = None
    """A token with write rights; left out, that of HF_TOKEN or of `hf auth login`."""
    license: str | None = None
    """Licence by its name on the Hub, such as cc-by-4.0; left out, the card says that none is stated."""
    specimen_pattern: str | None = None
    """Regular expression whose first group (or whole match) in a file's path names its specimen; otherwise its folder does."""
    dry_run: str | None = None
    """Write the data set into this new folder, and upload nothing."""


def push_folder(config: PushConfig, *, say=lambda text: print(text, file=sys.stderr)) -> str:
    """Write the data set of a folder and upload it in one commit; return its page's address, or the folder of a dry run.

    Raises `ValueError` that names an image which cannot be read: a data set is whole or not published.
    """
    if config.license is not None and not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", config.license):
        raise ValueError(
            f"--license {config.license} is no licence's name on the Hub; write it as cc-by-4.0 or other"
        )
    if config.dry_run is not None:
        out = check_dry_run_folder(config.dry_run)
        write_dataset(config, out, say)
        return str(out)
    repo_id = find_account(config.repo, config.token)
    with tempfile.TemporaryDirectory(prefix="em-push-") as temporary:
        write_dataset(config, Path(temporary), say)
        upload = upload_folder(
            temporary,
            repo_id,
            kind="dataset",
            private=config.private,
            revision=config.revision,
            token=config.token,
            message="Publish micrographs",
            check=refuse_other_content,
            is_replaced=lambda path: path.startswith("data/train-"),
        )
    say(
        f"{upload.url} (commit {upload.commit[:8]}), verified; read it with --data hub:{upload.repo_id}"
    )
    return upload.url


def refuse_other_content(api, repo_id, paths, revision):
    """Refuse a data set that was not written by this."""
    if not any(path.startswith("data/train-") for path in paths):
        raise ValueError(
            f"{repo_id} holds something else ({', '.join(sorted(paths)[:3])}); choose another name"
        )


def write_dataset(config: PushConfig, out: Path, say) -> None:
    """Write data/train-*.parquet and README.md into `out`."""
    import datasets

    settings = DataConfig(
        on_bad_image="fail", label_bar="keep", specimen_pattern=config.specimen_pattern
    )
    source = open_source(config.folder, settings, find_cache_dir())
    for sentence in source.ignored:
        say(sentence)
    labels = read_labels(Path(config.folder))
    features = {
        "image": datasets.Image(),
        "name": datasets.Value("string"),
        "specimen": datasets.Value("string"),
    }
    features |= {"pixel_size_nm": datasets.Value("float64"), "bits": datasets.Value("int8")}
    if labels is not None:
        objects = {
            "kind": datasets.Value("string"),
            "box_px": datasets.List(datasets.Value("int32")),
        }
        objects |= {
            "diameter_nm": datasets.Value("float64"),
            "length_nm": datasets.Value("float64"),
        }
        objects |= {
            "runs": datasets.List(datasets.Value("int32")),
            "attributes": datasets.Value("string"),
        }
        features |= {"objects": datasets.List(objects), "mask": datasets.Image()}
    (out / "data").mkdir(parents=True, exist_ok=True)
    rows, size, shards, facts = (
        [],
        0,
        [],
        {"num": 0, "bits": set(), "sizes": set(), "specimens": set(), "objects": 0},
    )

    def close_shard():
        path = out / "data" / f"train-{len(shards):05d}.parquet"
        columns = {key: [row[key] for row in rows] for key in features}
        dataset = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
        dataset.to_parquet(str(path), batch_size=max(1, len(rows) * ROW_GROUP_BYTES // size))
        shards.append(path)
        rows.clear()

    for entry in tqdm(
        source.entries, desc="micrographs", unit="img", disable=not sys.stderr.isatty()
    ):
        micrograph = entry.read()
        row = make_row(entry, micrograph, labels, Path(config.folder))
        size += sum(len(row[key]["bytes"]) for key in ("image", "mask") if row.get(key))
        rows.append(row)
        facts["num"] += 1
        facts["bits"].add(row["bits"])
        facts["sizes"].add(micrograph.pixel_size_nm)
        facts["specimens"].add(micrograph.specimen)
        facts["objects"] += len(row.get("objects", ()))
        if size > SHARD_BYTES:
            close_shard()
            size = 0
    if rows:
        close_shard()
    (out / "README.md").write_text(make_card(config, source.name, facts, labels is not None))


def make_row(entry, micrograph, labels, folder) -> dict:
    """One micrograph as a row: its pixels as PNG, which loses nothing of 8 or 16 bits."""
    row = {"image": {"bytes": encode_png(micrograph.image), "path": None}, "name": entry.name}
    row |= {
        "specimen": micrograph.specimen,
        "pixel_size_nm": micrograph.pixel_size_nm,
        "bits": 8 * micrograph.image.itemsize,
    }
    if labels is None:
        return row
    name = entry.name.removeprefix("images/")
    if name not in labels:
        raise ValueError(
            f"{entry.name} is not among the images of labels/coco.json; label it or take it away"
        )
    mask = folder / "masks" / name
    return row | {
        "objects": labels[name],
        "mask": {"bytes": mask.read_bytes(), "path": None} if mask.is_file() else None,
    }


def encode_png(image: np.ndarray) -> bytes:
    """uint8 or uint16 [H, W] as a PNG of as many bits."""
    buffer = io.BytesIO()
    PIL.Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


def read_labels(folder: Path) -> dict | None:
    """Return {image's name below images/: its objects} of labels/coco.json; None where there is none.

    An object: kind, box_px (x0, y0, x1, y1; the last two exclusive), diameter_nm, length_nm, runs (COCO's uncompressed run
    lengths of its mask, column by column; None where the labels have another form), attributes (JSON).
    """
    path = folder / "labels" / "coco.json"
    if not path.is_file():
        return None
    coco = json.loads(path.read_text())
    kinds = {each["id"]: each["name"] for each in coco["categories"]}
    names = {each["id"]: each["file_name"] for each in coco["images"]}
    objects = {name: [] for name in names.values()}
    for each in coco["annotations"]:
        x, y, width, height = (round(number) for number in each["bbox"])
        runs = (
            each["segmentation"].get("counts")
            if isinstance(each.get("segmentation"), dict)
            else None
        )
        objects[names[each["image_id"]]].append(
            {
                "kind": kinds[each["category_id"]],
                "box_px": [x, y, x + width, y + height],
                "diameter_nm": each.get("diameter_nm"),
                "length_nm": each.get("length_nm"),
                "runs": runs if isinstance(runs, list) else None,
                "attributes": json.dumps(each.get("attributes") or {}),
            }
        )
    return objects


def make_card(config: PushConfig, name: str, facts: dict, has_labels: bool) -> str:
    """Return the text of the data set's README.md."""
    metadata = DatasetCardData(
        license=config.license or "unknown",
        pretty_name=name,
        tags=["electron-microscopy", "materials-science"],
        configs=[
            {
                "config_name": "default",
                "data_files": [{"split": "train", "path": "data/train-*.parquet"}],
            }
        ],
    )
    sizes = sorted(size for size in facts["sizes"] if size)
    size = (
        "unknown"
        if not sizes
        else f"{sizes[0]:.4g} nm"
        if len(sizes) == 1
        else f"{sizes[0]:.4g} to {sizes[-1]:.4g} nm"
    )
    if None in facts["sizes"] and sizes:
        size += ", of some unknown"
    labels = (
        f"`objects` has the {facts['objects']:,} labelled defects with their boxes in pixels (x0, y0, x1, y1; the last two exclusive), "
        "each with its whole mask as COCO's uncompressed run lengths (`runs`) where the labels have them; `mask` is an instance mask of "
        "16 bits: the matrix is zero, then come the objects in their order, later ones above earlier ones.\n"
    )
    bits = " and ".join(str(each) for each in sorted(facts["bits"]))
    licence = (
        f"{config.license}."
        if config.license
        else "The publisher has not stated one: ask before you use the images."
    )
    return f"""---
{metadata.to_yaml()}
---

# {name}

{facts["num"]:,} electron micrographs of {bits} bits, grey levels as recorded (PNG inside Parquet).

- pixel size: {size} (column `pixel_size_nm`)
- specimens: {len(facts["specimens"] - {None})} named (column `specimen`); split by specimen where frames of one are alike

{labels if has_labels else ""}
`datasets` cuts images of 16 bits to 8 where it decodes them: cast the column with `datasets.Image(decode=False)` and decode its bytes.

## Licence

{licence}
"""


if __name__ == "__main__":
    try:
        push_folder(tyro.cli(PushConfig, config=(tyro.conf.PositionalRequiredArgs,)))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")

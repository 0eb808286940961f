"""Publish a folder of micrographs as a data set on the Hub, without loss.

The command: python -m em_data.push FOLDER REPO
"""

import dataclasses
import re
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Literal

import tyro
from huggingface_hub import DatasetCardData
from tqdm.auto import tqdm

from em_data.config import DataConfig
from em_data.files import find_cache_dir
from em_data.images import encode_png
from em_data.labels import draw_instance_mask, make_objects
from em_data.labels.describe import count_defects, count_labels, describe_found
from em_data.markdown import escape_markdown
from em_data.module_command import run_module
from em_data.sources import check_source, open_source
from em_hub.transport import check_dry_run_folder, find_account, upload_folder

SHARD_BYTES = 256 * 2**20
ROW_GROUP_BYTES = 32 * 2**20  # what a stream of a set holds in memory


@dataclasses.dataclass(frozen=True)
class PushConfig:
    """Publish a folder of micrographs as a data set on the Hub, with 8 or 16 bits as recorded.

    Labels of defects (COCO, YOLO, masks) and classes are published with the micrographs. `--data
    hub:owner/name` trains on them, labels included; `--data hub-stream:owner/name` keeps nothing on
    the disk.
    """

    folder: Annotated[str, tyro.conf.arg(metavar="FOLDER")]
    """Folder of micrographs (TIFF, PNG, JPEG, BMP)."""
    repo: Annotated[str, tyro.conf.arg(metavar="REPO")]
    """Name of the data set: owner/name, or name for your own account. It is made if needed."""
    private: bool = False
    """Make a new data set visible only to its owner."""
    revision: str | None = None
    """Branch to publish to; it is made if needed. Default: main."""
    token: str | None = None
    """Token with write rights. Default: HF_TOKEN, or that of `hf auth login`."""
    license: str | None = None
    """Name of the licence on the Hub, such as cc-by-4.0. Default: none is stated."""
    specimen_pattern: str | None = None
    """Regular expression whose first group (or whole match) in a file's path names its specimen.
    Default: its folder."""
    labels: str = "auto"
    """Labels of defects, as --tiles.labels: auto, none, or the name of a file or folder of them."""
    masks: Literal["auto", "instances", "kinds"] = "auto"
    """What the grey levels of mask images are, as --tiles.masks."""
    classes: str = "auto"
    """Class of each micrograph, as --tiles.classes: auto, none, folder or the name of a column."""
    dry_run: str | None = None
    """Write the data set into this new folder and upload nothing."""


def push_folder(config: PushConfig, *, say=lambda text: print(text, file=sys.stderr)) -> str:
    """Write the data set of a folder and upload it in one commit.

    Returns:
        The address of the data set's page, or the folder of a dry run.

    Raises:
        ValueError: An image cannot be read; the message names it. Nothing is published then.
    """
    if config.license is not None and not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", config.license):
        raise ValueError(
            f"--license {config.license} is no licence's name on the Hub. Write it as cc-by-4.0 or "
            "other."
        )
    check_source(config.folder)
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
    say(f"{upload.url} (commit {upload.commit[:8]}), verified")
    say(f"read it with --data hub:{upload.repo_id}")
    return upload.url


def refuse_other_content(api, repo_id, paths, revision):
    """Refuse to overwrite a data set that this command did not write."""
    if not any(path.startswith("data/train-") for path in paths):
        raise ValueError(
            f"{repo_id} holds something else ({', '.join(sorted(paths)[:3])}). Choose another name."
        )


def write_dataset(config: PushConfig, out: Path, say) -> None:
    """Write data/train-*.parquet and README.md into `out`."""
    settings = DataConfig(
        on_bad_image="fail",
        label_bar="keep",
        specimen_pattern=config.specimen_pattern,
        labels=config.labels,
        masks=config.masks,
        classes=config.classes,
    )
    source = open_source(config.folder, settings, find_cache_dir())
    for sentence in source.ignored:
        say(sentence)
    has_labels = bool(source.labels)
    (out / "data").mkdir(parents=True, exist_ok=True)
    facts, rows, num_bytes, num_shards = [], [], 0, 0
    is_quiet, features = not sys.stderr.isatty(), make_features(has_labels)

    def make_path(shard):
        return out / "data" / f"train-{shard:05d}.parquet"

    for entry in tqdm(source.entries, desc="micrographs", unit="img", disable=is_quiet):
        for micrograph in entry.frames():
            row = make_row(entry, micrograph, has_labels)
            rows.append(row)
            num_bytes += sum(len(row[key]["bytes"]) for key in ("image", "mask") if row.get(key))
            facts.append({key: row[key] for key in ("bits", "pixel_size_nm", "specimen")})
            facts[-1] |= count_defects(micrograph)
            if num_bytes > SHARD_BYTES:
                write_shard(rows, num_bytes, features, make_path(num_shards))
                rows, num_bytes, num_shards = [], 0, num_shards + 1
    if rows:
        write_shard(rows, num_bytes, features, make_path(num_shards))
    for sentence in describe_found(source, facts):
        say(sentence)
    (out / "README.md").write_text(make_card(config, source.name, facts, has_labels))


def make_features(has_labels):
    """Return the columns of the data set."""
    from datasets import Features, Image, List, Value

    text, number = Value("string"), Value("float64")
    columns = {"image": Image(), "name": text, "specimen": text, "pixel_size_nm": number}
    columns["micrograph"] = text  # the file, which frames of a stack share
    columns |= {"class_name": text, "bits": Value("int8")}
    if has_labels:
        integers = List(Value("int32"))
        objects = {"kind": text, "box_px": integers, "diameter_nm": number, "length_nm": number}
        columns["objects"] = List(objects | {"runs": integers, "attributes": text})
        columns["mask"] = Image()
    return Features(columns)


def write_shard(rows, num_bytes, features, path) -> None:
    """Write rows to a Parquet file, in row groups of about `ROW_GROUP_BYTES`."""
    import datasets

    columns = {key: [row[key] for row in rows] for key in features}
    dataset = datasets.Dataset.from_dict(columns, features=features)
    dataset.to_parquet(str(path), batch_size=max(1, len(rows) * ROW_GROUP_BYTES // num_bytes))


def make_row(entry, micrograph, has_labels) -> dict:
    """Return one micrograph of an entry as a row, with its pixels and its mask as PNG.

    A micrograph without labels in a set that has some gets null.
    """
    row = {
        "image": {"bytes": encode_png(micrograph.image), "path": None},
        "name": micrograph.name,
        "micrograph": entry.group,
        "specimen": micrograph.specimen,
        "class_name": micrograph.class_name,
        "pixel_size_nm": micrograph.pixel_size_nm,
        "bits": 8 * micrograph.image.itemsize,
    }
    if not has_labels:
        return row
    if micrograph.defects is None:
        return row | {"objects": None, "mask": None}
    row["objects"] = make_objects(micrograph)
    has_masks = all(each.mask is not None for each in micrograph.defects)
    mask = encode_png(draw_instance_mask(micrograph)) if has_masks else None
    return row | {"mask": mask and {"bytes": mask, "path": None}}


def make_card(config: PushConfig, name: str, facts: list[dict], has_labels: bool) -> str:
    """Return the text of the data set's README.md. facts: one dictionary per micrograph."""
    files = [{"split": "train", "path": "data/train-*.parquet"}]
    metadata = DatasetCardData(
        license=config.license or "unknown",
        pretty_name=name,
        tags=["electron-microscopy", "materials-science"],
        configs=[{"config_name": "default", "data_files": files}],
    )
    bits = " and ".join(str(each) for each in sorted({each["bits"] for each in facts}))
    num_specimens = len({each["specimen"] for each in facts} - {None})
    kinds, classes = count_labels(facts)
    num_labelled = sum(each["defects"] is not None for each in facts)
    labels = f"""
`objects` has the {sum(kinds.values()):,} labelled defects of {num_labelled:,} micrographs
({list_counts(kinds)}): their boxes in pixels (x0, y0, x1, y1; the last two exclusive), and the
whole mask of each as COCO's uncompressed run lengths (`runs`) if the labels have it. It is null for
micrographs without labels. `mask` is an instance mask of 16 bits: 0 for the matrix, k for the k-th
object. Later objects lie on top.
"""
    unstated = "The publisher has not stated one. Ask before you use the images."
    licence = f"{config.license}." if config.license else unstated
    return f"""---
{metadata.to_yaml()}
---

# {escape_markdown(name)}

{len(facts):,} electron micrographs of {bits} bits, grey levels as recorded (PNG inside Parquet).

- pixel size: {describe_sizes(facts)} (column `pixel_size_nm`)
- specimens: {num_specimens} named (column `specimen`). Split by specimen if its frames are alike.
{f"- classes: {list_counts(classes)} (column `class_name`)" if classes else ""}
{labels if has_labels else ""}
`datasets` cuts images of 16 bits to 8 when it decodes them. To keep 16 bits, cast the column with
`datasets.Image(decode=False)` and decode its bytes.

## Licence

{licence}
"""


def list_counts(counts: dict[str, int]) -> str:
    """Return names with their numbers as text."""
    return ", ".join(f"{escape_markdown(name)}: {num:,}" for name, num in counts.items()) or "none"


def describe_sizes(facts) -> str:
    """Return the pixel sizes of the micrographs as text."""
    sizes = {each["pixel_size_nm"] for each in facts}
    known = sorted(size for size in sizes if size)
    if not known:
        return "unknown"
    least, largest = known[0], known[-1]
    text = f"{least:.4g} nm" if len(known) == 1 else f"{least:.4g} to {largest:.4g} nm"
    return text + (", some unknown" if None in sizes else "")


def main():
    options = {"prog": "python -m em_data.push", "config": (tyro.conf.PositionalRequiredArgs,)}
    push_folder(tyro.cli(PushConfig, **options))


if __name__ == "__main__":
    run_module(main)

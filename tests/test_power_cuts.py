"""What a power cut leaves: files that are whole, old or new, and runs that go on."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from em_data import files
from em_evaluation.extractor import Extractor
from em_generation.families import FAMILIES
from em_generation.generate import GenerationConfig
from em_generation.loading import hash_weight_files
from em_generation.shards.check import check_shards, find_fault
from em_generation.shards.features import write_features
from em_generation.shards.plan import ShardOptions, read_plan
from em_generation.shards.work import generate_shard
from em_generation.store import ArrowStore, FileStore, remove_remains
from em_training import list_checkpoints, load_checkpoint, read_best, read_stats, save_checkpoint
from em_training.best_weights import save_best
from support.faults import list_states, replace_by
from support.models import make_stylegan
from support.toy_loop import train


class Model:
    """Saves one number in two files."""

    def __init__(self, number):
        self.number = number

    def save_pretrained(self, folder):
        (folder / "part").mkdir(parents=True)
        for path in (folder / "weights", folder / "part" / "weights"):
            path.write_text(str(self.number))


def read_model(folder):
    """Return the number of a saved model; None if there is none."""
    if not folder.exists():
        return None
    a, b = (path.read_text() for path in (folder / "weights", folder / "part" / "weights"))
    assert a == b
    return int(a)


def write_file(root, number):
    files.write_atomically(root / "new" / "folder" / "x.json", json.dumps(number))


def read_file(root):
    path = root / "new" / "folder" / "x.json"
    return json.loads(path.read_text()) if path.exists() else None


def replace_model(root, number):
    with files.replace_folder(root / "model") as folder:
        Model(number).save_pretrained(folder)


def build_model(root, number):
    with files.build_folder(root / f"{number}") as folder:
        Model(number).save_pretrained(folder)


def read_built(root):
    numbers = [read_model(path) for path in root.iterdir() if path.name.isdigit()]
    return max(numbers, default=None)


def write_checkpoint(root, number):
    save_checkpoint(root / "checkpoints", number, {"n": torch.tensor([number])})


def read_checkpoint(root):
    paths = list_checkpoints(root / "checkpoints")
    return int(load_checkpoint(paths[-1])["n"]) if paths else None


def write_best(root, number):
    save_best(Model(number), root, {"number": number}, "model")


def read_best_model(root):
    record = read_best(root)
    if record is None:
        return None
    assert read_model(root / "best" / "model") == record["number"]
    return record["number"]


WRITERS = {
    "file": (write_file, read_file, {1}),
    "replaced folder": (replace_model, lambda root: read_model(root / "model"), {None, 1}),
    "built folder": (build_model, read_built, {1}),
    "checkpoint": (write_checkpoint, read_checkpoint, {1}),
    "best weights": (write_best, read_best_model, {1}),
}


@pytest.mark.parametrize("name", WRITERS)
def test_what_is_written_is_old_or_new_after_a_power_cut_and_then_new(tmp_path, name):
    """At each moment; `build` and `replace` have none for a moment where the table says so."""
    write, read, before = WRITERS[name]
    for old, allowed in ((None, {None}), (1, before)):
        root, states = tmp_path / f"root-{old}", tmp_path / f"states-{old}"
        root.mkdir()
        if old is not None:
            write(root, old)
        found = list_states(root, lambda root=root: write(root, 2), states)
        assert len(found) > 12
        seen = []
        for state in found:
            seen.append(read(state))
            assert seen[-1] in allowed | {2}, f"{state.name}: {seen[-1]}"
        assert seen[-3:] == [2, 2, 2], found[-3:]


@pytest.mark.parametrize("kind", ["png", "arrow"])
def test_images_are_whole_or_missing_after_a_power_cut(tmp_path, kind):
    root = tmp_path / "images"
    root.mkdir()

    def open_store(folder):
        if kind == "png":
            return FileStore(folder, "png", 8, None)
        return ArrowStore(folder, 8, None)

    images = torch.from_numpy(np.linspace(-1, 1, 3 * 64, dtype=np.float32).reshape(3, 1, 8, 8))

    def write(folder):
        store = open_store(folder)
        missing = store.share(store.find_missing(3), 0, 1)
        store.write(missing, images[missing])
        store.finish()

    found = list_states(root, lambda: write(root), tmp_path / "states")
    whole = {path.name: path.read_bytes() for path in root.iterdir()}
    for state in found:
        remove_remains(state)
        write(state)
        for name, content in whole.items():
            assert (state / name).read_bytes() == content, f"{state.name}: {name}"
    assert not open_store(found[-1]).find_missing(3)


class Means(Extractor):
    name, identity, num_features = "means", "means", 4

    def _features(self, images):
        return torch.nn.functional.adaptive_avg_pool2d(images, 2).flatten(1)


@pytest.mark.parametrize("format", ["arrow", "webdataset"])
def test_shards_and_features_are_whole_or_missing_after_a_power_cut(tmp_path, format):
    """And the same commands then write what is missing, to the same bytes."""
    model, root = tmp_path / "model", tmp_path / "out"
    make_stylegan().save_pretrained(model)
    root.mkdir()
    options = {"num_images": 3, "batch_size": 4, "precision": "no", "format": format}
    shards = ShardOptions("1/1", images_per_file=2)
    config = GenerationConfig(str(model), str(root), shards=shards, **options)

    def write():
        generate_shard(config, command="python generate.py")
        write_features(root, "1/1", [Means()])

    def read():
        paths = [path for path in root.rglob("*") if path.is_file()]
        return {
            str(path.relative_to(root)): path.read_bytes()
            for path in paths
            # marks tell the seconds; remains of a cut are hidden
            if path.parent.name != "done" and path.name[0] != "."
        }

    found = list_states(root, write, tmp_path / "states", every=4)
    whole = read()
    assert len(found) > 25
    for state in found:
        replace_by(root, state)
        if (root / "generation.json").exists():
            for name in check_shards(root).doubled:
                pytest.fail(f"{state.name}: {name}")
            plan = read_plan(root)
            for file in plan.list_marked():
                assert find_fault(plan, file, reads_numbers=True) is None, state.name
        write()
        assert check_shards(root).is_whole, state.name
        assert not check_shards(root).remains, state.name
        assert read() == whole, state.name


def test_a_training_goes_on_after_a_power_cut_at_any_moment(tmp_path):
    """To the same weights and the same log."""
    root, states = tmp_path / "run", tmp_path / "states"
    root.mkdir()
    whole = {}
    found = list_states(root, lambda: whole.update(train(root, 48)), states, every=4)
    log = [line["loss"] for line in read_stats(root / "toy")]
    assert len(found) >= 60
    newest = {}
    for state in found:
        paths = list_checkpoints(state / "toy/checkpoints")
        kind = state.name.rpartition("-")[2]
        count = int(paths[-1].name) if paths else 0
        assert count >= newest.get(kind, 0), f"{state.name} lost a checkpoint"
        newest[kind] = count
    assert set(newest.values()) == {48}
    for state in found[:: len(found) // 20]:
        replace_by(root, state)
        resumed = train(root, 48)
        for part in ("model", "ema"):
            for name, value in whole[part].items():
                assert torch.equal(torch.as_tensor(resumed[part][name]), torch.as_tensor(value))
        assert [line["loss"] for line in read_stats(root / "toy")] == log, state.name
    shutil.rmtree(states)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run of two families with preset test, as {family's name: (family, config)}."""
    runs = {}
    folder = tmp_path_factory.mktemp("runs")
    for family in FAMILIES:
        if family.name not in ("ldm", "stylegan"):
            continue
        config = family.import_presets()["test"]()
        tiles = replace(config.tiles, cache_dir=str(folder / "cache"))
        config = replace(config, out=str(folder / family.name), tiles=tiles)
        family.import_train()(config)
        runs[family.name] = family, config
    return runs


@pytest.mark.parametrize(
    "content", [b"", b"{", b"\0" * 100, b"[]"], ids=["empty", "cut", "zeros", "list"]
)
@pytest.mark.parametrize(
    ("name", "path", "message"),
    [
        ("ldm", "config.json", r"config\.json.*(Remove it to go on|start a new run)"),
        ("ldm", "data.json", r"data\.json is damaged.*Remove it to go on"),
        ("ldm", "denoiser/result.json", r"result\.json is damaged.*Remove it"),
        ("ldm", "run.json", None),
        ("ldm", "grain/measured.json", None),
        ("ldm", "latents/train-*.npy", None),
        ("ldm", "latents/train-*.json", None),
        ("stylegan", "config.json", r"config\.json.*(Remove it to go on|start a new run)"),
        ("stylegan", "run.json", None),
    ],
)
def test_a_damaged_file_of_a_run_is_named_or_made_again(finished, name, path, message, content):
    family, config = finished[name]
    out = Path(config.out)
    (path,) = out.glob(path)
    before, weights = path.read_bytes(), hash_weight_files(out / "pipeline")
    path.write_bytes(content)
    try:
        if message:
            with pytest.raises(ValueError, match=message):
                family.import_train()(config)
            path.unlink()
        family.import_train()(config)
        if path.suffix == ".npy":
            assert path.read_bytes() == before
        assert hash_weight_files(out / "pipeline") == weights
        assert path.exists()
    finally:
        path.write_bytes(before)


@pytest.mark.parametrize("file", ["tensors.safetensors", "state.json", "checksums.json"])
def test_one_flipped_bit_in_a_checkpoint_is_found(tmp_path, file):
    path = save_checkpoint(tmp_path, 1, {"a": torch.zeros(1000), "b": 0.5, "c": "text"})
    whole = (path / file).read_bytes()
    rng = np.random.default_rng(0)
    for position in rng.integers(0, len(whole), 40):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << int(rng.integers(0, 7))
        (path / file).write_bytes(damaged)
        with pytest.raises(ValueError, match="is damaged"):
            load_checkpoint(path)

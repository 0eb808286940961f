"""Repositories and runs of others: damaged or hostile, they end in a sentence, and at once."""

import dataclasses
import importlib
import json
import time

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from safetensors.torch import load_file, save_file

from em_diffusion.load_autoencoder import load_autoencoder
from em_diffusion.samplers import SAMPLERS, create_sampler
from em_generation.candidates import Candidate
from em_generation.evaluate import EvaluationConfig, find_data
from em_generation.generate import GenerationConfig, generate_images
from em_generation.loading import is_public, read_model
from em_hub.publish import PublishConfig, publish_run
from em_stylegan.pictures.styles import load_pipeline
from em_training.cli import run_command
from em_training.memory import is_out_of_memory
from em_training.saved_models import explain_failure
from support.models import MAKERS

WEIGHTS = "diffusion_pytorch_model.safetensors"
PARTS = {"ldm": "unet", "stylegan": "generator"}
HUGE = 10**9


@pytest.fixture(params=MAKERS)
def folder(request, tmp_path):
    MAKERS[request.param]().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def part(folder):
    return folder / next(name for name in PARTS.values() if (folder / name).is_dir())


@pytest.fixture
def ldm(tmp_path):
    MAKERS["ldm"]().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def change(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def change_weights(part, edit):
    save_file(edit(load_file(part / WEIGHTS)), part / WEIGHTS)


def refuse(folder, message):
    """The model is refused in a sentence, in seconds."""
    start = time.monotonic()
    with pytest.raises(ValueError, match=message):
        read_model(str(folder)).load()
    assert time.monotonic() - start < 20


def test_a_sound_model_loads(folder):
    assert read_model(str(folder)).load() is not None


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_model_with_any_of_our_samplers_loads(tmp_path, name):
    pipeline = MAKERS["ldm"]()
    if SAMPLERS[name].diffusion is None:
        pipeline.scheduler = FlowMatchEulerDiscreteScheduler()
    pipeline.scheduler = create_sampler(name, pipeline.scheduler)
    pipeline.save_pretrained(tmp_path)
    loaded = read_model(str(tmp_path)).load()
    assert type(loaded.scheduler).__name__ == SAMPLERS[name].scheduler


@pytest.mark.parametrize(
    "text", ["[]", "5", "{}", "null", "", '{"_class_name": []}', '{"_class_name": {}}', "[" * 10**5]
)
def test_a_damaged_index_is_named(folder, text):
    (folder / "model_index.json").write_text(text)
    refuse(folder, r"model_index\.json is damaged")


@pytest.mark.parametrize("value", [5, None, [], [None, None], ["a"], ["a", 5], "a"])
def test_an_index_without_a_component_is_named(folder, part, value):
    change(folder / "model_index.json", **{part.name: value})
    refuse(folder, r"must be a module and a class|which this version does not have")


@pytest.mark.parametrize("value", ["x", [1], {}, float("nan"), True])
def test_a_pixel_size_is_a_number(folder, value):
    change(folder / "model_index.json", pixel_size_nm=value)
    refuse(folder, r"pixel_size_nm is .*must be a|damaged: pixel_size_nm")


@pytest.mark.parametrize("value", [5, None, [None], "a"])
@pytest.mark.parametrize("name", ["grain", "guide"])
def test_a_part_that_may_be_absent_is_a_module_and_a_class(ldm, name, value):
    change(ldm / "model_index.json", **{name: value})
    refuse(ldm, f"{name} is .* but must be a module and a class")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("pixel_size_nm", 0),
        ("pixel_size_nm", -5),
        ("default_num_inference_steps", None),
        ("default_num_inference_steps", 0),
        ("default_num_inference_steps", 10**12),
        ("guidance_scale", None),
        ("guidance_scale", 1e300),
        ("guidance_start", -1),
        ("guidance_stop", 1.5),
    ],
)
def test_an_option_beyond_its_range_is_named(ldm, name, value):
    change(ldm / "model_index.json", **{name: value})
    refuse(ldm, rf"model_index\.json: {name} is .*, but must be a number from")


@pytest.mark.parametrize("text", ["[]", "5", "null", "", "[" * 10**5])
def test_a_damaged_config_is_named(folder, part, text):
    (part / "config.json").write_text(text)
    refuse(folder, r"config\.json is damaged")


@pytest.mark.parametrize(
    "values",
    [
        {"layers_per_block": HUGE},
        {"layers_per_block": 10**6},
        {"block_out_channels": [HUGE, HUGE]},
        {"block_out_channels": [8] * 10**5, "down_block_types": ["DownBlock2D"] * 10**5},
        {"block_out_channels": [0, 0]},
        {"layers_per_block": "x"},
        {"layers_per_block": 2},
        {"num_attention_heads": 0},
        {"norm_num_groups": 0},
        {"act_fn": "absent"},
        {"down_block_types": ["X", "Y"]},
        {"sample_size": HUGE},
        {"dropout": float("inf")},
    ],
    ids=lambda values: str(values)[:40],
)
def test_an_impossible_denoiser_is_refused(ldm, values):
    change(ldm / "unet" / "config.json", **values)
    refuse(ldm, r"unet")


@pytest.mark.parametrize(
    "values",
    [
        {"mapping_depth": HUGE},
        {"mapping_depth": 10**6},
        {"mapping_depth": 3},
        {"max_channels": HUGE, "channel_base": HUGE},
        {"resolution": 2**40},
        {"resolution": 0},
        {"resolution": "x"},
        {"z_dim": 10**12},
        {"w_dim": 16},
        {"num_classes": 10**10},
        {"channel_base": -5},
    ],
    ids=str,
)
def test_an_impossible_generator_is_refused(tmp_path, values):
    MAKERS["stylegan"]().save_pretrained(tmp_path)
    change(tmp_path / "generator" / "config.json", **values)
    refuse(tmp_path, r"generator")
    with pytest.raises(ValueError, match="generator"):
        load_pipeline(tmp_path)


@pytest.mark.parametrize(
    ("part", "values"),
    [
        ("vqvae", {"num_vq_embeddings": 10**12}),
        ("vqvae", {"layers_per_block": HUGE}),
        ("vqvae", {"latent_channels": 0}),
        ("vqvae", {"latents_std": [float("nan"), 1.0]}),
        ("guide", {"layers_per_block": HUGE}),
        ("guide", {"block_out_channels": [0, 0]}),
        ("grain", {"sample_size": [10**5, 10**5]}),
        ("grain", {"sample_size": "x"}),
        ("grain", {"num_grey_levels": 10**12}),
        ("scheduler", {"num_train_timesteps": 10**10}),
        ("scheduler", {"num_train_timesteps": "x"}),
        ("scheduler", {"beta_end": 2}),
        ("scheduler", {"beta_end": float("nan")}),
        ("scheduler", {"beta_schedule": "x"}),
        ("scheduler", {"trained_betas": "x"}),
    ],
    ids=str,
)
def test_impossible_other_parts_are_refused(ldm, part, values):
    name = "scheduler_config.json" if part == "scheduler" else "config.json"
    change(ldm / part / name, **values)
    refuse(ldm, part)


def test_weights_that_do_not_fit_are_named(folder, part):
    names = sorted(load_file(part / WEIGHTS))
    change_weights(part, lambda weights: weights | {names[3]: torch.zeros(7, 7)})
    refuse(folder, r"has the shape \[7, 7\], but its config\.json asks for")
    change_weights(
        part, lambda weights: {name: weights[name] for name in names if name != names[3]}
    )
    refuse(folder, rf"lacks 1 of the weights .*{names[3]}")
    (part / WEIGHTS).write_bytes((part / WEIGHTS).read_bytes()[:100])
    refuse(folder, r"safetensors is damaged")


def test_pickles_and_files_elsewhere_are_not_read(folder, part, tmp_path):
    weights = load_file(part / WEIGHTS)
    (part / WEIGHTS).rename(tmp_path / "elsewhere.safetensors")
    torch.save(weights, part / "diffusion_pytorch_model.bin")
    refuse(folder, r"Weights must be safetensors")
    index = part / f"{WEIGHTS}.index.json"
    for name in ("../../elsewhere.safetensors", "diffusion_pytorch_model.bin", "C:\\x.safetensors"):
        index.write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(weights, name)}))
        refuse(folder, r"must name safetensors files beside it")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("component", ["unet", "guide", "vqvae", "grain"])
def test_weights_that_diverged_are_refused(ldm, component, value):
    def break_last(weights):
        name = sorted(weights)[-1]
        return weights | {name: torch.full_like(weights[name], value)}

    change_weights(ldm / component, break_last)
    refuse(ldm, rf"{component} has weights that are not finite .* training diverged")
    if component == "vqvae":
        with pytest.raises(ValueError, match="not finite"):
            load_autoencoder(ldm)


def test_a_generator_that_diverged_is_refused(tmp_path):
    MAKERS["stylegan"]().save_pretrained(tmp_path)
    change_weights(
        tmp_path / "generator", lambda weights: {k: v * torch.nan for k, v in weights.items()}
    )
    refuse(tmp_path, "training diverged")
    with pytest.raises(ValueError, match="training diverged"):
        load_pipeline(tmp_path)


@pytest.mark.parametrize(
    "name", ["/tmp/em-hostile", "../../x", "..\\..\\x", "a\x1b[31mb", "a" * 999]
)
def test_names_write_nothing_outside(folder, tmp_path, name):
    (folder / "run.json").write_text(json.dumps({"name": name, "data": {"name": name}}))
    before = {path for path in tmp_path.rglob("*") if "out" not in path.parts}
    generate_images(GenerationConfig(str(folder), str(tmp_path / "out"), num_images=1))
    assert {path for path in tmp_path.rglob("*") if "out" not in path.parts} - before <= {
        tmp_path / "out"
    }


@pytest.mark.parametrize(
    "source", ["/etc", "../x", "C:\\x", "datasets:/etc", "folder", "synthetic/x"]
)
def test_a_repository_names_no_folder_of_this_machine(ldm, tmp_path, source):
    """evaluate.py takes the data and the tiling of the models, but no folder from others."""
    assert not is_public(source)
    tiles = {"resolution": 16, "cache_dir": str(tmp_path / "elsewhere")}
    model = read_model(str(ldm))
    for folder, found in ((None, "synthetic"), (ldm, source)):
        config = {"data": source, "tiles": tiles}
        theirs = dataclasses.replace(model, folder=folder, config=config)
        ours = dataclasses.replace(model, config={"data": "synthetic", "tiles": tiles})
        candidates = [Candidate("theirs", "a", theirs), Candidate("ours", "b", ours)]
        data, tiling = find_data(EvaluationConfig(), candidates)
        assert data == found
        assert tiling.cache_dir is None
    assert is_public("synthetic")


@pytest.mark.parametrize(
    "content",
    [{"name": 5}, {"data": 5}, {"config": [1]}, {"train_seconds": "x"}, {"num_images_seen": []}],
    ids=str,
)
def test_a_damaged_record_is_named(folder, content):
    (folder / "run.json").write_text(json.dumps(content))
    refuse(folder, rf"run\.json is damaged: {next(iter(content))} is .*, but must be")


def test_a_record_without_facts_makes_no_card(folder, tmp_path):
    (folder / "run.json").write_text(json.dumps({"name": "x", "data": {"name": 5}}))
    config = PublishConfig(str(folder), "me/x", dry_run=str(tmp_path / "dry"), num_samples=0)
    with pytest.raises(ValueError, match=r"No card can be made from run\.json"):
        publish_run(config, say=lambda line: None)


WRONG = ["x", [], {}, None, True, -1, 0, 7, 10**6, 1e300, float("nan"), 0.5, [3] * 3, "absent"]


def draw_or_refuse(folder, config_path, key, value, seconds=60):
    """One image in reasonable time, or a `ValueError`; no other error."""
    text = config_path.read_text()
    config = json.loads(text) | {key: value}
    if value == "absent":
        del config[key]
    config_path.write_text(json.dumps(config))
    start, message = time.monotonic(), ""
    try:
        pipeline = read_model(str(folder)).load()
        pipeline.set_progress_bar_config(disable=True)
        steps = {"num_inference_steps": 2} if (folder / "scheduler").is_dir() else {}
        with explain_failure():
            pipeline(1, generator=torch.Generator().manual_seed(0), **steps)
    except ValueError as error:
        message = str(error)
    except RuntimeError as error:
        if not is_out_of_memory(error):  # of which the commands say that it is too large
            raise
    assert time.monotonic() - start < seconds
    config_path.write_text(text)
    return message


def list_keys(folder):
    """All (path of a configuration, key) of a saved model."""
    paths = sorted([*folder.glob("*/config.json"), *folder.glob("*/scheduler_config.json")])
    assert paths
    return [(path, key) for path in paths for key in sorted(json.loads(path.read_text()))]


def test_any_key_of_a_configuration_may_be_wrong(folder):
    """Each with one kind of wrong value; the slow test tries all."""
    refused = 0
    for i, (path, key) in enumerate(list_keys(folder)):
        refused += bool(draw_or_refuse(folder, path, key, WRONG[i % len(WRONG)]))
    assert refused > 5


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_any_key_of_a_configuration_may_be_wrong_in_any_way(folder):
    refused = 0
    for path, key in list_keys(folder):
        for value in WRONG:
            refused += bool(draw_or_refuse(folder, path, key, value))
    assert refused > 50


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"downsample_padding": []}, r"downsample_padding is \[\], but must be of the type int"),
        ({"norm_eps": "x"}, r'norm_eps is "x", but must be of the type float'),
        ({"freq_shift": None}, r"freq_shift is null, but must be of the type int"),
    ],
    ids=str,
)
def test_a_value_of_another_type_is_named(ldm, values, message):
    change(ldm / "unet" / "config.json", **values)
    refuse(ldm, message)


COMMANDS = {
    "generate": ["--model", "{model}", "--out", "{out}", "--num-images", "2"],
    "evaluate": ["--models", "{model}", "--out", "{out}", "--cache-dir", "{out}-cache"],
    "publish": ["{model}", "me/x", "--dry-run", "{out}"],
    "app": ["--models", "{model}"],
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("name", ["model_index.json", "config.json", WEIGHTS])
def test_commands_end_in_one_sentence(folder, part, tmp_path, monkeypatch, capsys, command, name):
    path = folder / name if name == "model_index.json" else part / name
    if name == WEIGHTS:
        change_weights(part, lambda weights: dict(list(weights.items())[1:]))
    else:
        path.write_text("[]")
    tiles = {"resolution": 16, "num_micrographs": 4}
    record = {"config": {"data": "synthetic", "tiles": tiles}}
    (folder / "run.json").write_text(json.dumps(record))
    if command == "app":
        pytest.importorskip("gradio")
    words = [word.format(model=folder, out=tmp_path / "out") for word in COMMANDS[command]]
    monkeypatch.setattr("sys.argv", [f"{command}.py", *words])
    module = importlib.import_module(command if command == "app" else f"em_commands.{command}")
    with pytest.raises(SystemExit) as end:
        run_command(module.main)
    text = capsys.readouterr().err
    assert end.value.code == 2, text
    assert "Traceback" not in text
    last = text.strip().splitlines()[-1]
    assert last.startswith("error: "), text
    assert str(path if name != WEIGHTS else part) in last

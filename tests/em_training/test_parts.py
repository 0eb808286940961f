import pytest
import torch
from safetensors import SafetensorError

from em_training import (
    EMA,
    list_checkpoints,
    load_checkpoint,
    make_generator,
    save_checkpoint,
    seed_for,
)


def test_seed_depends_on_every_part_and_its_type():
    keys = [(0,), (1,), (0, 0), ("0",), (0, "a"), ("a", 0), (0, 1), (1, 0)]
    assert len({seed_for(*key) for key in keys}) == len(keys)
    assert all(0 <= seed_for(*key) < 2**63 for key in keys)


def test_generator_is_a_pure_function_of_its_key():
    draw = lambda **key: torch.randn(4, generator=make_generator(3, **key))  # noqa: E731
    assert torch.equal(draw(num_images_seen=64), draw(num_images_seen=64))
    for key in (
        {"num_images_seen": 65},
        {"num_images_seen": 64, "rank": 1},
        {"num_images_seen": 64, "stream": "mixing"},
    ):
        assert not torch.equal(draw(num_images_seen=64), draw(**key))


def test_ema_follows_its_closed_form():
    model = torch.nn.Linear(2, 2)
    ema = EMA(model, half_life_images=100, ramp_up=None)
    start, target = ema.model.weight.clone(), torch.ones_like(model.weight)
    torch.nn.init.ones_(model.weight)
    for step in range(1, 21):
        ema.update(model, step * 10, 10)
    # 200 images are two half-lives: a quarter of the start is left
    torch.testing.assert_close(ema.model.weight, 0.25 * start + 0.75 * target)


def test_ema_ramps_up_and_copies_buffers():
    model = torch.nn.BatchNorm1d(2)
    ema = EMA(model, half_life_images=1000, ramp_up=0.05)
    assert ema.decay(100, 10) == pytest.approx(0.5 ** (10 / 5))
    assert ema.decay(10**6, 10) == pytest.approx(0.5 ** (10 / 1000))
    assert EMA(model, 0).decay(100, 10) == 0
    model.running_mean.fill_(7)
    ema.update(model, 10, 10)
    assert torch.equal(ema.model.running_mean, model.running_mean)
    assert not any(p.requires_grad for p in ema.model.parameters())


def test_checkpoint_round_trip_is_exact(tmp_path):
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.5, 0.9))
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    state = {
        "o": optimizer.state_dict(),
        "n": 3,
        "s": "x",
        "none": None,
        "t": (1, [2.5, torch.ones(1, dtype=torch.bfloat16)]),
    }
    saved = load_checkpoint(save_checkpoint(tmp_path, 128, state))
    assert saved["o"]["param_groups"] == state["o"]["param_groups"]
    for index, slots in state["o"]["state"].items():
        for name, value in slots.items():
            assert torch.equal(saved["o"]["state"][index][name], value)
    assert saved["t"][0] == 1
    assert saved["t"][1][1].dtype == torch.bfloat16
    assert isinstance(saved["t"], tuple)
    assert (saved["n"], saved["s"], saved["none"]) == (3, "x", None)


def test_loaded_tensors_are_aligned_in_memory(tmp_path):
    """safetensors loads at any address, and some kernels round differently there."""
    state = {f"x{i}": torch.randn(i) for i in range(1, 8)}
    saved = load_checkpoint(save_checkpoint(tmp_path, 8, state))
    assert {tensor.data_ptr() % 64 for tensor in saved.values()} == {0}


def test_a_full_disk_is_one_sentence_and_loses_nothing(tmp_path, monkeypatch):
    path = save_checkpoint(tmp_path, 8, {"x": torch.zeros(100)})

    def fail(*args):
        raise SafetensorError("No space left on device (os error 28)")

    monkeypatch.setattr("em_training.checkpoint.save_file", fail)
    with pytest.raises(OSError, match=r"000000000016 cannot be written: No space.*good.*0008") as e:
        save_checkpoint(tmp_path, 16, {"x": torch.zeros(100)})
    assert "\n" not in str(e.value)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_only_the_newest_checkpoints_stay_and_leftovers_go(tmp_path):
    (tmp_path / ".tmp-000000000001-9").mkdir()
    for count in (8, 16, 24):
        save_checkpoint(tmp_path, count, {"x": torch.zeros(1)}, keep=2)
    assert [p.name for p in list_checkpoints(tmp_path)] == ["000000000016", "000000000024"]
    assert not list(tmp_path.glob(".tmp-*"))


def test_damage_is_named_and_objects_are_refused(tmp_path):
    path = save_checkpoint(tmp_path, 8, {"x": torch.zeros(100)})
    for name in ("tensors.safetensors", "state.json", "checksums.json"):
        whole = (path / name).read_bytes()
        flipped = bytearray(whole)
        flipped[len(whole) // 2] ^= 4  # one bit
        for damaged in (whole[:-7], b"", bytes(flipped)):
            (path / name).write_bytes(damaged)
            with pytest.raises(ValueError, match="000000000008 is damaged"):
                load_checkpoint(path)
        (path / name).write_bytes(whole)
    assert torch.equal(load_checkpoint(path)["x"], torch.zeros(100))
    with pytest.raises(TypeError, match="'/x' holds a set"):
        save_checkpoint(tmp_path, 9, {"x": {1, 2}})

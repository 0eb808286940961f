"""Load OpenAI's encoder.pkl and decoder.pkl, two pickled networks, as an `EMDalleVAE`."""

import re
from pathlib import Path

import torch

from em_diffusion.em_dalle_vae import EMDalleVAE
from em_training.torch_checkpoint import Record, copy_tensor, flatten_module, read_torch_checkpoint

NAMES = ("encoder.pkl", "decoder.pkl")


def find_dalle(source) -> Path | None:
    """Return the folder of both files if `source` is that folder or one of the files, else None."""
    path = Path(source)
    folder = path.parent if path.name in NAMES else path
    return folder if any((folder / name).is_file() for name in NAMES) else None


def load_dalle(folder) -> EMDalleVAE:
    """Return the dVAE of a folder with encoder.pkl and decoder.pkl; its channels are theirs."""
    halves = {name: _read_half(Path(folder) / name) for name in NAMES}
    encoder, decoder = (halves[name] for name in NAMES)
    try:
        num_hidden, in_channels = encoder["blocks.input.w"].shape[:2]
        num_init, num_codes = decoder["blocks.input.w"].shape[:2]
        num_blocks = len(
            {name.split(".")[2] for name in encoder if name.startswith("blocks.group_1.")}
        )
        decoder_channels = decoder["blocks.output.conv.w"].shape[0] // 2
    except KeyError as error:
        raise ValueError(
            f"{folder} does not hold the two halves of DALL-E's dVAE: there is no {error}."
        ) from error
    with torch.device("meta"):  # shapes only: absurd ones take no memory
        model = EMDalleVAE(
            num_hidden, num_init, num_blocks, num_codes, in_channels, decoder_channels
        ).eval()
    # the answer of the decoder's first layer to each one-hot code
    codes = decoder.pop("blocks.input.w")[..., 0, 0].T + decoder.pop("blocks.input.b")
    state = {"quantize.embedding.weight": codes}
    for half, tensors in (("encoder", encoder), ("decoder", decoder)):
        state |= {f"{half}.{_our_name(name)}": tensor for name, tensor in tensors.items()}
    target = model.state_dict()
    wrong = sorted(target.keys() ^ state.keys()) or sorted(
        n for n in target if target[n].shape != state[n].shape
    )
    if wrong:
        raise ValueError(
            f"{folder} does not hold the two halves of one dVAE of DALL-E: {', '.join(wrong[:3])} "
            "do not fit."
        )
    model.load_state_dict(state, assign=True)
    return model


def _read_half(path):
    """Return the tensors of one half by name."""
    if not path.is_file():
        raise ValueError(
            f"{path} is missing: a DALL-E dVAE is encoder.pkl and decoder.pkl in one folder."
        )
    contents = read_torch_checkpoint(path)
    try:
        tensors = flatten_module(contents) if isinstance(contents, Record) else contents
    except (AttributeError, TypeError, RecursionError):  # such as a module within itself
        tensors = None
    is_half = isinstance(tensors, dict) and all(
        isinstance(tensor, torch.Tensor) for tensor in tensors.values()
    )
    if not is_half or "blocks.input.w" not in tensors:
        raise ValueError(f"{path} is not a half of DALL-E's dVAE: it has no blocks.input.w.")
    return {name: copy_tensor(tensor) for name, tensor in tensors.items()}


def _our_name(name):
    name = re.sub(r"^blocks\.input\.", "conv_in.", name)
    name = re.sub(r"^blocks\.output\.conv\.", "conv_out.", name)
    name = re.sub(
        r"^blocks\.group_(\d+)\.block_(\d+)\.",
        lambda m: f"levels.{int(m[1]) - 1}.{int(m[2]) - 1}.",
        name,
    )
    name = re.sub(r"\.res_path\.conv_(\d+)\.", lambda m: f".convs.{int(m[1]) - 1}.", name)
    name = name.replace(".id_path.", ".skip.")
    return re.sub(r"\.w$", ".weight", re.sub(r"\.b$", ".bias", name))

"""Inception-v3 of the FID paper, with the code of clean-fid and the weights that it downloads."""

import contextlib
import importlib.metadata
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from em_data.download import download_file
from em_data.files import find_cache_dir
from em_evaluation.efficientnet import fold_input_channels
from em_evaluation.extractor import Extractor, sha256_of

INCEPTION_WEIGHTS = {  # address, SHA-256 or its first digits
    # the FID paper's network as TorchScript, for clean-fid's mode `clean`
    "clean": (
        "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/"
        "inception-2015-12-05.pt",
        "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4",
    ),
    # the same as a state dict, for pytorch-fid and clean-fid's mode `legacy_pytorch`
    "legacy_pytorch": (
        "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
        "pt_inception-2015-12-05-6726825d.pth",
        "6726825d",
    ),
}


class Inception(Extractor):
    """Inception-v3 of the FID paper through clean-fid (Parmar et al. 2022): 2048 features.

    resize_mode: "clean" is clean-fid's own (PIL bicubic, anti-aliased, TorchScript network),
    "legacy_pytorch" that of pytorch-fid (bilinear, not anti-aliased). Grey becomes three equal
    channels of 299 x 299 pixels on the scale 0..255. fused: folds the batch norms and channels of
    legacy_pytorch; a test holds it equal to the package's own network.
    """

    name = "inception"
    num_features = 2048

    def __init__(
        self,
        resize_mode="clean",
        weights=None,
        device="cpu",
        dtype=torch.float32,
        fused=True,
    ):
        super().__init__(device, dtype)
        if resize_mode not in INCEPTION_WEIGHTS:
            raise ValueError(
                f"resize_mode must be one of {', '.join(INCEPTION_WEIGHTS)}, not {resize_mode!r}"
            )
        path = find_weights(*INCEPTION_WEIGHTS[resize_mode], given=weights)
        if resize_mode == "clean":
            refuse_other_code(path)
        load = load_torchscript_inception if resize_mode == "clean" else load_pytorch_inception
        network = load(path).eval().requires_grad_(False)
        self.fused = fused and resize_mode == "legacy_pytorch"
        if self.fused:
            fuse_inception(network)
        self.network = network.to(self.device, dtype, memory_format=torch.channels_last)
        self.resize_mode = resize_mode
        self.identity = (
            f"inception, clean-fid {importlib.metadata.version('clean-fid')} mode {resize_mode}, "
            f"weights sha256 {sha256_of(path)[:16]}, "
            f"pooled 2048, grey to three equal channels, {str(dtype).removeprefix('torch.')}"
        )

    def _features(self, images):
        x = (images + 1) * 127.5  # 0..255, as clean-fid reads it from a file
        if self.resize_mode == "clean":
            x = resize_clean(x).to(self.device)  # [B, 1, 299, 299]
            x = x.to(self.dtype).expand(-1, 3, -1, -1).contiguous(memory_format=torch.channels_last)
            return self.network(x)  # [B, 2048]
        # as pytorch-fid does, without anti-aliasing
        x = F.interpolate(x, size=(299, 299), mode="bilinear", align_corners=False).clamp(0, 255)
        x = x.to(self.dtype).expand(-1, 1 if self.fused else 3, -1, -1)
        x = x.contiguous(memory_format=torch.channels_last)
        return self.network(x / 255)[0].flatten(1)  # [B, 2048]


class ConvReLU(nn.Module):
    """A convolution with its batch norm folded in, and a ReLU in place."""

    def __init__(self, basic_conv):
        super().__init__()
        self.conv = fuse_conv_bn_eval(basic_conv.conv.eval(), basic_conv.bn.eval())

    def forward(self, x):
        return F.relu_(self.conv(x))


def fuse_inception(network) -> None:
    """Fold the batch norms in place, and let the first convolution read one channel [B, 1, H, W].

    Three equal channels through a convolution are one channel through the sum of its kernels.
    """
    _fuse_children(network)
    fold_input_channels(next(each for each in network.modules() if isinstance(each, nn.Conv2d)))


def _fuse_children(module):
    for name, child in module.named_children():
        if isinstance(getattr(child, "conv", None), nn.Conv2d) and isinstance(
            getattr(child, "bn", None), nn.BatchNorm2d
        ):
            setattr(module, name, ConvReLU(child))
        else:
            _fuse_children(child)


def resize_clean(images):
    """Resize images [B, 1, H, W] on the scale 0..255 to 299 x 299 as clean-fid does."""
    resized = [
        Image.fromarray(image[0]).resize((299, 299), Image.BICUBIC)
        for image in images.float().cpu().numpy()
    ]
    return torch.from_numpy(np.stack(resized)[:, None].clip(0, 255))


def find_weights(url, sha256=None, *, given=None, cache_dir=None, log=print) -> Path:
    """Return the path of a network's weights: `given`, else the cached copy, else a download.

    Raises:
        ValueError: `given` is not a file, or the download has another digest.
        ConnectionError: The download is impossible.
    """
    if given is not None:
        if not Path(given).is_file():
            raise ValueError(f"--weights {given} is not a file. Give a local copy of {url}.")
        return Path(given)
    path = find_cache_dir(cache_dir) / "weights" / url.rsplit("/", 1)[1]
    if path.is_file():
        return path
    log(f"downloading {url} to {path}")
    try:
        download_file(url, path, sha256=sha256, num_tries=1)
    except ConnectionError as error:
        raise ConnectionError(
            f"{error} Without a network: fetch it elsewhere and pass the file with --weights, put "
            f"it at {path}, or use the extractor efficientnet-lite0, whose weights come with the "
            "package."
        ) from error
    except ValueError as error:
        raise ValueError(f"{error} Or pass the right file with --weights.") from error
    return path


def refuse_other_code(path) -> None:
    """Raise `ValueError` for a TorchScript other than the published one: it is a program."""
    expected, found = INCEPTION_WEIGHTS["clean"][1], sha256_of(path)
    if not found.startswith(expected):
        raise ValueError(
            f"{path} has the SHA-256 {found}, not {expected} of the published network. TorchScript "
            "is a program that can write files, so no other one is run. Remove or replace the "
            "file, or use --resize-mode legacy_pytorch, whose weights hold no code."
        )


def load_torchscript_inception(path) -> nn.Module:
    """Load clean-fid's TorchScript Inception from any file."""
    from cleanfid.inception_torchscript import InceptionV3W

    class InceptionFromFile(InceptionV3W):
        def __init__(self):
            nn.Module.__init__(self)
            with ignore_torchscript_deprecation():
                self.base = torch.jit.load(str(path), map_location="cpu").eval()
            self.layers = self.base.layers
            self.resize_inside = False

    return InceptionFromFile()


def load_pytorch_inception(path) -> nn.Module:
    """Load clean-fid's copy of pytorch-fid's Inception from a file instead of a download."""
    from cleanfid import inception_pytorch

    original = inception_pytorch.load_state_dict_from_url
    inception_pytorch.load_state_dict_from_url = lambda url, progress: torch.load(
        path, map_location="cpu", weights_only=True
    )
    try:
        with warnings.catch_warnings():
            # `pretrained`, inside clean-fid
            warnings.filterwarnings("ignore", category=UserWarning, module="torchvision")
            return inception_pytorch.InceptionV3(output_blocks=[3], resize_input=False)
    finally:
        inception_pytorch.load_state_dict_from_url = original


@contextlib.contextmanager
def ignore_torchscript_deprecation():
    """Silence torch's deprecation of TorchScript: the published weights are such a file."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torch.jit.*deprecated", category=Warning)
        yield

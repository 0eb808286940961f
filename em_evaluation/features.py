"""Feature extractors: grey images in [-1, 1] -> one row of features each."""

import contextlib
import importlib.metadata
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from em_evaluation.efficientnet import find_efficientnet_weights, load_efficientnet, scale_grey
from em_evaluation.extractor import Extractor
from em_evaluation.fused_inception import fuse_inception, resize_bilinear
from em_evaluation.vision_models import CLIP, DINOV2, TimmModel, TransformersModel
from em_evaluation.weights import INCEPTION_WEIGHTS, find_weights, sha256_of

NAMES = "efficientnet-lite0, inception, dinov2, clip, timm:NAME or transformers:NAME"


class EfficientNetLite0(Extractor):
    """EfficientNet-Lite0 (Tan & Le 2019) with the ImageNet weights of its package: 1280 features.

    Features are averages over positions after the last convolution. Grey is resized to `input_px`
    (a multiple of 32; bicubic, anti-aliased) and becomes three equal channels (`scale_grey`).
    fused: batch norm and padding are folded into the convolutions; a test holds it equal to the
    package's own network.
    """

    name = "efficientnet-lite0"
    num_features = 1280

    def __init__(self, input_px=224, device="cpu", dtype=torch.float32, weights=None, fused=True):
        super().__init__(device, dtype)
        if input_px % 32 or input_px < 64:
            raise ValueError(
                f"input_px is {input_px}, but must be a multiple of 32 of at least 64 "
                "(224 is the network's own)."
            )
        path = Path(weights or find_efficientnet_weights())
        network = load_efficientnet(path, fused)
        self.network = network.to(self.device, dtype, memory_format=torch.channels_last)
        self.input_px = input_px
        self.identity = (
            f"efficientnet-lite0, weights sha256 {sha256_of(path)[:16]}, pooled 1280, bicubic "
            f"anti-aliased to {input_px} x {input_px} px, grey to three equal channels, "
            f"(grey level - 127) / 128, {str(dtype).removeprefix('torch.')}"
        )

    def _features(self, images):
        x = resize(images, self.input_px)  # [B, 1, S, S]
        x = scale_grey(x).expand(-1, 3, -1, -1)  # [B, 3, S, S]
        x = x.to(self.dtype, memory_format=torch.channels_last)
        return self.network.extract_features(x).float().mean((2, 3))  # [B, 1280]


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
        cache_dir=None,
        fused=True,
    ):
        super().__init__(device, dtype)
        if resize_mode not in INCEPTION_WEIGHTS:
            raise ValueError(
                f"resize_mode must be one of {', '.join(INCEPTION_WEIGHTS)}, not {resize_mode!r}"
            )
        path = find_weights(INCEPTION_WEIGHTS[resize_mode], weights, cache_dir)
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
        x = resize_bilinear(x).clamp(0, 255)
        x = (
            x.to(self.dtype)
            .expand(-1, 1 if self.fused else 3, -1, -1)
            .contiguous(memory_format=torch.channels_last)
        )
        return self.network(x / 255)[0].flatten(1)  # [B, 2048]


def get_extractor(
    name: str = "efficientnet-lite0",
    *,
    resize_mode: str | None = None,
    weights: str | Path | None = None,
    input_px: int | None = None,
    resolution: int | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Extractor:
    """Return an extractor by its name.

    Args:
        name: efficientnet-lite0 (offline), inception, dinov2 (facebook/dinov2-base), clip (the
            embedding of openai/clip-vit-large-patch14-336, for CMMD), timm:NAME or
            transformers:NAME, where NAME may be a folder for transformers.
        resize_mode: Of inception: "clean" (default) or "legacy_pytorch".
        weights: A local file in place of the published one; for dinov2 and clip a folder.
        input_px: Of efficientnet-lite0. Default: 128 for a `resolution` up to 128, else 224.
        resolution: Side of the images, if it is known.
        device, dtype: Of the network; bfloat16 is for hardware that has it.

    Raises:
        ValueError: An unknown name, or an option that the extractor does not have.
    """
    if resize_mode is not None and name != "inception":
        own = ", its own option is input_px" if name == "efficientnet-lite0" else ""
        raise ValueError(f"{name} has one resizing; resize_mode belongs to inception{own}")
    if input_px is not None and name != "efficientnet-lite0":
        own = " reads 299 x 299 pixels" if name == "inception" else " reads its own size"
        raise ValueError(f"{name}{own}; input_px belongs to efficientnet-lite0")
    options = {"device": device, "dtype": dtype}
    if name == "efficientnet-lite0":
        if input_px is None:
            input_px = 128 if resolution is not None and resolution <= 128 else 224
        return EfficientNetLite0(input_px, weights=weights, **options)
    if name == "inception":
        return Inception(resize_mode or "clean", weights, **options)
    if name == "dinov2":
        return TransformersModel(DINOV2, weights, label="dinov2", **options)
    if name == "clip":
        return TransformersModel(CLIP, weights, label="clip", embedding=True, **options)
    library, _, model = name.partition(":")
    if library not in ("timm", "transformers") or not model:
        raise ValueError(f"the extractor must be {NAMES}, not {name!r}")
    if weights is not None:
        raise ValueError(
            f"{library}:NAME takes no --weights. Name the folder itself: transformers:FOLDER or "
            "timm:local-dir:FOLDER."
        )
    return TimmModel(model, **options) if library == "timm" else TransformersModel(model, **options)


def resize(images, side):
    """Resize images [B, C, H, W] to `side` by anti-aliased bicubic interpolation, clipped."""
    if images.shape[-2:] == (side, side):
        return images
    return F.interpolate(
        images, size=(side, side), mode="bicubic", antialias=True, align_corners=False
    ).clamp(-1, 1)


def resize_clean(images):
    """Resize images [B, 1, H, W] on the scale 0..255 to 299 x 299 as clean-fid does."""
    resized = [
        Image.fromarray(image[0]).resize((299, 299), Image.BICUBIC)
        for image in images.float().cpu().numpy()
    ]
    return torch.from_numpy(
        np.stack([np.asarray(image) for image in resized])[:, None].clip(0, 255)
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
    import warnings

    from cleanfid import inception_pytorch

    original = inception_pytorch.load_state_dict_from_url
    inception_pytorch.load_state_dict_from_url = lambda url, progress: torch.load(
        path, map_location="cpu", weights_only=True
    )
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", category=UserWarning, module="torchvision"
            )  # `pretrained`, inside clean-fid
            return inception_pytorch.InceptionV3(output_blocks=[3], resize_input=False)
    finally:
        inception_pytorch.load_state_dict_from_url = original


@contextlib.contextmanager
def ignore_torchscript_deprecation():
    """Silence torch's deprecation of TorchScript: the published weights are such a file."""
    import warnings

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torch.jit.*deprecated", category=Warning)
        yield

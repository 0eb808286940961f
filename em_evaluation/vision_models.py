"""Feature extractors from transformers and timm: DINOv2, CLIP's embedding, or any by name."""

import contextlib
import hashlib
import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from em_data.intensity import to_uint8
from em_evaluation.extractor import Extractor, resize

DINOV2 = "facebook/dinov2-base"
CLIP = "openai/clip-vit-large-patch14-336"  # the network of the CMMD paper
# of a configuration, not of the function
VOLATILE = ("_name_or_path", "transformers_version", "torch_dtype", "dtype")
INTERPOLATIONS = {0: "nearest", 2: "bilinear", 3: "bicubic"}  # PIL's numbers


class VisionModel(Extractor):
    """A vision network with its published preprocessing.

    Grey becomes three equal channels after resizing, normalised by the network's mean and
    deviation. The whole tile is resized (anti-aliased, clipped), never cropped. `identity` has
    digests of the weights and the configuration, and no folder's name. Subclasses define `_embed`,
    and `_preprocess` for resize_mode "own": the model's own code, which reads pictures of 8 bits
    and may crop.
    """

    unit_norm = False

    def __init__(self, resize_mode, device, dtype):
        super().__init__(device, dtype)
        if resize_mode not in (None, "own"):
            raise ValueError(
                f'resize_mode "{resize_mode}" belongs to inception. Vision models take "own", '
                "their own preprocessing of 8-bit pictures; leave it out to resize whole tiles in "
                "floats."
            )
        self.is_own = resize_mode == "own"

    def _prepare(self, label, network, side, interpolation, mean, std, configuration):
        self.network = network.eval().requires_grad_(False).to(self.device, self.dtype)
        self.side, self.interpolation = side, interpolation
        self.mean, self.std = (
            torch.tensor(values, device=self.device).view(1, 3, 1, 1) for values in (mean, std)
        )
        self.num_features = self(torch.zeros(1, 1, *side)).shape[1]
        text = json.dumps(configuration, sort_keys=True, default=str)
        resizing = f"{interpolation} anti-aliased to {side[0]} x {side[1]} px"
        if self.is_own:
            resizing = f"own preprocessing of 8 bits ({self._describe_preprocessing()})"
        setting = hashlib.sha256(text.encode()).hexdigest()[:16]
        self.identity = (
            f"{label}, weights sha256 {digest_weights(network)[:16]}, configuration {setting}, "
            f"{self.pooling} {self.num_features}, {resizing}, grey to three equal channels, "
            f"mean {list(mean)}, std {list(std)}, {str(self.dtype).removeprefix('torch.')}"
        )

    def _features(self, images):
        if self.is_own:
            pictures = [Image.fromarray(each[0]).convert("RGB") for each in to_uint8(images)]
            x = self._preprocess(pictures).to(self.device)  # [B, 3, H, W]
        else:
            x = resize(images, self.side, self.interpolation)
            x = ((x + 1) / 2 - self.mean) / self.std  # [B, 3, H, W]
        return self._embed(x.to(self.dtype)).float()

    def _preprocess(self, pictures):
        raise NotImplementedError

    def _describe_preprocessing(self):
        raise NotImplementedError

    def _embed(self, x):
        raise NotImplementedError


class TransformersModel(VisionModel):
    """A vision model of transformers: its pooled output, or the mean of the last layer.

    embedding: CLIP's image embedding of length 1, for CMMD. resize_mode: None, or "own" for the
    checkpoint's image processor.

    Raises:
        ValueError: The checkpoint lacks weights.
        ConnectionError: The checkpoint cannot be fetched.
    """

    def __init__(
        self,
        name,
        folder=None,
        *,
        label=None,
        embedding=False,
        resize_mode=None,
        device="cpu",
        dtype=torch.float32,
    ):
        super().__init__(resize_mode, device, dtype)
        self.unit_norm = embedding
        source = str(folder or name)
        label = label or f"transformers:{Path(source).name if Path(source).is_dir() else name}"
        self.name = label
        if folder is not None and not Path(folder).is_dir():
            raise ValueError(
                f"--weights {folder}: no such folder; give a local copy of the Hub's {name}"
            )
        network, missing, processor = _load_transformers(source, embedding)
        pooler = {key for key in missing if "pool" in key.split(".")[0]}
        if missing - pooler:
            raise ValueError(
                f"{label} lacks weights ({', '.join(sorted(missing - pooler)[:3])}, ...), and "
                "random ones would measure nothing. Use a checkpoint of the whole vision model."
            )
        self.has_pooler = not pooler
        self.pooling = "pooled" if self._can_pool(network) else "mean of the last"
        if embedding:
            self.pooling = "embedding of length 1,"
        configuration = {
            key: value for key, value in network.config.to_dict().items() if key not in VOLATILE
        }
        preprocessing = _read_processor(
            processor, getattr(network.config, "vision_config", network.config)
        )
        if self.is_own:
            self.processor = _load_processor(source)
        if embedding:
            network = ImageEmbedding(network)
        elif hasattr(network, "vision_model"):
            network = network.vision_model
        self._prepare(label, network, *preprocessing, configuration)

    def _preprocess(self, pictures):
        return self.processor(images=pictures, return_tensors="pt")["pixel_values"]

    def _describe_preprocessing(self):
        settings = {k: v for k, v in self.processor.to_dict().items() if k not in VOLATILE}
        text = json.dumps(settings, sort_keys=True, default=str)
        return f"{type(self.processor).__name__} {hashlib.sha256(text.encode()).hexdigest()[:16]}"

    def _can_pool(self, network):
        return self.has_pooler and (
            hasattr(network, "pooler") or hasattr(network, "vision_model") or _is_dinov2(network)
        )

    def _embed(self, x):
        if self.unit_norm:
            return F.normalize(self.network(x).float(), dim=-1)
        output = self.network(pixel_values=x)
        pooled = getattr(output, "pooler_output", None)
        if self.has_pooler and pooled is not None:
            return pooled.flatten(1)
        last = output.last_hidden_state
        return last.mean(1) if last.ndim == 3 else last.mean((2, 3))


class ImageEmbedding(nn.Module):
    """The vision tower and projection of a CLIP model."""

    def __init__(self, clip):
        super().__init__()
        self.vision_model, self.visual_projection = clip.vision_model, clip.visual_projection

    def forward(self, x):
        return self.visual_projection(self.vision_model(pixel_values=x).pooler_output)


class TimmModel(VisionModel):
    """A model of timm by its name: the features that its classifier would read.

    resize_mode: None, or "own" for timm's transform of the model.
    """

    pooling = "pooled"

    def __init__(
        self, name, *, resize_mode=None, device="cpu", dtype=torch.float32, pretrained=True
    ):
        super().__init__(resize_mode, device, dtype)
        try:
            import timm
        except ImportError as error:
            raise ValueError(f'timm:{name} needs timm: pip install "em-synthesis[timm]"') from error
        local = name.startswith("local-dir:")
        label = f"timm:{Path(name).name}" if local else f"timm:{name}"
        self.name = label
        with _explain(label, "timm:local-dir:FOLDER"):
            network = timm.create_model(name, pretrained=pretrained, num_classes=0)
        data = timm.data.resolve_model_data_config(network)
        architecture = network.pretrained_cfg.get("architecture")
        configuration = {"architecture": architecture, "modules": str(network)}
        if self.is_own:
            self.transform = timm.data.create_transform(**data)
        known = data["interpolation"] in INTERPOLATIONS.values()
        interpolation, side = data["interpolation"] if known else "bicubic", data["input_size"][-2:]
        self._prepare(
            label, network, tuple(side), interpolation, data["mean"], data["std"], configuration
        )

    def _preprocess(self, pictures):
        return torch.stack([self.transform(picture) for picture in pictures])

    def _describe_preprocessing(self):
        return " ".join(str(self.transform).split())

    def _embed(self, x):
        return self.network(x)


def digest_weights(network) -> str:
    """Return the SHA-256 of a network's weights: names, shapes and float32 values."""
    digest = hashlib.sha256()
    for name, value in sorted(network.state_dict().items()):
        digest.update(f"{name} {tuple(value.shape)}".encode())
        digest.update(np.ascontiguousarray(value.detach().float().cpu().numpy()).tobytes())
    return digest.hexdigest()


def _load_transformers(source, embedding):
    import transformers
    from transformers.image_processing_utils import BaseImageProcessor

    model_class = transformers.CLIPModel if embedding else transformers.AutoModel
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # of unused weights; missing ones are refused
    try:
        with _explain(source, "--weights with the extractor's name and a folder (NAME=FOLDER)"):
            network, info = model_class.from_pretrained(
                source, output_loading_info=True, dtype=torch.float32
            )
            processor, _ = BaseImageProcessor.get_image_processor_dict(source)
    finally:
        transformers.logging.set_verbosity(verbosity)
    mismatched = {key if isinstance(key, str) else key[0] for key in info["mismatched_keys"]}
    return network, set(info["missing_keys"]) | mismatched, processor


def _load_processor(source):
    from transformers import AutoImageProcessor

    with _explain(source, "--weights with the extractor's name and a folder (NAME=FOLDER)"):
        return AutoImageProcessor.from_pretrained(source)


def _read_processor(processor, config):
    """Return (side, interpolation, mean, std) of a processor's dictionary."""
    size = processor.get("size") or getattr(config, "image_size", 224)
    if processor.get("do_center_crop") and processor.get("crop_size"):
        size = processor["crop_size"]
    if isinstance(size, dict):
        edge = size.get("shortest_edge")
        size = (size.get("height", edge), size.get("width", edge))
    side = tuple(int(each) for each in (size if np.ndim(size) else (size, size)))
    interpolation = INTERPOLATIONS.get(processor.get("resample", 3), "bicubic")
    mean, std = processor.get("image_mean"), processor.get("image_std")
    if not processor.get("do_normalize", True):
        mean, std = [0.0] * 3, [1.0] * 3
    if mean is None or std is None or len(mean) != 3 or len(std) != 3:
        raise ValueError(
            "The model's preprocessor has no mean and deviation of three channels. "
            "Use another vision model."
        )
    return side, interpolation, mean, std


def _is_dinov2(network):
    # its pooled output is the class token after the last norm
    return "dinov2" in network.config.model_type


@contextlib.contextmanager
def _explain(name, way_out):
    """Turn errors of hubs without a network into one sentence."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConnectionError(
            f"Cannot load {name} ({first}). Without a network, fetch it elsewhere and give the "
            f"folder, {way_out}, or use the extractor efficientnet-lite0, whose weights come with "
            "the package."
        ) from error

"""Micrographs -> tiles -> batches; knows no model."""

from em_data.config import DataConfig
from em_data.data import Data, load_data
from em_data.images import (
    ImageDataset,
    ImageFolder,
    read_image_folder,
    save_image_grid,
    write_image,
)
from em_data.intensity import from_uint, to_uint8, to_uint16
from em_data.loader import BatchLoader
from em_data.micrograph import Defect, Micrograph
from em_data.reading import read_micrograph
from em_data.sampler import ImageSampler
from em_data.tiles import Tiles
from em_data.views import SYMMETRIES

__all__ = [
    "SYMMETRIES",
    "BatchLoader",
    "Data",
    "DataConfig",
    "Defect",
    "ImageDataset",
    "ImageFolder",
    "ImageSampler",
    "Micrograph",
    "Tiles",
    "from_uint",
    "load_data",
    "read_image_folder",
    "read_micrograph",
    "save_image_grid",
    "to_uint8",
    "to_uint16",
    "write_image",
]

"""Micrographs -> tiles -> batches; knows no model.

The road of a TIFF file: `sources` lists the files, `reading` decodes one, `cutting` writes its
tiles to a memory-mapped data set, `split` decides the sides, `tiles` returns views as floats,
`sampler` and `loader` make batches. `data.load_data` goes this road up to the tiles.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

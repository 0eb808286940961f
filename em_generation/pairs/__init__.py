"""Images with their labels, made in three ways; `create_pair_drawer` starts any of them."""

from em_generation.pairs.drawer import PairDrawer as PairDrawer
from em_generation.pairs.drawer import create_pair_drawer as create_pair_drawer
from em_generation.pairs.options import PairOptions as PairOptions

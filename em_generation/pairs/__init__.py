"""Images with their labels; `create_pair_drawer` starts any of the ways to make them."""

from em_generation.pairs.drawer import PairDrawer as PairDrawer
from em_generation.pairs.drawer import create_pair_drawer as create_pair_drawer
from em_generation.pairs.options import PairOptions as PairOptions

"""Files of electron microscopes, decoded by RosettaSciIO, the library of the field.

`reader` has the table of formats and reads a file. Before, `dm`, `tia`, `mrc`, `hdf5` and `checks`
compare its header with its size, since RosettaSciIO believes what a file says. `signals` turns what
RosettaSciIO gives into images, or says by its name what is none.
"""

from em_data.formats.microscopes.reader import NOT_MICROGRAPHS as NOT_MICROGRAPHS
from em_data.formats.microscopes.reader import SUFFIXES as SUFFIXES
from em_data.formats.microscopes.reader import decode_microscope as decode_microscope
from em_data.formats.microscopes.reader import find_companions as find_companions
from em_data.formats.microscopes.reader import find_format as find_format

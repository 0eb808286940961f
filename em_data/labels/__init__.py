"""Labels of micrographs: read from files, carried through cutting, written, and drawn.

`runs` and `masks` have the forms of a mask. Each format has a module that reads it (`read_*`) or
writes it (`write_*`).
"""

from em_data.labels.masks import draw_instance_mask as draw_instance_mask
from em_data.labels.masks import draw_whole_mask as draw_whole_mask
from em_data.labels.read_objects import make_defects as make_defects
from em_data.labels.read_objects import make_objects as make_objects
from em_data.labels.runs import decode_runs as decode_runs
from em_data.labels.runs import encode_runs as encode_runs
from em_data.labels.write_coco import draw_contact_sheet as draw_contact_sheet
from em_data.labels.write_coco import make_coco as make_coco
from em_data.labels.write_coco import write_labelled as write_labelled

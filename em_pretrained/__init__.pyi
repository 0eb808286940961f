from .box import FOLDER as FOLDER
from .box import NAMES as NAMES
from .box import find as find
from .box import list_models as list_models
from .box import path as path
from .box import read_license as read_license
from .box import suggest as suggest

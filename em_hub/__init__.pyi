from .publish import PublishConfig as PublishConfig
from .publish import publish_run as publish_run
from .space import SpaceConfig as SpaceConfig
from .space import publish_space as publish_space

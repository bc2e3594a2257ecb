"""Models. Importing this package registers its families."""

from align.models.family import register
from align.models.hunyuan.family import HUNYUAN

register(HUNYUAN)

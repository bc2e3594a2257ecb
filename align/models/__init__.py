"""Models. Importing this package registers its families."""

from functools import partial

from align.config.families import TABLE
from align.models.family import Family, register, register_lazily
from align.models.hunyuan.family import HUNYUAN

register(HUNYUAN)


def _adopt(model_type: str) -> Family:
    from align.models.adopted.build import adopt

    return adopt(model_type)


for _model_type in TABLE:
    register_lazily(_model_type, partial(_adopt, _model_type))

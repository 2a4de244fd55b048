"""BEVT kit: a thin library under the notebooks. Import the module you need:
``bevt_lib.model.masking``.

Importing the package does one thing: it makes ``import torchvision`` (and so timm) work where a
CPU-only torch meets a torchvision wheel whose compiled operators don't load. A working torchvision
is left as it is.
"""

import sys


def _guard_torchvision() -> None:
    """Declare the two operator schemas that torchvision's Python code registers fakes for.

    Only on the RuntimeError "operator torchvision::nms does not exist": torchvision's transforms
    and models are plain Python and need no compiled operator.
    """
    try:
        import torchvision
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
        for name in [n for n in sys.modules if n.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        import torch

        library = torch.library.Library("torchvision", "DEF")
        for operator in ("nms", "qnms"):
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import torchvision

        # Kept on torchvision itself: a global of this module would be lost on %autoreload.
        torchvision._bevt_kit_schemas = library


_guard_torchvision()

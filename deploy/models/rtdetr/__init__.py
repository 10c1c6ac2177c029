"""RT-DETR, a detection transformer without NMS (Zhao et al., CVPR 2024, arXiv 2304.08069), and RT-DETRv2 (2407.17140).

Architecture and numbers follow the authors' release, lyuwenyu/RT-DETR (``rtdetr_pytorch`` and ``rtdetrv2_pytorch``);
the position embedding's other order follows Hugging Face transformers.

    backbone    ResNet-vd or PP-HGNetV2, maps at strides 8, 16, 32
    encoder     self-attention on the stride-32 map, then a pyramid down and up in CSP blocks of RepVGG convolutions
    decoder     the positions with the best class scores become queries; each layer attends among them, then to a few
                points of each map around its box (deformable attention), and moves the box
    detections  the best pairs of query and class, boxes in pixels of the original image

``layers`` holds what they share and how it folds, ``sampling`` the forms of deformable sampling, ``deploy`` the decoder
that is exported, ``weights`` the checkpoint layouts, ``system`` variants and interface.

What is hard to export: engines that build, run and detect something else. TensorRT's GridSample is wrong in several
versions (``deploy/data/known_bad.yaml``); boxes near 0 and 1 and the selection of queries need more than float16.
"""

from deploy.models.rtdetr.system import SYSTEM

__all__ = ["SYSTEM"]

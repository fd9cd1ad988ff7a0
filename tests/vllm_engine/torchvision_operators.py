"""
Declares two operators that torchvision looks up when it is imported and that only its compiled half defines.

The registry's torchvision is built for CUDA and its compiled half does not load next to a CPU build of torch. vLLM and
the image processors need only the half written in Python. `make test-vllm` has every process of its environment import
this file first.
"""

import torch


# Kept on a module, because the operators go with the object that declared them.
torch.torchvision_operators = torch.library.Library("torchvision", "DEF")
torch.torchvision_operators.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
torch.torchvision_operators.define(
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)

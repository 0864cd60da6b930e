"""The ops: schema, fake, autograd formula, registration and public function of each family. Floor F1.

The kernels live in csrc/ (C++ and CUDA) and kernels/ (Triton); `collm_fast.reference` says what each op means.
"""

from collm_fast.ops._device_errors import check_device_errors
from collm_fast.ops.inject import embed_inject, gather_rows, scatter_rows
from collm_fast.ops.lora import lora_linear
from collm_fast.ops.lora_group import lora_linear_group
from collm_fast.ops.propagate import lightgcn_propagate

__all__ = [
    "check_device_errors",
    "embed_inject",
    "gather_rows",
    "lightgcn_propagate",
    "lora_linear",
    "lora_linear_group",
    "scatter_rows",
]

"""The two gradient products of a fused head in FP8; the forward product never is.

An FP8 projection moves log-probs by up to 0.25 nats, more than the clip range of PPO, so the logits stay products of
bf16 with fp32 sums.  Gradients stand it: e4m3 with one scale a row of the left and a column of the right operand
leaves d_hidden and d_weight within 3e-2 relative and 0.9995 in cosine of the exact ones (tests hold 0.999).

The product is ``torch._scaled_mm`` with row-wise scales, on GPUs of compute capability 9.0 and above.  A block's
product for d_weight is rounded to bf16 once and summed over blocks in fp32.  It has not run on a GPU yet: tests emulate
the product, and ``test_head_on_gpu`` waits for a device.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["Fp8Products", "quantise", "why_not"]

_MAX = torch.finfo(torch.float8_e4m3fn).max
_ALIGNMENT = 16  # of every inner and outer size but the left operand's rows


def why_not(device: torch.device) -> str | None:
    """What keeps this machine from FP8 products, or None."""
    if not hasattr(torch, "_scaled_mm"):
        return f"torch {torch.__version__} has no torch._scaled_mm"
    if device.type != "cuda":
        return f"the weight is on {device.type}, and FP8 products need a CUDA device of compute capability 9.0 (H100)"
    capability = torch.cuda.get_device_capability(device)
    if capability < (9, 0):
        name = torch.cuda.get_device_name(device)
        return f"{name} has compute capability {capability[0]}.{capability[1]}, row-wise FP8 products need 9.0 (H100)"
    return None


def quantise(values: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """e4m3 ``values`` of a matrix and the fp32 scales along ``dim`` (size 1 there): values ~ quantised * scale."""
    scale = (values.abs().amax(dim, keepdim=True).float() / _MAX).clamp(min=1e-35)
    return (values.float() / scale).clamp(-_MAX, _MAX).to(torch.float8_e4m3fn), scale


class Fp8Products:
    """d_hidden and d_weight of one weight, which is quantised once, whatever the number of blocks.

    Memory: one byte a weight, and while a block is multiplied two bytes a logit of the block.
    """

    def __init__(self, weight: Tensor) -> None:
        """``weight [V/TP, H]``, one that ``check`` lets pass."""
        quantised, self._scale = quantise(weight.detach(), 0)
        self._weight = quantised.t().contiguous().t()  # [V/TP, H], columns contiguous as the right operand must be

    @staticmethod
    def check(weight: Tensor) -> None:
        """Refuse what cannot run.

        Raises:
            RuntimeError: the device or the torch release cannot multiply in FP8.
            ValueError: the weight is not bf16, or its sizes are not multiples of 16.
        """
        obstacle = why_not(weight.device)
        if obstacle is not None:
            raise RuntimeError(f"fp8_gradients=True cannot run here: {obstacle}; leave it off for bf16 gradients")
        if weight.dtype != torch.bfloat16 or weight.shape[0] % _ALIGNMENT or weight.shape[1] % _ALIGNMENT:
            raise ValueError(
                f"fp8_gradients=True needs a bf16 weight whose sizes are multiples of {_ALIGNMENT}, got {weight.dtype} "
                f"{list(weight.shape)}: pad the vocabulary (Megatron: make_vocab_size_divisible_by)"
            )

    def hidden_gradient(self, grad_logits: Tensor) -> Tensor:
        """``grad_logits [r, V/TP] @ weight [V/TP, H]`` in bf16."""
        quantised, scale = quantise(grad_logits, 1)
        return _multiply(quantised, self._weight, scale, self._scale)

    def accumulate_weight_gradient(self, grad_logits: Tensor, x: Tensor, total: Tensor) -> None:
        """``total [V/TP, H] (fp32) += grad_logits [r, V/TP]^T @ x [r, H]``."""
        padding = -len(x) % _ALIGNMENT
        if padding:
            grad_logits, x = (torch.nn.functional.pad(part, (0, 0, 0, padding)) for part in (grad_logits, x))
        left, left_scale = quantise(grad_logits, 0)
        right, right_scale = quantise(x, 0)
        total.add_(
            _multiply(left.t().contiguous(), right.t().contiguous().t(), left_scale.t().contiguous(), right_scale)
        )


def _multiply(left: Tensor, right: Tensor, left_scale: Tensor, right_scale: Tensor) -> Tensor:
    """``[M, K] @ [K, N]`` of e4m3 with scales ``[M, 1]`` and ``[1, N]``, in bf16 with fp32 sums."""
    return torch._scaled_mm(
        left, right, scale_a=left_scale, scale_b=right_scale, out_dtype=torch.bfloat16, use_fast_accum=False
    )

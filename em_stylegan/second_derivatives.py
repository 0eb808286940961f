"""Convolutions whose second derivatives cost no more than their first, for training."""

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode


class second_derivatives(TorchFunctionMode):
    """Context in which `F.conv2d` and `F.conv_transpose2d` are differentiated twice efficiently.

    R1 and the path length need it. A convolution is bilinear: its derivatives are convolutions of
    the input or the output's gradient with the weight, and of these two with each other. PyTorch
    differentiates such a derivative by exchanging images and channels, which gives hundreds of
    channels of one pixel, and does so for fixed weights, too. That is correct, but R1 takes twice
    as long. Without second derivatives, PyTorch's own are faster.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.conv2d:
            return _conv2d(*args, **kwargs or {})
        if func is F.conv_transpose2d:
            return _conv_transpose2d(*args, **kwargs or {})
        return func(*args, **kwargs or {})


def _conv2d(input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
    options = (_pair(stride), _pair(padding), _pair(dilation), False, [0, 0], groups)
    return _Convolution.apply(input, weight, bias, options)


def _conv_transpose2d(
    input, weight, bias=None, stride=1, padding=0, output_padding=0, groups=1, dilation=1
):
    output_padding = _pair(output_padding)
    options = (_pair(stride), _pair(padding), _pair(dilation), True, output_padding, groups)
    return _Convolution.apply(input, weight, bias, options)


def _pair(value):
    return [value, value] if isinstance(value, int) else list(value)


class _Convolution(torch.autograd.Function):
    """x [B, I, H, W], weight [O, I / groups, k, l] -> [B, O, H', W'].

    Transposed, the weight is [I, O / groups, k, l]. `options` are those of torch.convolution:
    stride, padding, dilation, transposed, output_padding, groups.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, options):
        ctx.save_for_backward(x, weight)
        ctx.options = options
        return torch.convolution(x, weight, bias, *options)

    @staticmethod
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, _ = ctx.needs_input_grad
        if not torch.is_grad_enabled():
            mask = [needs_x, needs_weight, needs_bias]
            return *_differentiate(gradient, x, weight, ctx.options, mask), None
        return (
            _apply_adjoint(gradient, x, weight, ctx.options) if needs_x else None,
            _WeightGradient.apply(gradient, x, weight, ctx.options) if needs_weight else None,
            gradient.sum(dim=(0, 2, 3)) if needs_bias else None,
            None,
        )


class _WeightGradient(torch.autograd.Function):
    """Gradient of a convolution with respect to its weight: bilinear in `gradient` and x."""

    @staticmethod
    def forward(ctx, gradient, x, weight, options):
        ctx.save_for_backward(gradient, x)
        ctx.options = options
        # only the shape of the weight is used
        return _differentiate(gradient, x, weight, options, [False, True, False])[1]

    @staticmethod
    def backward(ctx, weight):
        gradient, x = ctx.saved_tensors
        needs_gradient, needs_x = ctx.needs_input_grad[:2]
        return (
            _Convolution.apply(x, weight, None, ctx.options) if needs_gradient else None,
            _apply_adjoint(gradient, x, weight, ctx.options) if needs_x else None,
            None,
            None,
        )


def _differentiate(gradient, x, weight, options, mask):
    """Return the gradients in x, weight and bias that `mask` asks for, without a graph."""
    return torch.ops.aten.convolution_backward(
        gradient, x, weight, [gradient.shape[1]], *options, mask
    )


def _apply_adjoint(gradient, x, weight, options):
    """Return the gradient in x, as a convolution in the other direction."""
    stride, padding, dilation, transposed, _, groups = options
    output_padding = [0, 0]
    if not transposed:  # with a stride, several input sizes give one output size: choose that of x
        sides = zip(x.shape[2:], gradient.shape[2:], weight.shape[2:], stride, padding, strict=True)
        output_padding = [to - ((size - 1) * s - 2 * p + k) for to, size, k, s, p in sides]
    options = (stride, padding, dilation, not transposed, output_padding, groups)
    return _Convolution.apply(gradient, weight, None, options)

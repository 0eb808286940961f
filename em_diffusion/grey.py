"""Three-channel autoencoders for grey images: exact, by folding their first and last convolution."""

import torch
from torch import nn


@torch.no_grad()
def fold_to_grey(model):
    """Give an autoencoder one channel at both ends, in place; return it.

    model: `VQModel`, `AutoencoderKL`, or a component of ours that is made like them, with 3 channels or with 1, which is left
        as it is.

    A grey image g fills all channels, and the answer is their mean. Both are linear and stand at the ends, so they go into the
    convolutions there: conv_in(g, g, g) = (sum over inputs of its weights) g, and the mean of conv_out's outputs is conv_out
    with its mean over outputs. Equal to repeating and averaging, up to rounding. Raises `ValueError` for other numbers of
    channels, which are no colours.
    """
    if getattr(model, "grey_inside", False):  # a nonlinear end: the component repeats and averages by itself
        return model
    for end, name in (("encoder", "in_channels"), ("decoder", "out_channels")):
        count = model.config[name]
        if count == 1:
            continue
        if count != 3:
            raise ValueError(
                f"the autoencoder has {name} = {count}; only grey (1) and colour (3) ones can be used for micrographs."
            )
        if end == "encoder":
            model.encoder.conv_in = _convolution(model.encoder.conv_in, model.encoder.conv_in.weight.sum(1, True))
        else:
            old = model.decoder.conv_out
            bias = None if old.bias is None else old.bias.mean(0, True)
            model.decoder.conv_out = _convolution(old, old.weight.mean(0, True), bias)
        model.register_to_config(**{name: 1})
    return model


def _convolution(old, weight, bias=None):
    """A convolution like `old` with this weight, [out, in, k, k], and bias (that of `old`, if not given)."""
    new = nn.Conv2d(
        weight.shape[1], weight.shape[0], old.kernel_size, old.stride, old.padding, bias=old.bias is not None
    )
    new = new.to(weight.device, weight.dtype).requires_grad_(old.weight.requires_grad)
    new.weight.copy_(weight)
    if old.bias is not None:
        new.bias.copy_(old.bias if bias is None else bias)
    return new.train(old.training)

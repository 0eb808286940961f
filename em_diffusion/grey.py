"""Three-channel autoencoders for grey images, by folding their first and last convolution."""

import torch
from torch import nn


@torch.no_grad()
def fold_to_grey(model):
    """Give an autoencoder one channel at both ends, in place; return it.

    The folded model gives what repeating a grey image in all channels and averaging the channels of
    the answer would give, up to rounding. The weights of `conv_in` are summed over inputs, and
    those of `conv_out` averaged over outputs. If a nonlinearity follows `conv_out`, the component
    averages the images itself (`average_output`).

    Args:
        model: `VQModel`, `AutoencoderKL`, or a component of ours that is built like them. A model
            with 1 channel is not changed.

    Raises:
        ValueError: For other numbers of channels than 1 and 3.
    """
    config = model.config
    out_name = "out_channels" if "out_channels" in config else "decoder_channels"
    for name in ("in_channels", out_name):
        if config[name] not in (1, 3):
            raise ValueError(
                f"the autoencoder has {name} = {config[name]}; only grey (1) and colour (3) ones "
                "can be used for micrographs."
            )
    if config.in_channels == 3:
        old = model.encoder.conv_in
        model.encoder.conv_in = _replace(old, old.weight.sum(1, True), old.bias)
        model.register_to_config(in_channels=1)
    if config[out_name] == 3:
        is_linear = "average_output" not in config or config.get("tanh_output") is False
        if not is_linear:
            model.register_to_config(average_output=True)
            return model
        old = model.decoder.conv_out
        model.decoder.conv_out = _replace(old, old.weight.mean(0, True), old.bias.mean(0, True))
        model.register_to_config(out_channels=1)
    return model


def _replace(old, weight, bias):
    """Return a convolution like `old` with this weight [out, in, k, k] and bias [out]."""
    new = nn.Conv2d(weight.shape[1], weight.shape[0], old.kernel_size, old.stride, old.padding)
    new = new.to(weight.device, weight.dtype).train(old.training)
    new.requires_grad_(old.weight.requires_grad)
    new.weight.copy_(weight)
    new.bias.copy_(bias)
    return new

"""StyleGAN2 written straight from the equations of its papers, in float32 and eager mode.

Each sample has its own weights (grouped convolution over the batch), upsampling inserts zeros, pads
and convolves, and every filter is a separate pass. The networks take our weights by name.
gan_step.py compares results and times.
"""

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn

TAPS = torch.tensor([1.0, 3.0, 3.0, 1.0])


def insert_zeros(x):
    """Put a zero after every pixel along both sides: [B, C, H, W] -> [B, C, 2H, 2W]."""
    B, C, H, W = x.shape
    x = F.pad(x.reshape(B, C, H, 1, W, 1), (0, 1, 0, 0, 0, 1))
    return x.reshape(B, C, 2 * H, 2 * W)


def filter_maps(x, padding, gain=1.0):
    """Pad x [B, C, H, W] by (left, right, top, bottom) and filter every map with [1, 3, 3, 1]."""
    num_channels = x.shape[1]
    kernel = torch.outer(TAPS, TAPS).to(x) / 64 * gain
    return F.conv2d(F.pad(x, padding), kernel.expand(num_channels, 1, 4, 4), groups=num_channels)


def upsample(x):
    """Double the side: zeros between the pixels, then the filter."""
    return filter_maps(insert_zeros(x), (2, 1, 2, 1), gain=4.0)


def leaky_relu(x):
    return F.leaky_relu(x, 0.2) * math.sqrt(2)


class Linear(nn.Module):
    def __init__(self, in_features, out_features, lr_multiplier=1.0):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features))
        self.lr_multiplier = lr_multiplier

    def forward(self, x):
        weight = self.weight * self.lr_multiplier / math.sqrt(self.weight.shape[1])
        return F.linear(x, weight, self.bias * self.lr_multiplier)


class Conv(nn.Module):
    """Convolution with equalised learning rate; `down` filters first and keeps every 2nd pixel."""

    def __init__(self, in_channels, out_channels, size, down=False, bias=True):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels, size, size))
        self.bias = nn.Parameter(torch.empty(out_channels)) if bias else None
        self.down = down

    def forward(self, x):
        size = self.weight.shape[2]
        weight = self.weight / math.sqrt(self.weight[0].numel())
        if not self.down:
            x = F.conv2d(x, weight, padding=size // 2)
        else:
            x = F.conv2d(filter_maps(x, (1 + size // 2,) * 4), weight, stride=2)
        return x if self.bias is None else leaky_relu(x + self.bias[None, :, None, None])


class ModulatedConv(nn.Module):
    """Weights of each sample, modulated and normalised (Karras et al. 2020, equations 1, 3)."""

    def __init__(self, in_channels, out_channels, size, w_dim, up=False, demodulate=True):
        super().__init__()
        self.style = Linear(w_dim, in_channels)
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels, size, size))
        self.bias = nn.Parameter(torch.empty(out_channels))
        self.up, self.demodulate = up, demodulate

    def convolve(self, x, w):
        batch_size, num_in = x.shape[:2]
        num_out, _, size, _ = self.weight.shape
        styles = self.style(w)  # [B, I]
        if not self.demodulate:
            styles = styles / math.sqrt(num_in)
        weight = self.weight[None] * styles[:, None, :, None, None]  # [B, O, I, k, k]
        if self.demodulate:
            weight = weight * (weight.square().sum(dim=(2, 3, 4), keepdim=True) + 1e-8).rsqrt()
        padding = size // 2
        if self.up:
            weight, padding = weight.flip((3, 4)), 0
            x = F.pad(insert_zeros(x), (2, 1, 2, 1))  # [B, I, 2H+3, 2W+3]
        weight = weight.reshape(batch_size * num_out, num_in, size, size)
        x = F.conv2d(
            x.reshape(1, batch_size * num_in, *x.shape[2:]),
            weight,
            padding=padding,
            groups=batch_size,
        )
        x = x.reshape(batch_size, num_out, *x.shape[2:])
        return filter_maps(x, (1, 1, 1, 1), gain=4.0) if self.up else x


class Layer(ModulatedConv):
    def __init__(self, in_channels, out_channels, w_dim, resolution, up=False):
        super().__init__(in_channels, out_channels, 3, w_dim, up)
        self.noise_strength = nn.Parameter(torch.empty(()))
        self.register_buffer("noise_const", torch.empty(resolution, resolution))

    def forward(self, x, w, random_noise):
        x = self.convolve(x, w)
        noise = torch.randn(x.shape[0], 1, *x.shape[2:]) if random_noise else self.noise_const
        return leaky_relu(x + noise * self.noise_strength + self.bias[None, :, None, None])


class ToImage(ModulatedConv):
    def __init__(self, in_channels, w_dim):
        super().__init__(in_channels, 1, 1, w_dim, demodulate=False)

    def forward(self, x, w):
        return self.convolve(x, w) + self.bias[None, :, None, None]


class Block(nn.Module):
    def __init__(self, in_channels, out_channels, w_dim, resolution):
        super().__init__()
        self.conv0 = None
        if in_channels:
            self.conv0 = Layer(in_channels, out_channels, w_dim, resolution, up=True)
        else:
            self.const = nn.Parameter(torch.empty(out_channels, resolution, resolution))
        self.conv1 = Layer(out_channels, out_channels, w_dim, resolution)
        self.to_image = ToImage(out_channels, w_dim)

    def forward(self, x, image, ws, random_noise):
        ws = list(ws)
        if self.conv0 is None:
            x = self.const[None].repeat(len(ws[0]), 1, 1, 1)
        else:
            x = self.conv0(x, ws.pop(0), random_noise)
        x = self.conv1(x, ws.pop(0), random_noise)
        own = self.to_image(x, ws.pop(0))
        return x, own if image is None else upsample(image) + own


class Synthesis(nn.Module):
    def __init__(self, w_dim, resolutions, num_channels):
        super().__init__()
        pairs = zip([0] + num_channels[:-1], num_channels, resolutions)
        self.blocks = nn.ModuleList(Block(a, b, w_dim, r) for a, b, r in pairs)

    def forward(self, ws, random_noise):
        x = image = None
        index = 0
        for block in self.blocks:
            num_convs = 1 if block.conv0 is None else 2
            x, image = block(x, image, ws.unbind(1)[index : index + num_convs + 1], random_noise)
            index += num_convs
        return image


class Mapping(nn.Module):
    def __init__(self, z_dim, w_dim, depth):
        super().__init__()
        self.layers = nn.ModuleList(
            Linear(a, b, 0.01) for a, b in pairwise([z_dim] + [w_dim] * depth)
        )
        self.register_buffer("w_mean", torch.zeros(w_dim))

    def forward(self, z):
        x = z / (z.square().mean(dim=1, keepdim=True) + 1e-8).sqrt()
        for layer in self.layers:
            x = leaky_relu(layer(x))
        return x


class Generator(nn.Module):
    """The skip generator, with the weights of a `StyleGAN2Generator`."""

    def __init__(self, ours):
        super().__init__()
        c = ours.config
        resolutions = [2**i for i in range(2, int(math.log2(c.resolution)) + 1)]
        num_channels = [min(c.channel_base // r, c.max_channels) for r in resolutions]
        self.mapping_network = Mapping(c.z_dim, c.w_dim, c.mapping_depth)
        self.synthesis_network = Synthesis(c.w_dim, resolutions, num_channels)
        self.num_ws, self.z_dim = ours.num_ws, c.z_dim
        self.load_state_dict(ours.state_dict())

    def synthesis(self, ws, random_noise=True):
        return self.synthesis_network(ws, random_noise)


class DiscriminatorBlock(nn.Module):
    def __init__(self, in_channels, out_channels, first):
        super().__init__()
        self.from_image = Conv(1, in_channels, 1) if first else None
        self.conv0 = Conv(in_channels, in_channels, 3)
        self.conv1 = Conv(in_channels, out_channels, 3, down=True)
        self.skip = Conv(in_channels, out_channels, 1, down=True, bias=False)

    def forward(self, x):
        x = x if self.from_image is None else self.from_image(x)
        return (self.conv1(self.conv0(x)) + self.skip(x)) / math.sqrt(2)


class Discriminator(nn.Module):
    """The residual discriminator, with the weights of a `StyleGANDiscriminator`."""

    def __init__(self, ours):
        super().__init__()
        c = ours.config
        resolutions = [2**i for i in range(int(math.log2(c.resolution)), 1, -1)]
        num_channels = [min(c.channel_base // r, c.max_channels) for r in resolutions]
        self.blocks = nn.ModuleList(
            DiscriminatorBlock(a, b, i == 0) for i, (a, b) in enumerate(pairwise(num_channels))
        )
        last = num_channels[-1]
        self.conv = Conv(last + 1, last, 3)
        self.linear = Linear(last * 16, last)
        self.out = Linear(last, 1)
        self.group_size = c.group_size
        self.load_state_dict(ours.state_dict())

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        B, C, H, W = x.shape
        groups = x.reshape(min(self.group_size, B), -1, C, H, W)  # [G, B / G, C, H, W]
        deviation = ((groups - groups.mean(dim=0)).square().mean(dim=0) + 1e-8).sqrt()
        deviation = deviation.mean(dim=(1, 2, 3), keepdim=True)
        deviation = deviation.repeat(len(groups), 1, H, W)  # [B, 1, H, W]
        x = self.conv(torch.cat([x, deviation], dim=1))
        return self.out(leaky_relu(self.linear(x.flatten(1))))


class TextbookTraining:
    """The parts of a training step: `main`, `r1` (every 16th step), `path_length` (every 8th).

    Args:
        model, discriminator: Our networks; their weights are copied.
        images: Real images [N, 1, R, R] in memory, to draw batches from.
        config: A `StyleGANConfig`. Half a batch makes the path length, as in ours.
    """

    def __init__(self, model, discriminator, images, config):
        self.config, self.images = config, images
        self.batch_size = config.training.batch_size
        self.model, self.discriminator = Generator(model), Discriminator(discriminator)
        self.average = Generator(model).requires_grad_(False)
        self.optimizers = {
            network: torch.optim.Adam(network.parameters(), lr=0.002, betas=(0.0, 0.99))
            for network in (self.model, self.discriminator)
        }
        self.path_length_mean = torch.zeros(())

    def draw_ws(self, batch_size):
        z = torch.randn(2 * batch_size, self.model.z_dim)
        w, w_second = self.model.mapping_network(z).chunk(2)
        self.model.mapping_network.w_mean.lerp_(w.detach().mean(dim=0), 0.002)
        num_ws = self.model.num_ws
        cutoffs = torch.where(
            torch.rand(batch_size) < 0.9, torch.randint(1, num_ws, (batch_size,)), num_ws
        )
        second = torch.arange(num_ws) >= cutoffs[:, None]  # [B, num_ws]
        return torch.where(second[:, :, None], w_second[:, None], w[:, None])

    def update(self, network, loss):
        optimizer = self.optimizers[network]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    def draw_images(self):
        return self.images[torch.randint(len(self.images), (self.batch_size,))]

    def main(self):
        """Train the generator, then the discriminator, on different images (Goodfellow 2014)."""
        self.discriminator.requires_grad_(False)
        images = self.model.synthesis(self.draw_ws(self.batch_size))
        self.update(self.model, generator_loss(self.discriminator(images)))
        self.discriminator.requires_grad_(True)
        with torch.no_grad():
            images = self.model.synthesis(self.draw_ws(self.batch_size))
        loss = discriminator_loss(
            self.discriminator(self.draw_images()), self.discriminator(images)
        )
        self.update(self.discriminator, loss)
        with torch.no_grad():
            for average, parameter in zip(self.average.parameters(), self.model.parameters()):
                average.copy_(0.998 * average + 0.002 * parameter)

    def r1(self):
        penalty = r1_penalty(self.discriminator, self.draw_images()).mean()
        self.update(self.discriminator, penalty * (self.config.r1_gamma / 2 * 16))

    def path_length(self):
        ws = self.draw_ws(self.batch_size // 2)
        lengths = path_lengths(self.model, ws, torch.randn(len(ws), 1, *self.images.shape[2:]))
        self.path_length_mean = self.path_length_mean.lerp(lengths.detach().mean(), 0.01)
        self.update(self.model, (lengths - self.path_length_mean).square().mean() * 2 * 8)


def generator_loss(scores):
    return F.softplus(-scores).mean()


def discriminator_loss(scores_real, scores_fake):
    return F.softplus(-scores_real).mean() + F.softplus(scores_fake).mean()


def r1_penalty(discriminator, images):
    """Return |dD/dx|^2 of each image [B]."""
    images = images.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(discriminator(images).sum(), images, create_graph=True)
    return gradient.square().sum(dim=(1, 2, 3))


def path_lengths(model, ws, noise, random_noise=True):
    """Return the length of each image's gradient in w [B]."""
    images = model.synthesis(ws, random_noise)
    noise = noise / math.sqrt(images.shape[2] * images.shape[3])
    (gradient,) = torch.autograd.grad((images * noise).sum(), ws, create_graph=True)
    return gradient.square().sum(dim=2).mean(dim=1).sqrt()

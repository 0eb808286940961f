"""Slow, obvious twins of the original networks: functions of (weights by their original name,
configuration, input).

Each walks through its network once, layer by layer, as the papers and the formats describe it. The
same walk with `Shapes` in the place of the weights writes down which tensors a checkpoint of that
configuration holds."""

import math

import torch
import torch.nn.functional as F
import yaml


def write_checkpoint(folder, weights, target, params, name="model"):
    """Write a Lightning checkpoint and its yaml, as the original trainings do; return its path."""
    path = folder / f"{name}.ckpt"
    contents = {"epoch": 3, "global_step": 7, "state_dict": weights, "callbacks": {"x": 1}}
    torch.save(contents | {"optimizer_states": [{"state": torch.ones(5)}]}, path)
    model = {"target": target, "params": params}
    path.with_suffix(".yaml").write_text(yaml.safe_dump({"model": model}))
    return path


def deviation(value, expected):
    """Return the largest difference, relative to the expected output's deviation."""
    return float((value - expected).abs().max() / expected.std())


def rms(value, expected):
    """Return the root mean square of the difference, relative to the output's deviation."""
    return float((value - expected).square().mean().sqrt() / expected.std())


class Shapes(dict):
    """Weights that come into being when they are asked for, random, each with the shape that is
    asked for.
    """

    def __init__(self, seed=0):
        super().__init__()
        self.generator = torch.Generator().manual_seed(seed)

    def random(self, *shape):
        return torch.randn(shape, generator=self.generator)

    def add(self, name, shape):
        fan_in = math.prod(shape[1:])
        self[name + ".weight"] = self.random(*shape) / math.sqrt(fan_in)
        self[name + ".bias"] = 0.1 * self.random(shape[0])

    def add_norm(self, name, channels):
        self[name + ".weight"] = 1 + 0.2 * self.random(channels)
        self[name + ".bias"] = 0.2 * self.random(channels)


def conv(weights, name, x, out, size=3, stride=1, padding=None):
    if isinstance(weights, Shapes):
        weights.add(name, (out, x.shape[1], size, size))
    padding = size // 2 if padding is None else padding
    return F.conv2d(x, weights[name + ".weight"], weights[name + ".bias"], stride, padding)


def norm(weights, name, x, eps):
    """Group normalisation with 32 groups, from its definition."""
    if isinstance(weights, Shapes):
        weights.add_norm(name, x.shape[1])
    grouped = x.reshape(len(x), 32, -1)
    mean = grouped.mean(-1, keepdim=True)
    variance = (grouped - mean).square().mean(-1, keepdim=True)
    normed = ((grouped - mean) / (variance + eps).sqrt()).reshape(x.shape)
    return normed * weights[name + ".weight"].view(-1, 1, 1) + weights[name + ".bias"].view(
        -1, 1, 1
    )


def linear(weights, name, x, out):
    if isinstance(weights, Shapes):
        weights.add(name, (out, x.shape[1]))
    return x @ weights[name + ".weight"].T + weights[name + ".bias"]


def swish(x):
    return x * torch.sigmoid(x)


def double(x):
    """Every pixel four times."""
    return x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)


def halve(x):
    """Means of 2 x 2 pixels."""
    return (
        x[:, :, 0::2, 0::2] + x[:, :, 1::2, 0::2] + x[:, :, 0::2, 1::2] + x[:, :, 1::2, 1::2]
    ) / 4


# ---------------- taming-transformers: encoder, decoder, codes


def taming_block(weights, name, x, out):
    h = conv(weights, f"{name}.conv1", swish(norm(weights, f"{name}.norm1", x, 1e-6)), out)
    h = conv(weights, f"{name}.conv2", swish(norm(weights, f"{name}.norm2", h, 1e-6)), out)
    return h + (x if x.shape[1] == out else conv(weights, f"{name}.nin_shortcut", x, out, size=1))


def taming_attention(weights, name, x):
    """One head over all positions: each takes softmax(q k / sqrt(c)) of the values."""
    channels = x.shape[1]
    normed = norm(weights, f"{name}.norm", x, 1e-6)
    q, k, v = (
        conv(weights, f"{name}.{part}", normed, channels, size=1).flatten(2) for part in "qkv"
    )
    share = torch.softmax(
        q.transpose(1, 2) @ k / math.sqrt(channels), dim=2
    )  # [B, who asks, who answers]
    h = (v @ share.transpose(1, 2)).reshape(x.shape)
    return x + conv(weights, f"{name}.proj_out", h, channels, size=1)


def taming_middle(weights, name, x, config):
    x = taming_block(weights, f"{name}.mid.block_1", x, x.shape[1])
    if config.get("attn_type") != "none":
        x = taming_attention(weights, f"{name}.mid.attn_1", x)
    return taming_block(weights, f"{name}.mid.block_2", x, x.shape[1])


def taming_level(weights, name, x, out, num_blocks, side, config):
    for i in range(num_blocks):
        x = taming_block(weights, f"{name}.block.{i}", x, out)
        if side in config["attn_resolutions"] and config.get("attn_type") != "none":
            x = taming_attention(weights, f"{name}.attn.{i}", x)
    return x


def taming_encoder(weights, config, x):
    side = config["resolution"]
    x = conv(weights, "encoder.conv_in", x, config["ch"])
    for level, multiplier in enumerate(config["ch_mult"]):
        name, out = f"encoder.down.{level}", config["ch"] * multiplier
        x = taming_level(weights, name, x, out, config["num_res_blocks"], side, config)
        if level + 1 < len(config["ch_mult"]):
            if config.get(
                "resamp_with_conv", True
            ):  # one column and one row of zeros, right and below
                x = conv(
                    weights,
                    f"{name}.downsample.conv",
                    F.pad(x, (0, 1, 0, 1)),
                    out,
                    stride=2,
                    padding=0,
                )
            else:
                x = halve(x)
            side //= 2
    x = taming_middle(weights, "encoder", x, config)
    out = config["z_channels"] * (2 if config["double_z"] else 1)
    return conv(weights, "encoder.conv_out", swish(norm(weights, "encoder.norm_out", x, 1e-6)), out)


def taming_decoder(weights, config, z):
    levels = list(enumerate(config["ch_mult"]))
    side = config["resolution"] // 2 ** (len(levels) - 1)
    x = conv(weights, "decoder.conv_in", z, config["ch"] * levels[-1][1])
    x = taming_middle(weights, "decoder", x, config)
    for level, multiplier in reversed(levels):
        name, out = f"decoder.up.{level}", config["ch"] * multiplier
        x = taming_level(weights, name, x, out, config["num_res_blocks"] + 1, side, config)
        if level:
            x = double(x)
            side *= 2
            if config.get("resamp_with_conv", True):
                x = conv(weights, f"{name}.upsample.conv", x, out)
    x = conv(
        weights,
        "decoder.conv_out",
        swish(norm(weights, "decoder.norm_out", x, 1e-6)),
        config["out_ch"],
    )
    return torch.tanh(x) if config.get("tanh_out") else x


def taming_encode(weights, params, x):
    """Encoder and `quant_conv`: latents of a VQ model, mean and log variance of a KL model."""
    z = taming_encoder(weights, params["ddconfig"], x)
    factor = 2 if params["ddconfig"]["double_z"] else 1
    return conv(weights, "quant_conv", z, factor * params["embed_dim"], size=1)


def taming_decode(weights, params, latents):
    return taming_decoder(
        weights,
        params["ddconfig"],
        conv(weights, "post_quant_conv", latents, params["ddconfig"]["z_channels"], size=1),
    )


def nearest_codes(weights, params, latents):
    """The nearest code of each position and its number, by comparing with all."""
    if isinstance(weights, Shapes):
        weights["quantize.embedding.weight"] = weights.random(
            params["n_embed"], params["embed_dim"]
        )
    codes = weights["quantize.embedding.weight"]
    distances = (latents.movedim(1, -1)[..., None, :] - codes).square().sum(-1)  # [B, h, w, codes]
    indices = distances.argmin(-1)
    return codes[indices].movedim(-1, 1), indices


def most_probable_codes(weights, params, latents):
    """The most probable code of each position and its number."""
    if isinstance(weights, Shapes):
        weights["quantize.embed.weight"] = weights.random(params["n_embed"], params["embed_dim"])
    indices = conv(weights, "quantize.proj", latents, params["n_embed"], size=1).argmax(1)
    return weights["quantize.embed.weight"][indices].movedim(-1, 1), indices


def random_taming(kind, params, seed=0):
    """Random weights of an autoencoder of this kind, by their original names."""
    weights = Shapes(seed)
    config = params["ddconfig"]
    latents = taming_encode(weights, params, torch.zeros(1, config["in_channels"], 32, 32))
    if kind == "KL":
        latents = latents[:, : params["embed_dim"]]
    else:
        latents, _ = (most_probable_codes if kind == "Gumbel VQ" else nearest_codes)(
            weights, params, latents
        )
    taming_decode(weights, params, latents)
    return dict(weights)


# ---------------------------------------------------------------- latent-diffusion: U-Net


def unet_block(weights, name, x, time, out, config, resample=None):
    def step(h):
        return h if resample is None else resample(h)

    h = step(swish(norm(weights, f"{name}.in_layers.0", x, 1e-5)))
    h = conv(weights, f"{name}.in_layers.2", h, out)
    both = config.get("use_scale_shift_norm", False)
    t = linear(weights, f"{name}.emb_layers.1", swish(time), out * (2 if both else 1))[
        :, :, None, None
    ]
    if both:
        scale, shift = t[:, :out], t[:, out:]
        h = norm(weights, f"{name}.out_layers.0", h, 1e-5) * (1 + scale) + shift
    else:
        h = norm(weights, f"{name}.out_layers.0", h + t, 1e-5)
    h = conv(weights, f"{name}.out_layers.3", swish(h), out)
    x = step(x)
    return h + (
        x if x.shape[1] == out else conv(weights, f"{name}.skip_connection", x, out, size=1)
    )


def unet_attention(weights, name, x, config):
    """Attention head by head; queries and keys are each multiplied by the head's width to the power
    of -1/4.
    """
    channels, shape = x.shape[1], x.shape
    heads = (
        config["num_heads"]
        if config.get("num_head_channels", -1) == -1
        else channels // config["num_head_channels"]
    )
    width = channels // heads
    flat = x.flatten(2)
    normed = norm(weights, f"{name}.norm", flat[..., None], 1e-5)[..., 0]
    if isinstance(weights, Shapes):
        weights.add(f"{name}.qkv", (3 * channels, channels, 1))
        weights.add(f"{name}.proj_out", (channels, channels, 1))
    qkv = (
        weights[f"{name}.qkv.weight"][..., 0] @ normed + weights[f"{name}.qkv.bias"][:, None]
    )  # [B, 3 C, positions]
    answers = []
    for head in range(heads):
        if config.get("use_new_attention_order"):  # all queries, all keys, all values
            starts = [part * channels + head * width for part in range(3)]
        else:  # queries, keys and values of one head, then of the next
            starts = [(3 * head + part) * width for part in range(3)]
        q, k, v = (qkv[:, start : start + width] for start in starts)
        q, k = q * width**-0.25, k * width**-0.25
        answers.append(v @ torch.softmax(q.transpose(1, 2) @ k, dim=-1).transpose(1, 2))
    h = (
        weights[f"{name}.proj_out.weight"][..., 0] @ torch.cat(answers, dim=1)
        + weights[f"{name}.proj_out.bias"][:, None]
    )
    return (flat + h).reshape(shape)


def unet(weights, config, x, timesteps):
    """latent-diffusion's U-Net: noise (or whatever it was trained for) of latents x [B, C, h, w] at
    timesteps [B].
    """
    width, num_blocks = config["model_channels"], config["num_res_blocks"]
    half = width // 2
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32) / half)
    angles = timesteps[:, None].float() * frequencies
    embedding = torch.cat([angles.cos(), angles.sin()], dim=1).to(x.dtype)
    time = linear(
        weights,
        "time_embed.2",
        swish(linear(weights, "time_embed.0", embedding, 4 * width)),
        4 * width,
    )

    def resample(name, x, factor):
        function = double if factor == 2 else halve
        if config.get("resblock_updown"):
            return unet_block(weights, name, x, time, x.shape[1], config, function)
        if not config.get("conv_resample", True):
            return function(x)
        if factor == 2:
            return conv(weights, f"{name}.conv", double(x), x.shape[1])
        return conv(weights, f"{name}.op", x, x.shape[1], stride=2)

    levels = list(enumerate(config["channel_mult"]))
    x = conv(weights, "input_blocks.0.0", x, width)
    skips, block = [x], 1
    for level, multiplier in levels:
        for _ in range(num_blocks):
            x = unet_block(weights, f"input_blocks.{block}.0", x, time, width * multiplier, config)
            if 2**level in config["attention_resolutions"]:
                x = unet_attention(weights, f"input_blocks.{block}.1", x, config)
            skips.append(x)
            block += 1
        if level + 1 < len(levels):
            x = resample(f"input_blocks.{block}.0", x, 0.5)
            skips.append(x)
            block += 1
    x = unet_block(weights, "middle_block.0", x, time, x.shape[1], config)
    x = unet_attention(weights, "middle_block.1", x, config)
    x = unet_block(weights, "middle_block.2", x, time, x.shape[1], config)
    block = 0
    for level, multiplier in reversed(levels):
        for i in range(num_blocks + 1):
            x = torch.cat([x, skips.pop()], dim=1)
            x = unet_block(weights, f"output_blocks.{block}.0", x, time, width * multiplier, config)
            place = 1
            if 2**level in config["attention_resolutions"]:
                x = unet_attention(weights, f"output_blocks.{block}.1", x, config)
                place = 2
            if level and i == num_blocks:
                x = resample(f"output_blocks.{block}.{place}", x, 2)
            block += 1
    return conv(weights, "out.2", swish(norm(weights, "out.0", x, 1e-5)), config["out_channels"])


def random_unet(config, seed=0):
    """Random weights of a U-Net, by their original names."""
    weights = Shapes(seed)
    side = 2 ** (len(config["channel_mult"]) - 1)
    unet(weights, config, torch.zeros(1, config["in_channels"], side, side), torch.zeros(1))
    return dict(weights)


# ---------------------------------------------------------------- DALL-E's dVAE


def dalle_conv(weights, name, x, out, size):
    if isinstance(weights, Shapes):
        weights[name + ".w"] = weights.random(out, x.shape[1], size, size) / math.sqrt(
            x.shape[1] * size**2 / 2
        )
        weights[name + ".b"] = 0.1 * weights.random(out)
    return F.conv2d(x, weights[name + ".w"], weights[name + ".b"], padding=size // 2)


def dalle_group(weights, name, x, out, num_blocks, sizes):
    for i in range(num_blocks):
        block, h = f"{name}.block_{i + 1}", x
        for j, size in enumerate(sizes):
            h = dalle_conv(
                weights,
                f"{block}.res_path.conv_{j + 1}",
                h.clamp(min=0),
                out if j == 3 else out // 4,
                size,
            )
        x = x if x.shape[1] == out else dalle_conv(weights, f"{block}.id_path", x, out, 1)
        x = x + h / (4 * num_blocks) ** 2
    return x


def dalle_encoder(weights, config, x):
    """Logits of the codes, of images in [0.1, 0.9]."""
    x = dalle_conv(weights, "blocks.input", x, config["n_hid"], 7)
    for group in range(4):
        if group:
            corners = [x[:, :, i::2, j::2] for i in range(2) for j in range(2)]
            x = torch.stack(corners).amax(0)
        out = config["n_hid"] * 2**group
        x = dalle_group(weights, f"blocks.group_{group + 1}", x, out, config["n_blk"], (3, 3, 3, 1))
    return dalle_conv(weights, "blocks.output.conv", x.clamp(min=0), config["vocab_size"], 1)


def dalle_decoder(weights, config, one_hot):
    """Location and width of the pixels' distribution, of codes as one-hot vectors."""
    x = dalle_conv(weights, "blocks.input", one_hot, config["n_init"], 1)
    for group in range(4):
        x = double(x) if group else x
        out = config["n_hid"] * 2 ** (3 - group)
        x = dalle_group(weights, f"blocks.group_{group + 1}", x, out, config["n_blk"], (1, 3, 3, 3))
    return dalle_conv(weights, "blocks.output.conv", x.clamp(min=0), 2 * config["channels"], 1)


def random_dalle(config, seed=0):
    """Random weights of both halves."""
    encoder, decoder = Shapes(seed), Shapes(seed + 1)
    dalle_encoder(encoder, config, torch.zeros(1, config["channels"], 8, 8))
    dalle_decoder(decoder, config, torch.zeros(1, config["vocab_size"], 1, 1))
    return dict(encoder), dict(decoder)

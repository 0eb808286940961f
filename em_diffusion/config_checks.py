"""What `em_diffusion.config` checks beyond the bounds of single fields."""


def check_start(autoencoder, denoiser):
    """Refuse stages that lack a trained model to start from, or a changing encoder below one."""
    if autoencoder.init_from is None:
        if autoencoder.num_images == 0:
            raise ValueError(
                "autoencoder.num_images is 0, but must be greater than 0 unless a trained "
                "autoencoder is given. Use --autoencoder.num-images or --autoencoder.init-from."
            )
        if autoencoder.freeze_encoder:
            raise ValueError(
                "autoencoder.freeze_encoder keeps a trained encoder, but none is given. Use "
                "--autoencoder.init-from."
            )
        if denoiser.init_from is not None:
            raise ValueError(
                f"denoiser.init_from is {denoiser.init_from}, whose latents are those of its own "
                f"autoencoder. Use --init-from {denoiser.init_from} for both."
            )
    is_trained = autoencoder.num_images > 0 and not autoencoder.freeze_encoder
    if denoiser.init_from is not None and is_trained:
        raise ValueError(
            f"denoiser.init_from is {denoiser.init_from}, but the encoder of its latents would be "
            "trained further. Use --autoencoder.freeze-encoder, or --autoencoder.num-images 0."
        )


def check_objective(config):
    """Refuse loss weights and noise schedules that do not suit the prediction."""
    if config.beta_end < config.beta_start:
        raise ValueError(
            f"denoiser.beta_end is {config.beta_end}, but must be at least denoiser.beta_start "
            f"({config.beta_start}). Use --denoiser.beta-end."
        )
    if config.zero_terminal_snr and config.prediction_type != "v_prediction":
        reason = (
            "with flow, the last timestep is pure noise already"
            if config.prediction_type == "flow"
            else "predicting the noise says nothing about an image that is pure noise"
        )
        raise ValueError(
            'denoiser.zero_terminal_snr needs prediction_type "v_prediction", but it is '
            f'"{config.prediction_type}": {reason}. Use --denoiser.prediction-type v_prediction, '
            "or turn zero_terminal_snr off."
        )
    if config.min_snr_gamma and config.prediction_type == "flow":
        raise ValueError(
            f"denoiser.min_snr_gamma is {config.min_snr_gamma}, but must be 0 with prediction_type "
            '"flow". Use --denoiser.timestep-density to weight timesteps.'
        )
    if config.min_snr_gamma and config.zero_terminal_snr:
        raise ValueError(
            f"denoiser.min_snr_gamma is {config.min_snr_gamma}, which gives the last timestep of "
            "zero_terminal_snr the weight 0, but sampling starts there. Turn one of the two off."
        )


def check_attention(config):
    num_levels = len(config.channel_multipliers)
    if any(level >= num_levels for level in config.attention_levels):
        raise ValueError(
            f"denoiser.attention_levels is {config.attention_levels}, but there are {num_levels} "
            "levels, counted from 0, the finest. Use --denoiser.attention-levels."
        )
    channels = config.block_out_channels
    attending = [channels[level] for level in config.attention_levels] + [channels[-1]]
    name = "num_attention_heads" if config.num_attention_heads else "attention_head_dim"
    if any(count % getattr(config, name) for count in attending):
        raise ValueError(
            f"denoiser.{name} is {getattr(config, name)}, but must divide the channels of all "
            f"levels with attention, {attending}. Use --denoiser.{name.replace('_', '-')}."
        )


def check_groups(block_out_channels, norm_num_groups, name):
    if any(channels % norm_num_groups for channels in block_out_channels):
        raise ValueError(
            f"{name}.norm_num_groups is {norm_num_groups}, but must divide the channels of all "
            f"levels, {tuple(block_out_channels)}. Use --{name}.norm-num-groups."
        )

"""The stage of a run that measures how defects lie in labelled micrographs."""

from em_diffusion.layouts import draw_layout, fit_layout_sampler, stitch_layouts
from em_diffusion.masks import load_layout_sampler
from em_evaluation.layouts import compare_layouts, describe_tests
from em_training import fail_together, make_image_rng
from em_training.weights import save_model

NUM_DRAWN_LAYOUTS = 24  # that are compared with those of labelled micrographs


def run_layout_stage(config, data, accelerator, out):
    """Fit the layout sampler to labelled training tiles, or load it; None without masks."""
    if not config.denoiser.mask_conditional:
        return None
    with fail_together(accelerator):
        if accelerator.is_main_process and load_layout_sampler(out) is None:
            measure_layouts(config, data, accelerator, out)
    return load_layout_sampler(out)


def measure_layouts(config, data, accelerator, out):
    """Fit the layout sampler, say how its layouts compare, and save it."""
    layouts, shapes = stitch_layouts(data.train, config.tiles.downsample)
    size_nm, kinds = data.summary.get("pixel_size_nm"), data.train.kinds
    sampler = fit_layout_sampler(
        layouts, shapes, size_nm, kinds, seed=config.seed, say=accelerator.print
    )
    sizes = shapes * max(1, NUM_DRAWN_LAYOUTS // len(shapes))
    drawn = [draw_layout(sampler, *size, make_image_rng(0, i)) for i, size in enumerate(sizes)]
    tests = compare_layouts(layouts, drawn, shapes, sizes, size_nm, kinds)
    accelerator.print(
        f"layouts: measured on {sampler.config.source}; drawn ones beside those of the "
        f"labelled training micrographs:\n{describe_tests(tests)}"
    )
    save_model(sampler, out / "layouts")

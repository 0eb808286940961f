"""The report's grids, and which images its quiz may ask for: none that the page shows elsewhere."""

import numpy as np

from em_data.views import ELEMENTS, apply_symmetry
from em_evaluation.quiz import NUM_QUIZ_IMAGES


def choose_pictures(sets, generated, floor_sets, floor_info, num_pictures, gallery=(), seed=0):
    """Return the report's grids: the first images of each set, as they were drawn, not selected; and after them `gallery`.

    The held-out micrographs' and the models' have, as `unseen`, images for the quiz (`choose_unseen`).
    """

    def picture(key, title, caption, images):
        levels = images.levels[:num_pictures, 0]
        return {
            "key": key,
            "title": title,
            "caption": caption,
            "levels": levels,
            "is_model": key in generated,
        }

    pictures = [picture("held_out", "Real", "held-out tiles, never trained on", sets["held_out"])]
    pictures += [picture(name, name, "generated", images) for name, images in generated.items()]
    pictures.append(picture("train", "Real, trained on", "training tiles", sets["train"]))
    for key, images in floor_sets.items():
        if key != "real":
            same = key.startswith(("reconstruction", "surrogates"))
            caption = "of the training tiles beside it" if same else floor_info[key]["description"]
            name = floor_info[key]["name"]
            pictures.append(picture(key, name[0].upper() + name[1:], caption, images))
    pictures += gallery
    shown = [image for each in pictures for image in each["levels"]]
    for each, images in zip(pictures, (sets["held_out"], *generated.values())):
        each["unseen"] = choose_unseen(images.levels[:, 0], shown, seed)
    return pictures


def choose_unseen(levels, shown, seed=0, most=NUM_QUIZ_IMAGES):
    """Return at most `most` of the images uint8 [N, H, W], drawn at random, each content once: none that is among the images `shown`,
    turned or flipped in any way.
    """
    known, chosen = {_name_content(image) for image in shown}, []
    for i in np.random.default_rng(seed).permutation(len(levels)):
        name = _name_content(levels[i])
        if name not in known:
            known.add(name)
            chosen.append(i)
        if len(chosen) == most:
            break
    return levels[np.array(chosen, int)]


def _name_content(image) -> bytes:
    """Return what an image [H, W] has in common with its eight symmetries, and with nothing else."""
    return min(np.ascontiguousarray(apply_symmetry(image, name)).tobytes() for name in ELEMENTS)

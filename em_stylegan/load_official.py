"""Convert the pickles that the trainings of stylegan2-ada-pytorch and stylegan3 write, and execute nothing that is in them.

python -m em_stylegan.load_official IN.pkl OUT_DIR
"""

import argparse
from pathlib import Path

from em_stylegan.official_networks import discriminator_from_official, generator_from_official
from em_stylegan.official_pickle import read_pickle
from em_training.safe_pickle import Record

CONVERTERS = {"G_ema": generator_from_official, "G": generator_from_official, "D": discriminator_from_official}


def main():
    parser = argparse.ArgumentParser(
        description="Convert a pickle of stylegan2-ada-pytorch or stylegan3 to safetensors."
    )
    parser.add_argument("pickle", type=Path)
    parser.add_argument("out_dir", type=Path)
    args = parser.parse_args()
    try:
        contents = read_pickle(args.pickle)
        models = {key: make(contents[key]) for key, make in CONVERTERS.items() if isinstance(contents.get(key), Record)}
        if not models:
            raise ValueError(
                f"{args.pickle} holds no network: expected 'G_ema', 'G' or 'D', found {', '.join(map(str, contents))}."
            )
    except (ValueError, OSError) as error:
        parser.exit(2, f"error: {error}\n")
    for key, model in models.items():
        model.save_pretrained(args.out_dir / key)
        print(f"{key} -> {args.out_dir / key}")


if __name__ == "__main__":
    main()

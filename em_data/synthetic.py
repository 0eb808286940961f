"""Write synthetic micrographs with masks, COCO labels and a contact sheet.

The command: python -m em_data.synthetic --num 16 --out DIR
"""

import argparse
from pathlib import Path

from em_data.labels import write_labelled
from em_data.synthetic_materials import synthesise_materials
from em_data.synthetic_micrographs import PIXEL_SIZE_NM, synthesise_micrographs
from em_data.synthetic_other import synthesise_other_micrographs
from em_data.synthetic_variety import synthesise_varied_micrographs


def main(arguments=None):
    parser = argparse.ArgumentParser(
        prog="python -m em_data.synthetic", description=__doc__.splitlines()[0]
    )
    add = parser.add_argument
    add("--num", type=int, default=16, help="number of micrographs (default: 16)")
    add("--out", type=Path, required=True, help="folder to write to")
    add("--seed", type=int, default=0)
    add("--size", type=int, default=512, help="side in pixels (default: 512)")
    look = parser.add_mutually_exclusive_group()
    look.add_argument(
        "--pixel-size-nm", type=float, default=PIXEL_SIZE_NM, help="default: %(default)s"
    )
    look.add_argument(
        "--varied",
        action="store_true",
        help="draw contrast, defects, noise and pixel size anew for each micrograph",
    )
    look.add_argument(
        "--materials",
        action="store_true",
        help="draw three materials that look different, in turns",
    )
    look.add_argument(
        "--other", action="store_true", help="draw the same defects as another microscope sees them"
    )
    args = parser.parse_args(arguments)
    try:
        if args.varied:
            drawn = synthesise_varied_micrographs(args.num, args.seed, args.size)
        elif args.materials:
            drawn = synthesise_materials(args.num, args.seed, args.size)
        elif args.other:
            drawn = synthesise_other_micrographs(args.num, args.seed, args.size)
        else:
            drawn = synthesise_micrographs(args.num, args.seed, args.size, args.pixel_size_nm)
        micrographs = list(drawn)
        write_labelled(micrographs, args.out)
    except ValueError as error:
        parser.error(str(error))
    num_defects = sum(len(micrograph.defects) for micrograph in micrographs)
    print(
        f"{args.out}: {args.num} micrographs in images/, {num_defects} labelled defects in labels/ "
        "and masks/"
    )


if __name__ == "__main__":
    main()

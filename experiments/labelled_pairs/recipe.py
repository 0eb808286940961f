"""Make labelled pairs in four ways, and measure what they add to a detector.

    python experiments/labelled_pairs/recipe.py                    # what `make pairs` runs
    python experiments/labelled_pairs/recipe.py --data FOLDER --tiles resolution=128 downsample=2

The microscope of the user is the source synthetic-other; the simulator is `synthetic`.

1. An LDM trains on micrographs without labels. Meanwhile the detectors that need no pairs train.
2. The LDM makes pairs: raw (the simulation as it is), way1 (simulated, made real), way3 (defects of
   the N labelled micrographs, pasted on grounds) and way2 (fine-tuned on the N labelled micrographs
   with their masks). Ways 2 and 3 see the labelled micrographs, so that there is a folder for each
   N and split. way4 is a CycleGAN that translates the simulation to the micrographs without
   labels. No generator sees a micrograph of the test set.
3. Detectors train on each. The page says how well pairs follow their labels, and what they add.

A second start goes on where the first was stopped.
"""

import argparse
import os
import shlex
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from em_data.labels import write_labelled
from em_data.synthetic_micrographs import synthesise_micrograph

NUMS = (10, 50)
CURVE = (5, 25, 100)
EMBEDDED = {
    # micrographs without labels, of other specimens than those with labels
    "unlabelled": "--tiles.seed 0 --tiles.num-synthetic 48",
    # labelled ones: 26 specimens to train on, 26 for the test
    "labelled": "--tiles.seed 1 --tiles.num-synthetic 208 --tiles.micrograph-size 64 "
    "--tiles.resolution 64 --tiles.split specimen --tiles.held-out-fraction 0.5",
    "kinds": "loop=loop_100+loop_111",  # dots of 4 px are too small for an overlap of a half
}
OTHER_TILES = ("resolution=64", "split=micrograph", "held_out_fraction=0.33")  # of --data FOLDER


class Recipe:
    """The steps and where they write."""

    def __init__(self, arguments):
        self.arguments, self.out = arguments, Path(arguments.runs)
        self.is_embedded = arguments.data == "synthetic-other"
        # the LDM and the detectors split alike, so that the LDM does not see the test set
        tiles = [word for pair in (*OTHER_TILES, *arguments.tiles) for word in split_pair(pair)]
        self.unlabelled = EMBEDDED["unlabelled"].split() if self.is_embedded else tiles
        self.labelled = EMBEDDED["labelled"].split() if self.is_embedded else tiles
        kinds = arguments.kinds or (EMBEDDED["kinds"].split() if self.is_embedded else [])
        self.ways = arguments.ways or ([1, 2, 3, 4] if kinds else [1, 2, 3])
        self.gain = ["-m", "em_evaluation.detector_gain", "--data", arguments.data]
        self.gain += ["--out", str(self.out / "gain")]
        self.gain += [*self.labelled, *(["--kinds", *kinds] if kinds else [])]
        self.gain += words("--nums", arguments.nums) + words("--splits", [arguments.splits])
        self.seeds = words("--curve", arguments.curve) + words("--seeds", [arguments.seeds])
        self.seeds += words("--segmenter.num-steps", [arguments.num_steps])

    def run(self):
        """Do all steps; print the minutes of each."""
        start = time.perf_counter()
        self.write_labelled()
        raw = [f"raw={self.make_raw()}"] if self.is_embedded else []
        without = [*self.gain, *self.seeds, *words("--pairs", raw)]
        before = self.start("detectors without pairs", without)  # beside the LDM and its pairs
        if not (self.out / "ldm" / "run.json").is_file():
            self.call("ldm", self.list_ldm())
        say_minutes("the LDM", start)
        makers = (self.make_way1, self.make_way2, self.make_way3, self.make_way4)
        pairs = raw + [word for way in self.ways for word in makers[way - 1]()]
        say_minutes("all pairs", start)
        stop(before)  # the next command goes on with its trainings, on all cores
        jobs = ["--jobs", str(self.arguments.jobs)]
        self.call("detectors", [*self.gain, *self.seeds, *words("--pairs", pairs), *jobs])
        say_minutes("everything", start)

    # ------------------------------------------------------------ steps

    def write_labelled(self):
        """Write the labelled micrographs of each N and split."""
        if not (self.out / "labelled").is_dir():
            pattern = str(self.out / "labelled" / "{num}" / "{split}")
            self.call("labelled micrographs", [*self.gain, "--write-labelled", pattern])

    def list_ldm(self):
        """Return the command that trains the LDM without labels."""
        command = ["train_ldm.py", "demo", "--data", self.arguments.data, *self.unlabelled]
        command += ["--out", str(self.out / "ldm"), "--init-from", "em-ldm-64"]
        return [*command, *words("--denoiser.num-images", [self.arguments.num_images])]

    def make_raw(self) -> Path:
        """Write simulated micrographs as they are."""
        folder = self.out / "raw"
        if not folder.is_dir() and not self.arguments.dry_run:
            seeds = range(2_000_000, 2_000_000 + 4 * self.arguments.num_pairs, 4)  # a specimen each
            write_labelled([synthesise_micrograph(seed, 64) for seed in seeds], folder)
        return folder

    def make_way1(self) -> list[str]:
        """Make simulated micrographs real; of other data, with layouts like the labelled ones."""
        strength = ["--strength", str(self.arguments.strength)]
        if self.is_embedded:
            folder = self.generate("ldm", "way1", "simulated", self.arguments.num_pairs, strength)
            return [f"way1={folder}"]

        def make(num, split):
            labelled = ["--labelled", str(self.out / "labelled" / f"{num}/{split}"), *strength]
            self.generate(
                "ldm", f"way1/{num}/{split}", "simulated", self.arguments.num_per_split, labelled
            )

        self.for_each_split(make)
        return [f"way1={self.out}/way1/{{num}}/{{split}}"]

    def make_way2(self) -> list[str]:
        """Fine-tune the LDM on the labelled micrographs and their masks, and draw pairs."""

        def make(num, split):
            run = f"mask/{num}/{split}"
            if not (self.out / run / "run.json").is_file():
                self.call(f"way2 {num} {split}", self.list_mask(run, num, split))
            self.generate(run, f"way2/{num}/{split}", "mask", self.arguments.num_per_split)

        self.for_each_split(make)
        return [f"way2={self.out}/way2/{{num}}/{{split}}"]

    def list_mask(self, run, num, split) -> list[str]:
        """Return the command that fine-tunes the LDM on labelled micrographs."""
        command = ["train_ldm.py", "demo", "--data", str(self.out / "labelled" / f"{num}/{split}")]
        command += ["--out", str(self.out / run), "--init-from", str(self.out / "ldm")]
        command += ["--tiles.held-out-fraction", "0.1"]  # one of ten, for the loss while it trains
        command += ["--autoencoder.num-images", "0", "--denoiser.mask-conditional"]
        return [*command, *words("--denoiser.num-images", [self.arguments.num_mask_images])]

    def make_way3(self) -> list[str]:
        """Paste the defects of the labelled micrographs on grounds that the LDM draws."""

        def make(num, split):
            labelled = ["--labelled", str(self.out / "labelled" / f"{num}/{split}")]
            self.generate(
                "ldm", f"way3/{num}/{split}", "copy-paste", self.arguments.num_per_split, labelled
            )

        self.for_each_split(make)
        return [f"way3={self.out}/way3/{{num}}/{{split}}"]

    def make_way4(self) -> list[str]:
        """Train a CycleGAN from the simulation to the micrographs; translate simulated tiles."""
        if not (self.out / "cyclegan" / "run.json").is_file():
            command = ["train_cyclegan.py", "demo", "synthetic", self.arguments.data]
            command += [*self.unlabelled, "--out", str(self.out / "cyclegan")]
            command += [] if self.is_embedded else ["--source-tiles.downsample", "1"]
            command += words("--training.num-images", [self.arguments.num_translation_images])
            self.call("cyclegan", command)
        return [f"way4={self.generate('cyclegan', 'way4', 'mask', self.arguments.num_pairs)}"]

    def for_each_split(self, make):
        """Call `make(num, split)` for all of them, several at a time."""
        with ThreadPoolExecutor(self.arguments.jobs) as pool:
            calls = [
                pool.submit(make, num, split)
                for num in self.arguments.nums
                for split in range(self.arguments.splits)
            ]
            for call in calls:
                call.result()

    def generate(self, model, name, way, num_images, more=()) -> Path:
        """Generate pairs into a folder, unless that is done."""
        out = self.out / name
        done = out / "generation.json"
        if not done.is_file() or not (out / "labels" / "coco.json").is_file():
            command = ["generate.py", "--model", str(self.out / model), "--out", str(out)]
            command += ["--num-images", str(num_images), "--pairs", way, "--labels", "coco", *more]
            self.call(f"pairs {name}", command)
        return out

    # ------------------------------------------------------------ processes

    def call(self, title, command):
        """Run a command to its end."""
        wait(self.start(title, command))

    def start(self, title, command):
        """Start a command; its output goes to logs/."""
        log = self.out / "logs" / f"{title.replace(' ', '_').replace('/', '_')}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        shown = f"\n  {shlex.join(command)}" if self.arguments.dry_run else ""
        print(f"{title}: {log}{shown}\n", end="", flush=True)  # one text: threads call this
        if self.arguments.dry_run:
            return None
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        with log.open("w") as file:
            return subprocess.Popen(
                [sys.executable, *command], stdout=file, stderr=subprocess.STDOUT, env=environment
            ), log


def wait(started) -> None:
    """Wait for a command; end with the last lines of its log if it failed."""
    if started is None:
        return
    process, log = started
    if process.wait() != 0:
        lines = log.read_text().splitlines()[-5:]
        raise SystemExit("\n".join([*lines, f"error: a step failed; see {log}"]))


def stop(started) -> None:
    """Stop a command that can go on later; end like `wait` if it has failed already."""
    if started is not None and started[0].poll() is None:
        started[0].terminate()
        started[0].wait()
    elif started is not None:
        wait(started)


def words(flag, values) -> list[str]:
    """Return a flag with its values as words; nothing without values."""
    return [flag, *map(str, values)] if values else []


def split_pair(pair) -> list[str]:
    """Return KEY=VALUE as a flag of tiles."""
    key, _, value = pair.partition("=")
    return [f"--tiles.{key.replace('_', '-')}", value]


def say_minutes(what, start):
    print(f"{what}: {(time.perf_counter() - start) / 60:.1f} minutes", flush=True)


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--runs", default="runs/labelled_pairs", help="folder for everything that is made")
    add("--data", default="synthetic-other", help="labelled micrographs: a folder or a source")
    add("--tiles", nargs="*", default=[], help="KEY=VALUE of the tiles of --data")
    add("--kinds", nargs="*", default=[], help="kinds, as of em_evaluation.detector_gain")
    add("--nums", nargs="*", type=int, default=NUMS, help="numbers of labelled micrographs")
    add("--curve", nargs="*", type=int, default=CURVE, help="more numbers, without pairs")
    add("--splits", type=int, default=5)
    add("--seeds", type=int, default=3)
    add("--num-pairs", type=int, default=400, help="images of raw, way 1 and way 4")
    add("--num-per-split", type=int, default=200, help="images of ways 2 and 3, each N and split")
    add("--strength", type=float, default=0.2, help="of way 1; 0.5 draws other defects")
    add(
        "--ways",
        nargs="*",
        type=int,
        choices=(1, 2, 3, 4),
        help="ways to make pairs; None: all, but 1 2 3 for other data without --kinds, since way 4 "
        "has the kinds of the simulation (join them, such as loop=MINE+loop_100+loop_111)",
    )
    add("--num-images", type=int, default=48_000, help="training images of the LDM")
    add("--num-mask-images", type=int, default=16_000, help="training images of way 2, each split")
    add("--num-translation-images", type=int, default=6_000, help="training images of way 4")
    add("--num-steps", type=int, default=600, help="steps of each training of a detector")
    add("--jobs", type=int, default=2, help="processes")
    add("--dry-run", action="store_true", help="print the commands")
    Recipe(parser.parse_args(arguments)).run()


if __name__ == "__main__":
    main()

"""The commands of README.md run, and the flags and links of the documentation exist."""

import importlib.util
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from support import slurm

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
SCRIPTS = (
    "train_ldm.py",
    "train_gan.py",
    "train_cyclegan.py",
    "generate.py",
    "evaluate.py",
    "publish.py",
)
# commands of the README that no test runs, and why
NOT_RUN = {
    "make demo": "trains for minutes; tests/test_commands.py runs its steps",
    "make test": "is what runs this test",
    "python3.11 -m venv": "installs over the network",
    "pip install": "installs over the network",
    "python train_lora.py": "downloads a model; tests/em_stable_diffusion tune small ones",
    "python app.py": "serves until it is stopped; tests/em_generation holds the page",
}
# README -> test: small networks on the embedded micrographs, no upload
REPLACED = {
    " small ": " test ",
    " --data path/to/micrographs": "",
    "synthetic path/to/micrographs": "synthetic synthetic-varied",
    "em_data.look path/to/micrographs": "em_data.look synthetic",
    "--num-images 10000": "--num-images 6",
    "runs/demo/ldm": "runs/ldm",
    "--out runs/report": "--out runs/report --num-images 16",
    "--license cc-by-4.0": "--license cc-by-4.0 --dry-run repository",
}


def read_blocks(language):
    return [
        body for name, body in BLOCK.findall((ROOT / "README.md").read_text()) if name == language
    ]


def read_commands():
    """Return the shell commands of the README, without comments."""
    lines = "\n".join(read_blocks("sh")).replace("\\\n", " ").splitlines()
    commands = [re.sub(r"\s+#.*", "", line).strip() for line in lines]
    return [part.strip() for command in commands if command for part in command.split("&&")]


def is_run(command):
    return not command.startswith((*NOT_RUN, "source "))


def replace(text):
    for old, new in REPLACED.items():
        text = text.replace(old, new)
    return text


def run(words, folder):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, *words], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, f"{shlex.join(words)}\n{result.stderr[-3000:]}"
    return result.stdout


def test_every_command_of_the_readme_is_run_or_has_a_reason():
    commands = read_commands()
    assert {shlex.split(command)[1] for command in commands if is_run(command)} == {
        *SCRIPTS,
        "-c",
        "-m",
    }
    assert all(any(command.startswith(start) for command in commands) for start in NOT_RUN)
    assert all(
        any(old.strip() in text for text in [*commands, *read_blocks("python")]) for old in REPLACED
    )


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_readme_runs(tmp_path):
    """In its own order, but the trainings first: they make what the other commands take."""
    commands = [shlex.split(replace(command)) for command in read_commands() if is_run(command)]
    commands.sort(key=lambda words: not words[1].startswith("train_"))
    images = []
    for _, script, *words in commands:
        if script == "generate.py" and words[words.index("--out") + 1] in images:
            words[words.index("--out") + 1] += "-again"
        path = [str(ROOT / script)] if script in SCRIPTS else [script]
        run([*path, *words], tmp_path)
        images += [words[words.index("--out") + 1]] if script == "generate.py" else []
    for code in read_blocks("python"):
        run(["-c", replace(code)], tmp_path)
    assert (tmp_path / "runs/report/report.html").is_file()
    assert (tmp_path / "repository/README.md").is_file()
    assert (tmp_path / "first.png").is_file()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page):
    text = re.sub(r"`[^`]*`", "", BLOCK.sub("", page.read_text()))
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", text)
    missing = [
        target
        for target in targets
        if not re.match(r"\w+:", target) and not (page.parent / target).exists()
    ]
    assert not missing


@pytest.fixture(scope="module")
def known_flags():
    """Return the flags of all commands: fields of dataclasses, and the words in the source."""
    path = ROOT / "docs/hooks/reference.py"
    spec = importlib.util.spec_from_file_location("reference", path)
    reference = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(reference)
    flags = set()
    for cls in reference.find_configurations():
        for _, rows in reference.list_sections(cls):
            flags |= {row[0].strip("`") for row in rows}
    scripts = [*ROOT.glob("*.py"), *ROOT.glob("benchmarks/*.py"), *ROOT.glob("experiments/*/*.py")]
    for source in [*ROOT.glob("em_*/**/*.py"), *scripts]:
        flags |= set(re.findall(r'"(--[a-z][a-z-]+)"', source.read_text()))
    for source in scripts:  # fields of their dataclasses
        fields = re.findall(r"^    (\w+): ", source.read_text(), re.MULTILINE)
        flags |= {"--" + field.replace("_", "-") for field in fields}
    return flags


def list_flags_of_launchers():
    """Return the flags of torchrun, `accelerate launch` and SLURM."""
    from accelerate.commands.launch import launch_command_parser
    from torch.distributed.run import get_args_parser

    parsers = launch_command_parser(), get_args_parser()
    flags = {flag for each in parsers for flag in each._option_string_actions}
    return flags | {f"--{name}" for name in slurm.USED | slurm.IGNORED}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_flags_exist(page, known_flags):
    text = page.read_text()
    flags = set(re.findall(r"(?<![\w-])(--[a-z][\w.-]*[a-z])\b", text))
    known = known_flags | {"--help"}
    if page.name == "cluster.md":
        known |= list_flags_of_launchers()
    known |= {f"--no-{flag[2:]}" for flag in known}
    known |= {re.sub(r"^(--.+\.)(?!no-)", r"\1no-", flag) for flag in known}
    assert not flags - known

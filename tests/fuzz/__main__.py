"""Fuzz the readers, and write down what came of it: ``make fuzz``.

Each reader runs under libFuzzer (atheris), which changes sound inputs and keeps those that reach
code not reached before. An input that ends in anything but a refusal, takes longer than
``SECONDS_AN_INPUT`` or needs more than ``MOST_MIB`` is a fault: it is kept in ``--faults``, for a
regression test (``tests/fuzz/found/``) once it is mended. The figures go to docs/reliability.md.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import re
import resource
import subprocess
import sys
import tempfile
import traceback
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FIGURES = ROOT / "docs" / "reliability.md"
FOUND = Path(__file__).with_name("found")
SECONDS_AN_INPUT = 10
MOST_MIB = 2048
CODE = {
    "pickle": ("datasets.pickles", "pickle"),
    "zip": ("datasets.omniglot", "datasets.images", "zipfile"),
    "tar": ("datasets.cifar_fs", "datasets.pickles", "tarfile", "gzip", "pickle"),
    "image": ("datasets.images", "PIL"),
    "csv": ("datasets.mini_imagenet", "csv"),
    "toml": ("bench.sweep", "tomllib"),
    "cell": ("bench.reading", "bench.store", "bench.tables", "bench.sweep", "json"),
}
"""The modules of each reader in which the fuzzer sees what an input reached."""


def fuzz_one(name: str, seconds: int, faults: Path) -> None:
    """Fuzz one reader, in this process, which ends with it."""
    import atheris

    with atheris.instrument_imports(include=list(CODE[name])):
        for module in CODE[name]:
            importlib.import_module(module)
        from tests.fuzz.targets import TARGETS, tried
    warnings.simplefilter("ignore")
    target = TARGETS[name]
    known = {path.stem.rpartition("-")[0] for path in faults.glob("*.input")}
    with tempfile.TemporaryDirectory(dir=_memory()) as place:
        folder, corpus = Path(place, "folder"), Path(place, "corpus")
        folder.mkdir()
        corpus.mkdir()
        for seed in target.seeds() + [path.read_bytes() for path in (FOUND / name).glob("*")]:
            (corpus / hashlib.sha256(seed).hexdigest()[:16]).write_bytes(seed)

        def one(data: bytes) -> None:
            try:
                tried(target, data, folder)
            except Exception as error:  # every fault is to be found, not only the first
                place = traceback.extract_tb(error.__traceback__)[-1]
                kind = f"{type(error).__name__}-{Path(place.filename).stem}-{place.lineno}"
                if kind not in known:
                    known.add(kind)
                    digest = hashlib.sha256(data).hexdigest()[:12]
                    (faults / f"{kind}-{digest}.input").write_bytes(data)
                    text = "".join(traceback.format_exception(error))
                    (faults / f"{kind}-{digest}.txt").write_text(text, errors="backslashreplace")

        options = [f"-max_total_time={seconds}", f"-timeout={SECONDS_AN_INPUT}", "-max_len=1048576"]
        options += [f"-rss_limit_mb={MOST_MIB}", f"-artifact_prefix={faults}/", "-seed=1"]
        options += ["-print_final_stats=1", "-verbosity=1", str(corpus)]
        atheris.Setup([sys.argv[0], *options], one)
        atheris.Fuzz()


def _memory() -> str | None:
    return "/dev/shm" if Path("/dev/shm").is_dir() else None


def fuzz(name: str, seconds: int, faults: Path) -> tuple[int, int, int]:
    """Fuzz one reader in a process of its own.

    Returns:
        Inputs tried, branches of the readers that they reached, and faults: kinds of exception
        and place, and inputs that ended the process by time or memory.
    """
    faults.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "tests.fuzz", "--only", name, "--seconds", str(seconds)]
    done = subprocess.run(
        [*command, "--faults", str(faults)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    (faults / "log.txt").write_text(done.stderr)
    tries = re.search(r"stat::number_of_executed_units:\s*(\d+)", done.stderr)
    if tries is None:
        raise SystemExit(f"the fuzzer of {name} did not run:\n{done.stderr[-2000:]}")
    reached = [int(number) for number in re.findall(r"cov: (\d+)", done.stderr)]
    ended = [path for kind in ("timeout-*", "oom-*", "crash-*") for path in faults.glob(kind)]
    return int(tries[1]), max(reached, default=0), len([*faults.glob("*.input"), *ended])


def table(rows: list[tuple[str, int, int, int, int]], seconds: int) -> str:
    """The figures, for docs/reliability.md."""
    lines = [
        f"`make fuzz SECONDS={seconds}`: {sum(row[1] for row in rows):,} inputs in all:",
        "",
        "| reader | inputs tried | branches reached | faults now | inputs kept of faults mended |",
        "| --- | ---: | ---: | ---: | ---: |",
        *(
            f"| {reads} | {tries:,} | {reached:,} | {faults} | {mended} |"
            for reads, tries, reached, faults, mended in rows
        ),
    ]
    return "\n".join(lines)


def main() -> int:
    """Fuzz every reader, one after another; 1 if there was a fault."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--seconds", type=int, default=60, help="for each reader")
    parser.add_argument("--jobs", type=int, default=1, help="readers at a time")
    parser.add_argument("--only", help="one reader, in this process")
    parser.add_argument("--faults", type=Path, default=ROOT / ".fuzz", help="folder for faults")
    asked = parser.parse_args()
    if asked.only:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        fuzz_one(asked.only, asked.seconds, asked.faults)
        return 0
    from tests.fuzz.targets import TARGETS

    def row(name: str) -> tuple[str, int, int, int, int]:
        found = fuzz(name, asked.seconds, asked.faults / name)
        print(f"{name}: {found[0]:,} inputs, {found[1]:,} branches, {found[2]} faults", flush=True)
        return (TARGETS[name].reads, *found, len(list((FOUND / name).glob("*"))))

    with ThreadPoolExecutor(asked.jobs) as pool:
        rows = list(pool.map(row, TARGETS))
    begin, end = "<!-- fuzzed -->", "<!-- /fuzzed -->"
    head, _, rest = FIGURES.read_text().partition(begin)
    _, _, tail = rest.partition(end)
    FIGURES.write_text(f"{head}{begin}\n{table(rows, asked.seconds)}\n{end}{tail}")
    return 1 if any(row[3] for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())

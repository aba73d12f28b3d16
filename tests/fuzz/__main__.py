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
LOG = "log.txt"
TRIED = re.compile(r"stat::number_of_executed_units:\s*(\d+)")
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

        for seed in target.seeds():  # what they import takes seconds, once
            tried(target, seed, folder)

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


def fuzz(name: str, seconds: int, faults: Path) -> None:
    """Fuzz one reader in a process of its own, whose log stays with the faults."""
    faults.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "tests.fuzz", "--only", name, "--seconds", str(seconds)]
    done = subprocess.run(
        [*command, "--faults", str(faults)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    (faults / LOG).write_text(done.stderr)
    if TRIED.search(done.stderr) is None:
        raise SystemExit(f"the fuzzer of {name} did not run:\n{done.stderr[-2000:]}")


def figures(faults: Path) -> dict[str, int]:
    """What a reader's last log says: inputs tried, branches of the reader that they reached,
    seconds, and faults: kinds of exception and place, and inputs that ended the process by time or
    memory."""
    log = (faults / LOG).read_text()
    tries, took = TRIED.search(log), re.search(r"Done \d+ runs in (\d+) second", log)
    reached = [int(number) for number in re.findall(r"cov: (\d+)", log)]
    ended = [path for kind in ("timeout-*", "oom-*", "crash-*") for path in faults.glob(kind)]
    return {
        "inputs": int(tries[1]) if tries else 0,
        "branches": max(reached, default=0),
        "seconds": int(took[1]) if took else 0,
        "faults": len([*faults.glob("*.input"), *ended]),
    }


def table(rows: dict[str, dict[str, int]], mended: dict[str, int]) -> str:
    """The figures, for docs/reliability.md."""
    lines = [
        f"`make fuzz` tried {sum(row['inputs'] for row in rows.values()):,} inputs in all:",
        "",
        "| reader | inputs tried | seconds | branches reached | faults now | faults mended |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
        *(
            f"| {reads} | {row['inputs']:,} | {row['seconds']} | {row['branches']:,} "
            f"| {row['faults']} | {mended[reads]} |"
            for reads, row in rows.items()
        ),
    ]
    return "\n".join(lines)


def main() -> int:
    """Fuzz every reader, one after another; 1 if there was a fault."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--seconds", type=int, default=60, help="for each reader")
    parser.add_argument("--readers", help="some of them, with commas; of the others, the last log")
    parser.add_argument("--jobs", type=int, default=1, help="readers at a time")
    parser.add_argument("--only", help="one reader, in this process")
    parser.add_argument("--faults", type=Path, default=ROOT / ".fuzz", help="folder for faults")
    asked = parser.parse_args()
    if asked.only:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        fuzz_one(asked.only, asked.seconds, asked.faults)
        return 0
    from bench.files import filled
    from tests.fuzz.targets import TARGETS

    with ThreadPoolExecutor(asked.jobs) as pool:
        chosen = asked.readers.split(",") if asked.readers else list(TARGETS)
        list(pool.map(lambda name: fuzz(name, asked.seconds, asked.faults / name), chosen))
    there = [name for name in TARGETS if (asked.faults / name / LOG).is_file()]
    rows = {TARGETS[name].reads: figures(asked.faults / name) for name in there}
    mended = {TARGETS[name].reads: len(list((FOUND / name).glob("*"))) for name in there}
    for reads, row in rows.items():
        print(f"{reads}: {', '.join(f'{count:,} {what}' for what, count in row.items())}")
    FIGURES.write_text(filled(FIGURES.read_text(), "fuzzed", f"{table(rows, mended)}\n"))
    return 1 if any(row["faults"] for row in rows.values()) else 0


if __name__ == "__main__":
    sys.exit(main())

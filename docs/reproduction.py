"""Write the tables of README.md and docs/reproduction.md from what results/reference/ and
results/comparison/ hold.

Run it after ``python -m bench reproduce RECIPE --keep results/reference`` or
``python docs/comparison.py NAME``.
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from bench import reproduction
from bench.files import filled
from bench.summary import PUBLISHED

ROOT = Path(__file__).resolve().parents[1]
COMPARISON = ROOT / "results" / "comparison"
PAGES = (ROOT / "README.md", ROOT / "docs" / "reproduction.md")


def updated(text: str) -> str:
    """A page with its tables as the reference files have them."""
    kept = reproduction.references()
    text = filled(text, "reproduced", reproduction.markdown(kept))
    text = filled(text, "learning", reproduction.learning_markdown(kept))
    text = filled(text, "compared", compared())
    return filled(text, "challenge", challenge())


def compared() -> str:
    """Every algorithm on the data sets on which all were compared, and what each costs there."""
    boards = {name: board(name) for name in ("glyphs", "omniglot") if (COMPARISON / name).is_dir()}
    heads = [f"{name}, {said_once(each)}" for name, each in boards.items()]
    lines = [row(["algorithm", *heads, *COSTS]), row(["---"] * (1 + len(heads) + len(COSTS)))]
    if not boards:
        return "Not run so far.\n"
    scores = {name: scores_of(name, each) for name, each in boards.items()}
    first = next(iter(boards.values()))
    for algorithm, entry in first.set_index("algorithm").iterrows():
        cells = [scores[name].get(algorithm, "") for name in boards]
        costs = [cost(entry) for cost in COSTS.values()]
        lines.append(row([f"`{algorithm}`", *cells, *costs]))
    said = [told_apart(name) for name in boards]
    return "\n".join([*lines, "", f"Told apart, after Holm: {'; '.join(said)}."]) + "\n"


COSTS = {
    "meta-step, GFLOPs": lambda entry: shown(entry["step_gflops"], "{:.2f}"),
    "processor ms": lambda entry: shown(entry["step_process_ms"], "{:.0f}"),
    "peak MiB": lambda entry: shown(entry["peak_memory_bytes"] / 2**20, "{:.0f}"),
    "episode, processor ms": lambda entry: shown(entry["eval_process_ms"], "{:.1f}"),
}
"""What a meta-step and an evaluation episode cost, of a row of a leaderboard."""


def board(name: str) -> pd.DataFrame:
    """A kept leaderboard, best first."""
    return pd.read_csv(COMPARISON / name / "leaderboard.csv")


def said_once(entries: pd.DataFrame) -> str:
    """What a leaderboard's scores are of."""
    first = entries.iloc[0]
    seeds = "1 seed" if first["seeds"] == 1 else f"{first['seeds']} seeds"
    return f"{first['ways']}-way {first['shots']}-shot, {seeds}"


def scores_of(name: str, entries: pd.DataFrame) -> dict[str, str]:
    """Accuracy of each algorithm in per cent, with half of its 95% interval over episodes, and of
    several seeds the lowest and the highest; bold where it is not told apart from the best."""
    pairs = pd.read_csv(COMPARISON / name / "comparison.csv", keep_default_na=False)
    seeds = pd.read_csv(COMPARISON / name / "summary.csv").groupby("algorithm")["mean"]
    best = entries["algorithm"].iloc[0]
    beaten = set(pairs.loc[pairs["better"] == best, ["algorithm_a", "algorithm_b"]].stack())
    found = {}
    for _, entry in entries.iterrows():
        algorithm = entry["algorithm"]
        text = f"{100 * entry['mean']:.1f} ± {100 * entry['ci_episodes']:.1f}"
        if algorithm == best or algorithm not in beaten:
            text = f"**{text}**"
        if entry["seeds"] > 1:
            each = seeds.get_group(algorithm)
            text += f" ({100 * each.min():.1f} to {100 * each.max():.1f})"
        found[algorithm] = text
    return found


def told_apart(name: str) -> str:
    """How many pairs are, and over what."""
    pairs = pd.read_csv(COMPARISON / name / "comparison.csv", keep_default_na=False)
    count = (pairs["better"] != "").sum()
    return f"{count} of {len(pairs)} pairs on {name}, over {pairs['over'].iloc[0]}"


def challenge() -> str:
    """Errors in Omniglot's one-shot challenge, ours beside the published."""
    lines = [row(["classifier", "error, %", "training"]), row(["---"] * 3)]
    if (COMPARISON / "lake").is_dir():
        for _, entry in board("lake").iterrows():
            error = f"{100 * (1 - entry['mean']):.1f} ± {100 * entry['ci_episodes']:.1f}"
            training = f"{entry['iterations']} iterations of {entry['meta_batch']} tasks, here"
            if entry["gradients_per_step"] == 0:
                training = "none"
            lines.append(row([f"`{entry['algorithm']}`", error, training]))
    for name, error in PUBLISHED.items():
        lines.append(row([name, f"{error}", "published"]))
    return "\n".join(lines) + "\n"


def shown(value: float, form: str) -> str:
    """A number, or nothing for what was not measured."""
    return "" if pd.isna(value) else form.format(value)


def row(cells: list[str]) -> str:
    """A row of a table."""
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(updated(page.read_text(encoding="utf-8")), encoding="utf-8")

"""Statistics of a table: counts, correlations, and how much of them is sampling noise.

In: an `ImportanceTable`. Out: plain JSON (None where a number does not exist), and the same as lines of text.
Torch-free; it reads nothing but the table.

Utilities of single weights are heavy-tailed, and up to 90 % of them can be *provably* 0. So every correlation is
computed twice, over all sites and over the touched ones alone, and Spearman's (of ranks) is reported with Pearson's,
which a few large utilities decide.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float64
from scipy.special import bdtr, bdtrc

from ablation.criteria import find_criteria
from ablation.table import ImportanceTable, as_plain

FEWEST_SITES = 3  # two always correlate by 1 or -1
WANTED_CEILINGS = (0.9, 0.99)
MAY_BE_LUCK, MAY_BE_SMALL = 0.05, 0.05  # probabilities, in judging an accuracy
ADVICE = "Check weights, classes and preprocessing"
OTHER_SIZES = (100, 1_000, 10_000, 100_000)  # examples per split, for the ceiling there


def make_summary(table: ImportanceTable) -> dict[str, Any]:
    """Summarise a job as plain JSON. `about` is the table's own; an error of the proof that is infinite is None."""
    plan, splits = table.about["plan"], list(table.about["baseline"])
    summary = {
        "sites": len(table),
        "weights_in_layer": math.prod(plan["shape"]),
        "layer": table.about["spec"]["layer"],
        "parameter": plan["parameter"],
        "path": plan["path"],
        "precision": plan["precision"],
        **{name: _inputs(table)[name] for name in ("weights", "preprocessing", "classes", "notes")},
        "warnings": find_warnings(table),
        "splits": {split: describe_split(table, split) for split in splits},
        "magnitude": {split: compare_magnitude(table, split) for split in splits},
        "criteria": {
            criterion.name: {split: compare_criterion(table, criterion.name, split) for split in splits}
            for criterion in find_criteria(table.about["spec"]["criteria"])
        },
        "proof": as_plain(table.about["proof"]),
        "not_finite": table.about["n_not_finite"],
        "seconds": table.about["seconds"],
        "about": as_plain(table.about),
    }
    return summary | ({"train_test": compare_splits(table)} if len(splits) == 2 else {})


def _inputs(table: ImportanceTable) -> Mapping[str, Any]:
    """What the job was of, and what was noticed in its files; nothing in tables of older versions."""
    return {**_NOTHING_TOLD, **table.about.get("inputs", {})}


_NOTHING_TOLD: Mapping[str, Any] = {"weights": None, "preprocessing": None, "classes": {}, "notes": [], "warnings": []}


def find_warnings(table: ImportanceTable) -> list[str]:
    """Sentences on what makes the numbers doubtful: a network that does not know this data, first of all.

    That is said where the intact mean loss is above that of equal probabilities, log(classes), and where the accuracy
    is at chance, 1 / classes: not above it beyond luck (a binomial test at `MAY_BE_LUCK`), in a sample that is large
    enough to show it (`MAY_BE_SMALL`: how likely so few right answers would be half-way between chance and 1).
    """
    n_classes = table.about["plan"]["n_classes"]
    found = []
    for split, baseline in table.about["baseline"].items():
        reasons = []
        n, chance = baseline["n_examples"], 1 / n_classes
        n_right = round(baseline["accuracy"] * n)
        if n_classes > 1 and _is_at_chance(n_right, n, chance):
            reasons.append(f"its accuracy, {baseline['accuracy']:.2%}, is that of guessing ({chance:.2%})")
        if n_classes > 1 and _is_cross_entropy(table) and baseline["loss"] > math.log(n_classes):
            reasons.append(f"its loss, {baseline['loss']:.4g}, is above log({n_classes:,}) = {math.log(n_classes):.4g}")
        if reasons:
            found.append(f"{split}: the network does not know this data: {'; '.join(reasons)}. {ADVICE}")
    return [*_inputs(table)["warnings"], *found]


def _is_at_chance(n_right: int, n: int, chance: float) -> bool:
    by_luck = bdtrc(n_right - 1, n, chance)  # so many right answers or more, by guessing
    by_bad_luck = bdtr(n_right, n, (1 + chance) / 2)  # so few, by a network that knows the data
    return bool(by_luck > MAY_BE_LUCK and by_bad_luck < MAY_BE_SMALL)


def _is_cross_entropy(table: ImportanceTable) -> bool:
    """Whether equal probabilities have a loss of log(classes): with class weights or a loss object they have not."""
    loss = table.about["spec"].get("loss", "cross_entropy")
    return loss == "cross_entropy" or (loss.get("name") == "cross_entropy" and not loss.get("class_weights"))


def describe_split(table: ImportanceTable, split: str) -> dict[str, Any]:
    """Baseline, counts and mean utility of one split, over the sites that were run."""
    baseline, variation = table.about["baseline"][split], measure_variation(table, split)
    utility = table.columns[f"utility_{split}"]
    utility = utility[np.isfinite(utility)]
    with np.errstate(over="ignore"):  # a loss beyond float32's range counts as changed, too
        after = (baseline["loss"] + utility).astype(np.float32)
    return {
        **baseline,
        "skipped": table.about.get("data", {}).get("splits", {}).get(split, {}).get("n_skipped", 0),
        "provably_without_effect": int((table.columns[f"touched_{split}"] == 0).sum()),
        "float32_would_call_zero": int((after == np.float32(baseline["loss"])).sum()),
        "negative": int((utility < 0).sum()),
        "mean_utility": float(utility.mean()) if len(utility) else None,
        "reliability": variation and variation.reliability,
    }


def compare_magnitude(table: ImportanceTable, split: str) -> dict[str, float | None]:
    """Correlations of |utility| with |w|."""
    touched = table.columns[f"touched_{split}"] > 0
    return _correlations(table.columns["magnitude"], np.abs(table.columns[f"utility_{split}"]), touched)


def compare_criterion(table: ImportanceTable, name: str, split: str) -> dict[str, float | None]:
    """Correlations of a criterion's column with the utility: how good is what it predicts?"""
    touched = table.columns[f"touched_{split}"] > 0
    return _correlations(table.columns[f"{name}_{split}"], table.columns[f"utility_{split}"], touched)


def compare_splits(table: ImportanceTable) -> dict[str, Any]:
    """Correlations of the utilities on train and test, and the upper limit that sampling noise sets to Pearson's.

    Utilities that truly agree would still correlate by no more than

        ceiling = sqrt(reliability_train * reliability_test)        (Spearman's correction for attenuation)

    so `ratio` = Pearson's r / ceiling estimates the true agreement. The noise shrinks as 1/N, which gives the ceiling
    at N examples per split (`ceiling_at`) and the N that a wanted ceiling needs (`examples_for_ceiling`).
    The ceiling is over all sites; "touched" are sites touched in at least one of the splits.
    """
    touched = (table.columns["touched_train"] > 0) | (table.columns["touched_test"] > 0)
    found = _correlations(table.columns["utility_train"], table.columns["utility_test"], touched)
    train, test = measure_variation(table, "train"), measure_variation(table, "test")
    ceiling = math.sqrt(train.reliability * test.reliability) if train and test else None
    return {
        **found,
        "ceiling": ceiling,
        "ratio": found["pearson"] / ceiling if ceiling and found["pearson"] is not None else None,
        "ceiling_at": {str(n): ceiling_at(n, train, test) if train and test else None for n in OTHER_SIZES},
        "examples_for_ceiling": {
            str(wanted): examples_for(wanted, train, test) if train and test else None for wanted in WANTED_CEILINGS
        },
    }


@dataclass(frozen=True)
class Variation:
    """Variance of one split's utilities over the sites, and the part of it that is sampling noise.

    `variance` = var(utility) over sites and `noise` = mean(stderr^2), both in any one unit: only their ratio is used.
    """

    variance: float
    noise: float
    n_examples: int

    @property
    def reliability(self) -> float:
        """Share of the variance that other examples would show, too: 1 - noise / variance, from 0 to 1."""
        return min(1.0, max(0.0, 1 - self.noise / self.variance))

    @property
    def noise_per_example(self) -> float:
        """Noise of one example's delta in units of the true variance, s^2 / var_true; N examples have 1/N of it."""
        true = self.variance - self.noise
        return self.noise * self.n_examples / true if true > 0 else math.inf


def measure_variation(table: ImportanceTable, split: str) -> Variation | None:
    """Measure one split; None where the utilities are constant or too few, or the standard error is not known."""
    utility, stderr = table.columns[f"utility_{split}"], table.columns[f"stderr_{split}"]
    known = np.isfinite(utility) & np.isfinite(stderr)
    utility, stderr = utility[known], stderr[known]
    if len(utility) < FEWEST_SITES or utility.min() == utility.max():
        return None
    unit = np.abs(utility).max()  # so that squares of small numbers don't underflow
    variance, noise = np.var(utility / unit, ddof=1), np.mean((stderr / unit) ** 2)
    return Variation(float(variance), float(noise), table.about["baseline"][split]["n_examples"])


def ceiling_at(n_examples: int, train: Variation, test: Variation) -> float:
    """Noise ceiling if both splits had `n_examples`: reliability = var_true / (var_true + s^2/N)."""
    shares = (1 + split.noise_per_example / n_examples for split in (train, test))
    return 1 / math.sqrt(math.prod(shares))


def examples_for(ceiling: float, train: Variation, test: Variation) -> int | None:
    """Fewest examples per split that give the wanted ceiling; None where the true variance is 0.

    With a, b the noise per example of the splits: (1 + a/N) (1 + b/N) = 1/ceiling^2, solved for N.
    """
    a, b, q = train.noise_per_example, test.noise_per_example, 1 / ceiling**2 - 1
    if math.isinf(a + b):
        return None
    return max(1, math.ceil((a + b + math.sqrt((a + b) ** 2 + 4 * a * b * q)) / (2 * q)))


def _correlations(
    a: Float64[np.ndarray, " sites"], b: Float64[np.ndarray, " sites"], touched: Bool[np.ndarray, " sites"]
) -> dict[str, float | None]:
    """Correlations over the sites that were run, and over the touched ones among them."""
    run = np.isfinite(a) & np.isfinite(b)
    ranked = Ranked(a, b)
    found: dict[str, float | None] = {}
    for suffix, rows in (("", run), ("_touched", run & touched)):
        found[f"pearson{suffix}"] = pearson(_take(a, rows), _take(b, rows))
        found[f"spearman{suffix}"] = ranked.spearman(rows)
    return found


class Ranked:
    """Two columns, sorted once, from which Spearman's correlation of any subset of their rows is computed.

    Both are brought into the order of `a`, so a subset costs a few passes and no sort (two subsets of 16.7 million rows
    on one core: 8 s, by scipy's `rankdata` 16 s).
    """

    def __init__(self, a: Float64[np.ndarray, " sites"], b: Float64[np.ndarray, " sites"]) -> None:
        self.by_a = np.argsort(a)
        self.a = a.take(self.by_a)
        self.b = b.take(self.by_a)
        self.by_b = np.argsort(self.b)

    def spearman(self, rows: Bool[np.ndarray, " sites"]) -> float | None:
        """Spearman's correlation: Pearson's r of the ranks of these rows among themselves."""
        rows = rows.take(self.by_a)
        ranks = np.zeros(len(rows))
        ranks[rows] = ranks_of_sorted(_take(self.a, rows))
        by_b = _take(self.by_b, rows.take(self.by_b))
        return pearson(ranks.take(by_b), ranks_of_sorted(self.b.take(by_b)))


def _take(values: np.ndarray, rows: Bool[np.ndarray, " sites"]) -> np.ndarray:
    return values if rows.all() else values[rows]


def ranks_of_sorted(values: Float64[np.ndarray, " sites"]) -> Float64[np.ndarray, " sites"]:
    """Ranks from 1 on of ascending values; equal values share their mean rank."""
    ranks = np.arange(1.0, len(values) + 1)
    ties = np.flatnonzero(values[1:] == values[:-1])  # indices of values equal to the next one
    if len(ties):
        is_first, is_last = np.diff(ties, prepend=-2) > 1, np.diff(ties, append=len(values) + 1) > 1
        first, last = ties[is_first], ties[is_last] + 1
        sizes = last - first + 1
        tied = np.zeros(len(values), bool)
        tied[ties] = tied[ties + 1] = True
        ranks[tied] = np.repeat((first + last) / 2 + 1, sizes)
    return ranks


def pearson(a: Float64[np.ndarray, " sites"], b: Float64[np.ndarray, " sites"]) -> float | None:
    """Pearson's r; None where either is constant or there are fewer than three."""
    if len(a) < FEWEST_SITES:
        return None
    a, b = _centred(a), _centred(b)
    norm = math.sqrt(a @ a) * math.sqrt(b @ b)
    return min(1.0, max(-1.0, float(a @ b) / norm)) if norm else None


def _centred(values: Float64[np.ndarray, " sites"]) -> Float64[np.ndarray, " sites"]:
    """Subtract the mean and divide by the largest: no square underflows, and a constant gives exact zeros."""
    scaled = values / (np.abs(values).max() or 1.0)
    return scaled - scaled.mean()


def summary_lines(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The summary as pairs of label and value, for display."""
    n = summary["sites"]
    lines = [
        ("sites", f"{n:,} of the {summary['weights_in_layer']:,} weights of {summary['parameter']}"),
        ("path", f"{summary['path']}, {summary['precision']} precision"),
    ]
    lines += [(name, summary[name]) for name in ("weights", "preprocessing") if summary[name]]
    for text in dict.fromkeys(summary["classes"].values()):
        lines.append(("classes", text))
    lines += [("WARNING", warning) for warning in summary["warnings"]]
    lines += [("note", note) for note in summary["notes"]]
    for split, found in summary["splits"].items():
        examples = f"{found['n_examples']:,} example{'s' if found['n_examples'] > 1 else ''}"
        lines.append((f"{split}: intact", f"loss {found['loss']:.6g}, accuracy {found['accuracy']:.2%} ({examples})"))
        if found["skipped"]:
            names = [*summary["about"]["data"]["splits"][split]["skipped"]]
            which = ", ".join(names[:3]) + (", ..." if found["skipped"] > 3 else "")
            lines.append((f"{split}: left out", f"{found['skipped']:,} that can't be read: {which}"))
        lines.append((f"{split}: |utility| with |w|", _say_correlations(summary["magnitude"][split])))
        for name, found_by_split in summary["criteria"].items():
            lines.append((f"{split}: utility with {name}", _say_correlations(found_by_split[split])))
        lines.append((f"{split}: provably without effect", _say_share(found["provably_without_effect"], n)))
        lines.append((f"{split}: float32 would call zero", _say_share(found["float32_would_call_zero"], n)))
        lines.append((f"{split}: better without", _say_share(found["negative"], n)))
    if "train_test" in summary:
        lines += _say_agreement(summary["train_test"])
    if summary["not_finite"]:
        lines.append(("not run", f"{_say_share(summary['not_finite'], n)}: the replacement is not a finite number"))
    return [*lines, ("largest error", _say_proof(summary)), ("time", f"{summary['seconds']:.3g} s")]


def summary_text(summary: Mapping[str, Any]) -> str:
    """The summary as lines of text, labels and values in two columns."""
    lines = summary_lines(summary)
    width = max(len(label) for label, _ in lines)
    return "\n".join(f"{label:{width}}  {text}" for label, text in lines)


class Summary(dict[str, Any]):
    """A summary that prints as the command line prints it; it is a dict, and `json.dumps` takes it."""

    def __str__(self) -> str:
        return summary_text(self)

    __repr__ = __str__


def _say_agreement(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    lines = [("utility, train with test", _say_correlations(found))]
    if found["ceiling"] is not None:
        of_it = "" if found["ratio"] is None else f"; Pearson's reaches {found['ratio']:.0%} of it"
        lines.append(("noise ceiling", f"{found['ceiling']:.3f}{of_it}"))
        needed = {wanted: n for wanted, n in found["examples_for_ceiling"].items() if n is not None}
        if needed:
            words = ", ".join(f"{wanted} with {n:,}" for wanted, n in needed.items())
            lines.append(("a ceiling of", f"{words} examples per split"))
    return lines


def _say_correlations(found: Mapping[str, float | None]) -> str:
    def say(suffix: str) -> str:
        return f"Pearson {_say(found['pearson' + suffix])}, Spearman {_say(found['spearman' + suffix])}"

    return f"{say('')}  (touched alone: {say('_touched')})"


def _say(r: float | None) -> str:
    return "undefined" if r is None else f"{r:.3f}"


def _say_share(count: int, n: int) -> str:
    return f"{count:,} of {n:,} ({count / n:.1%})"


def _say_proof(summary: Mapping[str, Any]) -> str:
    """Describe the largest arithmetic error against the reference, and its bound."""
    proof = summary["proof"]
    if proof is None:
        return f"not checked ({'no site was run' if summary['not_finite'] == summary['sites'] else 'verify = 0'})"
    error, bound = proof["arithmetic_error"], proof["arithmetic_bound"]
    size = "without measure (the reference is exactly 0)" if error is None else f"{error:.2g}"
    allowed = "no bound in float32" if bound is None else f"allowed {bound:.0e}"
    return f"{size} against the reference, {allowed} ({proof['n_sites']} sites, {proof['n_examples']} examples)"

"""Published numbers, to print beside those of a run on the same benchmark: the SAGO paper's (Xiao et al., ACL 2026),
and for TOFU and MUSE, which it does not have, OpenUnlearning's, and for TOFU those of arXiv 2605.24614."""

from __future__ import annotations

from collections.abc import Iterable

TARGETS = {"wmdp_bio": "Zephyr-7B-beta", "wmdp_cyber": "Zephyr-7B-beta", "rwku": "Llama-3-8B-Instruct"}
TARGETS |= {"muse_news": "the benchmark's target, Llama-2-7B", "muse_books": "the benchmark's target, ICLM-7B"}
TARGETS |= {"tofu": "Llama-3.2-1B-Instruct that has learnt TOFU, forget10"}

HUB_NAMES = {  # of these models
    **dict.fromkeys(("wmdp_bio", "wmdp_cyber"), "HuggingFaceH4/zephyr-7b-beta"),
    **{"rwku": "meta-llama/Meta-Llama-3-8B-Instruct"},
    **{"muse_news": "muse-bench/MUSE-News_target", "muse_books": "muse-bench/MUSE-Books_target"},
    "tofu": "open-unlearning/tofu_Llama-3.2-1B-Instruct_full",
}


AGGREGATE = tuple(f"tofu.aggregate.{part}" for part in ("memorization", "privacy", "utility", "overall"))


# Columns of its Tables 1 and 2, in percent there and here; and of the others, as they are there.
COLUMNS = {
    "wmdp_bio": ("wmdp_bio.acc.all", "mmlu.acc.all"),
    "wmdp_cyber": ("wmdp_cyber.acc.all", "mmlu.acc.all"),
    "rwku": tuple(f"rwku.sago.{kind}" for kind in ("F-FB", "F-QA", "F-All", "N-FB", "N-QA", "N-All")),
    **{
        suite: tuple(f"{suite}.{score}" for score in ("forget.knowmem", "forget.verbmem", "privleak", "retain.knowmem"))
        for suite in ("muse_news", "muse_books")
    },
    "tofu": ("tofu.forget.extraction_strength", "tofu.forget_quality", "tofu.model_utility", *AGGREGATE),
}


# fmt: off
TABLE_1 = {  # method -> suite -> values in the order of COLUMNS; RMU has no RWKU
    "target": {"wmdp_bio": (64.4, 59.8), "wmdp_cyber": (44.4, 59.8), "rwku": (75.2, 91.1, 83.2, 78.0, 92.1, 85.1)},
    "GA": {"wmdp_bio": (24.7, 24.7), "wmdp_cyber": (23.4, 26.6), "rwku": (3.1, 3.1, 3.1, 5.4, 6.0, 5.7)},
    "NPO": {"wmdp_bio": (27.1, 30.8), "wmdp_cyber": (34.7, 52.9), "rwku": (8.3, 3.1, 5.7, 10.2, 6.2, 8.2)},
    "SimNPO": {"wmdp_bio": (24.8, 27.1), "wmdp_cyber": (31.4, 40.0), "rwku": (9.2, 4.3, 6.8, 12.5, 7.9, 10.2)},
    "RMU": {"wmdp_bio": (28.0, 50.1), "wmdp_cyber": (27.7, 57.8)},
    "GA+GD": {"wmdp_bio": (24.7, 25.1), "wmdp_cyber": (24.7, 55.6), "rwku": (14.1, 7.3, 10.7, 17.4, 13.5, 15.5)},
    "GA+GD, PCGrad": {"wmdp_bio": (24.5, 53.0), "wmdp_cyber": (27.0, 58.5), "rwku": (3.1, 1.5, 2.3, 13.7, 23.8, 18.8)},
    "GA+GD, SAGO": {"wmdp_bio": (26.0, 54.1), "wmdp_cyber": (26.2, 59.7), "rwku": (4.9, 2.8, 3.9, 24.4, 39.8, 32.1)},
    "NPO+GD": {"wmdp_bio": (30.5, 38.2), "wmdp_cyber": (31.8, 46.8), "rwku": (10.0, 7.8, 8.9, 13.9, 12.2, 13.1)},
    "NPO+GD, PCGrad": {"wmdp_bio": (32.9, 55.4), "wmdp_cyber": (30.8, 57.5), "rwku": (3.6, 2.3, 3.0, 29.9, 26.8, 28.4)},
    "NPO+GD, SAGO": {"wmdp_bio": (30.0, 56.0), "wmdp_cyber": (29.6, 58.5), "rwku": (5.1, 5.7, 5.4, 36.1, 47.2, 41.7)},
    "SimNPO+GD": {"wmdp_bio": (26.1, 26.7), "wmdp_cyber": (31.4, 51.4), "rwku": (10.6, 7.3, 9.0, 44.4, 45.4, 44.9)},
    "SimNPO+GD, PCGrad":
        {"wmdp_bio": (28.7, 56.4), "wmdp_cyber": (31.1, 57.9), "rwku": (12.7, 13.9, 13.3, 48.8, 58.1, 53.5)},
    "SimNPO+GD, SAGO":
        {"wmdp_bio": (28.2, 57.4), "wmdp_cyber": (29.1, 58.3), "rwku": (12.5, 13.3, 12.9, 50.1, 63.7, 56.9)},
}


TABLE_2 = {  # without the two rows that Table 1 has too
    "NPO+GD, GRU": {"wmdp_bio": (26.2, 42.1), "wmdp_cyber": (25.2, 55.6)},
    "RMU, BLUR": {"wmdp_bio": (27.6, 53.5), "wmdp_cyber": (25.6, 55.6)},
    "GA+GD, global PCGrad": {"wmdp_bio": (24.8, 51.0), "wmdp_cyber": (28.1, 58.1)},
}


RECIPES = {"wmdp_bio": "wmdp_bio", "wmdp_cyber": "wmdp_cyber", "rwku": "rwku_batch50"}  # of Table 1, by suite


PRESETS = {  # of these recipes, by the row of Table 1
    "GA": "ga",
    "NPO": "npo",
    "SimNPO": "simnpo",
    "RMU": "rmu",
    "GA+GD": "ga_sum",
    "GA+GD, PCGrad": "ga_pcgrad",
    "GA+GD, SAGO": "ga_sago",
    "NPO+GD": "npo_sum",
    "NPO+GD, PCGrad": "npo_pcgrad",
    "NPO+GD, SAGO": "npo_sago",
    "SimNPO+GD": "simnpo_sum",
    "SimNPO+GD, PCGrad": "simnpo_pcgrad",
    "SimNPO+GD, SAGO": "simnpo_sago",
}


# OpenUnlearning (Dorna et al. 2025), docs/repro.md: learning rate 1e-5, 10 epochs, not tuned. Scores as they are there;
# of TOFU, forget quality and model utility.
TOFU = {
    "target": (1.66e-21, 0.60), "retrained": (1.0, 0.59), "GA": (1.06e-239, 0.0), "GA+GD": (1.06e-239, 0.49),
    "IdkDPO+GD": (4.64e-12, 0.23), "NPO+GD": (0.02, 0.46), "SimNPO+GD": (2.47e-203, 0.54), "RMU": (3.15e-15, 0.59),
}


# arXiv 2605.24614: docs/data/method_results.json of github.com/gnueaj/unlearning-depth-score at fc31639, on models of
# OpenUnlearning. Of each method the one with the best aggregate of memorisation, privacy by membership inference
# (without the paper's depth score) and utility: the last four numbers; before them extraction strength, model utility.
TOFU_TUNED = {
    "target": (0.679, 0.601, 0.103, 0.0, 1.0, 0.0), "retrained": (0.059, 0.591, 0.582, 1.0, 1.0, 0.807),
    "AltPO+GD": (0.064, 0.530, 0.589, 0.952, 0.926, 0.784), "NPO+GD": (0.091, 0.561, 0.547, 0.875, 0.983, 0.752),
    "SimNPO+GD": (0.072, 0.576, 0.539, 0.816, 0.988, 0.733), "IdkDPO+GD": (0.074, 0.559, 0.550, 0.757, 0.975, 0.720),
    "GA+GD": (0.124, 0.594, 0.501, 0.789, 0.901, 0.686), "RMU": (0.040, 0.282, 0.666, 0.711, 0.542, 0.631),
}


MUSE = {  # of OpenUnlearning too
    "target": {"muse_news": (0.64, 0.58, -99.81, 0.56), "muse_books": (0.47, 1.0, -57.26, 0.69)},
    "retrained": {"muse_news": (0.33, 0.20, 0.0, 0.56), "muse_books": (0.30, 0.14, 0.0, 0.69)},
    "GA": {"muse_news": (0.0, 0.0, 52.11, 0.0), "muse_books": (0.0, 0.0, -0.67, 0.0)},
    "GA+GD": {"muse_news": (0.41, 0.009, 93.23, 0.37), "muse_books": (0.18, 0.16, -37.79, 0.30)},
    "NPO+GD": {"muse_news": (0.56, 0.35, -86.00, 0.51), "muse_books": (0.32, 0.84, -54.24, 0.55)},
    "SimNPO+GD": {"muse_news": (0.54, 0.36, -86.11, 0.51), "muse_books": (0.32, 0.84, -54.26, 0.54)},
    "RMU": {"muse_news": (0.48, 0.05, 56.36, 0.51), "muse_books": (0.29, 0.79, -60.52, 0.48)},
}


# fmt: on

TABLE_3 = {  # cosines forget-retain, comb-forget, comb-retain: WMDP Cyber, mean of 100 steps
    "GradDiff": (-0.40, 0.50, 0.42),
    "PCGrad": (-0.52, 0.29, 0.52),
    "SAGO": (-0.35, 0.17, 0.57),
}


def rows(suite: str) -> dict[str, dict[str, float]]:
    """{"paper, SOURCE: METHOD": {score: value}} of a suite, as the suite scales it; empty if nobody has it."""
    if suite == "tofu":
        strength, quality, utility, *parts = COLUMNS[suite]
        untuned, tuned = (quality, utility), (strength, utility, *parts)
        return {
            f"paper, {who}: {name}": dict(zip(columns, values, strict=True))
            for who, columns, table in (("OpenUnlearning", untuned, TOFU), ("arXiv 2605.24614", tuned, TOFU_TUNED))
            for name, values in table.items()
        }
    if suite.startswith("muse_"):
        columns = COLUMNS[suite]
        return {
            f"paper, OpenUnlearning: {name}": dict(zip(columns, of[suite], strict=True)) for name, of in MUSE.items()
        }
    return {
        f"paper, Table {number}: {method}": dict(
            zip(COLUMNS[suite], (round(value / 100, 3) for value in values[suite]), strict=True)
        )
        for number, table in ((1, TABLE_1), (2, TABLE_2))
        for method, values in table.items()
        if suite in values
    }


def presets_of(suite: str, chosen: Iterable[str]) -> list[str]:
    """The presets of the chosen rows of Table 1 that it has for a suite, in its order."""
    wanted = set(chosen)
    return [preset for row, preset in PRESETS.items() if row in wanted and suite in TABLE_1[row]]


def source(suite: str) -> tuple[str, str]:
    """(heading, where the numbers are from and how they were made) for the rows of a suite."""
    if suite == "tofu":
        how = (
            "OpenUnlearning's reproduction (one seed, ten epochs at a learning rate of 1e-5, tuned for no method), and "
            "what arXiv 2605.24614 measured of OpenUnlearning's models, of each method the one with the best overall "
            "score (its utility has a judge of fluency, ours has none)"
        )
        return "Beside published numbers", f"{how}, for {TARGETS[suite]}"
    if suite.startswith("muse_"):
        how = "OpenUnlearning's reproduction: one seed, ten epochs at a learning rate of 1e-5, tuned for no method"
        return "Beside published numbers", f"{how}, for {TARGETS[suite]}"
    how = "as printed: one seed, tuned to about equal forgetting but not interpolated to a level"
    return "Beside the paper's Tables 1 and 2", f"its figures for {TARGETS[suite]} (Xiao et al., ACL 2026), {how}"

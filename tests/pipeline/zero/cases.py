"""Runs of the program that test_sharded.py compares with the plain loop: each objective and rule."""

from __future__ import annotations

from typing import Any

SUM = {"rule": "sum", "geometry": True}
SGD = {"optimizer": {"name": "sgd", "lr": 1.0}}
CASES: dict[str, dict[str, Any]] = {
    "sum": {"synthesis": {"rule": "sum", "alpha": 0.7}},
    "sum-measured": {"synthesis": {"rule": "sum", "geometry": True}},
    "sago": {"synthesis": {"rule": "sago", "gamma": 0.8}},
    "pcgrad-module": {"synthesis": {"rule": "pcgrad", "scope": "module"}},
    "pcgrad-global": {"synthesis": {"rule": "pcgrad", "scope": "global", "alpha": 0.5}},
    "pcgrad-layer": {"synthesis": {"rule": "pcgrad", "scope": "layer", "layer_geometry_every": 2}},
    "sago-host": {"synthesis": {"stash_device": "host", "layer_geometry_every": 2}},
    "pcgrad-element": {"synthesis": {"rule": "pcgrad", "scope": "element"}},
    "sago-retain": {"synthesis": {"rule": "sago", "zero_forget": "retain"}},
    "blur": {"synthesis": {"rule": "blur", "alpha": 0.7}},
    "gru": {"synthesis": {"rule": "gru", "gamma": 0.8}},
    "npo-sago": {"objective": {"forget": "npo", "beta": 0.05}},
    "simnpo-pcgrad": {"objective": {"forget": "simnpo", "beta": 2.0, "delta": 0.1}, "synthesis": {"rule": "pcgrad"}},
    "forget-only": {"objective": {"forget": "ga", "retain": "none"}},
    "retain-only": {"objective": {"forget": "none", "retain": "nll"}, "optimizer": {"weight_decay": 0.1}},
    "decayed-pcgrad": {"optimizer": {"weight_decay": 0.3}, "synthesis": {"rule": "pcgrad"}},
    "decayed-sgd": {"optimizer": {**SGD["optimizer"], "weight_decay": 0.01}, "synthesis": SUM},
    "sgd-unclipped": {"optimizer": {"name": "sgd", "lr": 0.05, "max_grad_norm": 0.0}},
    "tied": {"synthesis": {"rule": "pcgrad"}, "tied": True},
    "dpo-pcgrad": {"objective": {"forget": "dpo", "beta": 0.05}, "synthesis": {"rule": "pcgrad"}},
    "dpo_idk-sum": {"objective": {"forget": "dpo_idk", "beta": 0.05}, "synthesis": {"rule": "sum", "geometry": True}},
    "idk-pcgrad": {"objective": {"forget": "idk"}, "synthesis": {"rule": "pcgrad"}},
    "wga-pcgrad": {"objective": {"forget": "wga", "beta": 0.2}, "synthesis": {"rule": "pcgrad"}},
    # Where model and original still agree, the gradients of undial and kl are differences of nearly equal
    # probabilities, and what is computed of them has the rounding of whichever path it came by. A rule that gates on
    # signs, or Adam on an embedding row that only the retain batch has, would blow that up to the size of an update.
    "undial-pcgrad": {"objective": {"forget": "undial", "beta": 5.0}, "synthesis": {"rule": "pcgrad"}},
    "npo-kl": {"objective": {"forget": "npo", "retain": "kl"}, "synthesis": {**SUM, "alpha": 20.0}, **SGD},
    "npo-kl-tied": {
        "objective": {"forget": "npo", "retain": "kl"},
        "synthesis": {**SUM, "alpha": 20.0},
        "tied": True,
        **SGD,
    },
    "rmu-embed_diff": {
        "objective": {"forget": "rmu", "retain": "embed_diff", "layer": 1, "steering_coeff": 2.0},
        "synthesis": {**SUM, "alpha": 5.0},
        "model": {"trainable": [r"\.0\.mlp\.down_proj\.weight$", r"\.1\.mlp\.down_proj\.weight$"]},
    },
    "rmu-embed_diff-first": {  # all tensors train, and none above the first block gets a gradient
        "objective": {"forget": "rmu", "retain": "embed_diff", "layer": 0, "steering_coeff": 2.0},
        "synthesis": {**SUM, "alpha": 5.0},
    },
    "rmu-nll": {
        "objective": {"forget": "rmu", "layer": 0, "steering_coeff": 2.0},
        "synthesis": {"rule": "pcgrad"},
        "model": {"gradient_checkpointing": True},
    },
    "rmu-kl": {  # short forwards, whole ones and the original's in turn
        "objective": {"forget": "rmu", "retain": "kl", "layer": 1, "steering_coeff": 2.0},
        "synthesis": {**SUM, "alpha": 5.0},
        "model": {"trainable": [r"mlp\.down_proj"]},
    },
}

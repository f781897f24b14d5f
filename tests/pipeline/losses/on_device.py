"""`python -m tests.pipeline.losses.on_device`: every objective on a device that pretends, as JSON."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pipeline.losses.objectives import OBJECTIVES
from tests import pretended_device
from tests.pipeline.losses.test_objectives import Setting, ours
from tests.pipeline.modeling.predictions import LABELS, WAYS, gradients_of, leaves_of


class OnDevice(Setting):
    @property
    def steering(self) -> Tensor:
        return super().steering.pin_memory().to(pretended_device.DEVICE, non_blocking=True)


def loss_and_gradients(name: str, way: str, setting: Setting, place: Any) -> list[Tensor]:
    leaves = [place(leaf.detach()).requires_grad_() for leaf in leaves_of(way, LABELS, torch.float32)]
    leaves = leaves[:1] if OBJECTIVES[name].hidden else leaves
    reference = setting.reference(name, torch.float32)
    reference = None if reference is None else place(reference)
    setting = replace(setting, labels=place(setting.labels), mask=place(setting.mask))
    pretended_device.waits.clear()
    loss = ours(name, leaves, setting, reference)
    return [loss.detach(), *gradients_of(loss, leaves)]


def main() -> None:
    device = pretended_device.start()
    found: dict[str, Any] = {}
    for name, objective in OBJECTIVES.items():
        for way in ("hidden",) if objective.hidden else WAYS:
            with pretended_device.Pretended():
                here = loss_and_gradients(name, way, OnDevice(1.0), lambda tensor: tensor.to(device))
                waits = list(pretended_device.waits)
                here = [tensor.cpu() for tensor in here]
            plain = loss_and_gradients(name, way, Setting(1.0), torch.clone)
            found[f"{name} {way}"] = {"same": all(map(torch.equal, here, plain)), "waits": waits}
    print(json.dumps(found))


if __name__ == "__main__":
    main()

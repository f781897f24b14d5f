"""Shapes, dtypes and layouts; what is refused; what the configuration offers."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch

from pipeline.config import schema as config
from pipeline.losses.objectives import OBJECTIVES
from pipeline.synthesis import synthesize
from pipeline.synthesis.combine import Synthesis
from pipeline.synthesis.rules import RULES, SCOPES
from tests.pipeline.synthesis.specification import LAYERS, check_against_spec, every_rule_and_scope, inner, seeded


@every_rule_and_scope
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_dtype_and_shape_are_kept_and_inputs_are_not_touched(rule: str, scope: str, dtype: torch.dtype) -> None:
    forget, retain = seeded((), (0,), (1,), (3, 2), (0, 4), (2, 1, 3), dtype=dtype)
    for tensor in (*forget, *retain):
        tensor.requires_grad_()
    before = [[t.detach().clone() for t in task] for task in (forget, retain)]
    got = synthesize(forget, retain, rule=rule, scope=scope, layers=range(6))
    assert [(g.dtype, g.shape, g.requires_grad) for g in got] == [(dtype, r.shape, False) for r in retain]
    for task, saved in zip((forget, retain), before, strict=True):
        for now, then in zip(task, saved, strict=True):
            assert torch.equal(now, then)
    for g, f, r in zip(got, forget, retain, strict=True):
        assert not g.numel() or g.data_ptr() not in (f.data_ptr(), r.data_ptr())


@every_rule_and_scope
def test_float64_is_computed_in_float64(rule: str, scope: str) -> None:
    """1 + 1e-12 and 1e-60 do not exist in float32."""
    forget = [torch.tensor([1 + 1e-12, -3.0, 1e-60], dtype=torch.float64)]
    retain = [torch.tensor([1 + 2e-12, 1.0, -1e-60], dtype=torch.float64)]
    check_against_spec((forget, retain), rule, scope, 0.3, 0.7, ["only"])


@every_rule_and_scope
def test_bfloat16_gramians_are_not_summed_in_bfloat16(rule: str, scope: str) -> None:
    """4096 small agreements against one larger conflict: in bf16 the sum of ones stops growing at 256."""
    forget = [torch.cat([torch.ones(4096), torch.tensor([-64.0])]).bfloat16()]
    retain = [torch.cat([torch.ones(4096), torch.tensor([60.0])]).bfloat16()]
    assert inner(forget, retain) == 256 == 4096 - 64 * 60
    check_against_spec((forget, retain), rule, scope, 1.0, 1.0, ["only"])


@every_rule_and_scope
def test_memory_layout_does_not_matter(rule: str, scope: str) -> None:
    forget, retain = seeded((4, 6), (5, 4), (3, 3))
    strided = (
        [forget[0].t().contiguous().t(), torch.stack([forget[1]] * 2, -1)[..., 0], forget[2]],
        [retain[0], retain[1].t().contiguous().t(), torch.stack([retain[2]] * 3)[1]],
    )
    assert not strided[0][0].is_contiguous() and not strided[0][1].is_contiguous() and not strided[1][1].is_contiguous()
    expanded = ([*strided[0], torch.ones(1).expand(5)], [*strided[1], -torch.ones(1).expand(5)])
    plain = ([*forget, torch.ones(5)], [*retain, -torch.ones(5)])
    keys: dict[str, Any] = {"rule": rule, "scope": scope, "alpha": 0.5, "layers": LAYERS}
    for a, b in zip(synthesize(*expanded, **keys), synthesize(*plain, **keys), strict=True):
        assert torch.equal(a, b)


@every_rule_and_scope
def test_the_two_lists_may_share_tensors(rule: str, scope: str) -> None:
    tensor = torch.tensor([1.0, -2.0, 0.0])
    got = synthesize([tensor], [tensor], rule=rule, scope=scope, alpha=0.5, gamma=2.0, layers=["only"])[0]
    assert torch.equal(got, (2.0 if rule in ("sago", "blur") else 2.5) * tensor)
    assert tensor.tolist() == [1.0, -2.0, 0.0]


def test_what_is_unknown_is_refused_with_the_valid_names() -> None:
    tensors = [torch.ones(2)]
    refused: list[tuple[dict[str, Any], Any]] = [
        ({"rule": "sagoo"}, RULES),
        ({"rule": ""}, RULES),
        ({"rule": "sago", "scope": "elements"}, SCOPES),
        ({"rule": "sago", "zero_forget": "both"}, ("literal", "retain")),
    ]
    for keys, valid in refused:
        with pytest.raises(ValueError) as error:
            synthesize(tensors, tensors, **keys)
        assert all(name in str(error.value) for name in valid)
        assert repr(list(keys.values())[-1]) in str(error.value)


def test_lists_that_do_not_match_are_refused() -> None:
    two, three = torch.ones(2), torch.ones(3)
    for forget, retain in (
        ([two], [three]),
        ([two], [two, two]),
        ([two, two], [two]),
        ([two, three], [three, two]),
        ([torch.ones(2, 3)], [torch.ones(3, 2)]),
        ([torch.ones(1)], [torch.ones(4)]),
    ):
        with pytest.raises(ValueError, match="shape"):
            synthesize(forget, retain, rule="sago")


def test_scope_layer_needs_the_layer_of_each_tensor() -> None:
    tensors = [torch.ones(2), torch.ones(3)]
    for layers in (None, [], ["a"], ["a", "b", "c"]):
        with pytest.raises(ValueError, match="layers"):
            synthesize(tensors, tensors, rule="pcgrad", scope="layer", layers=layers)
    with pytest.raises(ValueError, match="layers"):  # also where they decide nothing
        synthesize(tensors, tensors, rule="sago", scope="element", layers=["a"])


def test_the_configuration_offers_exactly_what_there_is() -> None:
    def choices(section: type, key: str) -> set[str]:
        found: set[str] = set()
        todo = [section.model_fields[key].annotation]  # type: ignore[attr-defined]
        while todo:
            option = todo.pop()
            found |= {option} if isinstance(option, str) else set()
            todo += get_args(option)
        return found

    assert choices(config.Synthesis, "rule") == set(RULES)
    assert choices(config.Synthesis, "scope") == set(SCOPES)
    for name in choices(config.Synthesis, "zero_forget"):
        Synthesis("sago", zero_forget=name)
    objectives = choices(config.Objective, "forget") | choices(config.Objective, "retain")
    assert objectives - {"none"} == set(OBJECTIVES)


@pytest.mark.parametrize("scope", SCOPES)
def test_no_tensors_at_all(scope: str) -> None:
    assert synthesize([], [], rule="pcgrad", scope=scope, layers=[]) == []

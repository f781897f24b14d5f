"""The plain loop: one process, whole tensors, one sequence at a time, written straight from the specification.

It shares with the program only the order in which documents are visited.
"""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.data.batches import BatchSampler
from tests.oracle_terms import flat_term, terms_of

PAPER_SCOPES = {"sum": "global", "sago": "element", "pcgrad": "module", "blur": "global", "gru": "global"}


def nll_of(model: Any, ids: list[int]) -> Tensor:
    """[len(ids) - 1] negative log-probability of each token after the first."""
    tokens = torch.tensor([ids])
    return F.cross_entropy(model(input_ids=tokens).logits[0, :-1], tokens[0, 1:], reduction="none")


def hidden_of(model: Any, ids: list[int], layer: int) -> Tensor:
    """[len(ids), H] what decoder block `layer` hands to the next; seen by a hook, before any last norm."""
    seen = []
    hook = model.model.layers[layer].register_forward_hook(lambda module, inputs, output: seen.append(output))
    model(input_ids=torch.tensor([ids]))
    hook.remove()
    hidden = seen[0] if isinstance(seen[0], Tensor) else seen[0][0]
    return hidden[0]


def pair_of(tokenizer: Any, corpus: dict[str, Any], row: dict[str, str], refusal: str, limit: int) -> list[Any]:
    """[(ids, first predicted token) of what is to be forgotten, the same of what is preferred to it]."""
    if "prompt" not in corpus:
        texts = [row["text"], row[corpus["preferred"]]]
        return [(tokenizer(text).input_ids[:limit], 1) for text in texts]
    question = f"Question: {row[corpus['prompt']]}\nAnswer: "
    asked, pair = tokenizer(question).input_ids, []
    for answer in (row[corpus["response"]], refusal):
        ids = [*tokenizer(question + answer).input_ids, tokenizer.eos_token_id]
        start = next(at for at in range(len(ids)) if asked[at : at + 1] != ids[at : at + 1])
        pair.append((ids[:limit], start))
    return pair


def loss_of(name: str, model: Any, frozen: Any, batch: list[Any], objective: dict[str, Any], seed: int) -> Tensor:
    """The loss on the global batch of token ids (or pairs, see `pair_of`), as the specification writes it.

    `frozen` is a whole second model.
    """
    beta, delta, layer = objective.get("beta", 0.1), objective.get("delta", 0.0), objective.get("layer", 7)
    if name in ("rmu", "embed_diff"):
        hidden = torch.cat([hidden_of(model, ids, layer) for ids in batch])  # [tokens, H]
        if name == "rmu":
            u = torch.rand(hidden.shape[1], generator=torch.Generator().manual_seed(seed))
            goal = objective.get("steering_coeff", 20.0) * u / u.square().sum().sqrt()
        else:
            with torch.no_grad():
                goal = torch.cat([hidden_of(frozen, ids, layer) for ids in batch])
        return ((hidden.float() - goal.float()) ** 2).sum(1).div(hidden.shape[1]).mean()
    if name in ("undial", "kl"):
        terms = []
        for ids in batch:
            tokens = torch.tensor([ids])
            log_p = model(input_ids=tokens).logits[0, :-1].float().log_softmax(-1)
            with torch.no_grad():
                z = frozen(input_ids=tokens).logits[0, :-1].float()
            if name == "undial":
                z = z - beta * F.one_hot(tokens[0, 1:], z.shape[1])
                terms.append(-(z.softmax(-1) * log_p).sum(-1))
            else:
                terms.append((z.softmax(-1) * (z.log_softmax(-1) - log_p)).sum(-1))
        return torch.cat(terms).mean()
    if name in ("ce_u", "pdu", "jensun", "jsd"):
        return torch.cat([terms_of(name, model, frozen, ids, objective) for ids in batch]).mean()
    if name == "flat":
        means = [[torch.exp(-nll_of(model, ids)[at - 1 :]).mean() for ids, at in pair] for pair in batch]
        return torch.stack([flat_term(a, r, objective["divergence"]) for a, r in means]).mean()
    if name in ("dpo", "dpo_idk", "altpo"):
        margins = []
        for rejected, preferred in batch:
            ratios = []  # log p - log p_ref of an answer, given its question
            for ids, start in (rejected, preferred):
                with torch.no_grad():
                    reference = nll_of(frozen, ids)[start - 1 :].sum()
                ratios.append(reference - nll_of(model, ids)[start - 1 :].sum())
            margins.append(ratios[1] - ratios[0])
        return -(2 / beta) * F.logsigmoid(beta * torch.stack(margins)).mean()
    if name == "idk":
        return torch.cat([nll_of(model, ids)[start - 1 :] for _, (ids, start) in batch]).mean()
    nlls = [nll_of(model, ids) for ids in batch]
    if name in ("ga", "nll"):
        return torch.cat(nlls).mean() * (-1 if name == "ga" else 1)
    if name == "wga":
        p = torch.exp(-torch.cat(nlls)).detach()
        return -(p**beta * torch.cat(nlls)).mean()
    if name == "satimp":
        p = torch.exp(-torch.cat(nlls)).detach()
        return -(p ** objective["beta1"] * (1 - p) ** objective["beta2"] * torch.cat(nlls)).mean()
    if name == "npo":
        with torch.no_grad():
            reference = [nll_of(frozen, ids).sum() for ids in batch]
        margins = torch.stack([nll.sum() - ref for nll, ref in zip(nlls, reference, strict=True)])
        return -(2 / beta) * F.logsigmoid(beta * margins).mean()
    assert name == "simnpo"
    means = torch.stack([nll.mean() for nll in nlls])
    return -(2 / beta) * F.logsigmoid(beta * (means - delta)).mean()


def combine(
    rule: str,
    scope: str,
    f: dict[str, Tensor],
    r: dict[str, Tensor],
    alpha: float,
    gamma: float,
    zero_forget: str = "literal",
    average: dict[str, Tensor] | None = None,
    metric: dict[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """g from g_f and g_r by name, in their dtype: the formulas of the specification, section 3, on whole tensors.

    `average` is the state m of `gru`, float64, empty before the first step; a step that is skipped does not call.
    `metric` has positive weights of the inner products, see `metric_of`.
    """
    if rule == "sum":
        return {n: gamma * f[n] + alpha * r[n] for n in r}
    clash = {n: torch.sign(f[n]) * torch.sign(r[n]) < 0 for n in r}
    if rule == "sago":
        yields = {n: clash[n] | (f[n] == 0) if zero_forget == "retain" else clash[n] for n in r}
        return {n: torch.where(yields[n], alpha * r[n], gamma * f[n]) for n in r}
    if scope == "element":
        assert rule == "pcgrad"
        return {n: torch.where(clash[n], alpha * r[n], alpha * r[n] + gamma * f[n]) for n in r}
    if rule == "gru":
        assert average is not None
        for n in r:
            average[n] = 0.8 * r[n].double() + 0.2 * average.get(n, torch.zeros_like(r[n], dtype=torch.float64))
    result: dict[str, Tensor] = {}
    for group in {group_of(n, scope) for n in r}:
        members = [n for n in r if group_of(n, scope) == group]
        one, two = ({n: v[n].double() for n in members} for v in (f, r))
        if rule == "blur":  # always; a forget gradient of 0 has no direction
            part = product(one, two, metric) / (product(one, one, metric) or 1.0)
            combined = {n: gamma * one[n] + alpha * (two[n] - part * one[n]) for n in members}
        else:
            onto = {n: average[n] for n in members} if rule == "gru" and average is not None else two
            fo = product(one, onto, metric)
            part = fo / product(onto, onto, metric) if fo < 0 else 0.0
            combined = {n: gamma * (one[n] - part * onto[n]) + alpha * two[n] for n in members}
        result.update({n: combined[n].to(r[n].dtype) for n in members})
    return result


def product(a: dict[str, Tensor], b: dict[str, Tensor], metric: dict[str, Tensor] | None = None) -> float:
    return sum((a[n] * b[n] * (1.0 if metric is None else metric[n])).sum().item() for n in a)


def metric_of(optimizer: torch.optim.Optimizer, parameters: dict[str, Tensor]) -> dict[str, Tensor] | None:
    """1 / (√v̂ + ε) by name, float64, of an Adam that has made a step; None of any other optimizer."""
    found = {}
    for group in optimizer.param_groups:
        for name in [n for n, p in parameters.items() if any(p is one for one in group["params"])]:
            state = optimizer.state[parameters[name]]
            if "exp_avg_sq" not in state:
                return None
            v = state["exp_avg_sq"].double() / (1 - group["betas"][1] ** float(state["step"]))
            found[name] = 1 / (v.sqrt() + group["eps"])
    return found


def group_of(name: str, scope: str) -> str:
    """module: the tensor; layer: its decoder block by number, anything else its own module; global: all."""
    if scope == "layer":
        block, found, rest = name.partition(".layers.")
        return f"{block}{found}{rest.split('.')[0]}" if found else name.rpartition(".")[0] or name
    return {"module": name, "global": ""}[scope]


def model_of(config: dict[str, Any], dtype: torch.dtype = torch.float32) -> Any:
    """The model that `config` starts from; adapters by peft's own wrapper, drawn after `seed`."""
    model = AutoModelForCausalLM.from_pretrained(config["model"]["path"], dtype=dtype)
    lora = config["model"].get("lora")
    if lora is None:
        return model
    torch.manual_seed(config.get("seed", 0))
    adapters = LoraConfig(
        r=lora["r"],
        lora_alpha=lora["alpha"],
        target_modules=lora.get("targets") or "all-linear",
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, adapters, autocast_adapter_dtype=False)


def corpora_of(config: dict[str, Any]) -> tuple[dict[str, list[Any]], dict[str, list[Any]]]:
    """(token ids or pairs of each document, the documents of each step), by task."""
    tokenizer = AutoTokenizer.from_pretrained(config["model"]["path"])
    batch, tokens, order = config["train"]["batch_size"], {}, {}
    for number, task in enumerate(("forget", "retain")):
        corpus, limit = config["data"][task], config["data"]["max_length"]
        rows = [json.loads(line) for line in Path(corpus["path"]).read_text().splitlines()]
        if config["objective"][task] in ("dpo", "dpo_idk", "altpo", "idk", "flat"):
            refusals = Path(corpus["refusals"]).read_text().splitlines() if "refusals" in corpus else [""]
            pairs = [(row, refusals[number % len(refusals)]) for number, row in enumerate(rows)]
            tokens[task] = [pair_of(tokenizer, corpus, row, refusal, limit) for row, refusal in pairs]
        else:
            tokens[task] = [tokenizer(row["text"], truncation=True, max_length=limit).input_ids for row in rows]
        walk = BatchSampler(tokens[task], config.get("seed", 0), number, batch, batch, 0, 1, 0)  # pyright: ignore
        order[task] = [walk.global_batch(step) for step in range(config["train"]["steps"])]
    return tokens, order


def optimizer_of(wanted: dict[str, Any], parameters: dict[str, Tensor]) -> torch.optim.Optimizer:
    """Vectors do not decay: in these models they are the norms and biases."""
    matrices, vectors = ([p for p in parameters.values() if (p.dim() > 1) == wide] for wide in (True, False))
    groups = [
        {"params": matrices, "weight_decay": wanted.get("weight_decay", 0.0)},
        {"params": vectors, "weight_decay": 0.0},
    ]
    if wanted.get("name") == "sgd":
        return torch.optim.SGD(groups, lr=wanted["lr"])
    return torch.optim.AdamW(groups, lr=wanted["lr"], eps=wanted.get("eps", 1e-8))


def train(
    config: dict[str, Any], dtype: torch.dtype = torch.float32
) -> tuple[dict[str, Tensor], list[dict[str, float]]]:
    """(final weights by name, one record a step) of the run that `config` describes; alone, on whole tensors."""
    model = model_of(config, dtype)
    frozen = copy.deepcopy(model)
    if config["model"].get("lora") is None:
        for name, parameter in model.named_parameters():
            patterns = config["model"].get("trainable", [".*"])
            parameter.requires_grad_(any(re.search(pattern, name) for pattern in patterns))
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    objective, synthesis, wanted = config["objective"], config["synthesis"], config["optimizer"]
    alpha, gamma = synthesis.get("alpha", 1.0), synthesis.get("gamma", 1.0)
    if "target" in objective:
        tokenizer = AutoTokenizer.from_pretrained(config["model"]["path"])
        objective = {**objective, "target_ids": tokenizer(objective["target"], add_special_tokens=False).input_ids}
    tokens, order = corpora_of(config)
    optimizer = optimizer_of(wanted, parameters)
    records, average, retain_weight = [], {}, 1.0
    for step in range(config["train"]["steps"]):
        gradients, record = {}, {}
        for task in ("forget", "retain"):
            if objective[task] == "none":
                continue
            sequences = [tokens[task][i] for i in order[task][step]]
            loss = loss_of(objective[task], model, frozen, sequences, objective, config.get("seed", 0))
            found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True, materialize_grads=True)
            weight = retain_weight if task == "retain" else 1.0
            gradients[task] = {name: weight * g for name, g in zip(parameters, found, strict=True)}
            record[f"{task}_loss"] = loss.item()
        if objective["forget"] == "pdu":
            record["dual_weight"] = retain_weight
            excess = record["retain_loss"] - objective["retain_loss_eps"]
            retain_weight = max(0.0, retain_weight + objective["dual_step_size"] * excess)
        if len(gradients) == 2:
            rule, zero_forget = synthesis["rule"], synthesis.get("zero_forget", "literal")
            scope = synthesis.get("scope") or PAPER_SCOPES[rule]
            metric = metric_of(optimizer, parameters) if synthesis.get("metric") == "adam" else None
            two = gradients["forget"], gradients["retain"]
            g = combine(rule, scope, *two, alpha, gamma, zero_forget, average, metric)
            record |= geometry_of(gradients["forget"], gradients["retain"], g, "")
            every = synthesis.get("layer_geometry_every", 0)
            if every and len(records) % every == every - 1:
                for part in ("model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "lm_head"):
                    f, r, c = ({n: v for n, v in x.items() if n.startswith(part + ".")} for x in (*two, g))
                    record |= geometry_of(f, r, c, f"/{part}")
        else:
            weight = gamma if "forget" in gradients else alpha
            g = {n: weight * v for n, v in next(iter(gradients.values())).items()}
        for name, parameter in parameters.items():
            parameter.grad = g[name]
        clip = wanted.get("max_grad_norm", 1.0)
        record["grad_norm"] = torch.nn.utils.clip_grad_norm_(parameters.values(), clip or torch.inf).item()
        before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        optimizer.step()
        if "metric" in synthesis:
            moved = {n: p.detach() - before[n] for n, p in parameters.items()}
            record["dot_update_retain"] = product(moved, gradients["retain"])
            record["update_norm"] = product(moved, moved) ** 0.5
        records.append(record)
    return {name: parameter.detach() for name, parameter in parameters.items()}, records


def geometry_of(f: dict[str, Tensor], r: dict[str, Tensor], g: dict[str, Tensor], suffix: str) -> dict[str, float]:
    f_flat, r_flat, g_flat = (torch.cat([x[n].flatten().double() for n in g]) for x in (f, r, g))
    return {
        "cos_forget_retain" + suffix: F.cosine_similarity(f_flat, r_flat, dim=0).item(),
        "cos_combined_forget" + suffix: F.cosine_similarity(g_flat, f_flat, dim=0).item(),
        "cos_combined_retain" + suffix: F.cosine_similarity(g_flat, r_flat, dim=0).item(),
        "conflict_fraction" + suffix: (f_flat.sign() * r_flat.sign() < 0).double().mean().item(),
        "forget_norm" + suffix: f_flat.norm().item(),
        "retain_norm" + suffix: r_flat.norm().item(),
        "combined_norm" + suffix: g_flat.norm().item(),
    }


def weight_change_error(final: dict[str, Tensor], expected: dict[str, Tensor], initial: dict[str, Tensor]) -> float:
    """‖(final - initial) - (expected - initial)‖ / ‖expected - initial‖ over all tensors of `expected`."""
    difference = sum((final[n].double() - expected[n].double()).square().sum().item() for n in expected)
    change = sum((expected[n].double() - initial[n].double()).square().sum().item() for n in expected)
    return (difference / change) ** 0.5

"""Muon for the matrices, AdamW for everything else, and the learning rate of each step."""

import math

import torch
from torch import nn

from training.recipe import Recipe, Schedule

DECAY = 0.2  # share of the steps over which a trapezoid comes down


def build_optimisers(model: nn.Module, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Two optimisers that share the model's parameters between them."""
    matrices, others = split_parameters(model)
    muon = torch.optim.Muon(
        matrices,
        lr=recipe.learning_rate,
        weight_decay=recipe.weight_decay,
        # This scale alone treats a matrix and its transpose alike: GPT-2 keeps its weights transposed.
        adjust_lr_fn="match_rms_adamw",
    )
    adamw = torch.optim.AdamW(others, lr=recipe.learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    return [muon, adamw]


def split_parameters(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The matrices inside the blocks; and embeddings (a tied output layer with them), norms and biases."""
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for parameter in model.parameters():
        is_matrix = parameter.ndim == 2 and id(parameter) not in embeddings
        (matrices if is_matrix else others).append(parameter)
    return matrices, others


def rate_factor(step: int, recipe: Recipe) -> float:
    """The learning rate of a step as a share of the highest, in (0, 1]."""
    warmup = int(recipe.warmup * recipe.steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    remaining = (recipe.steps - step) / (recipe.steps - warmup)  # 1 .. just above 0
    if recipe.schedule is Schedule.COSINE:
        return 0.5 - 0.5 * math.cos(math.pi * remaining)
    return min(1.0, remaining / DECAY)


def set_rate(optimisers: list[torch.optim.Optimizer], rate: float) -> None:
    """Give every parameter group the learning rate of this step."""
    for optimiser in optimisers:
        for group in optimiser.param_groups:
            group["lr"] = rate

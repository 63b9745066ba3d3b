"""Early exit: the first layers of a stack as a model of its own (LayerSkip, arXiv 2404.16710).

    embed → layers 0 … k − 1 → norm → head

`exit_after(model, k)` is a view: a whole model with a config of k layers whose parts are those of `model`, so that training one
trains the other. It has its own state, ledger and sites, and whatever generates, scores or drafts with a model does so with the
view. An argument `exit_layer` of every forward pass would need all of that said a second time.

A model that was trained at its last layer alone has no reason to be readable before; `training.heads.LayerSkip` gives it one.
"""

import torch
from torch import nn

from headspring.models.around import AroundModule
from headspring.models.model import ModelModule
from headspring.models.stack import Stack, StackModule


def stack_of(model: ModelModule) -> StackModule:
    """The stack of blocks in a model, which it may have heads or towers around. Raises `ValueError` where there is none."""
    inner = model.body if isinstance(model, AroundModule) else model
    if not isinstance(inner, StackModule):
        raise ValueError(f"a model of kind {model.config.kind!r} is not one stack of layers, to be left early")
    return inner


def exit_after(model: ModelModule, layers: int) -> StackModule:
    """The model that the first `layers` blocks of `model` are, sharing its parameters.

    Raises `ValueError` where it has fewer.
    """
    whole = stack_of(model)
    config = whole.config
    assert isinstance(config, Stack)
    if not 1 <= layers <= len(config.layers):
        raise ValueError(f"cannot leave after layer {layers}: this model has {len(config.layers)}")
    with torch.device("meta"):  # no memory for weights that are replaced at once
        view = config.model_copy(update={"layers": config.layers[:layers]}).module()
    assert isinstance(view, StackModule)
    view.embed, view.norm, view.head = whole.embed, whole.norm, whole.head
    view.narrow, view.transform = whole.narrow, whole.transform
    view.layers = nn.ModuleList(list(whole.layers)[:layers])
    view.compute_dtype = model.compute_dtype
    view.packed_head, view.packed_head_version = model.packed_head, model.packed_head_version
    view.complete()
    return view.train(model.training)

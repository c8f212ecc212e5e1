"""THE seam into Megatron's cross-entropy path: log-probs and entropy where the language-model loss was.

    attach(model, vocab_size=151936)
    log_probs, entropy, *_ = model(tokens, position_ids, None, labels=labels)      # [b, s] float32, differentiable

:func:`attach` gives one model instance a :class:`~megatron_rest.mcore.head.PolicyHead`; nothing global changes and
:func:`detach` gives the model back as it was.  How it gets there depends on what the installed Megatron can do, which
its signatures say and its version does not:

* ``GPTModel.forward(output_processor=..., output_processor_context=...)`` exists (0.18 and newer): a forward pre-hook
  of the instance passes the head as that argument.  Nothing of Megatron is replaced.
* it does not (0.16, 0.17): the instance's ``_postprocess``, in which its forward pass ends, is shadowed by an adapter
  that hands the head the same arguments.  The one symbol that is replaced; if it has moved, attaching names it.

Either way a step may pass ``output_processor_context=HeadContext(...)``: rows with loss, and a loss to differentiate
within the forward pass.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from megatron_rest.mcore.head import HeadContext, PolicyHead, PolicyOutput, check_fusable

__all__ = [
    "HeadContext",
    "PolicyHead",
    "PolicyOutput",
    "at_temperature",
    "attach",
    "detach",
    "has_output_processor",
    "is_attached",
    "measuring_beta",
]

_ARGUMENT, _CONTEXT = "output_processor", "output_processor_context"
_ADAPTED = "_postprocess"
_NEEDED = ("hidden_states", "labels")  # of _postprocess, by keyword
_FORMS = ("fused", "logits")
_LABELS_POSITION = 4  # forward(input_ids, position_ids, attention_mask, decoder_input, labels)
_KEY = "_megatron_rest_seam"


def attach(model: Any, *, vocab_size: int | None = None, temperature: float = 1.0, form: str = "fused") -> None:
    """Make ``model(..., labels=labels)`` return :class:`~megatron_rest.mcore.head.PolicyOutput`, not a loss.

    Args:
        model: a ``GPTModel`` chunk, unwrapped, of any pipeline stage; all chunks of a pipeline, so that all take
            ``output_processor_context``.  Without labels a model answers as before.
        vocab_size: true vocabulary size; columns beyond it (padding of the embedding) are not part of the softmax.
        temperature: logits are divided by it, as the sampler does.
        form: "fused" or "logits", see :mod:`megatron_rest.mcore.head`.

    Idempotent: attaching again replaces the settings.

    Raises:
        RuntimeError: this Megatron has neither of the two places to attach to; names them.
        TypeError: ``model`` is a wrapper (DistributedDataParallel, Float16Module); names it.
        ValueError: unknown form, an output layer that cannot be fused, a ``vocab_size`` beyond its columns, or a
            configuration that averages the means of microbatches (``calculate_per_token_loss=False``).
    """
    if form not in _FORMS:
        raise ValueError(f"form is {form!r}, expected one of {', '.join(_FORMS)}")
    _check_model(model, vocab_size)
    is_last = getattr(model, "post_process", False)
    if is_last and form == "fused":
        check_fusable(model.output_layer, model.config)
    is_native = has_output_processor(model)
    if not is_native:
        _check_adaptable(model)
    detach(model)
    head = PolicyHead(vocab_size=vocab_size, temperature=temperature, form=form) if is_last else None
    # object's own setter: the seam is no submodule and no part of the state.
    object.__setattr__(model, _KEY, (_NativeSeam if is_native else _AdaptedSeam)(model, head))


def detach(model: Any) -> None:
    """Give ``model`` Megatron's own cross-entropy back.  Harmless if nothing was attached."""
    seam = model.__dict__.pop(_KEY, None)
    if seam is not None:
        seam.remove()


def is_attached(model: Any) -> bool:
    """Whether :func:`attach` is in force on this instance."""
    return _KEY in model.__dict__


def has_output_processor(model: Any) -> bool:
    """Whether this model's forward pass takes ``output_processor``."""
    return _ARGUMENT in inspect.signature(type(model).forward).parameters


@contextmanager
def at_temperature(model: Any, temperature: float) -> Iterator[None]:
    """While it lasts, ``model`` scores at another temperature than :func:`attach` was given."""
    head = _head_of(model)
    if head is None:
        yield
        return
    before, head.temperature = head.temperature, temperature
    try:
        yield
    finally:
        head.temperature = before


@contextmanager
def measuring_beta(model: Any) -> Iterator[None]:
    """While it lasts, ``model(..., labels=labels)`` also returns beta of each position.

    ``beta = ||h||^2 (1 - sum p^2) / temperature^2``, float32, constant: the expected squared Frobenius norm of
    ``d log p(a) / d W`` over ``a ~ p``, for the output matrix ``W`` and the hidden state ``h`` that enters it.  Exact
    for this layer; a proxy for the norm of the whole gradient.  Where p is almost a point mass, ``1 - sum p^2`` is a
    difference of float32 numbers: its absolute error is about 1e-7.

    Collectives, besides those of the head (whose all-gather carries a fifth number a row): under sequence parallelism
    one all-gather of ``[b * s / TP]`` float32 over the tensor-parallel group.

    ``model`` is an unwrapped chunk with :func:`attach`; one without the last pipeline stage is left alone.
    """
    head = _head_of(model)
    if head is None:
        yield
        return
    head.with_beta = True
    try:
        yield
    finally:
        head.with_beta = False


def _head_of(model: Any) -> PolicyHead | None:
    seam = model.__dict__.get(_KEY)
    return None if seam is None else seam.head


class _NativeSeam:
    """Passes the head as Megatron's own ``output_processor`` argument."""

    def __init__(self, model: Any, head: PolicyHead | None) -> None:
        self.head = head
        self._hook = model.register_forward_pre_hook(self._pass_head, with_kwargs=True)

    def _pass_head(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        if self.head is not None and _has_labels(args, kwargs):
            if model.config.mtp_num_layers and kwargs.get("loss_mask") is None and torch.is_grad_enabled():
                raise ValueError(
                    "multi-token prediction adds a cross-entropy of its own, on every token: pass loss_mask=[b, s] to "
                    "the model, or the policy learns to write its prompts"
                )
            kwargs.setdefault(_ARGUMENT, self.head)
        return args, kwargs

    def remove(self) -> None:
        self._hook.remove()


class _AdaptedSeam:
    """Gives a ``GPTModel`` without ``output_processor`` that contract: shadows ``_postprocess`` on the instance."""

    def __init__(self, model: Any, head: PolicyHead | None) -> None:
        self.head = head
        self._model = model
        self._context: HeadContext | None = None
        self._hook = model.register_forward_pre_hook(self._take_context, with_kwargs=True)
        if head is not None:
            object.__setattr__(model, _ADAPTED, self._postprocess)

    def _take_context(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        self._context = kwargs.pop(_CONTEXT, None)
        return args, kwargs

    def _postprocess(self, *, hidden_states: Any, labels: Any, **others: Any) -> Any:
        model, context = self._model, self._context
        self._context = None
        if labels is None:
            return getattr(type(model), _ADAPTED)(model, hidden_states=hidden_states, labels=labels, **others)
        assert self.head is not None
        is_shared = model.share_embeddings_and_output_weights
        return self.head(
            hidden_states=hidden_states,
            output_layer=model.output_layer,
            output_weight=model.shared_embedding_or_output_weight() if is_shared else None,
            labels=labels,
            context=context,
        )

    def remove(self) -> None:
        self._hook.remove()
        self._model.__dict__.pop(_ADAPTED, None)


def _has_labels(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    positional = args[_LABELS_POSITION] if len(args) > _LABELS_POSITION else None
    return kwargs.get("labels", positional) is not None


def _check_model(model: Any, vocab_size: int | None) -> None:
    inner = getattr(model, "module", None)
    if inner is not None and not hasattr(model, "output_layer"):
        raise TypeError(
            f"model is a {type(model).__name__} around a {type(inner).__name__}: attach to the model itself, before it "
            "is wrapped, or to megatron.core.utils.unwrap_model(model)"
        )
    if getattr(getattr(model, "config", None), "calculate_per_token_loss", True) is False:
        raise ValueError(
            "config.calculate_per_token_loss is False: Megatron would average the means of microbatches, and the step "
            "would depend on how the work is split; set it to True (--calculate-per-token-loss) before the model exists"
        )
    columns = getattr(getattr(model, "output_layer", None), "output_size", None)
    if vocab_size is not None and columns is not None and not 0 < vocab_size <= columns:
        raise ValueError(f"vocab_size is {vocab_size}, but the output layer has {columns} columns, padding included")


def _check_adaptable(model: Any) -> None:
    name = f"{type(model).__module__}.{type(model).__name__}"
    method = getattr(type(model), _ADAPTED, None)
    parameters = () if method is None else inspect.signature(method).parameters
    if not all(needed in parameters for needed in _NEEDED):
        raise RuntimeError(
            f"{name} has neither an argument {_ARGUMENT} of forward nor a method {_ADAPTED}({', '.join(_NEEDED)}, "
            "...): this Megatron-Core finishes its forward pass elsewhere; megatron_rest knows GPTModel of "
            "megatron-core 0.16 and 0.17 (the method) and of 0.18 and 0.19 (the argument)"
        )
    if getattr(model.config, "mtp_num_layers", None):
        raise RuntimeError(
            f"{name}: multi-token prediction adds its loss inside {_ADAPTED}, which a head would replace; it needs a "
            f"Megatron-Core whose forward takes {_ARGUMENT} (0.18 and newer)"
        )

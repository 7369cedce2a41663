"""How much memory a model's computations hold at once, found by rehearsing them: without numbers, and on few layers.

The model is made of PyTorch's fake tensors and really run: forward, backward, under autocast. Token ids, masks and
labels are real, since they are small and decide what is computed. So the peak is that of the very code (see
`rehearsal`).

If all layers of a model are alike, two models are rehearsed, of a few layers and of one more. Each further layer adds
as much as that one. A model in pieces is given to FSDP2 as it is, by the first of several processes that do not exist.

This module knows models and tensors, and no experiments.
"""

from __future__ import annotations

import copy
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule

from crosstrace.core.errors import UserError
from crosstrace.core.memo import Memo
from crosstrace.core.pieces import local
from crosstrace.data.tokens import Batch
from crosstrace.models import adapters
from crosstrace.models.anatomy import Anatomy
from crosstrace.models.loading import DTYPES
from crosstrace.models.modes import checkpointing_gradients, differentiating, silent
from crosstrace.trace.engine import Engine
from crosstrace.trace.rehearsal import Parts, Rehearsal
from crosstrace.training.evaluation import judged
from crosstrace.training.losses import example_losses
from crosstrace.training.recipes import Phase
from crosstrace.training.update_loss import UpdateLoss

GATHERED = "gathered layers"  # whole weights while they are in use, and gradients until they are sent


def _replace_meta_parameters(model: nn.Module) -> None:
    """Make the parameters on the meta device anew, in the mode or on the device of the context."""
    for module in model.modules():
        for name, p in module.named_parameters(recurse=False):
            if p.is_meta:
                setattr(module, name, nn.Parameter(torch.empty(p.shape, dtype=p.dtype), p.requires_grad))


@contextmanager
def pretended_processes(count: int) -> Iterator[Any]:
    """Within the context, this is the first of `count` processes. The others do not exist. Gives their mesh.

    Raises:
        UserError: this process has joined a process group.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if dist.is_initialized():
        raise UserError(
            "what several processes hold is planned by pretending that they are there, but this one has joined a "
            "process group already; plan before that, or in another process"
        )
    excepthook = sys.excepthook  # torch replaces it by one that adds the process's number
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=count)
    try:
        yield init_device_mesh("cpu", (count,))
    finally:
        dist.destroy_process_group()
        sys.excepthook = excepthook


class _UnsentCollective:
    """In place of FSDP2's collectives: makes their buffers, and the copy that gloo sends, but sends nothing."""

    def __init__(self, gloo: bool) -> None:
        self._gloo = gloo

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, *_: Any, **__: Any) -> None:
        if self._gloo:
            torch.empty_like(max(output_tensor, input_tensor, key=Tensor.numel))


def _shard(model: Any, mesh: Any, gloo: bool) -> Any:
    """The model in pieces, as `loading.load_model` gives it to the processes of the mesh."""
    from transformers.distributed.configuration_utils import DistributedConfig

    head = model.get_output_embeddings()
    tied = getattr(head, "weight", None) is model.get_input_embeddings().weight
    if tied:
        head.weight = nn.Parameter(torch.empty_like(head.weight))
    config = DistributedConfig(fsdp_size=mesh.size())
    try:
        model = type(model).maybe_distribute_model(model, config, SimpleNamespace(get_mesh=lambda _: mesh))
    except ValueError as error:
        why = str(error).splitlines()[0]
        raise UserError(f"{type(model).__name__} can't be had in pieces on several processes: {why}") from None
    if tied:
        model.tie_weights()
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_custom_all_gather(_UnsentCollective(gloo))  # pyright: ignore[reportArgumentType]
            module.set_custom_reduce_scatter(_UnsentCollective(gloo))  # pyright: ignore[reportArgumentType]
    return model


class Understudy(Memo):
    """Stands in for a causal language model of a config: the computations of that model are rehearsed.

    Args:
        config: the model's config.
        dtype: of the weights, a name of `DTYPES`.
        attention: the attention kernel.
        lora: settings of a new adapter on the model; None: there is no adapter.
        processes: how many processes hold the model in pieces. The first one is rehearsed, with its own batches; no
            other holds more.
        gloo: whether the processes are joined through gloo, as on the CPU.

    Attributes:
        whole: the whole model on the meta device: the names, shapes and types of its parameters.
        layers: how many layers it has.
        vocabulary: the size of its vocabulary.

    Raises:
        UserError: transformers can't make a causal language model of the config, or the adapter does not fit it.
    """

    def __init__(
        self,
        config: Any,
        dtype: str,
        attention: str,
        lora: adapters.LoraSettings | None = None,
        processes: int = 1,
        gloo: bool = False,
    ) -> None:
        super().__init__()
        self._config, self._dtype, self._attention, self._lora = config, dtype, attention, lora
        self._processes, self._gloo = processes, gloo
        # How many layers at each end hold another amount than those between. (While a layer of a model in pieces is
        # computed, its neighbours are being gathered.)
        self._ends = 1 if processes == 1 else 2
        self.whole: Any = self._make_model(config, torch.device("meta"))
        text = self.whole.config.get_text_config()
        self.layers = int(text.num_hidden_layers)
        self.vocabulary = int(text.vocab_size)

    def _make_model(self, config: Any, device: Any) -> Any:
        """A model of the config, on a device or in a mode of fake tensors."""
        from transformers import AutoModelForCausalLM

        try:
            with torch.random.fork_rng(), silent(), device:
                model = AutoModelForCausalLM.from_config(
                    copy.deepcopy(config), dtype=DTYPES[self._dtype], attn_implementation=self._attention
                )
            if self._lora:
                model = adapters.adapted(model, self._lora, 0, empty=True)
                if isinstance(device, FakeTensorMode):
                    with device:
                        _replace_meta_parameters(model)
            return model.eval()
        except (ValueError, ImportError) as error:
            raise UserError(f"no model could be made from the config: {str(error).splitlines()[0]}") from None

    @cached_property
    def _layer_counts(self) -> list[int]:
        """How many layers the rehearsed models have: a few and one more, or all if the layers differ."""
        few = [2 * self._ends, 2 * self._ends + 1]
        return [self.layers] if self.layers <= few[1] or not self._has_equal_layers() else few

    @cached_property
    def _whole_models(self) -> list[Any]:
        """The rehearsed models, not in pieces."""
        return [self._of_layers(number, FakeTensorMode(allow_non_fake_inputs=True)) for number in self._layer_counts]

    @contextmanager
    def _models(self) -> Iterator[list[Any]]:
        """The rehearsed models. Models in pieces can be used within the context alone, as their processes can."""
        if self._processes == 1:
            yield self._whole_models
            return
        with pretended_processes(self._processes) as mesh:
            models = []
            for number in self._layer_counts:
                mode = FakeTensorMode(allow_non_fake_inputs=True)
                model = self._of_layers(number, mode)
                with silent(), mode:
                    models.append(_shard(model, mesh, self._gloo))
            yield models

    def _of_layers(self, number: int, device: Any) -> Any:
        """The model with so many layers."""
        config = copy.deepcopy(self._config)
        if number != self.layers:
            text = config.get_text_config()
            text.num_hidden_layers = number
            if getattr(text, "layer_types", None):
                text.layer_types = text.layer_types[:number]
        return self._make_model(config, device)

    def _has_equal_layers(self) -> bool:
        """Whether all layers have the same parameters and are of the same type."""
        anatomy = Anatomy(self.whole)
        shapes: dict[int, list[Any]] = defaultdict(list)
        for name, layer in anatomy.layer.items():
            if layer is not None:
                shapes[layer].append(anatomy.shapes[name])
        types = getattr(self.whole.config.get_text_config(), "layer_types", None) or [""]
        return len(shapes) == self.layers and len({*map(str, shapes.values())}) == 1 and len({*types}) == 1

    def _find_peak(self, rehearse: Callable[[Any], Sequence[Parts]]) -> Parts:
        """The highest of the peaks that `rehearse` gives, each extrapolated to all layers.

        Raises:
            UserError: the model can't be run without numbers.
        """
        try:
            with self._models() as models:
                peaks = [rehearse(model) for model in models]
        except (
            RuntimeError,
            NotImplementedError,
        ) as error:  # it depends on numbers, or an operation has no fake kernel
            raise UserError(
                f"the memory of {type(self.whole).__name__} can't be planned, since it can't be run without numbers: "
                f"{str(error).strip().splitlines()[0]}"
            ) from error
        if len(peaks) > 1:
            further = self.layers - self._layer_counts[0]
            peaks = [[_extrapolate(few, more, further) for few, more in zip(*peaks, strict=True)]]
        return max(peaks[0], key=lambda parts: sum(parts.values()))

    # ---- the computations

    def update(
        self, phase: Phase, batches: Mapping[str, Sequence[Batch]], bf16: bool, checkpointing: bool = False
    ) -> Parts:
        """The forwards and backwards of one update of a training: logits, activations, gradients, weights in bf16."""

        def rehearse(model: Any) -> Sequence[Parts]:
            weights = {tuple(p.shape) for p in model.parameters()}
            if bf16:  # as accelerate wraps the forward
                from accelerate.utils import convert_outputs_to_fp32

                model.forward = convert_outputs_to_fp32(torch.autocast("cpu", torch.bfloat16)(model.forward))

            def is_cast_weight(x: Tensor) -> bool:
                return bf16 and x.dtype == torch.bfloat16 and tuple(x.shape) in weights

            try:
                model.train()
                with (
                    checkpointing_gradients(model, checkpointing),
                    self._rehearsal(model, {"weights in bf16": is_cast_weight}) as seen,
                    self._marking(model, seen),
                ):
                    UpdateLoss(model, phase, batches).finish().backward()
                    for p in model.parameters():
                        seen.name(None if p.grad is None else local(p.grad), "gradients")
                return seen.peaks()
            finally:
                model.__dict__.pop("forward", None)
                model.zero_grad()
                model.eval()

        return self._find_peak(rehearse)

    def _rehearsal(self, model: Any, labels: Mapping[str, Callable[[Tensor], bool]] | None = None) -> Rehearsal:
        """A rehearsal that tells apart: `labels`, logits, gathered layers of a model in pieces, and activations.

        A flat tensor is one of FSDP2's buffers: no large activation is flat."""
        known = dict(labels or {}) | {"logits": self._is_logits}
        if self._processes == 1:
            return Rehearsal(known | {"activations": lambda x: True})
        shapes = {tuple(p.shape) for p in model.parameters()}

        def is_gathered(x: Tensor) -> bool:
            return (x.dim() == 1 and x.is_floating_point()) or tuple(x.shape) in shapes

        known[GATHERED] = is_gathered
        weight = local(next(model.parameters()))
        assert isinstance(weight, FakeTensor)
        return Rehearsal(known | {"activations": lambda x: True}, weight.fake_mode)

    def _is_logits(self, x: Tensor) -> bool:
        return x.dim() > 1 and x.shape[-1] == self.vocabulary

    @contextmanager
    def _marking(self, model: Any, seen: Rehearsal) -> Iterator[None]:
        """Within the context, each forward and backward is divided into parts.

        The parts are: up to the first layers, the last layers, and what comes after them. The layers in between do not
        count: there, what is held grows or shrinks evenly, so its peak is at one of the ends. Within each part the
        peak is at the same operation, however many layers there are.
        """
        if len(self._layer_counts) == 1:
            yield
            return
        layers = next(m for m in model.modules() if isinstance(m, nn.ModuleList))
        rest, last = layers[self._ends], layers[-self._ends]

        def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
            x = args[0] if args else kwargs["hidden_states"]
            if module is rest:
                seen.mark(counts=False)
            if module is last:
                seen.mark()
            if x.requires_grad:
                x.register_hook(lambda _: back(module))

        def back(module: nn.Module) -> None:
            if module is last:
                seen.mark(counts=False)
            if module is rest:
                seen.mark()

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            seen.mark()
            x = output if isinstance(output, Tensor) else output[0]
            if x.requires_grad:
                x.register_hook(lambda _: seen.mark())

        with ExitStack() as hooks:
            for layer in {rest, last}:  # first of all hooks: before FSDP2 gathers the layer
                hooks.callback(layer.register_forward_pre_hook(enter, with_kwargs=True, prepend=True).remove)
            hooks.callback(layers[-1].register_forward_hook(leave).remove)
            yield

    def recall(self, rows: Sequence[Batch]) -> Parts:
        """`evaluation.recall` of some batches, one after the other. The results of the last one are still held."""

        def rehearse(model: Any) -> Sequence[Parts]:
            with (
                torch.no_grad(),
                self._rehearsal(model) as seen,
                self._marking(model, seen),
            ):
                for row in rows:
                    results = judged(model, row)
                del results
            return seen.peaks()

        return self._find_peak(rehearse)

    def inward(self, row: Batch) -> Parts:
        """A forward, and a backward to the embeddings that computes no parameter's gradient."""

        def rehearse(model: Any) -> Sequence[Parts]:
            def start_gradient(module: nn.Module, args: Any, output: Tensor) -> Tensor:
                return output.detach().requires_grad_()

            with differentiating(model), Rehearsal({"activations": lambda x: True}) as seen, self._marking(model, seen):
                with model.get_input_embeddings().register_forward_hook(start_gradient):
                    logits = model(input_ids=row["input_ids"], attention_mask=row["attention_mask"]).logits
                    example_losses(logits, row["labels"]).sum().backward()
            return seen.peaks()

        return self._find_peak(rehearse)

    def traced(self, rows: Sequence[Mapping[str, Tensor]]) -> Parts:
        """The activations of a trace of some batches, by the trace's own estimate.

        For a model in pieces also the layers that are gathered in the forward and backward."""

        def rehearse(model: Any) -> Sequence[Parts]:
            with self._rehearsal(model):
                parts = {"activations": float(Engine(model).memory(rows, 1)[1].activations)}
            if self._processes == 1:
                return [parts]
            one = {name: x[:1] for name, x in rows[0].items()}
            embedded: list[Tensor] = []

            def note(module: nn.Module, args: Any, output: Tensor) -> None:
                embedded.append(output)

            with self._rehearsal(model) as seen, model.get_input_embeddings().register_forward_hook(note):
                logits = model(input_ids=one["input_ids"], attention_mask=one["attention_mask"]).logits
                torch.autograd.grad(example_losses(logits, one["labels"]).sum(), embedded)
            return [parts | {GATHERED: float(seen.most(GATHERED))}]

        return self._find_peak(rehearse)


def _extrapolate(few: Parts, more: Parts, further: int) -> Parts:
    """The peak of a model with `further` more layers than that of `few`; `more` is that of one more layer."""
    return {
        label: max(0.0, few.get(label, 0) + further * (more.get(label, 0) - few.get(label, 0)))
        for label in {**few, **more}
    }

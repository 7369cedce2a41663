"""What a computation holds in memory at once, found without its numbers: it is rehearsed on tensors that have none.

A model is made of PyTorch's fake tensors, which have shapes and types but no storage, and then really run: forward,
backward, under autocast. What is small and decides what happens (token ids, masks, labels) stays real. Each storage
that would have been allocated is counted from the operation that makes it until the last tensor on it is gone, so the
peak is that of the code as it is. Not seen: the scratch memory inside a kernel, and what an allocator keeps for later.

Of a model whose layers are alike a few are rehearsed, and one more; what is held grows by the same with each layer.
One that several processes hold in pieces is given to FSDP2 as it is, by the first of processes that do not exist.
It knows models and tensors; it knows nothing of experiments.
"""

from __future__ import annotations

import copy
import sys
import weakref
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
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from crosstrace.core.errors import UserError
from crosstrace.core.pieces import local
from crosstrace.data.tokens import Batch
from crosstrace.models import adapters
from crosstrace.models.anatomy import Anatomy
from crosstrace.models.loading import DTYPES
from crosstrace.models.modes import checkpointing_gradients, differentiating, silent
from crosstrace.trace.engine import Engine
from crosstrace.training.evaluation import judged
from crosstrace.training.losses import example_losses
from crosstrace.training.recipes import Phase
from crosstrace.training.update_loss import UpdateLoss

Parts = dict[str, float]  # what is held -> bytes
GATHERED = "gathered layers"  # whole weights while they are computed with, and gradients until they are sent


class Rehearsal(TorchDispatchMode):
    """Within the context, counts the storages of fake tensors that operations make.

        with Rehearsal({"logits": lambda x: x.shape[-1:] == (vocabulary,)}) as seen:
            model(input_ids=ids).logits.sum().backward()
        seen.peak()                                  # {"logits": bytes, "other": bytes}, at the fullest moment

    What was there before (the weights) is not counted.

    Args:
        labels: name -> whether a new tensor is of that kind; the first that says yes names its storage.
        pretending: the mode of a model in pieces, in which FSDP2's own buffers are made without numbers too.
    """

    def __init__(
        self, labels: Mapping[str, Callable[[Tensor], bool]] | None = None, pretending: FakeTensorMode | None = None
    ) -> None:
        super().__init__()
        self._labels, self._pretending = dict(labels or {}), pretending
        self._alive: dict[int, int] = {}  # storage -> its number
        self._label: list[str] = []  # by number
        self._size: list[int] = []  # by number, now
        self._events: list[tuple[int, int]] = []  # number, bytes that came (or went, if negative), in order
        self._marks: list[tuple[int, bool]] = [(0, True)]  # where a part begins, and whether it is kept

    def __enter__(self) -> Any:
        """FSDP2 frees and allocates storages whose tensors stay, which no operation tells of."""
        self._resize = resize = torch.UntypedStorage.resize_

        def resized(storage: torch.UntypedStorage, size: int) -> Any:
            if storage._cdata in self._alive:
                self._became(self._alive[storage._cdata], size)
            return resize(storage, size)

        torch.UntypedStorage.resize_ = resized  # pyright: ignore[reportAttributeAccessIssue]
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        torch.UntypedStorage.resize_ = self._resize
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _GROUPED and isinstance(args[0], FakeTensor):
            result = args[0].new_empty(_grouped(*args, **(kwargs or {})))
        elif func is torch.ops.aten.empty.memory_format and self._pretending is not None:
            with self._pretending:
                result = func(*args, **(kwargs or {}))
        else:
            result = func(*args, **(kwargs or {}))
        new = [x for x in tree_leaves(result) if isinstance(x, FakeTensor) and _storage(x) not in self._alive]
        if new:  # or of a storage that was there before: in place, or a view
            old = {_storage(x) for x in tree_leaves((args, kwargs)) if isinstance(x, FakeTensor)}
            for x in new:
                if _storage(x) not in old and _storage(x) not in self._alive:
                    self._came(x)
        return result

    def _came(self, x: FakeTensor) -> None:
        storage, number, key = x.untyped_storage(), len(self._label), _storage(x)
        self._alive[key] = number
        self._label.append(next((name for name, fits in self._labels.items() if fits(x)), "other"))
        self._size.append(0)
        self._became(number, storage.nbytes())
        weakref.finalize(storage, self._went, key, number).atexit = False

    def _went(self, key: int, number: int) -> None:
        self._alive.pop(key, None)
        self._became(number, 0)

    def _became(self, number: int, size: int) -> None:
        self._events.append((number, size - self._size[number]))
        self._size[number] = size

    def name(self, x: Tensor | None, label: str) -> None:
        """Give the storage of a tensor another label, also for the past."""
        if isinstance(x, FakeTensor) and _storage(x) in self._alive:
            self._label[self._alive[_storage(x)]] = label

    def mark(self, kept: bool = True) -> None:
        """A new part begins here, which `peaks` tells of, or does not."""
        self._marks.append((len(self._events), kept))

    def peak(self) -> Parts:
        """Bytes by label at the moment at which most of them were held."""
        return self._peak(0, len(self._events))

    def peaks(self) -> list[Parts]:
        """The same for each part that is kept."""
        ends = [*(at for at, _ in self._marks[1:]), len(self._events)]
        return [self._peak(start, stop) for (start, kept), stop in zip(self._marks, ends) if kept]

    def most(self, label: str) -> int:
        """Bytes of one label, when most of them were held."""
        now = most = 0
        for number, size in self._events:
            now += size * (self._label[number] == label)
            most = max(most, now)
        return most

    def _peak(self, start: int, stop: int) -> Parts:
        now, most, at = 0, -1, 0
        for i, (_, size) in enumerate(self._events[:stop]):
            now += size
            if now > most and i >= start - 1:  # what was there when it began counts too
                most, at = now, i + 1
        found: Parts = defaultdict(float)
        for number, size in self._events[:at]:
            found[self._label[number]] += size
        return {label: size for label, size in found.items() if size}


_GROUPED = getattr(getattr(torch.ops.aten, "_grouped_mm", None), "default", None)


def _grouped(a: Tensor, b: Tensor, offs: Tensor | None = None, *_: Any, **__: Any) -> list[int]:
    """The shape of the experts' product, which torch tells of fake tensors in bf16 alone: of two matrices one for each
    group of what they share; else of the rows of one and the columns of the other."""
    if a.dim() == b.dim() == 2:
        assert offs is not None
        return [len(offs), a.shape[0], b.shape[1]]
    return [*a.shape[-3:-1], b.shape[-1]] if a.dim() == b.dim() else [a.shape[-2], b.shape[-1]]


def _storage(x: Tensor) -> int:
    """What identifies a tensor's storage as long as that lives; a fake one has no address."""
    return x.untyped_storage()._cdata


def _faked(model: nn.Module) -> None:
    """Make the parameters that are on the meta device anew, as the context makes tensors."""
    for module in model.modules():
        for name, p in module.named_parameters(recurse=False):
            if p.is_meta:
                setattr(module, name, nn.Parameter(torch.empty(p.shape, dtype=p.dtype), p.requires_grad))


@contextmanager
def _others(processes: int) -> Iterator[Any]:
    """So many processes, of which this is the first and the others do not exist: a mesh of them."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if dist.is_initialized():
        raise UserError(
            "what several processes hold is planned by pretending that they are there, but this one has joined a "
            "process group already; plan before that, or in another process"
        )
    tell = sys.excepthook  # to which torch puts the process's number
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=processes)
    try:
        yield init_device_mesh("cpu", (processes,))
    finally:
        dist.destroy_process_group()
        sys.excepthook = tell


class _Unsent:
    """In place of FSDP2's collectives: their buffers are made, and the copy that gloo sends, but nothing is sent."""

    def __init__(self, gloo: bool) -> None:
        self._gloo = gloo

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, *_: Any, **__: Any) -> None:
        if self._gloo:
            torch.empty_like(max(output_tensor, input_tensor, key=Tensor.numel))


def _in_pieces(model: Any, mesh: Any, gloo: bool) -> Any:
    """The model as `loading.load_model` gives it to the processes of the mesh: in pieces, tied when it is so."""
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
            module.set_custom_all_gather(_Unsent(gloo))  # pyright: ignore[reportArgumentType]
            module.set_custom_reduce_scatter(_Unsent(gloo))  # pyright: ignore[reportArgumentType]
    return model


class Understudy:
    """A causal language model of a config, in whose place computations are rehearsed.

    Args:
        lora: put a new adapter of these settings on it.
        processes: how many hold the model in pieces; what is rehearsed is the part of the first, which holds no less
            than any other. The batches are its own.
        gloo: they are joined through gloo, as on the CPU.

    Attributes:
        whole: the model on the meta device: all its parameters' names, shapes and types, in pieces or not.

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
        self._config, self._dtype, self._attention, self._lora = config, dtype, attention, lora
        self._processes, self._gloo = processes, gloo
        # of layers alike, so many at each end: while one of a model in pieces is computed its neighbours are on the way
        self._ends = 1 if processes == 1 else 2
        self.whole: Any = self._made(config, torch.device("meta"))
        text = self.whole.config.get_text_config()
        self.layers = int(text.num_hidden_layers)
        self.vocabulary = int(text.vocab_size)

    def _made(self, config: Any, device: Any) -> Any:
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
                        _faked(model)
            return model.eval()
        except (ValueError, ImportError) as error:
            raise UserError(f"no model could be made from the config: {str(error).splitlines()[0]}") from None

    @cached_property
    def _numbers(self) -> list[int]:
        """Layers of the models that are rehearsed: few and one more, or all where layers differ."""
        few = [2 * self._ends, 2 * self._ends + 1]
        return [self.layers] if self.layers <= few[1] or not self._alike() else few

    @cached_property
    def _whole_cast(self) -> list[Any]:
        return [self._of_layers(number, FakeTensorMode(allow_non_fake_inputs=True)) for number in self._numbers]

    @contextmanager
    def _cast(self) -> Iterator[list[Any]]:
        """The models that are rehearsed; those in pieces are of use as long as their processes are there."""
        if self._processes == 1:
            yield self._whole_cast
            return
        with _others(self._processes) as mesh:
            found = []
            for number in self._numbers:
                mode = FakeTensorMode(allow_non_fake_inputs=True)
                model = self._of_layers(number, mode)
                with silent(), mode:
                    found.append(_in_pieces(model, mesh, self._gloo))
            yield found

    def _of_layers(self, number: int, device: Any) -> Any:
        config = copy.deepcopy(self._config)
        if number != self.layers:
            text = config.get_text_config()
            text.num_hidden_layers = number
            if getattr(text, "layer_types", None):
                text.layer_types = text.layer_types[:number]
        return self._made(config, device)

    def _alike(self) -> bool:
        anatomy = Anatomy(self.whole)
        shapes: dict[int, list[Any]] = defaultdict(list)
        for name, layer in anatomy.layer.items():
            if layer is not None:
                shapes[layer].append(anatomy.shapes[name])
        kinds = getattr(self.whole.config.get_text_config(), "layer_types", None) or [""]
        return len(shapes) == self.layers and len({*map(str, shapes.values())}) == 1 and len({*kinds}) == 1

    def _held(self, rehearse: Callable[[Any], Sequence[Parts]]) -> Parts:
        """The fullest of the moments that a rehearsal gives, each carried on to all layers."""
        try:
            with self._cast() as cast:
                each = [rehearse(model) for model in cast]
        except (RuntimeError, NotImplementedError) as error:  # what depends on numbers, or has no fake kernel
            raise UserError(
                f"the memory of {type(self.whole).__name__} can't be planned, since it can't be run without numbers: "
                f"{str(error).strip().splitlines()[0]}"
            ) from error
        if len(each) > 1:
            further = self.layers - self._numbers[0]
            grown = lambda a, b, label: a.get(label, 0) + further * (b.get(label, 0) - a.get(label, 0))
            each = [[{label: max(0.0, grown(a, b, label)) for label in {**a, **b}} for a, b in zip(*each, strict=True)]]
        return max(each[0], key=lambda parts: sum(parts.values()))

    # ---- what is rehearsed

    def update(
        self, phase: Phase, batches: Mapping[str, Sequence[Batch]], bf16: bool, checkpointing: bool = False
    ) -> Parts:
        """Forwards and backwards of one update of a training: logits, activations, gradients, weights in bf16."""

        def rehearse(model: Any) -> Sequence[Parts]:
            weights = {tuple(p.shape) for p in model.parameters()}
            if bf16:  # as accelerate wraps it
                from accelerate.utils import convert_outputs_to_fp32

                model.forward = convert_outputs_to_fp32(torch.autocast("cpu", torch.bfloat16)(model.forward))
            cast = {"weights in bf16": lambda x: bf16 and x.dtype == torch.bfloat16 and tuple(x.shape) in weights}
            try:
                model.train()
                with (
                    checkpointing_gradients(model, checkpointing),
                    self._rehearsal(model, cast) as seen,
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

        return self._held(rehearse)

    def _rehearsal(self, model: Any, labels: Mapping[str, Callable[[Tensor], bool]] | None = None) -> Rehearsal:
        """Counts what is held beside the weights: what `labels` tell, logits, what is gathered of a model in pieces,
        and activations, which of any size are never flat as FSDP2's buffers are."""
        known = dict(labels or {}) | {"logits": self._is_logits}
        if self._processes == 1:
            return Rehearsal(known | {"activations": lambda x: True})
        shapes = {tuple(p.shape) for p in model.parameters()}
        known[GATHERED] = lambda x: (x.dim() == 1 and x.is_floating_point()) or tuple(x.shape) in shapes
        own = local(next(model.parameters()))
        assert isinstance(own, FakeTensor)
        return Rehearsal(known | {"activations": lambda x: True}, own.fake_mode)

    def _is_logits(self, x: Tensor) -> bool:
        return x.dim() > 1 and x.shape[-1] == self.vocabulary

    @contextmanager
    def _marking(self, model: Any, seen: Rehearsal) -> Iterator[None]:
        """Parts each forward and backward: the first layers and before, the last layers, and what comes after.

        From layer to layer in between, what is held grows or shrinks evenly, so it is fullest at one of the ends; and
        within each of these parts the same moment is the fullest, however many layers there are.
        """
        if len(self._numbers) == 1:
            yield
            return
        layers = next(m for m in model.modules() if isinstance(m, nn.ModuleList))
        rest, last = layers[self._ends], layers[-self._ends]

        def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
            x = args[0] if args else kwargs["hidden_states"]
            if module is rest:
                seen.mark(kept=False)
            if module is last:
                seen.mark()
            if x.requires_grad:
                x.register_hook(lambda _: back(module))

        def back(module: nn.Module) -> None:
            if module is last:
                seen.mark(kept=False)
            if module is rest:
                seen.mark()

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            seen.mark()
            x = output if isinstance(output, Tensor) else output[0]
            if x.requires_grad:
                x.register_hook(lambda _: seen.mark())

        with ExitStack() as hooks:
            for layer in {rest, last}:  # (before FSDP2 gathers it)
                hooks.callback(layer.register_forward_pre_hook(enter, with_kwargs=True, prepend=True).remove)
            hooks.callback(layers[-1].register_forward_hook(leave).remove)
            yield

    def recall(self, rows: Sequence[Batch]) -> Parts:
        """`evaluation.recall` of some batches, one after the other: the last one's results are still held."""

        def rehearse(model: Any) -> Sequence[Parts]:
            with (
                torch.no_grad(),
                self._rehearsal(model) as seen,
                self._marking(model, seen),
            ):
                for row in rows:
                    held = judged(model, row)
                del held
            return seen.peaks()

        return self._held(rehearse)

    def inward(self, row: Batch) -> Parts:
        """A forward, and a backward to the embeddings: no parameter's gradient with it."""

        def rehearse(model: Any) -> Sequence[Parts]:
            put = lambda module, args, output: output.detach().requires_grad_()
            with differentiating(model), Rehearsal({"activations": lambda x: True}) as seen, self._marking(model, seen):
                with model.get_input_embeddings().register_forward_hook(put):
                    logits = model(input_ids=row["input_ids"], attention_mask=row["attention_mask"]).logits
                    example_losses(logits, row["labels"]).sum().backward()
            return seen.peaks()

        return self._held(rehearse)

    def traced(self, rows: Sequence[Mapping[str, Tensor]]) -> Parts:
        """The activations of a trace of some batches, by the trace's own estimate; of a model in pieces also what is
        gathered of it on the way, forward and back."""

        def rehearse(model: Any) -> Sequence[Parts]:
            with self._rehearsal(model):
                found = {"activations": float(Engine(model).memory(rows, 1)[1].activations)}
            if self._processes == 1:
                return [found]
            one = {name: x[:1] for name, x in rows[0].items()}
            first: list[Tensor] = []
            note = lambda module, args, output: first.append(output)
            with self._rehearsal(model) as seen, model.get_input_embeddings().register_forward_hook(note):
                logits = model(input_ids=one["input_ids"], attention_mask=one["attention_mask"]).logits
                torch.autograd.grad(example_losses(logits, one["labels"]).sum(), first)
            return [found | {GATHERED: float(seen.most(GATHERED))}]

        return self._held(rehearse)

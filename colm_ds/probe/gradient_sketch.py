"""Per-example gradients of every trained matrix, reduced by a Kronecker sketch to a few numbers a matrix.

For a module with input x `[T, in]` and gradient delta `[T, out]` at its output, an example's weight gradient is
sum_t delta_t x_t^T. Its sketch is (delta P)^T (x Q), `side` x `side` numbers, with P `[out, side]` and Q `[in, side]`
of independent normal entries over sqrt(side), and the identity where a dimension is no larger than `side`. So inner
products of sketches are unbiased for those of the gradients, and where no dimension exceeds `side` they are exact.
Input embeddings and head, whose other side is one-hot, go the same way (`token_matrices`). No norms and biases.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from colm_ds.batching.micro_batch import MicroBatch
from colm_ds.errors import ProbeError
from colm_ds.models.architecture import ProbeTarget, find_head
from colm_ds.models.dora import hooked, norms_by_adapter
from colm_ds.models.example_loss import find_loss_head, label_losses, loss_sums
from colm_ds.models.patch import eval_mode
from colm_ds.models.quantized import adapts_tensor
from colm_ds.probe.token_matrices import HeadStates, TokenMatrix, add_head_gradients, trained_token_matrices
from colm_ds.randomness import private_generator
from colm_ds.selection.transfer import to_device

SIDE, LEAST_SIDE = 48, 12
"""Rows and columns of a module's sketch: default and minimum."""

TABLE_BYTES = 1 << 30
"""Maximum bytes of the sketches of all examples together."""

MAX_TOKENS = 1024
"""Padded tokens of one pass: the graph of the whole model is kept, without activation checkpointing."""


@dataclass(frozen=True)
class LinearModule:
    """A linear module whose weight is trained.

    Attributes:
        name: its name in the model.
        module: the module.
        in_features: width of its input.
        out_features: width of its output.
    """

    name: str
    module: nn.Module
    in_features: int
    out_features: int

    def size(self, side: int) -> int:
        """Return the number of entries of a sketch of this side."""
        return min(self.in_features, side) * min(self.out_features, side)


def trained_linears(model: nn.Module) -> list[LinearModule]:
    """Return the trained linear modules of a model in order, without its output head, of which there may be none.

    These are `nn.Linear` and transformers' `Conv1D`; under LoRA the adapters' own. Where every `lora_B` is zero, as in
    a fresh adapter, the gradients of `lora_A` are zero, and they are left out.

    Args:
        model: any model, also in a `PeftModel`.

    Raises:
        ProbeError: if one adapts a tensor of experts.
    """
    in_head = {id(module) for module in _head_modules(model)}
    fresh = is_fresh_adapter(model)
    of_tensors = {id(module) for module in _adapters_of_tensors(model)}
    linears = []
    for name, module in model.named_modules():
        sizes = _sizes(module)
        weight = getattr(module, "weight", None)
        if sizes is None or id(module) in in_head or not getattr(weight, "requires_grad", False):
            continue
        if fresh and ".lora_A." in name:
            continue
        if id(module) in of_tensors:
            raise ProbeError(
                f"{name}: adapts a tensor of experts (lora.target_parameters), so its gradients cannot be told apart "
                "by example. Leave the measurement out (colm.variance_every)."
            )
        linears.append(LinearModule(name, module, *sizes))
    return linears


def _adapters_of_tensors(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the `lora_A` and `lora_B` of tensors that are no modules, which PEFT multiplies without running them."""
    for module in model.modules():
        if adapts_tensor(module):
            for part in (module.lora_A, module.lora_B):
                yield from part.children()  # type: ignore[union-attr]


def is_fresh_adapter(model: nn.Module) -> bool:
    """Return whether the model has a LoRA adapter that is trained, and every `lora_B` of it is zero."""
    weights = [p for name, p in model.named_parameters() if ".lora_B." in name and p.requires_grad]
    return bool(weights) and not any(bool(weight.detach().any()) for weight in weights)


def fitting_side(model: nn.Module, num_examples: int) -> int:
    """Return the largest side from `LEAST_SIDE` to `SIDE` whose table of all examples stays below `TABLE_BYTES`.

    Args:
        model: the model whose trained matrices are sketched.
        num_examples: rows of the table, in float32.
    """
    linears, tokens = trained_linears(model), trained_token_matrices(model)
    for side in range(SIDE, LEAST_SIDE, -1):
        numbers = sum(linear.size(side) for linear in linears) + sum(matrix.size(side) for matrix in tokens)
        if 4 * num_examples * numbers <= TABLE_BYTES:
            return side
    return LEAST_SIDE


class GradientSketch:
    """Sketches of the per-example gradients of a model's trained linear modules, input embeddings and head.

    Gradients are taken by `torch.autograd.grad` at the modules' outputs, so no parameter's `.grad` and no hook of ZeRO
    is touched; the model is in eval mode meanwhile (no dropout, no activation checkpointing).

    Attributes:
        linears: the linear modules, in the order of their numbers.
        tokens: embeddings and head, if they are trained; their numbers come last.
        side: rows and columns of a module's sketch.
        width: entries of an example's sketch.
        left_out: names of trained matrices and tensors that are of neither kind.
        num_of_linears: entries of those of the linear modules, which come first.
        num_exact: entries of the matrices whose full gradients are returned as well.
        device: device of the model.
    """

    def __init__(
        self, model: nn.Module, seed: int, side: int | None = None, *, exact: Sequence[ProbeTarget] = (), name: str = ""
    ) -> None:
        """Draw P and Q of every module.

        Args:
            model: the model that a forward calls, bare or in a `PeftModel`; not partitioned by ZeRO-3.
            seed: seed of P and Q, which depend on it, `name` and the module's index alone.
            side: see the class; None: `SIDE`.
            exact: matrices whose full gradients `with_exact` returns as well.
            name: distinguishes sketches of the same seed.

        Raises:
            ProbeError: if none of these is trained, or the weights are partitioned.
        """
        if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
            raise ProbeError("gradient sketch: ZeRO-3 partitions the weights. Measure at stage 0, 1 or 2.")
        self.linears = trained_linears(model)
        side = SIDE if side is None else side
        self.side = side
        self.tokens = trained_token_matrices(model)
        if not self.linears and not self.tokens:
            raise ProbeError(
                f"{type(model).__name__}: no linear module, no input embeddings and no head have a trained weight, so "
                "there are no gradients to sketch (adapters of a head are not). Train at least one, or leave out "
                "variance_every."
            )
        measured = {id(linear.module.weight) for linear in self.linears}
        measured |= {id(module.weight) for matrix in self.tokens for module in matrix.modules}
        self.left_out = [
            name
            for name, weight in model.named_parameters()
            if weight.requires_grad and weight.dim() > 1 and id(weight) not in measured
        ]
        self.num_of_linears = sum(linear.size(side) for linear in self.linears)
        self.width = self.num_of_linears + sum(matrix.size(side) for matrix in self.tokens)
        self._model = model
        self._norms = norms_by_adapter(model)
        self._head = find_loss_head(model)
        self._exact = tuple(exact)
        self.num_exact = sum(target.num_coordinates for target in self._exact)
        self.device = next(model.parameters()).device
        self._dtype = torch.promote_types(next(p.dtype for p in model.parameters() if p.requires_grad), torch.float32)
        self._maps = [
            (
                self._projection(linear.out_features, seed, name, place, "rows"),
                self._projection(linear.in_features, seed, name, place, "columns"),
            )
            for place, linear in enumerate(self.linears)
        ]
        self._token_maps = [
            (
                self._projection(matrix.num_tokens, seed, name, -1 - place, "rows"),
                self._projection(matrix.hidden, seed, name, -1 - place, "columns"),
            )
            for place, matrix in enumerate(self.tokens)
        ]

    def rows(self, micro: MicroBatch) -> Tensor:
        """Return the sketches of a micro-batch's examples, gradients of each one's mean loss.

        Args:
            micro: the micro-batch, on the model's device. The rows of a classification example are summed.

        Returns:
            `[examples, width]` on the device, float32 (float64 of a model in float64).

        Raises:
            ProbeError: if a module does not see all tokens of the micro-batch, as an expert does not.
        """
        return self.with_exact(micro)[0]

    def with_exact(self, micro: MicroBatch) -> tuple[Tensor, Tensor]:
        """Return `rows`, and the full gradients of the matrices of `exact`, concatenated, `[examples, d]`."""
        num_examples = len(micro.counts)
        sketches = torch.zeros(num_examples, self.width, dtype=self._dtype, device=self.device)
        exact = torch.zeros(num_examples, self.num_exact, dtype=self._dtype, device=self.device)
        owners = None
        if micro.groups is not None:
            owners = to_device(torch.tensor(micro.groups.owners), self.device)
        anchor = torch.zeros((), device=self.device, requires_grad=True)
        with ExitStack() as stack:
            stack.enter_context(eval_mode(self._model))
            stack.enter_context(torch.enable_grad())
            start = 0
            for linear, (left, right) in zip(self.linears, self._maps, strict=True):
                part = sketches[:, start : start + linear.size(self.side)]
                start += part.shape[1]
                reader = _Reader(linear.name, micro, owners, part, left, right)
                stack.enter_context(_tapped(linear.module, reader, anchor, self._norms.get(linear.module)))
            start = 0
            for target in self._exact:
                part = exact[:, start : start + target.num_coordinates]
                start += part.shape[1]
                reader = _Reader(target.name, micro, owners, part, None, None, target)
                stack.enter_context(_tapped(target.module, reader, anchor, target.norm))
            states = HeadStates(micro)
            for matrix, part, (left, right) in self._token_parts(sketches):
                if matrix.embedding is not None:
                    reader = _EmbeddingReader(matrix.name, micro, owners, part, left, right, None, matrix)
                    stack.enter_context(_tapped(matrix.embedding, reader, anchor))
                if matrix.head is not None and self._head is not None:
                    stack.enter_context(states.kept(self._head))
                elif matrix.head is not None:
                    reader = _Reader(matrix.name, micro, owners, part, left, right)
                    stack.enter_context(_tapped(matrix.head, reader, anchor))
            losses = label_losses(self._model, self._head, micro)
            sums = loss_sums(losses, micro)
            # In fp16 the gradient of a mean over many tokens underflows; that of their sum does not.
            summed = any(p.dtype == torch.float16 for p in self._model.parameters())
            counts = micro.counts.clamp_min(1.0)
            total = (sums if summed else sums / counts).sum()
            _, slopes = torch.autograd.grad(total, (anchor, losses), allow_unused=True)
            if states.states is not None:
                owner = micro.rows if owners is None else owners[micro.rows]
                for matrix, part, maps in self._token_parts(sketches):
                    if matrix.head is not None:
                        add_head_gradients(part, matrix.head, states.states, micro.targets, slopes, owner, *maps)
        if summed:
            sketches, exact = sketches / counts[:, None], exact / counts[:, None]
        return sketches, exact

    def parts(self) -> dict[str, slice]:
        """Return the columns of each part of the model: its layers, and embeddings and head where they are trained."""
        columns = {"layers": slice(0, self.num_of_linears)} if self.linears else {}
        start = self.num_of_linears
        for matrix in self.tokens:
            columns[matrix.name] = slice(start, start + matrix.size(self.side))
            start += matrix.size(self.side)
        return columns

    def _token_parts(
        self, sketches: Tensor
    ) -> Iterator[tuple[TokenMatrix, Tensor, tuple[Tensor | None, Tensor | None]]]:
        """Yield the embeddings' and the head's matrices, their part of a table, and their P and Q."""
        columns = self.parts()
        for matrix, maps in zip(self.tokens, self._token_maps, strict=True):
            yield matrix, sketches[:, columns[matrix.name]], maps

    def _projection(self, size: int, seed: int, name: str, place: int, which: str) -> Tensor | None:
        """Return P or Q, `[size, side]` on the device; None for the identity."""
        if size <= self.side:
            return None
        generator = private_generator(seed, "gradient sketch", name, place, which)
        drawn = torch.randn(size, self.side, generator=generator, dtype=torch.float32) / self.side**0.5
        return to_device(drawn, self.device).to(self._dtype)


@dataclass(frozen=True)
class _Reader:
    """Add (delta P)^T (x Q) of every example at one module to a part of a table.

    Attributes:
        name: name of the module, for messages.
        micro: the micro-batch.
        owners: example of every row, int64 `[rows]`; None: rows are examples.
        part: destination, `[examples, numbers]`.
        left: P; None: the identity.
        right: Q; None: the identity.
        target: whose rows of the module's output are read; None: all.
    """

    name: str
    micro: MicroBatch
    owners: Tensor | None
    part: Tensor
    left: Tensor | None
    right: Tensor | None
    target: ProbeTarget | None = None

    def seen(self, inputs: Tensor) -> Tensor:
        """Return x Q, `[rows, length, ...]`."""
        return _through(self._by_row(inputs.detach()), self.right)

    def take(self, delta: Tensor, seen: Tensor) -> None:
        """Add the numbers of one call of the module."""
        delta = delta if self.target is None else self.target.rows_of(delta)
        self._add(_through(self._by_row(delta), self.left), seen)

    def _add(self, left: Tensor, right: Tensor) -> None:
        """Add the sum over tokens of left right^T, both `[rows, length, ...]`."""
        dtype = self.part.dtype
        numbers = (left.to(dtype).transpose(1, 2) @ right.to(dtype)).flatten(1)
        if self.owners is None:
            self.part.add_(numbers)
        else:
            self.part.index_add_(0, self.owners, numbers)

    def _by_row(self, values: Tensor) -> Tensor:
        rows, length = self.micro.input_ids.shape
        if values.shape[:-1].numel() != rows * length:
            raise ProbeError(
                f"{self.name}: sees {tuple(values.shape[:-1])} tokens of a micro-batch of {rows} x {length}, so its "
                "gradients cannot be told apart by example (an expert of a mixture?). Leave the measurement out."
            )
        return values.reshape(rows, length, values.shape[-1])


@dataclass(frozen=True)
class _EmbeddingReader(_Reader):
    """Add (onehot(ids) P)^T (delta Q) of every example at the input embeddings to a part of a table.

    Attributes:
        matrix: the embeddings'.
    """

    matrix: TokenMatrix | None = None

    def seen(self, inputs: Tensor) -> Tensor:
        """Return onehot(ids) P times the embeddings' scale, `[rows, length, ...]`; 0 for padding, not trained."""
        assert self.matrix is not None
        ids = inputs.reshape(self.micro.input_ids.shape)
        dtype = self.part.dtype
        rows = nn.functional.one_hot(ids, self.matrix.num_tokens).to(dtype) if self.left is None else self.left[ids]
        trained = self.matrix.scale * (ids != self.matrix.padding).to(dtype)
        return rows * trained[..., None]

    def take(self, delta: Tensor, seen: Tensor) -> None:
        """Add the numbers of one call of the embeddings."""
        self._add(seen, _through(self._by_row(delta), self.right))


def _through(values: Tensor, projection: Tensor | None) -> Tensor:
    return values if projection is None else values.to(projection.dtype) @ projection


class _Tap(torch.autograd.Function):
    """Identity whose backward pass gives the gradient to a reader; the anchor makes that pass reach every tap."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, anchor: Tensor, reader: _Reader, seen: Tensor) -> Tensor:
        ctx.reader = reader
        ctx.save_for_backward(seen)
        return output.clone()  # not a view: later operations may change it in place

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:
        (delta,) = gradients
        ctx.reader.take(delta, *ctx.saved_tensors)
        return delta, torch.zeros((), device=delta.device), None, None


@contextmanager
def _tapped(module: nn.Module, reader: _Reader, anchor: Tensor, norm: nn.Module | None = None) -> Iterator[None]:
    """Let a reader see the inputs and output gradients of every call of a module; remove the hook afterwards."""

    def hook(called: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        tapped: Tensor = _apply(output, anchor, reader, reader.seen(inputs[0]))
        return tapped

    with hooked(module, hook, norm):
        yield


_apply: Callable[..., Any] = _Tap.apply


def _head_modules(model: nn.Module) -> Iterator[nn.Module]:
    head = find_head(model)
    if isinstance(head, nn.Module):
        yield from head.modules()


def _sizes(module: nn.Module) -> tuple[int, int] | None:
    """Return the input and output features of a linear module; None for other modules."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    weight = getattr(module, "weight", None)
    if type(module).__name__ == "Conv1D" and isinstance(weight, Tensor) and weight.dim() == 2:
        return int(weight.shape[0]), int(weight.shape[1])
    return None

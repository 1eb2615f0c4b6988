"""csrc/prompt_attention_cuda.h through ctypes: the functions of the four schemas, run by the block emulation."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from tests.accuracy import DTYPES

POINTER, LONG, INT, FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_float


class Stream(ctypes.Structure):
    """struct CaptPromptStream."""

    _fields_ = [
        *((name, POINTER) for name in ("table", "index", "weight", "out", "grad", "sorted", "order", "grad_table")),
        *((name, LONG) for name in ("rows", "prompts")),
    ]


class Gathered(ctypes.Structure):
    """struct CaptPromptAttentionCuda."""

    _fields_ = [
        *((name, POINTER) for name in ("query", "log_prior")),
        ("stream", Stream * 2),
        *((name, POINTER) for name in ("workspace", "grad_query", "grad_prior")),
        *((name, LONG) for name in ("batch", "pairs", "dim")),
        ("scale", FLOAT),
        ("dtype", INT),
    ]


class Query(ctypes.Structure):
    """struct CaptSharedQuery."""

    _fields_ = [
        *((name, POINTER) for name in ("query", "out", "lse", "grad", "grad_lse", "grad_query")),
        ("rows", LONG),
        ("per_image", INT),
    ]


class Shared(ctypes.Structure):
    """struct CaptPromptAttentionSharedCuda."""

    _fields_ = [
        ("query", Query * 2),
        *((name, POINTER) for name in ("keys", "values", "grad_keys", "grad_values", "workspace")),
        *((name, LONG) for name in ("batch", "length", "heads", "head_dim")),
        *((f"{name}_stride", LONG) for name in ("key_batch", "key_token", "value_batch", "value_token")),
        ("scale", FLOAT),
        ("dtype", INT),
    ]


class Emulation:
    """The four functions over a library made by ``tests.native_build.emulated_library``.

    Tensors given to a launch are kept alive until it returns; outputs stand between guards that are checked after it.
    """

    GUARD = 32

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library
        self.alive: list[Tensor] = []
        self.guarded: list[Tensor] = []

    def _read(self, tensor: Tensor | None) -> int | None:
        """Address of a contiguous copy; None for null."""
        if tensor is None:
            return None
        self.alive.append(tensor.contiguous())
        return self.alive[-1].data_ptr()

    def _new(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """An output full of NaN between two guards."""
        count = torch.Size(shape).numel()
        buffer = torch.full((count + 2 * self.GUARD,), float("nan"), dtype=dtype)
        self.guarded.append(buffer)
        return buffer[self.GUARD : self.GUARD + count].view(shape)

    def _call(self, function: Any, args: ctypes.Structure) -> None:
        assert function(ctypes.byref(args), None) == 0
        for buffer in self.guarded:
            assert buffer[: self.GUARD].isnan().all() and buffer[-self.GUARD :].isnan().all()
        self.alive, self.guarded = [], []

    def _workspace(self, size: Any, args: ctypes.Structure) -> None:
        size.restype = LONG
        space = self._new((size(ctypes.byref(args)),), torch.float32)
        self.alive.append(space)
        args.workspace = space.data_ptr()

    def gathered(
        self,
        query: Tensor,
        com: Tensor,
        diff: Tensor,
        com_index: Tensor,
        diff_index: Tensor,
        log_prior: Any,
        scale: float,
    ) -> tuple[Tensor, ...]:
        """capt::prompt_attention."""
        args = self._gathered_args(query, (com, diff), (com_index, diff_index), log_prior, scale)
        outs, weights = [], []
        for stream, table in zip(args.stream, (com, diff), strict=True):
            outs.append(self._new(tuple(query.shape), query.dtype))
            weights.append(self._new((args.batch, args.pairs, table.shape[1]), torch.float32))
            stream.out, stream.weight = outs[-1].data_ptr(), weights[-1].data_ptr()
        self._call(self.library.capt_prompt_attention_cuda, args)
        return (*outs, *weights)

    def gathered_backward(
        self, grad_com: Tensor, grad_diff: Tensor, query: Tensor, com: Tensor, diff: Tensor, com_index: Tensor,
        diff_index: Tensor, log_prior: Any, scale: float, weight_com: Tensor, weight_diff: Tensor, need_query: bool,
        need_tables: bool, need_prior: bool,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        """capt::prompt_attention_backward."""
        args = self._gathered_args(query, (com, diff), (com_index, diff_index), log_prior, scale)
        empty = query.new_empty(0)
        tables = [self._new(tuple(table.shape), table.dtype) if need_tables else empty for table in (com, diff)]
        for stream, grad, weight, index, table in zip(
            args.stream, (grad_com, grad_diff), (weight_com, weight_diff), (com_index, diff_index), tables, strict=True
        ):
            stream.grad, stream.weight = self._read(grad), self._read(weight)
            if need_tables:
                ascending, order = index.reshape(-1).sort(stable=True)
                stream.sorted, stream.order = self._read(ascending), self._read(order)
                stream.grad_table = table.data_ptr()
        grad_query = self._new(tuple(query.shape), query.dtype) if need_query else empty
        grad_prior = self._new((args.batch, args.pairs), torch.float32) if need_prior else empty
        args.grad_query = grad_query.data_ptr() if need_query else None
        args.grad_prior = grad_prior.data_ptr() if need_prior else None
        self._workspace(self.library.capt_prompt_attention_cuda_workspace, args)
        self._call(self.library.capt_prompt_attention_backward_cuda, args)
        return grad_query, *tables, grad_prior

    def _gathered_args(self, query: Tensor, tables: Any, indices: Any, log_prior: Any, scale: float) -> Gathered:
        args = Gathered(query=self._read(query), log_prior=self._read(log_prior), scale=scale)
        for stream, table, index in zip(args.stream, tables, indices, strict=True):
            stream.table, stream.index = self._read(table), self._read(index)
            stream.rows, stream.prompts = table.shape[:2]
        args.batch, args.dim = query.shape
        args.pairs, args.dtype = indices[0].shape[1], DTYPES.index(query.dtype)
        return args

    def shared(
        self, com_query: Tensor, diff_query: Tensor, keys: Tensor, values: Tensor, n_heads: int, scale: float
    ) -> tuple[Tensor, ...]:
        """capt::prompt_attention_shared."""
        args = self._shared_args((com_query, diff_query), keys, values, n_heads, scale)
        outs, lses = [], []
        for query in args.query:
            outs.append(self._new((args.batch, query.rows, keys.shape[2]), keys.dtype))
            lses.append(self._new((args.batch, n_heads, query.rows), torch.float32))
            query.out, query.lse = outs[-1].data_ptr(), lses[-1].data_ptr()
        self._call(self.library.capt_prompt_attention_shared_cuda, args)
        return (*outs, *lses)

    def shared_backward(self, *given: Any) -> tuple[Tensor, ...]:
        """capt::prompt_attention_shared_backward."""
        grads, grad_lses, queries, (keys, values) = given[:2], given[2:4], given[4:6], given[6:8]
        outs, lses, (n_heads, scale, need_query, need_keys, need_values) = given[8:10], given[10:12], given[12:]
        args = self._shared_args(queries, keys, values, n_heads, scale)
        empty = keys.new_empty(0)
        found = [self._new(tuple(query.shape), query.dtype) if need_query else empty for query in queries]
        for query, grad, grad_lse, out, lse, target in zip(
            args.query, grads, grad_lses, outs, lses, found, strict=True
        ):
            query.grad, query.grad_lse = self._read(grad), self._read(grad_lse)
            query.out, query.lse = self._read(out), self._read(lse)
            query.grad_query = target.data_ptr() if need_query else None
        for name, tensor, need in (("grad_keys", keys, need_keys), ("grad_values", values, need_values)):
            found.append(self._new(tuple(tensor.shape), tensor.dtype) if need else empty)
            setattr(args, name, found[-1].data_ptr() if need else None)
        self._workspace(self.library.capt_prompt_attention_shared_cuda_workspace, args)
        self._call(self.library.capt_prompt_attention_shared_backward_cuda, args)
        return tuple(found)

    def _shared_args(self, queries: Any, keys: Tensor, values: Tensor, n_heads: int, scale: float) -> Shared:
        args = Shared(scale=scale, heads=n_heads, head_dim=keys.shape[2] // n_heads, dtype=DTYPES.index(keys.dtype))
        for target, query in zip(args.query, queries, strict=True):
            target.query, target.rows, target.per_image = self._read(query), query.shape[-2], int(query.dim() == 3)
        args.batch, args.length = keys.shape[:2]
        for name, tensor in (("key", keys), ("value", values)):
            tensor = tensor.contiguous() if tensor.shape[2] > 1 and tensor.stride(2) != 1 else tensor
            self.alive.append(tensor)
            setattr(args, name + "s", tensor.data_ptr())
            setattr(args, f"{name}_batch_stride", tensor.stride(0))
            setattr(args, f"{name}_token_stride", tensor.stride(1))
        return args

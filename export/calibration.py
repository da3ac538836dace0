"""Calibration: what the target's matrices are multiplied with on a text, as second moments of their inputs.

The text goes through the checkpoint's own layers once, in float32, as far as the export has come: matrices are asked
for in the order in which they are stored, and only one layer's moments are in memory.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from export.checkpoint import Checkpoint, Float32
from export.errors import ExportError
from export.layerwise import LayerwiseTarget, windows_of
from export.text_files import TOKENIZER
from runtime.model_config import ModelConfig
from runtime.tokenizer import Tokenizer

PARTS = {  # of a layer: the matrix's name, and the module of transformers' layer whose input it is multiplied with
    "self_attn.qkv_proj": "self_attn.q_proj",
    "self_attn.q_proj": "self_attn.q_proj",
    "self_attn.o_proj": "self_attn.o_proj",
    "mlp.gate_up_proj": "mlp.gate_proj",
    "mlp.down_proj": "mlp.down_proj",
    "per_layer_input_gate": "per_layer_input_gate",
    "per_layer_projection": "per_layer_projection",
}
NUM_WINDOWS, WINDOW_TOKENS = 32, 512
LEAST_TOKENS = 256
MODEL_PROJECTION = "per_layer_model_projection."


class Calibration:
    """Second moments on windows of token ids [num_windows, num_tokens]."""

    def __init__(self, target: LayerwiseTarget, token_ids: Tensor) -> None:
        self._target = target
        self._stream = target.start(token_ids)
        self._num_layers_run = 0
        self._moments: dict[str, Tensor] = {}

    def has(self, tensor: str) -> bool:
        """Whether a matrix's inputs are collected: those of the layers and of the PLE projection."""
        return tensor.startswith(MODEL_PROJECTION) or _place(tensor)[1] in PARTS

    def moment(self, tensor: str) -> Tensor:
        """E[x x^T], float32 [width, width], of a matrix's inputs. The caller may overwrite it, and asks for it once."""
        moment = self._moment(tensor)
        self._moments.pop(PARTS.get(_place(tensor)[1], ""), None)  # kept, the widest would take 604 MB more
        return moment

    def mean_squares(self, tensor: str) -> Float32:
        """E[x^2], [width]; asked for before `moment`, which is given away."""
        squares: Float32 = self._moment(tensor).diagonal().numpy().astype(np.float32)
        return squares

    def _moment(self, tensor: str) -> Tensor:
        if tensor.startswith(MODEL_PROJECTION):
            return _second_moment(self._stream.embeds) / self._stream.num_tokens
        index, part = _place(tensor)
        assert index >= self._num_layers_run - 1, f"{tensor} is asked for behind layer {self._num_layers_run - 1}"
        while self._num_layers_run <= index:
            self._run_layer(self._num_layers_run)
        return self._moments[PARTS[part]]

    def _run_layer(self, index: int) -> None:
        self._moments.clear()
        layer = self._target.layer(index)
        modules = dict(layer.named_modules())
        hooks = [modules[name].register_forward_pre_hook(self._collect(name)) for name in set(PARTS.values())]
        self._stream = self._target.run(layer, index, self._stream)
        for hook in hooks:
            hook.remove()
        for moment in self._moments.values():
            moment /= self._stream.num_tokens
        self._num_layers_run += 1

    def _collect(self, name: str) -> Callable[[nn.Module, Any], None]:
        def add(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            moment = _second_moment(inputs[0])
            self._moments[name] = self._moments[name].add_(moment) if name in self._moments else moment

        return add


def calibration_of(checkpoint: Checkpoint, prefix: str, model: ModelConfig, text: Path) -> Calibration:
    """Calibration of a checkpoint on the text in a file.

    Raises:
        ExportError: the text cannot be read or is too short.
    """
    token_ids = token_windows(checkpoint, model, text, NUM_WINDOWS * WINDOW_TOKENS)
    return Calibration(LayerwiseTarget(checkpoint, prefix, model), token_ids)


def token_windows(checkpoint: Checkpoint, model: ModelConfig, text: Path, most_tokens: int) -> Tensor:
    """Windows [num_windows, num_tokens] of a text's tokens, spread over all of it, each with BOS first.

    Raises:
        ExportError: the text cannot be read or is too short.
    """
    content = read_text(text)
    tokenizer = Tokenizer.load(checkpoint.folder / TOKENIZER, bos_token_id=model.bos_token_id)
    token_ids = tokenizer.encode(content, add_bos=False)
    if len(token_ids) < LEAST_TOKENS:
        raise ExportError(f"{text}: {len(token_ids):,} tokens, at least {LEAST_TOKENS:,} needed; pass a longer text")
    size = min(WINDOW_TOKENS, model.context_tokens, len(token_ids) + 1)
    windows = list(windows_of(token_ids, model.bos_token_id, size))
    count = max(1, min(len(windows), most_tokens // size))
    return torch.tensor([windows[index * len(windows) // count] for index in range(count)])


def read_text(file: Path) -> str:
    """The text in a file; ExportError where it cannot be read."""
    try:
        if not file.is_file():
            raise ExportError(f"{file}: no such text file; pass a UTF-8 text such as the model is to write")
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ExportError(f"{file}: not UTF-8 at byte {error.start:,}; save the text as UTF-8") from error
    except OSError as error:
        raise ExportError(f"{file}: cannot be read: {error.strerror}") from error


def _second_moment(x: Tensor) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    return rows.T @ rows


def _place(tensor: str) -> tuple[int, str]:
    """Layer and part of a matrix's name; (-1, name) for others."""
    pieces = tensor.split(".", 2)
    if len(pieces) == 3 and pieces[0] == "layers" and pieces[1].isdecimal():
        return int(pieces[1]), pieces[2]
    return -1, tensor

"""Read the weights of a CTranslate2 `model.bin` and give them their Transformers names.

The file is little-endian: a header (`u32` format version, the model's spec, its `u32` revision), then the variables,
then aliases (two names each, for tied weights), which a Transformers model ties by itself. A string is a `u16` length
that counts its closing NUL, then the bytes.
"""

import struct
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch


FORMAT_VERSION = 6
# CTranslate2's `DataType`, in its own order.
DTYPES = [np.float32, np.int8, np.int16, np.int32, np.float16]

LAYER_NORMS = {"gamma": "weight", "beta": "bias"}
# CTranslate2 stacks the projections that read the same input.
PROJECTIONS = {
    "self_attention": {"linear_0": ["q_proj", "k_proj", "v_proj"], "linear_1": ["out_proj"]},
    "attention": {"linear_0": ["q_proj"], "linear_1": ["k_proj", "v_proj"], "linear_2": ["out_proj"]},
    "ffn": {"linear_0": ["fc1"], "linear_1": ["fc2"]},
}
BLOCKS = {"self_attention": "self_attn", "attention": "encoder_attn"}
BLOCK_NORMS = {
    "self_attention": "self_attn_layer_norm",
    "attention": "encoder_attn_layer_norm",
    "ffn": "final_layer_norm",
}


def read_variables(path: Path) -> dict[str, np.ndarray]:
    """Read every variable of a CTranslate2 `model.bin`, in the dtype it is stored in.

    Raises:
        ValueError: The file is of another format version, stores an unknown dtype, or ends too early.
    """
    with path.open("rb") as file:
        version = _read(file, "I")
        if version != FORMAT_VERSION:
            raise ValueError(f"{path} is CTranslate2 format version {version}, expected {FORMAT_VERSION}")
        _read_string(file)  # the spec, "WhisperSpec"
        _read(file, "I")  # its revision
        variables = {}
        for _ in range(_read(file, "I")):
            name = _read_string(file)
            shape = [_read(file, "I") for _ in range(_read(file, "B"))]
            dtype_id = _read(file, "B")
            if dtype_id >= len(DTYPES):
                raise ValueError(f"{path}: {name} has dtype number {dtype_id}, expected 0 to {len(DTYPES) - 1}")
            data = _read_bytes(file, _read(file, "I"))
            variables[name] = np.frombuffer(data, dtype=DTYPES[dtype_id]).reshape(shape)
    return variables


def whisper_state_dict(variables: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """Turn a CTranslate2 Whisper's variables into a float32 state dict of `WhisperForConditionalGeneration`.

    The tied output head is left out, and so are CTranslate2's own settings, which are scalars or integers.
    """
    state_dict = {}
    for name, array in variables.items():
        if array.ndim == 0 or not np.issubdtype(array.dtype, np.floating):
            continue
        names = _transformers_names(name)
        tensors = torch.from_numpy(array.astype(np.float32)).chunk(len(names))
        state_dict.update(zip(names, (tensor.clone() for tensor in tensors), strict=True))
    # Whisper's keys have no bias: CTranslate2 stores zeros in its place.
    return {name: tensor for name, tensor in state_dict.items() if not name.endswith("k_proj.bias")}


def _transformers_names(name: str) -> list[str]:
    """The Transformers names of a CTranslate2 Whisper variable: several where it is a stack of projections."""
    side, *path, leaf = name.split("/")
    leaf = LAYER_NORMS.get(leaf, leaf)
    match path:
        case ["embeddings"]:
            return [f"model.{side}.embed_tokens.weight"]
        case ["position_encodings"]:
            return [f"model.{side}.embed_positions.weight"]
        case ["conv1" | "conv2" | "layer_norm" as module]:
            return [f"model.{side}.{module}.{leaf}"]
    layer, block, module = path
    prefix = f"model.{side}.layers.{layer.removeprefix('layer_')}"
    if module == "layer_norm":
        return [f"{prefix}.{BLOCK_NORMS[block]}.{leaf}"]
    if block in BLOCKS:
        prefix = f"{prefix}.{BLOCKS[block]}"
    return [f"{prefix}.{projection}.{leaf}" for projection in PROJECTIONS[block][module]]


def _read(file: BinaryIO, code: str) -> int:
    """One little-endian unsigned integer: `"B"`, `"H"` or `"I"` for 8, 16 or 32 bits."""
    return struct.unpack(f"<{code}", _read_bytes(file, struct.calcsize(code)))[0]


def _read_bytes(file: BinaryIO, count: int) -> bytes:
    data = file.read(count)
    if len(data) != count:
        raise ValueError(f"{file.name} ends {count - len(data)} bytes too early: it is not a whole model.bin")
    return data


def _read_string(file: BinaryIO) -> str:
    return _read_bytes(file, _read(file, "H")).rstrip(b"\0").decode()

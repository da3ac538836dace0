"""A checkpoint's tokenizer and chat template, which an artifact takes over: checked first, then copied.

The tokenizer is written in the form that loads fastest; that it is the same one is proved, else it is copied as it is.

Source: tokenizers' `models/mod.rs` and `models/bpe/serialization.rs`: a model is read into memory three times over, so
that each value costs; a merge may be a string of two tokens, as older files have it, or a pair of strings.
"""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import tokenizers

from export.checkpoint import Checkpoint
from export.errors import CheckpointError
from runtime.chat import ChatTemplate
from runtime.errors import ArtifactError
from runtime.memory import release_free_memory
from runtime.model_config import ModelConfig
from runtime.tokenizer import Tokenizer

TOKENIZER = "tokenizer.json"
TEMPLATE = "chat_template.jinja"
GENERATION_CONFIG = "generation_config.json"


def check_text_files(checkpoint: Checkpoint, model: ModelConfig) -> None:
    """Raises CheckpointError where the runtime could not use the tokenizer or the chat template."""
    file = checkpoint.folder / TOKENIZER
    if not file.is_file():
        raise CheckpointError(f"{file}: missing; save the tokenizer beside the weights")
    try:
        Tokenizer.load(file, bos_token_id=model.bos_token_id).check_vocabulary(model.vocab_size)
    except ArtifactError as error:
        reason = str(error).removeprefix(f"{file}: ").removesuffix("; re-export the model")
        raise CheckpointError(f"{checkpoint.folder}: {reason}; download the checkpoint again") from error
    try:
        if template := chat_template(checkpoint):
            ChatTemplate(template, {})
    except ArtifactError as error:
        reason = str(error).removesuffix("; re-export the model")
        raise CheckpointError(f"{checkpoint.folder}: {reason}; mend the template or remove it") from error


def check_same_tokenizer(target: Checkpoint, drafter: Checkpoint) -> None:
    """A drafter that ships a tokenizer must ship the target's; CheckpointError names the part that differs."""
    if not (drafter.folder / TOKENIZER).exists():
        return
    mine, theirs = target.read_json(TOKENIZER), drafter.read_json(TOKENIZER)
    for part in ("model", "added_tokens"):
        if mine.get(part) != theirs.get(part):
            raise CheckpointError(
                f"{drafter.folder / TOKENIZER}: {part} differs from that of {target.folder / TOKENIZER}; "
                "pass the assistant that belongs to this model"
            )


def copy_text_files(checkpoint: Checkpoint, folder: Path) -> None:
    """Writes tokenizer, generation configuration and chat template, the latter two where there are any."""
    if (content := compact_tokenizer(checkpoint.folder / TOKENIZER)) is not None:
        (folder / TOKENIZER).write_bytes(content)
    else:
        shutil.copyfile(checkpoint.folder / TOKENIZER, folder / TOKENIZER)
    if (checkpoint.folder / GENERATION_CONFIG).exists():
        shutil.copyfile(checkpoint.folder / GENERATION_CONFIG, folder / GENERATION_CONFIG)
    if template := chat_template(checkpoint):
        (folder / TEMPLATE).write_text(template, encoding="utf-8")


def compact_tokenizer(file: Path) -> bytes | None:
    """A tokenizer.json as it loads fastest; None where that would not be the same tokenizer, by the library itself."""
    content = _rewritten(file)
    if content is None or _canonical_digest(content) != _canonical_digest(file.read_bytes()):
        return None
    return content


def _rewritten(file: Path) -> bytes | None:
    content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    model = content["model"]
    vocabulary, merges = model.get("vocab"), model.get("merges")
    # of ids with gaps the library warns on standard output, and of two tokens with one id it writes either
    if not isinstance(vocabulary, dict) or sorted(vocabulary.values()) != list(range(len(vocabulary))):
        return None
    if merges and all(isinstance(merge, list) and " " not in "".join(merge) for merge in merges):
        model["merges"] = list(map(" ".join, merges))
    try:
        return json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    except UnicodeEncodeError:  # a lone surrogate in a part that the library skips
        return None


def _canonical_digest(content: bytes) -> bytes:
    """SHA-256 of what the library writes for the tokenizer; no form is held beside another one."""
    canonical = tokenizers.Tokenizer.from_buffer(content).to_str()
    release_free_memory()
    return hashlib.sha256(canonical.encode("utf-8")).digest()


def chat_template(checkpoint: Checkpoint) -> str | None:
    """The checkpoint's own template: a file of its own, or inside tokenizer_config.json as older ones have it."""
    if (checkpoint.folder / TEMPLATE).exists():
        return checkpoint.read_text(TEMPLATE)
    template = checkpoint.optional_json("tokenizer_config.json").get("chat_template")
    return template if isinstance(template, str) else None

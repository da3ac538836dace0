"""A checkpoint's tokenizer and chat template, which an artifact takes over: checked first, then copied as they are."""

import shutil
from pathlib import Path

from export.checkpoint import Checkpoint
from export.errors import CheckpointError
from runtime.chat import ChatTemplate
from runtime.errors import ArtifactError
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
    for name in (TOKENIZER, GENERATION_CONFIG):
        if (checkpoint.folder / name).exists():
            shutil.copyfile(checkpoint.folder / name, folder / name)
    if template := chat_template(checkpoint):
        (folder / TEMPLATE).write_text(template, encoding="utf-8")


def chat_template(checkpoint: Checkpoint) -> str | None:
    """The checkpoint's own template: a file of its own, or inside tokenizer_config.json as older ones have it."""
    if (checkpoint.folder / TEMPLATE).exists():
        return checkpoint.read_text(TEMPLATE)
    template = checkpoint.optional_json("tokenizer_config.json").get("chat_template")
    return template if isinstance(template, str) else None

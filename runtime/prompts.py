"""Messages to token ids: the template's text, in which only the template itself and the model write special tokens."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from runtime.chat import ChatTemplate
from runtime.errors import RequestError
from runtime.messages import guarded, plain_messages
from runtime.response import ResponseFormat
from runtime.tokenizer import Tokenizer
from runtime.tools import Tool

MODEL_ROLES = ("assistant", "model")


@dataclass(frozen=True, slots=True)
class Prompts:
    """Renders messages with a checkpoint's template for its tokenizer."""

    template: ChatTemplate | None
    tokenizer: Tokenizer
    response_format: ResponseFormat

    def chat_ids(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Tool] = (),
        *,
        thinking: bool = False,
        is_literal: bool = False,
        add_generation_prompt: bool = True,
    ) -> list[int]:
        """Token ids of messages up to where the model's turn begins.

        Special tokens in what others than the model wrote are text, and with `is_literal` also in what the model did.

        Raises:
            RequestError: there is no template, or it refuses the messages.
        """
        if self.template is None:
            raise RequestError("the artifact has no chat template; use generate() with a prompt of your own")
        literal = self.tokenizer.literal
        plain = [
            message if message["role"] in MODEL_ROLES and not is_literal else guarded(message, literal)
            for message in plain_messages(messages)
        ]
        schemas = [guarded(tool.schema, literal) for tool in tools]
        text = self.template.render_plain(
            plain, tools=schemas or None, thinking=thinking, add_generation_prompt=add_generation_prompt
        )
        return self.tokenizer.encode(text, add_bos=True)

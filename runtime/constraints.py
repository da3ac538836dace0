"""Makes what a generation may be held to: a grammar for the artifact's vocabulary, and a budget of thoughts."""

from dataclasses import dataclass, field
from pathlib import Path

from runtime.constraint import Constraint, ThinkingConstraint
from runtime.errors import MemoryBudgetError, RequestError
from runtime.grammar_compiler import GrammarCompiler
from runtime.model_config import ModelConfig
from runtime.options import GenerationOptions
from runtime.prefix import ParkedRows
from runtime.response import ResponseFormat

COMPILER_BYTES = 940  # of a token of the vocabulary, while it is made (measured 924 for 262,144; 757 stay)


@dataclass(slots=True)
class Constraints:
    """Of one artifact; the grammar compiler is made with the first grammar."""

    tokenizer_file: Path
    model: ModelConfig
    response_format: ResponseFormat
    parked: ParkedRows
    _compiler: GrammarCompiler | None = field(default=None, init=False)

    def of(self, options: GenerationOptions, *, thinking: bool) -> Constraint | None:
        """What the options ask for, at its start; None where they ask for nothing.

        Args:
            thinking: whether thoughts may stand in front of what a grammar describes

        Raises:
            RequestError: a grammar does not compile, or the vocabulary has no thoughts.
        """
        inner = self._grammar(options) if options.grammar is not None else None
        form = self.response_format
        if options.thinking_budget is None and (inner is None or not thinking):
            return inner
        if form.thought_start is None or form.thought_end is None:
            raise RequestError("thinking_budget: the model's vocabulary has no tokens for thoughts; leave it out")
        return ThinkingConstraint(
            form.thought_start,
            form.thought_end,
            options.thinking_budget,
            inner,
            vocab_size=self.model.vocab_size,
            eos_ids=self.model.eos_token_ids,
        )

    def _grammar(self, options: GenerationOptions) -> Constraint:
        assert options.grammar is not None
        if self._compiler is None:
            needed = COMPILER_BYTES * self.model.vocab_size
            if not self.parked.reserve(needed):
                raise MemoryBudgetError(
                    f"structured output needs {needed / 2**20:,.0f} MiB beside the plan, the memory budget leaves "
                    f"{self.parked.spare_bytes / 2**20:,.0f} MiB; load with a larger budget or a shorter context"
                )
            text = self.tokenizer_file.read_text(encoding="utf-8")
            self._compiler = GrammarCompiler(text, self.model.vocab_size, self.model.eos_token_ids)
        return self._compiler.compile(options.grammar)

"""Reading a `config.json`: every key is used, known not to matter, or a problem."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

# What a decoder computes does not depend on these: names and versions, training, other heads than
# the language model's, and how text is generated (the caller of `jkv.generate` says that).
IRRELEVANT = frozenset(
    # One word per line would be a screen and a half.
    """
    _name_or_path transformers_version _commit_hash tokenizer_class task_specific_params
    finetuning_task torchscript tf_legacy_loss use_bfloat16 use_cache return_dict
    return_dict_in_generate output_attentions output_hidden_states output_scores output_past
    attn_implementation _attn_implementation _attn_implementation_autoset cache_implementation
    chunk_size_feed_forward id2label label2id num_labels _num_labels problem_type is_decoder
    initializer_range attention_dropout pretraining_tp bos_token_id pad_token_id sep_token_id
    decoder_start_token_id prefix max_length min_length max_new_tokens do_sample early_stopping
    num_beams num_beam_groups diversity_penalty temperature top_k top_p typical_p
    repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size
    num_return_sequences remove_invalid_values tie_last_hidden_states max_sequence_length
    is_llama_config unsloth_fixed unsloth_version transformers.js_config
    """.split()  # noqa: SIM905
)

# These would matter: only the values that change nothing are accepted.
EXPECTED: dict[str, tuple[Any, ...]] = {
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "cross_attention_hidden_size": (None,),
    "tie_encoder_decoder": (False,),
    "pruned_heads": (None, {}),
    "quantization_config": (None,),
    "compression_config": (None,),
    "auto_map": (None, {}),  # code of the checkpoint's own, never run
    "per_layer_config": (None, {}),
    "rope_interleaved": (None, False),
    "use_mrope": (None, False),
    "bad_words_ids": (None,),
    "forced_bos_token_id": (None,),
    "forced_eos_token_id": (None,),
    "suppress_tokens": (None,),
    "begin_suppress_tokens": (None,),
    "exponential_decay_length_penalty": (None,),
}

_ABSENT: Any = object()


class Settings:
    """The keys of one JSON object, ticked off as they are read.

    A value that cannot be used is added to `problems`, and reading goes on with a stand-in, so
    that one look at a checkpoint finds everything that is wrong with it. `broken` says that a
    stand-in was given: what was read must not be used.
    """

    def __init__(self, values: Mapping[str, Any], problems: list[str], where: str = "config.json"):
        self.values, self.problems, self.where = values, problems, where
        self.broken = False
        self._seen: set[str] = set()

    def problem(self, text: str) -> None:
        """Something that makes the values unusable."""
        self.problems.append(f"{self.where}: {text}")
        self.broken = True

    def raw(self, key: str, default: Any = None) -> Any:
        """The value as it stands; `default` where the key is absent."""
        self._seen.add(key)
        return self.values.get(key, default)

    def integer(
        self, key: str, default: Any = _ABSENT, *, null: Any = _ABSENT, most: int = 2**31 - 1
    ) -> Any:
        """An integer from 1 to `most`; `null` stands for a JSON null where one is allowed."""
        return self._read(
            key,
            default,
            null,
            f"an integer from 1 to {most}",
            lambda v: isinstance(v, int) and not isinstance(v, bool) and 1 <= v <= most,
            1,
        )

    def number(self, key: str, default: Any = _ABSENT, *, null: Any = _ABSENT) -> Any:
        """A finite number above 0, as a float."""

        def fits(value: Any) -> bool:
            if isinstance(value, bool) or not isinstance(value, int | float):
                return False
            return abs(value) < 1e300 and math.isfinite(value) and value > 0

        value = self._read(key, default, null, "a finite number above 0", fits, 1.0)
        return float(value) if isinstance(value, int) else value

    def flag(self, key: str, default: Any = _ABSENT) -> bool:
        """True or false."""
        return self._read(
            key, default, _ABSENT, "true or false", lambda v: isinstance(v, bool), False
        )

    def choice(self, key: str, options: Mapping[str, str], default: Any = _ABSENT) -> str:
        """What a word stands for."""
        wanted = "one of " + ", ".join(options)
        value = self._read(
            key,
            default,
            _ABSENT,
            wanted,
            lambda v: isinstance(v, str) and v in options,
            next(iter(options)),
        )
        return options[value]

    def words(self, key: str, options: Iterable[str], count: int) -> list[str] | None:
        """A list of `count` words, or None where there is none."""
        options = tuple(options)
        return self._read(
            key,
            None,
            None,
            f"a list of {count} of {', '.join(options)}",
            lambda v: isinstance(v, list) and len(v) == count and all(w in options for w in v),
            None,
        )

    def group(self, key: str) -> Settings | None:
        """An object within, with the same list of problems; None where there is none."""
        value = self.raw(key)
        if value is None:
            return None
        if not isinstance(value, dict):
            self.problem(f"{key} is {show(value)}; expected an object or null")
            return None
        return Settings(value, self.problems, f"{self.where}: {key}")

    def expect(self, key: str, *allowed: Any) -> None:
        """Refuse any value of a key but these; absence is fine."""
        value = self.raw(key, allowed[0])
        # `in` would take 0 for False and 1 for True.
        if not any(type(value) is type(a) and value == a for a in allowed):
            wanted = " or ".join(show(a) for a in allowed)
            self.problems.append(
                f"{self.where}: {key} is {show(value)}, which is not implemented; expected {wanted}"
            )

    def ignore(self, *keys: str) -> None:
        """Keys that do not matter here."""
        self._seen.update(keys)

    def finish(self) -> None:
        """Report every key that nothing has read."""
        for key in sorted(set(self.values) - self._seen):
            self.problems.append(
                f"{self.where}: unknown key {key} = {show(self.values[key])}; it may change what "
                "the model computes"
            )

    def _read(
        self,
        key: str,
        default: Any,
        null: Any,
        wanted: str,
        fits: Callable[[Any], bool],
        stand_in: Any,
    ) -> Any:
        value = self.raw(key, _ABSENT)
        if value is _ABSENT:
            if default is not _ABSENT:
                return default
            self.problem(f"{key} is missing; expected {wanted}")
            return stand_in
        if value is None and null is not _ABSENT:
            return null
        if not fits(value):
            self.problem(f"{key} is {show(value)}; expected {wanted}")
            return stand_in
        return value


def show(value: Any) -> str:
    """A value in an error message: one line, not too long."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."

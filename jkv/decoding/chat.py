"""A conversation: turns through the checkpoint's template, with the cache of what they share."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

import jax
import numpy as np

from jkv._checks import check_integer, check_one_of, check_text
from jkv._text import brief, plural
from jkv._transfer import transfers
from jkv.cache.base import Cache
from jkv.cache.dense import dense
from jkv.decoding import capacity, conversation, loop, prefix_store, sampling
from jkv.decoding.apply import check_updates
from jkv.decoding.arguments import CacheLike, ChatTokenizerLike, DecoderLike, Sampler, Stop
from jkv.decoding.conversation import Message
from jkv.decoding.detokenize import Pieces
from jkv.decoding.options import Options, resolve_kind
from jkv.decoding.prompts import PAD, split_model
from jkv.decoding.result import Result
from jkv.decoding.stopping import first_stop, parse_stops
from jkv.decoding.stream import Stream, stream
from jkv.decoding.turns import Tool, Turn, begins_turn, check_values, new_messages, text_message
from jkv.errors import CacheFullError, JkvError, UnsupportedError
from jkv.models.lm import LM
from jkv.models.weights import is_current, weights_of

if TYPE_CHECKING:
    from jkv.store import Store


@dataclasses.dataclass(frozen=True)
class _Past:
    """All that a turn changes, as one value: a turn that fails leaves the value before it."""

    messages: tuple[Message, ...]
    result: Result | None = None
    turns: int = 0
    reused: int = 0
    prefilled: int = 0
    seconds: float = 0.0  # that the cache took to make


class Chat:
    """A conversation with a model, in which each turn prefills only what is new.

    The whole conversation is tokenised at each turn and compared with the tokens that the cache
    holds; it is cropped to what both have in common, wherever the template or the tokenizer has
    moved a boundary. A turn that fails or is interrupted leaves the conversation as it was.

    A reply is kept as the text that the model wrote, calls of tools included; what they returned is
    sent as messages.

    Example:
        >>> chat = jkv.Chat(lm, system="A play.", max_new_tokens=8)
        >>> reply = chat.send("Who goes there?")
        >>> reply == "".join(chat.stream("Speak!"))
        False
        >>> [message["role"] for message in chat.messages]
        ['system', 'user', 'assistant', 'user', 'assistant']

        Of a model whose template has tools, here a function with annotations and a docstring, and
        a value that the template takes::

            chat = jkv.Chat(lm, tools=[weather], enable_thinking=False)
            chat.send("How warm is it in Paris?")  # '<tool_call>{"name": "weather", ...'
            chat.send({"role": "tool", "name": "weather", "content": "22"})

        With a store, another process goes on with the conversation:

        >>> store = jkv.store.Store([jkv.store.Disk("chats", 1 << 30)])
        >>> chat = jkv.Chat(lm, max_new_tokens=8, store=store, sequence_id="me")
        >>> reply = chat.send("Who goes there?")
        >>> store.close()
        >>> with jkv.store.Store([jkv.store.Disk("chats", 1 << 30)]) as store:  # there
        ...     len(jkv.Chat(lm, store=store, sequence_id="me").messages)
        2

        A copy taken before a turn is a branch to go back to; caches never change. Give branches no
        sequence_id, or the last turn of any of them is what the store keeps:

        >>> import copy
        >>> chat = jkv.Chat(lm, max_new_tokens=8)
        >>> before = copy.copy(chat)
        >>> reply = chat.send("Who goes there?")
        >>> len(before.messages), before.send("Who goes there?") == reply
        (0, True)
    """

    @transfers
    def __init__(
        self,
        lm: LM,
        *,
        system: str | None = None,
        max_new_tokens: int = 256,
        cache: CacheLike | None = None,
        sampler: Sampler | None = None,
        key: jax.Array | None = None,
        stop: Stop | None = None,
        context: int | None = None,
        on_full: Literal["raise", "drop"] = "raise",
        store: Store | None = None,
        sequence_id: str | None = None,
        tenant: str = "",
        tools: Sequence[Tool] | None = None,
        template: str | None = None,
        **values: Any,
    ):
        """Begin a conversation.

        Args:
            lm: from `jkv.load`, a checkpoint with a tokenizer and a chat template.
            system: what the model is told before the first turn.
            max_new_tokens: per reply, at most.
            cache: the kind or its text ("int4"), `jkv.dense()` by default.
            sampler: a transform of `jkv.sampling`; greedy by default.
            key: for samplers that draw at random; each turn draws with a key folded from it.
            stop: ids and strings at which a reply ends beside the checkpoint's end-of-text ids, ()
                for none at all; see `jkv.generate`. A string that ends a reply is left out of it.
            context: tokens of the conversation and the reply at most; by default the model's, or
                any number where the cache lets it run past that.
            on_full: when they do not fit: "raise", or "drop" the oldest turns for good; the system
                prompt stays.
            store: a `jkv.store.Store` that keeps the cache after each turn, and in which a
                beginning that another conversation shares is looked for.
            sequence_id: of the conversation in the store: one that is there goes on, with the same
                model, kind of cache and system prompt.
            tenant: whose entries of the store.
            tools: what the model may call: JSON schemas, or functions with annotations and
                docstrings, which become schemas.
            template: which, where the checkpoint has several; see `Tokenizer.chat`.
            values: what else the template takes, at every turn, such as `enable_thinking=False`.

        Raises:
            UnsupportedError: no tokenizer, no chat template, or one that takes no system prompt or
                no tools.
            TypeError: an argument of a wrong type, or one that the template does not read.
            ValueError: an argument out of range, a tool that is neither of the two, or a stored
                conversation of another model, kind of cache or system prompt.
        """
        decoder, tokenizer = split_model(lm)
        if not isinstance(tokenizer, ChatTokenizerLike):
            raise UnsupportedError(
                "chat needs the checkpoint's tokenizer: pass what jkv.load returns, of a directory "
                "with a tokenizer.json"
            )
        config = decoder.config
        self._lm, self._decoder, self._tokenizer = lm, decoder, tokenizer
        self._max_new = check_integer("max_new_tokens", max_new_tokens, 1)
        kind = dense() if cache is None else resolve_kind(cache)
        most = capacity.limit(config, kind, Options.prefill_chunk)
        self._context = most if context is None else check_integer("context", context, 2)
        if most is not None and self._context is not None and self._context > most:
            raise ValueError(
                f"context got {context}; expected at most the model's, which is {most}"
            )
        self._drop = check_one_of("on_full", on_full, ("raise", "drop")) == "drop"
        loop.check_sampler(sampler, key, 1)
        check_updates(sampling.bind(sampler, config.vocab), 1, config.vocab)
        stops = parse_stops(stop, 1, config.vocab, config.end_ids, self._tokenizer)
        self._strings = stops.strings[0]
        self._begun = _beginnings(self._strings, self._tokenizer)
        self._reach = max(map(len, self._strings), default=0)
        self._cache, self._sampler, self._stop = cache, sampler, stop
        self._key = key
        source = self._tokenizer.template_source(template, tools=tools is not None)
        check_values(source, tools, values)
        self._template: dict[str, Any] = {"template": template, "tools": tools, **values}
        self._system = () if system is None else (text_message("system", system),)
        # What the template thinks of it is known before the first turn.
        self._ids((*self._system, text_message("user", "Hello")))
        self._past = _Past(self._system)
        self._config, self._kind, self._id = config, kind, sequence_id
        self._prefixes = None
        if store is not None:
            self._prefixes = prefix_store.PrefixStore(store, decoder, kind, tenant)
        if sequence_id is not None:
            check_text("sequence_id", sequence_id)
            if self._prefixes is None:
                raise TypeError(
                    f"got sequence_id={brief(sequence_id)} without a store; pass the store that "
                    "keeps the conversation as store=, or leave sequence_id out"
                )
            kept = conversation.load(self._prefixes, sequence_id, self._system)
            if kept is not None:
                result = _past_result(kept.cache, kept.tokens, decoder)
                self._past = _Past(kept.messages, result, kept.turns, seconds=kept.seconds)

    def __repr__(self) -> str:
        """What it goes on from, in one line."""
        result = self._past.result
        held = 0 if result is None else int(result.cache.lengths[0])
        return (
            f"Chat({self._config.family}, {brief(self._kind)}, "
            f"{plural(len(self._past.messages), 'message')}, {plural(held, 'token')} held)"
        )

    @property
    def messages(self) -> list[Message]:
        """The conversation, each message with its role and content."""
        return copy.deepcopy(list(self._past.messages))

    @property
    def reused(self) -> int:
        """Tokens of the last turn's prompt that were in the cache."""
        return self._past.reused

    @property
    def prefilled(self) -> int:
        """Tokens of the last turn's prompt that were not, and had to be computed."""
        return self._past.prefilled

    def reset(self) -> None:
        """Begin anew: the same system prompt, still in the cache, and the same keys."""
        self._past = _Past(self._system, self._past.result)

    def send(self, message: Turn) -> str:
        """Say something and wait for the whole reply.

        Args:
            message: the user's text, or a message with a role of its own, such as
                ``{"role": "tool", "content": "22"}``; several in a list are one turn.

        Raises:
            TypeError: neither a text nor messages.
            ValueError: a message without a content, or with what JSON cannot hold.
            UnsupportedError: the chat template refuses the message.
            CacheFullError: the conversation does not fit into the context.
        """
        return "".join(self.stream(message))

    @transfers
    def stream(self, message: Turn) -> Iterator[str]:
        """Say something and get the reply in pieces; the turn counts once all have been taken.

        Args:
            message: as of `send`.

        Raises:
            TypeError: neither a text nor messages.
            ValueError: a message without a content, or with what JSON cannot hold.
            UnsupportedError: the chat template refuses the message.
            CacheFullError: the conversation does not fit into the context.
        """
        past = self._past
        messages, ids = self._fit((*past.messages, *new_messages(message)))
        if self._prefixes is not None:
            self._prefixes.renew()
        known = past.result
        if known is not None and not is_current(known.weights, self._decoder):
            known = None  # computed with weights that the model does not have any more
        start, new = _common(known or self._look_up(ids), ids)
        reused = 0 if start is None else len(start.history[0]) - 1
        key = None if self._key is None else jax.random.fold_in(self._key, past.turns)
        blocks = stream(
            self._lm,
            [new],
            max_new_tokens=self._max_new,
            cache=self._cache if start is None else None,
            sampler=self._sampler,
            stop=self._stop,
            key=key,
            resume=start,
        )
        after = _Past(messages, None, past.turns + 1, reused, len(ids) - reused)
        return self._reply(past, after, blocks, ids)

    def _look_up(self, ids: list[int]) -> Result | None:
        """Look up the longest prefix of a conversation that the store has."""
        if self._prefixes is None:
            return None
        found = self._prefixes.find([None], [np.asarray(ids, np.int32)])[0]
        if found.cache is None:
            return None
        held = np.asarray(ids[: found.length], np.int32)
        return _past_result(found.cache, held, self._decoder)

    def _reply(self, past: _Past, after: _Past, blocks: Stream, prompt: list[int]) -> Iterator[str]:
        """Pieces of text; at their end the conversation goes from `past` to `after`."""
        # A message is a text of its own, as templates and other tokenizers' users take it: it does
        # not begin with the space that there would be after the prompt.
        pieces = Pieces(self._tokenizer)
        tokens, text, given = [], "", 0
        before = self._tokenizer.decode(prompt[-self._reach :]) if self._reach else ""
        for block in blocks:
            new = [token for token in block.tokens[0].tolist() if token != PAD]
            tokens += new
            last = bool(block.done[0])
            text += pieces.push(new, last=last)
            if last:
                match = first_stop(self._tokenizer, self._strings, prompt, tokens, len(new))
                settled = len(text) - len(match.visible if match else "")
            else:
                settled = len(text) - _count_pending(before + text, self._begun)
            if settled > given:
                yield text[given:settled]
                given = settled
        if self._past is not past:
            raise JkvError("another turn was taken while this reply was being read; send it again")
        reply, result = text_message("assistant", text[:given]), blocks.result
        seconds = past.seconds + result.prefill_seconds + result.decode_seconds
        now = dataclasses.replace(
            after, messages=(*after.messages, reply), result=result, seconds=seconds
        )
        if self._prefixes is not None:
            words = conversation.words_of(now.messages, now.turns, self._prefixes)
            held = result.history[0][: int(result.cache.lengths[0])]
            self._prefixes.keep([self._id], [held], [result.cache], [seconds], **words)
        self._past = now

    def _ids(self, messages: tuple[Message, ...]) -> list[int]:
        return self._tokenizer.chat_ids(
            list(messages), add_generation_prompt=True, **self._template
        )

    def _fit(self, messages: tuple[Message, ...]) -> tuple[tuple[Message, ...], list[int]]:
        """Drop the oldest turns of a conversation that is too long; return it and its tokens."""
        first = len(self._system)
        while True:
            ids = self._ids(messages)
            if self._context is None or len(ids) + self._max_new <= self._context:
                return messages, ids
            # Templates want whole turns: a question goes with its answer, and with the results of
            # tools on the way there.
            later = [i for i in range(first + 1, len(messages)) if begins_turn(messages, i)]
            if not self._drop or not later:
                raise CacheFullError(
                    f"the conversation has {plural(len(ids), 'token')} and "
                    f"max_new_tokens={self._max_new} "
                    f"make {len(ids) + self._max_new}, more than the context of {self._context}; "
                    + (
                        "shorten the text or ask for fewer tokens"
                        if not later
                        else "reset() it, or make the chat with on_full='drop'"
                    )
                )
            messages = messages[:first] + messages[later[0] :]


def _past_result(cache: Cache, tokens: np.ndarray, model: DecoderLike) -> Result:
    """Make the result of a turn that ended with these tokens, all of them in the cache."""
    return Result(
        tokens=np.zeros((1, 0), np.int32),
        lengths=np.zeros(1, np.int64),
        finish_reasons=("length",),
        logprobs=None,
        cache=cache,
        history=(tokens,),
        prefill_seconds=0.0,
        decode_seconds=0.0,
        config=model.config,
        weights=weights_of(model),
    )


def _common(past: Result | None, ids: list[int]) -> tuple[Result | None, list[int]]:
    """Crop an earlier turn to what a prompt can go on from, and return the tokens to add.

    The cache is cropped to the longest prefix that it shares with the prompt, less the prompt's
    last token, which must be computed to have logits: that is the state after a turn whose last
    token was the first that differs.
    """
    if past is None:
        return None, ids
    held = past.history[0][: int(past.cache.lengths[0])]
    size = min(len(held), len(ids) - 1)
    differ = np.flatnonzero(held[:size] != np.asarray(ids[:size]))
    keep = int(differ[0]) if len(differ) else size
    if keep == 0:
        return None, ids
    try:
        cache = past.cache.crop(keep)
    except UnsupportedError:  # a kind that has let go of what comes before
        return None, ids
    history = (np.asarray(ids[: keep + 1], np.int32),)
    return dataclasses.replace(past, cache=cache, history=history), ids[keep + 1 :]


def _beginnings(strings: tuple[str, ...], tokenizer: ChatTokenizerLike) -> tuple[str, ...]:
    """List the ends of a text in which a stop string has begun, the longest first."""
    found = set()
    for string in strings:
        shown = tokenizer.without_special(string)  # a special token of it may be still to come
        found |= {shown[:n] for n in range(1, len(shown) + (shown != string))}
    return tuple(sorted(found, key=len, reverse=True))


def _count_pending(text: str, beginnings: tuple[str, ...]) -> int:
    """Count the characters at the end of a text that may belong to a stop string."""
    return next((len(begun) for begun in beginnings if text.endswith(begun)), 0)

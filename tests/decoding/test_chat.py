"""Turns that reuse the cache: the replies of a model without one, and the tokens saved."""

from __future__ import annotations

import copy
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jkv
from jkv.decoding.generation import Generation
from jkv.models.tools import schema
from tests.decoding import texts

NEW = 8
# As Qwen3's: tools first, and an empty thought where the reply begins, which no later turn shows.
TOOLS = (
    "{% if tools %}<|turn|>s\n{{ tools | map(attribute='function') | map(attribute='name') | "
    "join(',') }}<|end|>{% endif %}{% for m in messages %}<|turn|>{{ m.role[0] }}\n"
    "{{ m.content }}<|end|>{% endfor %}{% if add_generation_prompt %}<|turn|>a\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think></think>{% endif %}"
    "{% endif %}"
)


def warm(city: str) -> bool:
    """Tell whether it is warm.

    Args:
        city: where.
    """
    return city == "Paris"


@pytest.fixture(scope="module")
def lm(tiny_config: Any) -> jkv.LM:
    """What it says is noise, and most of it comes back from the tokenizer as other tokens."""
    return texts.noise(tiny_config, layers=1)


def scripted(*tokens: int) -> Any:
    filled = [*tokens, *[texts.END] * (NEW - len(tokens))]
    return jkv.sampling.chain(texts.Script(jnp.asarray(filled, jnp.int32)), jkv.sampling.greedy())


def alone(lm: jkv.LM, messages: list[dict[str, str]], **options: Any) -> str:
    """The reply to a conversation by a model that has not seen any of it."""
    ids = lm.tokenizer.chat_ids(messages)
    return "".join(b.texts[0] for b in jkv.stream(lm, [ids], max_new_tokens=NEW, **options))


@pytest.mark.parametrize("kind", [jkv.dense(), jkv.none()], ids=["dense", "none"])
def test_replies_are_those_of_a_model_without_the_cache(lm, kind):
    chat = jkv.Chat(lm, system="Hear.", max_new_tokens=NEW, cache=kind)
    for turn, text in enumerate(["hello", "why", "he who"]):
        asked = [*chat.messages, {"role": "user", "content": text}]
        reply = chat.send(text)
        assert reply == alone(lm, asked)
        assert chat.messages == [*asked, {"role": "assistant", "content": reply}]
        assert chat.reused + chat.prefilled == len(lm.tokenizer.chat_ids(asked))
        assert (chat.reused > 0) == (turn > 0)


def test_a_turn_prefills_only_what_is_new(lm):
    said = lm.tokenizer.encode("fine")
    chat = jkv.Chat(lm, max_new_tokens=NEW, sampler=scripted(*said))
    assert chat.send("how?") == "fine"
    first = chat.prefilled
    assert (chat.reused, first) == (0, len(lm.tokenizer.chat_ids(chat.messages[:1])))
    chat.send("why?")
    # The prompt and the reply are there; the end token was said last and has no keys yet.
    assert chat.reused == first + len(said)
    assert chat.prefilled == len(lm.tokenizer.encode("<|end|><|turn|>u\nwhy?<|end|><|turn|>a\n"))


def test_retokenising_moves_a_boundary(lm):
    letters = [lm.tokenizer.token_id(c) for c in "the"]
    assert lm.tokenizer.encode("the") == [letters[0], 256]  # "he" is a token of its own
    chat = jkv.Chat(lm, max_new_tokens=NEW, sampler=scripted(*letters))
    assert chat.send("say") == "the"
    first = chat.prefilled

    chat.send("again")
    assert chat.reused == first + 1  # the "t"
    heard = [int(t) for t in chat._past.result.history[0]]
    assert heard[: first + 2] == [*lm.tokenizer.chat_ids(chat.messages[:1]), letters[0], 256]

    # And the same with a model that hears what is in its cache.
    free = jkv.Chat(lm, max_new_tokens=NEW)
    free._past = chat._past
    asked = [*chat.messages, {"role": "user", "content": "more"}]
    assert free.send("more") == alone(lm, asked)


def test_a_boundary_between_prompt_and_reply_moves(lm):
    newline = lm.tokenizer.encode("\n")[0]
    chat = jkv.Chat(lm, max_new_tokens=NEW, sampler=scripted(newline))
    assert chat.send("say") == "\n"
    first = chat.prefilled
    chat.send("again")  # the newline after the role and this one are one token now
    assert chat.reused == first - 1


def test_a_prompt_that_is_all_in_the_cache_still_needs_one_token(lm):
    chat = jkv.Chat(lm, system="Hear.", max_new_tokens=NEW)
    reply = chat.send("hello")
    whole = chat.prefilled
    chat.reset()
    assert (chat.reused, chat.prefilled) == (0, 0)
    assert [m["role"] for m in chat.messages] == ["system"]
    assert chat.send("hello") == reply
    assert (chat.reused, chat.prefilled) == (whole - 1, 1)


def test_pieces_join_to_the_reply(lm):
    reply = jkv.Chat(lm, max_new_tokens=30).send("hello")
    chat = jkv.Chat(lm, max_new_tokens=30)
    pieces = list(chat.stream("hello"))
    assert len(pieces) > 1
    assert "".join(pieces) == reply == chat.messages[-1]["content"]


@pytest.mark.parametrize(
    ("stop", "reply"),
    [
        (["wo"], "hello "),
        (["zebra"], "hello world"),
        (["lo", "hel"], ""),
        (["ldx", "d!"], "hello world"),
        ([], "hello world"),
        ("o w", "hell"),
    ],
)
def test_a_stop_string_is_no_part_of_the_reply(lm, stop, reply):
    said = lm.tokenizer.encode("hello world")
    chat = jkv.Chat(lm, max_new_tokens=len(said), sampler=scripted(*said), stop=stop)
    pieces = list(chat.stream("say"))
    assert "".join(pieces) == reply == chat.messages[-1]["content"]
    assert chat.send("again") == reply
    assert chat.reused > 0


def test_each_turn_draws_with_a_key_of_its_own(lm):
    hot = jkv.sampling.temperature(2.0)
    chats = [
        jkv.Chat(lm, max_new_tokens=NEW, sampler=hot, key=jax.random.key(seed))
        for seed in (5, 5, 6)
    ]
    turns = [[chat.send("hello"), chat.send("hello")] for chat in chats]
    assert turns[0] == turns[1]
    assert turns[0] != turns[2]
    for turn, reply in enumerate(turns[0]):
        asked = chats[0].messages[: 2 * turn + 1]
        key = jax.random.fold_in(jax.random.key(5), turn)
        assert reply == alone(lm, asked, sampler=hot, key=key)


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_a_failed_turn_leaves_the_conversation_as_it_was(lm, monkeypatch, error):
    chat, twin = (jkv.Chat(lm, system="Hear.", max_new_tokens=30) for _ in range(2))
    assert chat.send("hello") == twin.send("hello")
    before = chat.messages, chat.reused, chat.prefilled

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(Generation, "dispatch", fail)
    with pytest.raises(error):
        chat.send("lost")
    monkeypatch.undo()
    assert (chat.messages, chat.reused, chat.prefilled) == before
    assert chat.send("why?") == twin.send("why?")
    assert chat.reused == twin.reused > 0
    assert chat.messages == twin.messages


def test_a_reply_that_is_not_read_to_its_end_is_no_turn(lm):
    chat = jkv.Chat(lm, max_new_tokens=30)
    reply = chat.stream("hello")
    next(reply)
    assert chat.messages == []
    other = chat.send("something else")
    with pytest.raises(jkv.JkvError, match="another turn"):
        list(reply)
    assert [m["content"] for m in chat.messages] == ["something else", other]


def test_a_full_context_raises_and_keeps_what_was(lm):
    chat = jkv.Chat(lm, max_new_tokens=NEW, context=32, sampler=scripted(72))
    assert chat.send("hi") == chat.send("hi")
    before = chat.messages
    with pytest.raises(jkv.CacheFullError, match=r"context of 32.*on_full='drop'"):
        chat.send("hello")
    assert chat.messages == before
    chat.reset()
    assert chat.send("hello")


def test_a_full_context_drops_the_oldest_turns_and_keeps_the_system_prompt(lm):
    options = {"system": "Hear.", "max_new_tokens": NEW, "context": 60, "on_full": "drop"}
    chat = jkv.Chat(lm, sampler=scripted(72), **options)
    for i in range(6):
        chat.send(f"number {i}")
        tokens = len(lm.tokenizer.chat_ids(chat.messages[:-1]))
        assert tokens + NEW <= 60
        assert chat.messages[0] == {"role": "system", "content": "Hear."}
        assert chat.messages[-2] == {"role": "user", "content": f"number {i}"}
        assert [m["role"] for m in chat.messages[1:]] == ["user", "assistant"] * (
            len(chat.messages) // 2
        )
    assert 2 < len(chat.messages) < 11
    assert chat.reused > len(lm.tokenizer.encode("<|turn|>s\nHear.<|end|>"))
    free = jkv.Chat(lm, **options)
    free._past = chat._past
    free.send("last")
    assert free.messages[-1]["content"] == alone(lm, free.messages[:-1])

    with pytest.raises(jkv.CacheFullError, match="shorten the text"):
        chat.send("long " * 20)


def test_templates_and_tokenizers_that_are_missing(lm, tiny_model):
    for tokenizer, message in (
        (None, "jkv.load"),
        (texts.byte_level(template=None), "no chat template"),
    ):
        bare = jkv.LM(model=lm.model, config=lm.config, tokenizer=tokenizer, source="bare")
        with pytest.raises(jkv.UnsupportedError, match=message):
            jkv.Chat(bare)
    with pytest.raises(jkv.UnsupportedError, match=r"jkv\.load"):
        jkv.Chat(tiny_model)
    assert jkv.Chat(lm).messages == []


def test_a_template_that_takes_no_system_prompt(lm):
    template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    ) + texts.TEMPLATE
    bare = jkv.LM(lm.model, lm.config, texts.byte_level(template), "bare")
    with pytest.raises(jkv.UnsupportedError, match="no system role"):
        jkv.Chat(bare, system="Hear.")
    assert jkv.Chat(bare).messages == []


@pytest.fixture(scope="module")
def tooled(lm: jkv.LM) -> jkv.LM:
    """Its template reads tools and a value, and it has another one of their own."""
    tokenizer = texts.byte_level(TOOLS)
    tokenizer.templates["loud"] = "!" + TOOLS
    return jkv.LM(lm.model, lm.config, tokenizer, "tooled")


def told(tooled: jkv.LM, messages: Any, **values: Any) -> str:
    """The reply to messages, rendered with these values by the tokenizer."""
    ids = tooled.tokenizer.chat_ids(messages, **values)
    return "".join(b.texts[0] for b in jkv.stream(tooled, [ids], max_new_tokens=NEW))


@pytest.mark.parametrize(
    "values",
    [
        {"tools": [warm]},
        {"tools": [schema(warm)], "enable_thinking": False},
        {"enable_thinking": False},
        {"template": "loud", "enable_thinking": True},
    ],
    ids=["tools", "both", "value", "template"],
)
def test_tools_and_values_of_the_template_count_at_every_turn(tooled, values):
    chat = jkv.Chat(tooled, max_new_tokens=NEW, **values)
    plain = jkv.Chat(tooled, max_new_tokens=NEW)
    for turn, text in enumerate(["hello", "why"]):
        asked = [*chat.messages, {"role": "user", "content": text}]
        assert chat.send(text) == told(tooled, asked, **values)
        ids = tooled.tokenizer.chat_ids(asked, **values)
        assert chat.reused + chat.prefilled == len(ids)
        assert (chat.reused > 0) == (turn > 0)
        plain.send(text)
        assert plain.reused + plain.prefilled < len(ids) or values.get("enable_thinking")


def test_a_call_of_a_tool_and_what_it_returned(tooled):
    call = tooled.tokenizer.encode("warm()")
    chat = jkv.Chat(tooled, tools=[warm], max_new_tokens=NEW, sampler=scripted(*call))
    assert chat.send("Is it?") == "warm()"
    first, returned = chat.prefilled, {"role": "tool", "content": "true", "name": None}
    free = jkv.Chat(tooled, tools=[warm], max_new_tokens=NEW)
    free._past = chat._past
    asked = [*chat.messages, {"role": "tool", "content": "true"}]
    assert free.send(returned) == told(tooled, asked, tools=[warm])
    assert free.messages[:3] == asked
    assert free.reused == first + len(call)
    new = "<|end|><|turn|>t\ntrue<|end|><|turn|>a\n"
    assert free.prefilled == len(tooled.tokenizer.encode(new))


def test_several_messages_are_one_turn(tooled):
    chat = jkv.Chat(tooled, tools=[warm], max_new_tokens=NEW)
    chat.send("hello")
    both = [{"role": "tool", "content": [1]}, {"role": "tool", "content": "2"}]
    asked = [*chat.messages, *both]
    assert chat.send(both) == told(tooled, asked, tools=[warm])
    assert chat.messages[:-1] == asked
    chat.messages[2]["content"].append(2)
    assert chat.messages[:-1] == asked, "it is the chat's own"


def test_a_full_context_drops_what_tools_said_with_the_question(tooled):
    options = {"tools": [warm], "max_new_tokens": NEW, "context": 70, "on_full": "drop"}
    chat = jkv.Chat(tooled, system="Hear.", sampler=scripted(72), **options)
    chat.send("one")
    chat.send({"role": "tool", "content": "1"})
    chat.send("two")
    roles = ["system", *["user", "assistant", "tool", "assistant"], "user", "assistant"]
    assert [m["role"] for m in chat.messages] == roles
    chat.send({"role": "tool", "content": "2 and more"})
    assert [m["role"] for m in chat.messages] == roles[:5]
    assert chat.messages[1]["content"] == "two"
    with pytest.raises(jkv.CacheFullError, match="shorten the text"):
        chat.send({"role": "tool", "content": "more " * 10})


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({"max_tokens": 8}, TypeError, "got max_tokens, which is no argument of Chat"),
        ({"enable": True}, TypeError, "got enable, which is no argument"),
        ({"messages": []}, TypeError, "got messages, which Chat gives"),
        ({"add_generation_prompt": False}, TypeError, "got add_generation_prompt, which Chat"),
        ({"template": "rag"}, jkv.UnsupportedError, "no chat template 'rag'"),
        ({"tools": "warm"}, ValueError, "tools got str; expected a list"),
        ({"tools": [3]}, ValueError, "tools hold 3; expected a JSON schema, or a function"),
    ],
)
def test_values_that_no_template_takes(tooled, values, error, message):
    with pytest.raises(error, match=message):
        jkv.Chat(tooled, **values)


def test_tools_that_the_template_does_not_read(lm):
    with pytest.raises(jkv.UnsupportedError, match="reads none"):
        jkv.Chat(lm, tools=[warm])


BAD = [
    ({"max_new_tokens": 0}, ValueError, "max_new_tokens got 0"),
    ({"max_new_tokens": "8"}, ValueError, "max_new_tokens got '8'"),
    ({"context": 1}, ValueError, "context got 1"),
    ({"context": 257}, ValueError, "at most the model's, which is 256"),
    ({"on_full": "stop"}, ValueError, "'raise' or 'drop'"),
    ({"sampler": jkv.sampling.temperature(1.0)}, ValueError, "needs key"),
    ({"sampler": "hot"}, TypeError, "sampler"),
    ({"key": 3}, TypeError, "key"),
    ({"stop": [""]}, ValueError, "empty string"),
    ({"stop": [999]}, ValueError, "999"),
    ({"system": 3}, TypeError, "system's message is 3"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_bad_arguments_are_refused_when_the_chat_is_made(lm, change, error, message):
    with pytest.raises(error, match=message):
        jkv.Chat(lm, **change)


@pytest.mark.parametrize("text", [None, 3, b"hello", ["hello"], [], {"text": "x"}])
def test_what_is_no_text_is_refused_at_the_call(lm, text):
    chat = jkv.Chat(lm)
    with pytest.raises(TypeError, match="expected a text"):
        chat.stream(text)
    assert chat.messages == []


@pytest.mark.parametrize(
    ("message", "match"),
    [
        ({"role": "user", "contnt": "x"}, "'contnt': 'x'.*}, without a content; expected"),
        ({"role": "user", "content": None}, "expected a content that is a text or a list"),
        ({"role": "user", "content": 3}, "'content': 3.*}; expected a content that is a text"),
    ],
)
def test_a_message_without_a_content_is_refused(lm, message, match):
    chat = jkv.Chat(lm)
    with pytest.raises(ValueError, match=match):
        chat.send([{"role": "user", "content": "hello"}, message])
    assert chat.messages == []


def test_a_copy_is_a_branch_to_go_back_to(lm):
    chat = jkv.Chat(lm, max_new_tokens=NEW)
    assert repr(chat).endswith(", 0 messages, 0 tokens held)")
    chat.send("hello")
    before, said = copy.copy(chat), chat.messages
    reply = chat.send("why")
    held = chat.reused + chat.prefilled + NEW - 1  # the last token was never read
    assert repr(chat) == f"Chat(custom, {jkv.dense()}, 4 messages, {held} tokens held)"
    assert before.messages == said
    assert before.send("he who") == alone(lm, before.messages[:-1])
    assert chat.messages[-1]["content"] == reply


def test_the_last_result_can_be_looked_at(lm):
    chat = jkv.Chat(lm, max_new_tokens=NEW)
    chat.send("hello")
    result = chat._past.result
    assert result is not None
    ids = lm.tokenizer.chat_ids(chat.messages[:1])
    np.testing.assert_array_equal(result.history[0][: len(ids)], ids)

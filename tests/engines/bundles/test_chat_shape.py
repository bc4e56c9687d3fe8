"""Shapes of chat templates, compared with the template's own renderings and with expected texts."""

import json

import pytest

from coatrt.data.chat_template import ChatTemplate, Refusal, Rendering
from coatrt.engines.bundles.chat_shape import Around, ChatShape, chat_shape

SPECIAL = json.dumps({"bos_token": "<s>", "eos_token": "</s>"})
SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\n" + SYSTEM + "<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA_3 = (
    "{% for message in messages %}{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' "
    "+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}"
    "{% endif %}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
TURNS = (
    "{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('they take turns') }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    + TURNS
    + "{{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\n' + "
    "message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}" + TURNS + "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token}}"
    "{% else %}{{ raise_exception('only user and assistant') }}{% endif %}{% endfor %}"
)
QWEN_3 = (  # the assistant's thoughts are dropped before the last user's message, and opened after it
    "{% set ns = namespace(last=0) %}{% for message in messages %}{% if message.role == 'user' %}"
    "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for message in messages %}{% set content = message.content %}"
    "{% if message.role == 'assistant' and '</think>' in content %}"
    "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{{ '<|im_start|>' + message.role + '\n' }}"
    "{% if message.role == 'assistant' and loop.index0 > ns.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ content + '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEMPLATES = {"chatml": CHATML, "llama 3": LLAMA_3, "gemma": GEMMA, "mistral": MISTRAL, "qwen 3": QWEN_3}
SYSTEM_IN_USER = (
    "{% for m in messages %}{% if m.role == 'user' %}[INST] {% if loop.index0 == 1 and messages[0].role == 'system' %}"
    "<<SYS>>{{ messages[0].content }}<</SYS>>{% endif %}{{ m.content }} [/INST]"
    "{% elif m.role == 'assistant' %}{{ m.content }}{% endif %}{% endfor %}"
)


def template(source: str) -> ChatTemplate:
    return ChatTemplate(source, SPECIAL, "a test")


def shape_of(source: str) -> ChatShape:
    found = chat_shape(template(source))
    assert isinstance(found, ChatShape), found
    return found


def conversation(*turns: tuple[str, str]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in turns]


def test_chatml_is_measured_exactly() -> None:
    start = f"<|im_start|>system\n{SYSTEM}<|im_end|>\n"
    roles = {role: Around(f"<|im_start|>{role}\n", "<|im_end|>\n") for role in ("user", "assistant", "system")}
    assert shape_of(CHATML) == ChatShape("", start, "<|im_start|>assistant\n", roles)


@pytest.mark.parametrize("name", TEMPLATES)
def test_other_conversations_are_rendered_alike(name: str) -> None:
    """None of these is among the proofs."""
    shape = shape_of(TEMPLATES[name])
    asked = [
        conversation(("user", "a\tb ")),
        conversation(("user", "ask"), ("assistant", "<think>no</think>\nyes</think>\n\n x"), ("user", "\x1cagain\x1f")),
        conversation(("system", " rules\n"), ("user", "x"), ("assistant", "y"), ("user", "z")),
        conversation(("user", "x"), ("user", "y")),
        conversation(("user", "x"), ("assistant", "y")),
        conversation(("assistant", "y"), ("user", "z")),
        conversation(("user", "x"), ("system", "y"), ("user", "z")),
    ]
    rendered = template(TEMPLATES[name]).render([Rendering(messages, prompt=True) for messages in asked])
    for messages, text in zip(asked, rendered, strict=True):
        if isinstance(text, Refusal):
            assert shape.refuses(messages), messages
        elif not shape.refuses(messages):
            assert shape.render(messages) == text, messages
    assert [shape.refuses(messages) for messages in asked[:2]] == [False, False]


def test_the_orders_that_a_template_refuses_are_refused() -> None:
    gemma, qwen = shape_of(GEMMA), shape_of(QWEN_3)
    assert gemma.alternate and "system" not in gemma.roles and gemma.strip and gemma.start_without_system == "<s>"
    assert qwen.ends_with_user and qwen.drop_before == "</think>" and not qwen.alternate
    assert not shape_of(LLAMA_3).alternate and shape_of(LLAMA_3).strip and not shape_of(CHATML).strip


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (SYSTEM_IN_USER, "it merges the system message with another"),
        ("{{ strftime_now('%Y') }}" + CHATML, "it writes the current date"),
        (CHATML.replace("message['content']", "message['content'] | upper"), "it changes or moves the contents"),
        (CHATML.replace("message['content']", "message['content'][:200]"), "renders some messages otherwise"),
        (CHATML.replace("message['content']", "(loop.index ~ message['content'])"), "depends on its place"),
        ("{{ raise_exception('none') }}", "it refuses a conversation"),
        ("{% for m in messages %}{{ m.role }}{% endfor %}", "it changes or moves the contents"),
    ],
    ids=["merges", "date", "upper", "cuts", "numbers", "refuses", "omits"],
)
def test_another_shape_is_refused_with_its_reason(source: str, reason: str) -> None:
    found = chat_shape(template(source))
    assert isinstance(found, Refusal) and reason in found.reason

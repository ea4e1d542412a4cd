from __future__ import annotations

import contextlib
import os
import resource
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from redshard.loader.tokenizer import chat_template
from redshard.loader.tokenizer.chat_template import ChatTemplate, ChatTemplateError

CHATML = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}"""
SILENT = [{"role": "user", "content": ""}]
REPEATED = "{% set n = namespace(x='a') %}{% for i in range(99) %}"
HELLO = [{"role": "user", "content": "Hello"}]


def rendered(source: str, messages: Any = HELLO, **options: Any) -> str:
    return ChatTemplate({"default": source}, {"bos_token": "<s>", "eos_token": "</s>"}).render(
        messages, **options
    )


def test_renders_a_conversation() -> None:
    messages = [{"role": "system", "content": "Be brief."}, *HELLO]
    assert rendered(CHATML, messages) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    )
    assert rendered(CHATML, add_generation_prompt=False) == "<|im_start|>user\nHello<|im_end|>\n"


def test_reads_template_and_special_tokens_from_metadata() -> None:
    metadata = {
        "tokenizer.chat_template": "{{ bos_token }}{{ messages[0].content }}{{ eos_token }}{{ unk_token }}",
        "tokenizer.ggml.tokens": ["<pad>", "<bos>", "<eos>"],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 99,
    }
    assert ChatTemplate.from_metadata(metadata).render(HELLO) == "<bos>Hello<eos>"


def test_a_request_with_tools_takes_the_template_for_tools() -> None:
    metadata = {"tokenizer.chat_template": "plain", "tokenizer.chat_template.tool_use": "{{ tools[0].name }}"}
    template = ChatTemplate.from_metadata(metadata)
    assert template.render(SILENT) == "plain"
    assert template.render(SILENT, tools=[{"name": "search"}]) == "search"


@pytest.mark.parametrize("metadata", [{}, {"tokenizer.chat_template": ""}, {"tokenizer.chat_template": 3}])
def test_a_file_without_template(metadata: dict[str, Any]) -> None:
    with pytest.raises(ChatTemplateError, match="has no chat template"):
        ChatTemplate.from_metadata(metadata)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{{ {'a': '<é>'} | tojson }}", '{"a": "<é>"}'),
        ("{{ [1] | tojson(indent=2) }}", "[\n  1\n]"),
        ("{% if true %}\n  {% set x = 1 %}\nx\n{% endif %}\n", "x\n"),
        ("{% for i in range(9) %}{% if i > 1 %}{% break %}{% endif %}{{ i }}{% endfor %}", "01"),
        ("{% generation %}said{% endgeneration %}", "said"),
        ("{{ strftime_now('%Y') | length }}", "4"),
        ("{{ tools is none }} {{ documents is none }}", "True True"),
        ("{{ 1 ~ 'a' ~ none }}", "1aNone"),
        ("{{ '%d of {}'.format(1700000000) }} {{ '%s' % 1700000000 }}", "%d of 1700000000 1700000000"),
        ("{{ messages[0].content.replace('l', 'L') | upper }}", "HELLO"),
        ("{{ messages | map(attribute='role') | join(', ') }}", "user"),
    ],
)
def test_language(source: str, expected: str) -> None:
    assert rendered(source, HELLO if "content" in source else SILENT) == expected


def test_text_parts_are_joined() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert rendered("{{ messages[0].content }}", [{"role": "user", "content": parts}]) == "ab"


def test_content_may_be_missing_beside_tool_calls() -> None:
    message = {"role": "assistant", "content": None, "tool_calls": [{"id": 1}]}
    assert rendered("{{ messages[0].content is none }}", [message]) == "True"


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "at least one"),
        ("hello", "must be a list"),
        ({"role": "user"}, "must be a list"),
        (["hello"], "message 0 must be a mapping"),
        ([*HELLO, {"content": "x"}], "message 1 must be a mapping with a text 'role'"),
        ([{"role": "user"}], "message 0 must have a text 'content'"),
        ([{"role": "user", "content": 3}], "message 0 must have a text 'content'"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "message 0 has a part that is not text"),
    ],
)
def test_malformed_messages(messages: Any, message: str) -> None:
    with pytest.raises(ChatTemplateError, match=message):
        rendered(CHATML, messages)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{% if %}", "is not valid"),
        ("{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}", "is not valid"),
        ("x" * (chat_template.MAX_TEMPLATE_CHARACTERS + 1), "characters"),
        ("{{ raise_exception('roles must alternate') }}", "refuses these messages: roles must alternate"),
        ("{{ nothing.here }}", "'nothing' is undefined"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "recursion"),
        ("{{ range(1000000) }}", "Range too big"),
    ],
)
def test_template_errors(source: str, message: str) -> None:
    with pytest.raises(ChatTemplateError, match=message):
        rendered(source)


@pytest.mark.parametrize(
    "source",
    [
        REPEATED + "{% set n.x = n.x ~ n.x %}{% endfor %}",
        REPEATED + "{% set n.x = n.x + n.x %}{% endfor %}",
        REPEATED + "{% set n.x %}{{ n.x }}{{ n.x }}{% endset %}{% endfor %}",
        "{{ 'a' * 10**10 }}",
        "{{ [[1] * 10000] * 10000 }}",
        "{{ 10 ** (10**10) }}",
        "{{ 'a'.center(10**10) }}",
        "{{ 'a' | center(10**10) }}",
        "{{ 'a\\n' | indent(10**10) }}",
        "{{ [1] | batch(10**10, 0) | list }}",
        "{{ [] | tojson(indent=10**10) }}",
        "{{ '%10000000000d' % 1 }}",
        "{{ '%*d' % (10000000000, 1) }}",
        "{{ '{:>10000000000}'.format(1) }}",
        "{{ '{:>{w}}'.format(1, w=10000000000) }}",
        "{{ ('a' * 100000).replace('a', 'b' * 100000) }}",
        "{{ ('a' * 100000) | replace('a', 'b' * 100000) }}",
        "{{ ('a' * 100000).join(range(100000) | map('string')) }}",
        "{{ range(100000) | map('string') | join('a' * 100000) }}",
        "{{ ([''] * 20000) | join('x' * 2000) }}",
        "{{ ([messages[0].content] * 20000) | join('x' * 2000) }}",
        "{{ 'x' | urlize | replace('x', 'y' * 10**8) }}",
        "{% macro m(n) %}{{ n }}{{ m(n ~ n) }}{% endmacro %}{{ m('ab') }}",
        "{% for i in range(100000) %}{{ 'x' * 1000 }}{% endfor %}",
        "{{ (range(100000) | list) * 100000 }}",
        "{{ [[[[[[0] * 99] * 99] * 99] * 99] * 99] | tojson }}",
    ],
)
def test_no_template_takes_much_memory_or_time(monkeypatch: pytest.MonkeyPatch, source: str) -> None:
    monkeypatch.setattr(chat_template, "MAX_RENDER_SECONDS", 3.0)
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ChatTemplateError, match=r"larger than|wrote more|recursion|ran for|too large"):
        rendered(source)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < largest + (64 << 10)  # kibibytes
    assert rendered(CHATML).startswith("<|im_start|>user")  # the next one is none the worse for it


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{{ [1700000000, 2] | join(',') }}", "1700000000,2"),
        ("{{ (messages[0].content * 24000).replace('l', 'll') | length }}", "168000"),
        ("{{ messages[0].content | replace('Hello', 'x' * 120000) | length }}", "120000"),
    ],
)
def test_large_values_that_are_none_too_large(source: str, expected: str) -> None:
    assert rendered("{{ messages[0].content }} " + source) == f"Hello {expected}"


_ATOMS = "messages messages[0].content 'ab' [1,'x'] {'a':[2]} 10**6 99 range(99) none n.x"
_FILTERS = """batch(3) capitalize center(99999) count default(1) dictsort escape first format(1) groupby(0)
    indent(9999) items join('x'*999) last length list lower map('string') max pprint random reject
    replace('a','b'*9999) reverse round select slice(3) sort string striptags sum title tojson(indent=9)
    trim truncate unique upper urlencode urlize wordcount wordwrap(1) xmlattr"""
_METHODS = """upper() center(99999) replace('a','b'*9999) split('a') join(['x']*999) format(1) zfill(99999)
    expandtabs(9999) ljust(99999) items() keys() encode() title() splitlines() partition('a')"""
_OPERATORS = "+ * ** % ~ - in =="


def one_of(words: str) -> st.SearchStrategy[str]:
    return st.sampled_from(words.split())


_EXPRESSIONS = st.recursive(
    one_of(_ATOMS),
    lambda inner: st.one_of(
        st.tuples(inner, one_of(_FILTERS)).map(lambda t: f"({t[0]} | {t[1]})"),
        st.tuples(inner, one_of(_METHODS)).map(lambda t: f"({t[0]}).{t[1]}"),
        st.tuples(inner, one_of(_OPERATORS), inner).map(lambda t: f"({t[0]} {t[1]} {t[2]})"),
    ),
    max_leaves=6,
)
_LOOPS = st.sampled_from(
    [
        "{0}",
        "{{% for i in range(999) %}}{0}{{% endfor %}}",
        "{{% for i in range(30) %}}{{% set n.x = [n.x, {1}] %}}{{% endfor %}}{0}",
        "{{% for i in range(30) %}}{{% set n.x = n.x ~ {1} ~ n.x %}}{{% endfor %}}{0}",
    ]
)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(_EXPRESSIONS, _LOOPS)
def test_any_template_ends_within_its_bounds(expression: str, loop: str) -> None:
    """Filters, methods, operators and loops in any combination: an answer or an error, in time."""
    source = "{% set n = namespace(x='a') %}" + loop.format("{{ " + expression + " }}", expression)
    largest, begun = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chat_template, "MAX_RENDER_SECONDS", 1.0)
        with contextlib.suppress(ChatTemplateError):
            assert len(rendered(source)) <= chat_template.MAX_PROMPT_CHARACTERS
    assert time.monotonic() - begun < 20
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < largest + (256 << 10)


PARTS = (
    "{% for m in messages %}{% for p in m.content %}{% if p.type == 'text' %}{{ p.text }}{% endif %}"
    "{% endfor %}|{% endfor %}"
)
FIRST_PART = "{% for m in messages %}{{ m['content'][0]['text'] }}|{% endfor %}"
MIXED = "{% for m in messages %}{{ m.content if m.role == 'system' else m.content[0].text }}|{% endfor %}"
EITHER = "{% for m in messages %}{{ m.content if m.content is string else m.content[0].text }}|{% endfor %}"


@pytest.mark.parametrize("source", [PARTS, FIRST_PART, MIXED, EITHER])
@pytest.mark.parametrize("as_parts", [False, True])
def test_content_comes_in_the_form_that_the_template_reads(source: str, as_parts: bool) -> None:
    def content(text: str) -> Any:
        return [{"type": "text", "text": text}] if as_parts else text

    roles = ["system", "user", "assistant", "user"]
    messages = [{"role": role, "content": content(f"{role} says")} for role in roles]
    assert rendered(source, messages) == "".join(f"{role} says|" for role in roles)


def test_text_never_vanishes_silently() -> None:
    with pytest.raises(ChatTemplateError, match="leaves out what 'user' says"):
        rendered("{{ messages[0].text }}")
    only_first = "{{ messages[0].content }}"
    with pytest.raises(ChatTemplateError, match="leaves out what 'tool' says"):
        rendered(only_first, [*HELLO, {"role": "tool", "content": "3"}])
    assert rendered(only_first, [*HELLO, {"role": "assistant", "content": ""}]) == "Hello"
    call = {"role": "assistant", "content": "I look it up.", "tool_calls": [{"id": 1}]}
    assert rendered(only_first, [*HELLO, call]) == "Hello"


@pytest.mark.parametrize("change", ["| upper", "| trim", "| tojson", ".split('x')[-1]", "| indent(9)"])
def test_a_form_is_known_by_text_however_it_is_shown(change: str) -> None:
    source = "{% for m in messages %}{{ m.content" + change + " }}{% endfor %}"
    assert "HELLO" in rendered(source).upper()


def test_a_role_may_need_parts_beside_one_that_needs_text() -> None:
    source = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ '<' + m.content + '>' }}"
        "{% else %}{{ m.content[0]['text'] + '|' }}{% endif %}{% endfor %}"
    )
    template = ChatTemplate({"default": source}, {})
    system = {"role": "system", "content": "Be brief."}
    assert template.render([system, *HELLO]) == "<Be brief.>Hello|"
    assert template.render(HELLO) == "Hello|"


def test_the_prompt_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "MAX_PROMPT_CHARACTERS", 1000)
    with pytest.raises(ChatTemplateError, match="more than 1000 characters"):
        rendered("{% for i in range(1001) %}x{% endfor %}")


def test_the_time_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "MAX_RENDER_SECONDS", 0.2)
    loop = "{% for i in range(100000) %}"
    with pytest.raises(ChatTemplateError, match=r"more than 0\.2 s"):
        rendered(loop + loop + "{% set x = 1 %}{% endfor %}{% endfor %}")


def test_probing_takes_no_more_time_than_a_rendering(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "MAX_RENDER_SECONDS", 0.5)
    loop = "{% for i in range(100000) %}"
    begun = time.monotonic()
    with pytest.raises(ChatTemplateError, match=r"more than 0\.5 s"):
        rendered(loop + loop + "{% set x = 1 %}{% endfor %}{% endfor %}{{ messages[0].content }}")
    assert time.monotonic() - begun < 2


def test_a_process_that_is_killed_is_replaced() -> None:
    assert rendered(CHATML)
    process = chat_template._sandbox._process
    assert process is not None
    process.kill()
    process.wait()
    assert rendered(CHATML).startswith("<|im_start|>user")


def test_threads_get_their_own_prompts() -> None:
    template = ChatTemplate({"default": "{{ messages[0].content }}"}, {})
    texts = [f"text {number}" for number in range(200)]
    with ThreadPoolExecutor(8) as pool:
        prompts = pool.map(lambda text: template.render([{"role": "user", "content": text}]), texts)
        assert list(prompts) == texts


def test_waiting_for_another_rendering_takes_no_time_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "MAX_RENDER_SECONDS", 0.5)
    loop = "{% for i in range(100000) %}"
    slow = loop + loop + "{% set x = 1 %}{% endfor %}{% endfor %}{{ messages[0].content }}"
    with ThreadPoolExecutor(4) as pool:
        failing = [pool.submit(rendered, slow) for _ in range(3)]
        time.sleep(0.1)
        assert pool.submit(rendered, "{{ messages[0].content }}").result() == "Hello"
        assert all(isinstance(each.exception(), ChatTemplateError) for each in failing)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_has_a_process_of_its_own() -> None:
    assert rendered(CHATML)
    process = chat_template._sandbox._process
    assert process is not None
    child = os.fork()
    if child == 0:
        ended = 1
        with contextlib.suppress(BaseException):
            assert rendered(CHATML) == rendered(CHATML)
            own = chat_template._sandbox._process
            ended = int(own is None or own.pid == process.pid)
        os._exit(ended)
    assert os.waitpid(child, 0)[1] == 0
    assert rendered(CHATML)
    assert chat_template._sandbox._process is process

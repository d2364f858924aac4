"""Templates that would take all memory or all time are refused, soon and in little memory; ordinary ones are not."""

import json
import subprocess
import sys
import textwrap
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from jinja2.exceptions import SecurityError

from model.text.chat_messages import ChatTemplateError
from model.text.jinja_template import JinjaTemplate
from model.text.template_budget import Budget, check_format

ROOT = Path(__file__).resolve().parents[2]
MAX_CHARS = 8 << 20
DOUBLING = "{%% set ns = namespace(x=%s) %%}{%% for i in range(60) %%}{%% set ns.x = %s %%}{%% endfor %%}"
BOMBS = {
    "nested loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "loops of loops": "{% for i in range(3) recursive %}{{ loop(range(99999)) if loop.depth < 30 }}{% endfor %}",
    "lists in a loop": "{% for i in range(99999) %}{% set x = range(99999) | list | sort | join %}{% endfor %}",
    "macros": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "endless macro": "{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}",
    "join": DOUBLING % ("'a'", "ns.x ~ ns.x"),
    "plus": DOUBLING % ("'a'", "ns.x + ns.x"),
    "lists": DOUBLING % ("[1]", "ns.x + ns.x"),
    "numbers": DOUBLING % ("3", "ns.x * ns.x"),
    "blocks": "{% set ns = namespace(x='a') %}{% for i in range(60) %}"
    "{% set ns.x %}{{ ns.x }}{{ ns.x }}{% endset %}{% endfor %}",
    "literals in a block": "{% filter upper %}{% for i in range(99999) %}" + "x" * 5000 + "{% endfor %}{% endfilter %}",
    "center filter": "{{ 'x' | center(999999999) }}",
    "center": "{{ 'x'.center(999999999) }}",
    "by name": "{{ 'x'.ljust(width=999999999) }}",
    "zfill": "{{ 'x'.zfill(999999999) }}",
    "bytes": "{{ 'x'.encode().center(999999999) | length }}",
    "to_bytes": "{{ (1).to_bytes(2000000000, 'big') | length }}",
    "percent": "{{ '%999999999d' % 1 }}",
    "percent star": "{{ '%*d' % (999999999, 1) }}",
    "percent filter": "{{ '%999999999d' | format(1) }}",
    "format": "{{ '{:999999999}'.format(1) }}",
    "format of a format": "{{ '{:{}}'.format(1, '999999999') }}",
    "format_map": "{{ '{a:{b}}'.format_map({'a': 1, 'b': 999999999}) }}",
    "replace": "{{ ('a' * 8000000).replace('a', 'b' * 8000000) | length }}",
    "replace filter": "{{ ('a' * 800000) | replace('a', 'b' * 8000000) | length }}",
    "join of a string": "{{ ('b' * 8000000).join('a' * 1000) | length }}",
    "join filter": "{{ range(99999) | join('b' * 800000) | length }}",
    "indent": "{{ ('\\n' * 800000) | indent(99999) | length }}",
    "expandtabs": "{{ ('\\t' * 8000000).expandtabs(9999) | length }}",
    "translate": "{{ ('a' * 8000000).translate({97: 'b' * 8000000}) | length }}",
    "tojson": "{{ [[[[[[1]]]]]] | tojson(indent=999999999) }}",
    "mapped": "{{ ['x'] | map('center', 999999999) | list }}",
    "batch": "{{ [1] | batch(999999999, 'x') | list | length }}",
    "slice": "{{ [1] | slice(999999999) | list | length }}",
    "sum of lists": "{{ ([[1] * 100000] * 9999) | sum(start=[]) | length }}",
    "power": "{{ 10 ** (10 ** 10) }}",
}
CHECK = """
import json, resource, sys, time
from datetime import datetime
from model.text.chat_messages import ChatTemplateError
from model.text.jinja_template import JinjaTemplate

source = json.loads(sys.stdin.readline())
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
pages = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (pages + (512 << 20),) * 2)
for name, text in source.items():
    began = time.process_time()
    try:
        said = JinjaTemplate(text, datetime.now, 8 << 20).render({"messages": []})[:40]
    except ChatTemplateError as error:
        said = "refused: " + str(error)
    print(json.dumps([name, said, time.process_time() - began]), flush=True)
print(json.dumps(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before))
"""


@pytest.fixture(scope="module")
def verdicts() -> tuple[dict[str, tuple[str, float]], int]:
    """What became of each bomb, with its seconds of CPU, in a process with 512 MiB to spare; and the KiB it took."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(CHECK)],
        input=json.dumps(BOMBS) + "\n",
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=290,
        check=True,
    )
    *lines, grown = map(json.loads, done.stdout.splitlines())
    return {name: (said, seconds) for name, said, seconds in lines}, grown


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_refused(verdicts: tuple[dict[str, tuple[str, float]], int], name: str) -> None:
    said, seconds = verdicts[0][name]
    assert said.startswith("refused: the chat template failed: ")
    assert len(said) < 300
    assert seconds < 30, "bounded, also on a machine that is ten times slower than any"


def test_no_bomb_takes_much_memory(verdicts: tuple[dict[str, tuple[str, float]], int]) -> None:
    assert verdicts[1] < 300 << 10


def rendered(source: str, **variables: Any) -> str:
    messages = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two\nlines"}]
    template = JinjaTemplate(source, lambda: datetime(2026, 1, 2), MAX_CHARS)
    return template.render({"messages": messages, **variables})


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{% for m in messages %}{{ loop.index }}/{{ loop.length }}{{ ',' if not loop.last }}{% endfor %}", "1/2,2/2"),
        ("{% for m in messages[::-1] if m.role == 'user' %}{{ m.content }}{% else %}none{% endfor %}", "one"),
        ("{% for key, value in {'a': 1}.items() %}{{ key }}={{ value }}{% endfor %}", "a=1"),
        ("{% for m in nothing %}x{% else %}none{% endfor %}", "none"),
        ("{% for i in [1, [2, [3]]] recursive %}{{ loop(i) if i is iterable else i }}{% endfor %}", "123"),
        ("{{ 'a' ~ 1 ~ none ~ nothing ~ ('b' ~ 'c') }}", "a1Nonebc"),
        ("{% set x = messages[0].content ~ '!' %}{{ x | upper }}", "ONE!"),
        ("{% macro f(x, y='-') %}[{{ x }}{{ y }}{{ nothing }}]{% endmacro %}{{ f(f('a')) }}", "[[a-]-]"),
        ("{% macro f() %}{{ caller() }}{% endmacro %}{% call f() %}a{{ 1 }}b{% endcall %}", "a1b"),
        ("{% set x %} a{{ 1 }}{{ none }} {% endset %}{{ x | trim }}", "a1None"),
        ("{% filter replace('o', '0') %}{{ messages[0].content }} foo{% endfilter %}", "0ne f00"),
        ("{{ messages | map(attribute='role') | join(', ') }}", "user, assistant"),
        ("{{ messages | selectattr('role', 'equalto', 'user') | list | length }}", "1"),
        ("{{ '%s is %d and %5.2f' % ('x', 5, 1.5) }}{{ '{} {:>3}'.format('a', 7) }}", "x is 5 and  1.50a   7"),
        ("{{ 'a.b'.split('.') | join('-') }}{{ '-'.join(['x', 'y']) }}{{ 'aXb'.replace('X', '__') }}", "a-bx-ya__b"),
        ("{{ messages[1].content | indent(2) }}", "two\n  lines"),
        ("{{ {'a': [1, 2]} | tojson(indent=1) }}", '{\n "a": [\n  1,\n  2\n ]\n}'),
        ("{{ [1, 2, 3] | sum }}{{ 10000000000 | default(5) }}{{ 3 * '=' }}", "610000000000==="),
        ("{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}", "2"),
        ("{% for i in range(9) %}{% if i == 3 %}{% break %}{% endif %}{{ i }}{% endfor %}", "012"),
        ("{% generation %}a{{ 'b' ~ 'c' }}{% endgeneration %}", "abc"),
    ],
)
def test_templates_say_what_they_always_said(source: str, text: str) -> None:
    assert rendered(source) == text


def test_a_long_conversation_is_within_the_budget() -> None:
    source = (
        "{% macro line(m) %}<|{{ m.role }}|>{{ m.content | trim }}\n{% endmacro %}"
        "{% for m in messages %}{{ line(m) ~ '' }}{{ loop.index0 }}{% endfor %}"
    )
    messages = [{"role": "user", "content": "x" * 500}] * 4096
    text = rendered(source, messages=messages)
    assert text.count("<|user|>") == 4096


def test_every_rendering_has_a_budget_of_its_own() -> None:
    template = JinjaTemplate("{% for i in range(99999) %}{% endfor %}{{ 'x' * 99 }}", datetime.now, 100)
    for _ in range(30):
        assert template.render({}) == "x" * 99


def test_a_budget_counts_down() -> None:
    budget = Budget(100, steps=5)
    budget.step(5)
    with pytest.raises(SecurityError, match="more than 1000000 steps"):
        budget.step()
    with pytest.raises(SecurityError, match="longer than 100"):
        budget.make(101)
    budget = Budget(100)
    for _ in range(8):
        budget.make(100)
    with pytest.raises(SecurityError, match="longer than 100"):
        budget.make(100)


@pytest.mark.parametrize("form", ["%100000d", "{:>123456}", "%*d", "%-*s", "{:{}}", "{0:{1}}", b"%999999d"])
def test_widths_that_are_absurd_or_come_from_elsewhere(form: str | bytes) -> None:
    with pytest.raises(SecurityError, match="a format names a width"):
        check_format(Budget(1 << 30), form, ())


def test_refusals_are_errors_of_the_template() -> None:
    with pytest.raises(ChatTemplateError, match="the chat template failed: "):
        rendered(BOMBS["center"])

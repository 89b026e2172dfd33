"""Chat templates in the styles that published models use, and conversations to try them on."""

from __future__ import annotations

from typing import Any

CHATML = """\
{% if messages[0]['role'] != 'system' %}
<|im_start|>system
You answer questions.<|im_end|>
{% endif %}
{% for turn in messages %}
{{ '<|im_start|>' + turn['role'] + '\\n' + turn['content'] + '<|im_end|>' }}
{% endfor %}
{% if add_generation_prompt %}
{{ '<|im_start|>assistant\\n' }}
{%- endif %}"""

LLAMA_2 = """\
{%- if messages[0].role == 'system' -%}
{%- set system = '<<SYS>>\\n' ~ messages[0].content ~ '\\n<</SYS>>\\n\\n' -%}
{%- set turns = messages[1:] -%}
{%- else -%}
{%- set system, turns = '', messages -%}
{%- endif -%}
{%- for turn in turns -%}
{%- if (turn.role == 'user') != (loop.index0 % 2 == 0) -%}
{{ raise_exception('user and assistant must take turns') }}
{%- endif -%}
{%- if turn.role == 'user' -%}
{{ bos_token + '[INST] ' + (system if loop.first else '') + turn.content.strip() + ' [/INST]' }}
{%- else -%}
{{ ' ' + turn.content.strip() + ' ' + eos_token }}
{%- endif -%}
{%- endfor -%}"""

LLAMA_3 = """\
{%- macro header(role) -%}
<|start_header_id|>{{ role }}<|end_header_id|>{{ '\\n\\n' }}
{%- endmacro -%}
{{ bos_token }}
{%- if date_string is not defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif -%}
{{ header('system') }}Today is {{ date_string }}.
{%- if tools is not none %}
{%- for tool in tools %}
{{ tool | tojson(indent=2) }}
{%- endfor %}
{%- endif -%}
<|eot_id|>
{%- for turn in messages %}
{{- header(turn.role) }}
{%- if turn.role == 'assistant' %}{% generation %}{{ turn['content'] | trim }}<|eot_id|>{% endgeneration %}
{%- else %}{{ turn['content'] | trim }}<|eot_id|>{% endif %}
{%- endfor -%}
{%- if add_generation_prompt %}{{ header('assistant') }}{% endif -%}"""

ZEPHYR = """\
{% for turn in messages %}
{% if turn['role'] not in ['system', 'user', 'assistant'] %}{% continue %}{% endif %}
    {% if turn['role'] == 'user' %}
{{ '<|user|>\\n' + turn['content'] + eos_token }}
    {% elif turn['role'] == 'system' %}
{{ '<|system|>\\n' + turn['content'] + eos_token }}
    {% else %}
{{ '<|assistant|>\\n' + turn['content'] + eos_token }}
    {% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}"""

GEMMA = """\
{{ bos_token }}
{%- set state = namespace(before='', seen=0) -%}
{%- for turn in messages -%}
{%- if turn.role == 'system' -%}{%- set state.before = turn.content ~ '\\n\\n' -%}{%- continue -%}{%- endif -%}
{%- set role = {'assistant': 'model'}.get(turn.role, turn.role) -%}
{{ '<start_of_turn>' ~ role ~ '\\n' ~ (state.before if state.seen == 0 else '') -}}
{{- turn.content | trim ~ '<end_of_turn>\\n' }}
{%- set state.seen = state.seen + 1 -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<start_of_turn>model\\n' }}{%- endif -%}"""

DETAILS = """\
{%- set extra = dict(a=1, b=[2, '<&>']) %}{{ extra | tojson }} {{ messages | map(attribute='role') | join(',') }}
{%- for turn in messages | reverse %}{{ '%02d' | format(loop.index) }}{{ turn.content | length }}
{%- if loop.index == 2 %}{% break %}{% endif %}{% endfor %}
{{ messages | selectattr('role', 'equalto', 'user') | list | count }}
{{ unk_token }}{{ pad_token }}{{ missing }}{{ messages[-1].content.split() | last | upper }}
{{ enable is defined and enable }}"""

STYLES = {"chatml": CHATML, "llama 2": LLAMA_2, "llama 3": LLAMA_3, "zephyr": ZEPHYR, "gemma": GEMMA, "all": DETAILS}

SYSTEM = {"role": "system", "content": "Be <brief> & kind."}
CHATS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "Hello"}],
    [SYSTEM, {"role": "user", "content": "  1 < 2?\n"}, {"role": "assistant", "content": "Yes, “it” is.\n\n"}],
    [
        {"role": "user", "content": "漢字 😀 \u202eabc"},
        {"role": "assistant", "content": "<|im_end|>{{ 7 * 7 }}{% if %} \\n", "name": None},
        {"role": "user", "content": "\ttabs\r\nand \x01 signs"},
    ],
]

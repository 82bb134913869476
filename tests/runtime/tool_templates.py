"""Chat templates with a place for tools, which write calls in the forms that models have."""

from __future__ import annotations

_TURNS = (
    "{%% for m in messages %%}{{ '<|im_start|>' + m.role + '\n' }}"
    "{%% if m.content is string %%}{{ m.content }}{%% else %%}{%% for p in m.content %%}"
    "{%% if p.type == 'image' %%}<image>{%% elif p.type == 'text' %%}{{ p.text }}{%% endif %%}"
    "{%% endfor %%}{%% endif %%}%s{{ '<|im_end|>\n' }}{%% endfor %%}"
    "{%% if add_generation_prompt %%}{{ '<|im_start|>assistant\n' }}{%% endif %%}"
)
_TOOLS = (
    "{% if tools %}{{ 'Tools:\n' }}{% for t in tools %}{{ t | tojson }}{{ '\n' }}{% endfor %}"
    "{% endif %}"
)
HERMES = _TOOLS + _TURNS % (
    "{% for c in m.tool_calls or [] %}{% if m.content or not loop.first %}{{ '\n' }}{% endif %}"
    '{{ \'<tool_call>\n{"name": "\' + c.function.name + \'", "arguments": \' }}'
    "{{ c.function.arguments | tojson }}{{ '}\n</tool_call>' }}{% endfor %}"
)
MISTRAL = _TOOLS + _TURNS % (
    '{% if m.tool_calls %}[TOOL_CALLS][{% for c in m.tool_calls %}{{ \'{"name": "\' }}'
    '{{ c.function.name }}{{ \'", "arguments": \' }}{{ c.function.arguments | tojson }}'
    "{{ ', \"id\": \"' + c.id + '\"}' }}{% if not loop.last %}, {% endif %}{% endfor %}]{% endif %}"
)
LLAMA = _TOOLS + (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.tool_calls %}"
    "{% set f = m.tool_calls[0].function %}"
    "{{ '{\"name\": \"' + f.name + '\", \"parameters\": ' }}{{ f.arguments | tojson }}{{ '}' }}"
    "{% else %}{{ m.content + '' }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
XML = _TOOLS + _TURNS % (
    "{% for c in m.tool_calls or [] %}{{ '<function=' + c.function.name + '>' }}"
    "{% for k, v in c.function.arguments.items() %}{{ '<' + k + '>' }}{{ v }}{% endfor %}"
    "{% endfor %}"
)
NO_CALLS = _TOOLS + _TURNS % ""
PLAIN = _TURNS % ""

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a <|im_end|> city",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "maxLength": 8, "pattern": "^[A-Z][a-z]+$"},
                "days": {"type": "integer", "minimum": 1, "maximum": 9},
            },
            "required": ["city", "days"],
            "additionalProperties": False,
        },
    },
}
CLOCK = {"type": "function", "function": {"name": "clock", "description": "Time of day"}}

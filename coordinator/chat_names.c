/* Chat formats by name, as templates of our own. What they write follows the model makers' descriptions of their formats. */
#include <string.h>

#include "coordinator/chat_internal.h"

const char *const chat_names[] = {"chatml", "llama2", "llama3", "mistral", NULL};

static const char chatml[] = "{% for m in messages %}"
                             "{{ '<|im_start|>' ~ m.role ~ '\\n' ~ m.content ~ '<|im_end|>\\n' }}"
                             "{% endfor %}"
                             "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}";

/* The system's words stand inside of the first [INST]; every turn of the assistant ends with EOS. */
static const char llama2[] =
    "{% set ns = namespace(system='', turns=messages) %}"
    "{% if messages and messages[0].role == 'system' %}"
    "{% set ns.system = '<<SYS>>\\n' ~ messages[0].content ~ '\\n<</SYS>>\\n\\n' %}{% set ns.turns = messages[1:] %}"
    "{% endif %}"
    "{% for m in ns.turns %}"
    "{% if m.role != ('user' if loop.index0 % 2 == 0 else 'assistant') %}"
    "{{ raise_exception('roles must alternate: user, assistant, user ... (one system message may come first)') }}"
    "{% endif %}"
    "{% if m.role == 'user' %}"
    "{{ bos_token ~ '[INST] ' ~ (ns.system if loop.first else '') ~ m.content|trim ~ ' [/INST]' }}"
    "{% else %}{{ ' ' ~ m.content|trim ~ ' ' ~ eos_token }}{% endif %}"
    "{% endfor %}";

static const char llama3[] =
    "{{ bos_token }}"
    "{% for m in messages %}"
    "{{ '<|start_header_id|>' ~ m.role ~ '<|end_header_id|>\\n\\n' ~ m.content|trim ~ '<|eot_id|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}";

/* The system's words go in front of the last thing the user said. */
static const char mistral[] =
    "{% set ns = namespace(system='', turns=messages) %}"
    "{% if messages and messages[0].role == 'system' %}"
    "{% set ns.system = messages[0].content ~ '\\n\\n' %}{% set ns.turns = messages[1:] %}"
    "{% endif %}"
    "{{ bos_token }}"
    "{% for m in ns.turns %}"
    "{% if m.role != ('user' if loop.index0 % 2 == 0 else 'assistant') %}"
    "{{ raise_exception('roles must alternate: user, assistant, user ... (one system message may come first)') }}"
    "{% endif %}"
    "{% if m.role == 'user' %}{{ '[INST] ' ~ (ns.system if loop.last else '') ~ m.content ~ ' [/INST]' }}"
    "{% else %}{{ ' ' ~ m.content|trim ~ eos_token }}{% endif %}"
    "{% endfor %}";

const char *chat_named_template(const char *name)
{
    static const char *const sources[] = {chatml, llama2, llama3, mistral};
    for (size_t i = 0; chat_names[i]; i++)
        if (strcmp(name, chat_names[i]) == 0)
            return sources[i];
    return NULL;
}

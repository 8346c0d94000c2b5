"""Chat formats of public models, written as Jinja from their published form, with the control tokens that each needs.

What is left out: tool calls, images, and dates that change from day to day.
"""

from __future__ import annotations

from dataclasses import dataclass

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from engine.data.template import ChatTemplate
from engine.data.tokenizer import load_tokenizer


@dataclass(frozen=True)
class Format:
    """`closing`: the token that ends an assistant turn, "" if none does. `turns`: how many exchanges the format can be trained on; 0: the
    engine refuses the template, saying `refused`. `system`: whether it takes a system message."""

    template: str
    control: tuple[str, ...]
    eos: str
    closing: str
    turns: int = 2
    system: bool = True
    refused: str = ""

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """A byte-level tokenizer with the format's control tokens and template."""
        tokenizer = load_tokenizer("bytes")
        own = {token.content for token in tokenizer.added_tokens_decoder.values()}
        new = [token for token in (*self.control, self.eos) if token not in own]
        tokenizer.add_special_tokens({"extra_special_tokens": list(dict.fromkeys(new))})
        tokenizer.eos_token, tokenizer.chat_template = self.eos, self.template
        if "bos_token" in self.template:
            tokenizer.bos_token = self.control[0]
        return tokenizer


def turns(user: str, assistant: str, system: str = "", *, first: str = "", prompt: str = "") -> str:
    """Jinja that writes every message by its role; {c} stands for the content. `first` precedes, `prompt` asks for an answer."""
    write = {role: "{{ '" + text.replace("{c}", "' + m.content + '") + "' }}" for role, text in
             (("user", user), ("assistant", assistant), ("system", system))}  # fmt: skip
    cases = "".join(f"{{% {'elif' if n else 'if'} m.role == '{role}' %}}{text}" for n, (role, text) in enumerate(write.items()))
    begin = "{{ bos_token }}" if first == "bos" else first
    return (
        begin + "{% for m in messages %}" + cases + "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '" + prompt + "' }}{% endif %}"
    )


def raising(template: str, role: str = "system") -> str:
    """The template, which refuses messages of `role`."""
    check = f"{{% if m.role == '{role}' %}}{{{{ raise_exception('no {role}') }}}}{{% endif %}}"
    return "{% for m in messages %}" + check + "{% endfor %}" + template


def default_system(text: str, template: str) -> str:
    """The template, with a system message of its own where the conversation has none."""
    return "{% if messages[0].role != 'system' %}" + text + "{% endif %}" + template


IM = ("<|im_start|>", "<|im_end|>")
CHATML = turns(*(rf"<|im_start|>{role}\n{{c}}<|im_end|>\n" for role in ("user", "assistant", "system")), prompt=r"<|im_start|>assistant\n")
HEADER = r"<|start_header_id|>{role}<|end_header_id|>\n\n"
LLAMA3_TOKENS = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
LLAMA31 = (
    "{{ bos_token }}{% set ns = namespace(rest=messages, system='') %}"
    "{% if messages[0].role == 'system' %}{% set ns.system = messages[0].content | trim %}{% set ns.rest = messages[1:] %}{% endif %}"
    "{{ '<|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n' }}"
    "{{ ns.system + '<|eot_id|>' }}"
) + LLAMA3.replace("{{ bos_token }}", "").replace("in messages", "in ns.rest")
LLAMA2 = (
    "{% set ns = namespace(system='') %}{% for m in messages %}"
    "{% if m.role == 'system' %}{% set ns.system = '<<SYS>>\n' + m.content + '\n<</SYS>>\n\n' %}"
    "{% elif m.role == 'user' %}{{ bos_token + '[INST] ' + ns.system + m.content | trim + ' [/INST]' }}{% set ns.system = '' %}"
    "{% else %}{{ ' ' + m.content | trim + ' ' + eos_token }}{% endif %}{% endfor %}"
)
MISTRAL1 = raising(turns("[INST] {c} [/INST]", "{c}</s> ", first="bos"))
MISTRAL2 = raising(turns("[INST] {c} [/INST]", " {c}</s>", first="bos"))
MISTRAL3 = raising(turns("[INST] {c}[/INST]", " {c}</s>", first="bos"))
GEMMA = raising(
    "{{ bos_token }}{% for m in messages %}{% set role = 'model' if m.role == 'assistant' else m.role %}"
    "{{ '<start_of_turn>' + role + '\n' + m.content | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
GEMMA3 = (
    "{{ bos_token }}{% set ns = namespace(system='') %}{% for m in messages %}"
    "{% if m.role == 'system' %}{% set ns.system = m.content + '\n\n' %}{% else %}"
    "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + ns.system + m.content | trim + '<end_of_turn>\n' }}"
    "{% set ns.system = '' %}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
PHI3 = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
QWEN3 = (
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{% set content = m.content.split('</think>')[-1].lstrip('\n') %}"
    "{% set thought = m.reasoning_content or '' %}{% if '</think>' in m.content %}"
    "{% set thought = m.content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}{% endif %}"
    "{% if m.role == 'assistant' and loop.index0 > ns.last %}"
    "{{ '<|im_start|>assistant\n<think>\n' + thought.strip('\n') + '\n</think>\n\n' + content + '<|im_end|>\n' }}"
    "{% else %}{{ '<|im_start|>' + m.role + '\n' + content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
R1 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '<｜User｜>' + m.content }}"
    "{% elif m.role == 'assistant' %}{{ '<｜Assistant｜>' + m.content.split('</think>')[-1] + '<｜end▁of▁sentence｜>' }}"
    "{% else %}{{ m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<｜Assistant｜><think>\n' }}{% endif %}"
)
DEEPSEEK = ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>")
COHERE_TOKENS = (
    "<BOS_TOKEN>",
    "<|START_OF_TURN_TOKEN|>",
    "<|END_OF_TURN_TOKEN|>",
    "<|USER_TOKEN|>",
    "<|CHATBOT_TOKEN|>",
    "<|SYSTEM_TOKEN|>",
)
COHERE = turns(
    *(f"<|START_OF_TURN_TOKEN|><|{role}_TOKEN|>{{c}}<|END_OF_TURN_TOKEN|>" for role in ("USER", "CHATBOT", "SYSTEM")),
    first="bos",
    prompt="<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>",
)
TULU = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + (eos_token if m.role == 'assistant' else '') }}"
    "{{ '' if loop.last and m.role == 'assistant' else '\n' }}{% endfor %}{{ '<|assistant|>\n' if add_generation_prompt else '' }}"
)
ZEPHYR = turns(*(rf"<|{role}|>\n{{c}}</s>\n" for role in ("user", "assistant", "system")), prompt=r"<|assistant|>\n")
GRANITE = turns(
    *(rf"<|start_of_role|>{role}<|end_of_role|>{{c}}<|end_of_text|>\n" for role in ("user", "assistant", "system")),
    prompt="<|start_of_role|>assistant<|end_of_role|>",
)
PHI4 = turns(
    *(f"<|im_start|>{role}<|im_sep|>{{c}}<|im_end|>" for role in ("user", "assistant", "system")), prompt="<|im_start|>assistant<|im_sep|>"
)
HELPFUL = r"{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}"
V3 = turns("<｜User｜>{c}", "<｜Assistant｜>{c}<｜end▁of▁sentence｜>", "{c}", first="bos", prompt="<｜Assistant｜>")
SOLAR = turns(r"### User:\n{c}\n\n", r"### Assistant:\n{c}</s>", r"### System:\n{c}\n\n", prompt=r"### Assistant:\n")
EXAONE = turns(r"[|user|]{c}\n", r"[|assistant|]{c}[|endofturn|]\n", r"[|system|]{c}[|endofturn|]\n", prompt="[|assistant|]")
EXAONE_TOKENS = ("[|user|]", "[|assistant|]", "[|system|]", "[|endofturn|]")
GLM_TOKENS = ("[gMASK]", "<sop>", "<|system|>", "<|observation|>")

FORMATS = {
    "llama-2": Format(LLAMA2, ("<s>",), "</s>", "</s>"),
    "llama-3": Format(LLAMA3, LLAMA3_TOKENS, "<|eot_id|>", "<|eot_id|>"),
    "llama-3 on its base tokenizer": Format(LLAMA3, (*LLAMA3_TOKENS, "<|end_of_text|>"), "<|end_of_text|>", "<|eot_id|>"),
    "llama-3.1": Format(LLAMA31, LLAMA3_TOKENS, "<|eot_id|>", "<|eot_id|>"),
    "llama-3.2": Format(LLAMA31.replace("26 Jul 2024", "{{ date_string }}"), LLAMA3_TOKENS, "<|eot_id|>", "<|eot_id|>"),
    "llama-3.3": Format(LLAMA31, LLAMA3_TOKENS, "<|eot_id|>", "<|eot_id|>"),
    "qwen-2": Format(default_system(HELPFUL, CHATML), (*IM, "<|endoftext|>"), "<|im_end|>", "<|im_end|>"),
    "qwen-2.5": Format(default_system(HELPFUL.replace("You are", "You are Qwen,"), CHATML), IM, "<|im_end|>", "<|im_end|>"),
    "qwen-2.5 base": Format(default_system(HELPFUL, CHATML), (*IM, "<|endoftext|>"), "<|endoftext|>", "<|im_end|>"),
    "qwen-3": Format(QWEN3, (*IM, "<think>", "</think>"), "<|im_end|>", "<|im_end|>", turns=1),
    "mistral-7b-v0.1": Format(MISTRAL1, ("<s>",), "</s>", "</s>", system=False),
    "mistral-7b-v0.2": Format(MISTRAL2, ("<s>",), "</s>", "</s>", system=False),
    "mistral-7b-v0.3": Format(MISTRAL3, ("<s>", "[INST]", "[/INST]"), "</s>", "</s>", system=False),
    "gemma": Format(GEMMA, ("<bos>", "<start_of_turn>", "<end_of_turn>"), "<eos>", "<end_of_turn>", system=False),
    "gemma-2": Format(GEMMA, ("<bos>", "<start_of_turn>", "<end_of_turn>", "<unused0>"), "<eos>", "<end_of_turn>", system=False),
    "gemma-3": Format(GEMMA3, ("<bos>", "<start_of_turn>", "<end_of_turn>"), "<eos>", "<end_of_turn>"),
    "phi-3": Format(PHI3, ("<|user|>", "<|assistant|>", "<|system|>", "<|end|>"), "<|endoftext|>", "<|end|>", turns=1),
    "phi-4": Format(PHI4, (*IM, "<|im_sep|>"), "<|endoftext|>", "<|im_end|>"),
    "olmo-2": Format("{{ bos_token }}" + TULU, ("<|endoftext|>",), "<|endoftext|>", "<|endoftext|>"),
    "smollm2": Format(default_system(HELPFUL.replace("assistant.", "AI assistant."), CHATML), IM, "<|im_end|>", "<|im_end|>"),
    "yi-1.5": Format(CHATML, IM, "<|im_end|>", "<|im_end|>"),
    "tulu-2": Format(TULU, (), "</s>", "</s>"),
    "tulu-3": Format(TULU, (), "<|end_of_text|>", "<|end_of_text|>"),
    "chatml on a base tokenizer": Format(CHATML, (*IM, "<|endoftext|>"), "<|endoftext|>", "<|im_end|>"),
    "zephyr": Format(ZEPHYR, (), "</s>", "</s>"),
    "openhermes": Format(CHATML, IM, "<|im_end|>", "<|im_end|>"),
    "internlm-2": Format("{{ bos_token }}" + CHATML, ("<s>", *IM), "</s>", "<|im_end|>"),
    "deepseek-llm": Format(
        turns(r"User: {c}\n\n", "Assistant: {c}<｜end▁of▁sentence｜>", r"{c}\n\n", first="bos", prompt="Assistant:"),
        DEEPSEEK[:2], DEEPSEEK[1], DEEPSEEK[1],
    ),
    "deepseek-v3": Format(V3, DEEPSEEK, DEEPSEEK[1], DEEPSEEK[1]),
    "deepseek-r1": Format(R1, (*DEEPSEEK, "<think>", "</think>"), DEEPSEEK[1], "", turns=0, refused="as the conversation grows"),
    "glm-4": Format(
        turns(r"<|user|>\n{c}", r"<|assistant|>\n{c}", r"<|system|>\n{c}", first="[gMASK]<sop>", prompt="<|assistant|>"),
        GLM_TOKENS, "<|endoftext|>", "",
    ),
    "command-r": Format(COHERE, COHERE_TOKENS, "<|END_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>"),
    "aya-expanse": Format(COHERE, COHERE_TOKENS, "<EOS_TOKEN>", "<|END_OF_TURN_TOKEN|>"),
    "granite-3": Format(GRANITE, ("<|start_of_role|>", "<|end_of_role|>"), "<|end_of_text|>", "<|end_of_text|>"),
    "vicuna": Format(turns("USER: {c} ", "ASSISTANT: {c}</s>", "{c} ", prompt="ASSISTANT:"), (), "</s>", "</s>"),
    "openchat-3.5": Format(
        turns("GPT4 Correct User: {c}<|end_of_turn|>", "GPT4 Correct Assistant: {c}<|end_of_turn|>", "{c}<|end_of_turn|>",
              first="bos", prompt="GPT4 Correct Assistant:"),
        ("<s>", "<|end_of_turn|>"), "<|end_of_turn|>", "<|end_of_turn|>",
    ),
    "solar": Format(SOLAR, (), "</s>", "</s>"),
    "exaone-3.5": Format(EXAONE, EXAONE_TOKENS, "[|endofturn|]", "[|endofturn|]"),
    "alpaca": Format(turns(r"### Instruction:\n{c}\n\n", r"### Response:\n{c}\n\n", r"{c}\n\n", prompt=r"### Response:\n"), (), "</s>", ""),
}  # fmt: skip


def chatml_bytes() -> PreTrainedTokenizerFast:
    tokenizer = load_tokenizer("bytes")
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.eos_token = "<|im_end|>"
    return tokenizer


CHATS = {name: ChatTemplate(chatml_bytes(), name) for name in ("tulu", "chatml")}


def trained_text(chat: ChatTemplate, messages: list[dict]) -> str:
    tokens, mask = chat.encode(messages)
    return str(chat.tokenizer.decode(tokens[1:][mask == 1]))


def ask(question: str, answer: str) -> list[dict]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def word_tokenizer(merges: list[tuple[str, str]]) -> PreTrainedTokenizerFast:
    """GPT-2's pipeline on a small vocabulary: byte-level BPE whose post-processor trims white space from offsets."""
    vocab = sorted(pre_tokenizers.ByteLevel.alphabet()) + [left + right for left, right in merges]
    tokenizer = Tokenizer(models.BPE(vocab={token: id for id, token in enumerate(vocab)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", bos_token="<s>")

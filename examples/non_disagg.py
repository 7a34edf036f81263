"""One prompt, one answer, one engine:

python examples/non_disagg.py --model demo:qwen3 --prompt "1+1=?" --max_tokens 128

The prompt goes through the model's chat template if it has one. Flags that are not named here go to the engine.
"""

import argparse

from nanodeploy import LLM, SamplingParams, flags

parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
parser.add_argument("--prompt", default="1+1=?")
parser.add_argument("--max_tokens", type=int, default=128)
parser.add_argument("--temperature", type=float, default=0.0)
args, engine_flags = parser.parse_known_args()

config = flags.parse(engine_flags, parser.prog)
params = SamplingParams(temperature=args.temperature, max_tokens=args.max_tokens)
with LLM(**config.to_dict()) as llm:
    if llm.tokenizer and llm.tokenizer.chat_template:
        (result,) = llm.chat([{"role": "user", "content": args.prompt}], params)
    else:
        (result,) = llm.generate([args.prompt], params)
    print(result.outputs[0].text)

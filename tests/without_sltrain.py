"""Opens compressed exports as a stranger does: by transformers, in a process that cannot import sltrain.

    HF_HOME=SCRATCH python tests/without_sltrain.py FOLDER ... < prompts.json

For each FOLDER it prints, as a line of JSON: the logits of IDS, what a batch of the prompts and each prompt alone are
continued by, with and without a cache, and the bytes of all tensors of the model. It saves the model to FOLDER_again,
opens that as well, and adds its logits.
"""

import json
import sys

sys.modules["sltrain"] = None  # type: ignore[assignment]  # from here on, importing it is an ImportError

import torch  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

IDS = torch.randint(512, (2, 200), generator=torch.Generator().manual_seed(3))
NEW = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}


@torch.no_grad()
def describe(folder: str, prompts: list[str]) -> dict:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    batch = tokenizer(prompts, return_tensors="pt", padding=True)
    alone = [tokenizer(prompt, return_tensors="pt") for prompt in prompts]
    found = {
        "logits": model(IDS).logits.tolist(),
        "first_logits": model(IDS[:, :3]).logits.tolist(),  # few rows are computed in another way
        "batch": model.generate(**batch, **NEW)[:, -NEW["max_new_tokens"] :].tolist(),
        "uncached": model.generate(**batch, **NEW, use_cache=False)[:, -NEW["max_new_tokens"] :].tolist(),
        "alone": [model.generate(**one, **NEW)[0, -NEW["max_new_tokens"] :].tolist() for one in alone],
        "bytes": sum({t.data_ptr(): t.nbytes for t in model.state_dict().values()}.values()),  # a tied head once
    }
    model.save_pretrained(f"{folder}_again")
    tokenizer.save_pretrained(f"{folder}_again")
    again = AutoModelForCausalLM.from_pretrained(f"{folder}_again", trust_remote_code=True)
    return {**found, "logits_again": again(IDS).logits.tolist()}


if __name__ == "__main__":
    texts = json.load(sys.stdin)
    for name in sys.argv[1:]:
        print(json.dumps(describe(name, texts)))

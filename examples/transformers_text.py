"""Lets transformers continue a text with an exported model; it needs nothing of nlscale.

nlscale checkpoint export runs/quickstart --to huggingface --out runs/hf
python examples/transformers_text.py runs/hf "def read(path):"
"""

from __future__ import annotations

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer

folder, text = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
inputs = tokenizer(text, return_tensors="pt")
output = model.generate(**inputs, max_new_tokens=200, do_sample=True, temperature=0.8)
print(tokenizer.decode(output[0]))

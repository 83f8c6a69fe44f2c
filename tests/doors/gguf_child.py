"""python gguf_child.py LLAMA_CPP FOLDER OUT: llama.cpp's own converter, in a process of its own.

It knows a tokenizer by the hash of what it makes of a text, and refuses those that it has not met; a test's small ones
are of that kind. Their name is given; all else is the converter's own.
"""

import sys

converter, folder, out = sys.argv[1:]
sys.path[:0] = [f"{converter}/gguf-py", converter]

import convert_hf_to_gguf  # noqa: E402
from conversion.base import TextModel  # noqa: E402

TextModel.get_vocab_base_pre = lambda self, tokenizer: "qwen2"
sys.argv = ["convert_hf_to_gguf.py", folder, "--outfile", out, "--outtype", "f32"]
convert_hf_to_gguf.main()

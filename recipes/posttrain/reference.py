"""The reference page of recipes for training after conversion, made from the schema.

`python -m relinear.recipes.posttrain.reference > docs/reference/posttrain.md`; a test holds the page against it.
"""

from __future__ import annotations

from ..fields import Section
from ..reference import table
from ..schema_glue import LoraSection
from .schema import ArithmeticSection, DpoSection, GrpoSection, PosttrainRecipe

_INTRO = """\
# Recipes after conversion

<!-- Made from the schema: python -m relinear.recipes.posttrain.reference > docs/reference/posttrain.md -->

What `relinear posttrain` carries out: SFT, DPO or GRPO of a converted model, by TRL
([how](../how-to/go-on-training.md)). Shipped are `sft`, `dpo` and `grpo`: `relinear show posttrain/sft`. A file of your
own is read as [any recipe](recipe.md#how-it-is-read): strictly, with `key=value` changes and `extends`.

```yaml
extends: sft
model: runs/mine/export
data: {source: chats.jsonl}
train: no-ffn
steps: 500
lr: 1e-4
```

## What a record holds

| method | fields |
|---|---|
| `sft` | `prompt`, `completion`; or `messages` alone, of which the assistant's are learnt |
| `dpo` | `prompt`, `chosen`, `rejected` |
| `grpo` | `prompt`, `answer`: a number or a text |

Prompts and completions are texts, or lists of `{role, content}`; all records of a source are alike. A completion that
is a text is followed by the tokenizer's end mark; how a conversation ends is the chat template's matter.
"""


def markdown() -> str:
    """The whole page."""
    parts = [_INTRO, table("The top level", PosttrainRecipe, list(PosttrainRecipe.model_fields), 2)]
    for name, info in PosttrainRecipe.model_fields.items():
        section = {"lora": LoraSection, "dpo": DpoSection, "grpo": GrpoSection}.get(name, info.annotation)
        if isinstance(section, type) and issubclass(section, Section):
            parts.append(table(name, section, list(section.model_fields), 2))
        if name == "data":
            parts.append(table("data.arithmetic", ArithmeticSection, list(ArithmeticSection.model_fields)))
    return "\n".join(parts)


if __name__ == "__main__":
    print(markdown(), end="")

"""README.md of a published model: where it comes from, what it can do, how it is loaded.

In the form of the hubs' model cards, so that the directory can be uploaded as it is.
"""

import shlex
import sys
from dataclasses import fields
from pathlib import Path

from training import lora
from training.checkpoint import write_text
from training.command import OF_THIS_CALL
from training.models import path_of, whereabouts

NO_TABLE = "The run had not ended when this was written."
FULL = """model = AutoModelForCausalLM.from_pretrained(here)
tokenizer = AutoTokenizer.from_pretrained(here)"""
ADAPTERS = """base = {base!r}
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), here)
tokenizer = AutoTokenizer.from_pretrained(base)"""
CARD = """---
library_name: {library}
{base_line}pipeline_tag: text-generation
tags:
- self-correction
- reinforcement-learning
---

# {name} after {script}

{about}

Base model: `{base}`; task: `{task}`.

## What it can do

{table}

## How to load it

```python
{imports}

here = "."  # this directory
{load}
```

The scripts that made it load it, too: `--model DIRECTORY`.

## How it was made

```sh
{command}
```
"""


def write_card(config, path: Path, table: str = NO_TABLE) -> None:
    """Into the directory of a model, or of adapters, that a training script with `config` made."""
    module, local = sys.modules.get(type(config).__module__), path_of(config.model).resolve()
    script = Path(getattr(module, "__file__", f"{type(config).__module__}.py")).name
    method, adapters = getattr(config, "method", None), lora.is_adapter(path)
    base = str(local) if local.exists() else config.model
    imports = "from peft import PeftModel\n" if adapters else ""
    text = CARD.format(
        library="peft" if adapters else "transformers",
        base_line="" if local.exists() else f'base_model: "{base}"\n',
        name=Path(base).name,
        script=script + (f" --method {method}" if method else ""),
        about=(getattr(module, "__doc__", "") or "").partition("\n")[0],
        base=whereabouts(config.model),
        task=config.task,
        table=table,
        imports=imports + "from transformers import AutoModelForCausalLM, AutoTokenizer",
        load=ADAPTERS.format(base=base) if adapters else FULL,
        command=command(config, script),
    )
    write_text(path / "README.md", text)


def command(config, script: str) -> str:
    """A call that makes the same run, wherever it is: with all that fits a model, and --lr."""
    words = ["python", script]
    for f in fields(config):
        value, fits = getattr(config, f.name), {"other", "paper"} & f.metadata.keys()
        if value is not None and f.name not in OF_THIS_CALL and (fits or value != f.default):
            words += [f"--{f.name}", str(value)]
    return shlex.join(words)

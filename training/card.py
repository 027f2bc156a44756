"""README.md of a published model: where it comes from, what it can do, how it is loaded.

In the form of the hubs' model cards, so that the directory can be uploaded as it is.
"""

import shlex
import sys
from dataclasses import fields
from pathlib import Path

from tasks.loading import task_of
from training import lora
from training.checkpoint import write_text
from training.command import OF_THIS_CALL
from training.models import path_of, whereabouts

NO_TABLE = "The run had not ended when this was written."
FULL = """model = AutoModelForCausalLM.from_pretrained(here)
tokenizer = AutoTokenizer.from_pretrained(here)"""
ADAPTERS = """model = AutoModelForCausalLM.from_pretrained({base!r})
model = PeftModel.from_pretrained(model, here)
tokenizer = AutoTokenizer.from_pretrained({base!r})"""
CARD = """---
library_name: {library}
{base_line}tags:
- self-correction
- reinforcement-learning
---

# {name} after {script}

{about}

Base model: `{base}`; task: {task}. Between two attempts the user says, after any answer:

> {correct}

or after a wrong one, and again after the model has reflected:

> {reflect}

> {retry}

## What it can do

{table}

## How to load it

```python
{imports}

here = "."  # this directory
{load}
```

or, with the scripts that made it, `python evaluate.py --model . --task {task}`.

## How it was made

```sh
{command}
```
"""


def write_card(config, path: Path, table: str = NO_TABLE) -> None:
    """Into the directory of a model, or of adapters, that a training script with `config` made."""
    module, base = sys.modules.get(type(config).__module__), whereabouts(config.model)
    adapters, task = lora.is_adapter(path), task_of(config)
    script = Path(getattr(module, "__file__", f"{type(config).__module__}.py")).name
    imports = "from peft import PeftModel\n" if adapters else ""
    said = {name: getattr(task, name) for name in ("correct", "reflect", "retry")}
    text = CARD.format(
        library="peft" if adapters else "transformers",
        base_line="" if path_of(config.model).exists() else f"base_model: {base}\n",
        name=Path(base).name,
        script=script,
        about=(getattr(module, "__doc__", "") or "").partition("\n")[0],
        base=base,
        task=config.task,
        table=table,
        imports=imports + "from transformers import AutoModelForCausalLM, AutoTokenizer",
        load=ADAPTERS.format(base=base) if adapters else FULL,
        command=command(config, script),
        **{name: words.replace("\n", "\n> ") for name, words in said.items()},
    )
    write_text(path / "README.md", text)


def command(config, script: str) -> str:
    """The call that a run was started with, as far as it matters."""
    words = ["python", script]
    for f in fields(config):
        value = getattr(config, f.name)
        if f.name not in OF_THIS_CALL and value not in (None, f.default):
            words += [f"--{f.name}", str(value)]
    return shlex.join(words)

"""The program that a response stands by."""

import re

CODE_FENCE = re.compile(r"^([ \t]*)```[ \t]*([^`\r\n]*)\r?$", re.MULTILINE)


def extract_code(response: str) -> str:
    """The program in a response, of what follows the last `</think>`.

    It is the last fenced block that is not blank, closed or not; else what stands between the last
    `[BEGIN]` and `[DONE]`; else all of it.
    """
    text = response.rpartition("</think>")[2]
    blocks, open_ = [], False
    for fence in CODE_FENCE.finditer(text):
        if open_ and not fence[2]:
            blocks[-1][1] = fence.start()
        else:  # one that names a language opens a block, even if the last was not closed
            blocks.append([fence.end(), len(text), len(fence[1])])
        open_ = not open_ or bool(fence[2])
    for start, end, indent in reversed(blocks):
        block = text[start:end]
        if block and not block.isspace():
            indented = re.compile(f"^[ \\t]{{0,{indent}}}", re.MULTILINE)
            return indented.sub("", block.strip("\r\n"))
    if blocks:
        return ""
    before, begin, after = text.rpartition("[BEGIN]")
    return (after if begin else before + after).partition("[DONE]")[0].strip("\r\n")

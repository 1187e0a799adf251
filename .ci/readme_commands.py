"""Print the two set-up commands of the README, one a line, as they stand there."""

import re
import sys
from pathlib import Path

readme = Path(sys.argv[1]).read_text(encoding="utf-8")
section = re.search(r"^## Set-up\n(.*?)(?=^## |\Z)", readme, re.MULTILINE | re.DOTALL)
blocks = re.findall(r"^```sh\n(.*?)^```", section[1] if section else "", re.MULTILINE | re.DOTALL)
commands = [line for block in blocks for line in block.splitlines()]
if len(commands) != 2:
    sys.exit(f'the README has {len(commands)} commands under "## Set-up", not two')
print("\n".join(commands))

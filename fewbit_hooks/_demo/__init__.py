"""`python -m fewbit_hooks demo`: one training with stock PyTorch and with few bits, side by side.

`_digits.py` and `_reviews.py` say what is trained (`_task.py`), `_fetch.py` gets what they need, `_training.py` trains
it in one way, `_runs.py` in all ways, each in a process of its own, and `_summary.py` shows what came out.
Nothing of this is imported by `import fewbit_hooks`.
"""

from ._runs import demo as demo
from ._runs import extras as extras
from ._task import Settings as Settings

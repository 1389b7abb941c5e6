"""Few-bit activations for PyTorch: `with fewbit.scope(bits=3):` and what autograd keeps of them shrinks to 3 bits.

See `help(fewbit_hooks.scope)`, the README, and docs/.
"""

from ._activations import Activation as Activation
from ._activations import activations as activations
from ._catalog import codebook as codebook
from ._codebook import Codebook as Codebook
from ._compare import Comparison as Comparison
from ._compare import ComparisonRow as ComparisonRow
from ._compare import compare as compare
from ._composites import register_module as register_module
from ._enable import Handle as Handle
from ._enable import active as active
from ._enable import disable as disable
from ._enable import enable as enable
from ._errors import FewbitError as FewbitError
from ._errors import FewbitRuntimeError as FewbitRuntimeError
from ._errors import FewbitTypeError as FewbitTypeError
from ._errors import FewbitValueError as FewbitValueError
from ._errors import FewbitWarning as FewbitWarning
from ._predict import Prediction as Prediction
from ._profile import profile as profile
from ._profile_table import Profile as Profile
from ._profile_table import ProfileRow as ProfileRow
from ._register import register as register
from ._report import Report as Report
from ._report import ReportRow as ReportRow
from ._scope import scope as scope

__version__ = "0.1.0"

__all__ = [
    "Activation",
    "Codebook",
    "Comparison",
    "ComparisonRow",
    "FewbitError",
    "FewbitRuntimeError",
    "FewbitTypeError",
    "FewbitValueError",
    "FewbitWarning",
    "Handle",
    "Prediction",
    "Profile",
    "ProfileRow",
    "Report",
    "ReportRow",
    "activations",
    "active",
    "codebook",
    "compare",
    "disable",
    "enable",
    "profile",
    "register",
    "register_module",
    "scope",
]

"""Elements to codes, codes to bytes, and back. Knows nothing of autograd, of scopes or of codebooks."""

from ._coders import Coder as Coder
from ._coders import Lookup as Lookup
from ._coders import Thresholds as Thresholds
from ._coders import compare as compare
from ._dispatch import backend as backend
from ._dispatch import decode as decode
from ._dispatch import decode_beside as decode_beside
from ._dispatch import encode as encode
from ._dispatch import encode_two_values as encode_two_values
from ._dispatch import fused_backend as fused_backend
from ._dispatch import gated_backend as gated_backend
from ._dispatch import is_installed as is_installed
from ._dispatch import pack_bits as pack_bits
from ._dispatch import second_value as second_value
from ._dispatch import unpack_bits as unpack_bits
from ._layout import Layout as Layout
from ._layout import computed_in as computed_in
from ._layout import is_dense as is_dense
from ._torch import has_nan as has_nan
from ._torch import is_finite as is_finite
from ._torch import not_a_number as not_a_number
from ._torch import packed_bytes as packed_bytes
from ._torch import rows as rows
from ._two_values import not_zero as not_zero
from ._two_values import two_value_rows as two_value_rows

"""Elements to codes, codes to bytes, and back. Knows nothing of autograd, of scopes or of codebooks."""

from ._beside import decode_beside as decode_beside
from ._coders import Coder as Coder
from ._coders import Lookup as Lookup
from ._coders import Thresholds as Thresholds
from ._layout import Layout as Layout
from ._torch import decode as decode
from ._torch import encode as encode
from ._torch import has_nan as has_nan
from ._torch import pack_bits as pack_bits
from ._torch import packed_bytes as packed_bytes
from ._torch import rows as rows
from ._torch import unpack_bits as unpack_bits
from ._two_values import not_zero as not_zero
from ._two_values import second_value as second_value
from ._two_values import two_value_rows as two_value_rows

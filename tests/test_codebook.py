"""Codebook: what it checks, how it reads inputs, how it is written, copied and drawn."""

import copy
import json
import pickle
import sys

import matplotlib
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fewbit_hooks import Codebook, FewbitError, FewbitTypeError, FewbitValueError, codebook, ops

FIELDS = {
    "name": "gelu",
    "bits": 2,
    "boundaries": [-1.0, 0.5, 2.0],
    "levels": [0.0, 0.25, 0.75, 1.0],
    "error": 0.5,
    "folded": False,
    "parameters": {"approximate": "none"},
    "weight": "uniform",
    "interval": (-10.0, 10.0),
}
BOOK = Codebook(**FIELDS)
FOLDED = Codebook(**FIELDS | {"name": "tanh", "folded": True, "parameters": {}, "boundaries": [0.25, 0.5, 2.0]})
finite = st.floats(allow_nan=False, allow_infinity=False)


@st.composite
def codebooks(draw):
    bits = draw(st.integers(1, 4))
    boundaries = sorted(draw(st.sets(finite, min_size=2**bits - 1, max_size=2**bits - 1)))
    low, high = sorted(draw(st.sets(finite, min_size=2, max_size=2)))
    return Codebook(
        name=draw(st.text()),
        bits=bits,
        boundaries=boundaries,
        levels=draw(st.lists(finite, min_size=2**bits, max_size=2**bits)),
        error=draw(st.floats(0, 1e9)),
        folded=draw(st.booleans()),
        parameters=draw(st.dictionaries(st.text(), st.none() | st.text() | finite)),
        weight=draw(st.text()),
        interval=(low, high),
    )


@settings(suppress_health_check=[HealthCheck.too_slow])  # the first text makes a table of all characters
@given(codebooks())
def test_json_gives_back_the_same_codebook(book):
    again = Codebook.from_json(book.to_json())
    assert again == book
    assert hash(again) == hash(book)


@given(codebooks())
def test_pickle_gives_back_the_same_codebook(book):
    assert pickle.loads(pickle.dumps(book)) == book


@given(codebooks(), st.lists(finite, min_size=2))
def test_codes_do_not_fall_as_inputs_grow(book, inputs):
    steps = Codebook(**{name: getattr(book, name) for name in FIELDS} | {"levels": range(2**book.bits)})
    x = np.sort(np.abs(inputs) if book.folded else inputs)
    assert (np.diff(steps.derivative(x)) >= 0).all()


def test_a_copy_is_equal_and_read_only():
    again = copy.deepcopy(BOOK)
    assert again == BOOK
    with pytest.raises(ValueError, match="read-only"):
        again.levels[0] = 5.0


@pytest.mark.parametrize("field", FIELDS)
def test_codebooks_that_differ_in_one_field_are_not_equal(field):
    others = {
        "name": "silu",
        "boundaries": [-1.0, 0.5, 2.5],
        "levels": [0.0, 0.25, 0.75, 1.5],
        "error": 0.25,
        "folded": True,
        "parameters": {"approximate": "tanh"},
        "weight": "normal(0, 1)",
        "interval": (-9.0, 10.0),
    }
    other = codebook("gelu", 3) if field == "bits" else Codebook(**FIELDS | {field: others[field]})
    assert other != BOOK
    assert len({BOOK, other, Codebook(**FIELDS)}) == 2


def test_a_codebook_is_not_equal_to_something_else():
    assert BOOK != "gelu"


def test_nothing_of_it_can_be_changed():
    with pytest.raises(AttributeError):
        BOOK.bits = 3
    with pytest.raises(ValueError, match="read-only"):
        BOOK.boundaries[0] = 3.0
    with pytest.raises(TypeError):
        BOOK.parameters["approximate"] = "tanh"


def test_it_does_not_share_the_arrays_it_was_made_from():
    levels = np.array(FIELDS["levels"])
    book = Codebook(**FIELDS | {"levels": levels})
    levels[0] = 9.0
    assert book == BOOK


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_derivative_gives_a_tensor_of_the_same_dtype_and_shape(dtype):
    x = torch.tensor([[-1.0, -0.99], [0.5, 0.51], [2.0, 2.1]], dtype=dtype, requires_grad=True)
    y = BOOK.derivative(x)
    assert y.dtype == dtype
    assert not y.requires_grad
    assert y.tolist() == [[0.0, 0.25], [0.25, 0.75], [0.75, 1.0]]


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_derivative_gives_an_array_of_the_same_dtype_and_shape(dtype):
    y = BOOK.derivative(np.array([[-1.0, -0.99], [0.5, 0.51], [2.0, 2.1]], dtype))
    assert y.dtype == dtype
    assert y.tolist() == [[0.0, 0.25], [0.25, 0.75], [0.75, 1.0]]


@pytest.mark.parametrize("boundary", [0.1, 0.7])  # the nearest float32 is above, below
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_derivative_compares_exactly_as_the_encoder_does(boundary, dtype):
    book = Codebook("gelu", 1, np.array([boundary]), np.array([0.0, 1.0]), 0.0, False, {}, "uniform", (-10.0, 10.0))
    near = torch.tensor([boundary], dtype=dtype)
    x = torch.cat([near, *(near.nextafter(torch.tensor([end], dtype=dtype)) for end in (-9.0, 9.0))])
    codes = ops.unpack_bits(ops.encode(x, 1, ops.Thresholds(book.boundaries)), 1, 3)
    assert book.derivative(x).tolist() == codes.tolist() == [float(v > boundary) for v in x.double().tolist()]
    if dtype != torch.bfloat16:
        assert book.derivative(x.numpy()).tolist() == codes.tolist()


@pytest.mark.parametrize(("x", "level"), [(0.5, 0.25), (3, 1.0), (-np.inf, 0.0), (np.inf, 1.0), (np.nan, 1.0)])
def test_derivative_takes_a_number(x, level):
    assert BOOK.derivative(x) == level
    assert BOOK.derivative(torch.tensor(float(x))) == level


@pytest.mark.parametrize("shape", [(0,), (0, 3), ()])
def test_derivative_keeps_empty_and_scalar_shapes(shape):
    assert BOOK.derivative(torch.zeros(shape)).shape == shape
    assert BOOK.derivative(np.zeros(shape)).shape == shape


def test_a_folded_codebook_reads_the_size_of_its_inputs():
    x = [-2.5, -2.0, -0.5, -0.1, 0.1, 0.5, 2.0, 2.5]
    expected = [1.0, 0.75, 0.25, 0.0, 0.0, 0.25, 0.75, 1.0]
    assert FOLDED.derivative(np.array(x)).tolist() == expected
    assert FOLDED.derivative(torch.tensor(x)).tolist() == expected


@given(st.lists(st.floats(width=32), max_size=30), st.sampled_from([BOOK, FOLDED, codebook("silu", 8)]))
def test_tensors_and_arrays_get_the_same_levels(inputs, book):
    x = np.array(inputs, np.float32)
    np.testing.assert_array_equal(book.derivative(torch.tensor(x)).numpy(), book.derivative(x))


@pytest.mark.parametrize("x", [torch.tensor([1]), torch.tensor([1j]), np.array([1j]), "1.0", [True]])
def test_derivative_refuses_what_is_not_a_real_number(x):
    with pytest.raises(FewbitTypeError, match="derivative takes"):
        BOOK.derivative(x)


def test_json_is_readable():
    lines = BOOK.to_json().splitlines()
    assert lines[1:4] == ['  "name": "gelu",', '  "bits": 2,', '  "boundaries": [-1.0, 0.5, 2.0],']
    assert max(map(len, codebook("gelu", 8).to_json().splitlines())) <= 120


@pytest.mark.parametrize(
    "corrupt",
    [
        lambda text: text[:40],
        lambda text: "",
        lambda text: "[]",
        lambda text: "3",
        lambda text: "[" * 100_000,
        lambda text: text.replace('"levels"', '"level"'),
        lambda text: text.replace('"bits": 2', '"bits": 3'),
        lambda text: text.replace('"bits": 2', '"bits": "2"'),
        lambda text: text.replace("0.25", "NaN"),
        lambda text: text.replace("0.25", '"0.25"'),
        lambda text: text.replace("-1.0,", "[-1.0],"),
        lambda text: text.replace("-1.0,", "5.0,"),
        lambda text: text.replace('"error": 0.5', '"error": -1'),
        lambda text: text.replace("false", '"no"'),
        lambda text: text.replace('{"approximate": "none"}', '{"approximate": []}'),
        lambda text: text.replace("[-10.0, 10.0]", "[10.0, -10.0]"),
    ],
)
def test_corrupted_json_is_refused_with_what_to_do(corrupt):
    assert corrupt(BOOK.to_json()) != BOOK.to_json()
    with pytest.raises(FewbitValueError, match=r"codebook.*Write it anew with Codebook.to_json"):
        Codebook.from_json(corrupt(BOOK.to_json()))


def test_json_that_is_no_text_is_refused():
    with pytest.raises(FewbitTypeError, match="from_json takes a str, got bytes"):
        Codebook.from_json(BOOK.to_json().encode())


@pytest.mark.parametrize(
    ("field", "value", "error", "message"),
    [
        ("bits", 0, FewbitValueError, "bits must be an integer from 1 to 8, got 0"),
        ("bits", True, FewbitTypeError, "bits must be an integer from 1 to 8, got True"),
        ("bits", 3, FewbitValueError, "boundaries must be 7 numbers for bits=3, got an array of shape (3,)"),
        ("levels", [0.0, 1.0], FewbitValueError, "levels must be 4 numbers for bits=2, got an array of shape (2,)"),
        ("boundaries", [0.0, 2.0, 1.0], FewbitValueError, "boundaries must be strictly increasing"),
        ("boundaries", [0.0, 1.0, 1.0], FewbitValueError, "boundaries must be strictly increasing"),
        ("boundaries", [0.0, 1.0, np.inf], FewbitValueError, "boundaries must be finite"),
        ("boundaries", ["0", "1", "2"], FewbitTypeError, "boundaries must be an array of numbers"),
        ("levels", [0.0, 1.0, np.nan, 2.0], FewbitValueError, "levels must be finite"),
        ("error", np.nan, FewbitValueError, "error must be finite and not negative, got nan"),
        ("error", "0", FewbitTypeError, "error must be a number, got '0'"),
        ("folded", 1, FewbitTypeError, "folded must be a bool, got 1"),
        ("name", None, FewbitTypeError, "name must be a str, got None"),
        ("parameters", [1], FewbitTypeError, "parameters must be a mapping from names, got [1]"),
        ("parameters", {"a": [1]}, FewbitTypeError, "parameters: a must be a number, a str, a bool or None, got [1]"),
        ("interval", (1, -1), FewbitValueError, "interval must be two finite numbers, the lower one first"),
    ],
)
def test_fields_that_make_no_codebook_are_refused(field, value, error, message):
    with pytest.raises(error) as caught:
        Codebook(**FIELDS | {field: value})
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(("name", "bits"), [("gelu", 3), ("tanh", 1), ("hardswish", 4), ("silu", 8)])
def test_plot_draws_an_image(tmp_path, name, bits):
    codebook(name, bits).plot(tmp_path / "book.png")
    assert (tmp_path / "book.png").read_bytes().startswith(b"\x89PNG")


def test_plot_says_what_it_shows(tmp_path):
    with matplotlib.rc_context({"svg.fonttype": "none"}):  # text as text
        codebook("elu", 3).plot(tmp_path / "default.svg")
        codebook("elu", 3, alpha=0.5).plot(tmp_path / "other.svg")
    assert ">elu, 3 bits: error 0.00517<" in (tmp_path / "default.svg").read_text()
    assert ">elu(alpha=0.5), 3 bits: error" in (tmp_path / "other.svg").read_text()
    for label in ("derivative", "levels", "boundaries"):
        assert f">{label}" in (tmp_path / "default.svg").read_text()


def test_plot_leaves_the_figures_of_pyplot_alone(tmp_path):
    from matplotlib import pyplot

    before = pyplot.get_fignums()
    BOOK.plot(tmp_path / "book.svg")
    assert pyplot.get_fignums() == before


def test_plot_refuses_an_ending_that_is_no_format(tmp_path):
    with pytest.raises(FewbitValueError, match=r"cannot draw into .*book\.gleu.*not supported"):
        BOOK.plot(tmp_path / "book.gleu")


def test_plot_without_matplotlib_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(FewbitError, match=r'pip install "fewbit-hooks\[plot\]"'):
        BOOK.plot(tmp_path / "book.png")


def test_json_of_another_kind_names_the_keys_it_lacks():
    with pytest.raises(FewbitValueError, match=r"has the keys \['bits', 'boundaries', .*, got \['a'\]"):
        Codebook.from_json(json.dumps({"a": 1}))

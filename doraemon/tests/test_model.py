"""The model says where keys are, and its statistics never change an answer."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from doraemon import Index
from doraemon import model as model_module
from doraemon.arrays import Codes
from doraemon.engine import choose
from doraemon.model import Model, build, choose_bits, refit
from doraemon.splicing import ranks_in

RNG = np.random.default_rng(5)


def shapes(n: int) -> dict[str, Codes]:
    """Sorted codes of many shapes."""
    far = RNG.integers(0, 2**64 - 1, n, dtype=np.uint64, endpoint=True)
    cascade = np.cumsum(RNG.pareto(0.3, n) * 10).clip(0, 2**62).astype(np.uint64)
    return {
        "uniform": np.sort(far),
        "dense": np.arange(n, dtype=np.uint64) + np.uint64(2**64 - n),
        "lognormal": np.sort(RNG.lognormal(30, 3, n).astype(np.uint64)),
        "heavy gaps": np.sort(cascade),
        "few values": np.sort(far[:3].repeat(n // 3 + 1)[:n]),
        "one value": np.full(n, 7, dtype=np.uint64),
        "clusters": np.sort((far[:n] >> np.uint64(56) << np.uint64(56)) + np.arange(n, dtype=np.uint64)),
        "extremes": np.array([0] * (n // 2) + [2**64 - 1] * (n - n // 2), dtype=np.uint64),
    }


def queries_for(codes: Codes) -> Codes:
    """Keys, their neighbours, and anything."""
    with np.errstate(over="ignore"):
        near = np.concatenate([codes, codes + np.uint64(1), codes - np.uint64(1)])
    return np.concatenate([near, RNG.integers(0, 2**64 - 1, 500, dtype=np.uint64, endpoint=True)])


def predictions(model: Model, codes: Codes) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Predicted rank and radius of each code, computed as the class comment says."""
    bucket = np.searchsorted(model.bounds[1:], codes)
    at = model.buckets[bucket]
    t = (codes - at["low"]).astype(float) * at["scale"]
    leaves = 2.0 ** (at["place"] & np.uint64(255))
    leaf = np.minimum(t, leaves - 1).astype(np.int64)
    base, slope, radius = model.pool.rows[(at["place"] >> np.uint64(8)).astype(np.int64) + leaf].T.astype(float)
    return at["start"] + base + slope * (t - leaf), radius


@pytest.mark.parametrize("shape", shapes(9))
@pytest.mark.parametrize("n", [1, 2, 33, 5000])
def test_ranks_are_those_of_searchsorted(shape: str, n: int, engine: str) -> None:
    codes = shapes(n)[shape]
    index, asked = Index(codes, engine=engine), queries_for(codes)
    for side in ("left", "right"):
        expected = np.searchsorted(codes, asked, side=side)  # type: ignore[call-overload]
        np.testing.assert_array_equal(index.searchsorted(asked, side), expected)  # type: ignore[arg-type]
    np.testing.assert_array_equal(index.contains(asked), np.isin(asked, codes))


@pytest.mark.parametrize("shape", shapes(9))
def test_every_key_is_within_the_radius_of_its_leaf(shape: str, engine: str) -> None:
    codes = shapes(5000)[shape]
    predicted, radius = predictions(build(codes, choose(engine)), codes)
    assert (np.abs(predicted - np.searchsorted(codes, codes)) <= radius + 1e-2).all()


@pytest.mark.parametrize("shape", shapes(9))
def test_both_engines_fit_the_same_leaves(shape: str) -> None:
    codes = shapes(5000)[shape]
    native, plain = build(codes, choose(None)), build(codes, "numpy")
    assert native.pool.used == plain.pool.used
    used = slice(native.pool.used)
    np.testing.assert_allclose(native.pool.rows[used], plain.pool.rows[used], rtol=1e-3, atol=1.01)


def test_no_leaf_can_change_an_answer(engine: str) -> None:
    for codes in shapes(3000).values():
        index = Index(codes, engine=engine)
        rows = index._state.run.model.pool.rows
        lines = RNG.normal(0, 1e4, (len(rows), 2))
        rows[:] = np.column_stack([lines, RNG.pareto(0.3, len(rows))])
        asked = queries_for(codes)
        np.testing.assert_array_equal(index.searchsorted(asked), np.searchsorted(codes, asked))
        few = asked[:: len(asked) // 300].tolist()
        assert [index.bisect_left(q) for q in few] == np.searchsorted(codes, np.array(few, np.uint64)).tolist()


def test_the_number_of_leaves_follows_the_mass_of_accesses() -> None:
    depths = np.full(64, 2048)
    hot = np.full(64, 0.01 / 63)
    hot[5] = 0.99
    even, skewed = choose_bits(depths), choose_bits(depths, hot)
    assert len(set(even.tolist())) == 1
    assert skewed[5] > even[5] > skewed[6]
    assert np.exp2(skewed).sum() < 2 * np.exp2(even).sum()


def test_a_number_of_leaves_stays_unless_it_is_clearly_wrong() -> None:
    depths, current = np.full(8, 2048), np.full(8, 6, dtype=np.uint8)
    noisy = np.full(8, 1 / 8) * RNG.uniform(0.8, 1.25, 8)
    np.testing.assert_array_equal(choose_bits(depths, noisy / noisy.sum(), current), current)


def test_leaves_once_fitted_are_not_fitted_again(engine: str) -> None:
    codes = shapes(20_000)["uniform"]
    model = build(codes, choose(engine))
    other = model.bits.copy()
    other[2] += 1
    changed, fitted = refit(model, codes, other, choose(engine))
    assert fitted.tolist() == [2]
    back, fitted = refit(changed, codes, model.bits, choose(engine))
    assert fitted.tolist() == []
    np.testing.assert_array_equal(back.buckets, model.buckets)


@pytest.mark.parametrize("most", [1, 100])
def test_a_full_pool_is_replaced_and_the_old_model_stays(
    engine: str, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_module, "MAX_POOL", most)
    codes = shapes(20_000)["lognormal"]
    first = model = build(codes, choose(engine))
    for extra in (1, 2, 3):
        model, _ = refit(model, codes, (first.bits + extra).astype(np.uint8), choose(engine))
        predicted, radius = predictions(model, codes)
        assert (np.abs(predicted - np.searchsorted(codes, codes)) <= radius + 1e-2).all()
    assert model.pool is not first.pool
    known = (model.pool.first_rows >= 0).sum(axis=1)
    assert (known == (4 if most == 100 else 1)).all()
    predicted, radius = predictions(first, codes)
    assert (np.abs(predicted - np.searchsorted(codes, codes)) <= radius + 1e-2).all()


def test_the_fit_in_c_refuses_arrays_that_do_not_fit() -> None:
    native = pytest.importorskip("doraemon._native")
    keys, scales = np.arange(10, dtype=np.uint64), np.ones(1)
    bits, out = np.zeros(1, np.uint8), np.zeros((1, 3), np.float32)
    bad: list[tuple[Any, ...]] = [
        (keys, np.array([[0, 11]]), scales, bits, 1.0, out),
        (keys, np.array([[5, 5]]), scales, bits, 1.0, out),
        (keys, np.array([[-1, 5]]), scales, bits, 1.0, out),
        (keys, np.array([[0, 10]]), scales, bits + np.uint8(1), 1.0, out),
        (keys, np.array([[0, 10]]), np.ones(2), bits, 1.0, out),
    ]
    for arguments in bad:
        with pytest.raises(ValueError, match="fit together"):
            native.fit(*arguments)


def test_splicing_in_c_refuses_places_outside_the_result() -> None:
    native = pytest.importorskip("doraemon._native")
    old, more = np.arange(4), np.arange(2)
    for places in ([-1, 0], [0, 6], [3, 2], [2, 2], [0, 2**62]):
        with pytest.raises(ValueError, match="fit together"):
            native.splice(old, np.array(places), more, np.zeros(6, dtype=np.int64))
    for out in (5, 7):
        with pytest.raises(ValueError, match="fit together"):
            native.splice(old, np.array([0, 1]), more, np.zeros(out, dtype=np.int64))


@pytest.mark.parametrize("n", [0, 1, 2, 63, 64, 65, 1000])
@pytest.mark.parametrize("right", [False, True])
def test_ranks_without_a_model_are_those_of_searchsorted(n: int, right: bool) -> None:
    codes = np.sort(RNG.choice(np.array([0, 1, 5, 2**63, 2**64 - 2, 2**64 - 1], dtype=np.uint64), n))
    asked = np.array([0, 1, 2, 5, 6, 2**63, 2**64 - 2, 2**64 - 1] * 17, dtype=np.uint64)
    expected = np.searchsorted(codes, asked, side="right" if right else "left")
    for engine in (choose(None), choose("numpy")):
        np.testing.assert_array_equal(ranks_in(codes, asked, right, engine), expected)


def test_ranks_in_c_refuse_a_wrong_number_of_places() -> None:
    native = pytest.importorskip("doraemon._native")
    codes = np.arange(4, dtype=np.uint64)
    with pytest.raises(ValueError, match="as many places"):
        native.ranks(codes, codes, 0, np.zeros(3, dtype=np.int64))


def test_long_and_short_windows_are_searched_in_one_batch(engine: str) -> None:
    """Buckets with a jump in them have long windows, the others short ones; batches mix them in any proportion."""
    smooth = np.arange(100_000, dtype=np.uint64) * np.uint64(1000)
    rough = np.sort(RNG.integers(0, 2**62, 3000, dtype=np.uint64)) + smooth[-1]
    codes = np.concatenate([smooth, rough, rough[-1] + np.uint64(2**62) + np.arange(5000, dtype=np.uint64)])
    index = Index(codes, engine=engine)
    assert index.explain().window_max > 16
    for share in (0.0, 0.02, 0.5, 1.0):
        for count in (1, 31, 64, 65, 1000):
            at = np.where(
                RNG.random(count) < share, RNG.integers(99_000, len(codes), count), RNG.integers(0, 9000, count)
            )
            asked = codes[at] + RNG.integers(0, 2, count, dtype=np.uint64)
            np.testing.assert_array_equal(index.searchsorted(asked), np.searchsorted(codes, asked))

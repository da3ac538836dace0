import numpy as np
import pytest

from export.demo.clusters import balanced_clusters


def test_clusters_are_equal_and_hold_every_vector_once() -> None:
    vectors = np.random.default_rng(0).standard_normal((96, 5)).astype(np.float32)
    clusters = balanced_clusters(vectors, num_clusters=8, seed=0)
    assert clusters.shape == (8, 12)
    assert sorted(clusters.flatten().tolist()) == list(range(96))


def test_separate_groups_become_the_clusters() -> None:
    rng = np.random.default_rng(1)
    vectors = np.repeat(np.eye(4, dtype=np.float32) * 50, 6, axis=0)
    clusters = balanced_clusters(vectors + rng.standard_normal(vectors.shape).astype(np.float32), 4, seed=3)
    assert {tuple(row // 6) for row in clusters} == {(g,) * 6 for g in range(4)}


def test_clusters_depend_only_on_the_seed() -> None:
    vectors = np.random.default_rng(2).standard_normal((40, 3)).astype(np.float32)
    assert (balanced_clusters(vectors, 4, seed=1) == balanced_clusters(vectors, 4, seed=1)).all()


def test_vectors_that_cannot_be_divided_are_refused() -> None:
    with pytest.raises(ValueError, match="10 vectors cannot fill 4 clusters evenly"):
        balanced_clusters(np.zeros((10, 2), np.float32), 4, seed=0)

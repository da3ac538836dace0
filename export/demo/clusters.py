"""Clusters of equal size for the drafter's centroid head: k-means where every cluster takes the same number of tokens.

Source: Lloyd's k-means with a capacity per cluster, filled greedily from the closest pair on.
"""

import numpy as np
from numpy.typing import NDArray


def balanced_clusters(
    vectors: NDArray[np.float32], num_clusters: int, seed: int, num_rounds: int = 20
) -> NDArray[np.int64]:
    """Indices of the vectors as `[num_clusters, vectors per cluster]`, ascending within a cluster.

    Raises:
        ValueError: the vectors cannot be divided evenly.
    """
    if len(vectors) % num_clusters:
        raise ValueError(f"{len(vectors)} vectors cannot fill {num_clusters} clusters evenly")
    rng = np.random.default_rng(seed)
    centers = vectors[rng.choice(len(vectors), num_clusters, replace=False)]
    for _ in range(num_rounds):
        members = _fill(_squared_distances(vectors, centers), len(vectors) // num_clusters)
        centers = vectors[members].mean(axis=1)
    return members


def _squared_distances(vectors: NDArray[np.float32], centers: NDArray[np.float32]) -> NDArray[np.float32]:
    lengths: NDArray[np.float32] = (vectors**2).sum(axis=1)[:, None] + (centers**2).sum(axis=1)
    return lengths - 2 * vectors @ centers.T


def _fill(distances: NDArray[np.float32], cluster_size: int) -> NDArray[np.int64]:
    """Members `[num_clusters, cluster_size]`; a vector that is far from all but one cluster chooses early."""
    num_vectors, num_clusters = distances.shape
    regret = distances - distances.mean(axis=1, keepdims=True)
    members: list[list[int]] = [[] for _ in range(num_clusters)]
    is_free = [True] * num_vectors
    for pair in np.argsort(regret, axis=None, kind="stable").tolist():
        vector, cluster = divmod(pair, num_clusters)
        if is_free[vector] and len(members[cluster]) < cluster_size:
            members[cluster].append(vector)
            is_free[vector] = False
    return np.sort(np.array(members, np.int64), axis=1)

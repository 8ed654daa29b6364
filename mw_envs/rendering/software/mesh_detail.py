"""Coarser meshes for small pictures.

MetaWorld's robot has 67,000 triangles, most of them smaller than a pixel; without a GPU they are what a frame costs.
"""

from __future__ import annotations

import copy

import mujoco
import numpy as np


def coarsen_meshes(model: mujoco.MjModel, cell: float) -> mujoco.MjModel:
    """A copy of the model, to draw from, in which vertices within a cube of side ``cell`` meters are one.

    Vertex clustering (Rossignac and Borrel 1993): vertices of a cell move to their mean; triangles that collapse or
    repeat another are dropped. Normals stay those of the fine mesh, so shading does.
    """
    model = copy.copy(model)
    for mesh in range(model.nmesh):
        first_vertex, first_face = model.mesh_vertadr[mesh], model.mesh_faceadr[mesh]
        vertices = model.mesh_vert[first_vertex : first_vertex + model.mesh_vertnum[mesh]]
        faces = slice(first_face, first_face + model.mesh_facenum[mesh])
        _, cluster = np.unique(np.floor(vertices / cell).astype(np.int64), axis=0, return_inverse=True)
        cluster = cluster.ravel()
        corners = np.sort(cluster[model.mesh_face[faces]], axis=1)
        kept = np.zeros(len(corners), dtype=bool)
        kept[np.unique(corners, axis=0, return_index=True)[1]] = True
        kept &= (corners[:, 0] != corners[:, 1]) & (corners[:, 1] != corners[:, 2])
        if not kept.any():  # a mesh smaller than a cell: leave it as it is
            continue
        size = np.bincount(cluster)
        for axis in range(3):
            vertices[:, axis] = (np.bincount(cluster, vertices[:, axis]) / size)[cluster]
        remaining = slice(first_face, first_face + int(kept.sum()))
        for field in (model.mesh_face, model.mesh_facenormal, model.mesh_facetexcoord):
            field[remaining] = field[faces][kept]
        model.mesh_facenum[mesh] = int(kept.sum())
    return model

"""Shapes of the grids of tiles that an image may be cut into."""

# LLaVA-1.6's, (rows, columns) of tiles
GRID_SHAPES = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))


def shapes_up_to(max_tiles: int) -> list[tuple[int, int]]:
    """Every (rows, columns) of 2 to `max_tiles` tiles, fewest tiles first: for documents."""
    shapes = [(r, c) for r in range(1, max_tiles + 1) for c in range(1, max_tiles // r + 1) if r * c > 1]
    return sorted(shapes, key=lambda shape: (shape[0] * shape[1], shape))

"""The forest: what is shared, and that nothing is lost by sharing."""

import torch

from keel.models.packing import pack


def walk(packing, node):
    """Tokens from the root to a node."""
    path = []
    while node >= 0:
        path.append(int(packing.tokens[node]))
        node = int(packing.parent[node])
    return path[::-1]


def test_equal_prefixes_are_one_node():
    tokens = torch.tensor([[5, 6, 7, 0], [5, 6, 8, 9], [5, 6, 7, 0]])
    packing = pack(tokens, torch.tensor([3, 4, 3]))
    assert len(packing) == 5  # 5, 6, 7, 8, 9
    assert packing.node[0, :3].tolist() == packing.node[2, :3].tolist()
    assert len(packing.leaves) == 2


def test_a_row_that_is_a_prefix_of_another_is_no_leaf():
    packing = pack(torch.tensor([[1, 2, 9, 9], [1, 2, 3, 4]]), torch.tensor([2, 4]))
    assert len(packing) == 4
    assert len(packing.leaves) == 1


def test_without_sharing_every_token_is_its_own_node():
    tokens = torch.tensor([[1, 2, 3], [1, 2, 3]])
    assert len(pack(tokens, torch.tensor([3, 2]), share=False)) == 5


def test_every_row_can_be_read_back_from_its_last_node():
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        rows, width = int(torch.randint(1, 9, (), generator=generator)), int(torch.randint(1, 7, (), generator=generator))
        tokens = torch.randint(0, 3, (rows, width), generator=generator)
        lengths = torch.randint(1, width + 1, (rows,), generator=generator)
        for share in (True, False):
            packing = pack(tokens, lengths, share)
            for row in range(rows):
                n = int(lengths[row])
                assert walk(packing, int(packing.node[row, n - 1])) == tokens[row, :n].tolist()
                assert packing.positions[packing.node[row, :n]].tolist() == list(range(n))
            assert torch.equal(packing.leaves.flatten()[packing.place], torch.arange(len(packing)))


def test_the_number_of_nodes_is_the_number_of_distinct_prefixes():
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 2, (30, 6), generator=generator)
    lengths = torch.randint(1, 7, (30,), generator=generator)
    distinct = {tuple(row[: t + 1]) for row, n in zip(tokens.tolist(), lengths.tolist(), strict=True) for t in range(n)}
    assert len(pack(tokens, lengths)) == len(distinct)

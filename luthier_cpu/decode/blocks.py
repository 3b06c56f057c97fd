"""Matrices of adapters in blocks of 64 columns, which kernels sum up at a time.

A block is read from its begin to its end, where whole rows would be read in short pieces. Blocks are
[blocks, R, 64], or where kernels multiply pairs of bfloat16 [blocks, R/2, 64, 2]: of each column two rows
side by side.

Legend: N tokens, R rows of a matrix.
"""

import torch
from torch.nn import functional

from luthier_cpu.codegen import kernels

BLOCK = 64


def are_paired(like: torch.Tensor) -> bool:
    """Whether blocks of numbers of this type are stored in pairs of rows."""
    return like.dtype == torch.bfloat16 and kernels.has_pairs()


def shape_of_blocks(num_rows: int, num_columns: int, *, are_pairs: bool) -> tuple[int, ...]:
    """Return the shape of a matrix [R, columns] in blocks; R is even."""
    num_blocks = -(-num_columns // BLOCK)
    return (num_blocks, num_rows // 2, BLOCK, 2) if are_pairs else (num_blocks, num_rows, BLOCK)


def to_blocks(rows: torch.Tensor) -> torch.Tensor:
    """Return a matrix [R, columns] in blocks, filled up with zeros; R is even."""
    filled = functional.pad(rows, (0, -rows.shape[1] % BLOCK))
    return by_blocks(filled.t(), are_pairs=are_paired(rows)).contiguous()


def by_blocks(columns: torch.Tensor, *, are_pairs: bool) -> torch.Tensor:
    """Return a view of a matrix's columns [columns, R] in the order of blocks; they fill whole blocks."""
    num_columns, num_rows = columns.shape
    by_block = (num_columns // BLOCK, BLOCK)
    shape = (*by_block, num_rows // 2, 2) if are_pairs else (*by_block, num_rows)
    return columns.view(shape).transpose(1, 2)


def of_blocks(blocks: torch.Tensor, num_columns: int) -> torch.Tensor:
    """Return the matrix [R, columns] that is stored in blocks."""
    by_block = blocks.transpose(2, 3).flatten(1, 2) if blocks.dim() == 4 else blocks
    return by_block.transpose(0, 1).flatten(1)[:, :num_columns]


def check_blocks(blocks: torch.Tensor) -> None:
    """Refuse what kernels would read in another order than it is stored in."""
    if (blocks.dim() == 4) != are_paired(blocks):
        raise ValueError("A matrix is stored in other blocks than the kernels of this machine read.")


def times_blocks(x_NR: torch.Tensor, blocks: torch.Tensor, num_columns: int) -> torch.Tensor:
    """Return the product with a matrix in blocks, [N, columns]."""
    if blocks.dim() == 4:
        return torch.mm(x_NR, of_blocks(blocks, num_columns))
    product = torch.matmul(x_NR, blocks)
    return product.transpose(0, 1).reshape(len(x_NR), -1)[:, :num_columns]

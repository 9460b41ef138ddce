from sparsekit.nn.linear import SparseLinear


class SparseConv2d(SparseLinear): ...


class SparseConv1d(SparseLinear): ...

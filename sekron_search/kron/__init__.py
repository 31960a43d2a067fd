"""Structures of Kronecker sequences: notation, enumeration, execution plan, fitting, layers.

W, of shape (F, C, Kh, Kw), is approximated by the sum over all rank indices of A_1 (x) A_2 (x) ... (x) A_S,
where (x) is the Kronecker product on the four modes, the first factor slowest (SeKron, Hameed et al. 2022).
The letters of this package: S factors of shapes (f_k, c_k, h_k, w_k), rank indices a, b, ..., groups G.
"""

"""Structures of Kronecker sequences: notation, enumeration, execution plan, fitting, layers.

W, of shape (F, C, Kh, Kw), is approximated by the sum over all rank indices of A_1 (x) A_2 (x) ... (x) A_S,
where (x) is the Kronecker product on all modes, the first factor slowest (SeKron, Hameed et al. 2022).
The letters of this package: S factors of shapes (f_k, c_k, h_k, w_k), rank indices a, b, ..., groups G.
F are always the out-channels and C the in-channels. A linear layer has Kh = Kw = 1, a 1-d convolution Kw = 1, and a
3-d convolution one kernel axis more in front, Kd; "*kernel" stands for the kernel axes, however many there are.
"""

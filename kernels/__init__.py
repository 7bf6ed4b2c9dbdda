"""Device code without torch: CUDA sources (compiled into zsq_ext._C) and Triton kernels with their launchers."""
